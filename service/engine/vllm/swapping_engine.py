"""A vLLM engine that swaps weights in place, so that experts of one family take turns.

The worker extension `service.engine.vllm.worker.swap_extension` moves the weights in the engine
core. This module has the order of a swap (pause, swap, probe, resume), the token canary, and each
expert's own OpenAI layer with its tokenizer and chat template.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from service.config import VllmOptions
from service.engine.engine_interface import (
    CANARY,
    EngineObserver,
    EngineReport,
    EngineRequest,
    LoadResult,
    Message,
    Send,
    SwapResult,
)
from service.engine.gpu_share import GpuShare
from service.engine.shared_weight_cache import EngineShare, SharedWeightCache
from service.engine.steering_data import MERGED_KEY, PLACES_KEY, Steering
from service.engine.vllm.async_llm_handle import LaunchSettings, OpenAiApp, Rendering
from service.engine.vllm.engine import GRAPH_STEERING_WORKER, VllmEngine, VllmModel, first_line
from service.engine.vllm.tokenizer_digest import tokenizer_digest
from service.errors import (
    CoeError,
    EngineDeadError,
    EngineRestartingError,
    ExpertFailedError,
)
from service.models import ModelInfo, inspect_model
from service.models.lora_merge import LoraDelta
from service.models.weights_version import version_of

_T = TypeVar("_T")

log = logging.getLogger("coe.engine")

_SWAP_EXTENSION = "service.engine.vllm.worker.swap_extension.SwapExtension"
_PINNED_EXTENSION = "service.engine.vllm.worker.pinned_swap_extension.PinnedExtension"
_MERGED_WORKER = "service.engine.vllm.worker.merged_expert_worker.MergedWorker"
# A poll runs between two steps of the running model, on a GPU on all ranks.
_POLL_S, _GPU_POLL_S = 0.01, 0.1
_CHECK_ALIVE_S = 0.2
# No copy of weights takes so long. The driver hangs.
_SWAP_TIMEOUT_S = 120.0
_HALF_DONE = "a swap was left half done"
_CANARY_PROMPT = list(range(101, 117))
_CANARY_TOKENS = 6
# The largest difference of a token's log probability from the recorded value, or of an embedding
# from the recorded embedding, relative to its length. Engines on a GPU may choose other kernels by
# timing when they start, whose sums differ.
_TOLERANCE, _OTHER_ENGINE_TOLERANCE = 1e-3, 0.05


@dataclass(frozen=True, slots=True)
class Weights:
    """The source of one expert's full weights.

    Attributes:
        folder: The folder of the weights.
        adapter: The folder of a LoRA adapter to merge into the weights.
        strength: The factor of the adapter.
        steering: Rules for the gates. Such an expert runs on its base's weights.
        fault: Why the expert can't be served. It is the error of every request for the expert.
        pooling_runner: Whether the model makes vectors, scores or classes, even if its
            architecture could make text.
    """

    folder: str
    adapter: str | None = None
    strength: float = 1.0
    steering: Steering | None = None
    fault: str = ""
    pooling_runner: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the weights are the unchanged weights of the folder."""
        return self.adapter is None and self.steering is None and not self.fault

    @property
    def places(self) -> int:
        """The most routed experts that the steering chooses for a token; 0 without steering."""
        return self.steering.places if self.steering is not None else 0


@dataclass(frozen=True, slots=True)
class Canary:
    """An expert's answer to a fixed prompt, recorded at its first load.

    Attributes:
        version: The version of the files that the expert was loaded from.
        answer: Two lists as JSON: the first greedy tokens and their log probabilities. An expert
            that makes no text has no tokens, and its vector is the second list.
    """

    version: str
    answer: str


@dataclass(frozen=True, slots=True)
class _Frontend:
    """One expert's OpenAI layer, and the tokenizer that the engine uses while the expert runs."""

    app: OpenAiApp
    source: Weights
    version: str
    rendering: Rendering


