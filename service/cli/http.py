"""Asking a running service."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from service.errors import CoeError

_ADMIN_KEY = "COE_ADMIN_KEY"

url_option = click.option(
    "--url",
    envvar="COE_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The service.",
)


def admin(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask an admin endpoint, with the admin key. Raises CoeError."""
    from service.rpc.auth import admin_key_path

    if not (headers := admin_headers(url)):
        if not is_loopback(url):
            raise CoeError(
                f"the admin key in {admin_key_path()} is this machine's and is not sent to {url}; "
                f"put that service's own key into the environment variable {_ADMIN_KEY}"
            )
        raise CoeError(
            f"no admin key in {admin_key_path()}: `coe serve` makes one at its first start"
        )
    text = json.dumps(body) if body is not None else None
    return ask(url, method, path, headers, text)


def admin_headers(url: str) -> dict[str, str]:
    """The admin key for a service, where there is one.

    It is that of $COE_ADMIN_KEY; for a service on this machine, else that of this user's file.
    """
    from service.rpc.auth import admin_key_path, read_secret

    key = os.environ.get(_ADMIN_KEY)
    if not key and is_loopback(url):
        try:
            key = read_secret(admin_key_path())
        except OSError:
            return {}
    return {"authorization": f"Bearer {key}"} if key else {}


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine whoever answers name look-ups."""
    import ipaddress
    from urllib.parse import urlsplit

    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def ask(url: str, method: str, path: str, headers: dict[str, str], body: str | None = None) -> Any:
    """Ask a running service. Raises CoeError with its own words."""
    from http.client import HTTPException

    with open_reply(url, method, path, headers, body) as reply:
        try:
            return json.load(reply)
        except (OSError, HTTPException) as error:
            raise CoeError(f"{url} broke off: {error}") from None
        except ValueError:
            raise CoeError(f"{url} answers, but not as this service does: no JSON") from None


def open_reply(
    url: str, method: str, path: str, headers: dict[str, str], body: str | None = None
) -> Any:
    """A reply whose body is still to be read, as a context manager. Raises CoeError."""
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    class Redirects(urllib.request.HTTPRedirectHandler):
        """Follows none: urllib would show the key to whoever the reply names."""

        def redirect_request(self, *args: Any, **more: Any) -> None:
            return None

    handlers: list[urllib.request.BaseHandler] = [Redirects()]
    if is_loopback(url):
        handlers.append(urllib.request.ProxyHandler({}))
    data = body.encode() if body is not None else None
    if data is not None:
        headers = {"content-type": "application/json", **headers}
    try:
        request = urllib.request.Request(
            url.rstrip("/") + path, data=data, method=method, headers=headers
        )
        return urllib.request.build_opener(*handlers).open(request, timeout=130)
    except urllib.error.HTTPError as error:
        with error:
            if 300 <= error.code < 400:
                raise CoeError(
                    f"{url} redirects (status {error.code}), which is not followed: give the "
                    "address that it leads to"
                ) from None
            try:
                message = json.load(error)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"status {error.code}"
        raise CoeError(f"{url}: {message}") from None
    except OSError as error:
        raise CoeError(f"{url} can't be reached: {getattr(error, 'reason', error)}") from None
    except (HTTPException, ValueError) as error:
        # Another protocol's port, or no URL at all.
        raise CoeError(f"{url} can't be asked: {error}") from None
