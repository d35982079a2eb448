"""Copies of an expert's tensors into a running model, without a GPU."""

from __future__ import annotations

import errno
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")


class _Attention(torch.nn.Module):  # type: ignore[name-defined,misc]
    def __init__(self) -> None:
        super().__init__()
        self.kv_cache = [torch.zeros(4)]
        self.register_buffer("scale", torch.ones(1))


def model(seed: int) -> Any:
    """Two layers, the second's weight the first's, and an attention layer."""
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), _Attention())
    made[1].weight = made[0].weight
    made.register_buffer("table", torch.randn(3))
    return made


def extension(model: Any, folder: Path, rank: int = 0) -> Any:
    """A worker's part, without a worker around it."""
    from service.engine.vllm.worker.pinned_weights import PinnedExtension

    made = PinnedExtension()
    made.rank = rank
    made.model_runner = SimpleNamespace(model=model)
    made.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(world_size=2))
    made._coe_watch_gates = lambda _: None
    made.coe_share("a", str(folder / "key-a"), "token")
    made.coe_share("b", str(folder / "key-b"), "token")
    return made


def filled(one: Any, expert: str) -> dict[str, Any]:
    one.coe_load_to_host(expert, "nowhere", None, 1.0)
    until = time.monotonic() + 30
    while (result := one.coe_load_result(expert))[
        "state"
    ] == "loading" and time.monotonic() < until:
        time.sleep(0.001)  # a thread of the worker's own: there is no event to await
    return dict(result)


def test_pinned_weights_swap_in_copies_all_but_attention_in_place(tmp_path: Path) -> None:
    from service.engine.vllm.worker.pinned_weights import check_fits, copy_all, tensors_of

    live, other = model(1), model(2)
    held = extension(other, tmp_path)._coe_hold("a", tensors_of(other))
    assert set(held.tensors) == {"0.weight", "0.bias", "1.bias", "table"}
    assert held.host_bytes == 4 * (16 + 4 + 4 + 3)
    places = {name: tensor.data_ptr() for name, tensor in tensors_of(live).items()}
    check_fits(held.tensors, tensors_of(live))
    copy_all(held.tensors, tensors_of(live))
    x = torch.randn(2, 4)
    assert torch.equal(live[1](live[0](x)), other[1](other[0](x)))
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(live).items()} == places


def test_pinned_weights_engines_of_a_pool_map_one_file(tmp_path: Path) -> None:
    """One engine has made it; another, of the same family, needs no loader."""
    from service.engine.vllm.worker.pinned_weights import tensors_of

    first, second = extension(model(1), tmp_path), extension(model(2), tmp_path)
    first.coe_register_initial("a")
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("key-a-0of2-")
    second.coe_register_initial("b")
    result = filled(second, "a")
    assert (result["state"], result["host_bytes"]) == ("host", 4 * 27)
    assert len(list(tmp_path.iterdir())) == 2
    # The same memory, not a copy of it.
    first._coe().held["a"].tensors["table"][0] = 7.0
    assert float(second._coe().held["a"].tensors["table"][0]) == 7.0
    assert second.coe_swap_in("a")["ok"]
    there = tensors_of(second.model_runner.model)
    for name, tensor in first._coe().held["a"].tensors.items():
        assert torch.equal(there[name], tensor)
    # The pool may take the file's name away: who has it keeps it.
    path.unlink()
    assert second.coe_swap_in("b")["ok"]
    assert second.coe_swap_in("a")["ok"]
    assert second.coe_evict("b")
    assert not second.coe_evict("a")
    with pytest.raises(KeyError):
        second.coe_swap_in("b")


def test_pinned_weights_file_differs_by_rank_and_layout(tmp_path: Path) -> None:
    extension(model(1), tmp_path).coe_register_initial("a")
    extension(model(1), tmp_path, rank=1).coe_register_initial("a")
    extension(model(1).double(), tmp_path).coe_register_initial("a")
    assert len({path.name for path in tmp_path.iterdir()}) == 3


def test_pinned_weights_without_shared_memory_raises(tmp_path: Path) -> None:
    one = extension(model(1), tmp_path)
    with pytest.raises(RuntimeError, match="no shared memory was given for the weights of 'c'"):
        one.coe_register_initial("c")
    one.coe_register_initial("a")
    assert "no shared memory" in filled(one, "c")["reason"]


def test_pinned_weights_without_room_fails_the_load_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.engine.vllm.worker import pinned_weights

    one = extension(model(1), tmp_path)
    one.coe_register_initial("a")

    def brings(expert: str, filling: Any) -> Any:
        return lambda: one._coe_hold(expert, pinned_weights.tensors_of(model(2)))

    monkeypatch.setattr(
        pinned_weights.SwapExtension, "_coe_prepare_load", lambda _, *given: brings(*given)
    )

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("service.engine.shared_memory_tensors.os.posix_fallocate", full)
        result = filled(one, "b")
    assert result["state"] == "failed"
    assert "no room for 0.00 GB of weights in shared memory" in result["reason"]
    assert len(list(tmp_path.iterdir())) == 1
    assert filled(one, "b")["state"] == "host"
    assert one.coe_swap_in("b")["ok"]


def test_pinned_weights_mismatched_tensors_are_named() -> None:
    from service.engine.vllm.worker.pinned_weights import check_fits, tensors_of

    live = tensors_of(model(1))
    with pytest.raises(ValueError, match=r"table is torch\.float32"):
        check_fits({**live, "table": torch.zeros(2)}, live)
    with pytest.raises(ValueError, match="more is in one"):
        check_fits({**live, "more": torch.zeros(2)}, live)
