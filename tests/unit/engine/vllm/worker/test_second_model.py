"""What is checked before a second model is built from the engine's config."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from service.cli.doctor.random_models import QUANTIZATIONS
from service.engine.vllm.worker.second_model import check_same_form

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
