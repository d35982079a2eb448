"""Starting the fake upstream."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from loadtests.lib.child_processes import fetch, running

_START_S = 30.0


@contextmanager
def fake_upstream(
    port: int, step_ms: float, *, whole_ms: float = 0.0, stamped: bool = False
) -> Iterator[None]:
    """`loadtests.lib.fake_openai_server` as a process of its own."""
    command = [sys.executable, "-m", "loadtests.lib.fake_openai_server", "--port", str(port)]
    command += ["--step-ms", str(step_ms), "--whole-ms", str(whole_ms)]
    command += ["--stamped"] if stamped else []

    def ready() -> bool:
        return fetch(port, "/health")[0] == 200

    with running("upstream", command, ready, timeout_s=_START_S):
        yield
