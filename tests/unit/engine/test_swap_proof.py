"""Records of `coe doctor`, and the swap method that follows from them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.swap_proof import (
    METHODS,
    PARTS,
    START_GUESS_S,
    ChoiceSource,
    ProofFinding,
    ProofMachine,
    SwapProof,
    UnitWeights,
    Verdict,
    WeightLayout,
    choose_swap_method,
    expected_swap_s,
    merged_proof,
    proof_from_json,
    proof_key,
    proof_to_json,
    unproven_reason,
    withdrawn_proof,
)

GPU = ProofMachine("gpu", "NVIDIA H200", "580.1", "0.1.0", "vllm 0.32.0", "2.13.0")
LLAMA = WeightLayout("LlamaForCausalLM", "bfloat16", gpus=1)
QWEN = WeightLayout("Qwen3ForCausalLM", "bfloat16", gpus=1)
PROVEN = ProofFinding(Verdict.PROVEN)

# Visible text without spaces: reasons become one line.
WORDS = st.characters(categories=("L", "M", "N", "P", "S"))
findings = st.builds(
    ProofFinding,
    st.sampled_from(Verdict),
    st.text(WORDS, max_size=40),
    st.dictionaries(st.text(max_size=10), st.floats(allow_nan=False, allow_infinity=False)),
)
layouts = st.builds(
    WeightLayout,
    st.text(WORDS, max_size=20),
    st.text(WORDS, max_size=10),
    st.text(WORDS, max_size=10),
    st.booleans(),
    st.integers(0, 64),
)
proofs = st.builds(
    SwapProof,
    st.builds(
        replace,
        st.just(GPU),
        hardware=st.text(WORDS, max_size=20),
        driver=st.text(WORDS, max_size=9),
    ),
    layouts,
    st.text(WORDS, max_size=20),
    st.booleans(),
    st.dictionaries(st.sampled_from(PARTS), findings),
)


def proof(layout: WeightLayout = LLAMA, made: str = "2026-11-30", **found: Any) -> SwapProof:
    return SwapProof(GPU, layout, made, False, found)


def unit(name: str, family: str, layout: WeightLayout = LLAMA, size: int = 10**9) -> UnitWeights:
    return UnitWeights(name, family, layout, size)


@given(proofs)
def test_proof_survives_json(written: SwapProof) -> None:
    assert proof_from_json(proof_to_json(written)) == written


@given(proofs, proofs)
def test_proof_key_differs_with_machine_and_layout(one: SwapProof, two: SwapProof) -> None:
    same = (one.machine, one.layout) == (two.machine, two.layout)
    assert (proof_key(one.machine, one.layout) == proof_key(two.machine, two.layout)) == same


@pytest.mark.parametrize(
    ("path", "value", "why"),
    [
        (("format",), 2, "format 2; this version reads 1"),
        (("machine",), [], "machine: should be a mapping"),
        (("machine", "device"), "tpu", "should be cpu or gpu, not 'tpu'"),
        (("machine", "driver"), None, "driver: should be str, not NoneType"),
        (("layout", "eager"), 1, "eager: should be bool, not int"),
        (("layout", "gpus"), True, "gpus: should be int, not bool"),
        (("quick",), "no", "quick: should be bool, not str"),
        (("findings", "warp"), {}, "should be of respawn, sleep"),
        (("findings", "inplace", "verdict"), "yes", "should be one of proven, failed"),
        (("findings", "inplace", "figures", "swap_s"), "1", "swap_s: should be a number"),
        (("findings", "inplace", "figures", "swap_s"), float("nan"), "should be a number"),
        (("findings", "inplace", "figures", "swap_s"), 10**400, "should be a number"),
        (("machine", "hardware"), "H200\x1b[2J", "hardware: should be printable"),
        (("layout", "dtype"), "\ud800", "dtype: should be printable"),
        (("made",), "2026\n", "made: should be printable"),
    ],
)
def test_proof_from_json_refuses_other_data(path: tuple[str, ...], value: Any, why: str) -> None:
    data = json.loads(proof_to_json(proof(inplace=PROVEN)))
    place = data
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=why):
        proof_from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": 1}', "{", "1e999", "[" * 500_000])
def test_proof_from_json_refuses_what_is_no_proof(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of json, or of this module
        proof_from_json(text)


def test_reasons_are_one_line_that_a_terminal_can_show() -> None:
    shouting = ProofFinding(Verdict.FAILED, "\x1b[31mno\nmemory\ud800\u202e" + "!" * 999)
    read = proof_from_json(proof_to_json(proof(inplace=shouting))).finding("inplace")
    assert read.reason.startswith("[31mno memory!!!")
    assert len(read.reason) == 400


def test_merged_proof_keeps_parts_that_were_not_tried_only() -> None:
    slow = ProofFinding(Verdict.UNTRIED, "time ran out")
    old = proof(made="1", inplace=PROVEN, sleep=PROVEN)
    new = replace(proof(made="2", inplace=slow), quick=True)
    merged = merged_proof(old, new)
    assert merged.findings == {"inplace": slow, "sleep": PROVEN}
    assert merged.made == "2"
    assert not merged.quick
    assert merged_proof(None, new) == new


@pytest.mark.parametrize("verdict", Verdict)
def test_withdrawn_proof_marks_proven_methods_only(verdict: Verdict) -> None:
    figures = {"swap_s": 0.5}
    before = proof(inplace=ProofFinding(verdict, "", figures), sleep=PROVEN)
    after = withdrawn_proof(before, "inplace", "a canary\nfailed")
    if verdict is not Verdict.PROVEN:
        assert after is None
        return
    assert after is not None
    assert after.findings["inplace"] == ProofFinding(Verdict.WITHDRAWN, "a canary failed", figures)
    assert after.findings["sleep"] == PROVEN
    assert withdrawn_proof(after, "inplace", "again") is None


# By device, the verdicts that keep a method from being used; None is no record.
_CPU_BARS = {Verdict.FAILED, Verdict.WITHDRAWN}


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("verdict", [None, *Verdict])
def test_unproven_reason_needs_proof_on_gpus_and_evidence_against_on_cpus(
    on_gpu: bool, verdict: Verdict | None
) -> None:
    known = {LLAMA: proof(inplace=ProofFinding(verdict, "why"))} if verdict is not None else {}
    reason = unproven_reason("inplace", [unit("a", "f")], known, on_gpu)
    allowed = verdict is Verdict.PROVEN if on_gpu else verdict not in _CPU_BARS
    assert (reason is None) == allowed
    if reason is not None and verdict is not None:
        assert reason == f"{verdict} for {LLAMA}: why"


@pytest.mark.parametrize(
    ("inplace", "sleep"), list(itertools.product([None, *Verdict], [None, *Verdict]))
)
def test_choice_on_a_gpu_is_proven_or_respawn(
    inplace: Verdict | None, sleep: Verdict | None
) -> None:
    given = {"inplace": inplace, "sleep": sleep}
    found = {name: ProofFinding(v, "why") for name, v in given.items() if v is not None}
    known = {LLAMA: proof(**found)}
    two = [unit("a", "f"), unit("b", "f")]
    choice = choose_swap_method(two, known, on_gpu=True, refused={})
    if choice.method == "respawn":
        assert Verdict.PROVEN not in given.values()
        assert choice.source is ChoiceSource.FALLBACK
        assert "inplace" in choice.reason
        assert "sleep" in choice.reason
    else:
        assert given[choice.method] is Verdict.PROVEN
        assert choice.source is ChoiceSource.PROOF
        assert "2026-11-30" in choice.reason


def test_choice_on_a_cpu_is_in_place_without_a_record() -> None:
    choice = choose_swap_method([], {}, on_gpu=False, refused={})
    assert (choice.method, choice.source) == ("inplace", ChoiceSource.RELEASE)
    bad = {LLAMA: proof(inplace=ProofFinding(Verdict.WITHDRAWN, "a canary failed"))}
    choice = choose_swap_method([unit("a", "f"), unit("b", "f")], bad, on_gpu=False, refused={})
    assert (choice.method, choice.source) == ("respawn", ChoiceSource.FALLBACK)
    assert "a canary failed" in choice.reason


def test_choice_counts_every_layout_and_every_refusal() -> None:
    known = {LLAMA: proof(inplace=PROVEN, sleep=PROVEN), QWEN: proof(QWEN, sleep=PROVEN)}
    both = [unit("a", "f"), unit("b", "g", QWEN)]
    assert choose_swap_method(both, known, on_gpu=True, refused={}).method == "sleep"
    choice = choose_swap_method(both, known, on_gpu=True, refused={"sleep": "too large"})
    assert choice.method == "respawn"
    assert choice.reason == f"inplace: coe doctor has no record of {QWEN} here; sleep: too large"
    only = {LLAMA: known[LLAMA]}
    choice = choose_swap_method(both, only, on_gpu=True, refused={})
    assert choice.reason == f"inplace and sleep: coe doctor has no record of {QWEN} here"


FIGURES = {"swap_s": 0.1, "copy_bytes_per_s": 1e10, "weight_bytes": 1e9}


@pytest.mark.parametrize(
    ("families", "sleep_rate", "best"),
    [("ff", 5e9, "inplace"), ("ff", 5e10, "sleep"), ("fg", 5e9, "sleep"), ("fffg", 5e9, "sleep")],
)
def test_choice_takes_the_faster_method_for_the_pool_s_families(
    families: str, sleep_rate: float, best: str
) -> None:
    sleeping = {**FIGURES, "copy_bytes_per_s": sleep_rate}
    known = {
        LLAMA: proof(
            inplace=ProofFinding(Verdict.PROVEN, "", FIGURES),
            sleep=ProofFinding(Verdict.PROVEN, "", sleeping),
        )
    }
    units = [unit(str(i), family, size=14 * 10**9) for i, family in enumerate(families)]
    assert choose_swap_method(units, known, on_gpu=True, refused={}).method == best


def test_expected_swap_scales_with_bytes_and_counts_restarts_between_families() -> None:
    known = {LLAMA: proof(inplace=ProofFinding(Verdict.PROVEN, "", FIGURES))}
    small, large = unit("a", "f"), unit("b", "f", size=11 * 10**9)
    assert expected_swap_s("inplace", [small], known) == 0
    assert expected_swap_s("inplace", [small, small], known) == pytest.approx(0.1)
    assert expected_swap_s("inplace", [small, large], known) == pytest.approx(0.6)
    other = replace(small, family="g")
    assert expected_swap_s("inplace", [small, other], known) == START_GUESS_S
    assert METHODS[0] == "respawn"
