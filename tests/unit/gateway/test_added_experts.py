"""Additions and removals through several gateways at once, and adapters that are replaced."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.config import Config
from service.config.effective_config import AddedExpert, AddedExperts, parse_added_expert
from service.errors import ConflictError, DisallowedFieldError, ExpertFailedError
from service.gateway import added_experts
from service.gateway.added_experts import AddedExpertService
from service.rpc.pool_link import PoolAddress
from service.rpc.snapshot import ExpertState, Snapshot
from service.store.added_expert_repository import StoreExpertRepository
from service.store.memory_store import MemoryStore
from service.types import Residency
from tests.support.polling import until

CONFIG = Config.model_validate(
    {
        "experts": {"general": {"model": "m"}},
        "pools": {"p": {"engine": "simulated", "vllm": {"spare_adapters": 8}}},
        "added_experts": {"roots": ["/adapters"]},
    }
)


class FakeLink:
    """A pool that loads adapters once its gate is open, and fails with those named `bad`."""

    def __init__(self) -> None:
        self.address = PoolAddress("http://pool", "p", "boot")
        self.snapshot = Snapshot("boot", "p")
        self.gate = asyncio.Event()
        self.gate.set()
        self.known = AddedExperts()

    async def check_added(self, added: AddedExperts, name: str) -> tuple[int, bytes]:
        replies = {
            "/adapters/wrong-rank": (409, b'{"error":{"message":"its rank is 64"}}'),
            "/adapters/of-the-pool": (500, b'{"error":{"message":"internal error"}}'),
        }
        return replies.get(added.experts[name].expert.adapter or "", (200, b""))

    async def set_added(self, added: AddedExperts) -> tuple[int, bytes]:
        self.known = added
        self.snapshot = Snapshot("boot", "p", added=added.revision, experts=self._states())
        return 200, b""

    def _states(self) -> dict[str, ExpertState]:
        def state(one: AddedExpert) -> ExpertState:
            if one.expert.adapter == "/adapters/bad":
                return ExpertState(Residency.FAILED, reason="no such module")
            return ExpertState(Residency.DEVICE if self.gate.is_set() else Residency.LOADING)

        return {name: state(one) for name, one in self.known.experts.items()}

    def open(self) -> None:
        self.gate.set()
        self.snapshot = Snapshot("boot", "p", added=self.known.revision, experts=self._states())


class FakeDirectory:
    """Links to one pool."""

    def __init__(self, link: FakeLink) -> None:
        self.link = link

    def links(self) -> list[FakeLink]:
        return [self.link]

    async def change(self, timeout_s: float) -> None:
        await asyncio.sleep(0)


class Stage:
    """Two gateways with one store and one pool."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        self.link = FakeLink()
        self.gateways = [self._gateway() for _ in range(2)]

    def _gateway(self) -> AddedExpertService:
        async def apply() -> None:
            pass

        directory: Any = FakeDirectory(self.link)
        return AddedExpertService(
            StoreExpertRepository(self.store),
            directory,
            lambda: CONFIG,
            apply,
            lambda _: None,
            shared=True,
        )

    async def kept(self) -> dict[str, AddedExpert]:
        return dict((await StoreExpertRepository(self.store).load()).experts)


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(added_experts, "_SEEN_S", 0.0)


def wanted(name: str = "law", at_s: float = 1.0, **fields: Any) -> tuple[str, AddedExpert]:
    return parse_added_expert(
        {"name": name, "base": "general", "adapter": "/adapters/a", **fields}, at_s
    )


async def begin(stage: Stage) -> asyncio.Task[None]:
    """Begin an addition that the pool is still loading."""
    stage.link.gate.clear()
    adding = asyncio.create_task(stage.gateways[0].add(*wanted()))
    await until(lambda: "law" in stage.link.known.experts, "the pool is loading it")
    return adding


async def test_addition_that_another_gateway_removes_does_not_come_back() -> None:
    stage = Stage()
    adding = await begin(stage)
    await stage.gateways[1].remove("law")
    stage.link.open()
    with pytest.raises(ConflictError, match="removed while it was being added"):
        await adding
    assert await stage.kept() == {}
    assert stage.link.known.experts == {}


async def test_addition_that_another_gateway_made_anew_stays() -> None:
    stage = Stage()
    adding = await begin(stage)
    await stage.gateways[1].remove("law")
    stage.link.open()
    await stage.gateways[1].add(*wanted(at_s=2.0))
    with pytest.raises(ConflictError):
        await adding
    found = await stage.kept()
    assert (found["law"].added_s, found["law"].served) == (2.0, True)


async def test_gateway_that_waits_for_a_load_sees_what_others_remove() -> None:
    stage = Stage()
    first, second = stage.gateways
    await first.add(*wanted("old"))
    adding = await begin(stage)
    await second.remove("old")
    await until(lambda: "old" not in first.known.experts, "it knows, while it waits")
    stage.link.open()
    await adding
    assert set(await stage.kept()) == {"law"}


async def test_replaced_adapter_keeps_everything_else() -> None:
    stage = Stage()
    first = stage.gateways[0]
    await first.add(*wanted(price={"prompt": 3.0}, examples={"legal": ["a", "b", "c"]}))
    await first.replace_adapter("law", "/adapters/b")
    found = (await stage.kept())["law"]
    assert (found.expert.adapter, found.served) == ("/adapters/b", True)
    assert found.expert.price is not None
    assert (found.expert.price.prompt, found.examples) == (3.0, {"legal": ("a", "b", "c")})


@pytest.mark.parametrize(
    ("adapter", "error"),
    [
        ("/elsewhere", DisallowedFieldError),
        ("relative", ConflictError),
        ("/adapters/wrong-rank", ConflictError),
        ("/adapters/of-the-pool", ExpertFailedError),
        ("/adapters/bad", ExpertFailedError),
    ],
)
async def test_adapter_stays_where_its_replacement_fails(
    adapter: str, error: type[Exception]
) -> None:
    stage = Stage()
    first = stage.gateways[0]
    await first.add(*wanted())
    before = await stage.kept()
    with pytest.raises(error):
        await first.replace_adapter("law", adapter)
    assert await stage.kept() == before
    assert dict(stage.link.known.experts) == before


@pytest.mark.parametrize("fields", [None, {"adapter": None, "defaults": {"seed": 1}}])
async def test_nothing_but_an_adapter_can_be_replaced(fields: dict[str, Any] | None) -> None:
    stage = Stage()
    first = stage.gateways[0]
    if fields is not None:
        await first.add(*wanted(**fields))
    before = await stage.kept()
    with pytest.raises(ConflictError, match="no adapter 'law' is served"):
        await first.replace_adapter("law", "/adapters/b")
    assert await stage.kept() == before
