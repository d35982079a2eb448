"""`pools.KIND.vllm.args`: vLLM's own engine arguments, and those that this project sets itself.

An argument passes to vLLM as it is, unless it is in `OWNED`. vLLM checks the values where it is
installed (`service.engine.vllm.argument_check`), because its import takes seconds. `PASSED` names
the other fields of `AsyncEngineArgs` of vLLM 0.32, so that a config loads without vLLM.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from service.config.section_base import is_path, shown

_HAS_KEY = "it has a key of its own: {}"
_FOLDER = "an expert's folder decides it, because experts of a pool differ in it"
_CODE = "it names Python code to import, and a config brings no code"
_FILES = "the model store fetches and checks files before an engine starts"
_PLACED = "Ray places replicas and gives each its GPUs on one node; set {}"
_WRITES = "it makes engines write files to a place of its own, which nothing here bounds or removes"
_MESSAGES = "it opens the engine to other processes than its pool, which would pass by its accounts"


def _keys(reason: str, **names: str) -> dict[str, str]:
    return {name: reason.format(key) for name, key in names.items()}


OWNED: dict[str, str] = {
    # Keys of this config.
    **_keys(
        _HAS_KEY,
        model="experts.NAME.model",
        served_model_name="the expert's name under `experts`",
        runner="experts.NAME.capabilities",
        convert="experts.NAME.capabilities",
        kv_cache_memory_bytes="vllm.kv_cache_bytes",
        num_gpu_blocks_override="vllm.kv_cache_bytes",
        allowed_media_domains="vllm.media_domains",
        enable_sleep_mode="swap.method: sleep",
        enable_cumem_allocator="swap.method: sleep",
        enable_lora="experts.NAME.adapter, which turns it on",
        max_loras="experts.NAME.adapter; there is room for every adapter of the pool, and for "
        "vllm.spare_adapters",
        max_cpu_loras="experts.NAME.adapter; there is room for every adapter of the pool, and for "
        "vllm.spare_adapters",
        default_mm_loras="experts.NAME.adapter",
        otlp_traces_endpoint="telemetry.traces_url",
        collect_detailed_traces="telemetry.traces_url",
        log_level="the environment variable VLLM_LOGGING_LEVEL",
        logging_config="the environment variable VLLM_LOGGING_LEVEL",
        log_config_file="the environment variable VLLM_LOGGING_LEVEL",
        spec_method="vllm.args.speculative_config",
        spec_model="vllm.args.speculative_config",
        spec_tokens="vllm.args.speculative_config",
        mamba_config="vllm.args.mamba_backend and the like",
    ),
    **{
        name: _HAS_KEY.format(f"vllm.{name}")
        for name in (
            "dtype",
            "max_model_len",
            "max_num_seqs",
            "max_num_queued_reqs",
            "enforce_eager",
            "tensor_parallel_size",
            "trust_remote_code",
            "max_lora_rank",
            "reasoning_parser",
            "moe_backend",
            "enable_expert_parallel",
            "expert_placement_strategy",
            "enable_eplb",
            "eplb_config",
        )
    },
    # The model's folder and its files.
    "tokenizer": _FOLDER,
    "hf_config_path": _FOLDER,
    "model_weights": _FOLDER,
    "skip_tokenizer_init": "the OpenAI endpoints and the checks after a swap need text",
    "tokens_only": "the OpenAI endpoints and the checks after a swap need text",
    "load_format": "weights are read from safetensors only; other formats can hold code",
    "pt_load_map_location": "weights are read from safetensors only; other formats can hold code",
    "download_dir": _FILES + "; set models_dir",
    "revision": _FILES + "; name it in experts.NAME.model",
    "code_revision": "no code from model folders is fetched",
    "tokenizer_revision": _FILES + "; name it in experts.NAME.model",
    "hf_token": _FILES + "; its environment variable HF_TOKEN is read by `coe models pull`",
    # Code.
    "scheduler_cls": _CODE,
    "logits_processors": _CODE,
    "model_class_overrides": _CODE,
    "io_processor_plugin": _CODE,
    "reasoning_parser_plugin": _CODE,
    "ec_manager_config": _CODE,
    "worker_cls": "the pool's worker swaps weights and steers gates",
    "worker_extension_cls": "the pool's worker swaps weights and steers gates",
    "additional_config": "the pool's worker gets its settings through it",
    # Files.
    "mm_encoder_fp8_scale_save_path": _WRITES,
    "mm_encoder_fp8_scale_save_margin": _WRITES,
    "profiler_config": _WRITES
    + "; `/admin` has no profiler, and traces go to telemetry.traces_url",
    # Requests.
    "allowed_local_media_path": "requests could read files of this machine",
    "enable_prompt_embeds": "requests could bring tensors, whose sizes nothing here bounds",
    "enable_mm_embeds": "requests could bring tensors, whose sizes nothing here bounds",
    "enable_trace_replay": "requests could force what a model answers",
    "enable_log_requests": "it would write prompts into the log",
    "disable_log_stats": "tokens and speeds are counted from these statistics",
    "enable_mm_processor_stats": "the server of vLLM has no such argument",
    "structured_outputs_config": "grammars are checked for one compiler before vLLM gets them; the "
    "parser of reasoning text has the key vllm.reasoning_parser",
    # Processes.
    "distributed_executor_backend": _PLACED.format("gpus and vllm.tensor_parallel_size"),
    **{
        name: _PLACED.format("gpus, and vllm.args.data_parallel_size or max_replicas")
        for name in (
            "data_parallel_rank",
            "data_parallel_start_rank",
            "data_parallel_size_local",
            "data_parallel_address",
            "data_parallel_rpc_port",
            "data_parallel_hybrid_lb",
            "data_parallel_external_lb",
            "data_parallel_multi_port_external_lb",
            "data_parallel_backend",
            "enable_elastic_ep",
            "elastic_ep_max_dp_size",
            "nnodes",
            "node_rank",
            "master_addr",
            "master_port",
            "device_ids",
            "prefill_context_parallel_size",
            "ray_workers_use_nsight",
            "_api_process_count",
            "_api_process_rank",
        )
    },
    "enable_fault_tolerance": "a pool notices a dead engine and starts it again",
    "fault_tolerance_config": "a pool notices a dead engine and starts it again",
    "weight_transfer_config": "swaps change weights; see swap.method",
    "kv_transfer_config": _MESSAGES,
    "kv_events_config": _MESSAGES,
    "ec_transfer_config": _MESSAGES,
}
"""Engine arguments that can't be given, each with the reason and the key to use instead."""

