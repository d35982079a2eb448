"""The front end's only access to vLLM: starting, calling and stopping one `AsyncLLM`.

No other module of the pool's process imports vLLM or reads attributes of its objects, so that a new
release of vLLM changes only this file. `service.engine.vllm.worker` is its counterpart in the
engine core's process. `tests/project/test_vllm_surface.py` lists all names of vLLM that both use.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import hashlib
import os
import re
from argparse import ArgumentParser, Namespace
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.config import VllmOptions
from service.engine.cache_salt import cache_salt, with_salt
from service.engine.engine_interface import Message, Send
from service.engine.gpu_share import GpuShare
from service.engine.grammar_check import Grammar, Vocabulary
from service.engine.scoped_env import TUNED_CONFIG_FOLDER, scoped_env, without_secrets
from service.engine.sleeping_engines import exact_pinned_blocks
from service.engine.thinking_budget import thinking_budget
from service.errors import InvalidRequestError, OverCapacityError
from service.http.prompt_endpoints import AUDIO, TRANSCRIPTION

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.renderers import BaseRenderer
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, SchedulerStats

# vLLM compiles all grammars of an engine with the backend of its first grammar. If requests could
# choose the backend, the first client would decide for all others.
_GRAMMAR_BACKEND = "xgrammar"

# The path of each of vLLM's pooling tasks that has one of its own.
_PATHS_BY_TASK = {"embed": "/v1/embeddings", "classify": "/v1/classify"}

# vLLM's request ids of the present call. Tasks that the call starts share this list.
_REQUEST_IDS: ContextVar[list[str] | None] = ContextVar("request_ids", default=None)


@dataclass(slots=True)
class LaunchSettings:
    """The settings for the start of one vLLM engine.

    Attributes:
        model: The folder of the weights.
        served_name: The name of the model in vLLM's OpenAI layer.
        options: The pool's `vllm` section.
        on_cpu: Whether the core runs in one process on the CPU.
        enforce_eager: Whether the engine runs without captured graphs.
        pooling_runner: Whether the model makes vectors, scores or classes, even if its
            architecture could make text.
        adapters: The number of LoRA adapters that the engine can load.
        sleep: Whether the engine can free the accelerator's memory.
        worker_cls: The dotted name of the worker class. It is empty for vLLM's own class.
        worker_extension_cls: The dotted name of the class that vLLM mixes into its worker.
        additional_config: Values for the worker, which vLLM passes in `additional_config`.
        gpu_share: The part of the GPUs that the engine takes. None leaves it to vLLM.
    """

    model: str
    served_name: str
    options: VllmOptions
    on_cpu: bool
    enforce_eager: bool
    pooling_runner: bool = False
    adapters: int = 0
    sleep: bool = False
    worker_cls: str = ""
    worker_extension_cls: str = ""
    additional_config: dict[str, object] = field(default_factory=dict)
    gpu_share: GpuShare | None = None


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """vLLM's timings in seconds of one finished choice. `vllm_id` is the choice's id in vLLM."""

    vllm_id: str
    queue_s: float
    prefill_s: float
    decode_s: float
    prompt_tokens: int
    answer_tokens: int


class StatsRecorder(Protocol):
    """Receives one engine's statistics. `running` is the expert whose weights it has now."""

    running: str

    def registry(self, expert: str) -> CollectorRegistry:
        """Return an empty registry for vLLM's metrics while the engine runs this expert."""

    def record_finished(self, request: FinishedRequest) -> None:
        """Record a finished request."""


class GrammarCheck(Protocol):
    """Decides whether vLLM may compile a request's grammar."""

    async def check(self, grammar: Grammar) -> None:
        """Check a grammar.

        Raises:
            InvalidRequestError: vLLM must not compile the grammar.
            OverCapacityError: The grammar can't be checked now.
        """


@dataclass(slots=True)
class Refusal:
    """The error that kept a request from the engine after vLLM's OpenAI layer had accepted it.

    The error is kept here, because some of vLLM's streams report a client's error as a server error
    once they have begun.
    """

    error: InvalidRequestError | OverCapacityError | None = None


