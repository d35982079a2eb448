"""Loads and swaps that fail, without a GPU: the old expert is whole, or the engine is broken.

The ranks' extensions are the real ones of a GPU, with a CUDA runtime that fails on demand. Between
them and the engine stands what vLLM's executor does with the answers of several workers. Experts
are plain, or quantised with a fused mixture: these are made ready layer by layer as they are
loaded, and what their kernels hold besides parameters is copied as well.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest

from service.config import VllmOptions
from service.engine.engine_interface import EngineRequest
from service.errors import CoeError, EngineDeadError, EngineRestartingError, ExpertFailedError

torch = pytest.importorskip("torch")

from service.engine.vllm import swapping_engine  # noqa: E402
from service.engine.vllm.swapping_engine import SwappingVllmEngine, Weights  # noqa: E402
from service.engine.vllm.worker import (  # noqa: E402
    pinned_swap_extension,
    swap_extension,
)
from service.engine.vllm.worker.model_state import ModelState, same_bytes  # noqa: E402
from service.engine.vllm.worker.pinned_swap_extension import is_plain, tensors_of  # noqa: E402
from service.engine.vllm.worker.second_model import LayerRoom  # noqa: E402
from tests.support.engine import dense_model, fake_cuda, processed_model  # noqa: E402

RANKS = 2
NAMES = ("a", "b", "c")
# By kind of weights, the tensors that a swap copies on each rank.
TENSORS = {"plain": 4, "processed": 9}
MAKERS: dict[str, Callable[[int], Any]] = {
    "plain": dense_model.dense_model,
    "processed": processed_model.processed_model,
}


class _ReachedVllmError(Exception):
    """A request has reached vLLM's OpenAI layer."""


async def _app(*_: Any) -> None:
    raise _ReachedVllmError


class Executor:
    """In place of vLLM, with a queue of answers for each rank, as `MultiprocExecutor` has it."""

    def __init__(self, workers: list[Any]) -> None:
        self.workers = workers
        self.errored = False
        self.paused = False
        self.hangs = self.dies = False
        self.fails_in = "coe_swap_in"
        self.fails: str | None = None
        self.rendering = self.generates = None
        self._answers: list[deque[Any]] = [deque() for _ in workers]

    def _fail(self, call: str) -> None:
        if self.fails == call:
            self.fails = None
            raise RuntimeError(f"told to fail at {call}")

    async def pause(self) -> None:
        self._fail("pause")
        self.paused = True

    async def resume(self) -> None:
        self._fail("resume")
        self.paused = False

    def use_rendering(self, rendering: Any) -> None:
        self._fail("rendering")

    async def collective_rpc(self, method: str, *args: object) -> list[Any]:
        if self.fails_in in args and (self.hangs or self.dies):
            self.errored = self.dies
            await asyncio.Event().wait()  # vLLM never completes the call
        for worker, answers in zip(self.workers, self._answers, strict=True):
            try:
                answers.append((True, getattr(worker, method)(*args)))
            except Exception as error:
                answers.append((False, error))
        found = []
        for answers in self._answers:
            worked, answer = answers.popleft()
            if not worked:
                raise RuntimeError(f"Worker failed with error '{answer}'")
            found.append(answer)
        return found


class Files:
    """In place of a second model: the experts' files, some of which can't be read.

    Attributes:
        stage: The stage.
        fails: `read`, or the number of the layer that can't be made ready.
        fails_on: The rank that fails.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.fails: str | int | None = None
        self.fails_on = 0

    def second_model(self, config: Any, folder: str, device: str | None) -> Any:
        del device
        rank = config.rank
        model = self.stage.models[rank][folder]
        here = self.fails if rank == self.fails_on else None

        def load(*_: Any, finish: bool) -> None:
            assert not finish
            if here == "read":
                raise OSError(errno.EIO, "Input/output error")

        def process(device: Any, turns: Any, shared: Any) -> None:
            assert shared
            for number in range(3):

                def ready(number: int = number) -> None:
                    if number == here:
                        raise MemoryError("told to have no room")

                turns.take(ready)

        return SimpleNamespace(model=model, load=load, process=process, room=LayerRoom(8, 20))


class Engine(SwappingVllmEngine):
    """The engine itself, whose canary is the models' output."""

    canary_fails = False

    async def _version_of(self, source: Weights) -> str:
        return source.folder

    async def _load_frontend_or_evict(self, expert: str, source: Weights) -> None:
        """Do nothing: the experts have their OpenAI layers."""

    async def check_canary(self, expert: str) -> bool:
        if self.canary_fails:
            raise ValueError("told to fail")
        return True


