"""Simulates agents in tool loops, turn by turn and with sessions, on a virtual clock.

Everything that decides is the service's own: the parsing of the three APIs, the classifier by
examples, the router, the selection, the prefix affinity and the sessions with the reading of
replies. Agents, tools and engines are modelled. An engine takes `CAPACITY` requests at once, first
come first served, and reads only what its prefix cache does not hold.

Prompts are the held-out ones, so that the classifier errs as it does on other people's. The quality
of an answer is the expert's on the prompt's true category. Both arms get the same conversations.
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from loadtests.lib.median_intervals import Estimate
from loadtests.lib.targets_and_report import Report, Table, TargetCheck, at_least
from router_models.general.held_out_prompts import held_out_prompts
from router_models.general.training_prompt_reader import read_training_prompts
from service.broker.pool_state import PoolStateTable, PoolView
from service.broker.selection import select
from service.config import Config
from service.default_prices import with_default_prices
from service.gateway.request.parsing import parse_request
from service.gateway.request_record import RequestRecord
from service.gateway.routing.candidate_planner import selection_request
from service.gateway.routing.prefix_affinity import PrefixAffinity
from service.gateway.routing.routing_setup import RoutingSetup
from service.gateway.routing.session_affinity import SessionService
from service.gateway.routing.session_memory import SessionMemory
from service.rpc.snapshot import ExpertState, Queue, Snapshot, Speed
from service.store.volatile_store import MemoryVolatileStore
from service.types import Residency, Tenant

TURNS = 20_000
FEWER_SWITCHES = 0.79
# Agents at once: engines with room, and with queues.
AGENTS = (24, 60)
CAPACITY = 4
SPEED = Speed(first_s=0.05, chunk_s=0.02, per_token_s=0.0004)

# Experts: their home categories, quality at home and elsewhere, and billions of parameters.
EXPERTS: dict[str, tuple[tuple[str, ...], float, float, float]] = {
    "general": (("general", "small-talk", "everyday-advice", "safety"), 0.74, 0.70, 8),
    "coder": (("coding", "shell-sql", "computer-science", "tool-use"), 0.86, 0.58, 8),
    "maths": (
        ("math-word-problems", "symbolic-math", "logic-puzzles", "engineering", "natural-sciences"),
        0.85,
        0.58,
        8,
    ),
    "writer": (
        ("writing", "editing", "translation", "summarising", "roleplay", "extraction", "commands"),
        0.82,
        0.62,
        8,
    ),
    "scholar": (
        ("law", "medicine", "history", "philosophy", "psychology", "business", "facts"),
        0.84,
        0.62,
        8,
    ),
    "large": ((), 0.80, 0.80, 32),
}
_EXAMPLES = 10
_CALL_TEXT = "x" * 800


def site() -> Config:
    """Six experts, and categories by ten examples each."""
    examples: dict[str, list[str]] = {}
    for row in read_training_prompts():
        if row.lang == "en" and len(examples.setdefault(row.category, [])) < _EXAMPLES:
            examples[row.category].append(row.prompt)
    experts = {}
    for name, (home, at_home, elsewhere, size) in EXPERTS.items():
        quality = {c: at_home if c in home else elsewhere for c in (*examples, "general")}
        price = {"prompt": size, "completion": size}
        experts[name] = {"model": "m", "quality": quality, "price": price, "categories": home}
    return with_default_prices(
        Config.model_validate(
            {
                "experts": experts,
                "categories": {c: {"examples": texts} for c, texts in examples.items()},
                "pools": {"a": {"engine": "simulated"}},
            }
        )
    )


@dataclass(frozen=True, slots=True)
class Step:
    """One request of an agent.

    Attributes:
        prompt: The user's prompt; None for a tool's result.
        category: The true category of the matter.
        pause_s: Time before it: the tool's, or the user's.
        tokens: Tokens of the answer.
        calls: Whether the answer calls a tool.
    """

    prompt: str | None
    category: str
    pause_s: float
    tokens: int
    calls: bool


@dataclass(frozen=True, slots=True)
class Script:
    """One conversation: its API, the fields that name its session, and its steps."""

    number: int
    path: str
    named: dict[str, str]
    header: str | None
    steps: tuple[Step, ...]


PATHS = ("/v1/chat/completions", "/v1/messages", "/v1/responses")


def scripts(turns: int, seed: int) -> list[Script]:
    """Conversations with at least so many turns together."""
    draw = random.Random(seed)
    prompts: dict[str, list[str]] = {}
    for row in held_out_prompts():
        if row.language == "en" and any(row.category in home for home, *_ in EXPERTS.values()):
            prompts.setdefault(row.category, []).append(row.prompt)
    categories = sorted(prompts)
    made: list[Script] = []
    left = turns
    while left > 0:
        number = len(made)
        category = draw.choice(categories)
        steps: list[Step] = []
        for asked in range(draw.randint(1, 6)):
            if asked and draw.random() < 0.2:
                category = draw.choice(categories)
            prompt = draw.choice(prompts[category])
            if not asked and draw.random() < 0.1:
                # Several conversations begin in the same words.
                prompt = "Hello! I need your help with something."
            loop = min(int(draw.expovariate(0.25)), 15)
            for at in range(loop + 1):
                pause_s = draw.expovariate(1 / 2) if at else draw.expovariate(1 / 20)
                tokens = int(draw.uniform(40, 200))
                steps.append(
                    Step(prompt if at == 0 else None, category, pause_s, tokens, at < loop)
                )
        # Half of the names are those of two conversations: agents that work for one another.
        name = f"agent-{number // 2 if number % 4 < 2 else number}"
        how = number % 3
        path = PATHS[number // 3 % 3]
        named = {"prompt_cache_key": name} if how == 1 else {}
        made.append(Script(number, path, named, name if how == 0 else None, tuple(steps)))
        left -= len(steps)
    return made


class Conversation:
    """One conversation as its client sees it."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.at = 0
        self.items: list[dict[str, Any]] = []
        self.experts: list[str] = []
        # Quality that the turns' costs are worth by the preset.
        self.price = 0.0
        self._call = ""

    @property
    def step(self) -> Step:
        return self.script.steps[self.at]

    def body(self) -> bytes:
        """Add the next step's message, and return the request's body."""
        prompt, call = self.step.prompt, self._call
        if prompt is not None:
            self.items.append({"role": "user", "content": prompt})
        elif self.script.path == PATHS[0]:
            self.items.append({"role": "tool", "tool_call_id": call, "content": _CALL_TEXT})
        elif self.script.path == PATHS[1]:
            block = {"type": "tool_result", "tool_use_id": call, "content": _CALL_TEXT}
            self.items.append({"role": "user", "content": [block]})
        else:
            output = {"type": "function_call_output", "call_id": call, "output": _CALL_TEXT}
            self.items.append(output)
        field_name = "input" if self.script.path == PATHS[2] else "messages"
        common = {"model": "auto", "max_tokens": 256, **self.script.named}
        return orjson.dumps({**common, field_name: self.items})

    def reply(self) -> dict[str, Any]:
        """Add the model's answer to the conversation, and return the reply that held it."""
        path, text = self.script.path, "y" * 4 * self.step.tokens
        call = f"call_{self.script.number}_{self.at}" if self.step.calls else None
        self._call = call or ""
        if path == PATHS[0]:
            message: dict[str, Any] = {"role": "assistant", "content": text}
            if call is not None:
                message["tool_calls"] = [{"id": call, "type": "function", "function": {}}]
            self.items.append(message)
            return {"choices": [{"message": message}]}
        if path == PATHS[1]:
            content: list[dict[str, Any]] = [{"type": "text", "text": text}]
            if call is not None:
                content.append({"type": "tool_use", "id": call, "name": "f", "input": {}})
            self.items.append({"role": "assistant", "content": content})
            return {"type": "message", "role": "assistant", "content": content}
        output: list[dict[str, Any]] = [{"role": "assistant", "type": "message", "content": text}]
        if call is not None:
            output.append({"type": "function_call", "call_id": call, "name": "f"})
        self.items += output
        return {"object": "response", "output": output}


