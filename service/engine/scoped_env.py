"""Environment variables that some child processes inherit and others, started meanwhile, do not.

A process has one environment for all its threads. A caller that needs another value of a variable
waits until the callers with the present one are done.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

WITHHELD = object()
"""The value of a variable that a child does not inherit at all."""
_SECRET = re.compile(
    r"(?:^|_)(?:APIKEYS?|KEYS?|TOKENS?|SECRETS?|PASS|PASSWORDS?|PASSWD|CREDENTIALS?)(?:_|$)"
)
# Names of places are no secrets; test runs find their own processes by one.
_PLACE = re.compile(r"_(?:PATH|FILE|DIR|FOLDER|SOCK)$")
# An address with a password in it.
_WITH_PASSWORD = re.compile(r"://[^/@\s]*:[^/@\s]+@")

TUNED_CONFIG_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"
"""Names the folder of vLLM's tuned kernel configs; its engine core reads it when it starts."""

_turn = threading.Condition()
_inside: dict[str, tuple[str | object | None, str | None, int]] = {}
"""By variable: the present value, the value before, and the number of callers inside."""


@contextmanager
def scoped_env(name: str, value: str | object | None) -> Iterator[None]:
    """Within, a variable has a value. A caller that needs another value waits.

    Args:
        name: Name of the variable.
        value: The value; None: the variable stays as it is; WITHHELD: it is not set.
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


def secret_variables(named: Collection[str] = ()) -> list[str]:
    """Names of this process's variables that hold keys or passwords, sorted.

    Args:
        named: Names of secret variables that don't look like it.
    """
    return sorted(
        name
        for name, value in os.environ.items()
        if name in named or _is_secret(name.upper(), value)
    )


def _is_secret(name: str, value: str) -> bool:
    if _WITH_PASSWORD.search(value):
        return True
    return _SECRET.search(name) is not None and _PLACE.search(name) is None


@contextmanager
def without_secrets(named: Collection[str] = ()) -> Iterator[None]:
    """Within, child processes inherit no keys: a process that runs a model needs none."""
    with _turn:
        # A concurrent start may withhold variables now that are back before this one ends.
        names = {name for name, (value, _, _) in _inside.items() if value is WITHHELD}
        names.update(secret_variables(named))
    with ExitStack() as stack:
        for name in sorted(names):
            stack.enter_context(scoped_env(name, WITHHELD))
        yield
