"""Hashed n-grams: counts by definition, folding, bounds."""

from __future__ import annotations

import numpy as np
import pytest

from service.classifier.hashed_ngrams import FeatureSpec, Featurizer, clip, codes

CHARS_ONLY = FeatureSpec(char_orders=(2,), word_orders=())
WORDS_ONLY = FeatureSpec(char_orders=(), word_orders=(1,))


def test_features_count_character_bigrams() -> None:
    found = Featurizer(CHARS_ONLY)("abab")
    assert sorted(found.counts.tolist()) == [1, 2]  # ab twice, ba once
    assert found.chars == 2


def test_features_count_words_at_any_position() -> None:
    featurizer = Featurizer(WORDS_ONLY)
    found = featurizer("cow, farm! cow (cow) the-farm")
    assert found.words == 6
    assert sorted(found.counts.tolist()) == [1, 2, 3]
    assert set(featurizer("cow").buckets.tolist()) <= set(found.buckets.tolist())
    assert found.chars == 0


def test_word_hash_is_independent_of_position() -> None:
    featurizer = Featurizer(WORDS_ONLY)
    one = featurizer("farm").buckets
    assert one.tolist() == featurizer("  \n\t" + " " * 777 + "farm.").buckets.tolist()


def test_features_fold_case_and_digits() -> None:
    featurizer = Featurizer(FeatureSpec())
    left, right = featurizer("Buy 12 COWS"), featurizer("buy 97 cows")
    assert left.buckets.tolist() == right.buckets.tolist()
    assert left.counts.tolist() == right.counts.tolist()


def test_features_ascii_and_wide_paths_agree() -> None:
    assert codes("Ab1 z~\x00").tolist() == codes("Ab1 z~\x00é")[:-1].tolist()


def test_features_words_and_characters_use_separate_tables() -> None:
    spec = FeatureSpec()
    found = Featurizer(spec)("hello there")
    assert (found.buckets[: found.chars] < 1 << spec.bits).all()
    assert (found.buckets[found.chars :] >= 1 << spec.bits).all()
    assert (np.diff(found.buckets) > 0).all()


def test_features_read_only_the_edges_of_long_texts() -> None:
    spec = FeatureSpec(edge_chars=20)
    featurizer = Featurizer(spec)
    left = "a" * 20 + "b" * 1000 + "c" * 20
    right = "a" * 20 + "d" * 5000 + "c" * 20
    assert clip(left, 20) == "a" * 20 + "\n" + "c" * 20
    assert featurizer(left).buckets.tolist() == featurizer(right).buckets.tolist()


@pytest.mark.parametrize(
    "text", ["", " ", "a", "\x00", "\ud800", "\udfff\ud800", "İ" * 9000, "é" * 20_000, "🙂", "_"]
)
def test_features_accept_any_text(text: str) -> None:
    found = Featurizer(FeatureSpec())(text)
    assert len(found.buckets) == len(found.counts)
    assert (found.counts >= 1).all()


def test_feature_spec_round_trips_through_json() -> None:
    spec = FeatureSpec(char_orders=(3,), bits=12)
    assert FeatureSpec.from_json(spec.to_json()) == spec


def test_feature_spec_of_an_artifact_of_before_does_not_trim() -> None:
    data = FeatureSpec(trims=True).to_json()
    del data["trims"]
    assert not FeatureSpec.from_json(data).trims


@pytest.mark.parametrize("form", ["{}", " {}", "{}\n", "{}?", "{} ...", "{}。", "\t{} !"])
def test_features_that_trim_are_alike_for_white_space_and_marks_at_the_end(form: str) -> None:
    text = "who  wrote\nthis"
    for trims in (False, True):
        featurizer = Featurizer(FeatureSpec(trims=trims))
        one, other = featurizer("who wrote this"), featurizer(form.format(text))
        assert (one.marks.tolist() == other.marks.tolist()) == trims
    marks = Featurizer(FeatureSpec(trims=True))("???")
    assert marks.marks.size or marks.buckets.size


def test_features_short_and_long_id_lists_count_alike() -> None:
    spec = FeatureSpec(char_orders=(1,), word_orders=())
    featurizer = Featurizer(spec)
    few, many = featurizer("abcab" * 10), featurizer("abcab" * 1000)
    assert few.buckets.tolist() == many.buckets.tolist()
    assert (few.counts * 100).tolist() == many.counts.tolist()
