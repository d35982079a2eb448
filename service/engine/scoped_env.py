"""Environment variables that only some child processes inherit.

A process has one environment for all its threads. A caller that needs another value of a variable
therefore waits until the callers with the present value are done.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

WITHHELD = object()
"""The value of a variable that a child does not inherit at all."""
_SECRET = re.compile(
    r"(?:^|_)(?:APIKEYS?|KEYS?|TOKENS?|SECRETS?|PASS|PASSWORDS?|PASSWD|CREDENTIALS?)(?:_|$)"
)
# Variables with paths are not secret. Test runs find their own processes by such a variable.
_PLACE = re.compile(r"_(?:PATH|FILE|DIR|FOLDER|SOCK)$")
# A URL with a password.
_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")

TUNED_CONFIG_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"
"""Names the folder of vLLM's tuned kernel configs; its engine core reads it when it starts."""

_turn = threading.Condition()
_inside: dict[str, tuple[str | object | None, str | None, int]] = {}
"""By variable: the present value, the value before, and the number of callers inside."""


@contextmanager
def scoped_env(name: str, value: str | object | None) -> Iterator[None]:
    """Set a variable within the context. A caller that needs another value waits.

    Args:
        name: The name of the variable.
        value: The value. None leaves the variable unchanged, and WITHHELD removes it.
    """
    with _turn:
        _turn.wait_for(lambda: name not in _inside or _inside[name][0] == value)
        _, found, count = _inside.get(name, (None, os.environ.get(name), 0))
        if not count and value is WITHHELD:
            os.environ.pop(name, None)
        elif not count and isinstance(value, str):
            os.environ[name] = value
        _inside[name] = (value, found, count + 1)
    try:
        yield
    finally:
        with _turn:
            _, found, count = _inside[name]
            if count > 1:
                _inside[name] = (value, found, count - 1)
            else:
                del _inside[name]
                if found is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = found
            _turn.notify_all()


def whole_environment() -> dict[str, str]:
    """Return this process's environment as it is outside of all contexts of `scoped_env`.

    Other threads may be inside, for as long as an engine starts.
    """
    with _turn:
        env = dict(os.environ)
        for name, (_, found, _) in _inside.items():
            env.pop(name, None)
            if found is not None:
                env[name] = found
    return env


def secret_variables(
    named: Collection[str] = (), env: Mapping[str, str] | None = None
) -> list[str]:
    """Return the sorted names of variables that hold keys or passwords.

    Args:
        named: The names of further secret variables, whose names do not show this.
        env: The environment; None for this process's as it is now.
    """
    return sorted(
        name
        for name, value in (os.environ if env is None else env).items()
        if name in named or _is_secret(name.upper(), value)
    )


def _is_secret(name: str, value: str) -> bool:
    if _WITH_PASSWORD.search(value):
        return True
    return _SECRET.search(name) is not None and _PLACE.search(name) is None


@contextmanager
def without_secrets(named: Collection[str] = ()) -> Iterator[None]:
    """Hide keys and passwords from child processes that are started within the context."""
    with _turn:
        # A concurrent start may hide variables now and restore them before this start ends.
        names = {name for name, (value, _, _) in _inside.items() if value is WITHHELD}
        names.update(secret_variables(named))
    with ExitStack() as stack:
        for name in sorted(names):
            stack.enter_context(scoped_env(name, WITHHELD))
        yield
