"""Experts that an admin adds and removes while the service runs.

The store keeps them. Every gateway reads them again each second, makes the same config of its own
file and of them, and hands them to the pools that do not have them yet. An expert is served once
every pool with its base has loaded it; until then only pools know it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import orjson

from service.classifier.built_in_artifact import BUILT_IN
from service.config import Config
from service.config.effective_config import (
    WITHOUT_ANCHOR,
    AddedExpert,
    AddedExperts,
    EffectiveConfig,
    is_hub_adapter,
    parse_added_expert,
    with_added,
)
from service.errors import (
    ArtifactError,
    CoeError,
    ConfigError,
    ConflictError,
    DisallowedFieldError,
    ExpertFailedError,
    PoolUnavailableError,
    StoreUnavailableError,
    UnknownModelError,
)
from service.expert_capabilities import with_capabilities
from service.gateway.routing.routing_setup import RoutingSetup
from service.models import locate, pull
from service.models.expert_folders import (
    allowed_adapter_folder,
    check_adapter_folder,
    models_folder,
)
from service.rpc.pool_directory import PoolDirectory
from service.rpc.pool_link import PoolLink
from service.store.added_expert_repository import AddedExpertRepository
from service.task_cancellation import cancel_and_wait
from service.types import Residency

log = logging.getLogger("coe.experts")

_LOOK_S = 1.0
# The time after which every gateway has read a change of the store that they share.
_SEEN_S = 2 * _LOOK_S
# The longest that an addition waits until every pool has loaded the expert.
_LOAD_S = 100.0
# The time after which an expert that is not served yet, or no more, counts as left behind.
_UNFINISHED_S = 600.0
_T = TypeVar("_T")


def effective_config(
    config: Config, added: AddedExperts, *, unserved: bool = False
) -> EffectiveConfig:
    """Return a gateway's config with added experts; `unserved` as in `with_added`."""
    return with_added(
        config,
        added,
        unserved=unserved,
        folder_of=partial(allowed_adapter_folder, config),
        built_in_artifact=str(BUILT_IN),
    )