_REFUSAL: ContextVar[Refusal | None] = ContextVar("refusal", default=None)


def watch_refusal() -> Refusal:
    """Collect the refusal of the request that this task and its child tasks send to vLLM."""
    refusal = Refusal()
    _REFUSAL.set(refusal)
    return refusal


def track_request_ids() -> list[str]:
    """Collect vLLM's ids of the requests that this task and its child tasks send to vLLM."""
    ids: list[str] = []
    _REQUEST_IDS.set(ids)
    return ids


@dataclass(frozen=True, slots=True)
class Rendering:
    """One model's tokenizer, chat template and generation defaults.

    Attributes:
        folder: The model's folder.
        config: vLLM's config with this folder as its model and tokenizer.
        renderer: vLLM's renderer, which holds the tokenizer and the chat template.
        generation_config: The defaults of sampling parameters.
    """

    folder: str
    config: VllmConfig
    renderer: BaseRenderer
    generation_config: Mapping[str, object]


INPUT_TOKENS = "/v1/responses/input_tokens"


def _add_input_tokens(app: Any) -> None:
    """Add OpenAI's endpoint that counts a response's input tokens, which vLLM's layer lacks."""
    from starlette.responses import JSONResponse
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.engine.protocol import ErrorResponse

    async def count(request: Any) -> JSONResponse:
        rendered = await app.state.online_renderer.render_responses(request, skip_mm_cache=True)
        if isinstance(rendered, ErrorResponse):
            return JSONResponse(rendered.model_dump(), status_code=rendered.error.code)
        tokens = len(rendered.engine_input["prompt_token_ids"])
        return JSONResponse({"object": "response.input_tokens", "input_tokens": tokens})

    # FastAPI parses the body by its annotation. As texts these would be names of this module.
    count.__annotations__.update({"request": ResponsesRequest, "return": JSONResponse})
    app.add_api_route(INPUT_TOKENS, count, methods=["POST"])


class AdapterError(Exception):
    """vLLM could not load or unload an adapter. The message comes from vLLM."""


