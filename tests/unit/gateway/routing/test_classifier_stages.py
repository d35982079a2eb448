"""The stages of the router's classifier, with a tiny encoder in its own process."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from router_models.category_fit import fit_categories, write_artifact
from router_models.labelled_prompt_reader import LabelledPrompt
from service.classifier.classifier import Classifier, TextClassifier
from service.classifier.conversation_classifier import assess_turns, deciding_turn
from service.classifier.example_classifier import (
    ExampleClassifier,
    example_texts,
    example_vectors,
    fit_head,
)
from service.classifier.linear_heads import PROBE_TEXT
from service.classifier.router_artifact import load_artifact
from service.classifier.static_embedding_table import built_in_table
from service.config import Config
from service.encoder.onnx_encoder import OnnxEncoder
from service.encoder.shared_encoders import SharedEncoders
from service.gateway.request.conversation_turns import TurnState
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.routing.routing_setup import RoutingSetup
from service.gateway.routing.session_affinity import SessionLookup
from service.gateway.routing.session_memory import SessionTurn
from service.telemetry import metric_declarations
from service.telemetry.metric_types import Side
from service.telemetry.metrics_registry import MetricsRegistry
from tests.support.tiny_encoder import SUBJECTS, make_encoder, prompts
from tests.unit.encoder.test_encoder_client import worker_pid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two encoders of one size and one of another, and an artifact for the first."""
    root = tmp_path_factory.mktemp("stages")
    make_encoder(root / "encoder")
    make_encoder(root / "other", seed=7)
    make_encoder(root / "wide", dims=20)
    rows = [LabelledPrompt(text, subject) for subject in SUBJECTS for text in prompts(subject, 20)]
    encoder = OnnxEncoder(root / "encoder")
    fitted = fit_categories(rows, built_in_table(), encoder, say=lambda _: None)
    write_artifact(fitted, root / "mine@1", [], {})
    return root


def config(router: dict[str, Any], categories: dict[str, Any] | None = None) -> Config:
    return Config.model_validate(
        {
            "experts": {
                name: {"model": "m", "categories": [name]} for name in ("general", *SUBJECTS)
            },
            "pools": {"cpu": {"engine": "simulated"}},
            "router": router,
            "categories": categories or {},
        }
    )


def ask(text: str, model: str = "auto") -> InferenceRequest:
    data = {"model": model, "messages": [{"role": "user", "content": text}]}
    return parse_request("/v1/chat/completions", orjson.dumps(data), {}, 1000)


class Running:
    """A started router, its meter and its encoders."""

    def __init__(self, config: Config) -> None:
        self.meter = MetricsRegistry(Side.GATEWAY)
        self.setup = RoutingSetup(config, metrics=self.meter)

    async def stage(self, text: str) -> str:
        return (await self.setup.planner.plan_by_all_stages(ask(text))).stage

    def encoder_count(self, outcome: str) -> float:
        return self.meter.value(metric_declarations.ROUTER_ENCODER_REQUESTS, outcome)


@asynccontextmanager
async def running(config: Config, prepared: bool = True) -> AsyncIterator[Running]:
    found = Running(config)
    await found.setup.stages.start(SharedEncoders())
    try:
        assert await found.setup.stages.wait_prepared(30) is prepared
        yield found
    finally:
        await found.setup.stages.stop()


def with_encoder(folder: Path, name: str = "encoder", **more: Any) -> dict[str, Any]:
    encoder = {
        "model": str(folder / name),
        "when_below": 1.0,
        "min_gain": 0.0,
        "timeout_ms": 1000,
        **more,
    }
    return {"artifact": str(folder / "mine@1"), "encoder": encoder}


async def test_plan_unsure_prompt_is_decided_by_the_encoder(folder: Path) -> None:
    async with running(config(with_encoder(folder))) as router:
        plan = await router.setup.planner.plan_by_all_stages(ask("sue lawyer patent"))
        assert (plan.category, plan.stage) == ("law", "encoder")
        assert router.encoder_count("ok") == 1
        assert router.meter.value(metric_declarations.ROUTER_STAGES, "encoder") == 1


async def test_plan_sure_prompt_or_named_model_asks_no_encoder(folder: Path) -> None:
    async with running(config(with_encoder(folder, when_below=0.0))) as router:
        assert await router.stage(prompts("law", 1)[0]) == "static"
        for model in ("law", "auto/law", "auto:fast/law"):
            request = ask("anything at all", model)
            assert not (await router.setup.planner.plan_by_all_stages(request)).stage
        assert router.encoder_count("ok") == 0


