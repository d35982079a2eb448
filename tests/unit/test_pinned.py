"""Copying an expert's tensors into a running model's: what of it needs no GPU."""

from __future__ import annotations

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


def test_all_but_the_attention_is_copied_to_where_it_was() -> None:
    from service.engine.vllm_pinned import check_fits, copy_all, hold, tensors_of

    live, other = model(1), model(2)
    held = hold(tensors_of(other))
    assert set(held.tensors) == {"0.weight", "0.bias", "1.bias", "table"}
    assert held.host_bytes == 4 * (16 + 4 + 4 + 3)
    places = {name: tensor.data_ptr() for name, tensor in tensors_of(live).items()}
    check_fits(held.tensors, tensors_of(live))
    copy_all(held.tensors, tensors_of(live))
    x = torch.randn(2, 4)
    assert torch.equal(live[1](live[0](x)), other[1](other[0](x)))
    assert {name: tensor.data_ptr() for name, tensor in tensors_of(live).items()} == places


def test_tensors_that_do_not_fit_are_named() -> None:
    from service.engine.vllm_pinned import check_fits, tensors_of

    live = tensors_of(model(1))
    with pytest.raises(ValueError, match=r"table is torch\.float32"):
        check_fits({**live, "table": torch.zeros(2)}, live)
    with pytest.raises(ValueError, match="more is in one"):
        check_fits({**live, "more": torch.zeros(2)}, live)
