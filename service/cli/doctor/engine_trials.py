"""The trials: each runs the engine classes of pools on random models, in a process of its own."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import orjson
from prometheus_client import CollectorRegistry

from service.cli.doctor.greedy_answers import (
    GreedyAnswer,
    ReferenceScores,
    are_alike,
    judge_answers,
)
from service.cli.doctor.memory_bandwidth import memory_bytes_per_s
from service.cli.doctor.quantised_weights import form_of
from service.cli.doctor.random_models import exact_folder, write_random_model
from service.cli.doctor.transformers_reference import reference_scores
from service.cli.doctor.trial_spec import TrialLog, TrialSpec
from service.config import MoeCapture, VllmOptions
from service.engine.engine_interface import (
    Engine,
    EngineRequest,
    EngineTimings,
    Message,
    RoutingSample,
)
from service.engine.gpu_share import GpuShare
from service.engine.shared_weight_cache import SharedWeightCache
from service.engine.sleeping_engines import SleepingEngines
from service.engine.steering_data import SteeredLayer, Steering
from service.engine.swap_proof import one_line
from service.engine.vllm.engine import VllmEngine, VllmModel
from service.engine.vllm.swapping_engine import SwappingVllmEngine, Weights
from service.moe.gate_shapes import moe_shape

MODELS = ("one", "two")
_PROMPT_TOKENS = (7, 24, 40)
_TOKENS = 16
_STREAM_TOKENS = 96
_SWAPS = 4
# A share that is free beside other engines. The KV cache has a size of its own.
_SHARE = GpuShare(0.25)
# Fewer tokens beside a load tell nothing of stalls.
_LEAST_GAPS = 8
_count = itertools.count()


def prompts() -> list[list[int]]:
    """Return the token ids of the prompts."""
    chance = random.Random(0)
    return [[chance.randrange(256) for _ in range(length)] for length in _PROMPT_TOKENS]


async def _complete(
    engine: Engine, model: str, body: Mapping[str, object], heard: Callable[[], None] | None = None
) -> bytes:
    """Return the body of an engine's answer. `heard` is called at each part of it.

    Raises:
        CoeError: The engine failed.
        ValueError: It refused the request.
    """
    parts: list[bytes] = []
    status = 200

    async def collect(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))
        if heard is not None and message.get("body"):
            heard()

    whole = {"model": model, "temperature": 0, "ignore_eos": True, **body}
    request = EngineRequest("/v1/completions", model, orjson.dumps(whole), f"doctor-{next(_count)}")
    await engine.run(request, collect)
    text = b"".join(parts)
    if status != 200:
        raise ValueError(one_line(text.decode(errors="replace")))
    return text


async def _ask(engine: Engine, model: str) -> list[GreedyAnswer]:
    """Return the greedy answers to all prompts, asked one after the other."""
    answers = []
    for prompt in prompts():
        body = {"prompt": prompt, "max_tokens": _TOKENS, "return_token_ids": True, "logprobs": 1}
        (choice,) = orjson.loads(await _complete(engine, model, body))["choices"]
        logprobs = choice["logprobs"]["token_logprobs"]
        answers.append(GreedyAnswer(tuple(choice["token_ids"]), tuple(logprobs)))
    return answers


async def _gaps_s(engine: Engine, model: str) -> list[float]:
    """Return the seconds between the tokens of a stream."""
    times: list[float] = []
    prompt = [next(_count) % 256 for _ in range(8)]
    body = {"prompt": prompt, "max_tokens": _STREAM_TOKENS, "stream": True}
    await _complete(engine, model, body, lambda: times.append(time.perf_counter()))
    # The last message ends the stream and holds no token.
    return [b - a for a, b in itertools.pairwise(times[:-1])]


# --- prepare


def prepare(spec: TrialSpec, log: TrialLog) -> None:
    """Write the models, and measure the machine's bandwidth."""
    log.step("writing random models")
    for seed, name in enumerate(MODELS):
        size = write_random_model(spec.model(name), spec.config, spec.dtype, seed)
    if not spec.quick:
        write_random_model(spec.model("moe"), spec.moe_config, spec.dtype, 0)
    log.figures("inplace", weight_bytes=float(size))
    log.step("measuring the memory's bandwidth")
    try:
        log.figures("inplace", memory_bytes_per_s=memory_bytes_per_s(on_cpu=spec.on_cpu))
    except RuntimeError as error:
        # The engine will say whether it can use the GPU.
        log.step(f"the memory's bandwidth is unknown: {one_line(error)}")


