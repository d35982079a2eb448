"""Reads recorded outcomes: the answers and scores of experts by prompt.

One JSON object a line, gzipped or not:
`{"id", "prompt", "category"?, "outcomes": {expert: {"score", "answer"?,
"output_chars"?, "cost"?}}}`. `coe outcomes record` writes more: the tokens of
prompt and answer, seconds, why the answer ended, errors, and `recipe` for a name
that stands for several experts: no fit combines it with others. Rows with the same id
and prompt are one row. Files come from many hands, so what can be used is used
and what can't is counted and named; only when nothing is left does reading
fail.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NO_ANSWER = -1
"""Code of an answer that was not given or could not be read: it agrees with no other."""


# A model that few rows have says little of the others' difficulty.
_MIN_BYSTANDER_SHARE = 0.5
_MAX_BYSTANDERS = 48


class OutcomeError(ValueError):
    """Outcomes or costs from which nothing can be fitted; the message says why."""


@dataclass(frozen=True, slots=True)
class Table:
    """Outcomes as arrays: N prompts, E experts.

    `categories` holds None where a row has none. `score` (N, E) in [0, 1], NaN
    where the expert is missing from the row. `answer` (N, E) are codes that are
    equal where answers are, NO_ANSWER where there is none; `has_answers` (E,)
    says whether the expert's answers were recorded at all. `cost` (N, E) is one
    call's cost, the row's own where it gives one. `bystanders` (N, M) are the
    scores of models that nothing may be sent to: they too tell which prompts
    are hard.
    """

    ids: tuple[str, ...]
    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    experts: tuple[str, ...]
    score: Floats
    answer: NDArray[np.int64]
    has_answers: NDArray[np.bool_]
    cost: Floats
    bystanders: Floats

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: NDArray[np.int64]) -> Table:
        """The table of these rows, in this order."""
        return Table(
            tuple(self.ids[i] for i in rows),
            tuple(self.prompts[i] for i in rows),
            tuple(self.categories[i] for i in rows),
            self.experts,
            self.score[rows],
            self.answer[rows],
            self.has_answers,
            self.cost[rows],
            self.bystanders[rows],
        )


@dataclass(slots=True)
class Skipped:
    """Counts of skipped records by reason, with the first place of each."""

    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, place: str) -> None:
        """Count one more."""
        self.reasons[reason] += 1
        self.first.setdefault(reason, place)

    def lines(self) -> list[str]:
        """Return a line per reason, the most frequent first."""
        return [
            f"skipped {count} x {reason} (first: {self.first[reason]})"
            for reason, count in self.reasons.most_common()
        ]


def read_costs(path: Path, files: Sequence[Path] = ()) -> dict[str, float]:
    """Cost of one call for each expert, from `{expert: number}`.

    A file of several such objects by name is taken too: the sections called
    like one of the outcome `files` are used. Raises OutcomeError.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutcomeError(f"{path}: {error}") from error
    if not isinstance(data, dict) or not data:
        raise OutcomeError(f"{path}: expected an object of expert names and costs")
    if all(isinstance(value, dict) for value in data.values()):
        wanted = [name for name in data if any(_stem(file) == name for file in files)]
        if not wanted:
            raise OutcomeError(
                f"{path}: has the sections {sorted(data)}, none called like an outcome file"
            )
        data = {expert: cost for name in wanted for expert, cost in data[name].items()}
    found: dict[str, float] = {}
    for expert, given in data.items():
        cost = _number(given)
        if cost is None or cost < 0:
            raise OutcomeError(f"{path}: {expert}: cost must be a number >= 0, got {given!r}")
        found[str(expert)] = cost
    return found


def costs_of(path: Path | None, files: Sequence[Path]) -> dict[str, float]:
    """Cost of one call for each expert: of the file, or without one the mean that was recorded.

    Raises OutcomeError.
    """
    if path is not None:
        return read_costs(path, files)
    found: dict[str, list[float]] = {}
    for row in _rows(files, Skipped()):
        for name, outcome in row["outcomes"].items():
            if outcome[3] is not None:
                found.setdefault(name, []).append(outcome[3])
    if not found:
        raise OutcomeError(
            f"{', '.join(map(str, files))}: no outcome has a cost, so costs must be given"
        )
    return {name: math.fsum(costs) / len(costs) for name, costs in found.items()}


