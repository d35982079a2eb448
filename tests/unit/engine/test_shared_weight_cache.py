"""An engine on a GPU and its pool's shared memory: what it tells its workers, and gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.config import VllmOptions
from service.engine.shared_memory_tensors import write_file
from service.engine.shared_weight_cache import KEEP_ENDED_S, KEEP_EVICTED_S, SharedWeightCache
from service.engine.vllm.swapping_engine import SwappingVllmEngine, Weights
from service.errors import ExpertFailedError
from tests.unit.engine.test_shared_memory_tensors import TENSORS, Clock, a_model, fill


class Workers(SwappingVllmEngine):
    """Its workers write a file where they are told to."""

    calls: list[tuple[Any, ...]]
    broken = False
    fails_once = False

    def is_there(self) -> bool:
        """Whether the file is."""
        return Path(self.place).exists()

    def leave(self) -> None:
        """A file that nobody knows of."""
        Path(self.place).write_bytes(b"left")

    async def worker_rpc(self, method: str, *args: object) -> Any:
        self.calls.append((method, *args))
        if method == "coe_share":
            self.place = f"{args[1]}-0of1.weights"
            self.token = str(args[2])
        if method == "coe_load_to_host" and not self.broken and not self.is_there():
            write_file(Path(self.place), TENSORS, fill, self.token)
        if method == "coe_load_result":
            if self.broken:
                return {"state": "failed", "reason": "no room"}
            if self.fails_once:
                self.fails_once = False
                raise ExpertFailedError("the call was lost")
            found = {"host_bytes": 58, "fill_s": 0.1, "stall_s": 0.0, "layer_room_ratio": 0.0}
            return {"state": "host", **found}
        return True if method == "coe_evict" else None

    async def _load_frontend(self, expert: str, source: Weights) -> None:
        """Nobody is answered here."""


def engine(folder: str, cache: SharedWeightCache) -> Workers:
    sources = {name: Weights(folder) for name in "ab"}
    made = Workers(
        "a", sources, VllmOptions(), on_cpu=False, canary_interval=1, canaries={}, cache=cache
    )
    made.calls = []
    return made


async def test_weight_cache_workers_get_the_file_and_hold_it_until_dropped(
    tmp_path: Path,
) -> None:
    clock = Clock()
    cache = SharedWeightCache(None, root=tmp_path, clock=clock)
    folder = a_model(tmp_path / "m")
    one, other = engine(folder, cache), engine(folder, cache)
    await one.load_to_host("b")
    assert [call[0] for call in one.calls] == ["coe_share", "coe_load_to_host", "coe_load_result"]
    assert Path(one.place).parent == cache.folder
    await other.load_to_host("b")
    assert other.place == one.place
    assert other.token != one.token
    await one.evict("b")
    clock.now_s += KEEP_EVICTED_S
    cache.sweep()
    assert one.is_there()
    await other.stop()
    clock.now_s += KEEP_EVICTED_S
    cache.sweep()
    assert one.is_there()
    clock.now_s += KEEP_ENDED_S
    cache.sweep()
    assert not one.is_there()
    cache.close()


async def test_weight_cache_failed_load_holds_nothing(tmp_path: Path) -> None:
    cache = SharedWeightCache(None, root=tmp_path, clock=(clock := Clock()))
    made = engine(a_model(tmp_path / "m"), cache)
    made.broken = True
    with pytest.raises(ExpertFailedError, match="could not be loaded: no room"):
        await made.load_to_host("b")
    made.leave()
    clock.now_s += KEEP_EVICTED_S
    cache.sweep()
    assert not made.is_there()
    await made.stop()
    cache.close()


@pytest.mark.parametrize("lost", ["a call", "the folder"])
async def test_load_that_was_given_up_is_no_load_of_the_files_that_came_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """The workers have it, or will, and say of it what they say of a load of the new files."""
    cache = SharedWeightCache(None, root=tmp_path)
    model = Path(a_model(tmp_path / "m"))
    made = engine(str(model), cache)
    if lost == "a call":
        made.fails_once = True
        with pytest.raises(ExpertFailedError, match="was lost"):
            await made.load_to_host("b")
    else:
        told = iter([await made._version_of(made._weights["b"])])

        async def once(source: Weights) -> str:
            for version in told:
                return version
            raise ExpertFailedError("the files can't be read")

        with monkeypatch.context() as patched:
            patched.setattr(made, "_version_of", once)
            with pytest.raises(ExpertFailedError, match="can't be read"):
                await made.load_to_host("b")
    (model / "config.json").write_text('{"another": "model"}')
    with pytest.raises(ExpertFailedError, match="changed while they were loaded"):
        await made.load_to_host("b")
    assert made.calls[-1][0] == "coe_evict"
    await made.load_to_host("b")
    assert made._versions["b"] == await made._version_of(made._weights["b"])
    await made.stop()
    cache.close()


def test_merge_rank_results_takes_the_least_progress() -> None:
    from service.engine.vllm.swapping_engine import _merge_rank_results

    ranks = [
        {"state": "host", "host_bytes": 5, "fill_s": s, "stall_s": s, "layer_room_ratio": s}
        for s in (0.1, 0.3)
    ]
    assert _merge_rank_results(ranks) == {
        "state": "host",
        "host_bytes": 10,
        "fill_s": 0.3,
        "stall_s": 0.3,
        "layer_room_ratio": 0.3,
    }
    waits = [ranks[0], {"state": "loading"}]
    assert _merge_rank_results(waits) == waits[1]
    assert _merge_rank_results([{"resident_bytes": 1, "host_bytes": 2}]) == {
        "resident_bytes": 1,
        "host_bytes": 2,
    }
    assert _merge_rank_results([4, 4]) == 4