@pytest.mark.parametrize(
    ("apart", "asked"), [((), "needless"), (("law", "food"), "ok"), (SUBJECTS, "ok")]
)
async def test_encoder_is_asked_only_where_categories_in_doubt_have_different_experts(
    folder: Path, apart: Collection[str], asked: str
) -> None:
    experts = {"general": {"model": "m", "categories": ["general"]}}
    experts |= {name: {"model": "m", "categories": [name]} for name in apart}
    settings = Config.model_validate(
        {
            "experts": experts,
            "pools": {"cpu": {"engine": "simulated"}},
            "router": with_encoder(folder, min_gain=0.0),
        }
    )
    text = "court lasagna"
    async with running(settings) as router:
        first = router.setup.planner.plan(ask(text))
        served = await router.setup.planner.plan_by_all_stages(ask(text))
        assert router.encoder_count(asked) == 1
        assert sum(router.encoder_count(reason) for reason in ("ok", "needless")) == 1
        if asked == "needless":
            assert (served.first, served.stage) == (first.first, first.stage)
        # A bound on quality depends on the category, even where the choice does not.
        bounded = replace(ask(text), min_quality=0.3)
        await router.setup.planner.plan_by_all_stages(bounded)
        assert router.encoder_count("ok") == (2 if asked == "ok" else 1)


@pytest.mark.parametrize("own", [None, frozenset({"law", "food"})])
async def test_encoder_is_asked_who_is_recruited_of_experts_that_auto_leaves_out(
    folder: Path, own: frozenset[str] | None
) -> None:
    panel = {"kind": "recruit", "recruit": {"k": 2, "among": ["law", "food"]}}
    experts = {name: {"model": "m", "auto": False} for name in ("law", "food")}
    settings = Config.model_validate(
        {
            "experts": {"general": {"model": "m", "categories": ["general"]}, **experts},
            "pools": {"cpu": {"engine": "simulated"}},
            "router": with_encoder(folder),
            "recipes": {"panel": panel},
        }
    )
    async with running(settings) as router:
        asked = ask("sue lawyer patent", "panel")
        asked = replace(asked, tenant=replace(asked.tenant, experts=own))
        plan = await router.setup.planner.plan_by_all_stages(asked)
        assert plan.recruitable is not None
        assert router.encoder_count("ok") == 1


async def test_encoder_is_not_asked_while_a_tool_call_locks_the_expert(folder: Path) -> None:
    turn = SessionTurn("", "law", "law", "law", None, 10, 0.0, ("call",), (("law", 1.0),))
    session = SessionLookup(
        state=TurnState(open=True, calls=frozenset({"call"})), last=turn, certain=True
    )
    async with running(config(with_encoder(folder))) as router:
        request = ask("court lasagna")
        plan = await router.setup.planner.plan_by_all_stages(request, session)
        assert plan.session is not None
        assert router.encoder_count("needless") == 1
        await router.setup.planner.plan_by_all_stages(request, replace(session, certain=False))
        assert router.encoder_count("ok") == 1


@pytest.mark.parametrize("by_examples", [False, True])
def test_encoder_stage_goes_on_from_what_the_first_stages_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, by_examples: bool
) -> None:
    base = Classifier.from_artifact(load_artifact(folder / "mine@1"), built_in_table())
    encoder = OnnxEncoder(folder / "encoder")
    before: TextClassifier = base
    after: TextClassifier = base
    if by_examples:
        categories = config(
            {}, {n: {"examples": prompts(n, 6)} for n in ("law", "food")}
        ).categories
        texts = example_texts(categories)
        static = np.stack([built_in_table().embed(text) for text in texts])
        heads = [
            fit_head(example_vectors(categories, vectors))
            for vectors in (static, encoder.encode(texts))
        ]
        names = tuple(categories)
        before = ExampleClassifier(names, built_in_table(), heads[0], base=base)
        after = ExampleClassifier(names, built_in_table(), heads[0], heads[1], base)
    turns = ["court lawyer", "and the lasagna recipe?", "ok", "python loop", "zq 9", "and now?"]
    cases = []
    for end in range(1, len(turns) + 1):
        text = deciding_turn(turns[:end])
        vectors = {text: encoder.encode([text])[0]}
        cases.append((turns[:end], vectors, assess_turns(after, turns[:end], vectors)))
    firsts = [assess_turns(before, given) for given, _, _ in cases]
    monkeypatch.setattr(base, "_featurizer", None)  # whoever reads a text again fails
    for first, (given, vectors, whole) in zip(firsts, cases, strict=True):
        found = assess_turns(after, given, vectors, first.readings)
        np.testing.assert_allclose(
            found.scores.probabilities, whole.scores.probabilities, atol=1e-6
        )
        assert (found.scores.category, found.scores.stage) == (
            whole.scores.category,
            whole.scores.stage,
        )
        assert found.scores.novelty == pytest.approx(whole.scores.novelty)