class OpenAiApp:
    """vLLM's ASGI application for one served name."""

    def __init__(self, app: Any, llm: AsyncLLM) -> None:
        self._app = app
        self._llm = llm

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Send
    ) -> None:
        await self._app(scope, receive, send)

    async def load_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter into the engine.

        Raises:
            AdapterError: vLLM refuses.
        """
        from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest

        answer = await self._app.state.openai_serving_models.load_lora_adapter(
            LoadLoRAAdapterRequest(lora_name=name, lora_path=path)
        )
        if not isinstance(answer, str):
            raise AdapterError(answer.error.message)

    async def unload_adapter(self, name: str) -> bool:
        """Unload a LoRA adapter in this process and in the core.

        Returns:
            False where no adapter has this name.

        Raises:
            AdapterError: vLLM refuses.
        """
        from vllm.entrypoints.serve.lora.protocol import UnloadLoRAAdapterRequest

        models = self._app.state.openai_serving_models
        loaded = models.lora_requests.get(name)
        if loaded is None:
            return False
        answer = await models.unload_lora_adapter(UnloadLoRAAdapterRequest(lora_name=name))
        if not isinstance(answer, str):
            raise AdapterError(answer.error.message)
        await self._llm.remove_lora(loaded.lora_int_id)
        return True


class VllmHandle:
    """One running `AsyncLLM`. Its core is a child process of this process."""

    def __init__(self, llm: AsyncLLM, args: Namespace, tasks: Sequence[str]) -> None:
        self._llm = llm
        self._args = args
        self._tasks = tasks
        # The rendering that the engine was started with.
        self.rendering = Rendering(
            args.model,
            llm.vllm_config,
            llm.renderer,
            llm.input_processor.generation_config_fields,
        )

    @classmethod
    async def start(
        cls,
        settings: LaunchSettings,
        grammars: GrammarCheck,
        stats: StatsRecorder | None,
        secrets: Collection[str] = (),
    ) -> VllmHandle:
        """Start an engine core and wait until it has loaded its weights.

        Args:
            settings: The settings of the engine.
            grammars: Checks every grammar before vLLM parses it in this process.
            stats: Receives the engine's statistics, if any.
            secrets: Environment variables that the core must not inherit, in addition to variables
                with the name of a key.

        Raises:
            Exception: Any error of vLLM.
        """
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.usage.usage_lib import UsageContext

        args = _frontend_args(settings)

        name, value = exact_pinned_blocks(os.environ)
        allocator = name, value if settings.sleep else None

        def build() -> AsyncLLM:
            engine_args = AsyncEngineArgs.from_cli_args(args)
            context = UsageContext.OPENAI_API_SERVER
            with (
                without_secrets(secrets),
                scoped_env(TUNED_CONFIG_FOLDER, settings.options.tuned_config_folder),
                scoped_env(*allocator),
            ):
                return _checked_llm_class(grammars).from_vllm_config(
                    vllm_config=engine_args.create_engine_config(usage_context=context),
                    usage_context=context,
                    enable_log_requests=False,
                    disable_log_stats=engine_args.disable_log_stats,
                    stat_loggers=[_stat_logger_class(stats)] if stats is not None else None,
                )

        # The call blocks until the core has loaded its weights.
        building = asyncio.ensure_future(asyncio.to_thread(build))
        try:
            llm = await asyncio.shield(building)
        except asyncio.CancelledError:
            # A thread can't be cancelled. Without this wait its core could outlive this process.
            with contextlib.suppress(Exception):
                await _shut_down(await building)
            raise
        try:
            return cls(llm, args, await llm.get_supported_tasks())
        except BaseException:
            await _shut_down(llm)
            raise

    # --- properties of the engine

    @property
    def generates(self) -> bool:
        """Whether the model generates text, rather than embeddings."""
        return "generate" in self._tasks

    @property
    def pooling_endpoints(self) -> frozenset[str]:
        """The endpoints that vLLM's OpenAI layer has for a model that generates no text."""
        from vllm.entrypoints.pooling.utils import enable_scoring_api

        config = self._llm.model_config
        found = {"/tokenize", "/detokenize"}
        task = config.get_pooling_task(self._tasks)
        if (path := _PATHS_BY_TASK.get(task)) is not None:
            found.add(path)
        # Vectors are compared; a cross-encoder has one class, whose score it is.
        if enable_scoring_api(self._tasks, config):
            found |= {"/v1/rerank", "/v1/score"}
        return frozenset(found)

    @property
    def listening_endpoints(self) -> frozenset[str]:
        """The endpoint for recordings, where the model can transcribe them."""
        return frozenset({AUDIO} if TRANSCRIPTION in self._tasks else ())

    @property
    def max_model_len(self) -> int:
        """The length of the context in tokens."""
        return int(self._llm.model_config.max_model_len)

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the model's vocabulary."""
        return int(self._llm.model_config.get_vocab_size())

    @property
    def details(self) -> dict[str, str]:
        """The choices of vLLM: dtype, backend of routed experts, and whether it uses graphs."""
        config = self._llm.vllm_config
        model = config.model_config
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "moe_backend": str(config.kernel_config.moe_backend) if model.is_moe else "none",
            "eager": str(model.enforce_eager).lower(),
        }

    @property
    def core_pid(self) -> int:
        """The process id of the engine core."""
        return int(self._llm.engine_core.resources.engine_manager.processes[0].pid)

    @property
    def errored(self) -> bool:
        """Whether the core process has ended."""
        return bool(self._llm.errored)

    def vocabulary(self) -> Vocabulary | None:
        """Return the vocabulary that the core compiles grammars for.

        The call takes seconds, so it belongs in a thread.

        Returns:
            The vocabulary, or None if it can't be serialised.
        """
        import xgrammar as xgr
        from vllm.utils.mistral import is_mistral_tokenizer

        tokenizer = self._llm.tokenizer
        if tokenizer is None or is_mistral_tokenizer(tokenizer):
            return None
        try:
            info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=self.vocab_size)
            text = info.serialize_json()
        except (ValueError, RuntimeError):
            return None  # the core can't compile for this tokenizer either, and reports it
        return Vocabulary(hashlib.sha256(text.encode()).hexdigest(), text)

    # --- requests

    async def openai_app(self, served_name: str, rendering: Rendering | None = None) -> OpenAiApp:
        """Build vLLM's OpenAI layer for a served name, by default with the engine's tokenizer."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        rendering = rendering or self.rendering
        args = copy.copy(self._args)
        args.served_model_name = [served_name]
        args.model = rendering.folder
        client = SaltingEngineClient(self._llm, rendering)
        app = build_app(args, self._tasks, client.model_config)
        await init_app_state(client, app.state, args, self._tasks)
        if "generate" in self._tasks:
            _add_input_tokens(app)
        # vLLM's fault handlers tell its server to exit; here the pool decides.
        app.state.server = SimpleNamespace(should_exit=False)
        return OpenAiApp(app, self._llm)

    def unfinished_requests(self) -> int:
        """Return the number of requests that vLLM works on."""
        return int(self._llm.get_num_unfinished_requests())

    def unfinished_tokens(self, vllm_id: str) -> tuple[int, int]:
        """Return the numbers of prompt and answer tokens so far of an unfinished request."""
        processor = self._llm.output_processor
        states = [
            processor.request_states[name]
            for name in processor.external_req_ids.get(vllm_id, ())
            if name in processor.request_states
        ]
        prompt = max((state.prompt_len for state in states), default=0)
        return prompt, sum(state.stats.num_generation_tokens for state in states if state.stats)

    # --- the worker

    async def collective_rpc(self, method: str, *args: object, **kwargs: object) -> list[Any]:
        """Call a method of every worker, and return the result of each rank."""
        answers: list[Any] = await self._llm.collective_rpc(
            method, args=args, kwargs=kwargs or None
        )
        return answers

    async def pause(self) -> None:
        """Wait for running requests, start no others, and clear the prefix caches."""
        await self._llm.pause_generation(mode="wait", clear_cache=True)

    async def resume(self) -> None:
        """Let requests run again."""
        await self._llm.resume_generation()

    async def sleep(self, level: int) -> None:
        """Free the accelerator's memory after running requests have ended.

        Args:
            level: Level 1 keeps the weights in host memory, and level 2 discards them.
        """
        await self._llm.sleep(level=level, mode="wait")

    async def wake(self, level: int) -> None:
        """Undo `sleep` of the same level."""
        await self._llm.wake_up(tags=["weights"])
        if level == 2:
            await self._llm.collective_rpc("reload_weights")
        await self._llm.wake_up(tags=["kv_cache"])

    # --- tokenizers

    async def load_rendering(self, folder: str) -> Rendering:
        """Read another model's tokenizer, chat template and generation defaults."""
        from vllm.renderers import renderer_from_config

        config = copy.copy(self._llm.vllm_config)
        config.model_config = copy.copy(config.model_config)
        config.model_config.model = config.model_config.tokenizer = folder
        renderer = await asyncio.to_thread(renderer_from_config, config)
        defaults = config.model_config.try_get_generation_config()
        return Rendering(folder, config, renderer, defaults)

    def use_rendering(self, rendering: Rendering) -> None:
        """Use another model's tokenizer and chat template. No request may be running."""
        llm, renderer = self._llm, rendering.renderer
        llm.renderer = llm.input_processor.renderer = renderer
        llm.input_processor.generation_config_fields = rendering.generation_config
        llm.output_processor.tokenizer = renderer.tokenizer

    async def shutdown(self) -> None:
        """End the core process. Every unfinished request ends with an error."""
        await _shut_down(self._llm)


