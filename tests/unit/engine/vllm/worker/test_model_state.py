"""All that a model computes with, in fakes of vLLM's layers."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from service.engine.vllm.worker.model_state import (  # noqa: E402
    ModelState,
    ends_of,
    memory_of,
    memory_order,
    move_memory,
    same_bytes,
)
from tests.support.engine.dense_model import Attention  # noqa: E402

_SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


class Kernel:
    """Named as one of vLLM's, whose objects are looked through."""

    def __init__(self, scale: Any) -> None:
        self.scale = scale
        self.block, self.flags = 128, {"padded": False}


class Opaque:
    """An object of somebody else's."""


class Method:
    """A quantisation method with a kernel."""

    def __init__(self, layer: Any, scale: Any) -> None:
        self.kernel = Kernel(scale)
        self.config = {"scales": [layer.weight_scale, scale]}
        self.apply_ = functools.partial(max, 3)
        self.closure = _closing_over(scale)


for _kind in (Kernel, Method):
    _kind.__module__ = "vllm.model_executor.fake"


def _closing_over(scale: Any) -> Callable[[], Any]:
    def closed() -> Any:
        return scale

    return closed


def _defaulting(scale: Any) -> Callable[[], Any]:
    def defaulting(scale: Any = scale) -> Any:
        return scale

    return defaulting


def _named(scale: Any) -> Callable[[], Any]:
    def named(*, scale: Any = scale) -> Any:
        return scale

    return named


def layer(seed: int) -> Any:
    """A quantised linear layer: a transposed weight, its scale, a view of it, and hidden values."""
    chance = torch.Generator().manual_seed(seed)
    made = torch.nn.Module()
    weight = torch.randint(-100, 100, (6, 4), dtype=torch.int8, generator=chance).t()
    made.weight = torch.nn.Parameter(weight, requires_grad=False)
    made.weight.packed_dim = 0
    made.weight_scale = torch.nn.Parameter(torch.rand(6, generator=chance), requires_grad=False)
    made.view = made.weight.data[:, :3]
    made.quant_method = Method(made, torch.rand(3, generator=chance))
    made.padding = 16
    return made


def model(seed: int) -> Any:
    """Two layers and attention."""
    made = torch.nn.Sequential(layer(seed), layer(seed + 50), Attention())
    made[2]._k_scale_float = 1.0
    return made


def test_state_has_parameters_and_hidden_tensors_once() -> None:
    state = ModelState.of(model(1))
    assert list(state.tensors) == [
        "0.weight",
        "0.weight_scale",
        "1.weight",
        "1.weight_scale",
        "0:quant_method.closure<0>",
        "1:quant_method.closure<0>",
    ]
    assert state.hidden == {"0:quant_method.closure<0>", "1:quant_method.closure<0>"}
    assert state.values["0.weight"] == "int8 (4, 6) with strides (1, 4)"
    assert state.values["0:view"] == "int8 (4, 3) with strides (1, 4) at 0 of 0.weight"
    assert state.values["0:quant_method.kernel.scale"] == "the same as 0:quant_method.closure<0>"
    assert state.values["0:quant_method.config['scales'][0]"] == "the same as 0.weight_scale"
    assert list(state.fixed) == ["2.scale"]
    assert state.closed == {}


def test_copies_of_all_tensors_make_models_of_one_description_equal() -> None:
    live, other = model(1), model(2)
    before, held = ModelState.of(live), ModelState.of(other)
    held.check_fits(before)
    for name, tensor in held.tensors.items():
        before.tensors[name].copy_(tensor)
    after = ModelState.of(live)
    assert all(same_bytes(after.tensors[name], held.tensors[name]) for name in held.tensors)
    # Through every name, too.
    scale = live[0].quant_method
    assert same_bytes(scale.kernel.scale, other[0].quant_method.kernel.scale)
    assert same_bytes(scale.closure(), other[0].quant_method.closure())
    assert same_bytes(live[1].view, other[1].view)


def test_marks_of_a_compiler_make_no_difference() -> None:
    live, other = model(1), model(2)
    live[0].weight._dynamo_static_input_type = "unguarded"
    live[1]._torchdynamo_orig_callable = Opaque()
    ModelState.of(other).check_fits(ModelState.of(live))


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(made: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            made = made[int(parent)] if parent.isdecimal() else getattr(made, parent)
        setattr(made, name, value)

    return change


@pytest.mark.parametrize("long", ["x" * 300, b"x" * 300, 10**300])
def test_long_values_and_keys_count_to_their_end(long: Any) -> None:
    other_end = long + 1 if isinstance(long, int) else long[:-1] + long[:1].upper()
    live, held = model(1), model(2)
    for made, value in ((live, long), (held, other_end)):
        made[0].quant_method.kernel.blob = value
        made[0].quant_method.kernel.by_name = {long: 1, other_end: 2}
    with pytest.raises(ValueError, match=r"kernel\.blob is .* and .* in the running"):
        ModelState.of(held).check_fits(ModelState.of(live))
    names = [path for path in ModelState.of(live).values if "kernel.by_name[" in path]
    assert len(names) == 2


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (_defaulting, ".__defaults__[0]"),
        (_named, ".__kwdefaults__['scale']"),
        (lambda scale: scale.mul, ".self"),
        (lambda scale: {"a": scale}.get, ".self['a']"),
    ],
)
def test_tensors_that_functions_hold_are_copied(call: Callable[[Any], Any], where: str) -> None:
    made = model(1)
    scale = torch.ones(2)
    made[0].quant_method.call = call(scale)
    path = f"0:quant_method.call{where}"
    state = ModelState.of(made)
    assert state.tensors[path].data_ptr() == scale.data_ptr()
    assert path in state.hidden


