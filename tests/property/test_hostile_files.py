"""Hostile model files are read, or refused with one typed error."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import ModelStoreError
from service.models import inspect_model
from service.models.safetensors_headers import encode_header, read_header
from tests.unit.models.test_model_folders import LLAMA, llama_tensors, make_llama, make_lora

FILES = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150
)
HUGE = 10**400
NUMBERS = (
    st.integers(-2, 70)
    | st.sampled_from([HUGE, -HUGE, 2**63, 2**64, 1.5, float("inf"), float("nan"), 1e308])
    | st.booleans()
    | st.none()
    | st.text(max_size=3)
)
VALUES = st.recursive(
    NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "F4", "X", "", []]) | VALUES,
        "shape": st.lists(NUMBERS, max_size=4) | VALUES,
        "data_offsets": st.lists(NUMBERS, max_size=3) | VALUES,
    },
)


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, whatever it is."""
    size = len(header) if length is None else length
    path.write_bytes(struct.pack("<Q", size) + header + data)
    return path


def refused(read: Callable[[Path], object], path: Path) -> str:
    """What a reader says of a file that it refuses, or nothing; any other error is a fault."""
    try:
        read(path)
    except ModelStoreError as error:
        return error.message
    return ""


@FILES
@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | VALUES) | VALUES)
def test_read_header_of_any_json_is_read_or_refused(tmp_path: Path, header: Any) -> None:
    path = write_raw(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(64))
    message = refused(read_header, path)
    assert "\n" not in message
    assert len(message) < 600


@FILES
@given(st.binary(max_size=64), st.none() | st.integers(0, 2**64 - 1))
def test_read_header_of_any_bytes_is_read_or_refused(
    tmp_path: Path, header: bytes, length: int | None
) -> None:
    message = refused(read_header, write_raw(tmp_path / "x.safetensors", header, b"", length))
    assert "\n" not in message
    assert len(message) < 600


def one(**changes: Any) -> bytes:
    """A header of one tensor of 4 bytes."""
    return json.dumps(
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}}
    ).encode()


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (one(shape=[float("inf")]), "whole number"),
        (one(shape=[1.0]), "whole number"),
        (one(shape=[True]), "whole number"),
        (one(shape=["1"]), "whole number"),
        (one(shape=[-1, -1]), "whole number"),
        (one(shape=[2**62, 2**62, 2**62]), "disagree"),
        (one(shape=[1] * 65), "at most 64"),
        (one(shape={"0": 1}), "not a list"),
        (one(data_offsets=[0, 2, 4]), "not two numbers"),
        (one(data_offsets=[4, 8]), "overlap or leave a hole"),
        (one(dtype=["F32"]), "unknown dtype"),
        (
            one().replace(
                b"}}", b'}, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
            ),
            "twice",
        ),
        (one().decode().encode("utf-16"), "corrupt"),
        (b"null", "not an object"),
        (b'{"a": 1}', "not an object"),
        (b"1" * 5000, "corrupt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_read_header_hostile_file_raises_its_own_error(
    tmp_path: Path, header: bytes, told: str
) -> None:
    path = write_raw(tmp_path / "x.safetensors", header, bytes(4))
    with pytest.raises(ModelStoreError, match=told):
        read_header(path)


def test_read_header_of_a_file_written_here_is_read(tmp_path: Path) -> None:
    header = encode_header(llama_tensors(), {"format": "pt"})
    end = sum(
        4 * shape[0] * (shape[1] if len(shape) > 1 else 1) for _, shape in llama_tensors().values()
    )
    (tmp_path / "x.safetensors").write_bytes(header + bytes(end))
    assert read_header(tmp_path / "x.safetensors").keys() == llama_tensors().keys()


@FILES
@given(st.sampled_from(sorted({*LLAMA, "text_config", "quantization_config"})), VALUES)
def test_inspect_any_config_is_read_or_refused(tmp_path_factory: Any, key: str, value: Any) -> None:
    # A kind that transformers does not know: it is not asked to judge hostile values here.
    config = {**LLAMA, "model_type": "nobody_knows", key: value}
    folder = make_llama(tmp_path_factory.mktemp("m") / "m", config=config)
    assert "\n" not in refused(inspect_model, folder)


ADAPTER_KEYS = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "bias",
    "use_dora",
)


@FILES
@given(st.sampled_from([*ADAPTER_KEYS, "base_model_name_or_path", "init_lora_weights"]), VALUES)
def test_inspect_any_adapter_config_is_read_or_refused(
    tmp_path_factory: Any, key: str, value: Any
) -> None:
    folder = make_lora(tmp_path_factory.mktemp("a") / "a", config={key: value})
    assert "\n" not in refused(inspect_model, folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"{" * 10, b'{"a":' * 100_000, b"\xff\xfe", b"[]", b"1" * 5000]
)
def test_inspect_json_that_is_no_object_raises_with_the_file_name(
    tmp_path: Path, name: str, content: bytes
) -> None:
    folder = make_llama(tmp_path / "m", template=False)
    (folder / name).write_bytes(content)
    with pytest.raises(ModelStoreError, match=name):
        inspect_model(folder)
