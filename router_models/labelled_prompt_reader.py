"""Reads labelled prompts: JSON lines with `prompt`, `category` and perhaps `language`.

`lang` is the same as `language`.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_models.outcome_reader import OutcomeError


@dataclass(frozen=True, slots=True)
class LabelledPrompt:
    """A prompt, its category, and its language; the language is empty where the file has none."""

    prompt: str
    category: str
    language: str = ""


def prompt_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files of some paths; a folder stands for its `.jsonl` and `.jsonl.gz` files.

    Raises:
        OutcomeError: A path does not exist, or a folder has no such file.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted([*path.rglob("*.jsonl"), *path.rglob("*.jsonl.gz")])
            if not inside:
                raise OutcomeError(f"{path}: no .jsonl or .jsonl.gz file in it")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise OutcomeError(f"{path}: no such file")
    return found


def read_prompts(files: Sequence[Path]) -> tuple[list[LabelledPrompt], list[str]]:
    """Read every prompt once; a prompt that stands in two categories is an error.

    Returns:
        The prompts, and a line for each file with rows that have no category, which are left out.

    Raises:
        OutcomeError: A file can't be read, a line is malformed, or there is no prompt.
    """
    rows: dict[str, tuple[LabelledPrompt, str]] = {}
    skipped: list[str] = []
    for file in files:
        bare = 0
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            row = _row(line, where)
            if "category" not in row:
                bare += 1
                continue
            prompt, category = row.get("prompt"), row["category"]
            language = row.get("language", row.get("lang", ""))
            if not all(isinstance(v, str) for v in (prompt, category, language)) or not category:
                raise OutcomeError(
                    f"{where}: 'prompt', 'category' and 'language' must be texts, 'category' "
                    "not empty"
                )
            found = LabelledPrompt(str(prompt), category, language)
            before = rows.setdefault(found.prompt, (found, where))
            if before[0].category != category:
                raise OutcomeError(
                    f"{where}: the same prompt has category {before[0].category!r} in {before[1]}"
                )
        if bare:
            skipped.append(f"{file}: {bare} rows without a category are left out")
    if not rows:
        raise OutcomeError(f"no prompt with a category in {', '.join(map(str, files))}")
    return [row for row, _ in rows.values()], skipped


def fingerprints(files: Sequence[Path]) -> list[dict[str, str]]:
    """Name and SHA-256 of each file."""
    return [{"file": f.name, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files]


def _lines(file: Path) -> list[str]:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return raw.decode("utf-8").split("\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise OutcomeError(f"{file}: can't be read: {error}") from None


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise OutcomeError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise OutcomeError(f"{where}: a JSON object is needed")
    return row