async def _shut_down(llm: AsyncLLM) -> None:
    from vllm.v1.engine.exceptions import EngineDeadError

    # Otherwise vLLM logs the end of the core as a crash.
    if (task := llm.output_handler) is not None:
        task.cancel()
    await asyncio.to_thread(llm.shutdown)
    llm.output_processor.propagate_error(EngineDeadError())


def _frontend_args(settings: LaunchSettings) -> Namespace:
    """Build the arguments of vLLM's own server.

    The call fails if the installed vLLM lacks an argument.
    """
    from vllm.config import StructuredOutputsConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    options = settings.options
    args = _parsed(_argument_parser(), options.args)
    args.model = settings.model
    args.model_tag = None
    args.served_model_name = [settings.served_name]
    args.dtype = options.dtype
    args.max_model_len = options.max_model_len
    args.max_num_seqs = options.max_num_seqs
    args.enforce_eager = settings.enforce_eager
    args.tensor_parallel_size = options.tensor_parallel_size
    args.trust_remote_code = options.trust_remote_code
    if settings.pooling_runner:
        args.runner = "pooling"
    args.load_format = "safetensors"  # never pickle
    args.moe_backend = options.moe_backend
    args.enable_expert_parallel = options.enable_expert_parallel
    args.expert_placement_strategy = options.expert_placement_strategy
    args.enable_eplb = options.enable_eplb
    args.eplb_config = options.eplb_config.model_dump()
    # An empty list would allow any host. A request must not make the engine fetch a URL.
    args.allowed_media_domains = list(options.media_domains) or ["none.invalid"]
    args.structured_outputs_config = StructuredOutputsConfig(backend=_GRAMMAR_BACKEND)
    args.max_num_queued_reqs = options.max_num_queued_reqs
    args.disable_log_stats = False
    args.enable_log_requests = False
    args.disable_fastapi_docs = True
    if settings.sleep:
        args.enable_sleep_mode = True
    if options.kv_cache_bytes is not None:
        args.kv_cache_memory_bytes = options.kv_cache_bytes
    if (share := settings.gpu_share) is not None:
        if "gpu_memory_utilization" not in options.args:
            args.gpu_memory_utilization = share.utilization
        if share.device_ids:
            args.device_ids = list(share.device_ids)
    if settings.on_cpu:
        args.distributed_executor_backend = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    elif options.parallel("pipeline_parallel_size") > 1:
        # vLLM would look for GPUs of its own in Ray, beside those of the replica.
        args.distributed_executor_backend = "mp"
    if settings.worker_extension_cls:
        args.worker_extension_cls = settings.worker_extension_cls
    if settings.worker_cls:
        args.worker_cls = settings.worker_cls
    if settings.additional_config:
        args.additional_config = settings.additional_config
    if settings.adapters:
        args.enable_lora = True
        args.max_lora_rank = options.max_lora_rank
        args.max_loras = args.max_cpu_loras = settings.adapters
    if options.tool_call_parser is not None:
        args.tool_call_parser = options.tool_call_parser
        args.enable_auto_tool_choice = True
    if options.reasoning_parser is not None:
        args.reasoning_parser = options.reasoning_parser
    # This fails with the argument's name if the installed vLLM lacks it.
    AsyncEngineArgs.from_cli_args(args)
    return args


