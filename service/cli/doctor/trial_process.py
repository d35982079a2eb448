"""`python -m service.cli.doctor.trial_process TRIAL SPEC`: one trial, in a process of its own.

A crash, a hang or a full GPU then ends this trial only. An exception is the reason of the trial's
own parts.
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from pathlib import Path

from service.cli.doctor.trial_spec import TrialLog, TrialSpec
from service.engine.swap_proof import one_line
from service.errors import CoeError

# The trials, and the parts of the record that each proves. The first makes the others' models.
PARTS_OF = {
    "prepare": (),
    "fresh": ("respawn",),
    "inplace": ("inplace",),
    "sleep": ("sleep",),
    "steering": ("steering", "capture"),
}


def run_trial(name: str, spec: TrialSpec) -> int:
    """Run a trial, and return 0 where it came to its end."""
    log = TrialLog(spec.root, name)
    log.step("importing vLLM" if name != "prepare" else "importing torch")
    try:
        from service.cli.doctor import engine_trials

        trial = getattr(engine_trials, name)
        if inspect.iscoroutinefunction(trial):
            asyncio.run(trial(spec, log))
        else:
            trial(spec, log)
    except Exception as error:
        import traceback

        traceback.print_exc()  # to the trial's log
        message = error.message if isinstance(error, CoeError) else str(error)
        reason = one_line(message or type(error).__name__)
        steps = [line.part for line in log.lines() if line.kind == "step"]
        told = {line.part for line in log.lines() if line.kind == "verdict"}
        for part in PARTS_OF[name]:
            if part not in told:
                log.failed(part, f"{steps[-1]}: {reason}")
        if name == "prepare":
            log.failed("prepare", f"{steps[-1]}: {reason}")
        return 1
    return 0


def main() -> int:
    """Run the trial that the command line names."""
    name, path = sys.argv[1:]
    if name not in PARTS_OF:
        raise SystemExit(f"the trials are {', '.join(PARTS_OF)}, not {name!r}")
    return run_trial(name, TrialSpec.read(Path(path)))


if __name__ == "__main__":
    sys.exit(main())
