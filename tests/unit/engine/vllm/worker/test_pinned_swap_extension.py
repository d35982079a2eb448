"""Copies of an expert's tensors into a running model, without a GPU."""

from __future__ import annotations

import errno
import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from service.engine.vllm.worker.swap_extension import SwapExtension  # noqa: E402
from tests.support.engine import dense_model, fake_cuda  # noqa: E402
from tests.support.engine.dense_model import Attention, loaded, loads  # noqa: E402


def model(seed: int) -> Any:
    """Two layers, the second's weight the first's, and an attention layer."""
    torch.manual_seed(seed)
    made = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), Attention())
    made[1].weight = made[0].weight
    made.register_buffer("table", torch.randn(3))
    return made


def extension(model: Any, folder: Path, rank: int = 0) -> Any:
    """One of two ranks, which knows where two experts belong."""
    return dense_model.extension(model, folder, rank, ranks=2, experts="ab")


def test_pinned_weights_swap_in_copies_all_but_attention_in_place(tmp_path: Path) -> None:
    from service.engine.vllm.worker.pinned_swap_extension import check_fits, copy_all, tensors_of

    live, other = model(1), model(2)
    held = extension(other, tmp_path)._coe_hold("a", tensors_of(other))
    assert set(held.tensors) == {"0.weight", "0.bias", "1.bias", "table"}
    assert held.host_bytes == 4 * (16 + 4 + 4 + 3)
    places = {name: tensor.data_ptr() for name, tensor in tensors_of(live).items()}
    check_fits(held.tensors, tensors_of(live))
    copy_all(held, tensors_of(live))
    x = torch.randn(2, 4)
    assert torch.equal(live[1](live[0](x)), other[1](other[0](x)))
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(live).items()} == places


def test_pinned_weights_engines_of_a_pool_map_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One engine has made it; another, of the same family, needs no loader."""
    from service.engine.vllm.worker.pinned_swap_extension import tensors_of

    first, second = extension(model(1), tmp_path), extension(model(2), tmp_path)
    first.coe_register_initial("a")
    assert not list(tmp_path.iterdir()), "an engine that never swaps needs no copy"
    with monkeypatch.context() as patched:
        loads(patched, {"b": model(2)})
        assert loaded(first, "b")["state"] == "host"
    (path,) = tmp_path.glob("key-a*")
    assert path.name.startswith("key-a-0of2-")
    second.coe_register_initial("b")
    result = loaded(second, "a")
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
    assert "the weights of 'b' are not held" in second.coe_swap_in("b")["error"]


class Fp8LinearMethod(dense_model.UnquantizedLinearMethod):
    """Named as vLLM's, with a number that its kernel was made with."""

    def __init__(self, input_scale: float) -> None:
        self.input_scale = input_scale

    def apply(self, layer: Any, rows: Any) -> Any:
        return rows * self.input_scale @ layer.weight.T


Fp8LinearMethod.__module__ = "vllm.model_executor.fake"


@pytest.mark.parametrize("kind", ["number", "tensor of the engine", "hidden integers"])
@pytest.mark.parametrize("fits", [True, False])
def test_pinned_weights_of_a_model_of_another_form_are_not_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, fits: bool
) -> None:
    """The engine that made the file had started with it, so that nobody has compared the two."""

    def quantised(seed: int, value: float) -> Any:
        made = dense_model.dense_model(seed)
        for i in range(3):
            made[i].quant_method = Fp8LinearMethod(value if kind == "number" else 1.0)
        if kind == "tensor of the engine":
            made[3].scale.fill_(value)
        if kind == "hidden integers":
            made[0].quant_method.table = torch.tensor([int(8 * value)])
        return made

    first = dense_model.extension(quantised(1, 0.5), tmp_path)
    second = dense_model.extension(quantised(2, 0.5 if fits else 0.25), tmp_path)
    assert first.coe_register_initial("a") == second.coe_register_initial("b") == ""

    def refuse(*_: Any) -> Any:
        raise ValueError("they were compared")

    monkeypatch.setattr(SwapExtension, "_coe_prepare_load", lambda *_: refuse)
    # A load stores what the engine was started with.
    assert loaded(first, "c")["reason"] == "ValueError: they were compared"
    result = loaded(second, "a")
    if fits:
        assert result["state"] == "host"
    else:
        assert result["reason"] == "ValueError: they were compared"


