"""Finds prompts that ask nearly the same, and takes them out of the prompts to fit.

    python -m router_models.general.near_duplicates

removes from `prompts/` and `unknown/` what is near a held-out prompt, one that calibrates, or an
earlier one of the language. It prints numbers alone, and no held-out prompt is seen by its use.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from router_models.general.held_out_prompts import held_out_prompts, paraphrases, same_team_prompts
from router_models.general.training_prompt_reader import (
    CALIBRATION_FOLDER,
    PROMPTS_FOLDER,
    UNKNOWN_FOLDER,
    normalised_text,
)
from router_models.labelled_prompt_reader import prompt_files, read_prompts

Floats = NDArray[np.float64]

MOST_ALIKE = 0.65
"""Two prompts whose sets of three-letter sequences overlap more (Jaccard) are near-duplicates."""
MOST_LIKE_HELD_OUT = 0.38
"""A prompt whose TF-IDF vector has a larger cosine with a held-out one asks nearly the same."""


def cosines(taught: Sequence[str], held_out: Sequence[str]) -> Floats:
    """Return the cosines of TF-IDF vectors of 2 to 5 letters, (taught, held out).

    Rare sequences weigh more, so that a stock phrase makes two prompts less alike than a shared
    subject does.
    """
    if not taught or not held_out:
        return np.zeros((len(taught), len(held_out)))
    column: dict[str, int] = {}
    rows: list[int] = []
    columns: list[int] = []
    counts: list[int] = []
    for i, text in enumerate([*taught, *held_out]):
        padded = f" {normalised_text(text)} "
        grams = Counter(padded[k : k + n] for n in range(2, 6) for k in range(len(padded) - n + 1))
        rows += [i] * len(grams)
        columns += [column.setdefault(gram, len(column)) for gram in grams]
        counts += list(grams.values())
    table = csr_matrix((1 + np.log(counts), (rows, columns)))
    table = table.multiply(1 + np.log((table.shape[0] + 1) / (np.bincount(columns) + 1))).tocsr()
    table = table.multiply(1 / np.sqrt(table.multiply(table).sum(axis=1))).tocsr()
    return np.asarray((table[: len(taught)] @ table[len(taught) :].T).toarray())


def alikeness(texts: Sequence[str]) -> Floats:
    """Return the Jaccard index of the sets of three-letter sequences, (texts, texts)."""
    column: dict[str, int] = {}
    at: list[tuple[int, int]] = []
    for i, text in enumerate(texts):
        padded = f"  {normalised_text(text)} "
        grams = {padded[k : k + 3] for k in range(len(padded) - 2)}
        at += [(i, column.setdefault(gram, len(column))) for gram in grams]
    rows, columns = zip(*at, strict=True)
    table = csr_matrix((np.ones(len(at), np.float32), (rows, columns)))
    shared = (table @ table.T).toarray()
    sizes = shared.diagonal()
    return np.asarray(shared / (sizes[:, None] + sizes[None, :] - shared))


def held_out_texts(language: str) -> list[str]:
    """The texts of every held-out prompt in a language, their paraphrases too."""
    prompts = [*held_out_prompts(), *same_team_prompts()]
    by_id = {prompt.id: prompt for prompt in prompts}
    return [prompt.prompt for prompt in prompts if prompt.language == language] + [
        other.prompt for other in paraphrases() if by_id[other.of].language == language
    ]


def calibration_texts(language: str) -> list[str]:
    """The texts of the prompts in a language that calibrate."""
    rows, _ = read_prompts(prompt_files([CALIBRATION_FOLDER]))
    return [row.prompt for row in rows if row.language == language]


def keep(texts: Sequence[str], *others: Sequence[str]) -> list[bool]:
    """Whether each text is far from all of some other sets, and from the texts before it."""
    left = list(range(len(texts)))
    while left:  # what counts as rare changes with the texts that are left
        here = [texts[i] for i in left]
        near = np.zeros(len(here))
        for given in others:
            near = np.maximum(near, cosines(here, given).max(axis=1, initial=0.0))
        far = [i for i, c in zip(left, near, strict=True) if c <= MOST_LIKE_HELD_OUT]
        if len(far) == len(left):
            alike = np.triu(alikeness(here), 1) > MOST_ALIKE
            far = [i for k, i in enumerate(left) if not alike[:, k].any()]
        if len(far) == len(left):
            break
        left = far
    kept = set(left)
    return [i in kept for i in range(len(texts))]


def clean(files: Sequence[Path], *others: Sequence[str]) -> list[tuple[int, int]]:
    """Rewrite files of one language without near prompts.

    Returns:
        For each file, how many prompts were kept and removed.
    """
    lines = [
        [line for line in file.read_text(encoding="utf-8").split("\n") if line] for file in files
    ]
    every = [json.loads(line)["prompt"] for part in lines for line in part]
    stays = iter(keep(every, *others))
    found = []
    for file, part in zip(files, lines, strict=True):
        left = [line for line in part if next(stays)]
        if len(left) < len(part):
            file.write_text("".join(f"{line}\n" for line in left), encoding="utf-8")
        found.append((len(left), len(part) - len(left)))
    return found


@click.command()
def main() -> None:
    """Take near-duplicates out of `prompts/` and `unknown/`, and print how many."""
    for language in sorted(file.stem for file in PROMPTS_FOLDER.glob("*.jsonl")):
        files = [folder / f"{language}.jsonl" for folder in (PROMPTS_FOLDER, UNKNOWN_FOLDER)]
        counts = clean(files, held_out_texts(language), calibration_texts(language))
        for file, (left, removed) in zip(files, counts, strict=True):
            click.echo(f"{file.parent.name}/{file.name}: {left} kept, {removed} removed")


if __name__ == "__main__":
    main()