def argument_faults(given: Mapping[str, Any]) -> dict[str, str]:
    """Return vLLM's message for each engine argument that it refuses.

    A fault of all arguments together has the name of the last one.
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    parser = _argument_parser()
    faults = {}
    for name, value in given.items():
        try:
            _parsed(parser, {name: value})
        except ValueError as error:
            faults[name] = _one_line(error)
    if given and not faults:
        try:
            args = _parsed(parser, given)
            args.model = os.curdir  # any folder, or vLLM would look for its default model
            AsyncEngineArgs.from_cli_args(args)
        except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
            faults[list(given)[-1]] = _one_line(error)
    return faults


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _argument_parser() -> ArgumentParser:
    """Return the parser of vLLM's server, which raises a `ValueError` for wrong arguments."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class RaisingParser(FlexibleArgumentParser):  # type: ignore[misc]  # vllm has no types here
        def error(self, message: str) -> NoReturn:
            raise ValueError(re.sub(r"^argument \S+: ", "", message))

    parser: ArgumentParser = make_arg_parser(RaisingParser())
    return parser


def _parsed(parser: ArgumentParser, given: Mapping[str, Any]) -> Namespace:
    """Let vLLM parse its arguments, which have the values that a config file can hold.

    Raises:
        ValueError: vLLM refuses an argument.
    """
    words: list[str] = []
    for name, value in given.items():
        option = name.replace("_", "-")
        if value is True:
            words.append(f"--{option}")
        elif value is False:
            # Some of vLLM's flags can only be set, and are unset by default.
            if f"--no-{option}" in parser.format_usage():
                words.append(f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(_written, value)]
        else:
            words.append(f"--{option}={_written(value)}")
    # vLLM's own method would take values with a dot for names.
    args = ArgumentParser.parse_args(parser, words)
    for name, value in given.items():
        read = getattr(args, name)
        if isinstance(value, dict) and isinstance(read, str):
            raise ValueError(f"a text is needed, not the mapping {_written(value)[:60]}")
        if isinstance(value, list) and not isinstance(read, list | set | tuple):
            raise ValueError(f"one value is needed, not the list {_written(value)[:60]}")
    return args


