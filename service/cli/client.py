"""Asking a running service."""

from __future__ import annotations

import json
from typing import Any

import click

from service.errors import CoeError

url_option = click.option(
    "--url",
    envvar="COE_URL",
    default="http://127.0.0.1:8000",
    show_default=True,
    help="The service.",
)


def admin(url: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask an admin endpoint, with the key of this user's file. Raises CoeError."""
    from service.link.secret import admin_key_path

    if not (headers := admin_headers()):
        raise CoeError(
            f"no admin key in {admin_key_path()}: `coe serve` makes one at its first start"
        )
    text = json.dumps(body) if body is not None else None
    return ask(url, method, path, headers, text)


def admin_headers() -> dict[str, str]:
    """The admin key of this user's file, where there is one."""
    from service.link.secret import admin_key_path, read_secret

    try:
        return {"authorization": f"Bearer {read_secret(admin_key_path())}"}
    except OSError:
        return {}


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

    data = body.encode() if body is not None else None
    try:
        request = urllib.request.Request(
            url.rstrip("/") + path, data=data, method=method, headers=headers
        )
        return urllib.request.urlopen(request, timeout=130)
    except urllib.error.HTTPError as error:
        with error:
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
