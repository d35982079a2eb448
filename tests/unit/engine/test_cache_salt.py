"""Salts that separate the prefix caches of tenants."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.config import Config, RemoteConfig
from service.engine.cache_salt import combine_salts, with_salt
from service.engine.engine_interface import EngineRequest
from service.engine.remote_engine import RemoteEngine
from service.gateway.auth import Authenticator, cache_salt
from service.gateway.request.parsing import parse_request
from service.gateway.routing.prefix_affinity import PrefixAffinity
from service.rpc.call_headers import Call, parse_call
from service.store.api_keys import KeyRecord, KeyService, StoreKeyRepository
from service.store.memory_store import MemoryStore
from service.types import Tenant

FORMS: list[Any] = [
    "text",
    [1, 2, 3],
    {"type": "token", "prompt_token_ids": [1, 2]},
    {"prompt": "text", "cache_salt": "the client's"},
]


@pytest.mark.parametrize("form", FORMS)
def test_with_salt_prompt_of_any_form_gets_the_tenant_s_salt(form: Any) -> None:
    one, again, other = with_salt(form, "a"), with_salt(form, "a"), with_salt(form, "b")
    assert one == again
    assert one["cache_salt"] != other["cache_salt"]
    assert with_salt(form, "") is form


def test_with_salt_decoder_prompt_is_salted_and_unknown_form_raises() -> None:
    both = {"encoder_prompt": {"prompt_token_ids": [1]}, "decoder_prompt": {"prompt": "x"}}
    assert with_salt(both, "a")["decoder_prompt"]["cache_salt"] == "a"
    with pytest.raises(TypeError, match="can't be kept apart by tenant"):
        with_salt(object(), "a")


@given(st.text(max_size=20), st.text(max_size=20))
def test_combine_salts_client_salt_never_equals_another_tenant_s(mine: str, theirs: str) -> None:
    a, b = cache_salt("secret", "a"), cache_salt("secret", "b")
    assert combine_salts(a, mine) != combine_salts(b, theirs)
    # Also by giving what another one's is made of.
    assert combine_salts(a, b) != b
    if mine != theirs and mine and theirs:
        assert combine_salts(a, mine) != combine_salts(a, theirs)


async def salts(tenants: dict[str, Any]) -> dict[str, str]:
    """The salt of a key of each tenant."""
    config = Config.model_validate(
        {
            "experts": {"general": {"model": "m"}},
            "pools": {"cpu": {"engine": "simulated"}},
            "tenants": tenants,
        }
    )
    book = StoreKeyRepository(MemoryStore())
    made = {
        name: (await KeyService(book).create(KeyRecord("", name, ""), 1.0))[1] for name in tenants
    }
    ring = Authenticator(config, book, secret="the-cluster-s")
    await ring.look()
    return {
        name: ring.identify({b"x-api-key": key.encode()}).cache_salt for name, key in made.items()
    }


async def test_authenticator_gives_tenants_different_salts_unless_they_share() -> None:
    shared = {"share_prefix": True}
    found = await salts({"a": {}, "b": {}, "c": shared, "d": shared})
    assert len({found["a"], found["b"], ""}) == 3
    assert found["c"] == found["d"] == ""
    assert found["a"] != cache_salt("another cluster's", "a")


async def test_authenticator_without_keys_gives_no_salt() -> None:
    config = {"experts": {"g": {"model": "m"}}, "pools": {"cpu": {"engine": "simulated"}}}
    ring = Authenticator(
        Config.model_validate(config), StoreKeyRepository(MemoryStore()), secret="s"
    )
    await ring.look()
    assert ring.identify({}).cache_salt == ""


@pytest.mark.parametrize("salt", ["", "0123abc"])
def test_call_headers_carry_the_salt(salt: str) -> None:
    call = Call("/v1/completions", "a", "r", 1, True, "g", 1, Tenant("t", cache_salt=salt))
    headers = {name.encode(): value.encode() for name, value in call.headers().items()}
    assert parse_call("/v1/completions", headers) == call


def test_prefix_affinity_is_known_to_tenants_with_the_same_salt_only() -> None:
    def asked(tenant: Tenant, *said: str) -> Any:
        roles = ("user", "assistant") * 3
        messages = [{"role": r, "content": s} for r, s in zip(roles, said, strict=False)]
        raw = orjson.dumps({"messages": messages})
        return parse_request("/v1/chat/completions", raw, {}, 1, tenant)

    a, b = Tenant("a", cache_salt="1"), Tenant("b", cache_salt="2")
    known = PrefixAffinity()
    known.record_answer(asked(a, "hi"), "math", "boot")
    assert known.hint(asked(a, "hi", "hello", "again")) is not None
    assert known.hint(asked(b, "hi", "hello", "again")) is None
    known.record_answer(asked(Tenant("c"), "hi"), "math", "boot")
    assert known.hint(asked(Tenant("d"), "hi", "hello", "again")) is not None


@pytest.mark.parametrize(
    ("config", "path", "body", "sent"),
    [
        ({}, "/v1/completions", {}, None),
        ({}, "/v1/completions", {"cache_salt": "mine"}, combine_salts("t", "mine")),
        ({"cache_salt": True}, "/v1/completions", {}, "t"),
        ({"cache_salt": True}, "/v1/responses", {"cache_salt": "mine"}, combine_salts("t", "mine")),
        ({"cache_salt": True}, "/v1/messages", {}, None),
    ],
)
def test_remote_engine_sends_the_salt_where_the_endpoint_accepts_it(
    config: dict[str, Any], path: str, body: dict[str, Any], sent: str | None
) -> None:
    engine = RemoteEngine(RemoteConfig(url="http://127.0.0.1:1/v1", model="m", **config))
    request = EngineRequest(path, "far", orjson.dumps(body), "r", cache_salt="t")
    assert orjson.loads(engine._addressed(request)).get("cache_salt") == sent
