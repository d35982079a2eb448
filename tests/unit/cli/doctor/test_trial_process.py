"""A trial's process: whatever is raised becomes the verdict of the trial's own parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.cli.doctor import engine_trials
from service.cli.doctor.layouts_to_try import default_subject
from service.cli.doctor.trial_process import PARTS_OF, main, run_trial
from service.cli.doctor.trial_spec import TrialLog, TrialSpec
from service.engine.swap_proof import PARTS
from service.errors import ExpertFailedError


def spec_in(folder: Path) -> TrialSpec:
    subject = default_subject(on_gpu=False)
    return TrialSpec(
        folder=str(folder),
        config=subject.config,
        moe_config=subject.moe_config,
        dtype="float32",
        options=subject.options.model_dump_json(),
        on_cpu=True,
        quick=True,
    )


def test_parts_of_trials_are_those_of_a_record() -> None:
    assert sorted(part for parts in PARTS_OF.values() for part in parts) == sorted(PARTS)


@pytest.mark.parametrize("name", PARTS_OF)
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ExpertFailedError("no\nkernel", retry_after_s=1), "no kernel"),
        (RuntimeError("CUDA error: out of memory"), "CUDA error: out of memory"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_run_trial_reports_an_exception_with_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, reason: str
) -> None:
    def fail(spec: TrialSpec, log: TrialLog) -> None:
        log.step("loading")
        raise error

    async def fail_later(spec: TrialSpec, log: TrialLog) -> None:
        fail(spec, log)

    monkeypatch.setattr(engine_trials, name, fail if name == "prepare" else fail_later)
    assert run_trial(name, spec_in(tmp_path)) == 1
    verdicts = [line for line in TrialLog(tmp_path, name).lines() if line.kind == "verdict"]
    assert [line.part for line in verdicts] == list(PARTS_OF[name] or ("prepare",))
    assert {line.reason for line in verdicts} == {f"loading: {reason}"}
    assert not any(line.ok for line in verdicts)


def test_run_trial_does_not_undo_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def half(spec: TrialSpec, log: TrialLog) -> None:
        log.proven("steering")
        raise RuntimeError("the rest fails")

    monkeypatch.setattr(engine_trials, "steering", half)
    run_trial("steering", spec_in(tmp_path))
    verdicts = [line for line in TrialLog(tmp_path, "steering").lines() if line.kind == "verdict"]
    assert [(line.part, line.ok) for line in verdicts] == [("steering", True), ("capture", False)]


def test_main_reads_the_written_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[TrialSpec] = []

    def prepare(spec: TrialSpec, log: TrialLog) -> None:
        read.append(spec)

    monkeypatch.setattr(engine_trials, "prepare", prepare)
    spec = spec_in(tmp_path)
    monkeypatch.setattr("sys.argv", ["trial_process", "prepare", str(spec.write())])
    assert main() == 0
    assert read == [spec]
    monkeypatch.setattr("sys.argv", ["trial_process", "other", str(spec.write())])
    with pytest.raises(SystemExit, match="prepare, fresh, inplace, sleep, steering"):
        main()


def test_trial_log_leaves_out_an_unfinished_line(tmp_path: Path) -> None:
    log = TrialLog(tmp_path, "inplace")
    assert list(log.lines()) == []
    log.step("one")
    log.judged("inplace", "tokens differ")
    with log.path.open("a") as file:
        file.write('{"kind": "verdict", "par')
    lines: list[Any] = list(log.lines())
    assert [(line.kind, line.reason) for line in lines] == [
        ("step", ""),
        ("verdict", "tokens differ"),
    ]
