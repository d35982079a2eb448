"""The rows that the general router is fitted on, and their weights."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from router_models.general.categories import general_categories
from router_models.general.fit_data import OWN, SCRAPS, UNKNOWN, FitRow, Mix, fit_rows, row_weights
from router_models.general.held_out_prompts import held_out_prompts
from router_models.general.public_data_reader import PublicDataError, read_sources
from service.classifier.classifier import GENERAL


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files of every source: two prompts of each label."""
    folder = tmp_path_factory.mktemp("public")
    files: defaultdict[str, list[str]] = defaultdict(list)
    for source in read_sources():
        for label in source.categories:
            for i in range(2):
                row = {
                    "id": f"{source.id_prefix or ''}{label}-{i}",
                    source.prompt_field: f"{source.name} asks {label} number {i}",
                }
                if source.label_field:
                    row[source.label_field] = label
                if source.split_field:
                    row[source.split_field] = "train" if i else "test"
                files[source.file.removesuffix(".gz")].append(json.dumps(row))
    for name, lines in files.items():
        (folder / name).write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def rows(public: Path) -> list[FitRow]:
    return fit_rows(public, Mix())


def test_fit_rows_have_every_category_and_general(rows: list[FitRow]) -> None:
    assert {row.category for row in rows} == {*general_categories().names, GENERAL}
    assert {row.source for row in rows} == {OWN, UNKNOWN, SCRAPS, *(s.name for s in read_sources())}


def test_fit_rows_give_public_data_less_weight_than_our_own(rows: list[FitRow]) -> None:
    own: Counter[str] = Counter()
    public: Counter[str] = Counter()
    for row in rows:
        if row.source == OWN and row.weight == 1:
            own[row.category] += 1
        elif row.source not in (OWN, UNKNOWN, SCRAPS):
            public[row.category] += row.weight
    assert all(public[c] <= Mix().public_share * own[c] + 1e-9 for c in public)


def test_fit_rows_leave_out_the_publishers_test_rows(rows: list[FitRow]) -> None:
    assert all(r.text.endswith("1") for r in rows if r.source == "clinc150")


def test_fit_rows_forms_have_the_number_of_their_prompt(rows: list[FitRow]) -> None:
    first = {row.origin: row for row in reversed(rows)}
    assert len({(row.text, row.source) for row in first.values()}) == len(first)
    forms = [row for row in rows if first[row.origin] is not row]
    assert len(forms) == Mix().copies * sum(r.source == OWN for r in first.values())
    assert all(row.category == first[row.origin].category for row in forms)


def test_fit_rows_hold_no_held_out_prompt(rows: list[FitRow]) -> None:
    asked = {p.prompt for p in held_out_prompts() if p.category != GENERAL}
    assert not asked & {row.text for row in rows}


def test_fit_rows_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PublicDataError, match=r"mmlu_pro_dev\.jsonl\.gz: no such file"):
        fit_rows(tmp_path, Mix())


def test_row_weights_bring_categories_halfway_to_equal() -> None:
    rows = [FitRow(str(i), "a" if i < 90 else "b", "en", OWN, i, 1.0) for i in range(100)]
    weight = row_weights(rows)
    a, b = weight[:90].sum(), weight[90:].sum()
    assert np.isclose(a / b, (90 / 10) ** 0.5)
