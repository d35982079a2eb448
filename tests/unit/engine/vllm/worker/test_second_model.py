"""A second model: what is checked before it is built, and a layer that can't be made ready."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from service.cli.doctor.random_models import QUANTIZATIONS  # noqa: E402
from service.engine.vllm.worker import second_model  # noqa: E402
from service.engine.vllm.worker.second_model import (  # noqa: E402
    LayerRoom,
    _measured,
    _on,
    check_same_form,
)
from tests.support.engine import fake_cuda  # noqa: E402

_GPTQ = QUANTIZATIONS["gptq"]


def _model(folder: Path, form: Any) -> Path:
    folder.mkdir()
    config = {"model_type": "llama"} | ({} if form is None else {"quantization_config": form})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (_GPTQ, None),
        ({**_GPTQ, "damp_percent": 0.5}, None),
        ({**_GPTQ, "bits": 8}, "quantization_config.bits is 8, and 4 in the running model"),
        ({**_GPTQ, "group_size": -1}, "quantization_config.group_size is -1, and 128"),
        (QUANTIZATIONS["awq"], "quantization_config.desc_act is None, and False"),
        (None, "its weights are not stored quantised"),
    ],
)
def test_weights_of_another_form_are_refused_by_name(tmp_path: Path, form: Any, why: str) -> None:
    """They would be read by the running model's form, without a word."""
    running, other = _model(tmp_path / "a", _GPTQ), _model(tmp_path / "b", form)
    if why is None:
        check_same_form(running, other)
        return
    with pytest.raises(ValueError, match=why.replace(".", r"\.")):
        check_same_form(running, other)


def test_quantised_weights_beside_plain_ones_are_refused(tmp_path: Path) -> None:
    plain = _model(tmp_path / "a", None)
    with pytest.raises(ValueError, match="its weights are stored quantised"):
        check_same_form(plain, _model(tmp_path / "b", _GPTQ))
    check_same_form(plain, _model(tmp_path / "c", None))
    check_same_form(plain, tmp_path / "nowhere")


class _BadKernelError(Exception):
    """A kernel refuses a layer."""


@pytest.mark.parametrize("error", [_BadKernelError("no such shape"), "room"])
def test_layer_that_can_not_be_made_ready_leaves_the_device(error: Any) -> None:
    """Whatever was made of it is freed, although the error is still being handled."""
    layer = torch.nn.Linear(4, 4)
    weights = {name: value.clone() for name, value in layer.named_parameters()}
    made: list[weakref.ref[Any]] = []

    def make_ready() -> None:
        packed = torch.ones(4)
        made.append(weakref.ref(packed))
        raise torch.OutOfMemoryError("CUDA out of memory") if error == "room" else error

    refusal = MemoryError if error == "room" else _BadKernelError
    with pytest.raises(refusal) as found, _on(torch.device("cpu"), layer):
        make_ready()
    assert made[0]() is None
    if error == "room":
        assert "no room to make a layer of 0.00 GB ready beside the running" in str(found.value)
    assert all(torch.equal(value, weights[name]) for name, value in layer.named_parameters())


def test_room_of_a_layer_is_what_the_device_had_given_out_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda, room = fake_cuda.FakeCuda(), LayerRoom()
    monkeypatch.setattr(second_model, "cuda_runtime", lambda: cuda)
    assert room.ratio == 0
    cuda.give(10_000)  # the running model's
    # By layer of 4 x 4 and 8 x 8 weights: what is moved there, what is made of it, and the rest.
    for width, sizes in ((8, (256, 256, 100)), (4, (64, 64, 64)), (8, (256, 300, -44))):
        layer = torch.nn.Linear(width, width, bias=False)
        with _measured(room, torch.device("cuda"), layer):
            for size in sizes:
                cuda.give(size)
            cuda.give(-sum(sizes))
    assert (room.layer_bytes, room.room_bytes) == (256, 612)
    assert room.ratio == pytest.approx(612 / 256)
    assert cuda.given_bytes == 10_000
