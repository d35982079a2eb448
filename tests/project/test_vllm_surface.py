"""Every private or undocumented name of vLLM that we touch stands here, and still exists.

vLLM promises nothing about these names between releases. The first tests read our source, and fail
when it touches a name that is not in a table. The others read the source of the installed vLLM, if
there is one, without importing it: they name what an upgrade has removed.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ROOT / "service" / "engine" / "vllm"

LOGGER = "vllm.v1.metrics.loggers:PrometheusStatLogger"
ROUTER = "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter"
LLM = "vllm.v1.engine.async_llm:AsyncLLM"
INPUTS = "vllm.v1.engine.input_processor:InputProcessor"
OUTPUTS = "vllm.v1.engine.output_processor:OutputProcessor"
MODEL_CONFIG = "vllm.config.model:ModelConfig"
CONFIG = "vllm.config.vllm:VllmConfig"
COMPILATION = "vllm.config.compilation:CompilationConfig"
GRAMMARS = "vllm.v1.structured_output:StructuredOutputManager"
MOE_METHOD = "vllm.model_executor.layers.fused_moe.fused_moe_method_base:FusedMoEMethodBase"
METHOD = "vllm.model_executor.layers.quantization.base_config:QuantizeMethodBase"
RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
MOE_RUNNER = "vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner"
REQUEST_STATE = "vllm.v1.engine.output_processor:RequestState"
FINISHED = "vllm.v1.metrics.stats:FinishedRequestStats"
SERVING_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
BATCH = "vllm.v1.worker.gpu_input_batch:InputBatch"
PARAMETER = "vllm.model_executor.parameter:BasevLLMParameter"
LOADER = "vllm.model_executor.model_loader.default_loader:DefaultModelLoader"
BUDGETS = "vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder"
SECOND_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
SECOND_STATE = "vllm.v1.worker.gpu.model_runner:ExecuteModelState"
FUSED_MOE = "vllm.model_executor.layers.fused_moe"
SECOND_BATCH = "vllm.v1.worker.gpu.input_batch:InputBatch"

# Private names, and the classes that have them.
PRIVATE = {
    "_compute_routing": ROUTER,
    "_quant_method": MOE_RUNNER,
    "_counter_cls": LOGGER,
    "_gauge_cls": LOGGER,
    "_histogram_cls": LOGGER,
    "_ec_connector_cls": LOGGER,
    "_kv_connector_cls": LOGGER,
    "_perf_metrics_cls": LOGGER,
    "_weight_loader": PARAMETER,
    "_spec_decoding_cls": LOGGER,
}
# Attributes that we assign, as our source writes them. None: it is no attribute of a vLLM class.
ASSIGNED = {
    "llm.renderer": LLM,
    "llm.input_processor.renderer": INPUTS,
    "llm.input_processor.generation_config_fields": INPUTS,
    "llm.output_processor.tokenizer": OUTPUTS,
    "config.model_config": CONFIG,
    "config.model_config.model": MODEL_CONFIG,
    "config.model_config.tokenizer": MODEL_CONFIG,
    "config.model": MODEL_CONFIG,
    "config.tokenizer": MODEL_CONFIG,
    "logger.gauge_lora_info": LOGGER,
    "params.thinking_token_budget": "vllm.sampling_params:SamplingParams",
    "own.model_config": CONFIG,
    "own.model_config.model": MODEL_CONFIG,
    "own.compilation_config": CONFIG,
    "own.compilation_config.static_forward_context": COMPILATION,
    "own.compilation_config.static_all_moe_layers": COMPILATION,
    "own.load_config": CONFIG,
    "own.load_config.use_tqdm_on_load": "vllm.config.load:LoadConfig",
    "StructuredOutputManager.tokenizer": GRAMMARS,
    "StructuredOutputManager.backend": GRAMMARS,
    "DefaultModelLoader.get_all_weights": LOADER,
    "method.process_weights_after_loading": METHOD,
    "self.model_runner.model": RUNNER,
    "holder.think_start_token_ids": BUDGETS,
    "holder.think_end_token_ids": BUDGETS,
    "app.state.server": None,
    "target.cpu_linear": None,
    "weight.weight_loader": None,
    "parameter.weight_loader": None,
    "DefaultModelLoader.load_weights": LOADER,
    "method.apply": MOE_METHOD,
}
# Attributes that we read of `AsyncLLM`, in `async_llm_handle.py`.
READ_OF_LLM = {
    "collective_rpc",
    "encode",
    "engine_core",
    "errored",
    "generate",
    "get_num_unfinished_requests",
    "get_supported_tasks",
    "input_processor",
    "model_config",
    "output_handler",
    "output_processor",
    "pause_generation",
    "remove_lora",
    "renderer",
    "resume_generation",
    "shutdown",
    "sleep",
    "tokenizer",
    "vllm_config",
    "wake_up",
}
# Other names that we read, and methods that we override, of objects that no document describes.
READ = {
    INPUTS: {"generation_config_fields"},
    OUTPUTS: {"external_req_ids", "propagate_error", "request_states"},
    REQUEST_STATE: {"prompt_len", "stats"},
    FINISHED: {
        "decode_time",
        "num_generation_tokens",
        "num_prompt_tokens",
        "prefill_time",
        "queued_time",
        "request_id",
    },
    LOGGER: {"log_engine_initialized", "record", "record_sleep_state"},
    "vllm.renderers.online_renderer:OnlineRenderer": {"render_responses"},
    "vllm.renderers.online_renderer:ResponsesRenderResult": {"engine_input"},
    LLM: {"add_request"},
    MODEL_CONFIG: {"get_pooling_task"},
    METHOD: {"process_weights_after_loading"},
    "vllm.model_executor.layers.linear:LinearBase": {"update_param_tp_status"},
    LOADER: {"_init_ep_weight_filter", "get_all_weights", "load_weights"},
    SERVING_MODELS: {"load_lora_adapter", "lora_requests", "unload_lora_adapter"},
    "vllm.lora.request:LoRARequest": {"lora_int_id"},
    ROUTER: {"global_num_experts", "set_capture_fn", "top_k"},
    MOE_RUNNER: {"gate", "layer_id", "routed_experts", "router"},
    MOE_METHOD: {"get_fused_moe_quant_config", "is_monolithic", "moe", "moe_kernel"},
    f"{FUSED_MOE}.unquantized_fused_moe_method:UnquantizedFusedMoEMethod": {"experts_cls"},
    f"{FUSED_MOE}.experts.cpu_moe:CPUUnquantizedExperts": {
        "isa",
        "process_weights_after_loading",
    },
    f"{FUSED_MOE}.routed_experts:RoutedExperts": {
        "quant_method",
        "top_k",
        "weight_loader",
    },
    f"{FUSED_MOE}.config:FusedMoEQuantConfig": {"use_int4_w4a16", "use_int8_w8a16"},
    f"{FUSED_MOE}.modular_kernel:FusedMoEExperts": {"quant_config"},
    f"{FUSED_MOE}.modular_kernel:FusedMoEExpertsModular": {"apply"},
    f"{FUSED_MOE}.modular_kernel:FusedMoEKernel": {"fused_experts"},
    RUNNER: {"get_model", "input_batch", "query_start_loc"},
    BATCH: {"num_reqs", "req_ids", "thinking_budget_state_holder"},
    BUDGETS: {
        "think_end_token_ids",
        "think_start_token_ids",
    },
    SECOND_RUNNER: {"execute_model_state", "get_model", "model", "sampler"},
    "vllm.v1.worker.gpu.sample.sampler:Sampler": {"thinking_budget_state"},
    "vllm.v1.worker.gpu.sample.thinking_budget:ThinkingBudgetState": {
        "natural_reasoning_end_token_ids",
        "reasoning_end_token_ids",
        "reasoning_start_token_ids",
    },
    "vllm.config.reasoning:ReasoningConfig": {
        "enabled",
        "initialize_token_ids",
        "natural_reasoning_end_token_ids",
        "reasoning_end_token_ids",
        "reasoning_start_token_ids",
    },
    SECOND_STATE: {"input_batch"},
    SECOND_BATCH: {"num_reqs", "query_start_loc_np", "req_ids"},
}
# Names that layers and parameters get at run time, and a file of vLLM that has them.
AT_RUN_TIME = {
    "cpu_linear": "vllm/model_executor/layers/utils.py",
    "input_size_per_partition": "vllm/model_executor/layers/linear.py",
    "kv_cache": "vllm/model_executor/layers/attention/attention.py",
    "quant_method": "vllm/model_executor/layers/linear.py",
    "server": "vllm/entrypoints/launchers/launcher.py",
    "weight_loader": "vllm/model_executor/layers/linear.py",
}

# Expressions whose attributes we may assign: objects of ours, and vLLM's arguments, which its own
# `AsyncEngineArgs.from_cli_args` checks.
OUR_OBJECTS = re.compile(
    r"self|args|done|held|load|load\.thread|loaded|part|refusal|scratch|self\._routing_stats"
    r"|self\._scratch|self\._stats|self\.counters|settings|state|step\.sample"
)
TORCH = re.compile(r"(found|parameter|self\._parameter|module\.weight)\.data")
# Private names that are no attributes of Python objects.
NO_ATTRIBUTES = {"_dynamo", "_model_name_or_path", "_name_or_path", "_torchdynamo"}


def _sources() -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted(OURS.rglob("*.py")):
        yield path, ast.parse(path.read_text())


def _names_of(tree: ast.AST) -> set[str]:
    """The names that a module or class defines: functions, classes, variables and attributes."""
    names: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                names.add(node.attr)
            case ast.ImportFrom() | ast.Import():
                names |= {alias.asname or alias.name for alias in node.names}
    return names


def _is_of_self(node: ast.Attribute) -> bool:
    return ast.unparse(node.value) in ("self", "cls", "super()")


def _private_names() -> set[str]:
    """Private names in our source that are not our own, as attributes or as strings."""
    own = set[str]().union(*(_names_of(tree) for _, tree in _sources()))
    found: set[str] = set()
    for _, tree in _sources():
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(attr=name) if re.match("_[a-z]", name):
                    if name not in own or not _is_of_self(node):
                        found.add(name)
                case ast.Constant(value=str(name)) if re.fullmatch("_[a-z][a-z0-9_]*", name):
                    found.add(name)
    return {name for name in found if not name.startswith("_coe_")} - NO_ATTRIBUTES


def _assigned() -> set[str]:
    """Attributes that our source assigns or deletes, of objects that are not ours."""
    return {
        ast.unparse(node)
        for _, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, (ast.Store, ast.Del))
        and not OUR_OBJECTS.fullmatch(ast.unparse(node.value))
        and not TORCH.fullmatch(ast.unparse(node))
    }


def _read_of_llm() -> set[str]:
    tree = ast.parse((OURS / "async_llm_handle.py").read_text())
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("llm", "self._llm")
    }


def test_private_names_are_those_in_the_table() -> None:
    assert _private_names() == set(PRIVATE)


def test_assigned_attributes_are_those_in_the_table() -> None:
    assert _assigned() == set(ASSIGNED)


def test_attributes_of_the_engine_are_those_in_the_table() -> None:
    assert _read_of_llm() == READ_OF_LLM


def test_engine_front_end_imports_vllm_in_one_file() -> None:
    importing = {
        path.relative_to(OURS).parts[0]
        for path, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
    }
    assert importing == {"async_llm_handle.py", "worker"}


# --- the installed vLLM

_SPEC = importlib.util.find_spec("vllm")
installed = pytest.mark.skipif(_SPEC is None, reason="vLLM is not installed")


def _installed() -> Path:
    assert _SPEC is not None
    assert _SPEC.origin is not None
    return Path(_SPEC.origin).parents[1]


@cache
def _module(name: str) -> ast.Module | None:
    path = _installed().joinpath(*name.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return ast.parse(file.read_text())
    return None


def _has(owner: str, attribute: str) -> bool:
    """Whether a class of vLLM, as `module:Class`, defines an attribute."""
    module, _, name = owner.partition(":")
    tree = _module(module)
    return tree is not None and any(
        attribute in _attributes_of(node)
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == name
    )


def _attributes_of(class_: ast.ClassDef) -> set[str]:
    methods = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = {node.name for node in class_.body if isinstance(node, methods)}
    for node in class_.body:
        if not isinstance(node, methods):
            names |= _names_of(node)
    return names | {
        node.attr
        for node in ast.walk(class_)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }


def _expected() -> set[tuple[str, str]]:
    found = {(owner, name) for name, owner in PRIVATE.items()}
    found |= {(owner, name.rsplit(".")[-1]) for name, owner in ASSIGNED.items() if owner}
    found |= {(LLM, name) for name in READ_OF_LLM}
    found |= {(owner, name) for owner, names in READ.items() for name in names}
    return found


@installed
@pytest.mark.parametrize(("owner", "attribute"), sorted(_expected()))
def test_installed_vllm_has_each_name_in_the_table(owner: str, attribute: str) -> None:
    assert _has(owner, attribute)


@installed
@pytest.mark.parametrize("name", sorted(AT_RUN_TIME))
def test_installed_vllm_uses_each_assigned_attribute(name: str) -> None:
    source = (_installed() / AT_RUN_TIME[name]).read_text()
    assert re.search(rf"\b{name}\b", source)


@installed
def test_installed_triton_kernel_sorts_the_steps_that_kept_choices_assume() -> None:
    """An id of -1 without an expert map is safe in the others only."""
    folder = _installed() / "vllm" / "model_executor" / "layers" / "fused_moe"
    source = (folder / "fused_moe.py").read_text()
    assert "expert_map is None\n        and num_tokens * top_k_num * 4 <= global_num_exp" in source
    skips = (folder / "experts" / "triton_moe.py").read_text()
    assert "ops.moe_sum(input, output, topk_ids, expert_map)" in skips


@installed
def test_installed_vllm_has_every_imported_name() -> None:
    missing = [
        f"{node.module}.{alias.name}"
        for _, tree in _sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm"
        for alias in node.names
        if (module := _module(node.module or "")) is None or alias.name not in _names_of(module)
    ]
    assert missing == []
