"""`python -m tests.support.engine.quantised_exchanges FOLDER WAY`: swaps of quantised models.

For each form of weights a line of JSON. Two random models take turns in vLLM's engine: by
`reference`, as on a CPU, or by `copies` into live parameters, as on a GPU. The engine of one way
starts with the first model, and that of the other with the second, so that each answer after a swap
can be compared with that of an engine that was started with the model. A process has one way,
because vLLM changes its worker's class for it.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams, _custom_ops
from vllm.distributed import cleanup_dist_env_and_memory

from service.cli.doctor.greedy_answers import GreedyAnswer, disagreement
from service.cli.doctor.random_models import (
    LLAMA,
    MIXTRAL,
    QUANTIZATIONS,
    SMALL,
    exact_folder,
    small_config,
    write_random_model,
)
from service.cli.doctor.transformers_reference import reference_scores

# The forms that vLLM's CPU kernels run on any machine, and a mixture that is not quantised.
CASES = ("gptq", "awq", "int8", "packed", "fp8", "mixture")
WAYS = {
    "reference": ("one", "two", "service.engine.vllm.worker.swap_extension.SwapExtension", "auto"),
    "copies": (
        "two",
        "one",
        "service.engine.vllm.worker.pinned_swap_extension.PinnedExtension",
        "tests.support.engine.plain_cpu_worker.PlainCpuWorker",
    ),
}
_PROMPTS = [[(7 * i + 31 * j) % 250 for i in range(12 + 7 * j)] for j in range(3)]
_TOKENS = 10


def _in_torch(
    weight: torch.Tensor, scale: torch.Tensor | None = None, *_: Any, **more: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of the kernel that rounds to fp8, which the CPU build lacks."""
    if scale is None:
        by_row = more.get("use_per_token_if_dynamic", False)
        largest = weight.abs().amax(-1) if by_row else weight.abs().amax()
        scale = (largest.float() / 448).clamp(min=1e-12).reshape(-1, 1)
    rounded = (weight.float() / scale).clamp(-448, 448)
    return rounded.to(torch.float8_e4m3fn), scale


def write(root: Path, case: str) -> None:
    """Write both models of a case."""
    given = MIXTRAL if case == "mixture" else LLAMA
    form = {} if case == "mixture" else {"quantization_config": QUANTIZATIONS[case]}
    config = small_config({**given, **form}, SMALL)
    for seed, name in enumerate(("one", "two")):
        write_random_model(root / case / name, config, "bfloat16", seed)


class Engine:
    """One engine and its two models."""

    def __init__(self, root: Path, way: str, shared: Path) -> None:
        self.first, self.second, extension, worker = WAYS[way]
        self.root = root
        self.llm = LLM(
            model=str(root / self.first),
            dtype="bfloat16",
            max_model_len=128,
            max_num_seqs=4,
            enforce_eager=True,
            worker_extension_cls=extension,
            worker_cls=worker,
        )
        if way == "copies":
            for name in (self.first, self.second):
                self.call("coe_share", name, str(shared / name), "token")
        self.fixed = self.call("coe_register_initial", self.first)

    def call(self, method: str, *args: Any) -> Any:
        (answer,) = self.llm.collective_rpc(method, args=args)
        return answer

    def load(self) -> dict[str, Any]:
        """Load the second model beside the first one."""
        self.call("coe_load_to_host", self.second, str(self.root / self.second), None, 1.0)
        until_s = time.monotonic() + 60
        while (result := self.call("coe_load_result", self.second))["state"] == "loading":
            assert time.monotonic() < until_s
            time.sleep(0.001)  # a thread of the worker's own: there is no event to await
        return dict(result)

    def swap(self, name: str) -> bool:
        done = self.call("coe_swap_in", name)
        self.llm.reset_prefix_cache()
        return bool(done["ok"]) and done["method"] == "inplace"

    def say(self) -> list[GreedyAnswer]:
        sampling = SamplingParams(temperature=0, max_tokens=_TOKENS, ignore_eos=True, logprobs=0)
        prompts = [{"prompt_token_ids": prompt} for prompt in _PROMPTS]
        said = []
        for answer in self.llm.generate(prompts, sampling, use_tqdm=False):
            (output,) = answer.outputs
            tokens = tuple(output.token_ids)
            found = zip(output.logprobs, tokens, strict=True)
            said.append(GreedyAnswer(tokens, tuple(row[token].logprob for row, token in found)))
        return said

    def close(self) -> None:
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()


def exchange(root: Path, way: str) -> dict[str, Any]:
    """Let both models of a case take turns, and compare."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shared:
        engine = Engine(root, way, Path(shared))
        try:
            said = [engine.say()]
            held = engine.load()
            found: dict[str, Any] = {"fixed": engine.fixed, "state": held["state"]}
            if held["state"] != "host":
                return {**found, "reason": held.get("reason")}
            oks = []
            for name in (engine.second, engine.first, engine.second, engine.first):
                oks.append(engine.swap(name))
                said.append(engine.say())
            scores = reference_scores(exact_folder(root / engine.first), _PROMPTS, said[0])
            wrong = [disagreement(a, s, 0.3) for a, s in zip(said[0], scores, strict=True)]
            return found | {
                "ok": all(oks),
                "back": said[0] == said[2] == said[4] and said[1] == said[3],
                "differ": said[0] != said[1],
                "wrong": [why for why in wrong if why],
                "fresh": {engine.first: [asdict(answer) for answer in said[0]]},
                "swapped": {engine.second: [asdict(answer) for answer in said[1]]},
            }
        finally:
            engine.close()


def main(root: Path, way: str) -> None:
    _custom_ops.scaled_fp8_quant = _in_torch
    for case in CASES:
        try:
            write(root, case)
            found = exchange(root / case, way)
        except Exception as error:
            found = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": case, **found}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
