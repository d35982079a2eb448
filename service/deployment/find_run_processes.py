"""Finds the processes of one run, including those that have outlived their parents."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

# `service.launch.ray_environment` sets this variable for the processes of a run only.
_RUN_VARIABLE = "RAY_AUTH_TOKEN_PATH"


def processes_of_run(run_dir: Path) -> set[psutil.Process]:
    """Return the processes of a run, regardless of their present parents.

    A process that only names the folder does not count: users read the logs there.
    """
    found = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.environ().get(_RUN_VARIABLE, "/")).parent == run_dir:
                found.add(process)
    found.discard(psutil.Process())
    return found
