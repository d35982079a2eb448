"""Proofs of swap methods: what `coe doctor` found, and the method that follows from it. Pure.

A proof holds for one kind of machine, one set of versions, and one layout of weights. On a CPU the
release's own tests prove swaps in place, so no proof is needed there. On a GPU only a proof counts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

FORMAT = 1
# The parts of a proof. The first three are methods of swaps, from the simplest to the fastest.
METHODS = ("respawn", "sleep", "inplace")
PARTS = (*METHODS, "steering", "capture")
# The seconds of an engine start until one was measured with the pool's own weights.
START_GUESS_S = 40.0
_MAX_REASON = 400
_TEXTS = ("device", "hardware", "driver", "coe", "vllm", "torch")


class Verdict(StrEnum):
    """What is known of one part."""

    PROVEN = "proven"
    FAILED = "failed"
    UNTRIED = "not proven"
    WITHDRAWN = "withdrawn"
    UNAVAILABLE = "not available"


@dataclass(frozen=True, slots=True)
class ProofMachine:
    """The kind of machine and the versions that a proof holds for.

    Attributes:
        device: `cpu` or `gpu`.
        hardware: The name of the CPU or of the GPUs.
        driver: The version of the GPU's driver. It is empty on a CPU.
        coe: The version of this package.
        vllm: The version of vLLM, with the name of its build.
        torch: The version of torch.
    """

    device: str
    hardware: str
    driver: str
    coe: str
    vllm: str
    torch: str

    @property
    def on_gpu(self) -> bool:
        """Whether engines run on GPUs."""
        return self.device == "gpu"

    @property
    def is_known(self) -> bool:
        """Whether it can be told apart from other machines. nvidia-smi may not name the GPUs."""
        return not self.on_gpu or bool(self.hardware and self.driver)


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """The form of weights in an engine. Models of one layout run through the same kernels.

    Attributes:
        architecture: The name of the model's class.
        dtype: The dtype of the activations, and of weights that are not quantised.
        quantization: The form of quantised weights (method, bits, groups, exceptions), or `none`.
        eager: Whether the engine runs without captured graphs.
        gpus: GPUs of one engine; 0 on a CPU.
    """

    architecture: str
    dtype: str
    quantization: str = "none"
    eager: bool = False
    gpus: int = 0

    def __str__(self) -> str:
        parts = [self.architecture, self.dtype]
        if self.quantization != "none":
            parts.append(self.quantization)
        parts.append("eager" if self.eager else "compiled")
        if self.gpus > 1:
            parts.append(f"on {self.gpus} GPUs")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class ProofFinding:
    """The verdict on one part, its reason where it is not `proven`, and measured figures by name.

    Names of figures hold their units.
    """

    verdict: Verdict
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SwapProof:
    """The record of one run of `coe doctor` for one layout.

    Attributes:
        machine: The machine that it holds for.
        layout: The layout that it holds for.
        made: The time in UTC, in ISO 8601.
        quick: Whether the run was a quick one.
        findings: The finding of each part of `PARTS`.
    """

    machine: ProofMachine
    layout: WeightLayout
    made: str
    quick: bool
    findings: Mapping[str, ProofFinding]

    def finding(self, part: str) -> ProofFinding:
        """Return the finding of a part; `not proven` where there is none."""
        return self.findings.get(part, ProofFinding(Verdict.UNTRIED, "it was not tried"))


def proof_key(machine: ProofMachine, layout: WeightLayout) -> str:
    """Return a file name for the proof of a machine and a layout."""
    text = json.dumps([asdict(machine), asdict(layout)], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def proof_to_json(proof: SwapProof) -> str:
    """Serialise a proof."""
    findings = {name: asdict(finding) for name, finding in proof.findings.items()}
    data = {
        "format": FORMAT,
        "machine": asdict(proof.machine),
        "layout": asdict(proof.layout),
        "made": proof.made,
        "quick": proof.quick,
        "findings": findings,
    }
    return json.dumps(data, indent=1, sort_keys=True, allow_nan=False) + "\n"


def proof_from_json(text: str) -> SwapProof:
    """Parse a proof.

    Raises:
        ValueError: The text is no proof of this format. The message names the fault.
    """
    try:
        data = _mapping(json.loads(text), "a proof")
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if data.get("format") != FORMAT:
        raise ValueError(f"format {data.get('format')!r}; this version reads {FORMAT}")
    machine, layout = (
        _mapping(data.get("machine"), "machine"),
        _mapping(data.get("layout"), "layout"),
    )
    if (device := machine.get("device")) not in ("cpu", "gpu"):
        raise ValueError(f"machine.device: should be cpu or gpu, not {device!r}")
    findings = {
        name: _finding(name, finding)
        for name, finding in _mapping(data.get("findings"), "findings").items()
    }
    return SwapProof(
        ProofMachine(**{name: _typed(machine, name, str) for name in _TEXTS}),
        WeightLayout(
            _typed(layout, "architecture", str),
            _typed(layout, "dtype", str),
            _typed(layout, "quantization", str),
            _typed(layout, "eager", bool),
            _typed(layout, "gpus", int),
        ),
        _typed(data, "made", str),
        _typed(data, "quick", bool),
        findings,
    )


def _finding(name: str, given: object) -> ProofFinding:
    if name not in PARTS:
        raise ValueError(f"findings: should be of {', '.join(PARTS)}, not {name!r}")
    data = _mapping(given, name)
    figures = {}
    for figure, value in _mapping(data.get("figures"), f"{name}.figures").items():
        try:
            number = float(value) if type(value) in (int, float) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ValueError(f"{name}.figures.{figure}: should be a number, not {value!r:.40}")
        figures[figure] = number
    try:
        verdict = Verdict(_typed(data, "verdict", str))
    except ValueError:
        allowed = ", ".join(Verdict)
        raise ValueError(
            f"{name}.verdict: should be one of {allowed}, not {data.get('verdict')!r:.40}"
        ) from None
    return ProofFinding(verdict, one_line(_typed(data, "reason", str)), figures)


def _mapping(value: object, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what}: should be a mapping, not {type(value).__name__}")
    return value


def _typed(data: Mapping[str, Any], name: str, kind: type) -> Any:
    value = data.get(name)
    if type(value) is not kind:
        raise ValueError(f"{name}: should be {kind.__name__}, not {type(value).__name__}")
    if name != "reason" and isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{name}: should be printable, not {value!a:.40}")
    return value


def one_line(text: object) -> str:
    """Shorten a reason to one line that a terminal can show."""
    line = " ".join(str(text).split())
    return "".join(filter(str.isprintable, line))[:_MAX_REASON]


def merged_proof(old: SwapProof | None, new: SwapProof) -> SwapProof:
    """Keep the old findings of parts that the new run did not try.

    A part whose time ran out was tried: an engine that hangs must not stay proven.
    """
    if old is None:
        return new
    kept = {name: old.findings[name] for name in old.findings if name not in new.findings}
    return replace(new, quick=new.quick and old.quick, findings={**kept, **new.findings})


def withdrawn_proof(proof: SwapProof, method: str, reason: str) -> SwapProof | None:
    """Return the proof without a method that has failed in service.

    Returns:
        The changed proof, or None where the method was not proven.
    """
    finding = proof.finding(method)
    if finding.verdict is not Verdict.PROVEN:
        return None
    changed = replace(finding, verdict=Verdict.WITHDRAWN, reason=one_line(reason))
    return replace(proof, findings={**proof.findings, method: changed})


# --- the choice


@dataclass(frozen=True, slots=True)
class UnitWeights:
    """The weights of one unit of a pool: its family, its layout, and its bytes in an engine."""

    unit: str
    family: str
    layout: WeightLayout
    size_bytes: int


class ChoiceSource(StrEnum):
    """What a choice of a method is founded on."""

    CONFIG = "config"
    RELEASE = "release"
    PROOF = "proof"
    FALLBACK = "fallback"


@dataclass(frozen=True, slots=True)
class SwapMethodChoice:
    """A pool's swap method, what it is founded on, and the reason in one sentence."""

    method: str
    source: ChoiceSource
    reason: str