def _written(value: object) -> str:
    """Return a value as in vLLM's command line."""
    return orjson.dumps(value).decode() if isinstance(value, dict | list) else str(value)


class SaltingEngineClient:
    """The engine client of one expert's OpenAI layer, with the expert's config and renderer.

    The prompts of all endpoints pass through `generate` and `encode`. These methods add the salt
    that separates tenants in the engine's prefix cache, and record the ids that vLLM generates.
    `generate` also sets the budget of thinking where vLLM's API has no field for it.
    """

    def __init__(self, llm: AsyncLLM, rendering: Rendering) -> None:
        self._llm = llm
        self.vllm_config = rendering.config
        self.model_config = rendering.config.model_config
        self.renderer = rendering.renderer

    def generate(self, prompt: object, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        _note_request_id(args, kwargs)
        if (budget := thinking_budget()) is not None:
            params = kwargs["sampling_params"] if "sampling_params" in kwargs else args[0]
            params.thinking_token_budget = budget
        stream: AsyncGenerator[Any] = self._llm.generate(
            with_salt(prompt, cache_salt()), *args, **kwargs
        )
        return stream

    def encode(self, prompt: object, *args: Any, **kwargs: Any) -> AsyncGenerator[Any]:
        _note_request_id(args, kwargs)
        stream: AsyncGenerator[Any] = self._llm.encode(
            with_salt(prompt, cache_salt()), *args, **kwargs
        )
        return stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)


def _note_request_id(args: Sequence[object], kwargs: Mapping[str, object]) -> None:
    """Record vLLM's id of a request. It is a keyword argument or follows the prompt."""
    if (ids := _REQUEST_IDS.get()) is not None:
        ids.append(str(kwargs["request_id"] if "request_id" in kwargs else args[1]))


# --- grammars


def _checked_llm_class(grammars: GrammarCheck) -> type[AsyncLLM]:
    """Return a subclass of `AsyncLLM` that checks every grammar which vLLM finds in a request."""
    from vllm.exceptions import QueueOverflowError, VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    class CheckedLLM(AsyncLLM):  # type: ignore[misc]  # vllm has no types here
        """vLLM validates grammars in `add_request`, on the event loop."""

        async def add_request(
            self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any
        ) -> Any:
            try:
                grammar = _grammar_of(getattr(params, "structured_outputs", None))
                if grammar is not None:
                    await grammars.check(grammar)
                return await super().add_request(request_id, prompt, params, *args, **kwargs)
            except InvalidRequestError as error:
                _note_refusal(error)
                raise VLLMValidationError(error.message) from None
            except OverCapacityError as error:
                _note_refusal(error)
                raise QueueOverflowError from None
            except ValueError as error:
                _note_refusal(InvalidRequestError(str(error)))
                raise

    return CheckedLLM


def _note_refusal(error: InvalidRequestError | OverCapacityError) -> None:
    if (refusal := _REFUSAL.get()) is not None:
        refusal.error = error


def _grammar_of(params: StructuredOutputsParams | None) -> Grammar | None:
    """Return the grammar that vLLM passes to xgrammar for these parameters, if any."""
    from vllm.v1.structured_output.utils import choice_as_grammar

    if params is None:
        return None
    if params.regex:
        return Grammar("regex", params.regex)
    if params.choice:
        return Grammar("ebnf", choice_as_grammar(params.choice))
    if params.json:
        schema = params.json
        return Grammar("json", schema if isinstance(schema, str) else orjson.dumps(schema).decode())
    if params.grammar:
        return grammar_from_text(params.grammar)
    if params.structural_tag:
        return Grammar("structural_tag", params.structural_tag)
    return None


