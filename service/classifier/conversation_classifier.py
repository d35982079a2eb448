"""Classifies a conversation by its last user turn, with earlier turns as context. Pure.

`user_turns` extracts the user's texts from a body of OpenAI chat, completions or Responses, or of
Anthropic messages. `classify_turns` classifies them as one conversation. The weight of the last
turn depends on its content. "ok, go on" has no content, so the earlier turns decide. A full request
decides alone. "and for 20 instead?" is in between.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.classifier.classifier import GENERAL, Assessment, Reading, TextClassifier
from service.classifier.linear_heads import Vector
from service.types import CategoryScores

MAX_TURNS = 6
"""User turns looked at, counted from the last."""

EARLIER_EDGE_CHARS = 500
"""Characters of an earlier turn looked at, from either end: time stays bounded."""

# A turn with h content words has the weight h / (h + half). The turns before it share the rest. The
# constant is greater for a turn that refers back ("and now add type hints to it").
_HALF_WORDS = 0.4
_HALF_WORDS_POINTING = 2.0
_POINTING = re.compile(
    r"^\W*(?:(?:ok|okay|no|yes|great|thanks)\W+)?"
    r"(?:and|but|also|now|then|or|what if|what about|how about|in|with|without|use)\b"
    r"|\b(?:it|its|them|those|instead|same|above|previous)\b",
    re.IGNORECASE,
)
_NEGLIGIBLE = 0.02
# A category is never wholly impossible.
_LEAST = 1e-6
# The later stage of two names the whole.
_STAGES = ("encoder", "static", "ngrams")
_MAX_COUNTED_WORDS = 200
_MAX_PARTS = 10_000

# Words that only steer a conversation or refer back. They do not indicate a category.
_STEERING_TEXT = """
    a about above add again alright all already also am an and another any anything are as ask at
    be because been before below better bit both bro but by bye can change clear continue
    cool correct could details detail did different do does doing done dont else elaborate
    everything example examples exactly expand explain false few fine first following for from
    further give go going good got great ha haha hang have he hello hey hi him his hmm how i id
    idea if im in incorrect instead interesting into is isnt it its just keep last less let lets
    like little lol long longer look lot made make makes maybe me mean more much my need never new
    next nice no nope not now of ok okay oh on one ones only or other our out over part perfect
    please previous pls proceed question put really repeat reply response rest result
    right said same say second see seems sense shall she short shorten shorter should show simple
    simpler simply simplify so some something sorry sounds start stay step steps still stop such sum
    summarize summarise sure tell than thank thanks that thats the their them then there these
    they thing things think third this those thx to too true try two uh um understand up us use
    very wait want was way we well were what whats when where which who why will with without wont
    would wow wrong ya yeah yep yes yet you your yours yup k y answer answers