class SwappingVllmEngine(VllmEngine):
    """One engine for several experts of one family.

    Args:
        first: The expert that runs when the engine has started.
        weights: The sources by expert. The caller may add and remove experts.
        options: The pool's `vllm` section.
        on_cpu: Whether the engine computes on the CPU.
        canary_interval: The canary is checked at an expert's first swap and at every n-th swap.
        canaries: The recorded canaries by expert. The mapping outlives the engine.
        observer: Receives the engine's statistics, if any.
        cache: On a GPU, the cache in which the pool's engines share weights. An engine that keeps
            its first weights needs no cache.
        secrets: Environment variables that the core must not inherit, in addition to variables
            with the name of a key.
        gpu_share: The part of the GPUs that the engine takes. None leaves it to vLLM.
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
        observer: EngineObserver | None = None,
        cache: SharedWeightCache | None = None,
        secrets: Collection[str] = (),
        gpu_share: GpuShare | None = None,
    ) -> None:
        self._share = EngineShare(cache) if cache is not None else None
        model = VllmModel(
            first, weights[first].folder, {}, pooling_runner=weights[first].pooling_runner
        )
        super().__init__(
            model,
            options,
            on_cpu=on_cpu,
            observer=observer,
            secrets=secrets,
            gpu_share=gpu_share,
        )
        self._weights = weights
        self._first = first
        self._canary_every = canary_interval
        self._canaries = canaries
        # What each expert said to this engine, on a GPU.
        self._own_canaries: dict[str, Canary] = {}
        self._on_cpu = on_cpu
        self._swaps: dict[str, int] = {}
        self._frontends: dict[str, _Frontend] = {}
        # The versions of the files that each expert's weights were read from.
        self._versions: dict[str, str] = {}
        # The same of what the workers hold or still load, also where the load was given up.
        self._begun: dict[str, str] = {}
        self._own_digest = ""
        self._broken: str | None = None
        # The expert whose weights are in the model, or None where a check of them failed.
        self._running: str | None = None
        self._poll_s = _POLL_S if on_cpu else _GPU_POLL_S
        # A GPU engine installs the gate rules before it captures graphs. A CPU engine installs
        # them at a swap.
        self._uses_graph_steering = not on_cpu
        self._places = 0
        # The expert whose weights must stay in the model, if any.
        self._fixed = ""

    @property
    def swappable_experts(self) -> frozenset[str]:
        """The experts that this engine can run without a restart."""
        # The copy is needed because another thread may add and remove experts.
        return frozenset(name for name, w in tuple(self._weights.items()) if self._can_run(name, w))

    def _can_run(self, expert: str, weights: Weights) -> bool:
        if weights.fault:
            return True  # no engine can run it, so every request gets the error here
        base = weights.steering.base if weights.steering is not None else expert
        if self._fixed and base != self._fixed:
            return False
        return not self._uses_graph_steering or weights.places <= self._places

    def failure(self) -> str | None:
        return self._broken or super().failure()

    def _launch_settings(self) -> LaunchSettings:
        settings = super()._launch_settings()
        on_gpu = self._uses_graph_steering
        settings.worker_extension_cls = _PINNED_EXTENSION if on_gpu else _SWAP_EXTENSION
        self._places = max(weights.places for weights in tuple(self._weights.values()))
        if on_gpu and self._places:
            settings.worker_cls = GRAPH_STEERING_WORKER
            settings.additional_config[PLACES_KEY] = self._places
        if (merged := self._merged_first) is not None:
            settings.worker_cls = _MERGED_WORKER
            settings.additional_config[MERGED_KEY] = {
                "folder": merged.adapter,
                "strength": merged.strength,
            }
        return settings

    @property
    def _merged_first(self) -> Weights | None:
        """The first expert's weights, if they need an adapter merged while they are loaded."""
        first = self._weights[self._first]
        return first if first.adapter is not None and not self._uses_graph_steering else None

    async def _start(self) -> EngineReport:
        merged = self._merged_first
        source = merged or Weights(self._model.path)
        before = await self._version_of(source)
        self._own_digest = await asyncio.to_thread(tokenizer_digest, self._model.path)
        if merged is not None:
            await asyncio.to_thread(_check_merged, self._first, merged)
        report = await super()._start()
        if await self._version_of(source) != before:
            raise ExpertFailedError(_files_changed(self._first), retry_after_s=30)
        plain = [
            name
            for name, w in self._weights.items()
            if w.is_plain and w.folder == self._weights[self._first].folder
        ]
        own = merged is not None or self._first in plain
        adopted = self._first if own else next(iter(plain), "")
        self._versions[adopted] = self._begun[adopted] = before
        self._running = adopted
        await self._share_weights(adopted)
        if why := await self.worker_rpc("coe_register_initial", adopted):
            log.info("in-place swap disabled for %s: %s", adopted, why)
            self._fixed = adopted
        if adopted != self._first:
            await self.load_to_host(self._first)
            if not (await self.swap_in(self._first)).ok:
                raise ExpertFailedError(_files_changed(self._first), retry_after_s=30)
            # The pool counts the held bytes of the first unit, too.
            await self.evict(adopted)
        else:
            source = self._weights[self._first]
            self._frontends[self._first] = _Frontend(
                super()._app_for(self._first), source, before, self.vllm.rendering
            )
            if not await self.check_canary(self._first):
                raise ExpertFailedError(
                    f"expert {self._first!r} answers differently than when it was first loaded"
                )
        return report

    def _app_for(self, expert: str) -> OpenAiApp:
        return self._frontends[expert].app

    async def load_to_host(self, expert: str) -> LoadResult:
        source = self._weights[expert]
        if source.fault:
            raise ExpertFailedError(source.fault, retry_after_s=30)
        if source.steering is not None:
            began_s = time.monotonic()
            size = await self.worker_rpc("coe_steer", expert, asdict(source.steering))
            # A virtual expert runs on the held weights, even if the base's files have changed.
            rules = hashlib.sha256(repr(source.steering).encode()).hexdigest()[:24]
            base = self._versions.get(source.steering.base, "")
            self._versions[expert] = f"{base}-{rules}"
            await self._load_frontend_or_evict(expert, source)
            return LoadResult(int(size), time.monotonic() - began_s)
        # The workers go on with what an earlier call has begun, from the files of that time.
        version = self._begun.setdefault(expert, await self._version_of(source))
        await self._share_weights(expert)
        await self.worker_rpc(
            "coe_load_to_host", expert, source.folder, source.adapter, source.strength
        )
        result = await self.worker_rpc("coe_load_result", expert)
        reason = result.get("reason")
        while result["state"] == "loading" or result.get("others_load"):
            await asyncio.sleep(self._poll_s)  # the other process offers no event to await
            result = await self.worker_rpc("coe_load_result", expert)
            reason = reason or result.get("reason")
        if result["state"] != "host":
            # Where one rank failed, others may hold their parts, which nobody would count.
            await self.worker_rpc("coe_evict", expert, False)
            self._begun.pop(expert, None)
            await self._release_weights(expert)
            reason = reason or "its weights went away while they were loaded"
            raise ExpertFailedError(
                f"expert {expert!r} could not be loaded: {reason}", retry_after_s=30
            )
        if await self._version_of(source) != version:
            # The weights may come partly from the old files and partly from the new files.
            await self.evict(expert)
            raise ExpertFailedError(_files_changed(expert), retry_after_s=30)
        self._versions[expert] = version
        await self._load_frontend_or_evict(expert, source)
        return LoadResult(
            int(result["host_bytes"]),
            float(result["fill_s"]),
            stall_s=float(result["stall_s"]),
            layer_room_ratio=float(result["layer_room_ratio"]),
        )

    async def swap_in(self, expert: str) -> SwapResult:
        """Run an expert whose weights are in host memory. No request may be running.

        A swap that fails puts the old expert's weights back and checks them. Where that fails, too,
        the engine is broken.
        """
        began_s = time.monotonic()
        if (frontend := self._frontends.get(expert)) is None:
            raise ExpertFailedError(f"the weights of {expert!r} are not held")
        settled = False
        try:
            await self._call_core(self.vllm.pause())
            result = await self._move_weights(expert)
            if "error" not in result:
                # No request is running, because the engine is paused.
                self.vllm.use_rendering(frontend.rendering)
                if self._stats is not None:
                    self._stats.running = expert
            await self._call_core(self.vllm.resume())
            settled = True
        except Exception as error:
            if isinstance(error, CoeError):
                raise
            raise self._fault(f"expert {expert!r} could not be swapped in", error) from error
        finally:
            if not settled and self.failure() is None:  # after a cancellation, too
                # The engine may hold parts of both experts, so it must not answer any more.
                self._broken = _HALF_DONE
        if "error" in result:
            raise ExpertFailedError(
                f"expert {expert!r} could not be swapped in: {result['error']}", retry_after_s=5
            )
        swap_s = time.monotonic() - began_s
        self._running = expert
        count = self._swaps[expert] = self._swaps.get(expert, 0) + 1
        ok = bool(result["ok"])
        if ok and (count % self._canary_every == 0 or count == 1):
            try:
                ok = await self.check_canary(expert)
            except BaseException:
                # The caller will take the old expert for the running one.
                self._broken = self._broken or f"expert {expert!r} can't answer its canary"
                raise
        if not ok:
            self._running = None
        return SwapResult(swap_s, ok, str(result["method"]))

    async def _move_weights(self, expert: str) -> dict[str, Any]:
        """Put an expert's weights into the model, or else the old expert's weights back.

        Returns:
            The workers' result. With an `error` in it, the old expert's weights are in place.

        Raises:
            EngineDeadError: Neither expert's weights are certain to be in place.
        """
        async with asyncio.timeout(_SWAP_TIMEOUT_S):
            result: dict[str, Any] = await self.worker_rpc("coe_swap_in", expert)
            if "error" in result and not result["unchanged"]:
                log.error("swap to %s failed: %s", expert, result["error"])
                restored = self._running is not None and (
                    await self.worker_rpc("coe_swap_in", self._running)
                )
                if not restored or "error" in restored or not restored["ok"]:
                    self._broken = _HALF_DONE
                    raise EngineDeadError(f"{_HALF_DONE}: {result['error']}")
        return result

    async def run(self, request: EngineRequest, send: Send) -> None:
        if request.expert != self._running:
            raise EngineRestartingError(f"the weights of {request.expert!r} are not in the model")
        await super().run(request, send)

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        if await self.worker_rpc("coe_evict", expert, for_next):
            self._begun.pop(expert, None)
        await self._release_weights(expert)

    async def _version_of(self, source: Weights) -> str:
        """Return the present version of the files that weights are read from.

        Raises:
            ExpertFailedError: The files can't be read.
        """
        try:
            return await asyncio.to_thread(
                version_of, source.folder, source.adapter, source.strength
            )
        except OSError as error:
            why = f"the files in {source.folder} can't be read: {error}"
            raise ExpertFailedError(why, retry_after_s=30) from error

    async def _share_weights(self, expert: str) -> None:
        """Send the workers the path in shared memory for an expert's weights."""
        if self._share is not None:
            source = self._weights.get(expert, Weights(self._model.path))
            path, token = await asyncio.to_thread(
                self._share.acquire, expert, source.folder, source.adapter, source.strength
            )
            await self.worker_rpc("coe_share", expert, path, token)

    async def _release_weights(self, expert: str) -> None:
        if self._share is not None:
            delay_s = await asyncio.to_thread(self._share.release, expert)
            self._sweep_in(delay_s, self._share)

    def _sweep_in(self, delay_s: float, share: EngineShare) -> None:
        loop = asyncio.get_running_loop()
        loop.call_later(delay_s, loop.run_in_executor, None, share.sweep)

    async def stop(self) -> None:
        """Stop the core process. Its shared weights stay for a while for the next engine."""
        await super().stop()
        if self._share is not None:
            self._sweep_in(await asyncio.to_thread(self._share.release_all), self._share)

    async def memory(self) -> dict[str, int]:
        """Return the core's `resident_bytes`, and the `host_bytes` of all held experts."""
        memory: dict[str, int] = await self.worker_rpc("coe_memory")
        return memory

    async def worker_rpc(self, method: str, *args: object) -> Any:
        try:
            return _merge_rank_results(await self._call_core(self._call_workers(method, *args)))
        except CoeError:
            raise
        except Exception as error:
            raise self._fault(f"{method} failed", error) from error

    async def _call_core(self, call: Awaitable[_T]) -> _T:
        """Await a call to the core. vLLM never completes the call if the core dies meanwhile.

        Raises:
            EngineDeadError: The core has died.
        """
        task = asyncio.ensure_future(call)
        try:
            while not (await asyncio.wait({task}, timeout=_CHECK_ALIVE_S))[0]:
                if (why := self.failure()) is not None:
                    raise EngineDeadError(f"the engine died: {why}")
            return task.result()
        finally:
            task.cancel()

    def _fault(self, what: str, error: Exception) -> CoeError:
        if (why := self.failure()) is not None:
            return EngineDeadError(f"{what}: the engine died: {why}")
        return ExpertFailedError(f"{what}: {first_line(error)}", retry_after_s=5)

    # --- the token canary

    async def check_canary(self, expert: str) -> bool:
        """Return whether an expert still answers a fixed prompt as it did at its first load.

        The first load of each version of its files records the answer. On a GPU, the first answer
        to each engine is compared loosely with it, and later answers strictly with that one.
        """
        body: dict[str, object] = {"model": expert}
        if self.vllm.generates:
            path = "/v1/completions"
            body |= {
                "prompt": self._canary_prompt(),
                "max_tokens": _CANARY_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                "logprobs": 1,
            }
        else:
            path = "/v1/embeddings"
            body["input"] = self._canary_prompt()
            if "/v1/classify" in self.vllm.pooling_endpoints:
                path = "/v1/classify"
                # Probabilities near 0 or 1 would hide differences.
                body["use_activation"] = False
        parts: list[bytes] = []

        async def collect(message: Message) -> None:
            parts.append(message.get("body", b""))

        request = EngineRequest(
            path,
            expert,
            orjson.dumps(body),
            f"{CANARY}{time.monotonic_ns()}",
        )
        await super().run(request, collect)  # it also runs while the weights are in doubt
        try:
            tokens, values = _canary_answer(orjson.loads(b"".join(parts)))
        except (orjson.JSONDecodeError, KeyError, IndexError):
            self._broken = f"expert {expert!r} can't answer its canary"
            raise ExpertFailedError(self._broken, retry_after_s=30) from None
        version = self._versions.get(expert, "")
        kept = self._canaries.get(expert)
        if kept is None or kept.version != version:
            if kept is not None:
                log.info("expert %s: its files have changed since its last load", expert)
            answer = orjson.dumps([tokens, values]).decode()
            kept = self._canaries[expert] = Canary(version, answer)
        own = self._own_canaries.get(expert)
        if self._on_cpu or (own is not None and own.version == version):
            recorded = kept if self._on_cpu or own is None else own
            return answers_agree(orjson.loads(recorded.answer), (tokens, values))
        answer = orjson.dumps([tokens, values]).decode()
        self._own_canaries[expert] = Canary(version, answer)
        return answers_agree(orjson.loads(kept.answer), (tokens, values), other_engine=True)

    def _canary_prompt(self) -> list[int]:
        """Return a few tokens that every vocabulary has and that leave room for the answer."""
        room = self.vllm.max_model_len - _CANARY_TOKENS
        return [token % self.vllm.vocab_size for token in _CANARY_PROMPT][: max(1, room)]

    # --- the OpenAI layers of experts

    async def _load_frontend_or_evict(self, expert: str, source: Weights) -> None:
        """Build an expert's OpenAI layer. Evict its weights if its tokenizer can't be loaded."""
        try:
            await self._load_frontend(expert, source)
        except Exception as error:
            await self.evict(expert)
            if isinstance(error, CoeError):
                raise
            raise self._fault(f"expert {expert!r} could not be loaded", error) from error

    async def _load_frontend(self, expert: str, source: Weights) -> None:
        frontend = self._frontends.get(expert)
        version = self._versions.get(expert, "")
        if frontend is None or frontend.source != source or frontend.version != version:
            rendering = await self._load_rendering(expert, source.folder)
            app = await self.vllm.openai_app(expert, rendering)
            self._frontends[expert] = _Frontend(app, source, version, rendering)

    async def _load_rendering(self, expert: str, folder: str) -> Rendering:
        """Return the engine's tokenizer if the expert has the same, or else load the expert's."""
        if await asyncio.to_thread(tokenizer_digest, folder) == self._own_digest:
            await self.worker_rpc("coe_load_tokenizer", expert, "")
            return self.vllm.rendering
        # The core needs this tokenizer, too, because it compiles grammars.
        await self.worker_rpc("coe_load_tokenizer", expert, folder)
        fault = await self.worker_rpc("coe_tokenizer_fault", expert)
        while fault is None:  # the other process offers no event to await
            await asyncio.sleep(_POLL_S)
            fault = await self.worker_rpc("coe_tokenizer_fault", expert)
        if fault:
            raise ExpertFailedError(f"the tokenizer of expert {expert!r} can't be read: {fault}")
        return await self.vllm.load_rendering(folder)