_SERVER = {
    "host": _HAS_KEY.format("server.host"),
    "port": _HAS_KEY.format("server.port"),
    "api_key": _HAS_KEY.format("keys"),
    "tool_call_parser": _HAS_KEY.format("vllm.tool_call_parser"),
    "enable_auto_tool_choice": _HAS_KEY.format("vllm.tool_call_parser, which turns it on"),
    "chat_template": "the chat template is read from the expert's folder",
}

PASSED = frozenset(
    {
        "enable_return_routed_experts",
        "return_sampling_mask",
        "tokenizer_mode",
        "safetensors_load_strategy",
        "safetensors_prefetch_num_threads",
        "safetensors_prefetch_block_size",
        "config_format",
        "kv_cache_dtype",
        "seed",
        "cudagraph_capture_sizes",
        "max_cudagraph_capture_size",
        "ir_op_priority",
        "pipeline_parallel_size",
        "distributed_timeout_seconds",
        "cpu_distributed_timeout_seconds",
        "numa_bind",
        "numa_bind_nodes",
        "numa_bind_cpus",
        "decode_context_parallel_size",
        "dcp_comm_backend",
        "dcp_q_replicate",
        "dcp_kv_cache_interleave_size",
        "cp_kv_cache_interleave_size",
        "data_parallel_size",
        "enable_hc_sp",
        "enable_batch_sharded_sampling",
        "enable_ep_weight_filter",
        "linear_backend",
        "sparse_indexer_topk_backend",
        "all2all_backend",
        "enable_dbo",
        "ubatch_size",
        "dbo_decode_token_threshold",
        "dp_sync_interval",
        "dbo_prefill_token_threshold",
        "disable_nccl_for_dp_synchronization",
        "max_parallel_loading_workers",
        "block_size",
        "enable_prefix_caching",
        "prefix_caching_hash_algo",
        "prefix_cache_retention_interval",
        "disable_sliding_window",
        "disable_cascade_attn",
        "offload_backend",
        "cpu_offload_gb",
        "cpu_offload_params",
        "offload_group_size",
        "offload_num_in_group",
        "offload_prefetch_step",
        "offload_params",
        "gpu_memory_utilization",
        "max_num_batched_tokens",
        "max_num_scheduled_tokens",
        "long_prefill_token_threshold",
        "long_prefill_token_threshold_adaptive",
        "max_num_active_seqs",
        "max_num_queued_tokens",
        "max_logprobs",
        "logprobs_mode",
        "use_fp64_gumbel",
        "aggregate_engine_logging",
        "hf_overrides",
        "quantization",
        "quantization_config",
        "allow_deprecated_quantization",
        "disable_custom_all_reduce",
        "enable_shm_tensor_arena",
        "language_model_only",
        "limit_mm_per_prompt",
        "interleave_mm_strings",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "mm_hasher_algorithm",
        "mm_shm_cache_max_object_size_mb",
        "mm_encoder_only",
        "mm_encoder_tp_mode",
        "mm_encoder_attn_backend",
        "mm_encoder_attn_dtype",
        "mm_encoder_fp8_scale_path",
        "renderer_num_workers",
        "skip_mm_profiling",
        "video_pruning_rate",
        "video_pruning_method",
        "mm_tensor_ipc",
        "mm_processor_device",
        "mm_ipc_gpu_memory_gb",
        "mm_device_do_normalize",
        "fully_sharded_loras",
        "lora_dtype",
        "lora_target_modules",
        "enable_tower_connector_lora",
        "specialize_active_lora",
        "enable_mixed_moe_lora_format",
        "enable_moe_shared_loras",
        "max_lora_cls_labels",
        "model_loader_extra_config",
        "ignore_patterns",
        "enable_chunked_prefill",
        "disable_chunked_mm_input",
        "scheduler_reserve_full_isl",
        "prefill_schedule_interval",
        "watermark",
        "disable_hybrid_kv_cache_manager",
        "aux_output_config",
        "speculative_config",
        "watermark_config",
        "diffusion_config",
        "show_hidden_metrics_for_version",
        "per_request_spec_decode_metrics",
        "kv_cache_metrics",
        "kv_cache_metrics_sample",
        "custom_histogram_buckets",
        "cudagraph_metrics",
        "enable_layerwise_nvtx_tracing",
        "enable_mfu_metrics",
        "enable_logging_iteration_details",
        "jit_monitor_mode",
        "jit_monitor_verbose",
        "scheduling_policy",
        "pooler_config",
        "compilation_config",
        "attention_config",
        "engram_config",
        "kernel_config",
        "enable_flashinfer_autotune",
        "reasoning_config",
        "generation_config",
        "sleep_mode_offload_cudagraph",
        "sleep_preserve_parameter_names",
        "enable_nccl_comm_suspend",
        "override_generation_config",
        "model_impl",
        "attention_backend",
        "kv_cache_dtype_skip_layers",
        "mamba_cache_dtype",
        "mamba_ssm_cache_dtype",
        "mamba_block_size",
        "prefix_match_unit",
        "mamba_cache_mode",
        "enable_mamba_shared_prefix_checkpoint",
        "replayssm_buffer_len",
        "use_replayssm",
        "mamba_backend",
        "mamba_ssu_algorithm",
        "enable_mamba_cache_stochastic_rounding",
        "mamba_cache_philox_rounds",
        "use_tqdm_on_load",
        "async_scheduling",
        "stream_interval",
        "kv_sharing_fast_prefill",
        "swa_bounded_replay",
        "optimization_level",
        "performance_mode",
        "kv_offloading_size",
        "kv_offloading_backend",
        "shutdown_timeout",
        "fail_on_environ_validation",
        "gdn_prefill_backend",
        "kda_prefill_backend",
        "kda_decode_backend",
    }
)
"""Engine arguments that pass to vLLM."""

