"""The held-out prompts: their number, their form, and that the router was not fitted on them."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from router_models.general.categories import general_categories
from router_models.general.held_out_prompts import (
    HeldOutError,
    HeldOutPrompt,
    Paraphrase,
    field_prompts,
    held_out_prompts,
    paraphrases,
    same_team_prompts,
)

FITTED_ON = Path("router_models/general/prompts")
LEAST = {"en": 14, "de": 3, "fr": 3, "es": 3, "zh": 3, "it": 2, "pt": 2, "ja": 2}
FIELDS = {
    "biology",
    "business",
    "chemistry",
    "computer science",
    "economics",
    "engineering",
    "health",
    "history",
    "law",
    "math",
    "philosophy",
    "physics",
    "psychology",
    "other",
}
GOOD = {"id": "law-en-01", "prompt": "May I?", "category": "law", "language": "en"}


def normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def fitted_on() -> set[str]:
    """The texts in the folder of prompts for the fit, whatever the rows look like."""
    found = set()
    for file in FITTED_ON.rglob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").split("\n"):
            row = json.loads(line or "null")
            found |= {
                normal(text)
                for text in (row.values() if isinstance(row, dict) else [row])
                if isinstance(text, str)
            }
    return found


def test_held_out_prompts_has_every_category_in_every_language() -> None:
    counts = Counter((prompt.category, prompt.language) for prompt in held_out_prompts())
    for category in general_categories().names:
        for language, least in LEAST.items():
            assert counts[category, language] >= least, (category, language)
    assert {category for category, _ in counts} == {
        *general_categories().names,
        general_categories().fallback,
    }


def test_held_out_prompts_has_60_that_belong_to_no_category() -> None:
    none = [p for p in held_out_prompts() if p.category == general_categories().fallback]
    assert len(none) >= 60


def test_same_team_prompts_have_every_category_in_five_further_languages() -> None:
    counts = Counter((prompt.category, prompt.language) for prompt in same_team_prompts())
    languages = ("ar", "hi", "nl", "pl", "ru")
    assert counts == {(c, lang): 1 for c in general_categories().names for lang in languages}


def test_field_prompts_has_18_in_every_field_of_mmlu_pro() -> None:
    counts = Counter(prompt.category for prompt in field_prompts())
    assert set(counts) == FIELDS
    assert min(counts.values()) >= 18
    assert counts.total() >= 260


def test_held_out_texts_and_ids_are_distinct() -> None:
    for prompts in ([*held_out_prompts(), *same_team_prompts()], field_prompts()):
        assert max(Counter(prompt.prompt.strip().casefold() for prompt in prompts).values()) == 1
        assert max(Counter(prompt.id for prompt in prompts).values()) == 1
        assert all(prompt.prompt == prompt.prompt.strip() for prompt in prompts)


def test_paraphrases_are_120_of_100_prompts_in_every_category() -> None:
    by_id = {prompt.id: prompt for prompt in held_out_prompts()}
    found = paraphrases()
    assert len(found) >= 120
    assert len({item.of for item in found}) >= 100
    assert {by_id[item.of].category for item in found} == set(general_categories().names)
    assert all(normal(item.prompt) != normal(by_id[item.of].prompt) for item in found)


def test_held_out_texts_are_not_among_those_for_the_fit() -> None:
    prompts = [*held_out_prompts(), *same_team_prompts(), *field_prompts(), *paraphrases()]
    texts = {normal(prompt.prompt): prompt.prompt for prompt in prompts}
    # Greetings of one or two words, such as a plain hello, occur in every collection.
    shared = {normal_text for normal_text in texts.keys() & fitted_on() if " " in normal_text}
    assert not {texts[item] for item in shared}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "needs the texts category, id, language, prompt"),
        (json.dumps(GOOD | {"prompt": ""}), "needs the texts"),
        (json.dumps(GOOD | {"prompt": 1}), "needs the texts"),
        (json.dumps(GOOD | {"more": "x"}), "needs the texts"),
    ],
)
def test_held_out_prompts_malformed_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "law.jsonl").write_text(json.dumps(GOOD) + "\n" + line)
    with pytest.raises(HeldOutError, match=message) as error:
        held_out_prompts(tmp_path)
    assert "law.jsonl:2: " in str(error.value)


def test_held_out_prompts_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(HeldOutError, match="has no held-out prompts"):
        held_out_prompts(tmp_path)
    with pytest.raises(HeldOutError, match=r"fields\.jsonl"):
        field_prompts(tmp_path)
    with pytest.raises(HeldOutError, match=r"perturbed\.jsonl"):
        paraphrases(tmp_path)


def test_held_out_files_with_other_rows_are_no_categories(tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").write_text(json.dumps(GOOD) + "\n")
    (tmp_path / "fields.jsonl").write_text(json.dumps(GOOD | {"category": "math"}))
    (tmp_path / "perturbed.jsonl").write_text(json.dumps({"of": "law-en-01", "prompt": "Can I?"}))
    assert held_out_prompts(tmp_path) == [HeldOutPrompt(**GOOD)]
    assert [prompt.category for prompt in field_prompts(tmp_path)] == ["math"]
    assert paraphrases(tmp_path) == [Paraphrase("law-en-01", "Can I?")]
