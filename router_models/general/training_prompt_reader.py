"""Reads and checks the prompts that teach the general router its categories.

The prompts stand in `prompts/<lang>.jsonl`, one row a line:
`{"prompt": "…", "category": "law", "lang": "en"}`. The texts in `unknown/` ask for nothing: their
category is the fallback.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from router_models.general.categories import general_categories

PROMPTS_FOLDER = Path(__file__).with_name("prompts")
UNKNOWN_FOLDER = Path(__file__).with_name("unknown")
CALIBRATION_FOLDER = Path(__file__).with_name("calibration")
_KEYS = ("prompt", "category", "lang")


class PromptsError(ValueError):
    """A file of prompts is not well formed; the message names file and line."""


@dataclass(frozen=True)
class TrainingPrompt:
    """A prompt, its category, and the language it is written in (ISO 639-1)."""

    prompt: str
    category: str
    lang: str


def normalised_text(prompt: str) -> str:
    """Return the text by which two prompts count as the same.

    Case, width of letters, white space and the punctuation at the end make no
    difference. Signs inside the text do: `17 * 23` and `17 / 23` are two prompts. A text
    of signs alone keeps them.
    """
    text = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    return text.rstrip(" .?!。؟।") or text


def read_unknown(folder: Path = UNKNOWN_FOLDER) -> tuple[TrainingPrompt, ...]:
    """Read the texts that ask for nothing; the errors are those of `read_training_prompts`."""
    return read_training_prompts(folder, allowed=(general_categories().fallback,))


def read_training_prompts(
    folder: Path = PROMPTS_FOLDER, allowed: tuple[str, ...] | None = None
) -> tuple[TrainingPrompt, ...]:
    """Read all `*.jsonl` files of a folder, ordered by language.

    Args:
        folder: Where the files are; a file is named after its language.
        allowed: The categories that are allowed; those that ship by default.

    Raises:
        PromptsError: The folder has no prompts; a row is not a JSON object with
            `prompt`, `category` and `lang`; a prompt is empty; a category is
            unknown; a language is not that of the file; or a text stands twice.
    """
    allowed = allowed or general_categories().names
    paths = sorted(folder.glob("*.jsonl"))
    prompts: list[TrainingPrompt] = []
    seen: dict[str, tuple[str, str]] = {}
    for path in paths:
        for place, row in _rows(path):
            prompt = _labelled(place, row, path.stem, allowed)
            key = normalised_text(prompt.prompt)
            if key in seen:
                other_place, category = seen[key]
                raise PromptsError(
                    f"{place}: the prompt {prompt.prompt!r} of {prompt.category!r} stands "
                    f"already in {other_place}, as {category!r}"
                )
            seen[key] = (place, prompt.category)
            prompts.append(prompt)
    if not prompts:
        raise PromptsError(f"{folder}: there are no prompts in *.jsonl files")
    return tuple(prompts)


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield each row of a file with its place, `file:line`."""
    # `splitlines` would also split at separators that may stand inside a JSON string.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        place = f"{path}:{number}"
        if line.strip():
            try:
                yield place, json.loads(line)
            except ValueError as error:  # UnicodeDecodeError is one
                raise PromptsError(f"{place}: not a line of JSON in UTF-8: {error}") from None


def _labelled(place: str, row: object, lang: str, allowed: tuple[str, ...]) -> TrainingPrompt:
    if not isinstance(row, dict) or set(row) != set(_KEYS):
        raise PromptsError(f"{place}: a row must have the keys {', '.join(_KEYS)} and no others")
    for key in _KEYS:
        if not isinstance(row[key], str) or not row[key].strip():
            raise PromptsError(f"{place}: {key!r} must be a text that is not empty")
    if row["category"] not in allowed:
        raise PromptsError(
            f"{place}: unknown category {row['category']!r}; allowed are {', '.join(allowed)}"
        )
    if row["lang"] != lang:
        raise PromptsError(f"{place}: 'lang' is {row['lang']!r}, but the file is for {lang!r}")
    return TrainingPrompt(row["prompt"], row["category"], row["lang"])
