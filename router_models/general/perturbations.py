"""Perturbs prompts without changing what they ask, to measure how often a router flips.

A flip is a perturbed prompt that gets another expert than its original.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router_models.general.held_out_prompts import HeldOutPrompt, Paraphrase

PARAPHRASE = "paraphrase"
# One mistyped letter in so many characters, and at most so many in a prompt.
_CHARS_PER_TYPO, _MOST_TYPOS = 40, 4
# Words of fewer letters keep their spelling: one letter can make another word of them.
_SHORTEST_MISTYPED = 4
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_ENDINGS = ".?!。？！"
_TRAILING = (" ", "  ", "\n", " \n", "\t")
_BEFORE = {
    "de": ("Bitte hilf mir: ", "Hallo! ", "Könntest du mir bitte helfen? "),
    "en": ("Please help me with this: ", "Hi! ", "Could you help me, please? "),
    "es": ("Por favor, ayúdame con esto: ", "¡Hola! ", "¿Me ayudas, por favor? "),
    "fr": ("Aide-moi s'il te plaît : ", "Bonjour ! ", "Peux-tu m'aider, s'il te plaît ? "),
    "it": ("Aiutami per favore: ", "Ciao! ", "Mi aiuti, per favore? "),
    "ja": ("お願いします。", "こんにちは。", "教えてください。"),
    "pt": ("Me ajude, por favor: ", "Olá! ", "Você pode me ajudar, por favor? "),
    "zh": ("请帮帮我：", "你好！", "麻烦你，"),
}
_AFTER = {
    "de": (" Danke!", " Vielen Dank im Voraus", " bitte"),
    "en": (" Thanks!", " Thank you in advance", " please"),
    "es": (" ¡Gracias!", " Muchas gracias de antemano", " por favor"),
    "fr": (" Merci !", " Merci d'avance", " s'il te plaît"),
    "it": (" Grazie!", " Grazie in anticipo", " per favore"),
    "ja": ("よろしくお願いします。", "ありがとうございます。", "お願いします"),
    "pt": (" Obrigado!", " Muito obrigado desde já", " por favor"),
    "zh": ("谢谢！", "非常感谢", "拜托了"),
}


@dataclass(frozen=True)
class Pair:
    """A held-out prompt and another form of it.

    Attributes:
        original: The prompt.
        kind: One of `KINDS`, or `PARAPHRASE`.
        prompt: The other form.
    """

    original: HeldOutPrompt
    kind: str
    prompt: str


def perturb(text: str, kind: str, language: str, seed: int) -> str | None:
    """Return another form of a text, or None where this kind has none for it.

    Args:
        text: The prompt.
        kind: One of `KINDS`.
        language: The prompt's ISO 639-1 code; polite words are in this language.
        seed: The same seed, text and kind give the same form.

    Raises:
        ValueError: The kind is unknown, or there are no polite words in the language.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; known: {', '.join(KINDS)}")
    if language not in _BEFORE:
        raise ValueError(f"no polite words in {language!r}; known: {', '.join(_BEFORE)}")
    form = KINDS[kind](text, language, random.Random(f"{seed}/{kind}/{text}"))
    return None if form == text else form


def perturbed_pairs(
    prompts: Sequence[HeldOutPrompt], paraphrases: Sequence[Paraphrase], seed: int
) -> list[Pair]:
    """Pair each paraphrased prompt with its paraphrase and with one form of each kind.

    Raises:
        ValueError: A paraphrase is of an unknown prompt.
    """
    by_id = {prompt.id: prompt for prompt in prompts}
    found = []
    for paraphrase in paraphrases:
        if (original := by_id.get(paraphrase.of)) is None:
            raise ValueError(f"a paraphrase is of {paraphrase.of!r}, which is no held-out prompt")
        found.append(Pair(original, PARAPHRASE, paraphrase.prompt))
        for kind in KINDS:
            form = perturb(original.prompt, kind, original.language, seed)
            if form is not None:
                found.append(Pair(original, kind, form))
    return found


def _mistype(text: str, _: str, draw: random.Random) -> str:
    places = _mistypable(text)
    count = min(_MOST_TYPOS, 1 + len(text) // _CHARS_PER_TYPO, len(places))
    letters = list(text)
    for at in draw.sample(places, count):
        letters[at] = _wrong(text, at, draw)
    return "".join(letters)


def _mistypable(text: str) -> list[int]:
    """Where a letter can be mistyped: within a longer word, not at its beginning."""
    found: list[int] = []
    start = 0
    for at in range(len(text) + 1):
        if at == len(text) or not _is_letter(text[at]):
            if at - start >= _SHORTEST_MISTYPED:
                found += range(start + 1, at)
            start = at + 1
    return found


def _is_letter(char: str) -> bool:
    """Whether a character is a letter of an alphabet that is typed letter by letter."""
    return char.isalpha() and char.lower() != char.upper()


def _wrong(text: str, at: int, draw: random.Random) -> str:
    """What is typed in place of one letter: nothing, the letter twice, or a key beside it."""
    letter = text[at]
    beside = [
        row[i]
        for row in _ROWS
        if (place := row.find(letter.lower())) >= 0
        for i in (place - 1, place + 1)
        if 0 <= i < len(row)
    ]
    return draw.choice(["", letter * 2, *beside])


def _recase(text: str, _: str, draw: random.Random) -> str:
    if text == text.lower():
        return text.upper()
    # Most people who change the case write all in lower case.
    return text.upper() if draw.random() < 0.25 else text.lower()


def _pad(text: str, _: str, draw: random.Random) -> str:
    form = text + draw.choice(_TRAILING)
    return form.replace(" ", "  ", 1) if draw.random() < 0.3 else form


def _soften(text: str, language: str, draw: random.Random) -> str:
    if draw.random() < 0.5:
        return draw.choice(_BEFORE[language]) + text
    return text + draw.choice(_AFTER[language])


def _end_otherwise(text: str, _: str, draw: random.Random) -> str:
    bare = text.rstrip(_ENDINGS)
    if bare and bare != text:
        return bare
    return text + draw.choice((".", "?", "!", "...", "??"))


KINDS: dict[str, Callable[[str, str, random.Random], str]] = {
    "typo": _mistype,
    "case": _recase,
    "space": _pad,
    "politeness": _soften,
    "ending": _end_otherwise,
}
