"""What the parts of a batch share: its lines, its terms, and its plan. No I/O."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from service.errors import InvalidRequestError
from service.types import Tenant

WINDOW = "24h"
"""The completion window that clients have to give."""
_LONGEST_S = 30 * 86_400
# Lines that are read before other work of the event loop gets its turn.
_LINES_PER_TURN = 64
_TERMS = ("max_cost", "deadline", "quality")
_DURATION = re.compile(r"^(\d{1,7}(?:\.\d{1,3})?)(s|m|h|d)$")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of a batch's input file.

    Attributes:
        number: Its number, from 0.
        custom_id: The client's name of it, unique in the batch.
        body: The body of its request.
    """

    number: int
    custom_id: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BatchTerms:
    """What a client asks of a batch as a whole.

    Attributes:
        max_cost: The most that all lines together may cost, in units of cost; None for no bound.
        deadline_s: The seconds from the batch's creation until its end.
        quality: The part of the best total quality within the other terms that is to be reached
            at the least cost, in (0, 1]; None for the best quality.
    """

    max_cost: float | None = None
    deadline_s: float = 86_400.0
    quality: float | None = None


@dataclass(frozen=True, slots=True)
class LineChoice:
    """The answerer of one line.

    Attributes:
        line: The line's number.
        model: The expert or recipe that the line is sent to; for a line that names a model, that
            name.
        quality: The expected quality of the answer, in [0, 1].
        cost: The expected cost, in units of cost.
        tokens: The expected tokens of the prompt and the answer.
        least: The least bound of cost with which the line is not refused: its prompt is bounded by
            its bytes.
    """

    line: int
    model: str
    quality: float
    cost: float
    tokens: float
    least: float = 0.0


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The plan of a batch.

    Attributes:
        choices: One choice for each line, in the order in which to run them.
        quality: The mean expected quality of all lines, in [0, 1].
        cost: The expected cost of all lines together, in units of cost.
        seconds: The expected time to run them all, in s.
        basis: What the planner expects of the lines, for `PlansBatches.replan`; None where it plans
            only once.
    """

    choices: tuple[LineChoice, ...]
    quality: float
    cost: float
    seconds: float
    basis: object | None = None


@dataclass(frozen=True, slots=True)
class FinishedLine:
    """A line that has its answer.

    Attributes:
        line: The line's number.
        model: The expert or recipe that it was sent to.
        cost: What the answer cost, in units of cost.
    """

    line: int
    model: str
    cost: float


class PlansBatches(Protocol):
    """Chooses an answerer for each line of a batch, and the order of the lines."""

    async def plan(
        self, endpoint: str, lines: Sequence[BatchLine], terms: BatchTerms, tenant: Tenant
    ) -> BatchPlan:
        """Plan a batch.

        Args:
            endpoint: The path that the lines are for, such as `/v1/chat/completions`.
            lines: The lines.
            terms: The terms of the batch.
            tenant: The tenant whose batch it is.

        Raises:
            InvalidRequestError: No plan keeps the terms.
        """

    async def basis(
        self, endpoint: str, lines: Sequence[BatchLine], tenant: Tenant
    ) -> object | None:
        """Expect again what a plan goes by, after a restart.

        Args:
            endpoint: The path that the lines are for.
            lines: The lines.
            tenant: The tenant whose batch it is.

        Returns:
            The basis of a plan; None where the planner plans only once.
        """

    async def replan(
        self,
        basis: object,
        terms: BatchTerms,
        left: Sequence[Sequence[LineChoice]],
        finished: Sequence[FinishedLine],
    ) -> BatchPlan | None:
        """Plan the lines of a batch that are left.

        Args:
            basis: That of an earlier plan.
            terms: The terms for these lines alone.
            left: The lines, by model in the order in which they would run, with their choices.
            finished: What other lines have cost.

        Returns:
            A plan of some or all of these lines; None to keep their choices.
        """


class PacesBatches(Protocol):
    """Lets a batch's lines start, one after another."""

    async def turn(self, models: Sequence[str]) -> str:
        """Wait until a line for one of several models may start, and return the model.

        Args:
            models: The experts and recipes with lines that are left, in the order of the plan.
        """

    def ended(self, model: str) -> None:
        """Free the place of a line that had its turn, once it has ended.

        Args:
            model: The expert or recipe that the line was sent to.
        """