def test_functions_of_extensions_and_of_torch_are_no_closed_objects() -> None:
    made = model(1)
    made[0].quant_method.functions = [torch.mm, torch.nn.functional.silu, math.sqrt, torch.relu]
    ModelState.of(made).check_open()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_set("0.padding", 32), r"0:padding is 32, and 16 in the running"),
        (_set("0.quant_method.kernel.block", 64), r"kernel\.block is 64, and 128"),
        (_set("0.quant_method.kernel.flags", {"padded": True}), r"\['padded'\] is True, and False"),
        (_set("0.quant_method.kernel.more", 1.5), r"kernel\.more is 1\.5, and missing"),
        (_set("0.quant_method.apply_", functools.partial(min, 3)), r"apply_\(0\) is min, and max"),
        (_set("0.weight.packed_dim", 1), r"0\.weight\.packed_dim is 1, and 0"),
        (
            _set("0.weight", torch.nn.Parameter(torch.zeros(4, 6, dtype=torch.int8), False)),
            r"0\.weight is int8 \(4, 6\), and int8 \(4, 6\) with strides",
        ),
        (_set("0.view", torch.zeros(4, 3, dtype=torch.int8)), r"0:view is int8 \(4, 3\), and"),
        (_set("0.quant_method.kernel.table", torch.ones(2)), r"table is float32 \(2,\), and miss"),
        (
            _set("1.bias", torch.nn.Parameter(torch.zeros(6))),
            r"1\.bias is float32 \(6,\), and miss",
        ),
        (_set("2.scale", torch.full((1,), 2.0)), r"2\.scale has values of its own"),
        (_set("2._k_scale_float", 0.5), r"2:_k_scale_float is 0\.5, and 1\.0"),
        (_set("0.quant_method.handle", Opaque()), r"handle is a .*Opaque, which may hold weights"),
    ],
)
def test_models_that_differ_in_what_is_not_copied_are_refused(change: Any, why: str) -> None:
    live, other = ModelState.of(model(1)), model(2)
    change(other)
    with pytest.raises(ValueError, match=why):
        ModelState.of(other).check_fits(live)
    same = model(3)
    ModelState.of(same).check_fits(live)


@pytest.mark.parametrize(("dtype", "fits"), [("int64", False), ("int32", True), ("float32", True)])
def test_hidden_integers_that_may_be_addresses_are_never_copied(dtype: str, fits: bool) -> None:
    models = [model(1), model(2)]
    for number, made in enumerate(models):
        made[0].quant_method.kernel.table = torch.full((2,), 7 + number).to(getattr(torch, dtype))
    live, held = (ModelState.of(made) for made in models)
    if fits:
        held.check_fits(live)
        return
    with pytest.raises(ValueError, match="may be addresses"):
        held.check_fits(live)
    models[1][0].quant_method.kernel.table.fill_(7)
    ModelState.of(models[1]).check_fits(live)


def test_state_of_weights_without_memory_is_refused() -> None:
    made = model(1)
    made[0].weight = torch.nn.Parameter(torch.empty(4, 6, device="meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"0\.weight has no memory yet"):
        ModelState.of(made)


def test_moved_memory_keeps_values_and_views_and_leaves_what_others_use() -> None:
    made = model(1)
    shared = made[1].quant_method.kernel.scale
    kept = {shared.untyped_storage().data_ptr()}
    before = memory_of(ModelState.of(made))
    values = {name: t.clone() for name, t in ModelState.of(made).tensors.items()}
    for part in made[:2]:
        move_memory(part, lambda old: None if old.data_ptr() in kept else old.clone())
    after = ModelState.of(made)
    after.check_fits(ModelState.of(model(1)))
    assert all(same_bytes(after.tensors[name], value) for name, value in values.items())
    assert memory_of(after) & before == kept | {made[2].scale.untyped_storage().data_ptr()}
    assert made[1].quant_method.kernel.scale is shared


@given(_SHAPES, st.randoms(use_true_random=False))
def test_memory_order_is_a_view_of_every_permuted_tensor(shape: list[int], chance: Any) -> None:
    whole = torch.arange(math.prod(shape)).reshape(shape)
    order = list(range(len(shape)))
    chance.shuffle(order)
    flat = memory_order(whole.permute(order))
    assert flat is not None
    assert torch.equal(flat, whole.reshape(-1))
    assert flat.data_ptr() == whole.data_ptr()


@pytest.mark.parametrize(
    "gaps",
    [torch.ones(4, 6)[:, :3], torch.ones(4, 6)[::2], torch.ones(4, 1).expand(4, 6)],
    ids=["columns", "rows", "repeated"],
)
def test_memory_order_of_a_tensor_with_gaps_is_none(gaps: Any) -> None:
    assert memory_order(gaps) is None
    assert [part.numel() for part in ends_of(gaps, 2)] == [8, 8]


def test_ends_of_a_transposed_tensor_are_those_of_its_memory() -> None:
    whole = torch.arange(12, dtype=torch.int16).reshape(3, 4)
    for tensor, count in itertools.product((whole, whole.t()), (1, 5, 99)):
        first, last = (end.view(torch.int16).tolist() for end in ends_of(tensor, count))
        assert first == list(range(12))[:count]
        assert last == list(range(12))[-count:]