async def test_prompt_that_all_stages_are_unsure_of_is_general(folder: Path) -> None:
    router = config(with_encoder(folder))
    setup = RoutingSetup(router)
    plan = setup.planner.plan(ask("zzzz qqqq 9999 xxxx"))
    assert (plan.category, plan.stage) == ("general", "general")


@pytest.mark.parametrize(
    ("name", "said"),
    [("other", "another one than"), ("wide", "20 numbers"), ("nowhere", "is not there")],
)
async def test_unfit_encoder_leaves_the_first_stage_says_so_once_and_counts(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, said: str
) -> None:
    async with running(config(with_encoder(folder, name)), prepared=False) as router:
        for i in range(3):
            assert await router.stage(f"lawyer court {i}") in ("static", "general")
        outcome = "missing" if name == "nowhere" else "mismatch"
        assert router.encoder_count(outcome) == 3
    assert caplog.text.count(said) == 1


async def test_hung_encoder_delays_no_request_beyond_its_limit(folder: Path) -> None:
    async with running(config(with_encoder(folder, timeout_ms=50))) as router:
        os.kill(worker_pid(), signal.SIGSTOP)
        for i in range(7):
            began_s = time.monotonic()
            await router.stage(f"lawyer court {i}")
            # The limit is 50 ms; the rest is for a busy machine. The encoder would never answer.
            assert time.monotonic() - began_s < 20
        assert router.encoder_count("slow") == 5
        assert router.encoder_count("paused") == 2


async def test_crashed_encoder_leaves_the_first_stage_and_comes_back(folder: Path) -> None:
    async with running(config(with_encoder(folder))) as router:
        os.kill(worker_pid(), signal.SIGKILL)
        new = iter(prompts("law", 2000, seed=9))
        async with asyncio.timeout(120):
            while not router.encoder_count("failed"):
                await router.stage(next(new))
            while not router.encoder_count("ok"):
                await router.stage(next(new))
                await asyncio.sleep(0.05)


async def test_each_stage_can_be_left_out(folder: Path) -> None:
    artifact = {"artifact": str(folder / "mine@1")}
    for router, stage in (
        ({**artifact, "static": False}, "ngrams"),
        (artifact, "static"),
    ):
        setup = RoutingSetup(config(router))
        assert setup.planner.plan(ask(prompts("law", 1)[0])).stage == stage
    async with running(config({**with_encoder(folder), "static": False})) as running_router:
        assert await running_router.stage("lawyer court") == "encoder"


async def test_categories_with_examples_need_no_artifact_and_learn_by_the_encoder(
    folder: Path,
) -> None:
    categories = {
        name: {"examples": prompts(name, 6), "description": SUBJECTS[name][:30]}
        for name in ("law", "food")
    }
    router = {"encoder": with_encoder(folder)["encoder"]}
    async with running(config(router, categories)) as running_router:
        plan = await running_router.setup.planner.plan_by_all_stages(ask("sue a lawyer patent"))
        assert (plan.category, plan.stage) == ("law", "encoder")
    setup = RoutingSetup(config({}, categories))
    assert setup.stages.labels == ("general", "law", "food")
    assert setup.planner.plan(ask("garlic soup and noodles for dinner")).stage == "static"


async def test_categories_with_examples_stand_beside_the_artifact(folder: Path) -> None:
    categories = {
        "travel": {
            "examples": [
                "book a flight",
                "cheap hotel in rome",
                "train to paris",
                "visa for china",
            ],
            "expert": "food",
            "description": "Travel: flights, hotels, trains, visas and trips.",
        }
    }
    setup = RoutingSetup(config({"artifact": str(folder / "mine@1")}, categories))
    assert setup.stages.labels[-1] == "travel"
    assert setup.planner.plan(ask("find me a hotel and a flight")).category == "travel"
    assert setup.planner.plan(ask(prompts("law", 1)[0])).category == "law"


def test_artifact_keeps_the_vector_of_the_probe(folder: Path) -> None:
    artifact = load_artifact(folder / "mine@1")
    probe = OnnxEncoder(folder / "encoder").encode([PROBE_TEXT])[0]
    np.testing.assert_allclose(artifact.tensor("encoder.probe", probe.shape), probe, atol=1e-5)


def test_artifact_with_a_head_of_another_shape_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "mine@1"
    shutil.copytree(folder / "mine@1", copy)
    manifest = orjson.loads((copy / "manifest.json").read_bytes())
    manifest["classifier"]["encoder"]["dims"] = 13
    (copy / "manifest.json").write_bytes(orjson.dumps(manifest))
    with pytest.raises(Exception, match=r"has shape \[12.*asks for \[13"):
        RoutingSetup(config({"artifact": str(copy)}))
