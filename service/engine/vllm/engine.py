"""The vLLM engine: an `AsyncLLM` in this process, answering through vLLM's own OpenAI layer.

Requests go into vLLM's ASGI application without a socket in between. vLLM's EngineCore is a child
process of this process. All calls of vLLM go through `service.engine.vllm.async_llm_handle`.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from service.config import VllmOptions
from service.engine.audio_upload import audio_upload
from service.engine.cache_salt import set_cache_salt
from service.engine.deferred_response_start import DeferredStartSend
from service.engine.engine_interface import (
    EngineObserver,
    EngineReport,
    EngineRequest,
    LoadResult,
    Message,
    Send,
    SwapResult,
)
from service.engine.gpu_share import GpuShare
from service.engine.steering_data import OFFLOAD_KEY, RECORD_CHOICES_KEY
from service.engine.thinking_budget import set_thinking_budget
from service.engine.vllm.async_llm_handle import (
    INPUT_TOKENS,
    AdapterError,
    LaunchSettings,
    OpenAiApp,
    VllmHandle,
    track_request_ids,
    watch_refusal,
)
from service.engine.vllm.expert_stats import EngineStats
from service.engine.vllm.grammar_trials import GrammarTrials
from service.engine.vllm.routing_stats_poller import RoutingStatsPoller
from service.errors import (
    BodyTooLargeError,
    EngineDeadError,
    EngineRestartingError,
    ExpertFailedError,
    OverCapacityError,
)
from service.http.prompt_endpoints import AUDIO, UPSTREAM_PATHS
from service.models.model_store import model_root

GENERATE_ENDPOINTS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        INPUT_TOKENS,
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    }
)
# vLLM writes all tokens of a text into one reply, which blocks the event loop.
_TOKEN_ENDPOINTS = frozenset({"/tokenize", "/detokenize"})
_MAX_TOKENIZE_BYTES = 4 * 1024 * 1024
_CAPTURE_EXTENSION = "service.engine.vllm.worker.gate_capture.CaptureExtension"
_OFFLOAD_WORKER = "service.engine.vllm.worker.offload_worker.OffloadWorker"
# In the model store, hidden from its list.
PACKED_EXPERTS = ".packed-experts"
GRAPH_STEERING_WORKER = "service.engine.vllm.worker.gpu_worker.GraphSteeringWorker"


@dataclass(frozen=True, slots=True)
class VllmModel:
    """The weights to load.

    Attributes:
        name: The name of the base expert.
        path: The folder of its weights.
        adapters: The folders of LoRA adapters by expert.
        pooling_runner: Whether the model makes vectors, scores or classes, even if its
            architecture could make text.
        spare_adapters: Room for adapters that are loaded while the engine runs.
    """

    name: str
    path: str
    adapters: dict[str, str]
    pooling_runner: bool = False
    spare_adapters: int = 0

    @property
    def adapter_room(self) -> int:
        """The number of adapters that the engine is started for."""
        return len(self.adapters) + self.spare_adapters


class VllmEngine:
    """One base and its adapters on one `AsyncLLM`.

    Args:
        model: The weights to load.
        options: The pool's `vllm` section.
        on_cpu: Whether the engine computes on the CPU.
        observer: Receives the engine's statistics, if any.
        sleep_level: 1 where a sleeping engine keeps its weights in host memory, 2 where it reads
            them again, 0 where it can't sleep.
        secrets: Environment variables that the core must not inherit, in addition to variables
            with the name of a key.
        gpu_share: The part of the GPUs that the engine takes. None leaves it to vLLM.
    """

    def __init__(
        self,
        model: VllmModel,
        options: VllmOptions,
        *,
        on_cpu: bool,
        observer: EngineObserver | None = None,
        sleep_level: int = 0,
        secrets: Collection[str] = (),
        gpu_share: GpuShare | None = None,
    ) -> None:
        self._gpu_share = gpu_share
        self._model = model
        self._secrets = secrets
        self._sleep_level = sleep_level
        self._options = options
        self._on_cpu = on_cpu
        self._stats = EngineStats(observer, model.name) if observer is not None else None
        capture = options.moe_capture
        self._routing_stats = (
            RoutingStatsPoller(self.worker_rpc, observer, capture)
            if observer is not None and capture
            else None
        )
        # Captured graphs call no Python function, so the gates write their choices to a buffer. On
        # a GPU the model runner tells whose tokens a step has only after the step.
        self._records_choices = not on_cpu
        self._handle: VllmHandle | None = None
        self._app: OpenAiApp | None = None
        # How often each adapter was unloaded.
        self._unloaded: Counter[str] = Counter()
        self._stopped = False
        self._trials = GrammarTrials()

    @property
    def vllm(self) -> VllmHandle:
        """The running vLLM.

        Raises:
            EngineDeadError: The engine has not started, or has stopped.
        """
        if self._handle is None:
            raise EngineDeadError(
                f"the engine is not running: {self.failure() or 'it was not started'}"
            )
        return self._handle

    def _launch_settings(self) -> LaunchSettings:
        settings = LaunchSettings(
            model=self._model.path,
            served_name=self._model.name,
            options=self._options,
            on_cpu=self._on_cpu,
            enforce_eager=self._options.enforce_eager,
            pooling_runner=self._model.pooling_runner,
            adapters=self._model.adapter_room,
            sleep=self._sleep_level > 0,
            gpu_share=self._gpu_share,
        )
        if (offload := self._options.expert_offload) is not None:
            settings.worker_cls = _OFFLOAD_WORKER
            settings.additional_config[OFFLOAD_KEY] = {
                "bytes": offload.bytes,
                "policy": offload.policy,
                "prefetch": offload.prefetch,
                "folder": str(model_root() / PACKED_EXPERTS),
            }
        if self._routing_stats is not None:
            settings.worker_extension_cls = _CAPTURE_EXTENSION
            if self._records_choices:
                settings.worker_cls = GRAPH_STEERING_WORKER
                settings.additional_config[RECORD_CHOICES_KEY] = True
        return settings

    async def start(self) -> EngineReport:
        """Start the engine core and vLLM's OpenAI layer.

        Raises:
            ExpertFailedError: vLLM could not start.
        """
        try:
            report = await self._start()
            if self._routing_stats is not None:
                await self._routing_stats.start(self._model.name, self.swappable_experts)
            return report
        except Exception as error:
            await self.stop()
            raise ExpertFailedError(first_line(error), retry_after_s=30) from error

    async def _start(self) -> EngineReport:
        try:
            self._handle = await VllmHandle.start(
                self._launch_settings(), self._trials, self._stats, self._secrets
            )
        except asyncio.CancelledError:
            await self.stop()
            raise
        handle = self._handle
        self._app = await handle.openai_app(self._model.name)
        # Otherwise every full garbage collection visits all objects of torch and vLLM in 0.4 s.
        await asyncio.to_thread(gc.collect)
        gc.freeze()
        if handle.generates:
            await self._trials.start(handle.vocabulary)
        return EngineReport(
            engine="vllm",
            max_model_len=handle.max_model_len,
            endpoints=handle.listening_endpoints
            | (GENERATE_ENDPOINTS if handle.generates else handle.pooling_endpoints),
            details=handle.details,
        )

    def _tokens_so_far(self, vllm_ids: list[str]) -> tuple[int, int]:
        """Return the numbers of prompt tokens and of answer tokens so far of one call."""
        prompt = answer = 0
        for vllm_id in vllm_ids:
            prompt_tokens, answer_tokens = self.vllm.unfinished_tokens(vllm_id)
            prompt += prompt_tokens
            answer += answer_tokens
            if self._stats is not None:
                answer += self._stats.finished_tokens(vllm_id)
        return prompt, answer

    def _app_for(self, expert: str) -> OpenAiApp:
        """Return the application that answers for an expert. The adapters share the base's.

        `SwappingVllmEngine` has one for each expert.
        """
        if self._app is None:
            raise EngineRestartingError(f"the engine of expert {expert!r} has not been started")
        return self._app

    async def load(self, expert: str, adapter: str | None = None) -> None:
        if expert == self._model.name:
            return
        if not self._model.adapter_room:
            raise ExpertFailedError(
                f"the engine of {self._model.name!r} was started without adapters", retry_after_s=30
            )
        folder = self._model.adapters[expert] if adapter is None else adapter
        # vLLM caches prefixes by an adapter's name and path. An adapter that is loaded again may
        # have other weights, so its path is then written in another way.
        path = folder + "/." * self._unloaded[expert]
        try:
            await self._app_for(expert).load_adapter(expert, path)
        except AdapterError as error:
            raise ExpertFailedError(first_line(error), retry_after_s=30) from None

    async def unload(self, expert: str) -> None:
        if not self._model.adapter_room:
            return  # nothing was loaded
        try:
            unloaded = await self._app_for(expert).unload_adapter(expert)
        except AdapterError as error:
            raise ExpertFailedError(first_line(error), retry_after_s=30) from None
        self._unloaded[expert] += unloaded

    @property
    def swappable_experts(self) -> frozenset[str]:
        """Only the expert that the engine was started with, because its weights stay."""
        return frozenset({self._model.name})

    async def load_to_host(self, expert: str) -> LoadResult:
        raise ExpertFailedError(f"this engine can't hold {expert!r} beside what it runs")

    async def swap_in(self, expert: str) -> SwapResult:
        raise ExpertFailedError(f"this engine can't take the weights of {expert!r}")

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Do nothing, because the engine holds only the running expert."""

    async def run(self, request: EngineRequest, send: Send) -> None:
        if (why := self.failure()) is not None:
            raise EngineRestartingError(f"the engine of expert {request.expert!r} died: {why}")
        if request.endpoint in _TOKEN_ENDPOINTS and len(request.body) > _MAX_TOKENIZE_BYTES:
            raise BodyTooLargeError(
                f"{request.endpoint} takes at most {_MAX_TOKENIZE_BYTES} bytes; "
                f"the body has {len(request.body)}"
            )
        kind, body = "application/json", request.body
        if request.endpoint == AUDIO:
            upload = await asyncio.to_thread(audio_upload, body, request.expert)
            kind, body = upload.content_type, upload.body
        else:
            await self._trials.check_body(body, request.tenant)
        # vLLM sends 200 before it has an answer; this send holds it until the first bytes.
        reply = DeferredStartSend(send)
        asgi = _AsgiRequest(request, kind, body)
        if self._stats is not None:
            self._stats.add_request(request.request_id, request.counted_as)
        # Four context variables: vLLM's handlers run in this task and in tasks that they start.
        set_cache_salt(request.cache_salt)
        set_thinking_budget(request.endpoint, request.body)
        refusal = watch_refusal()
        vllm_ids = track_request_ids()
        # vLLM's own OpenAI app. It calls `SaltingEngineClient.generate` in `async_llm_handle.py`,
        # and that calls `AsyncLLM.generate`.
        app = self._app_for(request.expert)
        task = asyncio.ensure_future(app(asgi.scope, asgi.receive, reply))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._handle is not None:
                request.on_abandoned(*self._tokens_so_far(vllm_ids))
            # vLLM runs handlers in separate tasks. It stops them only when it reads that the
            # client has left, and then it sends no answer.
            reply.discard()
            asgi.gone.set()
            with contextlib.suppress(BaseException):
                async with asyncio.timeout(5):
                    await task
            raise
        except Exception:
            if refusal.error is None:
                raise
            # `_Reply.fail` of rpc/pool_asgi_app.py ends a started stream with this error.
            raise refusal.error from None
        finally:
            if self._routing_stats is not None:
                self._routing_stats.has_news = True
        if refusal.error is not None and reply.failed:
            raise refusal.error
        if reply.error is not None:
            if reply.error[0] >= 500 and self.failure() is not None:
                raise EngineDeadError(f"the engine of expert {request.expert!r} died")
            if reply.error[0] == HTTPStatus.SERVICE_UNAVAILABLE:
                raise OverCapacityError(f"the engine of expert {request.expert!r} is overloaded")
            await reply.send_error()
        elif not reply.started:
            raise EngineDeadError(
                f"the engine of expert {request.expert!r} ended without an answer"
            )

    async def sleep(self) -> None:
        await self.vllm.sleep(self._sleep_level)

    async def wake(self) -> None:
        await self.vllm.wake(self._sleep_level)

    def failure(self) -> str | None:
        """Return why the engine is dead, or None."""
        if self._stopped:
            return "it was stopped"
        if self._handle is not None and self._handle.errored:
            return "its core process ended"
        return None

    async def in_flight(self) -> int:
        """Return the number of vLLM's unfinished requests."""
        if self._handle is None or self.failure() is not None:
            return 0  # vLLM still counts the requests of a dead core
        return self._handle.unfinished_requests()

    async def worker_rpc(self, method: str, *args: object) -> Any:
        """Call a method of the worker extension, and return the first rank's result.

        Raises:
            ExpertFailedError: The method failed in a worker.
        """
        return (await self._call_workers(method, *args))[0]

    async def _call_workers(self, method: str, *args: object) -> list[Any]:
        """Call a method of the worker extension, and return the result of each rank.

        Raises:
            ExpertFailedError: The method failed in a worker.
        """
        results = await self.vllm.collective_rpc("coe_call", method, *args)
        for result in results:
            if "error" in result:
                raise ExpertFailedError(f"{method} failed: {first_line(result['error'])}")
        return [result["answer"] for result in results]

    async def stop(self) -> None:
        """Stop the core process."""
        await self._trials.stop()
        gc.unfreeze()  # so that this engine's objects can be collected
        if self._routing_stats is not None:
            await self._routing_stats.stop(poll=self._handle is not None and self.failure() is None)
        self._stopped = True
        handle, self._handle = self._handle, None
        if handle is not None:
            await handle.shutdown()


class _AsgiRequest:
    """One request as an ASGI scope and receive channel."""

    def __init__(self, request: EngineRequest, content_type: str, body: bytes) -> None:
        self.gone = asyncio.Event()
        self._body: bytes | None = body
        path = UPSTREAM_PATHS.get(request.endpoint, request.endpoint)
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [
                (b"content-type", content_type.encode()),
                (b"content-length", str(len(body)).encode()),
                (b"x-request-id", request.request_id.encode()),
            ],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
            "state": {},
        }

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


def first_line(error: object) -> str:
    """Return the first line of an error's text, without a traceback."""
    if isinstance(error, BaseException):
        chain: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        error = str(chain[0]) or type(chain[0]).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "it could not be loaded")[:500]
