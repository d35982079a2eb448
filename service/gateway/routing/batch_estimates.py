"""Expects quality, cost and time of the lines of a batch, as the router would of each alone."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import orjson
from numpy.typing import NDArray

from service.batches.batch_planner import LineEstimates
from service.batches.batch_types import BatchLine, LineChoice
from service.broker.batch_knapsack import BatchOptions
from service.broker.cost_model import LONG_TOKENS
from service.broker.pool_state import Floats, PoolStateTable, PoolView
from service.broker.recipe_steps import expected_usage
from service.config import Config
from service.errors import CoeError
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.parsing import AUTO, InferenceRequest
from service.gateway.request.request_intake import RequestIntake
from service.gateway.routing.request_bounds import bounds_of, within_bounds
from service.gateway.routing.route_plan import RoutePlan
from service.gateway.routing.routing_setup import RoutingSetup
from service.http.prompt_endpoints import TABLE
from service.rpc.snapshot import Snapshot
from service.types import Residency, Tenant

# Lines that are classified at a time: they share the encoder's batch, and leave the event loop
# after each such group.
_AT_ONCE = 4
# Time until an expert that no pool has now can answer, in s: a pool has to be started for it.
_POOL_START_S = 60.0
# Bytes of a prompt's beginning by which prompts are compared, and of a block of it, which is about
# what a prefix cache holds together.
_BEGINNING, _BLOCK = 4096, 64
_NEVER = np.inf
# Larger lines are parsed in a thread.
_LARGE_BYTES = 128 * 1024


@dataclass(frozen=True, slots=True)
class _Line:
    """One line's figures; arrays are (R,) over the models that a line may name."""

    number: int
    category: str
    quality: Floats
    cost: Floats
    possible: NDArray[np.bool_]
    tokens: Floats
    least: Floats
    answer_tokens: Floats
    prompt_tokens: Floats
    answers: int
    prompt: str


