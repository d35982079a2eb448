"""The processes of one run: our children, theirs, and those that have outlived their parents."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

# Set for everything that a run starts, and for nothing else: `service.launch.environment`.
_MARK = "RAY_AUTH_TOKEN_PATH"


def of_run(run_dir: Path) -> set[psutil.Process]:
    """All of them, whoever their parent is by now.

    Not those that only name the folder: people look into its logs, which we tell them to.
    """
    found = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(process.environ().get(_MARK, "/")).parent == run_dir:
                found.add(process)
    found.discard(psutil.Process())
    return found