# --- fresh engines


async def fresh(spec: TrialSpec, log: TrialLog) -> None:
    """Record what an engine of each model alone answers. This is what a swap by respawn does."""
    answers: dict[str, list[GreedyAnswer]] = {}
    for name in MODELS:
        log.step(f"starting an engine for model {name}")
        engine = VllmEngine(
            VllmModel(name, str(spec.model(name)), {}),
            _options(spec),
            on_cpu=spec.on_cpu,
            gpu_share=_share(spec),
        )
        try:
            began_s = time.perf_counter()
            await engine.start()
            log.figures("respawn", start_s=time.perf_counter() - began_s)
            log.step(f"asking model {name}")
            answers[name] = await _ask(engine, name)
        finally:
            await engine.stop()
    log.step("comparing the answers with transformers")
    scores = {
        name: await asyncio.to_thread(
            reference_scores, exact_folder(spec.model(name)), prompts(), said
        )
        for name, said in answers.items()
    }
    fault = _judge(spec, {name: [said] for name, said in answers.items()}, scores, {})
    if fault is None and are_alike(*answers.values()):
        fault = "the two models answer alike, so that swaps would show nothing"
    log.judged("respawn", fault)
    if fault is None:
        saved = {
            name: {
                "answers": [asdict(answer) for answer in answers[name]],
                "scores": [asdict(score) for score in scores[name]],
            }
            for name in MODELS
        }
        spec.answers.write_text(json.dumps(saved), encoding="utf-8")


def _saved(
    spec: TrialSpec,
) -> tuple[dict[str, list[GreedyAnswer]], dict[str, list[ReferenceScores]]]:
    """Read the answers of fresh engines, and their scores. Both are empty in a quick run."""
    if spec.quick:
        return {}, {}
    if not spec.answers.exists():
        raise ValueError("fresh engines gave no answers to compare with")
    saved = json.loads(spec.answers.read_text(encoding="utf-8"))

    def read(kind: type, rows: Sequence[Mapping[str, Sequence[Any]]]) -> list[Any]:
        return [kind(**{name: tuple(value) for name, value in row.items()}) for row in rows]

    answers = {name: read(GreedyAnswer, saved[name]["answers"]) for name in MODELS}
    scores = {name: read(ReferenceScores, saved[name]["scores"]) for name in MODELS}
    return answers, scores


# --- in place


class _MeasuredEngine(SwappingVllmEngine):
    """The engine of pools, which keeps what its workers say of the last swap."""

    last_swap: Mapping[str, Any] = {}

    async def worker_rpc(self, method: str, *args: object) -> Any:
        answer = await super().worker_rpc(method, *args)
        if method == "coe_swap_in":
            self.last_swap = answer
        return answer


async def inplace(spec: TrialSpec, log: TrialLog) -> None:
    """Let two models of one family take turns in a running engine."""
    answers, scores = _saved(spec)
    said: dict[str, list[list[GreedyAnswer]]] = {name: [] for name in MODELS}
    cache = None if spec.on_cpu else SharedWeightCache(None)
    engine = _MeasuredEngine(
        MODELS[0],
        {name: Weights(str(spec.model(name))) for name in MODELS},
        _options(spec),
        on_cpu=spec.on_cpu,
        canary_interval=1,
        canaries={},
        cache=cache,
        gpu_share=_share(spec),
    )
    log.step("starting an engine")
    try:
        began_s = time.perf_counter()
        await engine.start()
        log.figures("inplace", start_s=time.perf_counter() - began_s)
        log.step("asking model one")
        said["one"].append(await _ask(engine, "one"))
        log.step("loading model two beside running requests")
        await _load_beside(engine, log)
        swap_s, install_s = [], []
        for name in itertools.islice(itertools.cycle(("two", "one")), _SWAPS):
            log.step(f"swapping in model {name}")
            swap_s.append(await _swap(engine.swap_in(name)))
            install_s.append(float(engine.last_swap["install_s"]))
            log.step(f"asking model {name} after a swap")
            said[name].append(await _ask(engine, name))
        log.figures("inplace", swap_s=statistics.median(swap_s))
        if not spec.on_cpu:
            size = _weight_bytes(spec.model("one"))
            log.figures("inplace", copy_bytes_per_s=size / statistics.median(install_s))
    finally:
        await engine.stop()
        if cache is not None:
            cache.close()
    log.step("comparing the answers")
    if spec.quick:
        scores = {
            name: await asyncio.to_thread(
                reference_scores, exact_folder(spec.model(name)), prompts(), times[0]
            )
            for name, times in said.items()
        }
    fault = _judge(spec, said, scores, answers)
    if fault is None and are_alike(said["one"][0], said["two"][0]):
        fault = "the two models answer alike, so that swaps show nothing"
    log.judged("inplace", fault)


