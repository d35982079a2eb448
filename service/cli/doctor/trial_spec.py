"""The task and the findings of a trial: JSON files between `coe doctor` and its process."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

_FOUND = "found.jsonl"
_SPEC = "spec.json"


@dataclass(frozen=True, slots=True)
class TrialSpec:
    """The task of the trials for one layout of weights.

    Attributes:
        folder: An empty folder for models and findings.
        config: The `config.json` of the architecture, as `random_models.small_config` made it.
        moe_config: The same of a mixture of experts, for steering.
        dtype: The dtype of the weights, where they are not quantised.
        options: The pool's `vllm` section as JSON.
        on_cpu: Whether engines compute on the CPU.
        quick: Whether transformers is the only reference, so that no other engine starts.
    """

    folder: str
    config: Mapping[str, Any]
    moe_config: Mapping[str, Any]
    dtype: str
    options: str
    on_cpu: bool
    quick: bool

    @property
    def root(self) -> Path:
        """The folder."""
        return Path(self.folder)

    def model(self, name: str) -> Path:
        """Return the folder of a model: `one`, `two` or `moe`."""
        return self.root / name

    @property
    def answers(self) -> Path:
        """The file with the answers of fresh engines."""
        return self.root / "fresh.json"

    def write(self) -> Path:
        """Write the task, and return its file."""
        path = self.root / _SPEC
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return path

    @staticmethod
    def read(path: Path) -> TrialSpec:
        """Read a task that `write` wrote."""
        return TrialSpec(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True, slots=True)
class TrialLine:
    """One line of a trial's findings.

    Attributes:
        kind: `step`: what begins now. `verdict`: the result of a part. `figure`: figures of a part.
        part: The part of the proof; for a step, its text.
        ok: For a verdict, whether the part is proven.
        reason: For a verdict, why it is not.
        figures: For figures, numbers by name.
    """

    kind: Literal["step", "verdict", "figure"]
    part: str
    ok: bool = False
    reason: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)


class TrialLog:
    """The findings of one trial. Each line is on disk before the trial goes on."""

    def __init__(self, folder: Path, trial: str) -> None:
        self.path = folder / f"{trial}.{_FOUND}"

    def step(self, text: str) -> None:
        """Say what begins now."""
        self._add(TrialLine("step", text))

    def proven(self, part: str) -> None:
        """Say that a part is proven."""
        self._add(TrialLine("verdict", part, ok=True))

    def failed(self, part: str, reason: str) -> None:
        """Say that a part has failed."""
        self._add(TrialLine("verdict", part, reason=reason))

    def judged(self, part: str, fault: str | None) -> None:
        """Say that a part has failed for a reason, or is proven where the reason is None."""
        if fault is None:
            self.proven(part)
        else:
            self.failed(part, fault)

    def figures(self, part: str, **figures: float) -> None:
        """Report figures of a part."""
        self._add(TrialLine("figure", part, figures=figures))

    def lines(self) -> Iterator[TrialLine]:
        """Yield the lines so far. An unfinished last line of a killed trial is left out."""
        if not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8").split("\n")[:-1]:
            yield TrialLine(**json.loads(text))

    def _add(self, line: TrialLine) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(line)) + "\n")
