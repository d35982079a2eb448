"""How far a batch is, as a line of text and as a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.cli.batch.batch_client import ENDED

_LOOK_S = 1.0
# More bars would not fit a terminal.
_MOST_MODELS = 16


@dataclass(frozen=True, slots=True)
class ModelLine:
    """How far the lines of one expert or recipe are.

    Attributes:
        name: Its name.
        total: Its lines.
        done: Those with a result.
        failed: Those with an error.
        tokens: Tokens of their prompts and answers.
        cost: Their units of cost.
        left_s: Expected time until its last line, in s; None where it can't be told.
    """

    name: str
    total: int
    done: int
    failed: int
    tokens: int
    cost: float
    left_s: float | None

    @classmethod
    def of(cls, name: str, model: dict[str, Any]) -> ModelLine:
        """Read an entry of a batch's `coe.models`."""
        failed = int(model["failed"])
        return cls(
            name,
            int(model["total"]),
            int(model["completed"]) + failed,
            failed,
            int(model["input_tokens"]) + int(model["output_tokens"]),
            float(model["cost"]),
            model["seconds_left"],
        )

    @property
    def text(self) -> str:
        """The figures in one line."""
        return _figures(self.done, self.total, self.failed, self.tokens, self.cost, self.left_s)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is.

    Attributes:
        status: The batch's status.
        total: Lines of the batch; 0 before they were read.
        done: Lines with a result.
        failed: Those of them with an error.
        tokens: Tokens of prompts and answers.
        cost: Units of cost.
        left_s: Expected time until its end, in s; None where it can't be told.
        models: The same by expert or recipe, those with the most lines first.
    """

    status: str
    total: int
    done: int
    failed: int
    tokens: int
    cost: float
    left_s: float | None
    models: tuple[ModelLine, ...] = ()

    @classmethod
    def of(cls, batch: dict[str, Any]) -> Progress:
        """Read a batch."""
        counts, coe = batch["request_counts"], batch["coe"]
        total, failed = int(counts["total"]), int(counts["failed"])
        done = int(counts["completed"]) + failed
        tokens = int((batch.get("usage") or {}).get("total_tokens", 0))
        models = [ModelLine.of(name, model) for name, model in coe["models"].items()]
        return cls(
            batch["status"],
            total,
            done,
            failed,
            tokens,
            float(coe["cost"]),
            coe["seconds_left"],
            tuple(sorted(models, key=lambda model: -model.total)),
        )

    @property
    def text(self) -> str:
        """The figures in one line."""
        return _figures(self.done, self.total, self.failed, self.tokens, self.cost, self.left_s)

    @property
    def shares(self) -> str:
        """The lines of each model, in one line."""
        return ", ".join(f"{model.name} {model.done}/{model.total}" for model in self.models)


def _figures(
    done: int, total: int, failed: int, tokens: int, cost: float, left_s: float | None
) -> str:
    parts = [f"{done}/{total} lines"]
    if failed:
        parts.append(f"{failed} failed")
    parts += [f"{tokens} tokens", f"cost {cost:.6g}"]
    if left_s is not None:
        parts.append(f"{duration(left_s)} to go")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Format a time for people, such as `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def watch(fetch: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Draw a progress bar until a batch has ended, and return the batch.

    Without a terminal a line is printed for each change.

    Args:
        fetch: Returns the batch as it is now.
    """
    from rich.console import Console
    from rich.progress import BarColumn, TaskID, TextColumn
    from rich.progress import Progress as Bars

    console = Console()
    batch = fetch()
    if not console.is_terminal:
        told: tuple[str, int] | None = None
        while True:
            now = Progress.of(batch)
            if (now.status, now.done) != told:
                told = now.status, now.done
                by_model = f" ({now.shares})" if now.shares else ""
                console.print(
                    f"{now.status}: {now.text}{by_model}",
                    soft_wrap=True,
                    highlight=False,
                    markup=False,
                )
            if now.status in ENDED:
                return batch
            time.sleep(_LOOK_S)
            batch = fetch()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Bars(*columns, console=console) as bars:
        whole = bars.add_task(batch["status"], total=None, figures="")
        by_name: dict[str, TaskID] = {}
        while True:
            now = Progress.of(batch)
            bars.update(
                whole,
                description=now.status,
                total=now.total or None,
                completed=now.done,
                figures=now.text,
            )
            # One model has the figures of the whole.
            for model in now.models[:_MOST_MODELS] if len(now.models) > 1 else ():
                if model.name not in by_name:
                    by_name[model.name] = bars.add_task(f"  {model.name}", figures="")
                bars.update(
                    by_name[model.name],
                    total=model.total,
                    completed=model.done,
                    figures=model.text,
                )
            if now.status in ENDED:
                return batch
            time.sleep(_LOOK_S)
            batch = fetch()