def read_outcomes(
    files: Sequence[Path],
    costs: Mapping[str, float],
    experts: Sequence[str] | None = None,
) -> tuple[Table, Skipped]:
    """The rows of all files as one table, and what was left out of it.

    Without `experts`, all that have a cost and an outcome are used. Raises
    OutcomeError where a named expert is unknown or no row can be used.
    """
    skipped = Skipped()
    rows = _rows(files, skipped)
    seen = Counter(name for row in rows for name in row["outcomes"])
    if experts is None:
        chosen = tuple(name for name in costs if name in seen)
        for name in seen:
            if name not in costs:
                skipped.add(f"expert {name!r} (no cost is given for it)", "costs")
    else:
        chosen = tuple(dict.fromkeys(experts))
        for name in chosen:
            if name not in costs:
                raise OutcomeError(f"no cost is given for {name!r}; known: {sorted(costs)}")
            if name not in seen:
                raise OutcomeError(f"no row has an outcome of {name!r}; found: {sorted(seen)}")
    usable = [row for row in rows if any(name in row["outcomes"] for name in chosen)]
    if not chosen or not usable:
        raise OutcomeError(
            f"nothing usable in {', '.join(map(str, files))}: "
            f"{len(rows)} rows, experts with outcomes {sorted(seen)}, with costs {sorted(costs)}; "
            + "; ".join(skipped.lines())
        )
    for _ in range(len(rows) - len(usable)):
        skipped.add("row without an outcome of the experts asked for", "rows")
    beside = [
        name
        for name, count in seen.most_common()
        if name not in chosen and count >= _MIN_BYSTANDER_SHARE * len(rows)
    ]
    return _table(usable, chosen, costs, beside[:_MAX_BYSTANDERS]), skipped


def read_tokens(files: Sequence[Path], table: Table) -> tuple[Floats, Floats]:
    """The tokens of each call's prompt and answer, each (N, E); NaN where none was recorded.

    Args:
        files: The files that the table was read from.
        table: Names the rows and the experts.

    Raises:
        OutcomeError: A file can't be read.
    """
    rows = {row["id"]: row["outcomes"] for row in _rows(files, Skipped())}
    found = _cells(rows, table, slice(4, 6))
    return found[:, :, 0], found[:, :, 1]


def read_thinking(files: Sequence[Path], table: Table) -> tuple[Floats, NDArray[np.bool_]]:
    """The tokens of each call's thinking, (N, E), and whether it would have gone on, (N, E).

    The tokens are NaN where none were recorded.

    Args:
        files: The files that the table was read from.
        table: Names the rows and the experts.

    Raises:
        OutcomeError: A file can't be read.
    """
    rows = {row["id"]: row["outcomes"] for row in _rows(files, Skipped())}
    found = _cells(rows, table, slice(5, 8))
    answer, thinking, cut = (found[:, :, i] for i in range(3))
    # An answer that was cut behind its thinking tells the whole thinking.
    return thinking, (cut > 0) & (thinking + 1 >= np.where(np.isnan(answer), thinking, answer))


def _cells(rows: Mapping[str, Mapping[str, _Outcome]], table: Table, of: slice) -> Floats:
    nothing = (math.nan,) * 8
    width = of.stop - of.start
    return np.array(
        [[rows[i].get(name, nothing)[of] for name in table.experts] for i in table.ids],
        dtype=np.float64,
    ).reshape(len(table), len(table.experts), width)


