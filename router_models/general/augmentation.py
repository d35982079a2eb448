"""Other forms of the prompts to fit: polite, mistyped, ended otherwise; and scraps.

The polite words are others than those that `perturbations.py` judges with.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_ENDINGS = ".?!。？！ "
_CHARS_PER_TYPO, _MOST_TYPOS = 50, 4
_BEFORE = {
    "ar": ("مرحبا، ", "سؤال: ", "صباح الخير. "),
    "de": ("Guten Tag, ", "Hi, ", "Kurze Frage: ", "Sei so nett: ", "Guten Morgen! "),
    "en": ("Hello, ", "Hey! ", "Quick question: ", "Would you be so kind: ", "Good morning. "),
    "es": ("Buenas, ", "Una pregunta: ", "Buenos días. ", "Sería tan amable: "),
    "fr": ("Salut, ", "Une petite question : ", "Bonsoir, ", "Auriez-vous la gentillesse : "),
    "hi": ("नमस्ते, ", "एक सवाल: ", "सुप्रभात। "),
    "it": ("Salve, ", "Una domanda: ", "Buongiorno. ", "Saresti così gentile: "),
    "ja": ("すみません、", "質問です。", "おはようございます。"),
    "nl": ("Hoi, ", "Even een vraag: ", "Goedemorgen. "),
    "pl": ("Cześć, ", "Mam pytanie: ", "Dzień dobry. "),
    "pt": ("Oi, ", "Uma pergunta: ", "Bom dia. ", "Por gentileza: "),
    "ru": ("Привет, ", "Вопрос: ", "Добрый день. "),
    "zh": ("您好，", "请问：", "早上好。", "想问一下，"),
}
_AFTER = {
    "ar": (" شكرا", " من فضلك"),
    "de": (" Besten Dank!", " danke dir", " LG", " Ich danke dir."),
    "en": (" thx", " cheers", " Many thanks.", " pls", " if you don't mind", " Appreciate it!"),
    "es": (" Mil gracias.", " porfa", " Te lo agradezco", " Saludos"),
    "fr": (" Merci bien", " stp", " Mille mercis.", " Cordialement"),
    "hi": (" धन्यवाद", " कृपया"),
    "it": (" Ti ringrazio.", " perfavore", " Grazie mille", " Saluti"),
    "ja": ("ありがとう", "助かります。", "よろしく"),
    "nl": (" Bedankt!", " alvast dank"),
    "pl": (" Dzięki!", " z góry dziękuję"),
    "pt": (" Valeu!", " Agradeço.", " pfv", " Abraços"),
    "ru": (" Спасибо!", " заранее благодарен"),
    "zh": ("，多谢", "。感谢！", "，辛苦了"),
}
LANGUAGES = frozenset(_BEFORE)
"""The languages that have polite words."""

_SIGNS = ("?", "!", ".", "...", "??", "-", ":)", "#", "*", "()", "🙂", "👍", "🐟🐟")
_MEDIA = ("[image]", "[picture]", "[audio]", "(sound)", "scan.pdf", "DSC_0113.png", "00:12", "<p>")


def augment(text: str, language: str, draw: random.Random) -> str:
    """Return another form of a prompt: mistyped, polite, both, or ended otherwise.

    Args:
        text: The prompt.
        language: Its ISO 639-1 code; in an unknown language nothing polite is added.
        draw: Chooses the form.
    """
    kind = draw.choice(("typo", "typo", "polite", "polite", "ending", "both", "both"))
    if kind in ("polite", "both") and language in LANGUAGES:
        text = _polite(text, language, draw)
    if kind in ("typo", "both"):
        text = _mistyped(text, draw)
    if kind == "ending":
        bare = text.rstrip(_ENDINGS)
        other = draw.choice((".", "?", "!", " ...", "?!"))
        text = bare if bare and bare != text else text + other
    return text


def scraps(prompts: Sequence[str], count: int, draw: random.Random) -> list[str]:
    """Return texts that ask for nothing: single words, mashed keys, signs, names of files.

    Args:
        prompts: The words are theirs, and no scrap is one of them.
        count: How many texts; all are distinct.
        draw: Chooses them.
    """
    taken = {prompt.casefold() for prompt in prompts}
    found: dict[str, None] = dict.fromkeys((*_SIGNS, *_MEDIA))
    while len(found) < count:
        kind = draw.random()
        if kind < 0.25:
            text = " ".join(_mash(draw) for _ in range(draw.randint(1, 3)))
        elif kind < 0.35:
            text = " ".join(str(draw.randint(0, 999)) for _ in range(draw.randint(1, 3)))
        else:
            words = [draw.choice(draw.choice(prompts).split()) for _ in range(draw.randint(1, 3))]
            text = " ".join(word.strip("\"'.,;:?!()[]{}") or word for word in words)
            # In Chinese and Japanese a prompt is one word.
            text = text[:12]
        if text.strip() and text.strip().casefold() not in taken:
            found.setdefault(text.strip())
    return list(found)[:count]


def _mash(draw: random.Random) -> str:
    row = draw.choice(_ROWS)
    return "".join(draw.choice(row) for _ in range(draw.randint(3, 8)))


def _polite(text: str, language: str, draw: random.Random) -> str:
    where = draw.random()
    before = draw.choice(_BEFORE[language]) if where < 0.55 else ""
    after = draw.choice(_AFTER[language]) if where >= 0.45 else ""
    return before + text + after


def _mistyped(text: str, draw: random.Random) -> str:
    """Drop, double, swap or miss a few letters within words of an alphabet."""
    places = [i for i in range(1, len(text)) if _is_letter(text[i]) and _is_letter(text[i - 1])]
    letters = list(text)
    count = min(len(places), _MOST_TYPOS, 1 + len(text) // _CHARS_PER_TYPO)
    for at in draw.sample(places, count):
        letter, kind = letters[at], draw.random()
        if kind < 0.3:
            letters[at] = ""
        elif kind < 0.5:
            letters[at] = letter * 2
        elif kind < 0.75:
            letters[at - 1], letters[at] = letter, letters[at - 1]
        else:
            letters[at] = _neighbour(letter, draw)
    return "".join(letters)


def _is_letter(char: str) -> bool:
    return char.isalpha() and char.lower() != char.upper()


def _neighbour(letter: str, draw: random.Random) -> str:
    for row in _ROWS:
        if letter and (at := row.find(letter.lower())) >= 0:
            return draw.choice(row[max(0, at - 1) : at] + row[at + 1 : at + 2])
    return letter