def _check_merged(expert: str, source: Weights) -> None:
    """Check that an adapter can be merged. A core that fails would give no reason.

    Raises:
        ExpertFailedError: The adapter can't be merged.
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


def _files_changed(expert: str) -> str:
    return f"the files of expert {expert!r} changed while they were loaded"


def answers_agree(
    recorded: tuple[list[int], list[float]],
    answer: tuple[list[int], list[float]],
    *,
    other_engine: bool = False,
) -> bool:
    """Return whether two answers to a canary, as of `_canary_answer`, are of the same weights.

    Args:
        recorded: The recorded answer.
        answer: The new answer.
        other_engine: Whether another engine on a GPU gave the recorded answer. Then two tokens of
            nearly equal odds may have changed places, and what follows them proves nothing.
    """
    tolerance = _OTHER_ENGINE_TOLERANCE if other_engine else _TOLERANCE
    (first_tokens, first_values), (tokens, values) = recorded, answer
    if not first_tokens and not tokens:
        return math.dist(first_values, values) < tolerance * math.hypot(*first_values)
    for first, token, before, now in zip(first_tokens, tokens, first_values, values, strict=True):
        if abs(before - now) >= tolerance:
            return False
        if first != token:
            # Of two tokens with equal odds, neither has more than half.
            return other_engine and max(before, now) < math.log(0.5) + tolerance
    return True


def _canary_answer(reply: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Return the tokens of a reply and their log probabilities, or no tokens and a vector.

    The vector is an embedding, or a classifier's values of all classes.

    Experts of one family often give the same first tokens. The probabilities distinguish them.

    Raises:
        KeyError, IndexError: The reply has neither tokens nor a vector.
    """
    if "data" in reply:
        first = reply["data"][0]
        return [], first["probs"] if "probs" in first else first["embedding"]
    choice = reply["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def _merge_rank_results(answers: list[Any]) -> Any:
    """Merge the results of all ranks: the least progress, the worst status, and sums of bytes."""
    results = [answer for answer in answers if isinstance(answer, dict)]
    states = {result.get("state") for result in results}
    for state in ("failed", "loading", "disk"):
        for result in results:
            if result.get("state") == state:
                # A failure is reported once, and the other ranks' loads can't be stopped.
                others_load = state == "failed" and "loading" in states
                return {**result, "others_load": True} if others_load else result
    for result in results:
        if "error" in result:
            # A rank that did swap has other weights than before, too.
            unchanged = all(result.get("unchanged", False) for result in results)
            return {**result, "unchanged": unchanged}
    for result in results:
        if result.get("ok") is False:
            return result
    if results and all(result.get("state") == "host" for result in results):
        # The bytes add up, because each rank holds its own part.
        host_bytes = sum(int(result["host_bytes"]) for result in results)
        worst = ("fill_s", "stall_s", "layer_room_ratio")
        most = {key: max(result[key] for result in results) for key in worst}
        return {**results[0], "host_bytes": host_bytes, **most}
    return answers[0]