"""
_STEERING = frozenset(_STEERING_TEXT.split())
_WORD = re.compile(r"[^\W_]+")
_APOSTROPHES = str.maketrans("", "", "'’`")


def content_words(text: str) -> int:
    """Count the content words of a text, up to 200.

    A long word of a script without spaces counts as one word for every two letters.
    """
    head = text[:4000].translate(_APOSTROPHES).lower()
    count = 0
    for found in _WORD.finditer(head):
        word = found.group()
        if word in _STEERING:
            continue
        count += 1 if word.isascii() or len(word) <= 12 else len(word) // 2
        if count >= _MAX_COUNTED_WORDS:
            break
    return min(count, _MAX_COUNTED_WORDS)


def classify_turns(classifier: TextClassifier, turns: Sequence[str]) -> CategoryScores:
    """Compute the category scores of a conversation, see `assess_turns`."""
    return assess_turns(classifier, turns).scores


def assess_turns(
    classifier: TextClassifier,
    turns: Sequence[str],
    vectors: Mapping[str, Vector] | None = None,
    earlier: Mapping[str, Reading] | None = None,
) -> Assessment:
    """Compute posterior and factors of a conversation's last user turn in its context.

    A turn with too much novelty counts as `general`, if the classifier has this label.

    Args:
        classifier: The classifier.
        turns: The user's texts, oldest first. Without turns, the empty text is assessed.
        vectors: The encoder's vectors of some of the turns.
        earlier: The readings of turns by the same stages without the encoder, if they are known.
    """
    last = turns[-MAX_TURNS:] or [""]
    known, read = vectors or {}, earlier or {}
    readings: dict[str, Reading] = {}
    labels = len(classifier.labels)
    combined = np.zeros(0)
    novelty, left = 0.0, 1.0
    stages: set[str] = set()
    last_turn = np.ones(labels)
    # The loop goes back from the last turn, until the weight left for earlier turns is negligible.
    for age, text in enumerate(reversed(last)):
        oldest = age == len(last) - 1
        words = 0 if oldest else content_words(text)
        if words == 0 and not oldest:
            continue
        seen = text if age == 0 else _edges(text)
        found = readings[seen] = classifier.read(seen, known.get(text), read.get(seen))
        posterior = found.posterior
        alone = len(last) == 1
        if not alone and found.novelty > classifier.max_novelty and GENERAL in classifier.labels:
            posterior = np.zeros(labels)
            posterior[classifier.labels.index(GENERAL)] = 1.0
        half = _HALF_WORDS_POINTING if _POINTING.search(text[:200]) else _HALF_WORDS
        if age == 0:
            weight = 1.0 if oldest else words / (words + half)
            last_turn = np.maximum(posterior, _LEAST) ** weight
        # A turn that fits any category ("what about the second one?") gets less weight.
        share = left if oldest else left * words / (words + half) * _certainty(posterior) ** 0.5
        turn = share * np.concatenate((posterior, found.factors))
        combined = combined + turn if len(combined) else turn
        novelty += share * found.novelty
        left -= share
        stages.add(found.stage)
        if left < _NEGLIGIBLE:
            break
    total = 1.0 - left if left > 0 else 1.0
    combined /= total
    posterior = combined[:labels] / combined[:labels].sum()
    stage = next(name for name in _STAGES if name in stages)
    scores = classifier.decide(posterior, min(novelty / total, 1.0), stage)
    return Assessment(scores, combined[labels:], last_turn, readings)


def deciding_turn(turns: Sequence[str]) -> str:
    """The user's text whose meaning matters most: the last one with content, else the last one."""
    last = turns[-MAX_TURNS:]
    return next((text for text in reversed(last) if content_words(text)), last[-1] if last else "")


def user_turns(body: Mapping[str, Any]) -> list[str]:
    """Extract the user's texts from a request body, oldest first.

    It reads `messages` (OpenAI chat, Anthropic), `prompt` (completions), `input` (Responses,
    embeddings, classes), `query` (ranks) and `text_1` (scores). It skips token ids and other parts
    without text. Without a text of the user, it returns the system's text, if there is any. A
    malformed body raises no error here.
    """
    messages = body.get("messages")
    if isinstance(messages, list):
        return _from_messages(messages)
    prompt = body.get("prompt")
    if prompt is not None:
        return _joined(prompt)
    for name in ("query", "text_1"):
        if (text := body.get(name)) is not None:
            return _joined(text)
    given = body.get("input")
    if isinstance(given, list) and any(isinstance(item, Mapping) for item in given):
        return _from_messages(given) or _texts(body.get("instructions"))
    return _joined(given) or _texts(body.get("instructions"))


def _from_messages(messages: list[Any]) -> list[str]:
    user_texts: list[str] = []
    system: list[str] = []
    for message in messages:
        if isinstance(message, str):
            user_texts.append(message)
            continue
        if not isinstance(message, Mapping):
            continue
        role = message.get("role", "user" if "content" in message else None)
        if role not in ("user", "system", "developer"):
            continue
        text = "\n".join(_texts(message.get("content")))
        if text.strip():
            (user_texts if role == "user" else system).append(text)
    return user_texts or system[-1:]


def _joined(value: Any) -> list[str]:
    text = "\n".join(_texts(value))
    return [text] if text.strip() else []


def _texts(content: Any) -> list[str]:
    """The texts of a content, which is a string or a list of strings and parts with `text`."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    return list(_part_texts(content[:_MAX_PARTS]))


def _part_texts(parts: Iterable[Any]) -> Iterable[str]:
    for part in parts:
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text"):
            text = part.get("text")
            if isinstance(text, str):
                yield text


def _edges(text: str) -> str:
    if len(text) <= 2 * EARLIER_EDGE_CHARS:
        return text
    return f"{text[:EARLIER_EDGE_CHARS]}\n{text[-EARLIER_EDGE_CHARS:]}"


def _certainty(posterior: NDArray[np.float64]) -> float:
    """Certainty of a posterior, 1 - entropy / ln(labels): 1 for a sure one, 0 for a flat one."""
    if len(posterior) < 2:
        return 1.0
    positive = posterior[posterior > 0]
    entropy = -float(positive @ np.log(positive))
    return max(0.0, 1.0 - entropy / float(np.log(len(posterior))))
