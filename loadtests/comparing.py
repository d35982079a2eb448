"""`python -m loadtests.comparing`: Measures what agreement and the cache take as equal.

Both should prefer "different" in doubt. The report has the pairs that differ in one meaningful
token and were taken as equal, of which there must be none, and the pairs of equal meaning that were
missed. `--data` names a folder with gsm8k_train.jsonl.gz, clinc150.jsonl.gz and
labelled_prompts.jsonl.gz. Without it, questions and answers are generated.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loadtests.equal_and_different_text_pairs import (
    REFUSALS,
    SPELLINGS,
    STATED,
    changed,
    different_answers,
    different_questions,
    paraphrases,
)
from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from service.broker.answer_agreement import agreed, final_answer
from service.config import CacheConfig
from service.gateway.cache.text_similarity import (
    MOST_CHARACTERS,
    canonical_form,
    same_words,
    similarity,
)

_SEED = 1


def agree(first: str, second: str) -> bool:
    """Return whether a cascade would treat two answers as equal."""
    return agreed([final_answer(first), final_answer(second)])


def hit(first: str, second: str) -> bool:
    """Return whether one question would be answered from the other's entry, as a similar one."""
    return (
        same_words(canonical_form(first), canonical_form(second))
        and similarity(first, second) >= CacheConfig().threshold
    )


def _rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(folder / name, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _answers(folder: Path | None) -> list[tuple[str, str]]:
    """Numbers and their texts: worked answers as they were recorded, or made up."""
    if folder is None:
        draw = random.Random(_SEED)
        numbers = [str(draw.randrange(1, 10**6)) for _ in range(500)]
        return [(n, f"We add it up.\n#### {n}") for n in numbers]
    found = [row["answer"] for row in _rows(folder, "gsm8k_train.jsonl.gz")]
    return [(text.rpartition("#### ")[2].replace(",", ""), text) for text in found]


def _questions(folder: Path | None) -> dict[str, list[str]]:
    """Real questions by where they are from, or made up."""
    if folder is None:
        made = {item for pair in different_questions(_SEED, 500) for item in pair}
        return {"made up": sorted(made)}
    return {
        "short requests (CLINC150)": [
            row["text"] for row in _rows(folder, "clinc150.jsonl.gz") if row["split"] == "test"
        ],
        "arithmetic (GSM8K)": [
            row["question"] for row in itertools.islice(_rows(folder, "gsm8k_train.jsonl.gz"), 3000)
        ],
        "prompts (MT-Bench, Arena-Hard)": [
            row["prompt"]
            for row in _rows(folder, "labelled_prompts.jsonl.gz")
            if not row["id"].startswith("gsm8k") and len(row["prompt"]) <= MOST_CHARACTERS
        ],
    }


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "–"


def _agreement(report: Report, pairs: int, folder: Path | None) -> None:
    wrong = [pair for pair in different_answers(_SEED, pairs) if agree(*pair)]
    alike = [
        (refusal, other) for refusal in REFUSALS for other in REFUSALS if agree(refusal, other)
    ]
    answers = _answers(folder)
    draw = random.Random(_SEED)
    units = ("apples", "dollars", "hours", "miles")
    missed: defaultdict[str, list[int]] = defaultdict(list)
    false_pairs = 0
    for (number, text), (other, other_text) in itertools.pairwise(answers):
        # Reasoning does not count, only what it comes to.
        false_pairs += agree(text, other_text) and number != other
        way, style = draw.choice(sorted(SPELLINGS)), draw.choice(sorted(STATED))
        again = STATED[style](SPELLINGS[way](number, draw.choice(units)))
        missed[f"spelt: {way}"].append(not agree(text, again))
        missed[f"stated: {style}"].append(not agree(text, STATED[style](number)))
    report.reach += [
        TargetCheck(
            f"answers wrongly taken to agree, of {pairs} pairs, at most", 0, len(wrong), not wrong
        ),
        TargetCheck(
            f"refusals taken to agree, of {len(REFUSALS)}², at most", 0, len(alike), not alike
        ),
        TargetCheck(
            f"recorded answers wrongly taken to agree, of {len(answers) - 1} pairs, at most",
            0,
            false_pairs,
            false_pairs == 0,
        ),
    ]
    table = Table("The same number, missed", ("how the second one says it", "pairs", "missed"))
    for way, seen in sorted(missed.items()):
        table.rows.append((way, str(len(seen)), _share(sum(seen), len(seen))))
    report.tables.append(table)
    report.facts["false_agreement"] = wrong[:20]
    report.facts["missed_agreement"] = {w: sum(s) / len(s) for w, s in sorted(missed.items())}


def _likeness(report: Report, pairs: int, folder: Path | None) -> None:
    wrong = [pair for pair in different_questions(_SEED, pairs) if hit(*pair)]
    draw = random.Random(_SEED)
    known = _questions(folder)
    real_pairs = 0
    real_wrong: list[tuple[str, str]] = []
    table = Table("Paraphrases answered from the cache of similar questions", ("said with", *known))
    rates: defaultdict[str, dict[str, str]] = defaultdict(dict)
    hit_rates: dict[str, dict[str, float]] = {}
    for name, questions in known.items():
        seen: defaultdict[str, list[bool]] = defaultdict(list)
        for question in questions:
            other = changed(draw, question)
            if other is not None:
                real_pairs += 1
                if hit(question, other):
                    real_wrong.append((question, other))
            for way, text in paraphrases(question).items():
                seen[way].append(hit(question, text))
        for way, hits in seen.items():
            rates[way][name] = _share(sum(hits), len(hits))
        hit_rates[name] = {way: sum(hits) / len(hits) for way, hits in seen.items()}
    for way, shares in rates.items():
        table.rows.append((way, *(shares.get(name, "–") for name in known)))
    report.tables.append(table)
    report.reach += [
        TargetCheck(
            f"questions wrongly taken for one, of {pairs} pairs, at most", 0, len(wrong), not wrong
        ),
        TargetCheck(
            f"real questions with a token changed taken for one, of {real_pairs} pairs, at most",
            0,
            len(real_wrong),
            not real_wrong,
        ),
    ]
    report.facts["false_hits"] = [*wrong[:20], *real_wrong[:20]]
    report.facts["hit_rate"] = hit_rates


def measure(pairs: int, folder: Path | None) -> Report:
    """Every figure."""
    report = Report("comparing")
    _agreement(report, pairs, folder)
    _likeness(report, pairs, folder)
    return report


def main(given: Sequence[str] | None = None) -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("comparing", __doc__)
    words.add_argument(
        "--pairs", type=int, default=50_000, help="number of generated pairs of each kind"
    )
    words.add_argument("--data", type=Path, help="folder of recorded questions and answers")
    options = words.parse_args(given)
    return tell(lambda _: measure(options.pairs, options.data), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
