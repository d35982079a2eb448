"""A vLLM engine whose weights are exchanged in place: several experts of one family take turns.

The work on the weights is done in the engine core, by `vllm_worker`. Here are the
order of things (pause, exchange, probe, resume), the token canary, and each
expert's own OpenAI layer with its own tokenizer and chat template.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import math
import time
from argparse import Namespace
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import orjson

from service.config import VllmOptions
from service.engine.base import (
    EngineObserver,
    EngineReport,
    EngineRequest,
    LoadResult,
    Message,
    SwapResult,
)
from service.engine.steering_spec import MERGED, PLACES, Steering
from service.engine.vllm.engine import STANDING, VllmEngine, VllmModel, first_line
from service.engine.vllm.frontend import EngineClient, tokenizer_digest
from service.engine.vllm.stats import CANARY
from service.engine.weight_cache import EngineShare, SharedWeightCache
from service.errors import CoeError, EngineDeadError, ExpertFailedError
from service.models import ModelInfo, inspect_model
from service.models.file_version import version_of
from service.models.lora_merge import LoraDelta

log = logging.getLogger("coe.engine")

_EXTENSION = "service.engine.vllm.worker.swap.SwapExtension"
_PINNED = "service.engine.vllm.worker.pinned_weights.PinnedExtension"
_MERGED_WORKER = "service.engine.vllm.worker.merged_worker.MergedWorker"
_POLL_S = 0.01
_LOOK_S = 0.2
_CANARY_PROMPT = list(range(101, 117))
_CANARY_TOKENS = 6
_SURE = 1e-3
# Of a vector's length: how far another computation of it may be from it.
_SAME_VECTOR = 1e-3


@dataclass(frozen=True, slots=True)
class Weights:
    """Where one expert's full weights come from: a folder, and a LoRA folder merged into it.

    steering: it has none of its own, but its base's, with other rules for the gates. fault:
    why there can be no such expert, told to who asks for it. embeds: it makes vectors, not text.
    """

    folder: str
    adapter: str | None = None
    strength: float = 1.0
    steering: Steering | None = None
    fault: str = ""
    embeds: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether it is what the folder holds, with nothing changed."""
        return self.adapter is None and self.steering is None and not self.fault

    @property
    def places(self) -> int:
        """The most experts that its steering chooses for a token; 0: it has none."""
        return self.steering.places if self.steering is not None else 0


@dataclass(frozen=True, slots=True)
class Canary:
    """What an expert said at its first load. `version`: of the files that it was loaded from.

    said: the greedy tokens, and how sure each was, as JSON.
    """

    version: str
    said: str


@dataclass(slots=True)
class _Frontend:
    """One expert's OpenAI layer; `renderer` is None where it is the engine's own."""

    app: Any
    source: Weights
    version: str
    renderer: Any = None
    generation_config: Any = None