class Stage:
    """An engine of two ranks that holds three experts and runs the first."""

    def __init__(self, kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind = kind
        make = MAKERS[kind]
        self.copies = RANKS * TENSORS[kind]
        self.folder = folder
        self.cuda = fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())
        self.fails_at: set[int] = set()
        self.drops_at: set[int] = set()
        self._copies = itertools.count()
        self._counts = False
        copy = pinned_swap_extension._copy_pinned

        def counted(source: Any, offset: int, target: Any) -> None:
            assert self.cuda.has(source.data_ptr(), source.numel() * source.element_size())
            number = next(self._copies) if self._counts else -1
            if number in self.fails_at:
                target.flatten()[: target.numel() // 2].copy_(
                    source.flatten()[: source.numel() // 2]
                )
                raise RuntimeError("CUDA error: unspecified launch failure")
            if number not in self.drops_at:
                copy(source, offset, target)

        monkeypatch.setattr(pinned_swap_extension, "_copy_pinned", counted)
        self.fills_fail: set[int] = set()
        self._fills = itertools.count()
        fill = pinned_swap_extension.copy_to

        def filled(tensors: Any, name: str, memory: memoryview) -> None:
            if next(self._fills) in self.fills_fail:
                raise OSError(errno.EIO, "Input/output error")
            fill(tensors, name, memory)

        monkeypatch.setattr(pinned_swap_extension, "copy_to", filled)
        self.models = [
            {name: make(10 * rank + i) for i, name in enumerate(NAMES)} for rank in range(RANKS)
        ]
        self.workers = [
            dense_model.extension(make(10 * rank), folder, rank, RANKS) for rank in range(RANKS)
        ]
        for rank, worker in enumerate(self.workers):
            worker.vllm_config.rank = rank
        self.files = Files(self)
        monkeypatch.setattr(swap_extension, "SecondModel", self.files.second_model)
        # It takes a tenth of a second in this process, and changes nothing that is looked at.
        monkeypatch.setattr(swap_extension, "gc", SimpleNamespace(collect=int))
        # A folder is known by its expert's name.
        weights = {name: Weights(name) for name in NAMES}
        self.engine = Engine(
            "a", weights, VllmOptions(), on_cpu=False, canary_interval=1, canaries={}
        )
        self.engine._poll_s = 0.001
        self.executor = Executor(self.workers)
        self.engine._handle = self.executor  # type: ignore[assignment]
        self.engine._running = "a"
        for name in NAMES:
            self.engine._frontends[name] = swapping_engine._Frontend(
                _app,  # type: ignore[arg-type]
                weights[name],
                "",
                None,  # type: ignore[arg-type]
            )

    async def hold(self) -> None:
        """Make all experts held, as a slot would."""
        assert not await self.engine.worker_rpc("coe_register_initial", "a")
        for name in NAMES[1:]:
            result = await self.engine.load_to_host(name)
            assert result.layer_room_ratio == (2.5 if self.kind == "processed" else 0)
        self._counts = True

    def runs(self, expert: str) -> bool:
        """Whether every value of all ranks' models is this expert's."""
        return all(
            same_bytes(live, _tensors(models[expert])[name])
            for models, worker in zip(self.models, self.workers, strict=True)
            for name, live in _tensors(worker.model_runner.model).items()
        )

    async def answers(self) -> set[str]:
        """The experts whose requests the engine would let through to vLLM."""
        found = set()
        for name in NAMES:
            request = EngineRequest("/v1/completions", name, b"{}", "r")
            try:
                await self.engine.run(request, None)  # type: ignore[arg-type]
            except EngineRestartingError:
                continue
            except _ReachedVllmError:
                found.add(name)
        return found

    async def check(self, believed: str) -> None:
        """A healthy engine answers for one expert, and with this expert's weights.

        Args:
            believed: The expert that a slot takes for the running one.
        """
        answering = await self.answers()
        if self.engine.failure() is not None:
            assert not answering
            return
        assert not self.executor.paused
        assert answering <= {believed}
        for name in answering:
            assert self.runs(name)


def _tensors(model: Any) -> dict[str, Any]:
    return tensors_of(model) if is_plain(model) else ModelState.of(model).tensors


@pytest.fixture(params=["plain", "processed"])
def stage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(swapping_engine, "_SWAP_TIMEOUT_S", 2.0)
    monkeypatch.setattr(swapping_engine, "_CHECK_ALIVE_S", 0.01)
    return Stage(request.param, tmp_path, monkeypatch)


Fault = Callable[[Stage], object]


def _copy(*numbers: int) -> Fault:
    return lambda stage: stage.fails_at.update(numbers)


def _set(**what: Any) -> Fault:
    def act(stage: Stage) -> None:
        for name, value in what.items():
            for owner in (stage.executor, stage.cuda, stage.engine):
                if hasattr(owner, name):
                    setattr(owner, name, value)

    return act


def faults(kind: str) -> dict[str, tuple[Fault, bool]]:
    """By what fails in a swap, whether the old expert goes on."""
    tensors = TENSORS[kind]
    copies = RANKS * tensors
    return {
        **{f"copy {n}": (_copy(n), True) for n in range(copies)},
        # The copies back fail, too, on either rank: they come after those of both ranks.
        **{
            f"copy {n} and {m} back": (_copy(n, *range(m, m + 2 * copies)), False)
            for n in (1, tensors + 1)
            for m in (copies, copies + 3, copies + tensors)
        },
        "the end of the copies": (_set(copies_fail=1), True),
        "the end of all copies": (_set(copies_fail=99), False),
        "the core's life": (_set(dies=True), False),
        "the driver": (_set(hangs=True), False),
        "the pause": (_set(fails="pause"), False),
        "the resume": (_set(fails="resume"), False),
        "the tokenizer's change": (_set(fails="rendering"), False),
        "the canary": (_set(canary_fails=True), False),
    }


@pytest.mark.parametrize(
    ("stage", "what"),
    [(kind, what) for kind in TENSORS for what in faults(kind)],
    indirect=["stage"],
)
async def test_swap_that_fails_leaves_the_old_expert_or_a_broken_engine(
    stage: Stage, what: str
) -> None:
    await stage.hold()
    fault, goes_on = faults(stage.kind)[what]
    fault(stage)
    with pytest.raises((CoeError, ValueError)):
        await stage.engine.swap_in("b")
    assert (stage.engine.failure() is None) == goes_on
    await stage.check("a")
    if goes_on:
        assert await stage.answers() == {"a"}
        stage.fails_at.clear()
        for name in ("b", "c", "a"):
            assert (await stage.engine.swap_in(name)).ok
            assert await stage.answers() == {name}
            await stage.check(name)


@pytest.mark.parametrize(
    ("stage", "number"),
    [(kind, n) for kind, tensors in TENSORS.items() for n in range(RANKS * tensors)],
    indirect=["stage"],
)
@pytest.mark.parametrize("swaps", [0, 2])
async def test_swap_whose_copy_is_lost_is_not_answered_from(
    stage: Stage, number: int, swaps: int
) -> None:
    """No error tells of it: the comparison with the source does, and later on the probe."""
    await stage.hold()
    for name in ("b", "a")[:swaps]:
        assert (await stage.engine.swap_in(name)).ok
    stage.drops_at.add(swaps * stage.copies + number)
    assert not (await stage.engine.swap_in("b")).ok
    assert await stage.answers() == set()
    # As a slot does that goes back to the base.
    assert (await stage.engine.swap_in("a")).ok
    await stage.check("a")


def _fill(*numbers: int) -> Fault:
    """Let the writing of these tensors to shared memory fail. The first ones are expert a's."""
    return lambda stage: stage.fills_fail.update(numbers)


def _files(what: str | int, rank: int) -> Fault:
    def act(stage: Stage) -> None:
        stage.files.fails, stage.files.fails_on = what, rank

    return act


def _other_form(stage: Stage) -> None:
    """A model whose kernels were built with another number, or with other shapes."""
    other: Any = (
        dense_model.dense_model(1, width=16)
        if stage.kind == "plain"
        else processed_model.processed_model(1, block=64)
    )
    stage.models[1]["b"] = other


def load_faults(kind: str) -> dict[str, Fault]:
    """What fails in a load."""
    tensors = TENSORS[kind]
    layers = range(3) if kind == "processed" else ()
    return {
        **{f"the disk of rank {rank}": _files("read", rank) for rank in range(RANKS)},
        **{f"layer {n} of rank {rank}": _files(n, rank) for n in layers for rank in range(RANKS)},
        **{
            f"the writing of tensor {n}": _fill(n)
            for n in (0, tensors - 1, tensors, 2 * tensors, 4 * tensors - 1)
        },
        **{f"registration {n}": _set(fails_at=n) for n in range(2 * RANKS)},
        "the form": _other_form,
    }


@pytest.mark.parametrize(
    ("stage", "what"),
    [(kind, what) for kind in TENSORS for what in load_faults(kind)],
    indirect=["stage"],
)
async def test_load_that_fails_leaves_the_old_expert_and_can_be_repeated(
    stage: Stage, what: str
) -> None:
    right = dict(stage.models[1])
    await stage.engine.worker_rpc("coe_register_initial", "a")
    load_faults(stage.kind)[what](stage)
    with pytest.raises(ExpertFailedError, match=r"expert 'b' could not be loaded: [A-Z]"):
        await stage.engine.load_to_host("b")
    await stage.check("a")
    assert await stage.answers() == {"a"}
    for worker in stage.workers:
        assert not worker._coe().loads
        assert set(worker._coe().held) == {"a"}, "nobody would count it"
    with pytest.raises(CoeError, match="the weights of 'b' are not held"):
        await stage.engine.swap_in("b")
    assert not list(stage.folder.glob("*.new"))
    # The cause is mended.
    stage.models[1].update(right)
    stage.files.fails = stage.cuda.fails_at = None
    stage.fills_fail.clear()
    for name in ("b", "c"):
        await stage.engine.load_to_host(name)
    for name in ("b", "c", "a"):
        assert (await stage.engine.swap_in(name)).ok
        await stage.check(name)


async def test_load_in_which_the_core_dies_breaks_the_engine(stage: Stage) -> None:
    await stage.engine.worker_rpc("coe_register_initial", "a")
    stage.executor.dies, stage.executor.fails_in = True, "coe_load_result"
    with pytest.raises(EngineDeadError):
        await stage.engine.load_to_host("b")
    assert stage.engine.failure() is not None
    await stage.check("a")


async def test_swap_that_is_cancelled_breaks_the_engine(stage: Stage) -> None:
    await stage.hold()
    stage.executor.hangs = True
    swap = asyncio.create_task(stage.engine.swap_in("b"))
    await asyncio.sleep(0.01)
    swap.cancel()
    with pytest.raises(asyncio.CancelledError):
        await swap
    assert stage.engine.failure() == "a swap was left half done"
    await stage.check("a")


async def test_swap_to_weights_that_are_not_held_changes_nothing(stage: Stage) -> None:
    await stage.hold()
    await stage.engine.worker_rpc("coe_evict", "b", False)
    with pytest.raises(CoeError, match="the weights of 'b' are not held"):
        await stage.engine.swap_in("b")
    assert next(stage._copies) == 0
    await stage.check("a")
    # On one rank only, the other rank has already swapped.
    stage.workers[0]._coe().held["b"] = stage.workers[0]._coe().held["c"]
    with pytest.raises(CoeError, match="the weights of 'b' are not held"):
        await stage.engine.swap_in("b")
    assert await stage.answers() == {"a"}
    await stage.check("a")


async def test_worker_rpc_failure_of_one_rank_leaves_no_answer_behind(stage: Stage) -> None:
    """Else vLLM takes the other rank's late answer for the answer to its next call."""
    await stage.hold()
    with pytest.raises(
        CoeError, match="coe_steer failed: ValueError: the weights of 'x' are not held"
    ):
        await stage.engine.worker_rpc("coe_steer", "v", {"base": "x"})
    assert not any(stage.executor._answers)
    assert (await stage.engine.worker_rpc("coe_load_result", "b"))["state"] == "host"


def test_poll_of_a_load_is_rare_on_a_gpu() -> None:
    made = [
        Engine(
            "a",
            {"a": Weights("/none")},
            VllmOptions(),
            on_cpu=on_cpu,
            canary_interval=1,
            canaries={},
        )
        for on_cpu in (True, False)
    ]
    assert [engine._poll_s for engine in made] == [0.01, 0.1]


_TIE = -0.70


@pytest.mark.parametrize(
    ("tokens", "values", "same_engine", "other_engine"),
    [
        ([1, 2, 3], [-0.5, _TIE, -2.0], True, True),
        # Other sums of bfloat16.
        ([1, 2, 3], [-0.52, _TIE, -1.97], False, True),
        ([1, 2, 3], [-0.56, _TIE, -2.0], False, False),
        # Two tokens of nearly equal odds change places, and other tokens follow.
        ([1, 9, 4], [-0.5, _TIE - 0.01, -0.1], False, True),
        # A token that was surer than its rivals can't.
        ([9, 2, 3], [-0.5, _TIE, -2.0], False, False),
        ([1, 9, 4], [-0.5, _TIE - 0.2, -0.1], False, False),
    ],
)
def test_canary_is_strict_within_an_engine_and_allows_for_other_kernels(
    tokens: list[int], values: list[float], same_engine: bool, other_engine: bool
) -> None:
    recorded = [1, 2, 3], [-0.5, _TIE, -2.0]
    agree = swapping_engine.answers_agree
    assert agree(recorded, (tokens, values)) == same_engine
    assert agree(recorded, (tokens, values), other_engine=True) == other_engine


@pytest.mark.parametrize(
    ("vector", "same_engine", "other_engine"),
    [([3.0, 4.0], True, True), ([3.02, 4.0], False, True), ([3.3, 4.0], False, False)],
)
def test_canary_of_an_embedding_is_relative_to_its_length(
    vector: list[float], same_engine: bool, other_engine: bool
) -> None:
    agree = swapping_engine.answers_agree
    recorded: tuple[list[int], list[float]] = [], [3.0, 4.0]
    assert agree(recorded, ([], vector)) == same_engine
    assert agree(recorded, ([], vector), other_engine=True) == other_engine


@pytest.mark.parametrize("on_cpu", [False, True])
async def test_canary_is_retaken_by_each_engine_on_a_gpu(on_cpu: bool) -> None:
    """Kernels that are chosen by timing differ from start to start, not from swap to swap."""
    canaries: dict[str, Any] = {}

    def engine(value: float) -> Any:
        made = SwappingVllmEngine(
            "a",
            {"a": Weights("/none")},
            VllmOptions(),
            on_cpu=on_cpu,
            canary_interval=1,
            canaries=canaries,
        )
        made._handle = SimpleNamespace(  # type: ignore[assignment]
            generates=True, max_model_len=64, vocab_size=256, errored=False
        )
        said = SimpleNamespace(value=value)

        async def app(_: Any, __: Any, send: Any) -> None:
            choice = {"token_ids": [1], "logprobs": {"token_logprobs": [said.value]}}
            body = orjson.dumps({"choices": [choice]})
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": body})

        made._frontends["a"] = swapping_engine._Frontend(
            app,  # type: ignore[arg-type]
            Weights("/none"),
            "",
            None,  # type: ignore[arg-type]
        )
        return made, said

    first, _ = engine(-0.50)
    assert await first.check_canary("a")
    second, said = engine(-0.52)
    assert await second.check_canary("a") == (not on_cpu)
    assert await second.check_canary("a") == (not on_cpu)
    said.value = -0.50
    assert await second.check_canary("a") == on_cpu, "within an engine nothing may change"
    assert orjson.loads(canaries["a"].answer)[1] == [-0.50]
    assert not await engine(-0.60)[0].check_canary("a")
