"""Trials in processes of their own: they end, crash, hang, and never run past the deadline."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from service.cli.doctor.layouts_to_try import TrialSubject, default_subject
from service.cli.doctor.trial_runner import prove, with_left_out
from service.engine.swap_proof import PARTS, ProofFinding, Verdict

# Writes what a trial would write, and does what its name in the environment says.
FAKE = """
import json, os, sys, time
trial, spec = sys.argv[1:]
folder = json.load(open(spec))["folder"]
def tell(kind, part, **more):
    line = {"kind": kind, "part": part, "ok": False, "reason": "", "figures": {}, **more}
    with open(os.path.join(folder, trial + ".found.jsonl"), "a") as file:
        file.write(json.dumps(line) + "\\n")
tell("step", "step of " + trial)
parts = {"fresh": ["respawn"], "inplace": ["inplace"], "sleep": ["sleep"],
         "steering": ["steering", "capture"], "prepare": []}[trial]
act = os.environ.get("FAKE_" + trial.upper(), "prove")
if act == "hang":
    child = os.fork()
    open(os.environ["FAKE_PIDS"], "a").write(f"{os.getpid()}\\n")
    time.sleep(600)
if act == "die":
    print("out of memory", flush=True)
    os.kill(os.getpid(), 9)
for part in parts:
    tell("figure", part, figures={"swap_s": 0.5})
    tell("verdict", part, ok=act == "prove", reason="" if act == "prove" else "tokens differ")
"""


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setenv("FAKE_PIDS", str(tmp_path / "pids"))
    return sys.executable, str(script)


def run(
    launcher: tuple[str, ...],
    tmp_path: Path,
    *,
    quick: bool = False,
    subject: TrialSubject | None = None,
    told: list[str] | None = None,
) -> dict[str, ProofFinding]:
    return prove(
        subject or default_subject(on_gpu=True),
        quick=quick,
        deadline_s=time.monotonic() + 200,
        tell=(told if told is not None else []).append,
        launcher=launcher,
        folder=tmp_path,
    )


def test_prove_finds_every_part_and_leaves_nothing_behind(
    launcher: tuple[str, ...], tmp_path: Path
) -> None:
    told: list[str] = []
    found = run(launcher, tmp_path, told=told)
    assert {part: finding.verdict for part, finding in found.items()} == dict.fromkeys(
        PARTS, Verdict.PROVEN
    )
    assert found["sleep"].figures == {"swap_s": 0.5}
    assert "step of inplace" in told
    assert "sleep: proven" in told
    assert not list(tmp_path.glob("coe-doctor-*"))


def test_prove_quick_says_nothing_of_parts_that_it_leaves_out(
    launcher: tuple[str, ...], tmp_path: Path
) -> None:
    found = run(launcher, tmp_path, quick=True)
    assert found.keys() == {"inplace"}
    whole = with_left_out(found)
    assert whole.keys() == set(PARTS)
    assert whole["sleep"].reason == "a quick run tries swaps in place only"


def test_prove_on_a_cpu_has_no_sleep(launcher: tuple[str, ...], tmp_path: Path) -> None:
    found = run(launcher, tmp_path, subject=default_subject(on_gpu=False))
    assert found["sleep"] == ProofFinding(Verdict.UNAVAILABLE, "it needs a GPU")
    assert found["inplace"].verdict is Verdict.PROVEN


@pytest.mark.parametrize(
    ("act", "verdict", "reason"),
    [
        ("fail", Verdict.FAILED, "tokens differ"),
        ("die", Verdict.FAILED, "the process died while step of inplace: out of memory"),
    ],
)
def test_prove_one_failed_trial_does_not_stop_the_others(
    launcher: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: str,
    verdict: Verdict,
    reason: str,
) -> None:
    monkeypatch.setenv("FAKE_INPLACE", act)
    found = run(launcher, tmp_path)
    assert (found["inplace"].verdict, found["inplace"].reason) == (verdict, reason)
    assert found["sleep"].verdict is Verdict.PROVEN
    assert found["capture"].verdict is Verdict.PROVEN


def test_prove_kills_a_hanging_trial_and_its_children_at_the_deadline(
    launcher: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_INPLACE", "hang")
    pids = tmp_path / "pids"

    def clock() -> float:
        """The time is over as soon as both processes hang."""
        return 1000.0 if pids.exists() and pids.read_text().count("\n") == 2 else 0.0

    found = prove(
        default_subject(on_gpu=True),
        quick=False,
        deadline_s=100.0,
        tell=print,
        launcher=launcher,
        clock=clock,
        folder=tmp_path,
    )
    assert found["respawn"].verdict is Verdict.PROVEN
    assert found["inplace"] == ProofFinding(Verdict.UNTRIED, "time ran out while step of inplace")
    for part in ("sleep", "steering", "capture"):
        assert found[part] == ProofFinding(Verdict.UNTRIED, "time ran out")
    ends_s = time.monotonic() + 20
    while any(_lives(int(pid)) for pid in pids.read_text().split()):
        assert time.monotonic() < ends_s, "a killed process lives"
        time.sleep(0.01)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    # A killed child of a killed process stays until its new parent reaps it.
    return state != "Z"


def test_prove_without_models_tries_nothing(
    launcher: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_PREPARE", "die")
    found = run(launcher, tmp_path)
    assert {finding.verdict for finding in found.values()} == {Verdict.UNTRIED}, found
    assert "the process died while step of prepare" in found["inplace"].reason


def test_prove_of_quantised_weights_is_not_proven(
    launcher: tuple[str, ...], tmp_path: Path
) -> None:
    subject = default_subject(on_gpu=True)
    config = {**subject.config, "quantization_config": {"quant_method": "hqq"}}
    found = run(
        launcher,
        tmp_path,
        subject=TrialSubject(
            subject.layout, config, subject.moe_config, subject.options, on_cpu=False
        ),
    )
    assert found["inplace"] == ProofFinding(
        Verdict.UNTRIED, "this release makes no random weights of hqq"
    )
