"""Runs the trials of one layout after each other, and makes a record of what they found.

Each trial has a process and a process group of its own, which is killed when the time is over.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from service.cli.doctor.layouts_to_try import TrialSubject
from service.cli.doctor.random_models import CPU_SIZE, GPU_SIZE, SMALL, small_config
from service.cli.doctor.trial_process import PARTS_OF
from service.cli.doctor.trial_spec import TrialLine, TrialLog, TrialSpec
from service.cli.doctor.trial_verdicts import (
    TrialEnd,
    TrialOutcome,
    findings_of,
    prepare_fault,
    root_cause,
)
from service.engine.compile_cache import without_compiler
from service.engine.swap_proof import PARTS, ProofFinding, Verdict, one_line

LAUNCHER = (sys.executable, "-m", "service.cli.doctor.trial_process")
_POLL_S = 0.1
# A trial is not begun with less: an engine could not start.
_LEAST_S = 5.0
_NEEDS_GPU = "it needs a GPU"
_NEEDS_EAGER = "on CPU swaps in place need vllm.enforce_eager: true"
_QUICK = "a quick run tries swaps in place only"


def prove(
    subject: TrialSubject,
    *,
    quick: bool,
    deadline_s: float,
    tell: Callable[[str], None],
    launcher: Sequence[str] = LAUNCHER,
    clock: Callable[[], float] = time.monotonic,
    folder: Path | None = None,
) -> dict[str, ProofFinding]:
    """Try one layout.

    Args:
        subject: The layout.
        quick: Whether to try swaps in place only.
        deadline_s: When all trials must have ended, by `clock`.
        tell: Receives a line at each step.
        launcher: The command of a trial's process.
        clock: The time in seconds.
        folder: Where the models are written; None: the system's folder for temporary files.

    Returns:
        The finding of each part that was tried or can't be tried here. A quick run has nothing on
        the parts that it leaves out.
    """
    on_cpu = subject.on_cpu
    untried: dict[str, ProofFinding] = {}
    if on_cpu:
        untried["sleep"] = ProofFinding(Verdict.UNAVAILABLE, _NEEDS_GPU)
        if not subject.layout.eager:
            untried["inplace"] = ProofFinding(Verdict.UNAVAILABLE, _NEEDS_EAGER)
    all_trials = ["inplace"] if quick else ["fresh", "inplace", "sleep", "steering"]
    trials = [trial for trial in all_trials if not set(PARTS_OF[trial]) <= set(untried)]
    wanted = [part for trial in trials for part in PARTS_OF[trial]]
    size = SMALL if quick else CPU_SIZE if on_cpu else GPU_SIZE
    gpus = max(1, subject.options.tensor_parallel_size)
    try:
        config = small_config(subject.config, size, gpus)
        moe_config = small_config(subject.moe_config, SMALL, gpus)
    except ValueError as error:
        return {**_none(wanted, one_line(error)), **untried}
    with (
        # Engines of a killed trial may still hold files for a moment.
        tempfile.TemporaryDirectory(
            prefix="coe-doctor-", dir=folder, ignore_cleanup_errors=True
        ) as root,
        # A path of a socket has at most 107 bytes, and `folder` may be long.
        tempfile.TemporaryDirectory(prefix="coe-", ignore_cleanup_errors=True) as sockets,
    ):
        spec = TrialSpec(
            folder=root,
            config=config,
            moe_config=moe_config,
            dtype=subject.layout.dtype,
            options=subject.options.model_dump_json(),
            on_cpu=on_cpu,
            quick=quick,
        )
        run = _Runner(spec, sockets, launcher, deadline_s, tell, clock)
        prepared = run.trial("prepare")
        if (fault := prepare_fault(prepared)) is not None:
            return {**_none(wanted, fault), **untried}
        outcomes = [prepared, *(run.trial(trial) for trial in trials)]
    return {**findings_of(outcomes), **untried}


def _none(parts: Sequence[str], reason: str) -> dict[str, ProofFinding]:
    return {part: ProofFinding(Verdict.UNTRIED, reason) for part in parts}


def with_left_out(findings: dict[str, ProofFinding]) -> dict[str, ProofFinding]:
    """Add the parts that a quick run left out, for the record of a first run."""
    left_out = ProofFinding(Verdict.UNTRIED, _QUICK)
    return {part: findings.get(part, left_out) for part in PARTS}


class _Runner:
    """Runs trials of one task until a deadline."""

    def __init__(
        self,
        spec: TrialSpec,
        sockets: str,
        launcher: Sequence[str],
        deadline_s: float,
        tell: Callable[[str], None],
        clock: Callable[[], float],
    ) -> None:
        self._spec = spec
        self._sockets = sockets
        self._path = spec.write()
        self._launcher = launcher
        self._deadline_s = deadline_s
        self._tell = tell
        self._clock = clock

    def trial(self, name: str) -> TrialOutcome:
        """Run one trial to its end or to the deadline."""
        parts = PARTS_OF[name]
        if self._deadline_s - self._clock() < _LEAST_S:
            return TrialOutcome(parts, (), TrialEnd.NOT_BEGUN)
        findings = TrialLog(self._spec.root, name)
        log = self._spec.root / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._launcher, name, str(self._path)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=True,
            )
            try:
                end = self._wait(process, findings)
            finally:
                _kill_group(process)
        lines = tuple(findings.lines())
        text = _read(log)
        return TrialOutcome(parts, lines, end, _last_line(text), root_cause(text))

    def _wait(self, process: subprocess.Popen[bytes], findings: TrialLog) -> TrialEnd:
        """Wait for the end of a trial, and tell its steps."""
        told = 0
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_S)
            lines = list(findings.lines())
            for line in lines[told:]:
                self._tell_line(line)
            told = len(lines)
            if process.returncode is not None:
                # An exception of the trial has left a verdict.
                return TrialEnd.DONE if process.returncode in (0, 1) else TrialEnd.DIED
            if self._clock() >= self._deadline_s:
                return TrialEnd.KILLED

    def _tell_line(self, line: TrialLine) -> None:
        if line.kind == "step":
            self._tell(line.part)
        elif line.kind == "verdict" and line.part in PARTS:
            self._tell(f"{line.part}: {'proven' if line.ok else f'failed: {line.reason}'}")

    def _environment(self) -> dict[str, str]:
        """Return the environment of a pool's process."""
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_RPC_BASE_PATH": self._sockets,
            "TQDM_DISABLE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        if self._spec.on_cpu:
            environment |= {
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                **without_compiler(os.environ),
            }
        return environment


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a trial with its engines, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(log: Path) -> str:
    with contextlib.suppress(OSError):
        return log.read_text(encoding="utf-8", errors="replace")
    return ""


def _last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return one_line(next((line for line in reversed(text.splitlines()) if line.strip()), ""))
