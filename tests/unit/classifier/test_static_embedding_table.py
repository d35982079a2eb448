"""The static semantic table."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from service.classifier.static_embedding_table import (
    BUILT_IN,
    TABLE,
    WITHIN,
    StaticTable,
    built_in_table,
)
from service.errors import ArtifactError


@given(st.text(max_size=400) | st.text(alphabet="\ud800\udfffa中\0 ", max_size=50))
@settings(max_examples=60, deadline=None)
def test_embed_any_text_has_length_one_or_zero(text: str) -> None:
    vector = built_in_table().embed(text)
    assert vector.shape == (256,)
    assert float(np.linalg.norm(vector)) == pytest.approx(1, abs=1e-4) or not vector.any()


def test_embed_knows_meaning_without_common_words() -> None:
    table = built_in_table()
    law = table.embed("Is it legal to record a phone call in Germany?")
    near = table.embed("Can my landlord sue me for breaking the lease?")
    far = table.embed("def fib(n): return n if n < 2 else fib(n - 1)")
    assert law @ near > law @ far + 0.05


def test_embed_long_text_reads_both_ends_only() -> None:
    table = built_in_table()
    ends = ["law " * 200, "recipe " * 200]
    np.testing.assert_array_equal(
        table.embed(ends[0] + "code " * 5000 + ends[1]),
        table.embed(ends[0] + "math " * 9000 + ends[1]),
    )


def test_built_in_table_is_small_and_has_a_card() -> None:
    assert (BUILT_IN / TABLE).stat().st_size <= 8_000_000
    assert "Apache-2.0" in (BUILT_IN / "README.md").read_text()
    assert built_in_table().within is not None


def _rows(folder: Path) -> None:
    tensors = load_file(folder / TABLE)
    save_file({k: v[:-1].copy() for k, v in tensors.items()}, folder / TABLE)


def _kind(folder: Path) -> None:
    tensors = load_file(folder / TABLE)
    tensors["vectors"] = tensors["vectors"].astype(np.int16)
    save_file(tensors, folder / TABLE)


def _infinite(folder: Path) -> None:
    tensors = load_file(folder / TABLE)
    tensors["scale"][3] = np.inf
    save_file(tensors, folder / TABLE)


def _covariance(folder: Path) -> None:
    save_file({"within": np.eye(3, dtype=np.float32)}, folder / WITHIN)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_rows, "one a token"),
        (_kind, "int8"),
        (_infinite, "finite"),
        (_covariance, "covariance"),
        (lambda f: (f / TABLE).write_bytes(b"\x80\x04pickle"), "not a static table"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda f: (f / TABLE).unlink(), "No such file"),
    ],
)
def test_load_damaged_table_is_refused(tmp_path: Path, damage: object, said: str) -> None:
    folder = tmp_path / "table"
    shutil.copytree(BUILT_IN, folder)
    damage(folder)  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=said):
        StaticTable.load(folder)