ModelOf = Callable[[object, str, Tenant], str]
"""Returns the model that a line is sent to, by what it names and by its plan."""


def as_planned(_named: object, planned: str, _tenant: Tenant) -> str:
    """Send each line to the model of its plan."""
    return planned


class NoPace:
    """Lets each line start at once; the runner bounds how many run."""

    async def turn(self, models: Sequence[str]) -> str:
        return models[0]

    def ended(self, model: str) -> None:
        pass


class AsWritten:
    """Keeps the model and the order of each line. It expects nothing of quality and cost."""

    async def plan(
        self, endpoint: str, lines: Sequence[BatchLine], terms: BatchTerms, tenant: Tenant
    ) -> BatchPlan:
        choices = []
        for line in lines:
            model = line.body.get("model", "auto")
            name = model if isinstance(model, str) else "auto"
            choices.append(LineChoice(line.number, name, 0.0, 0.0, 0.0))
            if len(choices) % _LINES_PER_TURN == 0:
                await asyncio.sleep(0)
        return BatchPlan(tuple(choices), 0.0, 0.0, 0.0)

    async def basis(
        self, endpoint: str, lines: Sequence[BatchLine], tenant: Tenant
    ) -> object | None:
        return None

    async def replan(
        self,
        basis: object,
        terms: BatchTerms,
        left: Sequence[Sequence[LineChoice]],
        finished: Sequence[FinishedLine],
    ) -> BatchPlan | None:
        return None


def parse_terms(body: Mapping[str, Any]) -> BatchTerms:
    """Parse the terms of a batch: the field `coe`, or the JSON text in `metadata.coe`.

    Args:
        body: The body that creates the batch.

    Raises:
        InvalidRequestError: A term is unknown or not valid, or both places give terms.
    """
    given, where = body.get("coe"), "coe"
    metadata = body.get("metadata")
    text = metadata.get("coe") if isinstance(metadata, Mapping) else None
    if text is not None:
        where = "metadata.coe"
        if given is not None:
            raise InvalidRequestError(
                "give the terms once: in `coe` or `metadata.coe`", param="coe"
            )
        given = _json(text)
    if given is None:
        return BatchTerms()
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"`{where}` must be an object, such as {_EXAMPLE}", param=where)
    if unknown := given.keys() - {*_TERMS}:
        raise InvalidRequestError(
            f"`{where}` has no {min(unknown)[:64]!r}; it takes {', '.join(_TERMS)}", param=where
        )
    return BatchTerms(
        _max_cost(given.get("max_cost"), f"{where}.max_cost"),
        _deadline_s(given.get("deadline", WINDOW), f"{where}.deadline"),
        _quality(given.get("quality", "best"), f"{where}.quality"),
    )


_EXAMPLE = '{"max_cost": 5, "deadline": "24h", "quality": 0.9}'


def _json(text: object) -> Any:
    try:
        return orjson.loads(text) if isinstance(text, str) else text
    except orjson.JSONDecodeError:
        raise InvalidRequestError(
            f"`metadata.coe` must be a JSON text, such as {_EXAMPLE}", param="metadata.coe"
        ) from None


def _number(given: object) -> float | None:
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not math.isfinite(given):
        return None
    return float(given)


def _max_cost(given: object, where: str) -> float | None:
    if given is None:
        return None
    cost = _number(given)
    if cost is None or not 0 < cost <= 1e15:
        raise InvalidRequestError(f"`{where}` must be a number greater than 0", param=where)
    return cost


def _deadline_s(given: object, where: str) -> float:
    seconds = _number(given)
    if isinstance(given, str) and (found := _DURATION.match(given)):
        seconds = float(found[1]) * _SECONDS[found[2]]
    if seconds is None or not 1 <= seconds <= _LONGEST_S:
        raise InvalidRequestError(
            f'`{where}` must be a time of 1 s to 30 d, such as "90m", "24h" or "2d", or a number '
            "of seconds",
            param=where,
        )
    return seconds


def _quality(given: object, where: str) -> float | None:
    if given is None or given == "best":
        return None
    quality = _number(given)
    if quality is None or not 0 < quality <= 1:
        raise InvalidRequestError(
            f'`{where}` must be "best" or a number greater than 0 and at most 1', param=where
        )
    return quality
