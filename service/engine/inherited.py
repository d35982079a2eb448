"""An environment variable that one child process inherits, and others, started beside it, do not.

A process has one environment for all its threads. Whoever wants a variable to have another
value than those who are starting something now waits until they are done.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TUNED = "VLLM_TUNED_CONFIG_FOLDER"
"""Where vLLM looks for tuned kernel configs; its engine core reads it when it starts."""

_turn = threading.Condition()
_inside: dict[str, tuple[str | None, str | None, int]] = {}
"""By variable: the value now, the value before, and how many are within."""


@contextmanager
def inherited(name: str, value: str | None) -> Iterator[None]:
    """Within, the variable has `value`, and whoever wants another waits.

    None: it is as it was found, for those who set nothing.
    """
    with _turn:
        _turn.wait_for(lambda: name not in _inside or _inside[name][0] == value)
        _, found, count = _inside.get(name, (None, os.environ.get(name), 0))
        if not count and value is not None:
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