@dataclass(slots=True)
class Engine:
    """One expert's engine: so many requests at once, the others in line."""

    running: int = 0
    line: deque[tuple[float, Conversation]] = field(default_factory=deque)
    cached: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class ArmResult:
    """What came of one arm.

    Attributes:
        quality: For each conversation the mean quality of its turns, by number.
        net: The same less what the turns cost, at the preset's price.
        turns: For each conversation its turns, by number.
        switches: Turns that went to another expert than the turn before.
        unsafe: Tool results among them.
        waits_s: Times in line.
        cost: Expected cost of all turns.
        decisions: Decisions of the sessions.
    """

    quality: dict[int, float] = field(default_factory=dict)
    net: dict[int, float] = field(default_factory=dict)
    turns: dict[int, int] = field(default_factory=dict)
    switches: int = 0
    unsafe: int = 0
    waits_s: list[float] = field(default_factory=list)
    cost: float = 0.0
    decisions: dict[str, int] = field(default_factory=dict)


class Arm:
    """One run over all conversations, with or without sessions."""

    def __init__(self, config: Config, *, enabled: bool) -> None:
        self._now_s = 1.7e9
        self._events: list[tuple[float, int, str, Conversation, str]] = []
        self._count = 0
        routing = RoutingSetup(config)
        self._planner, self._catalog = routing.planner, routing.catalog
        self._cost_model = routing.cost_model
        self._table = PoolStateTable(self._catalog.index)
        self._affinity = PrefixAffinity()
        settings = config.router.sessions.model_copy(update={"enabled": enabled})
        store = MemoryVolatileStore(1)
        self._sessions = SessionService(
            settings, SessionMemory(), store, shared=False, clock=lambda: self._now_s
        )
        self._engines = {name: Engine() for name in self._catalog.experts}
        self.result = ArmResult()

    async def run(self, conversations: Sequence[Script], agents: int) -> ArmResult:
        """Let so many agents hold the conversations, each one after another."""
        waiting = deque(Conversation(script) for script in conversations)

        def begin() -> None:
            if waiting:
                self._later(waiting[0].step.pause_s, "ask", waiting.popleft())

        for _ in range(agents):
            begin()
        while self._events:
            self._now_s, _, kind, conversation, expert = heapq.heappop(self._events)
            if kind == "ask":
                await self._ask(conversation)
            elif self._ended(conversation, expert):
                begin()
        return self.result

    def _later(self, after_s: float, kind: str, about: Conversation, expert: str = "") -> None:
        self._count += 1
        event = (self._now_s + after_s, self._count, kind, about, expert)
        heapq.heappush(self._events, event)

    def _views(self) -> Iterator[PoolView]:
        for name, engine in self._engines.items():
            snapshot = Snapshot(
                boot=name,
                kind="gpu",
                experts={name: ExpertState(Residency.DEVICE)},
                queues={name: Queue(len(engine.line), engine.running)},
                capacity={name: CAPACITY},
                speeds={name: SPEED},
            )
            yield PoolView(name, snapshot, 0.0, {})

    async def _ask(self, conversation: Conversation) -> None:
        script, step, result = conversation.script, conversation.step, self.result
        headers = {} if script.header is None else {b"x-session-id": script.header.encode()}
        request = parse_request(script.path, conversation.body(), headers, 120_000, Tenant("t"))
        session = await self._sessions.find(request)
        plan = self._planner.plan(request, session=session)
        wanted = selection_request(
            self._cost_model, request, plan, prefix_cache=self._affinity.hint(request)
        )
        selection = select(self._catalog, self._table.to_matrix(list(self._views())), wanted)
        best = selection.best_position()
        assert best is not None
        expert = self._catalog.recipes[int(plan.rows[best])].members[0]
        if (outcome := selection.session_outcome(best)) is not None:
            decision = outcome.decision.value
            result.decisions[decision] = result.decisions.get(decision, 0) + 1
        if conversation.experts and conversation.experts[-1] != expert:
            result.switches += 1
            result.unsafe += step.prompt is None
        conversation.experts.append(expert)
        result.cost += float(selection.cost[best])
        conversation.price += wanted.cost_price * float(selection.cost[best])
        self._affinity.record_answer(request, expert, expert)
        record = RequestRecord(
            expert=expert, recipe=expert, pool=expert, category=plan.category, topics=plan.topics
        )
        watched = self._sessions.watch(session, record, _drop)
        await watched({"type": "http.response.start", "status": 200, "headers": []})
        await watched({"type": "http.response.body", "body": orjson.dumps(conversation.reply())})
        engine = self._engines[expert]
        engine.line.append((self._now_s, conversation))
        self._advance(expert, request.prompt_tokens)

    def _advance(self, expert: str, prompt_tokens: int) -> None:
        engine = self._engines[expert]
        while engine.line and engine.running < CAPACITY:
            since_s, conversation = engine.line.popleft()
            self.result.waits_s.append(self._now_s - since_s)
            engine.running += 1
            number = conversation.script.number
            fresh = max(0, prompt_tokens - engine.cached.get(number, 0))
            engine.cached[number] = prompt_tokens
            work_s = SPEED.first_s + SPEED.per_token_s * fresh
            work_s += SPEED.chunk_s * conversation.step.tokens
            self._later(work_s, "end", conversation, expert)

    def _ended(self, conversation: Conversation, expert: str) -> bool:
        """Go on with a conversation; whether it was its last turn."""
        self._engines[expert].running -= 1
        self._advance(expert, len(conversation.items) * 200)
        conversation.at += 1
        script = conversation.script
        if conversation.at < len(script.steps):
            self._later(conversation.step.pause_s, "ask", conversation)
            return False
        qualities = [
            _quality(name, step.category)
            for name, step in zip(conversation.experts, script.steps, strict=True)
        ]
        self.result.quality[script.number] = float(np.mean(qualities))
        self.result.turns[script.number] = len(qualities)
        self.result.net[script.number] = (sum(qualities) - conversation.price) / len(qualities)
        return True


