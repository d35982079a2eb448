"""How far a batch is, as a line of text and as a progress bar."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.cli.batch.batch_client import ENDED

_LOOK_S = 1.0


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
    """

    status: str
    total: int
    done: int
    failed: int
    tokens: int
    cost: float
    left_s: float | None

    @classmethod
    def of(cls, batch: dict[str, Any], now_s: float) -> Progress:
        """Read a batch. `now_s` is in seconds since 1970."""
        counts = batch["request_counts"]
        total, failed = int(counts["total"]), int(counts["failed"])
        done = int(counts["completed"]) + failed
        began_s = batch.get("in_progress_at")
        left_s = None
        if began_s is not None and done and batch["status"] not in ENDED:
            left_s = max(0.0, now_s - began_s) * (total - done) / done
        tokens = int((batch.get("usage") or {}).get("total_tokens", 0))
        cost = float(batch["coe"]["cost"])
        return cls(batch["status"], total, done, failed, tokens, cost, left_s)

    @property
    def text(self) -> str:
        """The figures in one line."""
        parts = [f"{self.done}/{self.total} lines"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        parts += [f"{self.tokens} tokens", f"cost {self.cost:.6g}"]
        if self.left_s is not None:
            parts.append(f"{duration(self.left_s)} to go")
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
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console()
    batch = fetch()
    if not console.is_terminal:
        told = ""
        while True:
            now = Progress.of(batch, time.time())
            line = f"{now.status}: {now.text}"
            if line.split(", ")[:1] != told.split(", ")[:1] or batch["status"] in ENDED:
                console.print(line, highlight=False)
                told = line
            if batch["status"] in ENDED:
                return batch
            time.sleep(_LOOK_S)
            batch = fetch()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
    with Bars(*columns, console=console) as bars:
        task = bars.add_task(batch["status"], total=None, figures="")
        while True:
            now = Progress.of(batch, time.time())
            bars.update(
                task,
                description=now.status,
                total=now.total or None,
                completed=now.done,
                figures=now.text,
            )
            if batch["status"] in ENDED:
                return batch
            time.sleep(_LOOK_S)
            batch = fetch()