async def _swap(swap: Awaitable[Any]) -> float:
    """Await a swap and return its seconds.

    Raises:
        ValueError: The weights failed verification.
    """
    result = await swap
    if not result.ok:
        raise ValueError("the weights or the canary failed verification after a swap")
    return float(result.swap_s)


async def _load_beside(engine: SwappingVllmEngine, log: TrialLog) -> None:
    """Load model two while a request for model one runs, and compare its tokens' times."""
    await _gaps_s(engine, "one")
    alone = await _gaps_s(engine, "one")
    beside: list[float] = []
    fills = []
    for turn in range(3):
        if turn:
            await engine.evict("two")
        times: list[float] = []
        begun = asyncio.Event()

        def heard(times: list[float] = times, begun: asyncio.Event = begun) -> None:
            times.append(time.perf_counter())
            begun.set()

        body = {"prompt": [turn] * 8, "max_tokens": 4 * _STREAM_TOKENS, "stream": True}
        stream = asyncio.create_task(_complete(engine, "one", body, heard))
        stream.add_done_callback(partial(_set_event, begun))
        await begun.wait()
        filled = await engine.load_to_host("two")
        fills.append(filled)
        ended_s = time.perf_counter()
        if stream.done():
            stream.result()
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
        beside += [b - a for a, b in itertools.pairwise(t for t in times if t <= ended_s)]
    fill_s = statistics.median(filled.fill_s for filled in fills)
    log.figures("inplace", fill_s=fill_s, fill_bytes_per_s=fills[-1].host_bytes / fill_s)
    # Only the first one may have made the weights, which later ones find in shared memory.
    if (ratio := max(filled.layer_room_ratio for filled in fills)) > 0:
        log.figures("inplace", layer_room_ratio=ratio)
    if len(beside) >= _LEAST_GAPS:
        log.figures(
            "inplace",
            stall_median_ratio=statistics.median(beside) / statistics.median(alone),
            stall_mean_ratio=statistics.mean(beside) / statistics.mean(alone),
            longest_gap_s=max(beside),
        )


def _set_event(event: asyncio.Event, _: object) -> None:
    event.set()


# --- sleep


async def sleep(spec: TrialSpec, log: TrialLog) -> None:
    """Let two engines take turns on one GPU, of which one sleeps."""
    answers, scores = _saved(spec)
    said: dict[str, list[list[GreedyAnswer]]] = {name: [] for name in MODELS}
    made: dict[str, VllmEngine] = {}

    def build(name: str) -> VllmEngine:
        made[name] = VllmEngine(
            VllmModel(name, str(spec.model(name)), {}),
            _options(spec),
            on_cpu=False,
            sleep_level=1,
            gpu_share=_share(spec),
        )
        return made[name]

    engines = SleepingEngines("one", {name: (name,) for name in MODELS}, build, {})
    log.step("starting the first engine")
    try:
        await engines.start()
        said["one"].append(await _ask(engines, "one"))
        swap_s = []
        for turn, name in enumerate(itertools.islice(itertools.cycle(("two", "one")), 6)):
            log.step(f"changing to model {name}" if turn else "starting the second engine")
            took_s = await _swap(engines.swap_in(name))
            if turn:
                swap_s.append(took_s)
            said[name].append(await _ask(engines, name))
        size = _weight_bytes(spec.model("one"))
        middle_s = statistics.median(swap_s)
        log.figures(
            "sleep", swap_s=middle_s, weight_bytes=float(size), copy_bytes_per_s=size / middle_s
        )
        log.step("measuring sleep and wake")
        awake = made["one"]
        times: list[tuple[float, float]] = []
        for _ in range(3):
            began_s = time.perf_counter()
            await awake.sleep()
            slept_s = time.perf_counter()
            await awake.wake()
            times.append((slept_s - began_s, time.perf_counter() - slept_s))
        log.figures(
            "sleep",
            sleep_s=statistics.median(t[0] for t in times),
            wake_s=statistics.median(t[1] for t in times),
        )
        said["one"].append(await _ask(engines, "one"))
    finally:
        await engines.stop()
    log.step("comparing the answers")
    log.judged("sleep", _judge(spec, said, scores, answers))


