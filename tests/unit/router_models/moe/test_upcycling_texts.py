"""Texts of a field for mixtures of experts: where they come from and what they are worth."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from router_models.experts import training_texts
from router_models.experts.evaluate import RowScore
from router_models.experts.training_texts import Example
from router_models.moe import bits_per_byte, upcycling_texts


def _write(folder: Path, name: str, rows: int) -> None:
    lines = [json.dumps({"prompt": f"case {i}", "answer": f"verdict {i}"}) for i in range(rows)]
    text = "\n".join(lines) + "\n"
    if name.endswith(".gz"):
        (folder / name).write_bytes(gzip.compress(text.encode()))
    else:
        (folder / name).write_text(text)


@pytest.mark.parametrize("name", ["law.jsonl", "law.jsonl.gz"])
def test_domain_from_a_file_is_read(tmp_path: Path, name: str) -> None:
    _write(tmp_path, name, 100)
    field = upcycling_texts.read("law", tmp_path)
    assert len(field.train) + len(field.held_out) == 100
    assert 8 <= len(field.held_out) <= 35
    assert not {row.group for row in field.train} & {row.group for row in field.held_out}
    assert upcycling_texts.read("law", tmp_path) == field


def test_domain_without_texts_raises_with_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(upcycling_texts.NoTextsError, match=r"no texts for 'law'.*law\.jsonl in"):
        upcycling_texts.read("law", tmp_path)
    with pytest.raises(upcycling_texts.NoTextsError, match="no folder of texts is given"):
        upcycling_texts.read("law", None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"answer": "x"}', "line 1: expected"),
        ('{"prompt": "p", "answer": 3}', "line 1: expected"),
        ("[1]", "line 1: expected"),
        ("{", "can't be read"),
        ('{"prompt": "p"}', "has .* rows to learn from and"),
    ],
)
def test_domain_with_an_invalid_file_raises_with_the_reason(
    tmp_path: Path, line: str, said: str
) -> None:
    (tmp_path / "law.jsonl").write_text(line + "\n")
    with pytest.raises(upcycling_texts.NoTextsError, match=said):
        upcycling_texts.read("law", tmp_path)


@pytest.mark.parametrize("name", upcycling_texts.DEMO_FIELDS)
def test_demo_domains_have_prompts_without_any_file(name: str) -> None:
    field = upcycling_texts.own_prompts(name)
    assert len(field.train) >= 200
    assert len(field.held_out) >= 50
    groups = {row.group for row in field.train} & {row.group for row in field.held_out}
    assert not groups, "a template stands on both sides"
    assert {row.answer for row in field.train} == {""}


def test_demo_domains_hold_out_the_evaluation_prompts(tmp_path: Path) -> None:
    rows = [json.dumps({"question": f"q {i}", "answer": f"a {i}"}) for i in range(400)]
    (tmp_path / "gsm8k_train.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    field = upcycling_texts.read("math", tmp_path)
    assert field.held_out == training_texts.load("math", tmp_path, seed=0).held_out
    assert len(field.train) == 100


def test_answer_prompts_answers_only_rows_without_an_answer() -> None:
    rows = (Example("a", "", "1"), Example("b", "told", "2"), Example("c", "", "3"))
    field = upcycling_texts.Field("law", rows, rows[:1], "", "")
    batches: list[list[str]] = []

    def answer(prompts: list[str]) -> list[str]:
        batches.append(prompts)
        return [prompt.upper() if prompt != "c" else "" for prompt in prompts]

    done = upcycling_texts.answered(field, answer, 3)
    # An expert that has nothing to say leaves nothing to learn from.
    assert [(row.prompt, row.answer) for row in done.train] == [("a", "A"), ("b", "told")]
    assert [row.answer for row in done.held_out] == ["A"]
    assert batches == [["a", "c"], ["a"]]
    assert len(upcycling_texts.answered(field, answer, 1).train) == 1


def _scores(*row_bits: float) -> list[RowScore]:
    return [RowScore(f"g{i // 2}", perplexity, 10, False) for i, perplexity in enumerate(row_bits)]


def test_kept_returns_the_share_of_a_gain_with_its_error() -> None:
    base, expert = _scores(40, 60, 50, 50), _scores(20, 30, 30, 20)
    half = bits_per_byte.kept(base, expert, _scores(30, 45, 40, 35), seed=0)
    assert (half.rows, half.base, half.expert, half.model) == (4, 5.0, 2.5, 3.75)
    assert half.share == pytest.approx(0.5)
    assert half.share_error == pytest.approx(0.0, abs=1e-12)
    assert bits_per_byte.kept(base, expert, expert, seed=0).share == pytest.approx(1.0)
    assert bits_per_byte.kept(base, expert, base, seed=0).share == pytest.approx(0.0)
    uneven = bits_per_byte.kept(base, expert, _scores(20, 30, 50, 50), seed=0)
    assert 0.2 < uneven.share_error < 0.6
    nothing = bits_per_byte.kept(base, base, expert, seed=0)
    assert (nothing.base, nothing.model) == (5.0, 2.5)
    assert math.isnan(nothing.share)
    assert math.isnan(nothing.share_error)