PARALLEL = ("pipeline_parallel_size", "data_parallel_size")
"""Arguments that multiply the GPUs of one engine."""

_MOST_GIB = 1_000_000

_DRAFT_FIXED = {
    "draft_load_config": OWNED["load_format"],
    "revision": _FILES,
    "code_revision": OWNED["code_revision"],
}


def argument_name(key: object) -> str:
    """The name of an engine argument as Python has it; a config may write it as a shell does."""
    return str(key).removeprefix("--").replace("-", "_")


def _known(args: object) -> object:
    """Refuse arguments that are owned, unknown or without a value. Hyphens count as underscores."""
    if not isinstance(args, Mapping):
        return args  # pydantic says what is needed
    found: dict[str, Any] = {}
    for key, value in args.items():
        name = argument_name(key)
        if (reason := OWNED.get(name) or _SERVER.get(name)) is not None:
            raise ValueError(f"{name} can't be given to vLLM: {reason}")
        if name not in PASSED:
            close = difflib.get_close_matches(name, PASSED | OWNED.keys(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"vLLM 0.32 has no engine argument {shown(name)}{hint}")
        if value is None:
            raise ValueError(f"{name} has no value; leave it out for vLLM's default")
        if name in found:
            raise ValueError(f"{name} is given twice")
        words = value if isinstance(value, list) else ()
        if any(isinstance(word, str) and word.lstrip().startswith("-") for word in words):
            raise ValueError(f"{name}: vLLM would take a text that begins with - for an argument")
        found[name] = value
    return found


def _sensible(args: dict[str, Any]) -> dict[str, Any]:
    """Check the values that the memory plan and the placement read."""
    for name in PARALLEL:
        size = args.get(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} should be a whole number of at least 1, not {shown(size)}")
    share = args.get("gpu_memory_utilization", 1)
    if not _is_number(share) or not 0 < share <= 1:
        raise ValueError(
            f"gpu_memory_utilization should be a number above 0 and at most 1, not {shown(share)}"
        )
    for name in ("cpu_offload_gb", "kv_offloading_size"):
        size = args.get(name, 0)
        if not _is_number(size) or not 0 <= size <= _MOST_GIB:
            raise ValueError(f"{name} should be a number of GiB, at least 0, not {shown(size)}")
    for name in ("kv_cache_dtype", "quantization"):
        if not isinstance(args.get(name, ""), str):
            raise ValueError(f"{name} should be a text, not {shown(args[name])}")
    compilation = args.get("compilation_config", {})
    if not isinstance(compilation, dict):
        raise ValueError(f"compilation_config should be a mapping, not {shown(compilation)}")
    for name in ("backend", "inductor_passes"):
        if "." in str(compilation.get(name, "")):
            raise ValueError(f"compilation_config.{name} can't be given to vLLM: {_CODE}")
    for name in map(argument_name, compilation):
        if name in ("debug_dump_path", "cache_dir"):
            raise ValueError(f"compilation_config.{name} can't be given to vLLM: {_WRITES}")
    defaults = args.get("generation_config", "auto")
    if defaults not in ("auto", "vllm"):
        raise ValueError(
            "generation_config should be auto, the defaults of the expert's folder, or vllm, those "
            f"of vLLM, not {shown(defaults)}; {_FOLDER}"
        )
    draft = args.get("speculative_config", {})
    if not isinstance(draft, dict):
        raise ValueError(f"speculative_config should be a mapping, not {shown(draft)}")
    for name, reason in _DRAFT_FIXED.items():
        if name in draft:
            raise ValueError(f"speculative_config.{name} can't be given to vLLM: {reason}")
    if draft.get("method") == "custom_class":
        raise ValueError(f"speculative_config.method custom_class: {_CODE}")
    if draft.get("method") == "suffix" and draft.get("suffix_decoding_max_cached_requests") != 0:
        raise ValueError(
            "speculative_config.method suffix needs suffix_decoding_max_cached_requests: 0; it "
            "would draft from other tenants' texts, so that times would tell of them"
        )
    model = draft.get("model")
    if model is not None and not (isinstance(model, str) and is_path(model)):
        raise ValueError(
            "speculative_config.model should be the path of a folder of this machine, which begins "
            f"with ./, ../, / or ~, not {shown(model)}"
        )
    return args


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


EngineArguments = Annotated[dict[str, Any], BeforeValidator(_known), AfterValidator(_sensible)]
