"""HTTP requests to a running service."""

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
    help="URL of the service.",
)


def admin(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Call an admin endpoint with the admin key, and return its JSON.

    Raises:
        CoeError: There is no admin key, or the call failed.
    """
    from service.rpc.local_paths import admin_key_path

    if not (headers := admin_headers(url)):
        if not is_loopback(url):
            raise CoeError(
                f"the admin key in {admin_key_path()} belongs to this machine and is not sent to "
                f"{url}; put that service's own key into the environment variable {_ADMIN_KEY}"
            )
        raise CoeError(
            f"no admin key in {admin_key_path()}: `coe serve` makes one at its first start"
        )
    text = json.dumps(body) if body is not None else None
    return ask(url, method, path, headers, text)


def admin_headers(url: str) -> dict[str, str]:
    """Return the header with the admin key of a service, or none.

    The key comes from $COE_ADMIN_KEY, or, for a service on this machine, from this user's file.
    """
    from service.rpc.cluster_secret import read_secret
    from service.rpc.local_paths import admin_key_path

    key = os.environ.get(_ADMIN_KEY)
    if not key and is_loopback(url):
        try:
            key = read_secret(admin_key_path())
        except OSError:
            return {}
    return {"authorization": f"Bearer {key}"} if key else {}


def is_loopback(url: str) -> bool:
    """Return whether a URL leads to this machine regardless of the name server's answers."""
    import ipaddress
    from urllib.parse import urlsplit

    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def ask(url: str, method: str, path: str, headers: dict[str, str], body: str | None = None) -> Any:
    """Call a running service and return its JSON.

    Raises:
        CoeError: The call failed; the message is the service's own.
    """
    from http.client import HTTPException

    with open_reply(url, method, path, headers, body) as reply:
        try:
            return json.load(reply)
        except (OSError, HTTPException) as error:
            raise CoeError(f"{url}: the reply broke off: {error}") from None
        except ValueError:
            raise CoeError(f"{url}: the reply is not JSON; is this a coe service?") from None


def open_reply(
    url: str, method: str, path: str, headers: dict[str, str], body: str | None = None
) -> Any:
    """A reply whose body is still to be read, as a context manager. Raises CoeError."""
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    class NoRedirects(urllib.request.HTTPRedirectHandler):
        """Follows no redirect, because urllib would send the key to the new address."""

        def redirect_request(self, *_args: Any, **_options: Any) -> None:
            return None

    handlers: list[urllib.request.BaseHandler] = [NoRedirects()]
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
                    f"{url} redirects (status {error.code}), and redirects are not followed: give "
                    "the address that it leads to"
                ) from None
            try:
                message = json.load(error)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = f"status {error.code}"
        raise CoeError(f"{url}: {message}") from None
    except OSError as error:
        raise CoeError(f"cannot reach {url}: {getattr(error, 'reason', error)}") from None
    except (HTTPException, ValueError) as error:
        # The port speaks another protocol, or this is not a URL.
        raise CoeError(f"cannot call {url}: {error}") from None
