"""From the lines of trials to the findings of a record."""

from __future__ import annotations

import math

import pytest

from service.cli.doctor.trial_spec import TrialLine
from service.cli.doctor.trial_verdicts import (
    TrialEnd,
    TrialOutcome,
    figure_rows,
    findings_of,
    prepare_fault,
    root_cause,
)
from service.engine.swap_proof import ProofFinding, Verdict, proof_from_json, proof_to_json
from tests.unit.engine.test_swap_proof import proof

STEP = TrialLine("step", "asking model one")
PROVEN = TrialLine("verdict", "inplace", ok=True)
FAILED = TrialLine("verdict", "inplace", reason="other\ntokens")


def outcome(*lines: TrialLine, end: TrialEnd = TrialEnd.DONE, words: str = "") -> TrialOutcome:
    return TrialOutcome(("inplace",), lines, end, words)


@pytest.mark.parametrize(
    ("given", "verdict", "reason"),
    [
        (outcome(STEP, PROVEN), Verdict.PROVEN, ""),
        (outcome(STEP, FAILED), Verdict.FAILED, "other tokens"),
        # The last verdict counts, and a process that dies after it does not undo it.
        (outcome(PROVEN, FAILED), Verdict.FAILED, "other tokens"),
        (outcome(STEP, PROVEN, end=TrialEnd.DIED), Verdict.PROVEN, ""),
        (outcome(end=TrialEnd.NOT_BEGUN), Verdict.UNTRIED, "time ran out"),
        (
            outcome(STEP, end=TrialEnd.KILLED),
            Verdict.UNTRIED,
            "time ran out while asking model one",
        ),
        (
            outcome(STEP, end=TrialEnd.DIED, words="CUDA error: an illegal memory access"),
            Verdict.FAILED,
            "the process died while asking model one: CUDA error: an illegal memory access",
        ),
        (
            outcome(end=TrialEnd.DIED),
            Verdict.FAILED,
            "the process died while starting the trial",
        ),
        (outcome(STEP), Verdict.FAILED, "the trial ended without a verdict after asking model one"),
    ],
)
def test_findings_always_have_a_verdict(given: TrialOutcome, verdict: Verdict, reason: str) -> None:
    assert findings_of([given]) == {"inplace": ProofFinding(verdict, reason)}


def test_findings_join_the_figures_of_all_trials() -> None:
    lines = (
        TrialLine("figure", "inplace", figures={"swap_s": 1.0, "fill_s": 2.0}),
        TrialLine("figure", "inplace", figures={"swap_s": 3.0}),
    )
    prepared = TrialOutcome(
        (), (TrialLine("figure", "inplace", figures={"weight_bytes": 5e9}),), TrialEnd.DONE
    )
    found = findings_of([prepared, outcome(*lines, PROVEN)])
    figures = {"swap_s": 3.0, "fill_s": 2.0, "weight_bytes": 5e9}
    assert found == {"inplace": ProofFinding(Verdict.PROVEN, "", figures)}
    assert figure_rows(found) == [("inplace", "proven", "fill 2 s, swap 3 s, weight 5.000 GB")]


LOG = """(MainProcess pid=1) WARNING 11-30 16:05:18 [vllm.py:725] Model Runner V2 requires Triton
(EngineCore pid=2) ERROR 11-30 16:05:20 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-30 16:05:20 [core.py:1510]     raise ValueError("no")
(EngineCore pid=2) ERROR 11-30 16:05:20 [core.py:1510] torch.OutOfMemoryError: CUDA out of memory
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (LOG, "torch.OutOfMemoryError: CUDA out of memory"),
        (LOG.splitlines()[-1], ""),
        ("AssertionError\nValueError: later", "AssertionError"),
        ("an Error: in a sentence\n", ""),
        ("", ""),
    ],
)
def test_root_cause_is_the_first_exception_of_the_log(log: str, cause: str) -> None:
    assert root_cause(log) == cause


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("starting an engine: it failed. See root cause above.", "starting an engine: E: no room"),
        ("starting an engine: a plain reason", "starting an engine: a plain reason"),
    ],
)
def test_findings_quote_the_log_where_vllm_points_to_it(reason: str, told: str) -> None:
    line = TrialLine("verdict", "inplace", reason=reason)
    given = TrialOutcome(("inplace",), (line,), TrialEnd.DONE, "", "E: no room")
    assert findings_of([given])["inplace"].reason == told


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (outcome(STEP), None),
        (outcome(TrialLine("verdict", "prepare", reason="odd")), "could be made: odd"),
        (outcome(STEP, end=TrialEnd.KILLED), "time ran out while"),
        (outcome(end=TrialEnd.DIED, words="Killed"), "died while starting the trial: Killed"),
    ],
)
def test_prepare_fault_tells_why_nothing_can_be_tried(
    given: TrialOutcome, fault: str | None
) -> None:
    found = prepare_fault(given)
    assert found == fault if fault is None else fault in str(found)


def test_findings_leave_out_figures_that_are_no_numbers() -> None:
    odd = {"swap_s": 1.0, "copy_bytes_per_s": math.inf, "fill_s": math.nan}
    found = findings_of([outcome(TrialLine("figure", "inplace", figures=odd), PROVEN)])
    assert found["inplace"].figures == {"swap_s": 1.0}
    record = proof(inplace=found["inplace"])
    assert proof_from_json(proof_to_json(record)) == record