def grammar_from_text(text: str) -> Grammar:
    """Make a grammar of the kind that vLLM will detect in a text: Lark or EBNF."""
    from vllm.v1.structured_output.utils import grammar_is_likely_lark

    return Grammar("lark" if grammar_is_likely_lark(text) else "ebnf", text)


# --- metrics


def _stat_logger_class(stats: StatsRecorder) -> type[PrometheusStatLogger]:
    """Return a stat logger class for `AsyncLLM` with one of vLLM's loggers for each expert.

    vLLM's own logger removes every `vllm:` metric of the process when another engine starts, and
    labels metrics with the model that the engine started with. Here each expert has its own
    registry.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.stats import SchedulerStats

    class ExpertStatLogger(PrometheusStatLogger):  # type: ignore[misc]  # vllm has no types here
        def __init__(
            self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None
        ) -> None:
            # vLLM's own `__init__` would clear the common registry.
            self._expert_config = vllm_config
            self.engine_indexes = engine_indexes or [0]
            self._loggers: dict[str, PrometheusStatLogger] = {}
            self._initialized = False
            self._last_expert = stats.running

        def _logger(self, expert: str) -> PrometheusStatLogger:
            logger = self._loggers.get(expert)
            if logger is None:
                registry = stats.registry(expert)
                logger = _registry_logger_class(registry)(self._expert_config, self.engine_indexes)
                if logger.gauge_lora_info is not None:
                    # The labels of this gauge are lists of names in any combination.
                    registry.unregister(logger.gauge_lora_info)
                    logger.gauge_lora_info = None
                if self._initialized:
                    logger.log_engine_initialized()
                self._loggers[expert] = logger
            return logger

        def record(
            self,
            scheduler_stats: SchedulerStats | None,
            iteration_stats: IterationStats | None,
            mm_cache_stats: object = None,
            engine_idx: int = 0,
        ) -> None:
            expert = stats.running
            if expert != self._last_expert:
                # No request runs or waits for the expert that was swapped out.
                self._logger(self._last_expert).record(SchedulerStats(), None, None, engine_idx)
                self._last_expert = expert
            self._logger(expert).record(
                scheduler_stats, iteration_stats, mm_cache_stats, engine_idx
            )
            if iteration_stats is not None:
                for finished in iteration_stats.finished_requests:
                    stats.record_finished(_finished_request(finished))

        def log_engine_initialized(self) -> None:
            self._logger(stats.running).log_engine_initialized()
            self._initialized = True

        def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
            for logger in self._loggers.values():
                logger.record_sleep_state(sleep, level)

        def record_admission_rejection(self, reason: str) -> None:
            self._logger(stats.running).record_admission_rejection(reason)

    return ExpertStatLogger


def _finished_request(finished: FinishedRequestStats) -> FinishedRequest:
    return FinishedRequest(
        str(finished.request_id),
        queue_s=max(0.0, finished.queued_time),
        prefill_s=max(0.0, finished.prefill_time),
        decode_s=max(0.0, finished.decode_time),
        prompt_tokens=finished.num_prompt_tokens,
        answer_tokens=finished.num_generation_tokens,
    )


def _registry_logger_class(registry: CollectorRegistry) -> type[PrometheusStatLogger]:
    """Return vLLM's stat logger with its metrics in `registry`."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    metric_types: dict[str, object] = {
        "_gauge_cls": staticmethod(partial(Gauge, registry=registry)),
        "_counter_cls": staticmethod(partial(Counter, registry=registry)),
        "_histogram_cls": staticmethod(partial(Histogram, registry=registry)),
    }
    parts: dict[str, object] = {
        name: type(name, (getattr(PrometheusStatLogger, name),), metric_types)
        for name in (
            "_spec_decoding_cls",
            "_kv_connector_cls",
            "_ec_connector_cls",
            "_perf_metrics_cls",
        )
    }
    return type("RegistryStatLogger", (PrometheusStatLogger,), metric_types | parts)
