"""The vLLM engine: an `AsyncLLM` in this process, answered through vLLM's own OpenAI layer.

What begins with `service.engine.vllm.engine` is all that imports vllm. Requests go
into vLLM's ASGI application without a socket in between; its EngineCore is a child
process of this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from argparse import Namespace
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from service.config import VllmOptions
from service.engine.base import (
    EngineObserver,
    EngineReport,
    EngineRequest,
    LoadResult,
    Message,
    Send,
    SwapResult,
)
from service.engine.cache_salt import CACHE_SALT
from service.engine.deferred_start import DeferredStartSend
from service.engine.scoped_env import TUNED, scoped_env, without_secrets
from service.engine.steering_spec import NOTES
from service.engine.vllm.checked_client import BACKEND, GrammarTrials, llm_class, watch_refusal
from service.engine.vllm.frontend import REQUEST_IDS, EngineClient
from service.engine.vllm.routing_stats_poller import RoutingStatsPoller
from service.engine.vllm.stats import EngineStats
from service.errors import (
    BodyTooLargeError,
    EngineDeadError,
    EngineRestartingError,
    ExpertFailedError,
    OverCapacityError,
)

GENERATE_ENDPOINTS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
    }
)
POOLING_ENDPOINTS = frozenset({"/v1/embeddings", "/tokenize", "/detokenize"})
# vLLM writes all tokens of a text into one reply, on the event loop.
_TOKEN_ENDPOINTS = frozenset({"/tokenize", "/detokenize"})
_MOST_TO_TOKENS = 4 * 1024 * 1024
_CAPTURE = "service.engine.vllm.worker.capture.CaptureExtension"
STANDING = "service.engine.vllm.worker.gpu_worker.StandingWorker"


@dataclass(frozen=True, slots=True)
class VllmModel:
    """What to load: the base expert's name and folder, and adapters' folders by expert.

    `embeds`: it makes vectors, not text, whatever its architecture could do.
    """

    name: str
    path: str
    adapters: dict[str, str]
    embeds: bool = False


class VllmEngine:
    """One base and its adapters on one `AsyncLLM`.

    `sleep_level`: how deep it can sleep: 1 keeps its weights in host memory, 2 reads them
    again; 0: not at all. `secrets`: environment variables that its core need not inherit, beside
    those that look like keys.
    """

    def __init__(
        self,
        model: VllmModel,
        options: VllmOptions,
        *,
        on_cpu: bool,
        watch: EngineObserver | None = None,
        sleep_level: int = 0,
        secrets: Collection[str] = (),
    ) -> None:
        self._model = model
        self._secrets = secrets
        self._sleep_level = sleep_level
        self._options = options
        self._on_cpu = on_cpu
        self._stats = EngineStats(watch, model.name) if watch is not None else None
        capture = options.moe_capture
        self._routers = (
            RoutingStatsPoller(self._rpc, watch, capture) if watch is not None and capture else None
        )
        # Captured graphs call nobody who looks on: they write down what he would see.
        self._notes = not on_cpu and not options.enforce_eager
        self._llm: Any = None
        self._app: Any = None
        self._args = Namespace()
        # How often each adapter was unloaded.
        self._unloaded: Counter[str] = Counter()
        self._stopped = False
        self._trials = GrammarTrials()

    def _frontend_args(self) -> Namespace:
        from vllm.config import StructuredOutputsConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        options = self._options
        args: Namespace = make_arg_parser(FlexibleArgumentParser()).parse_args([])
        args.model = self._model.path
        args.model_tag = None
        args.served_model_name = [self._model.name]
        args.dtype = options.dtype
        args.max_model_len = options.max_model_len
        args.max_num_seqs = options.max_num_seqs
        args.enforce_eager = options.enforce_eager
        args.tensor_parallel_size = options.tensor_parallel_size
        args.trust_remote_code = options.trust_remote_code
        if self._model.embeds:
            args.runner = "pooling"
        args.load_format = "safetensors"  # never pickle
        args.moe_backend = options.moe_backend
        args.enable_expert_parallel = options.enable_expert_parallel
        args.expert_placement_strategy = options.expert_placement_strategy
        args.enable_eplb = options.enable_eplb
        args.eplb_config = options.eplb_config.model_dump()
        # An empty list would mean any host: a request must not make us fetch things.
        args.allowed_media_domains = list(options.media_domains) or ["none.invalid"]
        args.structured_outputs_config = StructuredOutputsConfig(backend=BACKEND)
        args.max_num_queued_reqs = options.max_num_queued_reqs
        args.disable_log_stats = False
        args.enable_log_requests = False
        args.disable_fastapi_docs = True
        if self._sleep_level:
            args.enable_sleep_mode = True
        if options.kv_cache_bytes is not None:
            args.kv_cache_memory_bytes = options.kv_cache_bytes
        if self._on_cpu:
            args.distributed_executor_backend = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
        if self._routers is not None:
            args.worker_extension_cls = _CAPTURE
            if self._notes:
                args.worker_cls = STANDING
                args.additional_config = {NOTES: True}
        if self._model.adapters:
            args.enable_lora = True
            args.max_lora_rank = options.max_lora_rank
            args.max_loras = len(self._model.adapters)
            args.max_cpu_loras = len(self._model.adapters)
        if options.tool_call_parser is not None:
            args.tool_call_parser = options.tool_call_parser
            args.enable_auto_tool_choice = True
        if options.reasoning_parser is not None:
            args.reasoning_parser = options.reasoning_parser
        # Fails here, by name, if a vLLM release has dropped one of the above.
        AsyncEngineArgs.from_cli_args(args)
        return args

    async def start(self) -> EngineReport:
        """Start the engine core and vLLM's OpenAI layer. Raises ExpertFailedError."""
        try:
            report = await self._start()
            if self._routers is not None:
                await self._routers.begin(self._model.name, self.swappable_experts)
            return report
        except Exception as error:
            await self.stop()
            raise ExpertFailedError(first_line(error), retry_after_s=30) from error

    async def _start(self) -> EngineReport:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext

        args = self._args = self._frontend_args()

        def build() -> Any:
            engine_args = AsyncEngineArgs.from_cli_args(args)
            context = UsageContext.OPENAI_API_SERVER
            with (
                without_secrets(self._secrets),
                scoped_env(TUNED, self._options.tuned_config_folder),
            ):
                return llm_class(self._trials).from_vllm_config(
                    vllm_config=engine_args.create_engine_config(usage_context=context),
                    usage_context=context,
                    enable_log_requests=False,
                    disable_log_stats=engine_args.disable_log_stats,
                    stat_loggers=[self._stats.logger()] if self._stats is not None else None,
                )

        # It blocks for as long as the core takes to load.
        building = asyncio.ensure_future(asyncio.to_thread(build))
        try:
            self._llm = await asyncio.shield(building)
        except asyncio.CancelledError:
            # A thread can't be cancelled: wait for it, or its core outlives us.
            with contextlib.suppress(Exception):
                self._llm = await building
            await self.stop()
            raise
        tasks = await self._llm.get_supported_tasks()
        client = EngineClient(self._llm, self._llm.vllm_config, self._llm.renderer)
        self._app = await self._openai_layer(args, client, tasks)
        # Else every full collection walks through all of torch's and vLLM's objects, for 0.4 s.
        await asyncio.to_thread(gc.collect)
        gc.freeze()
        config = self._llm.vllm_config
        generates = "generate" in tasks
        if generates:
            model = config.model_config
            await self._trials.start(self._llm.tokenizer, model.get_vocab_size())
        return EngineReport(
            engine="vllm",
            max_model_len=config.model_config.max_model_len,
            endpoints=GENERATE_ENDPOINTS if generates else POOLING_ENDPOINTS,
            details={
                "dtype": str(config.model_config.dtype).removeprefix("torch."),
                "moe_backend": str(config.kernel_config.moe_backend)
                if config.model_config.is_moe
                else "none",
                "eager": str(config.model_config.enforce_eager).lower(),
            },
        )

    async def _openai_layer(self, args: Namespace, client: Any, tasks: Any) -> Any:
        """vLLM's ASGI application for one served name."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        app = build_app(args, tasks, client.model_config)
        await init_app_state(client, app.state, args, tasks)
        # vLLM's fault handlers tell its server to exit; here the pool decides.
        app.state.server = SimpleNamespace(should_exit=False)
        return app

    def _used(self, ids: list[str]) -> tuple[int, int]:
        """Tokens of the prompts and of the answers so far, of a call's requests."""
        processor = self._llm.output_processor
        prompt = answer = 0
        for one in ids:
            answer += self._stats.made(one) if self._stats is not None else 0
            states = [
                processor.request_states[name]
                for name in processor.external_req_ids.get(one, ())
                if name in processor.request_states
            ]
            prompt += max((state.prompt_len for state in states), default=0)
            answer += sum(state.stats.num_generation_tokens for state in states if state.stats)
        return prompt, answer

    def _layer_of(self, expert: str) -> Any:
        """The application that answers for an expert."""
        del expert
        return self._app

    async def load(self, expert: str, adapter: str | None = None) -> None:
        """Load an adapter into the running engine. Raises ExpertFailedError."""
        if expert == self._model.name:
            return
        if not self._model.adapters:
            raise ExpertFailedError(
                f"the engine of {self._model.name!r} was started without adapters", retry_after_s=30
            )
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        folder = self._model.adapters[expert] if adapter is None else adapter
        # vLLM knows prefixes by an adapter's name and path: one that was unloaded and comes again
        # may hold something else, so that its path is written otherwise then.
        path = folder + "/." * self._unloaded[expert]
        answer = await self._app.state.openai_serving_models.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=expert, lora_path=path)
        )
        if not isinstance(answer, str):
            raise ExpertFailedError(first_line(answer.error.message), retry_after_s=30)

    async def unload(self, expert: str) -> None:
        """Forget an adapter, in the front end and in the core. Raises ExpertFailedError."""
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        models = self._app.state.openai_serving_models
        known = models.lora_requests.get(expert)
        if known is None:
            return
        answer = await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=expert))
        if not isinstance(answer, str):
            raise ExpertFailedError(first_line(answer.error.message), retry_after_s=30)
        self._unloaded[expert] += 1
        await self._llm.remove_lora(known.lora_int_id)

    @property
    def swappable_experts(self) -> frozenset[str]:
        """An engine with adapters runs what it was started with."""
        return frozenset({self._model.name})

    async def load_to_host(self, expert: str) -> LoadResult:
        """See `exchangeable`. Raises ExpertFailedError."""
        raise ExpertFailedError(f"this engine can't hold {expert!r} beside what it runs")

    async def swap_in(self, expert: str) -> SwapResult:
        """See `exchangeable`. Raises ExpertFailedError."""
        raise ExpertFailedError(f"this engine can't be given the weights of {expert!r}")

    async def evict(self, expert: str, *, for_next: bool = False) -> None:
        """Nothing but the running expert is held."""

    async def run(self, request: EngineRequest, send: Send) -> None:
        """See `Engine.run`."""
        if (why := self.failure()) is not None:
            raise EngineRestartingError(f"the engine of expert {request.expert!r} died: {why}")
        if request.endpoint in _TOKEN_ENDPOINTS and len(request.body) > _MOST_TO_TOKENS:
            raise BodyTooLargeError(
                f"{request.endpoint} takes no more than {_MOST_TO_TOKENS} bytes; "
                f"the body has {len(request.body)}"
            )
        await self._trials.check_body(request.body)
        reply = DeferredStartSend(send)
        call = _Call(request)
        refusal = watch_refusal()
        if self._stats is not None:
            self._stats.asked(request.request_id, request.expert)
        # vLLM's handlers run in this task and in those it starts.
        CACHE_SALT.set(request.cache_salt)
        ids: list[str] = []
        REQUEST_IDS.set(ids)
        task = asyncio.ensure_future(
            self._layer_of(request.expert)(call.scope, call.receive, reply)
        )
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._llm is not None:
                request.given_up(*self._used(ids))
            # vLLM runs handlers in tasks of their own and stops them only when
            # it reads that the client has gone; then it answers with nothing.
            reply.shut()
            call.gone.set()
            with contextlib.suppress(BaseException):
                async with asyncio.timeout(5):
                    await task
            raise
        except Exception:
            if refusal.error is None:
                raise
            raise refusal.error from None  # the pool ends the stream with it, if one has begun
        finally:
            if self._routers is not None:
                self._routers.asked = True
        if refusal.error is not None and reply.failed:
            raise refusal.error
        if reply.error is not None:
            if reply.error[0] >= 500 and self.failure() is not None:
                raise EngineDeadError(f"the engine of expert {request.expert!r} died")
            if reply.error[0] == HTTPStatus.SERVICE_UNAVAILABLE:
                raise OverCapacityError(
                    f"the engine of expert {request.expert!r} has too much to do"
                )
            await reply.send_error()
        elif not reply.started:
            raise EngineDeadError(
                f"the engine of expert {request.expert!r} ended without an answer"
            )

    async def sleep(self) -> None:
        """See `Sleeper.sleep`. GPU only."""
        await self._llm.sleep(level=self._sleep_level, mode="wait")

    async def wake(self) -> None:
        """See `Sleeper.wake`. GPU only."""
        await self._llm.wake_up(tags=["weights"])
        if self._sleep_level == 2:
            await self._llm.collective_rpc("reload_weights")
        await self._llm.wake_up(tags=["kv_cache"])

    def failure(self) -> str | None:
        """Why the engine is dead, or None."""
        if self._stopped:
            return "it was stopped"
        if self._llm is not None and self._llm.errored:
            return "its core process ended"
        return None

    async def in_flight(self) -> int:
        """Requests that vLLM has under way: zero once every client was served or left."""
        if self._llm is None or self.failure() is not None:
            return 0  # vLLM keeps the dead core's requests on its books
        return int(self._llm.get_num_unfinished_requests())

    async def _rpc(self, method: str, *args: object) -> Any:
        """What the worker answers to a call of a method of our extension."""
        return (await self._llm.collective_rpc(method, args=args))[0]

    async def stop(self) -> None:
        """Stop the core process."""
        await self._trials.stop()
        gc.unfreeze()  # what was this engine's can be collected when the next has started
        if self._routers is not None:
            await self._routers.end(look=self._llm is not None and self.failure() is None)
        self._stopped = True
        llm, self._llm = self._llm, None
        if llm is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            # Else vLLM takes the end of the core for its death, and logs it as an error.
            if (listening := llm.output_handler) is not None:
                listening.cancel()
            await asyncio.to_thread(llm.shutdown)
            # Whoever still waits for the core must be told.
            llm.output_processor.propagate_error(EngineDeadError())


class _Call:
    """One request as an ASGI scope and receive channel."""

    def __init__(self, request: EngineRequest) -> None:
        self.gone = asyncio.Event()
        self._body: bytes | None = request.body
        path = request.endpoint
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
                (b"content-type", b"application/json"),
                (b"content-length", str(len(request.body)).encode()),
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
    """The first line of an error that says something, without a traceback."""
    if isinstance(error, BaseException):
        chain: list[BaseException] = []
        cause: BaseException | None = error
        while cause is not None and cause not in chain:
            chain.append(cause)
            cause = cause.__cause__ or cause.__context__
        error = str(chain[0]) or type(chain[0]).__name__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "it could not be loaded")[:500]