def unproven_reason(
    method: str,
    units: Sequence[UnitWeights],
    proofs: Mapping[WeightLayout, SwapProof],
    on_gpu: bool,
) -> str | None:
    """Return why a method must not be used for these units, or None where it is proven.

    On a CPU a method counts as proven unless a record says otherwise.
    """
    for layout in dict.fromkeys(unit.layout for unit in units):
        proof = proofs.get(layout)
        if proof is None or method not in proof.findings:
            if on_gpu:
                return f"coe doctor has no record of {layout} here"
            continue
        finding = proof.finding(method)
        if finding.verdict is Verdict.PROVEN:
            continue
        if on_gpu or finding.verdict in (Verdict.FAILED, Verdict.WITHDRAWN):
            return f"{finding.verdict} for {layout}: {finding.reason or 'no reason was recorded'}"
    return None


def choose_swap_method(
    units: Sequence[UnitWeights],
    proofs: Mapping[WeightLayout, SwapProof],
    *,
    on_gpu: bool,
    refused: Mapping[str, str],
) -> SwapMethodChoice:
    """Choose the fastest proven method for units that share slots.

    Args:
        units: The units that share slots.
        proofs: The proofs of this machine by layout.
        on_gpu: Whether the pool is on GPUs.
        refused: Methods that this pool can't use, with the reason.

    Returns:
        The choice. `respawn` needs no proof, and it is the fallback.
    """
    methods = ("inplace", "sleep") if on_gpu else ("inplace",)
    reasons: dict[str, str] = {}
    allowed: dict[str, float] = {}
    for method in methods:
        why = refused.get(method) or unproven_reason(method, units, proofs, on_gpu)
        if why is None:
            allowed[method] = expected_swap_s(method, units, proofs)
        else:
            reasons[method] = why
    if not allowed:
        same = set(reasons.values())
        why = (
            f"{' and '.join(reasons)}: {same.pop()}"
            if len(same) == 1
            else "; ".join(f"{method}: {reason}" for method, reason in reasons.items())
        )
        return SwapMethodChoice("respawn", ChoiceSource.FALLBACK, why)
    best = min(allowed, key=allowed.__getitem__)
    if not on_gpu:
        return SwapMethodChoice(best, ChoiceSource.RELEASE, "this release's tests prove it on CPUs")
    made = min(proofs[unit.layout].made for unit in units)
    return SwapMethodChoice(best, ChoiceSource.PROOF, f"coe doctor proved it here on {made[:10]}")


def expected_swap_s(
    method: str, units: Sequence[UnitWeights], proofs: Mapping[WeightLayout, SwapProof]
) -> float:
    """Estimate the seconds of a swap between two of these units, all pairs being equally likely.

    The figures were measured with small models. The rest of the weights goes at the measured bytes
    per second. An engine in place serves one family, and a swap to another family restarts it.
    """
    if len(units) < 2:
        return 0.0
    mean = 0.0
    for unit in units:
        proof = proofs.get(unit.layout)
        figures = proof.finding(method).figures if proof is not None else {}
        rate = figures.get("copy_bytes_per_s", math.inf)
        more_bytes = max(0.0, unit.size_bytes - figures.get("weight_bytes", 0.0))
        mean += (figures.get("swap_s", 0.0) + more_bytes / max(rate, 1.0)) / len(units)
    if method != "inplace":
        return mean
    families = Counter(unit.family for unit in units)
    pairs = len(units) * (len(units) - 1)
    within = sum(count * (count - 1) for count in families.values()) / pairs
    return within * mean + (1 - within) * START_GUESS_S