def _rows(files: Sequence[Path], skipped: Skipped) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for file in files:
        for number, line in _lines(file, skipped):
            place = f"{file.name}:{number}"
            try:
                data = json.loads(line)
            except ValueError:
                skipped.add("line that is not JSON", place)
                continue
            if not isinstance(data, dict) or not isinstance(data.get("prompt"), str):
                skipped.add("line without a prompt", place)
                continue
            outcomes = {}
            given = data.get("outcomes")
            for name, outcome in given.items() if isinstance(given, dict) else ():
                clean = _outcome(outcome)
                if clean is None:
                    skipped.add("outcome without a score in 0..1", f"{place}, {name}")
                else:
                    outcomes[str(name)] = clean
            if not outcomes:
                skipped.add("line without outcomes", place)
                continue
            identity = str(data.get("id", place))
            if (known := rows.get(identity)) is not None:
                # A recording writes one line for each expert.
                if known["prompt"] != data["prompt"] or outcomes.keys() & known["outcomes"].keys():
                    skipped.add("row whose id was seen before", place)
                else:
                    known["outcomes"].update(outcomes)
                continue
            category = data.get("category")
            rows[identity] = {
                "id": identity,
                "prompt": data["prompt"],
                "category": category if isinstance(category, str) and category else None,
                "outcomes": outcomes,
            }
    return list(rows.values())


def _lines(file: Path, skipped: Skipped) -> Iterator[tuple[int, bytes]]:
    try:
        with file.open("rb") as raw:
            zipped = raw.read(2) == b"\x1f\x8b"
        with gzip.open(file, "rb") if zipped else file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, OSError) as error:
        if not file.is_file():
            raise OutcomeError(f"{file}: {getattr(error, 'strerror', None) or error}") from error
        skipped.add(f"rest of a damaged file ({error})", file.name)


_Outcome = tuple[float, str | None, bool, float | None, float, float, float, bool]


def _outcome(data: Any) -> _Outcome | None:
    """(score, answer, has answer?, cost, tokens of prompt, answer and thinking, cut?), or None.

    It is None where there is no score. Tokens that were not recorded are NaN.
    """
    if not isinstance(data, dict):
        data = {"score": data}
    given = data.get("score")
    score = float(given) if isinstance(given, bool) else _number(given)
    if score is None or not 0 <= score <= 1:
        return None
    # Without answers, a name takes part in no cascade and no vote.
    combines = data.get("recipe") is not True
    answer = data.get("answer") if combines else None
    if answer is not None:
        answer = " ".join(str(answer).split()).casefold() or None
    cost, prompt_tokens, answer_tokens, thinking_tokens = (
        found if (found := _number(data.get(key))) is not None and found >= 0 else None
        for key in ("cost", "prompt_tokens", "completion_tokens", "reasoning_tokens")
    )
    return (
        score,
        answer,
        "answer" in data and combines,
        cost,
        math.nan if prompt_tokens is None else prompt_tokens,
        math.nan if answer_tokens is None else answer_tokens,
        math.nan if thinking_tokens is None else thinking_tokens,
        data.get("finish_reason") == "length",
    )


def _table(
    rows: Sequence[dict[str, Any]],
    experts: tuple[str, ...],
    costs: Mapping[str, float],
    beside: Sequence[str],
) -> Table:
    shape = (len(rows), len(experts))
    score = np.full(shape, np.nan)
    answer = np.full(shape, NO_ANSWER, dtype=np.int64)
    cost = np.tile(np.array([costs[name] for name in experts]), (len(rows), 1))
    recorded = np.zeros(len(experts), dtype=np.bool_)
    for i, row in enumerate(rows):
        codes: dict[str, int] = {}
        for e, name in enumerate(experts):
            found = row["outcomes"].get(name)
            if found is None:
                continue
            score[i, e], text, has, own = found[:4]
            recorded[e] |= has and text is not None
            if text is not None:
                answer[i, e] = codes.setdefault(text, len(codes))
            if own is not None:
                cost[i, e] = own
    return Table(
        tuple(row["id"] for row in rows),
        tuple(row["prompt"] for row in rows),
        tuple(row["category"] for row in rows),
        experts,
        score,
        answer,
        recorded,
        cost,
        np.array(
            [
                [row["outcomes"][name][0] if name in row["outcomes"] else np.nan for name in beside]
                for row in rows
            ]
        ).reshape(len(rows), len(beside)),
    )


def _stem(file: Path) -> str:
    name = file.name.removesuffix(".gz")
    return name.removesuffix(".jsonl").removesuffix(".json")


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else (a bool is no number)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
