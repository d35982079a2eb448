"""`/v1/models` and `/openapi.json`."""

from __future__ import annotations

from service.broker.pool_state import PoolView
from service.config import Config, ResponsesConfig
from service.gateway.openapi import describe
from service.gateway.routes import models
from service.http.prompt_endpoints import ENDPOINTS, OLLAMA_ENDPOINTS
from service.rpc.snapshot import ExpertState, Snapshot
from service.types import Residency

CONFIG = Config.model_validate(
    {
        "experts": {
            "base": {"model": "m", "categories": ["general"], "description": "for anything"},
            "tuned": {"base": "base", "adapter": "a"},
            "far": {"remote": {"url": "http://far/v1", "model": "m", "api_key_env": "FAR_KEY"}},
        },
        "pools": {"cpu": {"engine": "simulated"}},
    }
)


def view(boot: str, **experts: ExpertState) -> PoolView:
    return PoolView(boot, Snapshot(boot=boot, kind="cpu", experts=experts), 0.0, {})


def test_states_take_the_best_of_all_pools() -> None:
    failed = ExpertState(Residency.FAILED, reason="no weights")
    loading = ExpertState(Residency.LOADING, eta_s=3)
    ready = ExpertState(Residency.DEVICE, max_model_len=64, engine={"name": "simulated"})
    views = [view("x", base=failed, tuned=failed), view("y", base=loading)]
    now = models.expert_states(CONFIG, views, {"far": "no key"})
    assert now["base"] == {"state": "loading", "eta_s": 3}
    assert now["tuned"] == {"state": "failed", "reason": "no weights"}
    assert now["far"] == {"state": "failed", "reason": "no key"}
    now = models.expert_states(CONFIG, [*views, view("z", base=ready)], {"far": None})
    assert now["base"] == {
        "state": "device",
        "max_model_len": 64,
        "engine": {"name": "simulated"},
    }
    assert now["far"] == {"state": "device"}


def test_states_expert_without_a_pool_is_on_disk() -> None:
    now = models.expert_states(CONFIG, [], {})
    assert now["base"]["state"] == "disk"


def test_listing_has_openai_s_shape() -> None:
    now = models.expert_states(CONFIG, [], {})
    listing = models.listing(CONFIG, now, 5)
    assert listing["object"] == "list"
    assert [item["id"] for item in listing["data"]] == ["auto", "base", "tuned", "far"]
    for item in listing["data"]:
        assert item["object"] == "model"
        assert item["created"] == 5
    kinds = [item["coe"]["kind"] for item in listing["data"]]
    assert kinds == ["auto", "full", "lora", "remote"]
    assert models.entry(CONFIG, now, 5, "tuned") == listing["data"][2]
    assert listing["data"][2]["parent"] == "base"
    assert models.entry(CONFIG, now, 5, "nobody") is None
    assert "FAR_KEY" not in str(listing)


def test_openapi_describes_every_endpoint() -> None:
    result = describe(CONFIG)
    posts = {path for path, item in result["paths"].items() if "post" in item}
    batches = {"/v1/files", "/v1/batches", "/v1/batches/plan", "/v1/batches/{id}/cancel"}
    ollama = {*OLLAMA_ENDPOINTS, "/api/show"}
    assert posts == {*ENDPOINTS, *ollama, "/v1/route", "/v1/feedback", *batches}
    stored = describe(CONFIG.model_copy(update={"responses": ResponsesConfig(enabled=True)}))
    assert {path for path in stored["paths"] if path not in result["paths"]} == {
        "/v1/responses/{id}",
        "/v1/responses/{id}/cancel",
        "/v1/responses/{id}/input_items",
        "/v1/conversations",
        "/v1/conversations/{id}",
        "/v1/conversations/{id}/items",
        "/v1/conversations/{id}/items/{item_id}",
    }
    ids = [
        operation["operationId"]
        for item in stored["paths"].values()
        for operation in item.values()
        if "operationId" in operation
    ]
    assert len(ids) == len(set(ids))