class AddedExpertService:
    """The experts that an admin has added, on one gateway.

    Args:
        repository: Keeps them.
        directory: Links to pools.
        given: Returns the config of the file.
        apply: Makes the gateway serve `known`.
        wake: Requests the start of a pool for an expert that no running pool holds.
        shared: Whether other gateways use the same repository.
        clock: Seconds since 1970.

    Attributes:
        known: The added experts, as they were read last.
        left_out: The served ones that do not fit into the config of the file, with the reasons.
    """

    def __init__(
        self,
        repository: AddedExpertRepository,
        directory: PoolDirectory,
        given: Callable[[], Config],
        apply: Callable[[], Awaitable[None]],
        wake: Callable[[str], None],
        *,
        shared: bool,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.known = AddedExperts()
        self.left_out: Mapping[str, str] = {}
        self._repository = repository
        self._directory = directory
        self._given = given
        self._apply = apply
        self._wake = wake
        self._shared = shared
        self._clock = clock
        self._version: bytes | None = None
        # Why reading failed last. It is logged once, and not every second.
        self._fault = ""
        self._turn = asyncio.Lock()
        self._follower: asyncio.Task[None] | None = None
        self._acts: set[asyncio.Task[Any]] = set()
        # The revisions that pools refused, with the reasons.
        self._refused: dict[str, tuple[int, str]] = {}

    # --- following the store

    async def start(self) -> None:
        """Read the added experts, and start to follow the store and the pools."""
        await self._look()
        self._follower = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        """Stop following. Additions and removals that have begun are cancelled."""
        await cancel_and_wait(self._follower)
        for act in list(self._acts):
            await cancel_and_wait(act)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                await self._look()
                await self._drop_unfinished()
                await self._hand_out()
            except Exception:
                # The loop must survive any error, because it has to read the next change.
                log.exception("following the added experts failed")

    async def _look(self) -> None:
        """Read the added experts if they changed. While the store is away, the known ones stay."""
        if self._turn.locked():
            return  # an addition or a removal knows them best
        async with self._turn:
            try:
                await self._read()
            except StoreUnavailableError:
                return
            except CoeError as error:
                if self._fault != error.message:
                    log.error("reading the added experts failed: %s", error.message)
                self._fault = error.message
            else:
                self._fault = ""

    async def _read(self) -> None:
        """Read the added experts if they changed, and serve them.

        Raises:
            StoreUnavailableError: The store can't be reached.
            ConfigError: They are damaged.
        """
        version = await self._repository.version()
        if version == self._version:
            return
        known = await self._repository.load()
        await self._serve(known)
        self._version = version

    async def _drop_unfinished(self) -> None:
        """Remove what a gateway has left behind that ended in an addition or a removal."""
        now_s = self._clock()

        def is_left(one: AddedExpert | None) -> bool:
            return one is not None and not one.served and now_s - one.added_s > _UNFINISHED_S

        for name, one in self.known.experts.items():
            if is_left(one) and not self._turn.locked():
                log.warning("expert %s is removed: its addition or removal was cut short", name)
                async with self._turn:
                    await self._repository.change(
                        lambda now, name=name: (  # type: ignore[misc]
                            now.without(name, now_s) if is_left(now.experts.get(name)) else now
                        )
                    )
                    self._version = None

    async def _serve(self, known: AddedExperts) -> None:
        before, self.known = self.known, known
        try:
            await self._apply()
        except BaseException:
            self.known = before
            raise

    def tell(self, found: EffectiveConfig) -> None:
        """Note what fits into the config of the file, and log what does not any more."""
        for name, why in found.left_out.items():
            if self.left_out.get(name) != why:
                log.warning("the added expert %s is left out: %s", name, why)
        self.left_out = found.left_out

    # --- pools

    async def _hand_out(self) -> None:
        """Give the known experts to every pool that does not have them."""
        revision = self.known.revision
        behind = [
            link
            for link in self._directory.links()
            if link.snapshot is not None and link.snapshot.added < revision
        ]
        await asyncio.gather(*(self._hand_to(link) for link in behind))

    async def _hand_to(self, link: PoolLink) -> None:
        known = self.known
        name = link.address.name
        try:
            status, body = await link.set_added(known)
        except PoolUnavailableError:
            return  # it is tried again
        if status < 400:
            self._refused.pop(name, None)
        elif self._refused.get(name) != (why := (known.revision, _message(body))):
            self._refused[name] = why
            log.error("pool %s can't take the added experts: %s", name, why[1])

    def _links_with(self, expert: str) -> list[PoolLink]:
        """Links to the pools that hold an expert of the config."""
        found = []
        for link in self._directory.links():
            pools = self._given().pools
            if link.address.kind in pools and expert in self._given().local_experts(
                link.address.kind
            ):
                found.append(link)
        return found

    # --- additions and removals

    async def add(self, name: str, wanted: AddedExpert) -> None:
        """Add an expert. It is served when this returns.

        Raises:
            ConflictError: It can't be served, or its name is taken.
            DisallowedFieldError: Its adapter lies in no allowed folder.
            PoolUnavailableError: No pool with its base can be reached.
            ExpertFailedError: A pool could not load it.
            StoreUnavailableError: The store can't be reached.
        """
        await self._to_the_end(self._add(name, wanted))

    async def replace_adapter(self, name: str, adapter: str) -> None:
        """Serve an added expert with another adapter; its prices, examples and others stay.

        The new one is checked before the old one goes. If it can't be loaded, the old one is
        served again.

        Raises:
            ConflictError: It can't be served, or there is no such adapter.
            DisallowedFieldError: The adapter lies in no allowed folder.
            PoolUnavailableError: No pool with its base can be reached.
            ExpertFailedError: A pool could not load it.
            StoreUnavailableError: The store can't be reached.
        """
        await self._to_the_end(self._replace_adapter(name, adapter))

    async def remove(self, name: str) -> None:
        """Remove an added expert. Its running requests end.

        Raises:
            UnknownModelError: No such expert was added.
            ConflictError: Another added expert builds on it, or it is of the config.
            StoreUnavailableError: The store can't be reached.
        """
        await self._to_the_end(self._remove(name))

    async def _to_the_end(self, act: Coroutine[Any, Any, _T]) -> _T:
        """Run an act to its end, even if the client leaves."""
        task = asyncio.create_task(self._in_turn(act))
        self._acts.add(task)
        task.add_done_callback(self._acts.discard)
        return await asyncio.shield(task)

    async def _in_turn(self, act: Coroutine[Any, Any, _T]) -> _T:
        try:
            async with self._turn:
                return await act
        except (ConfigError, ArtifactError) as error:
            raise ConflictError(error.message) from None
        finally:
            act.close()
            # A change is its own next version.
            self._version = None

    async def _add(self, name: str, wanted: AddedExpert) -> None:
        await self._read()
        given = self._given()
        if (before := self.known.experts.get(name)) is not None and before.served:
            raise ConflictError(
                f"expert {name!r} was added before; remove it first: DELETE /admin/experts/{name}"
            )
        others = self.known.experts.keys() - {name}
        if len(others) >= given.added_experts.most:
            raise ConflictError(
                f"added_experts.most is {given.added_experts.most}, and {len(others)} experts were "
                "added; remove one first"
            )
        candidate = self.known.including(name, wanted, self._clock())
        await asyncio.to_thread(_check, given, candidate, name)
        await self._check_in_pools(name, wanted, candidate)
        await self._load(name, wanted)

    async def _load(self, name: str, wanted: AddedExpert) -> None:
        """Let the pools load an expert that was checked, and serve it then."""
        await self._change(lambda now: _including(now, name, wanted, self._clock()))
        try:
            await self._until_loaded(name, wanted)
            await self._change(lambda now: _serving(now, name, wanted, self._clock()))
        except BaseException:
            # Through another gateway it may have been removed, and added anew, meanwhile.
            await self._change(
                lambda now: now.without(name, self._clock()) if _is_same(now, name, wanted) else now
            )
            raise

    async def _replace_adapter(self, name: str, adapter: str) -> None:
        await self._read()
        before = self.known.experts.get(name)
        if before is None or not before.served or before.expert.adapter is None:
            raise ConflictError(f"no adapter {name[:128]!r} is served that could be replaced")
        if not adapter.startswith("/") and not is_hub_adapter(adapter):
            raise ConflictError(f"expert {name!r}: adapter: {WITHOUT_ANCHOR}")
        expert = before.expert.model_copy(update={"adapter": adapter})
        wanted = AddedExpert(expert=expert, examples=before.examples, added_s=self._clock())
        candidate = self.known.including(name, wanted, self._clock())
        await asyncio.to_thread(_check, self._given(), candidate, name)
        await self._check_in_pools(name, wanted, candidate)
        await self._remove(name)
        try:
            await self._load(name, wanted)
        except BaseException:
            await self._change(
                lambda now: (
                    now if name in now.experts else now.including(name, before, self._clock())
                )
            )
            raise

    async def _check_in_pools(
        self, name: str, wanted: AddedExpert, candidate: AddedExperts
    ) -> None:
        """Let each pool with the expert's base check it.

        Raises:
            CoeError: A pool can't serve it.
        """
        base = wanted.expert.base
        assert base is not None
        if wanted.expert.adapter is None:
            return  # another way to ask the base needs nothing of a pool
        adapter = wanted.expert.adapter
        if is_hub_adapter(adapter):
            await asyncio.to_thread(_fetch, self._given(), name, adapter)
        links = self._links_with(base)
        if not links:
            self._wake(base)
            raise PoolUnavailableError(
                f"expert {name!r}: no pool with {base!r} runs, which would check the adapter; "
                "try again once it does",
                retry_after_s=10,
            )
        replies = await asyncio.gather(*(link.check_added(candidate, name) for link in links))
        for status, body in replies:
            if status == 400:
                raise DisallowedFieldError(_message(body), param="adapter")
            if status >= 500:
                # The pool has a fault, and the addition may be right.
                raise ExpertFailedError(f"expert {name!r}: {_message(body)}")
            if status >= 400:
                raise ConflictError(_message(body))

    async def bases_for(self, name: str, adapter: str) -> list[str]:
        """Return the experts with full weights beside which an adapter may be added.

        Where several have room for one, the pools say which of them it fits.

        Args:
            name: The adapter's name.
            adapter: Its folder's absolute path, or a name of the hub with its commit.

        Raises:
            ConfigError: The name or the adapter is none.
            ConflictError: No base has room for an adapter.
            CoeError: It fits none of them; the reason is that of the first.
        """
        given = self._given()
        bases = [
            base
            for base, expert in given.experts.items()
            if expert.model is not None
            and any(
                pool.vllm.spare_adapters and base in given.local_experts(kind)
                for kind, pool in given.pools.items()
            )
        ]
        if len(bases) <= 1:
            if not bases:
                raise ConflictError(
                    "no engine has room for an adapter; set pools.KIND.vllm.spare_adapters"
                )
            return bases
        fitting, first = [], None
        for base in bases:
            try:
                _, wanted = parse_added_expert(
                    {"name": name, "base": base, "adapter": adapter}, self._clock()
                )
                candidate = self.known.including(name, wanted, self._clock())
                await self._check_in_pools(name, wanted, candidate)
            except CoeError as error:
                first = first or error
            else:
                fitting.append(base)
        if not fitting and first is not None:
            raise first
        return fitting

    async def _until_loaded(self, name: str, wanted: AddedExpert) -> None:
        """Wait until every pool with the expert's base has loaded it.

        Raises:
            ExpertFailedError: A pool could not load it, or took too long.
        """
        if wanted.expert.adapter is None:
            return
        revision = self.known.revision
        assert wanted.expert.base is not None
        try:
            async with asyncio.timeout(_LOAD_S):
                while True:
                    if not await self._still_adding(name, wanted):
                        raise ConflictError(f"expert {name!r} was removed while it was being added")
                    links = self._links_with(wanted.expert.base)
                    for link in links:
                        at, why = self._refused.get(link.address.name, (0, ""))
                        if at >= revision:
                            raise ExpertFailedError(f"expert {name!r}: {why}")
                    states = [
                        link.snapshot.experts.get(name)
                        if link.snapshot is not None and link.snapshot.added >= revision
                        else None
                        for link in links
                    ]
                    for state in states:
                        if state is not None and state.state is Residency.FAILED:
                            raise ExpertFailedError(f"expert {name!r}: {state.reason}")
                    if states and all(s and s.state is not Residency.LOADING for s in states):
                        return
                    await self._directory.change(0.2)
                    await self._hand_out()
        except TimeoutError:
            raise ExpertFailedError(
                f"expert {name!r}: not every pool has loaded it within {_LOAD_S:.0f} s; "
                "it was removed again"
            ) from None

    async def _still_adding(self, name: str, wanted: AddedExpert) -> bool:
        """Read what other gateways changed, and return whether an addition goes on.

        Nobody else follows the store meanwhile, and a load may take long.
        """
        # While the store is away, or damaged, the next change of ours tells it.
        with contextlib.suppress(StoreUnavailableError, ConfigError):
            await self._read()
        return _is_same(self.known, name, wanted)

    async def _remove(self, name: str) -> None:
        await self._read()
        if name not in self.known.experts:
            if name in self._given().experts:
                raise ConflictError(
                    f"expert {name!r} is of the config; remove it there, and reload the config"
                )
            names = ", ".join(self.known.experts) or "none"
            raise UnknownModelError(f"no expert {name[:128]!r} was added; those that were: {names}")
        after = self.known.without(name, self._clock())
        found = await asyncio.to_thread(effective_config, self._given(), after, unserved=True)
        before = {*self.left_out, name}
        if lost := [other for other in found.left_out if other not in before]:
            raise ConflictError(f"expert {name!r}: {', '.join(lost)} builds on it; remove it first")
        if self._shared and (one := self.known.experts[name]).served:
            # Another gateway would wait for a pool with the expert. Gateways forget it first.
            leaving = one.model_copy(update={"served": False, "added_s": self._clock()})
            await self._change(lambda now: now.including(name, leaving, self._clock()))
            await asyncio.sleep(_SEEN_S)
        await self._change(lambda now: now.without(name, self._clock()))

    async def _change(self, change: Callable[[AddedExperts], AddedExperts]) -> None:
        """Change the added experts in the store, in this gateway and in the pools."""
        await self._serve(await self._repository.change(change))
        await self._hand_out()

    def times(self) -> dict[str, float]:
        """When each served expert was added, in seconds since 1970."""
        return {name: one.added_s for name, one in self.known.experts.items() if one.served}

    def to_json(self) -> dict[str, Any]:
        """Each added expert, for admins."""
        return {
            name: {
                **one.expert.model_dump(mode="json", exclude_unset=True),
                **({"examples": one.examples} if one.examples else {}),
                "added_s": one.added_s,
                "state": "not served"
                if not one.served
                else "left out"
                if name in self.left_out
                else "served",
                "reason": self.left_out.get(name, ""),
            }
            for name, one in self.known.experts.items()
        }


def _including(now: AddedExperts, name: str, wanted: AddedExpert, at_s: float) -> AddedExperts:
    if name in now.experts:
        raise ConflictError(
            f"an expert {name!r} is being added, or its addition was cut short; try again, or "
            f"remove it first: DELETE /admin/experts/{name}"
        )
    return now.including(name, wanted, at_s)


def _is_same(now: AddedExperts, name: str, wanted: AddedExpert) -> bool:
    """Return whether an addition that is not served yet is this one."""
    found = now.experts.get(name)
    return found is not None and not found.served and found.added_s == wanted.added_s


def _serving(now: AddedExperts, name: str, wanted: AddedExpert, at_s: float) -> AddedExperts:
    if not _is_same(now, name, wanted):
        raise ConflictError(f"expert {name!r} was removed while it was being added")
    return now.including(name, wanted.model_copy(update={"served": True}), at_s)


def _check(given: Config, candidate: AddedExperts, name: str) -> None:
    """Check that a gateway could serve an expert.

    Raises:
        DisallowedFieldError: Its adapter lies in no allowed folder.
        ConflictError: It could not.
    """
    check_adapter_folder(given, name, candidate.experts[name].expert.adapter)
    found = effective_config(given, candidate, unserved=True)
    try:
        if (why := found.left_out.get(name)) is not None:
            raise ConfigError(why)
        RoutingSetup(with_capabilities(found.config))
    except CoeError as error:
        raise ConflictError(error.message) from None


def _fetch(given: Config, name: str, adapter: str) -> None:
    """Fetch an adapter from the hub, where that is allowed and needed.

    Raises:
        ConflictError: It could not be fetched.
    """
    root = Path(models_folder(given))
    try:
        if given.added_experts.downloads and locate(adapter, root=root) is None:
            pull(adapter, dest_root=root)
    except CoeError as error:
        raise ConflictError(f"expert {name!r}: adapter: {error.message}") from None


def _message(body: bytes) -> str:
    """The message of a pool's error."""
    with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
        return str(orjson.loads(body)["error"]["message"])
    return "a pool gave no reason"