# --- steering and capture


@dataclass(slots=True)
class _SampleCollector:
    """Keeps an engine's samples of gates."""

    samples: list[RoutingSample] = field(default_factory=list)

    def on_finished(self, work: EngineTimings) -> None:
        pass

    def on_weights(self, expert: str, size_bytes: int) -> None:
        pass

    def on_routing_sample(self, chosen: RoutingSample) -> None:
        self.samples.append(chosen)

    def on_removed(self, expert: str) -> None:
        pass

    def engine_registry(self, expert: str) -> CollectorRegistry:
        return CollectorRegistry()

    def load(self, expert: str) -> Any:
        """Return the tokens of each routed expert by layer, int64 (layers, experts), or 0."""
        return sum(s.load for s in self.samples if s.expert == expert and s.load is not None)


async def steering(spec: TrialSpec, log: TrialLog) -> None:
    """Keep a mixture from its first routed experts, and look at what its gates choose."""
    folder = spec.model("moe")
    shape = moe_shape(folder)
    if shape is None:
        raise ValueError("the random model has no gates")
    barred = (shape.experts - shape.top_k) // 2
    experts = shape.experts
    mask = tuple(expert < barred for expert in range(experts))
    rows = tuple(
        SteeredLayer(layer, mask, (0.0,) * experts, (1.0,) * experts) for layer in shape.layers
    )
    rules = Steering("plain", experts, shape.top_k, shape.renormalize, rows)
    weights = {
        "plain": Weights(str(folder)),
        "masked": Weights(str(folder), steering=rules),
    }
    watch = _SampleCollector()
    options = _options(spec).model_copy(
        update={
            "moe_capture": MoeCapture(every=1, stretches=0, tokens=32),
            "enforce_eager": spec.on_cpu or _options(spec).enforce_eager,
        }
    )
    cache = None if spec.on_cpu else SharedWeightCache(None)
    engine = SwappingVllmEngine(
        "plain",
        weights,
        options,
        on_cpu=spec.on_cpu,
        canary_interval=10**6,
        canaries={},
        observer=watch,
        cache=cache,
        gpu_share=_share(spec),
    )
    log.step("starting an engine for a mixture of experts")
    said: dict[str, list[list[GreedyAnswer]]] = {name: [] for name in weights}
    try:
        await engine.start()
        said["plain"].append(await _ask(engine, "plain"))
        await engine.load_to_host("masked")
        for name in ("masked", "plain", "masked"):
            log.step(f"changing the gates to {name}")
            await _swap(engine.swap_in(name))
            said[name].append(await _ask(engine, name))
    finally:
        await engine.stop()
        if cache is not None:
            cache.close()
    changed = [name for name, times in said.items() if times[0] != times[1]]
    fault = f"{changed[0]} answers otherwise after a swap" if changed else None
    if fault is None and are_alike(said["plain"][0], said["masked"][0]):
        fault = "the steered gates change no answer"
    log.judged("steering", fault)
    log.judged("capture", _capture_fault(watch, shape.top_k, barred))


def _capture_fault(watch: _SampleCollector, top_k: int, barred: int) -> str | None:
    """Return why the samples can't be right, or None."""
    # The last token of an answer is not routed.
    tokens = 2 * sum(length + _TOKENS - 1 for length in _PROMPT_TOKENS)
    for name in ("plain", "masked"):
        load = watch.load(name)
        if isinstance(load, int):
            return f"no choice of {name} was seen"
        if {*load.sum(axis=1).tolist()} != {tokens * top_k}:
            return f"{name}: {load.sum(axis=1).tolist()} choices by layer, not {tokens * top_k}"
        if name == "masked" and load[:, :barred].any():
            return "masked routed experts were chosen"
    return None


# --- options


def _options(spec: TrialSpec) -> VllmOptions:
    return VllmOptions.model_validate_json(spec.options)


def _share(spec: TrialSpec) -> GpuShare | None:
    return None if spec.on_cpu else _SHARE


def _judge(
    spec: TrialSpec,
    said: Mapping[str, Sequence[Sequence[GreedyAnswer]]],
    scores: Mapping[str, Sequence[ReferenceScores]],
    fresh: Mapping[str, Sequence[GreedyAnswer]],
) -> str | None:
    form = form_of(spec.config)
    rounds = form is not None and form.rounds_activations
    return judge_answers(said, scores, fresh, spec.dtype, rounds_activations=rounds)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
