"""Host memory registered in pieces: which ranges, with which pauses, and what a refusal leaves."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("torch")

from service.engine.vllm.worker.host_registration import (
    PIECE_BYTES,
    parts_of,
    register,
)
from tests.support.engine.fake_cuda import FakeCuda

BASE = 1 << 40


@pytest.mark.parametrize(
    "size", [1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 7 * PIECE_BYTES]
)
def test_register_covers_the_memory_once(size: int) -> None:
    cuda = FakeCuda()
    done = register(cuda, BASE, size, sleep=lambda _: None)
    ends = [begin + length for begin, length in cuda.registered.items()]
    assert list(cuda.registered) == [BASE, *ends[:-1]]
    assert ends[-1] == BASE + size
    done.release(sleep=lambda _: None)
    done.release()
    assert not cuda.registered


def test_register_leaves_the_running_model_as_much_time_as_it_takes() -> None:
    ticks = itertools.count()
    slept: list[float] = []
    done = register(
        FakeCuda(), BASE, 3 * PIECE_BYTES, clock=lambda: next(ticks) ** 2, sleep=slept.append
    )
    assert slept == [1, 5, 9]
    assert done.longest_s == 9


@pytest.mark.parametrize("fails_at", range(4))
def test_register_that_is_refused_leaves_nothing_registered(fails_at: int) -> None:
    cuda = FakeCuda()
    cuda.fails_at = fails_at
    with pytest.raises(RuntimeError, match="could not be pinned: CUDA error 2"):
        register(cuda, BASE, 4 * PIECE_BYTES, sleep=lambda _: None)
    assert cuda.calls == fails_at + 1
    assert not cuda.registered


@pytest.mark.parametrize("offset", [0, 64, PIECE_BYTES - 64, PIECE_BYTES, PIECE_BYTES + 64])
@pytest.mark.parametrize("size", [0, 64, PIECE_BYTES, 3 * PIECE_BYTES + 128])
def test_parts_of_a_range_lie_in_one_piece_each(offset: int, size: int) -> None:
    parts = list(parts_of(offset, size))
    assert [begin for begin, _ in parts] == [0, *(end for _, end in parts[:-1])][: len(parts)]
    assert sum(end - begin for begin, end in parts) == size
    for begin, end in parts:
        assert (offset + begin) // PIECE_BYTES == (offset + end - 1) // PIECE_BYTES
