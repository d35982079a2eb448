"""The rows that the general router is fitted on: our own prompts, their forms, public data.

Every row has a weight. In no category do public data weigh more than a share of our own prompts.
"""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router_models.general.augmentation import augment, scraps
from router_models.general.public_data_reader import PublicPrompt, read_public_data
from router_models.general.training_prompt_reader import read_training_prompts, read_unknown
from service.classifier.classifier import GENERAL

OWN, SCRAPS, UNKNOWN = "own", "scraps", "unknown"


@dataclass(frozen=True, slots=True)
class Mix:
    """How much of each source is taken, and what it weighs beside a prompt of our own.

    Attributes:
        per_category: Most rows of one public source in one category.
        public_share: Weight of all public rows of a category, as a share of our own prompts'.
        copies: Other forms of each of our own prompts.
        copy_weight: Weight of one of them.
        scraps: Rows of the category `general`.
        scrap_weight: Weight of one of them.
        unknown_weight: Weight of a text of our own that asks for nothing.
    """

    per_category: int = 120
    public_share: float = 0.3
    copies: int = 3
    copy_weight: float = 0.4
    scraps: int = 400
    scrap_weight: float = 0.4
    unknown_weight: float = 0.6


@dataclass(frozen=True, slots=True)
class FitRow:
    """A text to fit.

    Attributes:
        text: The text.
        category: Its category; `general` for scraps and texts that ask for nothing.
        language: ISO 639-1.
        source: `own`, `unknown`, `scraps`, or the name of a public source.
        origin: Number of the row that it is a form of; its own number else.
        weight: At most 1.
        is_form: Whether it is another form of a prompt.
    """

    text: str
    category: str
    language: str
    source: str
    origin: int
    weight: float
    is_form: bool = False


def fit_rows(data: Path | None, mix: Mix, seed: int = 0) -> list[FitRow]:
    """Gather all rows.

    Args:
        data: The folder with the public data; None leaves them out.
        mix: How much of each.
        seed: Draws forms and scraps.

    Raises:
        PromptsError: Our own prompts are malformed.
        PublicDataError: A public file is missing or malformed.
    """
    own = read_training_prompts()
    rows = [FitRow(p.prompt, p.category, p.lang, OWN, i, 1.0) for i, p in enumerate(own)]
    seen = {row.text for row in rows}
    if data is not None:
        rows += _public(read_public_data(data).prompts, len(rows), mix, seen, rows)
    texts = scraps([p.prompt for p in own], mix.scraps, random.Random(f"{seed}/scraps"))
    rows += [
        FitRow(text, GENERAL, "", SCRAPS, len(rows) + i, mix.scrap_weight)
        for i, text in enumerate(texts)
        if text not in seen
    ]
    rows += [
        FitRow(p.prompt, GENERAL, p.lang, UNKNOWN, len(rows) + i, mix.unknown_weight)
        for i, p in enumerate(read_unknown())
    ]
    draw = random.Random(f"{seed}/forms")
    for _ in range(mix.copies):
        for i, p in enumerate(own):
            text = augment(p.prompt, p.lang, draw)
            rows.append(FitRow(text, p.category, p.lang, OWN, i, mix.copy_weight, is_form=True))
    return rows


def row_weights(rows: Sequence[FitRow]) -> NDArray[np.float64]:
    """Weights, (rows,), that bring the categories halfway to equal weight."""
    total: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        total[row.category] += row.weight
    everything = sum(total.values())
    return np.array([row.weight * (everything / total[row.category]) ** 0.5 for row in rows])


def _public(
    prompts: Sequence[PublicPrompt], start: int, mix: Mix, seen: set[str], own: Sequence[FitRow]
) -> list[FitRow]:
    """Draw evenly over the labels of each source and category, the same rows each time."""
    by: defaultdict[tuple[str, str], defaultdict[str, list[PublicPrompt]]]
    by = defaultdict(lambda: defaultdict(list))
    for prompt in prompts:
        # The publishers' test rows stay out.
        if prompt.split in (None, "train"):
            by[prompt.source, prompt.category][prompt.label].append(prompt)
    drawn: list[PublicPrompt] = []
    for labels in by.values():
        queues = [
            sorted(found, key=lambda p: zlib.crc32(p.prompt.encode("utf-8", "replace")))
            for _, found in sorted(labels.items())
        ]
        taken = 0
        for turn in range(max(map(len, queues))):
            for queue in queues:
                if (
                    turn < len(queue)
                    and taken < mix.per_category
                    and queue[turn].prompt not in seen
                ):
                    seen.add(queue[turn].prompt)
                    drawn.append(queue[turn])
                    taken += 1
    mine: defaultdict[str, float] = defaultdict(float)
    for row in own:
        mine[row.category] += row.weight
    size: defaultdict[str, int] = defaultdict(int)
    for prompt in drawn:
        size[prompt.category] += 1
    return [
        FitRow(
            p.prompt,
            p.category,
            "en",
            p.source,
            start + i,
            min(1.0, mix.public_share * mine[p.category] / size[p.category]),
        )
        for i, p in enumerate(drawn)
    ]