def test_pinned_weights_file_differs_by_rank_and_layout(tmp_path: Path) -> None:
    from service.engine.vllm.worker.pinned_swap_extension import describe, tensors_of

    paths = {
        extension(made, tmp_path, rank)._coe_path("a", describe(tensors_of(made)))
        for made, rank in ((model(1), 0), (model(1), 1), (model(1).double(), 0))
    }
    assert len({path.name for path in paths}) == 3


def test_pinned_weights_without_shared_memory_fails_the_load(tmp_path: Path) -> None:
    one = extension(model(1), tmp_path)
    one.coe_register_initial("a")
    assert "no shared memory was given for the weights of 'c'" in loaded(one, "c")["reason"]


def test_pinned_weights_without_room_fails_the_load_and_the_engine_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = extension(model(1), tmp_path)
    one.coe_register_initial("a")
    loads(monkeypatch, {"b": model(2)})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("service.engine.shared_memory_tensors.os.posix_fallocate", full)
        result = loaded(one, "b")
    assert result["state"] == "failed"
    assert "no room for 0.00 GB of weights in shared memory" in result["reason"]
    assert not list(tmp_path.iterdir())
    assert loaded(one, "b")["state"] == "host"
    assert one.coe_swap_in("b")["ok"]


def test_pinned_weights_mismatched_tensors_are_named() -> None:
    from service.engine.vllm.worker.pinned_swap_extension import check_fits, tensors_of

    live = tensors_of(model(1))
    with pytest.raises(ValueError, match=r"table is torch\.float32"):
        check_fits({**live, "table": torch.zeros(2)}, live)
    with pytest.raises(ValueError, match="more is in one"):
        check_fits({**live, "more": torch.zeros(2)}, live)


