"""Packs conversations into rows of tokens.

All conversations begin with the same tokens (the template's system prompt), which are more than
half of the work for short conversations. A row therefore holds these tokens once, followed by many
conversations. Each conversation attends only to the beginning and to itself, and its positions
count as if it were alone. The model thus computes the same values as without the others, and no
token is padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router_models.experts.training_texts import Example


@dataclass(frozen=True, slots=True)
class Conversation:
    """A tokenised example. The answer's last token is the end of turn."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    answer_bytes: int
    group: str

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True, slots=True)
class Row:
    """Several conversations packed into one sequence.

    `predictors[i]` is the position whose output predicts `targets[i]`, and
    `owners[i]` the index in `conversations` that this token belongs to.
    """

    conversations: tuple[Conversation, ...]
    token_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    segments: NDArray[np.int64]
    predictors: NDArray[np.int64]
    targets: NDArray[np.int64]
    owners: NDArray[np.int64]

    def may_attend(self) -> NDArray[np.bool_]:
        """Return the mask [query, key], causal within a conversation and its beginning."""
        index = np.arange(len(self.token_ids))
        causal = index[None, :] <= index[:, None]
        visible = (self.segments[None, :] == 0) | (self.segments[None, :] == self.segments[:, None])
        allowed: NDArray[np.bool_] = causal & visible
        return allowed


def tokenize(examples: Iterable[Example], tokenizer: Any, *, max_tokens: int) -> list[Conversation]:
    """Tokenise through the chat template. Examples above `max_tokens` are left out."""
    found = []
    for example in examples:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": example.prompt}],
            add_generation_prompt=True,
            tokenize=False,
        )
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer_ids = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        if len(prompt_ids) + len(answer_ids) + 1 <= max_tokens:
            found.append(
                Conversation(
                    prompt_ids=tuple(prompt_ids),
                    answer_ids=(*answer_ids, tokenizer.eos_token_id),
                    answer_bytes=len(example.answer.encode()),
                    group=example.group,
                )
            )
    return found


def shared_beginning(conversations: Sequence[Conversation]) -> tuple[int, ...]:
    """Return the tokens with which every prompt begins."""
    if not conversations:
        return ()
    lowest = min(conversation.prompt_ids for conversation in conversations)
    highest = max(conversation.prompt_ids for conversation in conversations)
    length = 0
    while length < min(len(lowest), len(highest)) and lowest[length] == highest[length]:
        length += 1
    # Each prompt keeps at least one token of its own, which predicts the answer's first token.
    shortest = min(len(conversation.prompt_ids) for conversation in conversations)
    return lowest[: min(length, shortest - 1)]


def pack(
    conversations: Iterable[Conversation], beginning: tuple[int, ...], *, row_tokens: int
) -> Iterator[Row]:
    """Fill rows in the given order. A row is closed when the next conversation would not fit."""
    waiting: list[Conversation] = []
    used = len(beginning)
    for conversation in conversations:
        own = len(conversation) - len(beginning)
        if waiting and used + own > row_tokens:
            yield make_row(waiting, beginning)
            waiting, used = [], len(beginning)
        waiting.append(conversation)
        used += own
    if waiting:
        yield make_row(waiting, beginning)


def make_row(conversations: Sequence[Conversation], beginning: tuple[int, ...]) -> Row:
    shared = len(beginning)
    token_ids: list[int] = list(beginning)
    positions = list(range(shared))
    segments = [0] * shared
    predictors: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    for index, conversation in enumerate(conversations):
        if conversation.prompt_ids[:shared] != beginning:
            raise ValueError("a conversation does not begin with the shared tokens")
        # The end of turn is predicted and predicts nothing.
        own = conversation.prompt_ids[shared:] + conversation.answer_ids[:-1]
        first = len(token_ids) + len(conversation.prompt_ids) - shared - 1
        predictors += range(first, first + len(conversation.answer_ids))
        targets += conversation.answer_ids
        owners += [index] * len(conversation.answer_ids)
        positions += range(shared, shared + len(own))
        segments += [index + 1] * len(own)
        token_ids += own
    return Row(
        conversations=tuple(conversations),
        token_ids=np.array(token_ids, dtype=np.int64),
        positions=np.array(positions, dtype=np.int64),
        segments=np.array(segments, dtype=np.int64),
        predictors=np.array(predictors, dtype=np.int64),
        targets=np.array(targets, dtype=np.int64),
        owners=np.array(owners, dtype=np.int64),
    )