class BatchEstimator:
    """Estimates the lines of batches by one config.

    Args:
        config: The config.
        routing: Its router.
        intake: Parses the lines' bodies.
        defaults: The defaults of the experts.
        context: Returns an expert's context in tokens; 0 where it is unknown.
        views: Returns the state of every pool.
    """

    def __init__(
        self,
        config: Config,
        routing: RoutingSetup,
        intake: RequestIntake,
        defaults: RequestDefaults,
        context: Callable[[str], int],
        views: Callable[[], list[PoolView]],
    ) -> None:
        self._catalog = routing.catalog
        self._planner = routing.planner
        self._quality_model = routing.quality_model
        self._cost_model = routing.cost_model
        self._intake, self._defaults = intake, defaults
        self._context, self._views = context, views
        self._table = PoolStateTable(routing.catalog.index)
        catalog = routing.catalog
        # A line is sent under the name of an expert or of a recipe of the config.
        rows = {name: catalog.index[name] for name in catalog.experts}
        rows |= {name: catalog.recipe_index[r.recipe()] for name, r in config.recipes.items()}
        self._models = tuple(rows)
        self._rows = np.array(list(rows.values()), dtype=np.intp)
        self._remote = {name for name, expert in config.experts.items() if expert.remote}

    async def estimate(
        self, endpoint: str, lines: Sequence[BatchLine], tenant: Tenant
    ) -> LineEstimates:
        """Estimate all lines. Other requests take their turns in between.

        Args:
            endpoint: The path that the lines are for.
            lines: The lines.
            tenant: The tenant whose batch it is.
        """
        found: list[_Line] = []
        unplanned: list[LineChoice] = []
        for start in range(0, len(lines), _AT_ONCE):
            # They are read from a file, and may have megabytes.
            some = await asyncio.to_thread(lines.__getitem__, slice(start, start + _AT_ONCE))
            made = await asyncio.gather(*(self._line(endpoint, line, tenant) for line in some))
            for line in made:
                if isinstance(line, _Line):
                    found.append(line)
                else:
                    unplanned.append(line)
            await asyncio.sleep(0)
        engines = self._engines()
        # The arrays of many lines take a while to fill.
        return await asyncio.to_thread(self._together, found, tuple(unplanned), engines)

    async def _line(self, endpoint: str, line: BatchLine, tenant: Tenant) -> _Line | LineChoice:
        model = line.body.get("model", AUTO)
        as_it_is = LineChoice(
            line.number, model if isinstance(model, str) and model else AUTO, 0.0, 0.0, 0.0
        )
        try:
            raw = orjson.dumps(line.body)
            parse = partial(self._intake.parse, endpoint, raw, {}, tenant)
            request = await asyncio.to_thread(parse) if len(raw) > _LARGE_BYTES else parse()
            request = self._defaults.apply(request, request.model)
            plan = await self._planner.plan_by_all_stages(request)
            return self._figures(line.number, request, plan)
        except (CoeError, orjson.JSONEncodeError):
            # It gets its own error where it runs.
            return as_it_is

    def _figures(
        self, number: int, request: InferenceRequest, plan: RoutePlan
    ) -> _Line | LineChoice:
        catalog, experts = self._catalog, len(self._catalog.experts)
        added = self._defaults.added(request, catalog.experts)
        prompt = np.broadcast_to(request.prompt_tokens + added.tokens, (experts,)).astype(float)
        expected = self._cost_model.expect(
            plan.category, prompt, request.most_tokens, request.answers
        )
        if request.bounds_choice:
            bounds = replace(
                bounds_of(request, plan, self._cost_model, added.most_tokens), deadline_s=_NEVER
            )
            plan = within_bounds(catalog, bounds, plan, expected.cost, steps=expected.steps)
        quality = plan.quality
        if plan.reason == "named":
            quality = self._quality_of_named(request, plan)
        generates = TABLE[request.endpoint].generates
        answer = request.answers * expected.tokens if generates else np.zeros(experts)
        place = {row: i for i, row in enumerate(plan.rows.tolist())}
        at = np.array([place.get(row, -1) for row in self._rows.tolist()], dtype=np.intp)
        used = expected_usage(
            catalog,
            plan.rows,
            plan.escalation_prob,
            expected.cost,
            prompt,
            answer,
            expected.steps,
            plan.skill,
            plan.recruitable,
        )
        # Answers are cut to a bound of cost, and prompts can't be.
        floor = self._cost_model.floor(
            request.most_prompt_tokens + added.most_tokens, request.answers if generates else 0
        )
        needed = request.prompt_tokens + min(request.most_tokens or 0, LONG_TOKENS)
        contexts = np.array([self._context(name) for name in catalog.experts])
        too_long = (contexts > 0) & (contexts < needed)
        possible = (at >= 0) & ~(catalog.uses[self._rows] & too_long).any(axis=1)
        if not possible.any():
            return LineChoice(number, request.model, 0.0, 0.0, 0.0)
        return _Line(
            number,
            plan.category,
            np.where(possible, quality[at], 0.0),
            np.where(possible, used.cost[at], 0.0),
            possible,
            np.where(possible, used.tokens[at], 0.0),
            catalog.most_calls[self._rows] @ floor,
            answer,
            prompt,
            request.answers,
            _beginning(request),
        )

    def _quality_of_named(self, request: InferenceRequest, plan: RoutePlan) -> Floats:
        """The expected quality of what the client named, where the router can tell it."""
        try:
            data = {**request.data, "model": AUTO}
            auto = self._planner.plan(replace(request, model=AUTO, data=data, min_quality=0.0))
        except CoeError:
            return plan.quality
        if auto.estimates is None:
            return plan.quality
        return auto.estimates.quality[plan.rows]

    def _together(
        self,
        found: list[_Line],
        unplanned: tuple[LineChoice, ...],
        engines: tuple[Floats, NDArray[np.intp], Floats],
    ) -> LineEstimates:
        experts, models = len(self._catalog.experts), len(self._models)
        load_s, weights, speeds = engines
        lines = len(found)

        def table(width: int, rows: list[Floats]) -> Floats:
            return np.array(rows) if rows else np.zeros((lines, width))

        categories: dict[str, int] = {}
        prompts = table(experts, [line.prompt_tokens for line in found])
        answers = table(experts, [line.answer_tokens for line in found])
        seconds = (speeds[0] + speeds[1] * prompts + speeds[2] * answers) / speeds[3]
        return LineEstimates(
            np.array([line.number for line in found], dtype=np.intp),
            self._models,
            self._catalog.experts,
            BatchOptions(
                table(models, [line.quality for line in found]),
                table(models, [line.cost for line in found]),
                np.array([line.possible for line in found]).reshape(lines, models).astype(bool),
                seconds,
                self._quality_model.expected_calls(self._catalog)[self._rows],
            ),
            table(models, [line.tokens for line in found]),
            load_s,
            weights,
            tuple(line.prompt for line in found),
            np.array(
                [categories.setdefault(line.category, len(categories)) for line in found], int
            ),
            unplanned,
            table(models, [line.least for line in found]),
        )

    def _engines(self) -> tuple[Floats, NDArray[np.intp], Floats]:
        """What the pools hold now.

        Returns:
            The time to load each expert on each engine, (P, E), infinite where it never holds it;
            the expert on whose weights each runs, (E,); and of each expert's quickest pool the time
            to the first token, for each prompt token, for each answer token, and the capacity,
            (4, E).
        """
        names, index = self._catalog.experts, self._catalog.index
        views = [view for view in self._views() if not view.snapshot.draining]
        rows: list[Floats] = []
        weights = np.arange(len(names))
        for view in views:
            rows += _slots(view.snapshot, index)
            for name, owner in view.snapshot.shares.items():
                if name in index and owner in index:
                    weights[index[name]] = index[owner]
        known = {name for view in views for name in view.snapshot.experts}
        for name in names:
            if name not in known and name not in self._remote:
                row = np.full(len(names), _NEVER)
                row[index[name]] = _POOL_START_S
                rows.append(row)
        load_s = np.array(rows) if rows else np.full((1, len(names)), _NEVER)
        matrix = self._table.to_matrix(views)
        speeds = np.zeros((4, len(names)))
        speeds[3] = 1.0
        if views:
            chunk = np.where(matrix.usable, matrix.chunk / matrix.capacity, _NEVER)
            best = chunk.argmin(axis=0)
            columns = np.arange(len(names))
            figures = (matrix.first, matrix.per_token, matrix.chunk, matrix.capacity)
            speeds = np.array([figure[best, columns] for figure in figures])
            speeds[3] = np.maximum(speeds[3], 1.0)
        return load_s, weights, speeds


def _slots(snapshot: Snapshot, index: dict[str, int]) -> list[Floats]:
    """For each slot of a pool the time until it can answer for each expert, (E,)."""
    slots: dict[int, Floats] = {}
    for name, state in snapshot.experts.items():
        if name not in index or state.state is Residency.FAILED:
            continue
        row = slots.setdefault(state.slot, np.full(len(index), _NEVER))
        resident = state.state is Residency.DEVICE
        row[index[name]] = 0.0 if resident else max(state.eta_s, state.swap_s, 1e-3)
    return list(slots.values())


def _beginning(request: InferenceRequest) -> str:
    """A short text for the beginning of a prompt: those of prompts that begin alike do, too.

    It has four characters for each block of the prompt, made of the block and those before. The
    prompts themselves would take gigabytes for a large batch.
    """
    data, name = request.data, TABLE[request.endpoint].prompt
    parts = [data.get(key) for key in ("tools", "system", "instructions", name) if key]
    text = orjson.dumps(parts, default=str)[:_BEGINNING]
    chain, made = 0, bytearray()
    for start in range(0, len(text), _BLOCK):
        chain = zlib.crc32(text[start : start + _BLOCK], chain)
        made += chain.to_bytes(4)
    return made.decode("latin-1")
