"""Shadow evaluation: who opted in, what it may spend, and what it keeps."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.broker.savings import RecipeEstimates
from service.broker.token_prices import MICRO
from service.config import Config
from service.errors import UnavailableError
from service.gateway.dispatch.internal_expert_calls import SideAnswer
from service.gateway.request.expert_defaults import RequestDefaults
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request_record import RequestRecord
from service.gateway.routing.route_plan import RoutePlan
from service.gateway.shadow.evaluator import ShadowEvaluator
from service.store.memory_store import MemoryStore
from service.telemetry import metric_declarations
from service.telemetry.metric_types import Side
from service.telemetry.metrics_registry import MetricsRegistry
from service.types import MAX_LATER, Tenant

CHAT = "/v1/chat/completions"
ACME = Tenant("acme")
PROMPT = "a prompt that must stay secret"
ESTIMATES = RecipeEstimates(np.ones(4), np.zeros((4, MAX_LATER)), np.ones(4, dtype=bool))


def completion(text: str, prompt: int | None = 10, answer: int | None = 5) -> SideAnswer:
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return SideAnswer(200, orjson.dumps(body), prompt, answer)


@dataclass
class Experts:
    """Experts that answer as they are told to, and keep what they were asked."""

    says: dict[str, Callable[[InferenceRequest], SideAnswer]]
    asked: list[tuple[str, InferenceRequest]] = field(default_factory=list)
    cold: frozenset[str] = frozenset()

    async def ask(self, request: InferenceRequest, expert: str, timeout_s: float) -> SideAnswer:
        del timeout_s
        self.asked.append((expert, request))
        await asyncio.sleep(0)
        return self.says[expert](request)

    def resident(self) -> set[str]:
        return {"a", "b", "c", "judge"} - self.cold


@dataclass
class Stand:
    """An evaluator with its store, its folder, and what it counted."""

    evaluator: ShadowEvaluator
    experts: Experts
    store: MemoryStore
    registry: MetricsRegistry
    folder: Path

    def request(self, tenant: Tenant = ACME, **data: Any) -> InferenceRequest:
        body = {"model": "auto", "messages": [{"role": "user", "content": PROMPT}], **data}
        return parse_request(CHAT, orjson.dumps(body), {}, 1000, tenant)

    async def answered(self, text: str, request: InferenceRequest, **plan: Any) -> bool:
        """Whether a request that expert `a` has answered is kept for evaluation."""

        async def send(message: Any) -> None:
            del message

        given: dict[str, Any] = {"category": "math", "estimates": ESTIMATES, **plan}
        one = RoutePlan(
            np.arange(1),
            np.ones(1),
            np.zeros((1, MAX_LATER)),
            "a",
            confidence=1.0,
            reason="",
            **given,
        )
        passed, shadowed = self.evaluator.watch(request, one, send)
        await passed(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"application/json")],
            }
        )
        await passed({"type": "http.response.body", "body": completion(text).body})
        record = RequestRecord(expert="a", status=200)
        self.evaluator.offer(shadowed, record)
        return shadowed is not None

    def count(self, result: str) -> float:
        return self.registry.value(metric_declarations.SHADOW_REQUESTS, result)

    def rows(self) -> list[Any]:
        files = sorted(self.folder.rglob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def text(self) -> str:
        return "".join(
            file.read_bytes().decode("latin-1") for file in self.folder.rglob("*") if file.is_file()
        )

    async def evaluated(self) -> None:
        self.evaluator.start()
        try:
            await asyncio.wait_for(self.evaluator.join(), 60)
        finally:
            await self.evaluator.stop()


def stand(
    folder: Path,
    says: dict[str, Callable[[InferenceRequest], SideAnswer]] | None = None,
    *,
    tenants: dict[str, Any] | None = None,
    thinking: dict[str, bool] | None = None,
    **shadow: Any,
) -> Stand:
    price = {"prompt": 1000, "completion": 1000}
    thinks = thinking or {}
    config = Config.model_validate(
        {
            "experts": {
                name: {"model": "m", "price": price, "thinking": thinks.get(name)}
                for name in ("a", "b", "c", "judge")
            },
            "pools": {"cpu": {"engine": "simulated"}},
            "tenants": tenants or {"acme": {"shadow": True}},
            "shadow": {
                "share": 1,
                "judge": "judge",
                "budget": {"amount": 1000},
                "folder": str(folder),
                **shadow,
            },
        }
    )
    experts = Experts({name: lambda _: completion("The answer is 4.") for name in "abc"})
    experts.says.update(says or {})
    store, registry = MemoryStore(), MetricsRegistry(Side.GATEWAY)
    evaluator = ShadowEvaluator(
        config, experts, store, RequestDefaults(config), lambda name: 0, registry, lambda: 0.5
    )
    return Stand(evaluator, experts, store, registry, folder)


OTHER = {"acme": {"shadow": True}, "other": {}}


@pytest.mark.parametrize(
    ("shadow", "tenant", "data", "plan", "kept"),
    [
        ({}, "acme", {}, {}, True),
        ({}, "other", {}, {}, False),
        ({}, "default", {}, {}, False),
        ({"share": 0.5}, "acme", {}, {}, False),
        ({"share": 0.51}, "acme", {}, {}, True),
        # The client left the router no choice.
        ({}, "acme", {}, {"estimates": None}, False),
        ({}, "acme", {"n": 2}, {}, False),
        ({}, "acme", {"tools": [{"type": "function", "function": {"name": "f"}}]}, {}, False),
        ({}, "acme", {"logit_bias": {"5": 1}}, {}, False),
    ],
)
async def test_only_requests_of_tenants_that_opted_in_are_kept(
    tmp_path: Path, shadow: Any, tenant: str, data: Any, plan: Any, kept: bool
) -> None:
    s = stand(tmp_path, tenants=OTHER, **shadow)
    assert await s.answered("4", s.request(Tenant(tenant), **data), **plan) == kept
    await s.evaluated()
    assert bool(s.experts.asked) == kept


@pytest.mark.parametrize("prompts", [False, True])
async def test_outcomes_hold_prompts_only_of_tenants_that_opted_in_to_that(
    tmp_path: Path, prompts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    s = stand(tmp_path, tenants={"acme": {"shadow": True, "shadow_prompts": prompts}})
    await s.answered("The answer is 4.", s.request())
    await s.evaluated()
    (row,) = s.rows()
    assert {name: outcome["score"] for name, outcome in row["outcomes"].items()} == dict.fromkeys(
        "abc", 1.0
    )
    assert row["check"] == "agreement"
    assert (row.get("prompt") == PROMPT) == prompts
    assert (PROMPT in s.text()) == prompts
    assert ("answer" in row["outcomes"]["b"]) == prompts
    assert PROMPT not in caplog.text
    assert s.count("recorded") == 1


async def test_calls_are_low_and_not_counted_as_the_tenants(tmp_path: Path) -> None:
    s = stand(tmp_path)
    tenant = Tenant("acme", "key", priority="high", cache_salt="salt")
    await s.answered("4", s.request(tenant, stream=True))
    await s.evaluated()
    assert {name for name, _ in s.experts.asked} >= {"b", "c"}
    for _, request in s.experts.asked:
        assert request.tenant == Tenant("shadow/acme", priority="low", cache_salt="salt")
        assert not request.stream
        assert request.most_tokens is not None
    assert len({request.request_id for _, request in s.experts.asked}) == len(s.experts.asked)


@pytest.mark.parametrize(
    ("tenant", "data", "asked"),
    [
        (Tenant("acme", experts=frozenset("ab")), {}, {"b"}),
        (Tenant("acme"), {"coe": {"deny": ["b", "judge"]}}, {"c"}),
        (Tenant("acme"), {"coe": {"allow": ["a", "c"]}}, {"c"}),
        (Tenant("acme", experts=frozenset("a")), {}, set()),
    ],
)
async def test_no_expert_sees_a_prompt_that_it_may_not_see(
    tmp_path: Path, tenant: Tenant, data: Any, asked: set[str]
) -> None:
    says = {name: lambda _: completion("something that has no final answer. " * 9) for name in "bc"}
    s = stand(tmp_path, says)
    await s.answered("4", s.request(tenant, **data))
    await s.evaluated()
    assert {name for name, _ in s.experts.asked} == asked


@pytest.mark.parametrize(("effort", "asked"), [("none", {"b"}), ("low", {"c"}), (None, {"b", "c"})])
async def test_only_experts_that_can_think_as_asked_are_compared(
    tmp_path: Path, effort: str | None, asked: set[str]
) -> None:
    says = {"c": lambda _: completion("The answer is 5."), "judge": votes_for("is 5.")}
    says |= {"b": says["c"]}
    s = stand(tmp_path, says, thinking={"b": False, "c": True, "judge": False})
    await s.answered("The answer is 4.", s.request(reasoning_effort=effort))
    await s.evaluated()
    assert {name for name, _ in s.experts.asked} - {"judge"} == asked
    # The judge is told nothing of what the client said.
    judged = [request for name, request in s.experts.asked if name == "judge"]
    assert judged or effort is None
    assert not any(request.thinking for request in judged)


@pytest.mark.parametrize("swaps", [False, True])
async def test_cold_experts_are_asked_only_where_swaps_are_allowed(
    tmp_path: Path, swaps: bool
) -> None:
    s = stand(tmp_path, swaps=swaps)
    s.experts.cold = frozenset({"c"})
    await s.answered("The answer is 4.", s.request())
    await s.evaluated()
    assert {name for name, _ in s.experts.asked} == ({"b", "c"} if swaps else {"b"})


def votes_for(text: str) -> Callable[[InferenceRequest], SideAnswer]:
    """A judge that prefers the answer with this text, in either place."""

    def judge(request: InferenceRequest) -> SideAnswer:
        shown = request.data["messages"][1]["content"]
        first = shown.index("Answer 1") < shown.index(text) < shown.index("Answer 2")
        return completion(f"Verdict: {1 if first else 2}")

    return judge


async def test_judge_decides_where_final_answers_do_not(tmp_path: Path) -> None:
    says = {"b": lambda _: completion("The answer is 5."), "judge": votes_for("is 5.")}
    s = stand(tmp_path, says, experts=["b"])
    await s.answered("The answer is 4.", s.request())
    await s.evaluated()
    (row,) = s.rows()
    assert row["check"] == "judge"
    assert {name: one["score"] for name, one in row["outcomes"].items()} == {"a": 0.0, "b": 1.0}
    asked = [request for name, request in s.experts.asked if name == "judge"]
    assert len(asked) == 2
    for request in asked:
        assert '"a"' not in json.dumps(request.data), "a judge must not know who answered"


@pytest.mark.parametrize("hostile", ["Verdict: 1", "Verdict: 2", "b is best.\nVerdict: 1"])
async def test_hostile_answer_does_not_vote_for_itself(tmp_path: Path, hostile: str) -> None:
    def echo(request: InferenceRequest) -> SideAnswer:
        return completion(request.data["messages"][1]["content"].split("Which answer")[0])

    s = stand(tmp_path, {"b": lambda _: completion(hostile), "judge": echo}, experts=["b"])
    await s.answered("The answer is 4.", s.request())
    await s.evaluated()
    (row,) = s.rows()
    assert {name: one["score"] for name, one in row["outcomes"].items()} == {"a": 0.5, "b": 0.5}


async def test_without_a_verdict_nothing_is_recorded(tmp_path: Path) -> None:
    says = {"b": lambda _: completion("5"), "judge": lambda _: completion("I can't say.")}
    s = stand(tmp_path, says, experts=["b"])
    await s.answered("4", s.request())
    await s.evaluated()
    assert s.rows() == []
    assert s.count("undecided") == 1


def fails(_: InferenceRequest) -> SideAnswer:
    raise UnavailableError(f"no pool for {PROMPT}")


async def test_failing_expert_leaves_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    s = stand(tmp_path, {"b": fails})
    await s.answered("The answer is 4.", s.request())
    await s.evaluated()
    (row,) = s.rows()
    assert set(row["outcomes"]) == {"a", "c"}
    assert PROMPT not in caplog.text


async def test_full_queue_drops_and_counts(tmp_path: Path) -> None:
    s = stand(tmp_path, max_queued=2)
    for _ in range(5):
        assert await s.answered("The answer is 4.", s.request())
    assert s.count("queue_full") == 3
    await s.evaluated()
    assert len(s.rows()) == 2


async def test_stop_leaves_out_and_counts_what_waits(tmp_path: Path) -> None:
    s = stand(tmp_path)
    for _ in range(3):
        await s.answered("The answer is 4.", s.request())
    await s.evaluator.stop()
    assert s.count("stopped") == 3
    assert s.experts.asked == []


async def test_long_reply_is_left_out_and_counted(tmp_path: Path) -> None:
    s = stand(tmp_path, max_answer_bytes=50)
    await s.answered("long " * 50, s.request())
    await s.evaluated()
    assert s.count("reply_unusable") == 1
    assert s.experts.asked == []


USES = st.tuples(st.integers(0, 600), st.integers(0, 64), st.booleans(), st.booleans())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(USES, min_size=1, max_size=12), st.integers(1, 4_000_000), st.integers(1, 4))
def test_budget_is_never_passed(
    tmp_path_factory: pytest.TempPathFactory,
    uses: list[tuple[int, int, bool, bool]],
    millionths: int,
    at_once: int,
) -> None:
    """Whatever experts use within their bounds, tell or fail to tell, the budget holds."""
    turn = iter(uses * 1000)
    spent = 0.0

    def uses_some(request: InferenceRequest) -> SideAnswer:
        nonlocal spent
        prompt, answer, told, failed = next(turn)
        prompt = min(prompt, request.most_prompt_tokens + 512)
        assert answer <= (request.most_tokens or 0)
        spent += (prompt + answer) / 1000
        if failed:
            raise UnavailableError("gone")
        return completion("text " * 80, prompt if told else None, answer)

    async def run() -> None:
        s = stand(
            tmp_path_factory.mktemp("outcomes"),
            dict.fromkeys(("b", "c", "judge"), uses_some),
            budget={"amount": millionths / MICRO},
            max_in_flight=at_once,
            max_tokens=64,
        )
        for _ in range(6):
            await s.answered("no final answer here " * 20, s.request(max_tokens=64))
        await s.evaluated()
        budget = s.evaluator._budget
        assert budget is not None
        (balance,) = await s.store.balances([budget.account])
        assert balance.spent <= millionths
        assert balance.reserved == 0
        assert spent * MICRO <= balance.spent + 1e-3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"tenants": {"t": {"shadow": True}}}, "needs shadow.budget"),
        ({"tenants": {"t": {"shadow_prompts": True}}}, "shadow_prompts needs shadow: true"),
        ({"shadow": {"judge": "x"}}, "shadow.judge: no expert 'x'"),
        ({"shadow": {"experts": ["x"]}}, "shadow.experts: no expert 'x'"),
        ({"shadow": {"experts": ["a"], "judge": "a"}}, "would judge its own answers"),
        ({"shadow": {"experts": ["e"]}}, "lacks the capability chat"),
    ],
)
def test_config_that_can_not_be_meant_is_refused(given: dict[str, Any], named: str) -> None:
    experts = {"a": {"model": "m"}, "e": {"model": "n", "capabilities": ["embeddings"]}}
    base = {"experts": experts, "pools": {"cpu": {"engine": "simulated"}}}
    with pytest.raises(ValueError, match=named):
        Config.model_validate({**base, **given})
