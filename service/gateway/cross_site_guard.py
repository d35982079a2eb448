"""Refuses requests that another site's page makes a browser send. Checks Host, Origin and type.

The rules are:

- While no API key is needed, the `Host` must be a name that no other site can own: an IP address, a
  name without a dot, a name under a domain that nobody can register, or a configured name. This
  prevents DNS rebinding, where the name of a foreign site resolves to this machine.
- While no API key is needed, an `Origin` must be the service's own or a configured origin, and
  subresources that the browser reports as cross-site (`Sec-Fetch-Site`) are refused.
- A POST with a body must be JSON, because a page may send some other types without a preflight.
  Uploads are forms. A foreign page's form has an `Origin`, which the second rule refuses.
- Ollama's API also takes JSON that is declared as `application/x-www-form-urlencoded`, which is
  what `curl -d` says, from clients that are no browsers. A browser's form of this type is never
  JSON, because it encodes the braces; and every script that could send JSON as this type has an
  `Origin`. Other types, such as `text/plain`, can be JSON in a form, and are refused.
- No body is compressed: nothing here would unpack it.

Once keys are needed, a foreign page can't send a key. Then only names in `allowed_hosts` restrict
the `Host`. The module imports only the standard library, because the start page uses the rules
before the rest of the service has been loaded.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from typing import Any

from service.errors import CoeError, ForbiddenError, InvalidRequestError, UnsupportedMediaTypeError

_HOST = re.compile(r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+?)\.?(?::(\d{1,5}))?$")
_JSON = re.compile(rb"^\s*application/(?:json|[a-z0-9.+-]+\+json)\s*(?:;|$)", re.IGNORECASE)
_FORM = re.compile(rb"^\s*multipart/form-data\s*;", re.IGNORECASE)
_CURL = re.compile(rb"^\s*application/x-www-form-urlencoded\s*(?:;|$)", re.IGNORECASE)
_UPLOADS = frozenset({"/v1/files", "/v1/audio/transcriptions"})
_OLLAMA = "/api/"
# Headers of browsers; a page's script can't leave them out.
_BROWSERS = (b"origin", b"referer", b"sec-fetch-site")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_SAFE = frozenset({b"GET", b"HEAD", b"OPTIONS"})
# Values of Sec-Fetch-Site for pages of another origin.
_FOREIGN = frozenset({b"cross-site", b"same-site"})
ANY = "*"
# Domains of machines, networks and clusters. The public DNS can't contain them.
_PRIVATE = (".localhost", ".local", ".internal", ".home.arpa", ".lan", ".svc")


class CrossOriginRules:
    """The rules of one config.

    Args:
        host: The address on which the service listens.
        allowed_hosts: Further allowed values of `Host`, such as `api.example.com` or
            `*.example.com`; `*` allows every name.
        cors_origins: Origins whose pages may send requests, such as `https://chat.example.com`; `*`
            allows every origin once keys are needed.
    """

    def __init__(
        self, host: str, allowed_hosts: Iterable[str] = (), cors_origins: Iterable[str] = ()
    ) -> None:
        names = [name.lower() for name in allowed_hosts]
        self._any_host = ANY in names
        self._restricted = bool(names)
        self._suffixes = tuple(name[1:] for name in names if name.startswith("*."))
        own = {host.lower(), socket.gethostname().lower()}
        self._names = frozenset(own | {name for name in names if not name.startswith("*")})
        self._origins = frozenset(origin.lower() for origin in cors_origins)

    def may_read(self, origin: str | None) -> bool:
        """Whether pages of another origin may read replies."""
        return origin is not None and (origin.lower() in self._origins or ANY in self._origins)

    def check(
        self,
        method: bytes,
        headers: Mapping[bytes, bytes],
        *,
        keyless: bool,
        body: bool,
        uploads: bool = False,
        ollama: bool = False,
    ) -> None:
        """Refuse a request of a foreign page.

        Args:
            method: The HTTP method.
            headers: The headers, by name in lower case.
            keyless: Whether the service answers without a key.
            body: Whether the request has a body.
            uploads: Whether the endpoint takes forms.
            ollama: Whether it is one of Ollama's API.

        Raises:
            InvalidRequestError: The `Host` is not valid.
            ForbiddenError: The `Host` or `Origin` is not allowed.
            UnsupportedMediaTypeError: The body is not declared as JSON, or is compressed.
        """
        host = headers.get(b"host")
        if host is not None and (keyless or self._restricted):
            self._check_host(host)
        if keyless:
            self._check_origin(method, host, headers)
        if method == b"POST" and body:
            _check_type(headers, uploads=uploads, ollama=ollama)

    def _check_host(self, given: bytes) -> None:
        found = _HOST.match(given.decode("latin-1"))
        if found is None:
            raise InvalidRequestError("the header Host holds no host name")
        name = found[1].lower()
        if self._any_host or name in self._names or name.endswith(self._suffixes):
            return
        if _is_local_name(name):
            return
        raise ForbiddenError(
            f"the host {name[:128]!r} is not one of this service's; allowed are IP addresses, "
            f"names without a dot or under {', '.join(_PRIVATE)}, and those in "
            "`server.allowed_hosts`",
            code="host_not_allowed",
        )

    def _check_origin(
        self, method: bytes, host: bytes | None, headers: Mapping[bytes, bytes]
    ) -> None:
        given = headers.get(b"origin")
        if given is None:
            # A link on a foreign page may open the console, but such a page may not embed it.
            foreign = headers.get(b"sec-fetch-site") in _FOREIGN
            if foreign and not (
                method in _SAFE
                and headers.get(b"sec-fetch-mode") == b"navigate"
                and headers.get(b"sec-fetch-dest", b"document") == b"document"
            ):
                raise ForbiddenError(
                    "pages of other origins are refused while no API key is needed; "
                    "`server.cors_origins` can allow its origin",
                    code="origin_not_allowed",
                )
            return
        origin = given.decode("latin-1").lower()
        if origin in self._origins:
            return
        scheme, _, authority = origin.partition("://")
        if host is not None and _with_port(authority, scheme) == _with_port(
            host.decode("latin-1").lower(), scheme
        ):
            return
        raise ForbiddenError(
            f"the origin {origin[:128]!r} is refused while no API key is needed; "
            "`server.cors_origins` can allow it",
            code="origin_not_allowed",
        )


def _check_type(headers: Mapping[bytes, bytes], *, uploads: bool, ollama: bool) -> None:
    kind = headers.get(b"content-type", b"")
    by_curl = ollama and _CURL.match(kind) and not any(name in headers for name in _BROWSERS)
    if not (_JSON.match(kind) or by_curl or (uploads and _FORM.match(kind))):
        if uploads:
            raise UnsupportedMediaTypeError(
                "the body must be a form: send the header Content-Type: multipart/form-data with "
                "its boundary"
            )
        raise UnsupportedMediaTypeError(
            "the body of a POST must be JSON: send the header Content-Type: application/json"
        )
    if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
        raise UnsupportedMediaTypeError(
            "a body can't be compressed: send it without the header Content-Encoding"
        )


def _is_local_name(name: str) -> bool:
    """Whether no other site can own a name: an address, a bare name, or a private domain."""
    if "." not in name or name.endswith(_PRIVATE):
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def _with_port(authority: str, scheme: str) -> str:
    """Add the scheme's default port to an authority without a port."""
    bare = authority.rpartition(":")[2]
    if bare.isdigit() and bare != authority:
        return authority
    return f"{authority}:{_DEFAULT_PORTS.get(scheme, '')}"


