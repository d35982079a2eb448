"""The held-out prompts in `test/`: written independently of those that the router is fitted on."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

FOLDER = Path(__file__).with_name("test")
SAME_TEAM = FOLDER / "same-team"
"""Prompts in further languages, by the team that also wrote prompts of the fit."""

# These files hold no category each.
_FIELDS, _PERTURBED = "fields.jsonl", "perturbed.jsonl"


class HeldOutError(ValueError):
    """The held-out prompts are missing or not well formed."""


@dataclass(frozen=True)
class HeldOutPrompt:
    """One prompt with its right answer.

    Attributes:
        id: Unique in the folder.
        prompt: The text, as a person would type it.
        category: The right category, the fallback, or one of MMLU-Pro's fields.
        language: Its ISO 639-1 code.
    """

    id: str
    prompt: str
    category: str
    language: str


@dataclass(frozen=True)
class Paraphrase:
    """A hand-written paraphrase.

    Attributes:
        of: The id of the held-out prompt that it says in other words.
        prompt: The other words.
    """

    of: str
    prompt: str


_Row = TypeVar("_Row", HeldOutPrompt, Paraphrase)


def held_out_prompts(folder: Path = FOLDER) -> list[HeldOutPrompt]:
    """Return the prompts of all categories, and those that belong to none.

    Raises:
        HeldOutError: The folder has no prompts, or a line is malformed.
    """
    files = sorted(set(folder.glob("*.jsonl")) - {folder / _FIELDS, folder / _PERTURBED})
    if not files:
        raise HeldOutError(f"{folder} has no held-out prompts; the sources have them, wheels don't")
    return [prompt for file in files for prompt in _read(file, HeldOutPrompt)]


def same_team_prompts(folder: Path = SAME_TEAM) -> list[HeldOutPrompt]:
    """Return the held-out prompts in Dutch, Polish, Russian, Arabic and Hindi.

    Raises:
        HeldOutError: The folder has no prompts, or a line is malformed.
    """
    return held_out_prompts(folder)


def field_prompts(folder: Path = FOLDER) -> list[HeldOutPrompt]:
    """Return the questions in MMLU-Pro's 14 fields.

    Raises:
        HeldOutError: The file is missing, or a line is malformed.
    """
    return _read(folder / _FIELDS, HeldOutPrompt)


def paraphrases(folder: Path = FOLDER) -> list[Paraphrase]:
    """Return the hand-written paraphrases.

    Raises:
        HeldOutError: The file is missing, or a line is malformed.
    """
    return _read(folder / _PERTURBED, Paraphrase)


def _read(file: Path, row: type[_Row]) -> list[_Row]:
    keys = {field.name for field in fields(row)}
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise HeldOutError(f"{file}: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise HeldOutError(f"{file}:{number}: is no JSON: {error}") from None
        if (
            not isinstance(value, dict)
            or set(value) != keys
            or not all(isinstance(text, str) and text for text in value.values())
        ):
            raise HeldOutError(f"{file}:{number}: needs the texts {', '.join(sorted(keys))}")
        found.append(row(**value))
    return found
