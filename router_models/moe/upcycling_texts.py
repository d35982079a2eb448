"""The texts of a field: some for learning, and some held out for evaluation.

The sources, in this order:

- `DIR/<field>.jsonl` or `.jsonl.gz`: rows of `prompt` and, if there is one, `answer`.
  One row in five is held out, by a hash of its prompt.
- the demo's fields `math`, `intents`, `code`: what its experts learned from, with the
  same rows held out (`router_models.experts.training_texts`); the first two need their files in
  DIR.
- the demo's fields once more, and `general`: our own prompts, without answers. One
  template in five is held out.

A row without an answer is for the field's own expert to answer.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from router_models.demo.prompt_templates import template_count, templated
from router_models.experts import training_texts
from router_models.experts.training_texts import Example
from service.errors import ArtifactError

GENERAL = "general"
"""The field of what no expert is for: the base's own."""
DEMO_FIELDS = (GENERAL, *training_texts.EXPERTS)
_PROMPTS = 1200
_SEED = 0  # with this one the demo's experts were trained: it decides what is held out


class NoTextsError(ArtifactError):
    """A field has no texts, or they can't be read."""

    code = "no_texts"


@dataclass(frozen=True, slots=True)
class Field:
    """The texts of one field, with their facts for the model card."""

    name: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    source: str
    licence: str


def read(name: str, folder: Path | None) -> Field:
    """Read the texts of field `name`. `folder` may hold files of texts.

    Raises:
        NoTextsError: There are no texts.
    """
    if folder is not None:
        for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
            if path.is_file():
                return _from_file(name, path)
    if name in training_texts.EXPERTS and (name == "code" or folder is not None):
        try:
            split = training_texts.load(name, folder or Path(), seed=_SEED)
            return Field(name, split.train, split.held_out, split.source, split.licence)
        except FileNotFoundError:
            pass
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise NoTextsError(f"texts of {name}: can't be read in {folder}: {error}") from error
    if name in DEMO_FIELDS:
        return own_prompts(name)
    where = f"in {folder}" if folder is not None else "(and no folder of texts is given)"
    raise NoTextsError(
        f"no texts for {name!r}: there is no {name}.jsonl {where}; "
        'it holds one {"prompt": …, "answer": …} a line'
    )


def own_prompts(name: str) -> Field:
    """Generate prompts without answers for a demo field from the project's templates."""
    templates = template_count(name)
    # The first prompt of a text is kept: its template is the group it is held out with.
    prompts: dict[str, str] = {}
    for index, text in enumerate(templated(name, _PROMPTS, _SEED)):
        prompts.setdefault(text, f"{name}/{index % templates}")
    rows = [Example(text, "", template) for text, template in prompts.items()]
    random.Random(_SEED).shuffle(rows)
    source = "prompts from this project's templates, answered by the expert itself"
    return _split(name, rows, source, "Apache-2.0")


def answered(field: Field, answer: Callable[[list[str]], list[str]], count: int) -> Field:
    """Return the field with at most `count` rows on either side. `answer` fills missing answers."""
    sides = []
    for rows in (field.train[:count], field.held_out[:count]):
        prompts = [row.prompt for row in rows if not row.answer]
        answers = iter(answer(prompts) if prompts else [])
        filled = (
            row if row.answer else Example(row.prompt, next(answers), row.group) for row in rows
        )
        sides.append(tuple(row for row in filled if row.answer))
    return Field(field.name, sides[0], sides[1], field.source, field.licence)


def _from_file(name: str, path: Path) -> Field:
    rows = []
    try:
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()
        for number, line in enumerate(lines, 1):
            if line.strip():
                rows.append(_row(json.loads(line), f"{path}, line {number}"))
    except (OSError, EOFError, ValueError) as error:
        raise NoTextsError(f"texts of {name}: {path} can't be read: {error}") from error
    field = _split(name, rows, f"the user's own file {path.name}", "as its owner says")
    if not field.train or not field.held_out:
        raise NoTextsError(
            f"texts of {name}: {path} has {len(field.train)} rows to learn from and "
            f"{len(field.held_out)} to be held out; a few hundred are wanted"
        )
    return field


def _row(row: object, where: str) -> Example:
    prompt = row.get("prompt") if isinstance(row, dict) else None
    answer = row.get("answer", "") if isinstance(row, dict) else None
    if not isinstance(prompt, str) or not prompt or not isinstance(answer, str):
        raise NoTextsError(f'{where}: expected {{"prompt": "…", "answer": "…"}}')
    return Example(prompt, answer, prompt)


def _split(name: str, rows: Iterable[Example], source: str, licence: str) -> Field:
    train: list[Example] = []
    held_out: list[Example] = []
    for row in rows:
        digest = hashlib.sha256(row.group.encode()).digest()
        (held_out if digest[0] % 5 == 0 else train).append(row)
    return Field(name, tuple(train), tuple(held_out), source, licence)
