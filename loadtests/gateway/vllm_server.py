"""vLLM's own API server with the model and the arguments of this service's engine."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtests.lib.child_processes import fetch, running

_START_S = 300.0
_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"


@dataclass(frozen=True, slots=True)
class EngineArguments:
    """Options of both engines. `threads`: OMP threads of each."""

    model: Path
    threads: int
    dtype: str = "float32"
    max_model_len: int = 1024
    max_num_seqs: int = 32
    kv_cache_bytes: int = 512 * 1024**2

    def pool(self) -> dict[str, Any]:
        """Return the options as a pool of the config."""
        return {
            "engine": "vllm",
            "vllm": {
                "dtype": self.dtype,
                "max_model_len": self.max_model_len,
                "max_num_seqs": self.max_num_seqs,
                "kv_cache_bytes": self.kv_cache_bytes,
                "threads": self.threads,
                "enforce_eager": True,
            },
        }

    def command_line(self, name: str) -> list[str]:
        """Return the options as arguments of vLLM's server."""
        return [
            *("--model", str(self.model), "--served-model-name", name, "--dtype", self.dtype),
            *("--max-model-len", str(self.max_model_len)),
            *("--max-num-seqs", str(self.max_num_seqs)),
            *("--kv-cache-memory-bytes", str(self.kv_cache_bytes)),
            *("--distributed-executor-backend", _EXECUTOR, "--load-format", "safetensors"),
            "--enforce-eager",
        ]


def model_folder() -> Path:
    """The demo's model, fetched before by `coe models pull`."""
    root = os.environ.get("COE_MODELS") or Path.home() / ".cache" / "coe" / "models"
    folder = Path(root) / "smollm2-135m-instruct"
    if not folder.is_dir():
        raise RuntimeError("first: coe models pull smollm2-135m-instruct")
    return folder


@contextmanager
def bare_server(port: int, name: str, arguments: EngineArguments) -> Iterator[None]:
    """Run vLLM's own server, as a module: the `vllm` command does not work in the CPU build."""
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"),
        *arguments.command_line(name),
    ]
    env = {
        "OMP_NUM_THREADS": str(arguments.threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }

    def ready() -> bool:
        return fetch(port, "/health")[0] == 200

    with running("bare vLLM", command, ready, timeout_s=_START_S, env=env):
        yield