def test_pinned_weights_every_copy_is_from_one_registered_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA takes no range that spans two registrations."""
    from service.engine.vllm.worker import host_registration, pinned_swap_extension

    cuda = fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())
    monkeypatch.setattr(host_registration, "PIECE_BYTES", fake_cuda.PAGE_BYTES)
    live, other = dense_model.dense_model(1, width=80), dense_model.dense_model(2, width=80)
    copied: list[tuple[int, int]] = []

    class Looked(torch.Tensor):
        def copy_(self, source: Any, non_blocking: bool = False) -> Any:
            assert non_blocking
            assert cuda.in_copies
            copied.append((source.data_ptr(), source.numel() * source.element_size()))
            return super().copy_(source)

    one = dense_model.extension(live, tmp_path)
    one.coe_register_initial("a")
    loads(monkeypatch, {"b": other})
    assert loaded(one, "b")["state"] == "host"
    held = one._coe().held["b"]
    targets = pinned_swap_extension.tensors_of(live)
    pinned_swap_extension.copy_all(held, {n: t.as_subclass(Looked) for n, t in targets.items()})
    assert len(copied) > 3 * 80 * 80 * 4 // fake_cuda.PAGE_BYTES
    assert all(cuda.has(address, size) for address, size in copied)
    for name, tensor in pinned_swap_extension.tensors_of(other).items():
        assert torch.equal(targets[name], tensor)


def test_pinned_weights_for_a_transposed_parameter_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.engine.vllm.worker import host_registration, pinned_swap_extension

    fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())
    monkeypatch.setattr(host_registration, "PIECE_BYTES", fake_cuda.PAGE_BYTES)
    held = dense_model.extension(model(1), tmp_path)._coe_hold("a", {"w": torch.randn(90, 70)})
    live = {"w": torch.zeros(70, 90).t()}
    pinned_swap_extension.copy_all(held, live)
    assert torch.equal(live["w"], held.tensors["w"])


@pytest.mark.parametrize(
    "live",
    [
        torch.zeros(70, 90).t(),
        torch.zeros(5, 70, 30).permute(1, 2, 0),
        torch.zeros(70, 90, dtype=torch.int8).t().view(torch.float8_e4m3fn),
        torch.zeros(90, 1),
        torch.zeros(1, 90).t(),
        torch.zeros(()),
        torch.zeros(0, dtype=torch.int32),
    ],
    ids=["transposed", "permuted", "float8", "column", "row", "scalar", "empty"],
)
def test_pinned_weights_of_a_permuted_parameter_are_copied_in_the_order_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, live: Any
) -> None:
    """From registered memory and without a copy on the way, whatever the order of dimensions."""
    from service.engine.vllm.worker import host_registration, pinned_swap_extension

    cuda = fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())
    monkeypatch.setattr(host_registration, "PIECE_BYTES", fake_cuda.PAGE_BYTES)
    source = live.clone(memory_format=torch.preserve_format)
    chance = torch.Generator().manual_seed(5)
    size = source.untyped_storage().nbytes()
    noise = torch.randint(0, 120, (size,), dtype=torch.uint8, generator=chance)
    source.untyped_storage().copy_(noise.untyped_storage())
    held = dense_model.extension(model(1), tmp_path)._coe_hold("a", {"w": source})
    assert held.tensors["w"].stride() == source.stride() or source.is_contiguous()
    copies: list[bool] = []

    class Looked(torch.Tensor):
        def copy_(self, source: Any, non_blocking: bool = False) -> Any:
            copies.append(non_blocking)
            assert cuda.has(source.data_ptr(), source.numel() * source.element_size())
            return super().copy_(source)

    pinned_swap_extension.copy_all(held, {"w": live.as_subclass(Looked)})
    assert all(copies)
    assert pinned_swap_extension.arrived(held.tensors, {"w": live})
    assert torch.equal(live.float(), source.float())
    if live.numel() > 16:
        flat = live.permute(sorted(range(live.dim()), key=lambda d: -live.stride(d))).view(-1)
        flat[-1:].view(torch.uint8)[0] ^= 1
        assert not pinned_swap_extension.arrived(held.tensors, {"w": live})


@pytest.mark.parametrize("fails_at", [0, 1, 2, 5])
def test_pinned_weights_refused_registration_fails_the_load_and_gives_all_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    from service.engine.vllm.worker import host_registration

    cuda = fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())
    monkeypatch.setattr(host_registration, "PIECE_BYTES", fake_cuda.PAGE_BYTES)
    one = dense_model.extension(dense_model.dense_model(1, width=40), tmp_path)
    one.coe_register_initial("a")
    loads(monkeypatch, {"b": dense_model.dense_model(2, width=40)})
    cuda.fails_at = fails_at
    result = loaded(one, "b")
    assert result == {
        "state": "failed",
        "reason": "RuntimeError: shared memory could not be pinned: CUDA error 2",
    }
    # The running expert's, if it was complete, which the next load needs.
    held = one._coe().held["a"].registration
    assert set(cuda.registered) == set(held.addresses if held is not None else [])
    assert loaded(one, "b")["state"] == "host"
    assert one.coe_swap_in("b")["ok"]
    assert one.coe_swap_in("a")["ok"]


def test_pinned_weights_of_an_evicted_expert_are_given_back_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())
    one = dense_model.extension(dense_model.dense_model(1), tmp_path)
    one.coe_register_initial("a")
    loads(monkeypatch, {"b": dense_model.dense_model(2), "c": dense_model.dense_model(3)})
    assert loaded(one, "b")["state"] == loaded(one, "c")["state"] == "host"
    before = set(cuda.registered)
    assert one.coe_evict("b")
    _join("unpin")
    assert len(before) - len(cuda.registered) == 1, "or the memory was unmapped before"
    # What can't be given back is only logged.
    cuda.unregister_fails = True
    assert one.coe_evict("c")
    _join("unpin")
    assert one.coe_swap_in("a")["ok"]


def _join(name: str) -> None:
    for thread in threading.enumerate():
        if thread.name == name:
            thread.join(10)


@pytest.mark.parametrize("rank", [0, 1])
def test_pinned_weights_are_registered_by_a_thread_of_their_own_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """A thread's device is 0, and a call there makes a second context on GPU 0."""
    cuda = fake_cuda.install(monkeypatch, fake_cuda.FakeCuda())
    one = dense_model.extension(dense_model.dense_model(1), tmp_path, rank, ranks=2)
    one.coe_register_initial("a")
    assert not cuda.devices, "nothing is pinned before another expert is loaded"
    loads(monkeypatch, {"b": dense_model.dense_model(2)})
    assert loaded(one, "b")["state"] == "host"
    assert cuda.devices == [rank] * len(cuda.devices)
    assert len(cuda.devices) >= 2