class SwappingVllmEngine(VllmEngine):
    """An engine for `weights`' experts, all of one family; it starts with `first` running.

    `canaries` outlives the engine: each expert's first greedy tokens, as the first load of its
    files gave them; other files under the same path are another version. `cache`: on a GPU, where
    the pool's engines share the weights they hold; an engine that keeps the weights it was started
    with needs none.
    """

    def __init__(
        self,
        first: str,
        weights: Mapping[str, Weights],
        options: VllmOptions,
        *,
        on_cpu: bool,
        canary_interval: int,
        canaries: dict[str, Canary],
        watch: EngineObserver | None = None,
        cache: SharedWeightCache | None = None,
        secrets: Collection[str] = (),
    ) -> None:
        self._share = EngineShare(cache) if cache is not None else None
        model = VllmModel(first, weights[first].folder, {}, embeds=weights[first].embeds)
        super().__init__(model, options, on_cpu=on_cpu, watch=watch, secrets=secrets)
        # The caller's own: experts may come and go.
        self._weights = weights
        self._first = first
        self._canary_every = canary_interval
        self._canaries = canaries
        self._swaps: dict[str, int] = {}
        self._faces: dict[str, _Frontend] = {}
        # Of the files that each expert's weights were read from.
        self._versions: dict[str, str] = {}
        self._own_digest = ""
        self._own_face: tuple[Any, Any] | None = None
        self._tasks: Any = None
        self._broken: str | None = None
        # On CPU rules are put into live routers; a GPU's stand there from the start.
        self._stands = not on_cpu
        self._places = 0
        # Whose weights the engine keeps for good, if it does.
        self._fixed = ""

    @property
    def swappable_experts(self) -> frozenset[str]:
        """Those of this engine's experts that it can run as it was started."""
        # A copy: they may come and go in another thread.
        return frozenset(name for name, w in tuple(self._weights.items()) if self._can_run(name, w))

    def _can_run(self, expert: str, weights: Weights) -> bool:
        if weights.fault:
            return True  # no engine could; it is told to who asks
        base = weights.steering.base if weights.steering is not None else expert
        if self._fixed and base != self._fixed:
            return False
        return not self._stands or weights.places <= self._places

    def failure(self) -> str | None:
        """Why the engine must not be used, or None."""
        return self._broken or super().failure()

    def _frontend_args(self) -> Namespace:
        args = super()._frontend_args()
        args.worker_extension_cls = _PINNED if self._stands else _EXTENSION
        self._places = max(weights.places for weights in tuple(self._weights.values()))
        if self._stands and self._places:
            args.worker_cls = STANDING
            args.additional_config = {**args.additional_config, PLACES: self._places}
        if (merged := self._merged_first) is not None:
            args.worker_cls = _MERGED_WORKER
            told = {"folder": merged.adapter, "strength": merged.strength}
            args.additional_config = {**args.additional_config, MERGED: told}
        return args

    @property
    def _merged_first(self) -> Weights | None:
        """What the engine starts with, where that is an adapter merged into its base."""
        first = self._weights[self._first]
        return first if first.adapter is not None and not self._stands else None

    async def _start(self) -> EngineReport:
        merged = self._merged_first
        source = merged or Weights(self._model.path)
        before = await self._version_of(source)
        self._own_digest = await asyncio.to_thread(tokenizer_digest, self._model.path)
        if merged is not None:
            await asyncio.to_thread(_check_merged, self._first, merged)
        report = await super()._start()
        if await self._version_of(source) != before:
            raise ExpertFailedError(_changed_while(self._first), retry_after_s=30)
        self._tasks = await self._llm.get_supported_tasks()
        self._own_face = (self._llm.renderer, self._llm.input_processor.generation_config_fields)
        plain = [
            name
            for name, w in self._weights.items()
            if w.is_plain and w.folder == self._weights[self._first].folder
        ]
        own = merged is not None or self._first in plain
        adopted = self._first if own else next(iter(plain), "")
        self._versions[adopted] = before
        await self._take(adopted)
        if why := await self._rpc("coe_register_initial", adopted):
            log.info("the engine of %s keeps its weights: %s", adopted, why)
            self._fixed = adopted
        if adopted != self._first:
            await self.load_to_host(self._first)
            if not (await self.swap_in(self._first)).ok:
                raise ExpertFailedError(_changed_while(self._first), retry_after_s=30)
            # The pool counts what is held from the first unit on.
            await self.evict(adopted)
        else:
            source = self._weights[self._first]
            self._faces[self._first] = _Frontend(self._app, source, before)
            if not await self._canary(self._first):
                raise ExpertFailedError(
                    f"expert {self._first!r} answers otherwise than when first loaded"
                )
        return report

    def _layer_of(self, expert: str) -> Any:
        return self._faces[expert].app

    async def load_to_host(self, expert: str) -> LoadResult:
        """See `SwappingEngine.fill`."""
        source = self._weights[expert]
        if source.fault:
            raise ExpertFailedError(source.fault, retry_after_s=30)
        if source.steering is not None:
            began_s = time.monotonic()
            size = await self._rpc("coe_steer", expert, asdict(source.steering))
            # Its base's as they are held, whatever lies under their path now.
            rules = hashlib.sha256(repr(source.steering).encode()).hexdigest()[:24]
            base = self._versions.get(source.steering.base, "")
            self._versions[expert] = f"{base}-{rules}"
            await self._face_or_drop(expert, source)
            return LoadResult(int(size), time.monotonic() - began_s)
        version = await self._version_of(source)
        await self._take(expert)
        await self._rpc("coe_load_to_host", expert, source.folder, source.adapter, source.strength)
        told = await self._rpc("coe_load_result", expert)
        while told["state"] == "filling":  # in another process: there is no event to await
            await asyncio.sleep(_POLL_S)
            told = await self._rpc("coe_load_result", expert)
        if told["state"] != "host":
            await self._give_back(expert)
            reason = told.get("reason", "its weights went away while they were loaded")
            raise ExpertFailedError(
                f"expert {expert!r} could not be loaded: {reason}", retry_after_s=30
            )
        if await self._version_of(source) != version:
            # Some of what was read may be of the old files, and some of the new ones.
            await self.evict(expert)
            raise ExpertFailedError(_changed_while(expert), retry_after_s=30)
        self._versions[expert] = version
        await self._face_or_drop(expert, source)
        return LoadResult(int(told["host_bytes"]), float(told["fill_s"]))

    async def swap_in(self, expert: str) -> SwapResult:
        """See `SwappingEngine.swap_in`."""
        began_s = time.monotonic()
        if (face := self._faces.get(expert)) is None:
            raise ExpertFailedError(f"the weights of {expert!r} are not held")
        moved = resumed = False
        try:
            await self._alive(self._llm.pause_generation(mode="wait", clear_cache=True))
            try:
                done = await self._rpc("coe_swap_in", expert)
                moved = True
                self._put_on(face)
                if self._stats is not None:
                    self._stats.running = expert
            finally:
                # A paused engine would keep even the old expert's requests for ever.
                await self._alive(self._llm.resume_generation())
                resumed = True
        except Exception as error:
            if moved or not resumed:
                # Neither the old expert's engine nor the new one's: nobody may use it.
                self._broken = "a swap was left half done"
            if isinstance(error, CoeError):
                raise
            raise self._fault(f"expert {expert!r} could not be swapped in", error) from error
        swap_s = time.monotonic() - began_s
        count = self._swaps[expert] = self._swaps.get(expert, 0) + 1
        ok = bool(done["ok"])
        if ok and (count % self._canary_every == 0 or count == 1):
            ok = await self._canary(expert)
        return SwapResult(swap_s, ok, str(done["method"]))

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """See `SwappingEngine.drop`."""
        await self._rpc("coe_evict", expert, for_next)
        await self._give_back(expert)

    async def _version_of(self, source: Weights) -> str:
        """Of the files that weights would be read from now.

        Raises ExpertFailedError where it can't.
        """
        try:
            return await asyncio.to_thread(
                version_of, source.folder, source.adapter, source.strength
            )
        except OSError as error:
            why = f"the files in {source.folder} can't be read: {error}"
            raise ExpertFailedError(why, retry_after_s=30) from error

    async def _take(self, expert: str) -> None:
        """Tell the workers where in shared memory an expert's weights are, or are to be."""
        if self._share is not None:
            source = self._weights.get(expert, Weights(self._model.path))
            path, token = await asyncio.to_thread(
                self._share.take, expert, source.folder, source.adapter, source.strength
            )
            await self._rpc("coe_share", expert, path, token)

    async def _give_back(self, expert: str) -> None:
        if self._share is not None:
            stays_s = await asyncio.to_thread(self._share.give_back, expert)
            self._sweep_in(stays_s, self._share)

    def _sweep_in(self, stays_s: float, share: EngineShare) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(stays_s, loop.run_in_executor, None, share.sweep)

    async def stop(self) -> None:
        """Stop the core process; what it shared stays for a while, for the next."""
        await super().stop()
        if self._share is not None:
            self._sweep_in(await asyncio.to_thread(self._share.end), self._share)

    async def memory(self) -> dict[str, int]:
        """The core process's resident bytes, and what held experts were measured to take."""
        told: dict[str, int] = await self._rpc("coe_memory")
        return told

    async def _rpc(self, method: str, *args: object) -> Any:
        try:
            return _merge_rank_results(
                await self._alive(self._llm.collective_rpc(method, args=args))
            )
        except CoeError:
            raise
        except Exception as error:
            raise self._fault(f"{method} failed", error) from error

    async def _alive(self, call: Awaitable[Any]) -> Any:
        """What the core answers. vLLM leaves a call to a core that dies meanwhile unanswered."""
        asked = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({asked}, timeout=_LOOK_S))[0]:
                if (why := self.failure()) is not None:
                    raise EngineDeadError(f"the engine died: {why}")
            return asked.result()
        finally:
            asked.cancel()

    def _fault(self, what: str, error: Exception) -> CoeError:
        if (why := self.failure()) is not None:
            return EngineDeadError(f"{what}: the engine died: {why}")
        return ExpertFailedError(f"{what}: {first_line(error)}", retry_after_s=5)

    # --- the token canary

    async def _canary(self, expert: str) -> bool:
        """Whether its first greedy tokens are as at its files' first load, which records them.

        An expert that embeds is asked for a vector instead.
        """
        embeds = "generate" not in self._tasks
        body: dict[str, Any] = {"model": expert}
        if embeds:
            body["input"] = self._canary_prompt()
        else:
            body |= {
                "prompt": self._canary_prompt(),
                "max_tokens": _CANARY_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "logprobs": 1,
            }
        parts: list[bytes] = []

        async def collect(message: Message) -> None:
            parts.append(message.get("body", b""))

        request = EngineRequest(
            "/v1/embeddings" if embeds else "/v1/completions",
            expert,
            orjson.dumps(body),
            f"{CANARY}{time.monotonic_ns()}",
        )
        await self.run(request, collect)
        try:
            said = _canary_said(orjson.loads(b"".join(parts)))
        except (orjson.JSONDecodeError, KeyError, IndexError):
            self._broken = f"expert {expert!r} can't answer its canary"
            raise ExpertFailedError(self._broken, retry_after_s=30) from None
        version = self._versions.get(expert, "")
        kept = self._canaries.get(expert)
        if kept is None or kept.version != version:
            if kept is not None:
                log.info("expert %s: its files are others than at its last load", expert)
            kept = self._canaries[expert] = Canary(version, orjson.dumps(said).decode())
        first = orjson.loads(kept.said)
        if embeds:
            return math.dist(first[1], said[1]) < _SAME_VECTOR * math.hypot(*first[1])
        return first[0] == said[0] and all(
            abs(a - b) < _SURE for a, b in zip(first[1], said[1], strict=True)
        )

    def _canary_prompt(self) -> list[int]:
        """A few tokens that every vocabulary has, and that leave room for the answer."""
        config = self._llm.model_config
        room = config.max_model_len - _CANARY_TOKENS
        return [token % config.get_vocab_size() for token in _CANARY_PROMPT][: max(1, room)]

    # --- faces

    async def _face_or_drop(self, expert: str, source: Weights) -> None:
        """An expert without a tokenizer is not held either."""
        try:
            await self._face_for(expert, source)
        except Exception as error:
            await self.evict(expert)
            if isinstance(error, CoeError):
                raise
            raise self._fault(f"expert {expert!r} could not be loaded", error) from error

    async def _face_for(self, expert: str, source: Weights) -> None:
        face = self._faces.get(expert)
        version = self._versions.get(expert, "")
        if face is None or face.source != source or face.version != version:
            self._faces[expert] = await self._make_face(expert, source, version)

    async def _make_face(self, expert: str, source: Weights, version: str) -> _Frontend:
        folder = source.folder
        args = copy.copy(self._args)
        args.served_model_name = [expert]
        if await asyncio.to_thread(tokenizer_digest, folder) == self._own_digest:
            # Not the engine's of this moment: another expert's may be on it now.
            assert self._own_face is not None
            await self._rpc("coe_tokens", expert, "")
            client = EngineClient(self._llm, self._llm.vllm_config, self._own_face[0])
            return _Frontend(await self._openai_layer(args, client, self._tasks), source, version)
        from vllm.renderers import renderer_from_config

        # The core makes grammars by its own.
        await self._rpc("coe_tokens", expert, folder)
        fault = await self._rpc("coe_tokens_told", expert)
        while fault is None:  # in another process: there is no event to await
            await asyncio.sleep(_POLL_S)
            fault = await self._rpc("coe_tokens_told", expert)
        if fault:
            raise ExpertFailedError(f"the tokenizer of expert {expert!r} can't be read: {fault}")
        args.model = folder
        config = copy.copy(self._llm.vllm_config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.model = config.model_config.tokenizer = folder
        renderer = await asyncio.to_thread(renderer_from_config, config)
        client = EngineClient(self._llm, config, renderer)
        app = await self._openai_layer(args, client, self._tasks)
        generation_config = config.model_config.try_get_generation_config()
        return _Frontend(app, source, version, renderer, generation_config)

    def _put_on(self, face: _Frontend) -> None:
        """Tokens and text of this expert's kind from now on. Nothing is running."""
        assert self._own_face is not None
        renderer, generation_config = self._own_face
        if face.renderer is not None:
            renderer, generation_config = face.renderer, face.generation_config
        llm = self._llm
        llm.renderer = llm.input_processor.renderer = renderer
        llm.input_processor.generation_config_fields = generation_config
        llm.output_processor.tokenizer = renderer.tokenizer


def _check_merged(expert: str, source: Weights) -> None:
    """Raises ExpertFailedError where an adapter can't be merged.

    A core that fails tells no reason.
    """
    assert source.adapter is not None
    try:
        delta = LoraDelta(Path(source.adapter), source.strength)
        base = inspect_model(Path(source.folder))
        if isinstance(base, ModelInfo):
            if base.quantization is not None:
                raise ValueError(f"its base is quantised ({base.quantization})")
            delta.check_base(base.shapes)
    except (ValueError, CoeError) as error:
        why = f"expert {expert!r} could not be loaded: {first_line(error)}"
        raise ExpertFailedError(why, retry_after_s=30) from error


def _changed_while(expert: str) -> str:
    return f"the files of expert {expert!r} changed while they were loaded"


def _canary_said(told: dict[str, Any]) -> list[list[Any]]:
    """The tokens of an answer and how sure each is, or no tokens and a vector.

    Experts of one family often begin alike: how sure they are tells them apart. Raises KeyError
    or IndexError where a reply holds neither.
    """
    if "data" in told:
        return [[], told["data"][0]["embedding"]]
    choice = told["choices"][0]
    return [choice["token_ids"], choice["logprobs"]["token_logprobs"]]


def _merge_rank_results(answers: list[Any]) -> Any:
    """What several workers of one engine say together: as far as the last, as bad as the worst."""
    told = [answer for answer in answers if isinstance(answer, dict)]
    for state in ("failed", "filling", "disk"):
        for answer in told:
            if answer.get("state") == state:
                return answer
    for answer in told:
        if answer.get("ok") is False:
            return answer
    if told and all(answer.get("state") == "host" for answer in told):
        # Each rank holds its own part.
        whole = sum(int(answer["host_bytes"]) for answer in told)
        return {**told[0], "host_bytes": whole, "fill_s": max(a["fill_s"] for a in told)}
    return answers[0]
