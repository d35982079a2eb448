"""Reads and tokenises the texts from which a profile is learned and on which it is evaluated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router_models.experts.conversation_packing import tokenize
from router_models.experts.training_texts import Example
from service.errors import ArtifactError


class ProfileError(ArtifactError):
    """A profile can't be learned: of no model, from no prompts, into no file."""

    code = "no_profile"


@dataclass(frozen=True, slots=True)
class Text:
    """A text as tokens. The first `given` are not judged; `size` is the rest's UTF-8 bytes."""

    ids: tuple[int, ...]
    given: int
    size: int


def read_texts(path: Path) -> list[Example]:
    """The different texts of a file, in its order; an answer is empty where there is none.

    One text a line, or JSON lines with "text", or with "prompt" and, if there is one, "answer".
    Raises ProfileError.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: can't be read: {error}") from None
    found: dict[tuple[str, str], Example] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompt, answer = _text_of(line.strip(), f"{path}, line {number}")
            found.setdefault((prompt, answer), Example(prompt, answer, f"{number}"))
    if not found:
        raise ProfileError(f"{path}: no prompts in it")
    return list(found.values())


def tokenized(examples: Sequence[Example], tokenizer: Any, max_tokens: int) -> list[Text]:
    """Tokenise examples as the model sees them.

    A prompt with its answer goes through the chat template, and the answer is evaluated. Other
    text follows the token that begins texts.
    """
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    texts = []
    for example in examples:
        if example.answer and tokenizer.chat_template:
            for talk in tokenize([example], tokenizer, max_tokens=max_tokens):
                ids = talk.prompt_ids + talk.answer_ids[:-1]
                texts.append(Text(ids, len(talk.prompt_ids), talk.answer_bytes))
            continue
        words = f"{example.prompt}\n{example.answer}" if example.answer else example.prompt
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        cut = ids[: max_tokens - 1]
        shown = words if len(cut) == len(ids) else tokenizer.decode(cut)
        if cut:
            texts.append(Text((first, *cut), 1, len(shown.encode())))
    if len(texts) < min(2, len(examples)):
        raise ProfileError(f"all but {len(texts)} texts are longer than {max_tokens} tokens")
    return texts


def _text_of(line: str, where: str) -> tuple[str, str]:
    if not line.startswith("{"):
        return line, ""
    try:
        row = json.loads(line)
    except ValueError:
        return line, ""  # prose may begin with a brace
    prompt = row.get("text", row.get("prompt"))
    answer = row.get("answer", "")
    if not isinstance(prompt, str) or not prompt.strip() or not isinstance(answer, str):
        raise ProfileError(f'{where}: expected a "text", or a "prompt" (and an "answer")')
    return prompt, answer