def test_pinned_weights_of_the_first_expert_are_those_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are stored late, and come back bit for bit, however often others ran."""
    from service.engine.vllm.worker.pinned_swap_extension import tensors_of

    live = dense_model.dense_model(1)
    first = {name: tensor.clone() for name, tensor in tensors_of(live).items()}
    one = dense_model.extension(live, tmp_path)
    one.coe_register_initial("a")
    assert one.coe_memory()["host_bytes"] == 0
    loads(monkeypatch, {"b": dense_model.dense_model(2), "c": dense_model.dense_model(3)})
    for name in "bc":
        assert loaded(one, name)["state"] == "host"
    assert one._coe().held["a"].host_bytes == one._coe().held["b"].host_bytes
    for name in itertools.chain("bcabcba"):
        assert one.coe_swap_in(name)["ok"]
    for name, tensor in tensors_of(live).items():
        assert torch.equal(tensor, first[name])


class _Quantised:
    """A kernel that takes activations of the model's dtype only, as those for fp8 do."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def apply(self, layer: Any, rows: Any) -> Any:
        self.seen.append(rows.dtype)
        if rows.dtype is not torch.bfloat16:
            raise TypeError(f"no kernel quantises {rows.dtype}")
        return rows.float() @ layer.weight.float().T


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "uint8"])
def test_pinned_weights_engine_of_quantised_weights_starts(tmp_path: Path, dtype: str) -> None:
    """Its weights stay, so nothing has to be probed; a probe has the activations' dtype."""
    from service.engine.vllm.worker.weight_probe import WeightProbe

    made = dense_model.dense_model(1)
    method = _Quantised()
    made[0].quant_method = method
    made[0].scale = torch.nn.Parameter(torch.ones(1))
    made[0].weight = torch.nn.Parameter(
        (torch.rand(8, 8) * 3).to(getattr(torch, dtype)), requires_grad=False
    )
    one = dense_model.extension(made, tmp_path)
    one.vllm_config.model_config.dtype = torch.bfloat16
    assert "has weights of _Quantised" in one.coe_register_initial("a")
    assert not method.seen
    assert one.coe_swap_in("a")["ok"]
    probe = WeightProbe.of(made, torch.bfloat16)
    assert probe.verify()
    assert set(method.seen) == {torch.bfloat16}
    with torch.no_grad():
        made[0].weight.view(torch.uint8)[0, 0] ^= 1
    assert not probe.verify(whole=True)


def test_pinned_weights_without_a_probe_are_compared_at_each_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dense_model.dense_model(1)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(dense_model.UnquantizedLinearMethod, "apply", refuse)
    one = dense_model.extension(made, tmp_path)
    assert one.coe_register_initial("a") == ""
    loads(monkeypatch, {"b": dense_model.dense_model(2)})
    assert loaded(one, "b")["state"] == "host"
    for name in "baba":
        assert one.coe_swap_in(name)["ok"]
    copy = one._coe_install

    def spoils(held: Any, *, repairs: bool) -> Any:
        method = copy(held, repairs=repairs)
        made[0].weight.data[0, 0] += 1.0
        return method

    monkeypatch.setattr(one, "_coe_install", spoils)
    assert not one.coe_swap_in("b")["ok"]
