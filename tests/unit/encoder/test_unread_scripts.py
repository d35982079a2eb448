"""Texts in scripts that a tokeniser does not read."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from service.classifier.static_embedding_table import MULTILINGUAL, built_in_table
from service.encoder.unread_scripts import is_unread, unknown_token


@pytest.mark.parametrize(
    ("ids", "unread"),
    [([], False), ([0], True), ([5, 6, 0], True), ([5, 6, 7, 8, 0], False), ([5, 6], False)],
)
def test_is_unread_counts_unknown_tokens(ids: list[int], unread: bool) -> None:
    assert is_unread("दुकान", ids, 0) == unread
    assert not is_unread("दुकान", ids, None)
    assert not is_unread("shop", ids, 0)


@pytest.mark.parametrize(("names", "number"), [(["a", "<unk>"], 1), (["[UNK]"], 0), (["a"], None)])
def test_unknown_token_is_found_by_its_name(names: list[str], number: int | None) -> None:
    vocabulary = {name: i for i, name in enumerate(names)}
    assert unknown_token(Tokenizer(models.WordLevel(vocabulary, unk_token=names[-1]))) == number


def test_multilingual_table_has_no_vector_for_hindi() -> None:
    table = built_in_table(MULTILINGUAL)
    assert not table.embed("क्या मकान मालिक मुझे घर से निकाल सकता है").any()
    mixed = table.embed("why does my python function return None, मेरा")
    assert np.linalg.norm(mixed) == pytest.approx(1, abs=1e-4)
