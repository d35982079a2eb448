"""From the lines of trials to the findings of a record."""

from __future__ import annotations

import pytest

from service.cli.doctor.trial_spec import TrialLine
from service.cli.doctor.trial_verdicts import (
    TrialEnd,
    TrialOutcome,
    figure_rows,
    findings_of,
    prepare_fault,
)
from service.engine.swap_proof import ProofFinding, Verdict

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