async def _drop(message: Any) -> None:
    """Take a reply, as a client would."""


def _quality(expert: str, category: str) -> float:
    home, at_home, elsewhere, _ = EXPERTS[expert]
    return at_home if category in home else elsewhere


def mean_difference(
    ours: Mapping[int, float], other: Mapping[int, float], turns_of: Mapping[int, int]
) -> Estimate:
    """The difference of the means over all turns, with an interval over conversations.

    Args:
        ours: The mean of each conversation, by number.
        other: The same in the other arm.
        turns_of: The number of turns of each conversation.
    """
    numbers = sorted(ours)
    turns = np.array([turns_of[number] for number in numbers], dtype=np.float64)
    gains = np.array([ours[number] - other[number] for number in numbers])
    picks = np.random.default_rng(1).integers(0, len(numbers), (4000, len(numbers)))
    sampled = (gains * turns)[picks].sum(axis=1) / turns[picks].sum(axis=1)
    low, high = np.percentile(sampled, [2.5, 97.5])
    return Estimate(float((gains * turns).sum() / turns.sum()), float(low), float(high))


def _mean(result: ArmResult) -> float:
    turns = sum(result.turns.values())
    return sum(result.quality[number] * n for number, n in result.turns.items()) / turns


def measure(report: Report, turns: int = TURNS, loads: Sequence[int] = AGENTS) -> None:
    """Simulate both arms at each load.

    Raises:
        HeldOutError: The held-out prompts are missing; the sources have them, wheels do not.
    """
    config, conversations = site(), scripts(turns, seed=1)
    played = sum(len(script.steps) for script in conversations)
    table = Table(
        f"{played:,} turns of {len(conversations):,} conversations in tool loops, six experts",
        (
            "agents",
            "choice",
            "switches",
            "unsafe",
            "quality",
            "cost",
            "mean wait s",
            "95 % of waits s",
        ),
    )
    report.tables.append(table)
    report.facts["sessions"] = facts = []
    for agents in loads:
        arms = {
            name: asyncio.run(Arm(config, enabled=enabled).run(conversations, agents))
            for name, enabled in (("turn by turn", False), ("sessions", True))
        }
        for name, result in arms.items():
            waits = np.array(result.waits_s)
            table.rows.append(
                (
                    str(agents),
                    name,
                    f"{result.switches:,}",
                    f"{result.unsafe:,}",
                    f"{_mean(result):.4f}",
                    f"{result.cost / arms['turn by turn'].cost:.3f}",
                    f"{waits.mean():.2f}",
                    f"{np.percentile(waits, 95):.2f}",
                )
            )
        free, held = arms["turn by turn"], arms["sessions"]
        fewer = 1 - held.switches / free.switches
        plain = mean_difference(held.quality, free.quality, held.turns)
        gain = mean_difference(held.net, free.net, held.turns)
        report.notes.append(
            f"{agents} agents: {100 * fewer:.1f} % fewer switches; difference of quality "
            f"{plain.text(4)}, less its cost {gain.text(4)}; "
            f"decisions {', '.join(f'{k} {v:,}' for k, v in sorted(held.decisions.items()))}"
        )
        report.reach += [
            TargetCheck(f"unsafe switches, {agents} agents", 0, held.unsafe, held.unsafe == 0),
            TargetCheck(
                f"share of switches saved, {agents} agents, at least",
                FEWER_SWITCHES,
                round(fewer, 4),
                fewer >= FEWER_SWITCHES,
            ),
            at_least(f"gain in quality, {agents} agents", 0.0, plain, interval=True),
        ]
        facts.append(
            {
                "agents": agents,
                "turns": played,
                "fewer_switches": fewer,
                "gain": plain.as_json(),
                "net_gain": gain.as_json(),
                "cost_ratio": held.cost / free.cost,
                "unsafe": held.unsafe,
                "unsafe_turn_by_turn": free.unsafe,
                "switches": held.switches,
                "switches_turn_by_turn": free.switches,
            }
        )