class CrossOriginMiddleware:
    """ASGI middleware that applies the rules to every HTTP request.

    Args:
        app: The application.
        rules: The rules.
        keyless: Returns whether the service answers without a key now.
        refuse: Answers a request with an error. Its arguments are path, error and `send`.
    """

    def __init__(
        self,
        app: Callable[..., Awaitable[None]],
        rules: CrossOriginRules,
        keyless: Callable[[], bool],
        refuse: Callable[[str, CoeError, Any], Awaitable[None]],
    ) -> None:
        self._app = app
        self._rules = rules
        self._keyless = keyless
        self._refuse = refuse

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers: dict[bytes, bytes] = {}
            for name, value in scope["headers"]:
                headers.setdefault(name, value)
            try:
                self._rules.check(
                    scope["method"].encode(),
                    headers,
                    keyless=self._keyless(),
                    body=has_body(headers),
                    uploads=scope["path"] in _UPLOADS,
                    ollama=scope["path"].startswith(_OLLAMA),
                )
            except (ForbiddenError, InvalidRequestError) as error:
                await self._refuse(scope["path"], error, send)
                return
        await self._app(scope, receive, send)


def has_body(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request's headers announce a body."""
    return headers.get(b"content-length", b"0").strip() != b"0" or b"transfer-encoding" in headers
