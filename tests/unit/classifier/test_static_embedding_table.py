"""The static semantic table."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from service.classifier.router_artifact import Artifact
from service.classifier.static_embedding_table import (
    BUILT_IN,
    MULTILINGUAL,
    TABLE,
    WITHIN,
    StaticTable,
    built_in_table,
    table_of,
)
from service.errors import ArtifactError


@given(st.text(max_size=400) | st.text(alphabet="\ud800\udfffa中\0 ", max_size=50))
@settings(max_examples=60, deadline=None)
def test_embed_any_text_has_length_one_or_zero(text: str) -> None:
    for folder in (BUILT_IN, MULTILINGUAL):
        table = built_in_table(folder)
        vector = table.embed(text)
        assert vector.shape == (table.dims,)
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


@pytest.mark.parametrize("folder", [BUILT_IN, MULTILINGUAL])
def test_built_in_tables_are_small_and_have_a_card(folder: Path) -> None:
    assert (folder / TABLE).stat().st_size <= 8_000_000
    assert "Apache-2.0" in (folder / "README.md").read_text()


def test_table_of_examples_has_the_covariance_within_categories() -> None:
    assert built_in_table().within is not None


@pytest.mark.parametrize(
    ("law", "food"),
    [
        ("Darf mein Vermieter die Kaution behalten?", "Ein Rezept für Linsensuppe"),
        ("房东可以扣押金吗，违反合同怎么办", "番茄炒蛋怎么做好吃"),
        ("арендодатель не возвращает залог по договору", "рецепт супа с картошкой"),
        ("大家さんが敷金を返してくれない、契約違反では", "カレーの作り方とレシピ"),
    ],
)
def test_multilingual_table_knows_meaning_across_languages(law: str, food: str) -> None:
    table = built_in_table(MULTILINGUAL)
    question = table.embed("May my landlord keep the deposit under the rental contract?")
    assert question @ table.embed(law) > question @ table.embed(food) + 0.05


def _artifact(section: dict[str, object]) -> Artifact:
    return Artifact(Path("a@1"), {"name": "a@1", "classifier": section}, {})


def test_table_of_is_the_one_that_the_artifact_was_fitted_with() -> None:
    assert table_of(_artifact({})) is None
    for folder in (BUILT_IN, MULTILINGUAL):
        digest = built_in_table(folder).digest
        found = table_of(_artifact({"static": {"table_sha256": digest}}))
        assert found is built_in_table(folder)
    assert table_of(_artifact({"static": {"table_sha256": "0"}})) is built_in_table(BUILT_IN)


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
