r"""Decides whether answers agree. Extracts the final answer of each text for it. Pure.

In doubt, the module treats answers as different. A missed agreement costs one more call; a
wrong agreement gives the client a wrong answer. A final answer therefore keeps its signs,
operators, units, case and words. Only spellings that can't have different meanings become equal:
white space, emphasis, LaTeX's delimiters, the full stop at the end, thousands separators, `5.0` and
`5`, `1/2` and `0.5`, `(B)` and `B`, `Yes` and `yes`, and different forms of the same JSON value.

A text states its final answer on a last line `#### 72`, in `\boxed{}`, after "the answer is", as a
JSON value, or by being short. Three kinds of text have no final answer: refusals, texts of more
than 80 characters without a conclusion, and texts whose conclusion is followed by anything but an
explanation or a courtesy. Without a final answer, the caller asks the stronger expert.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

# A text up to this length is an answer as a whole. Two longer texts would hardly be equal.
_SHORT_CHARS = 80
_STATED_CHARS = 200
_LOOKED_AT_CHARS = 20_000
_LINE_CHARS = 4_000
_OPENING_CHARS = 200

_SAME_SIGNS = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "\u2212": "-", "\u00a0": " ", "\u202f": " "}
)
_HASHES = re.compile(r"####\s*(.{1,100})")
_BOXED = re.compile(r"\\f?boxed\s*\{")
_HEADING = re.compile(r"#{1,6}\s+")
_BOLD = re.compile(r"(?<![\w)*])\*\*(?=[^\s*])([^*\n]{1,300}?)\*\*(?![\w(*])")
_MARKER = re.compile(
    r"\b(?:(?:the|my|our)\s+)?(?:(?:final|correct|right|best)\s+)?(?:answer|option|choice)"
    r"(?:\s+to\s+(?:the|this|that|your)\s+(?:question|problem|exercise|task|puzzle))?"
    r"\s*(?:(?:is|are|would\s+be|must\s+be)\b\s*:?|[:=])\s*",
    re.IGNORECASE,
)
_MARKER_ALONE = re.compile(r"(?:the\s+)?(?:final|correct)\s+answer|answer", re.IGNORECASE)
# Words that may precede a conclusion in its sentence without changing its meaning.
_CONNECTIVES = re.compile(
    r"(?:[-*>•]\s+)?(?:(?:so|thus|hence|therefore|then|and|now|finally|overall|okay|ok"
    r"|in\s+(?:conclusion|summary)|to\s+(?:conclude|summari[sz]e)|as\s+a\s+result|consequently"
    r"|accordingly|i\s+(?:think|believe|conclude)(?:\s+that)?"
    r"|we\s+(?:can\s+)?(?:conclude|find|see)(?:\s+that)?|(?:this|which|that)\s+means(?:\s+that)?"
    r"|it\s+follows\s+that|based\s+on\s+(?:the|this|my|these)\s+"
    r"(?:above|analysis|information|reasoning|calculations?))(?:[\s,:]+|$))*",
    re.IGNORECASE,
)
_REASON = re.compile(r"(?:since|because)\b", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?;]\s+")
# Words and signs that change or negate the value in a box that follows them.
_TURNS = re.compile(
    r"\b(?:not|never|no|neither|nor|cannot|less|more|fewer|greater|smaller|larger|least|most|about"
    r"|approximately|roughly|around|nearly|almost|over|under|between|or|if|unless|except|minus"
    r"|negative|plus|times|than|up|half|twice|double|other|wrong|incorrect)\b|n't\b|[<>≤≥≠≈~±]",
    re.IGNORECASE,
)
_NEUTRAL_BEFORE = re.compile(r"(?:[\s$*]|\\[(\[])+$")
_NEUTRAL_AFTER = re.compile(r"^(?:[\s$*]|\\[)\]])+")
_PLAIN_BEFORE = re.compile(r"(?:(?:^|[\s(])[^\W\d_]{2,}|[.,:=])$")
_LEFT_SIDE = re.compile(r"([^\s=,;:$]{0,40}[^\W\d_][^\s=,;:$]{0,40})\s*=$")
_CLOSER = (
    r"(?:(?:i\s+)?hope\s+(?:this|that|it|the)\b[^.!?\n]{0,60}\bhelp[^.!?\n]{0,40}[.!]?"
    r"|(?:please\s+)?let\s+me\s+know\b[^.!?\n]{0,150}[.!?]?"
    r"|(?:please\s+)?feel\s+free\s+to\s+(?:ask|reach)\b[^.!?\n]{0,100}[.!]?"
    r"|if\s+you\b[^.!?\n]{0,100}\b(?:let\s+me\s+know|just\s+ask|feel\s+free|please\s+ask"
    r"|happy\s+to\s+help|glad\s+to\s+help)\b[^.!?\n]{0,80}[.!]?"
    r"|is\s+there\s+anything\s+else\b[^.!?\n]{0,80}\?"
    r"|thank(?:s|\s+you)[.!]|have\s+a\s+(?:great|nice|good)\s+day[.!]?)"
)
_CLOSING = re.compile(rf"(?:(?<=[.!?\n])\s*|^)(?:{_CLOSER}\s*)+$", re.IGNORECASE)
_CLOSING_CHARS = 600
_EXPLAINS = re.compile(
    r"(?:explanation|reasoning|justification|rationale|here(?:'s|\s+is)\s+why"
    r"|(?:this|that)\s+is\s+because|because)\b",
    re.IGNORECASE,
)
_THEN_EXPLAINS = re.compile(
    r"(?:[.;,]\s+(?=explanation|reasoning|here(?:'s|\s+is)\s+why|(?:this|that)\s+is\s+because)"
    r"|[.,;]?\s+(?=because\b))",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"\b(?:wait|actually|on\s+second\s+thought|correction|mistak\w*|oops|scratch\s+that|hold\s+on"
    r"|hmm+|apolog\w*|sorry|re-?(?:check|consider|calculat|evaluat|examin)\w*|wrong|instead"
    r"|unless|except\w*|otherwise|however|although|only\s+(?:if|when)|if|but|provided"
    r"|should\s+(?:be|have\s+been))\b",
    re.IGNORECASE,
)
_REFUSAL = re.compile(
    r"\b(?:i|we)\s*(?:'m|am|'re|are)?\s*(?:(?:very|really|truly|so|just|simply|only)\s+)?"
    r"(?:can(?:not|'t|\s+not)|could(?:\s+not|n't)|won't|(?:will|would|do|did|am|are)\s+not|wouldn't"
    r"|don't|didn't|aren't|not|unable|afraid|sorry|unsure|uncertain|must\s+decline|decline|refuse"
    r"|regret|apologi[sz]e|lack|have\s+(?:no|not)|haven't|need\s+more|would\s+need|would\s+rather)\b"
    r"|\b(?:i|we)'d\s+(?:rather|prefer)\b|\bdecline\b|\bnot\s+something\b|\bit\s+depends\b"
    r"|\b(?:something|anything)\s+(?:that\s+)?i\s+can\b|\bno\s+(?:information|way\s+to)\b"
    r"|\bimpossible\s+to\s+(?:say|tell|know|determine|answer)\b"
    r"|\bas\s+an?\s+(?:ai|assistant|(?:large\s+)?language\s+model)\b"
    r"|\b(?:sorry|apologies|unable\s+to|not\s+able\s+to|unfortunately|no\s+comment|no\s+idea)\b"
    r"|\b(?:can(?:not|'t)|can\s+not|won't)\s+(?:be\s+)?(?:answer|help|assist|comply|provide|determin"
    r"|discuss|respond|do\s+that|say|tell|share|fulfil)"
    r"|\bdo(?:n't|\s+not)\s+know\b|\bnot\s+(?:sure|certain|known|enough\s+information)\b"
    r"|\binsufficient\s+(?:information|data|context)\b|^(?:unknown|n/a)$"
    r"|\b(?:against|violates?)\s+(?:my|the|our)\s+(?:\w+\s+){0,2}(?:guidelines|polic|programming)"
    r"|\b(?:lo\s+siento|no\s+(?:puedo|sé)|désolée?|je\s+ne\s+(?:peux|sais)|tut\s+mir\s+leid"
    r"|ich\s+(?:kann|weiß|darf)\s+(?:\w+\s+){0,4}nicht|mi\s+dispiace|non\s+(?:posso|so)"
    r"|desculpe|não\s+(?:posso|sei)|het\s+spijt|ik\s+(?:kan|weet)\s+(?:\w+\s+){0,4}niet|beklager"
    r"|извините|к\s+сожалению|не\s+(?:могу|знаю))\b"
    r"|抱歉|对不起|對不起|我不能|我无法|我無法|我不知道|申し訳|すみません|ごめん|できません|わかりません"
    r"|죄송|모르겠",
    re.IGNORECASE,
)
# A text about the speaker answers no question. In "I and II", the I is a numeral.
_OF_ITSELF = re.compile(r"(?:I|We)(?:'\w+)?\s+(?!and\b|or\b|only\b)[a-z]")
# A text that asks a question, greets, or refers to other people answers no question either.
_EVADES = re.compile(
    r"\?[\"'”)\]*_]*\s*$"
    r"|^(?:please|kindly)\s+(?:do\s+)?(?:provide|clarify|specify|share|tell|give|explain|rephrase"
    r"|consult|contact|seek|see|check|refer|ask|try|wait|let|send|upload|paste|enter|include)\b"
    r"|^(?:consult|contact|ask|see|speak\s+to|talk\s+to|seek)\s+(?:a|an|your|the|with)\b"
    r"|^(?:sure|certainly|of\s+course|okay|ok|hello|hi|hey|greetings|welcome)\b\s*[,.!:]",
    re.IGNORECASE,
)
_INDENTED = re.compile(r"\n[ \t]+\S")
_CHOICE = re.compile(
    r"(?:(?:option|choice|Option|Choice) )?(?:\(([A-J])\)|\[([A-J])\]|([A-J])[.):]?)"
)
_CHOICE_AND_TEXT = re.compile(r"(?:\(([A-J])\)|([A-J])[.):]) +(\S.*)")
_NUMBER = re.compile(
    r"([+-]?)((?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|0|[1-9][0-9]{0,60})?(?:\.[0-9]{1,60})?)"
    r"([eE][+-]?[0-9]{1,2})?(%?)"
)
_FRACTION = re.compile(r"(-?)([1-9][0-9]{0,9})/([1-9][0-9]{0,9})")
_VERDICTS = {
    spelling: verdict
    for verdict in ("yes", "no", "true", "false")
    for spelling in (verdict, verdict.capitalize(), verdict.upper())
    # NO is also nitrogen monoxide.
    if spelling != "NO"
}
_SURE_KINDS = frozenset({"choice", "number", "verdict"})
_WRAPPINGS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"))
_LATEX = (
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    # A fraction must be the whole text: 2\\frac{1}{2} isn't 21/2, x^\\frac{1}{2} isn't (x^1)/2.
    (re.compile(r"^(-?)\\frac\s*\{([0-9]{1,10})\}\s*\{([0-9]{1,10})\}$"), r"\1\2/\3"),
    (re.compile(r"^()\\frac\s*\{(-[0-9]{1,10})\}\s*\{([0-9]{1,10})\}$"), r"\1\2/\3"),
    (re.compile(r"^(-?)\\frac\s*([0-9])\s*([0-9])$"), r"\1\2/\3"),
    (re.compile(r"\\(?:left|right)(?=[()\[\]|.])"), ""),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}"), r"\1"),
    # A thin space between digits may group thousands, but it may also separate two numbers.
    (re.compile(r"(?<=[0-9])\\,(?=[0-9]{3}(?![0-9]))"), ""),
    (re.compile(r"(?<=[0-9,])\\!(?=[0-9])"), ""),
    (re.compile(r"\\[,;!]"), " "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([%$#&])"), r"\1"),
)
_AROUND_SIGNS = re.compile(r" *([=<>+*^≤≥≠]) *")
_FENCE = re.compile(r"^```(?:json)?[ \t]*\n(.*?)\n[ \t]*```$", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FinalAnswer:
    """A final answer. Two answers agree if they are equal.

    Attributes:
        kind: `json`, `choice`, `number`, `verdict`, `text` or `several`.
        value: The answer in its canonical form.
    """

    kind: str
    value: str


def final_answer(text: str, *, as_json: bool = False) -> FinalAnswer | None:
    """Extract the final answer of a text; None if it states none.

    Args:
        text: The text of an answer.
        as_json: Whether the client requires JSON, so that any other text has no final answer.
    """
    text = after_thinking(text).strip()
    if as_json or text[:1] in ("{", "[") or text.startswith("```"):
        found = _json(text)
        if found is not None or as_json:
            return found
        if text.startswith("```"):
            return FinalAnswer("text", text) if len(text) <= _SHORT_CHARS else None
    text = unicodedata.normalize("NFC", text).translate(_SAME_SIGNS)
    if len(text) > _LOOKED_AT_CHARS:
        # The cut may have removed the beginning of the first line, so this line is dropped.
        text = text[-_LOOKED_AT_CHARS:].partition("\n")[2]
    text = _without_closing(text)
    if not text or _REFUSAL.search(text[:_OPENING_CHARS]):
        return None
    lines = [line for line in map(_plain_line, text.split("\n")) if line]
    concluded = _conclusions(lines)
    if concluded is not None:
        return _together(concluded)
    if len(text) > _SHORT_CHARS or _OF_ITSELF.match(text) or _EVADES.search(text):
        return None
    if len(lines) > 1 and _INDENTED.search(text):
        # The text is probably code, whose indentation may have a meaning.
        return FinalAnswer("text", text)
    return _canonical("\n".join(lines))


def after_thinking(text: str) -> str:
    """Return the text after a reasoning model's thoughts; empty if the thoughts never end."""
    _, ended, rest = text.rpartition("</think>")
    return rest if ended else "" if "<think>" in text else text


def _without_closing(text: str) -> str:
    """Remove courtesies from the end of a text."""
    head, tail = text[:-_CLOSING_CHARS], text[-_CLOSING_CHARS:]
    closing = _CLOSING.search(tail)
    return (head + (tail[: closing.start()] if closing else tail)).strip()


def _plain_line(line: str) -> str:
    """Remove emphasis from a line, and keep only its last `_LINE_CHARS` characters."""
    return _BOLD.sub(r"\1", line[-_LINE_CHARS:]).strip()


def _conclusions(lines: list[str]) -> list[FinalAnswer | None] | None:
    """Extract the answer of each line with a conclusion, in order.

    Returns:
        The answers; None instead of the list if no line has a conclusion. The list contains None
        for a conclusion that can't be compared. It ends with None if the text after the last
        conclusion is no explanation.
    """
    found: list[FinalAnswer | None] = []
    last = -1
    for i, line in enumerate(lines):
        if i == last:
            continue  # This line holds the value that the line before has announced.
        hashes = _HASHES.fullmatch(line) if i == len(lines) - 1 else None
        if hashes is not None:
            found.append(_canonical(hashes[1]))
            last = i
            continue
        bare = _HEADING.sub("", line, count=1) if line.startswith("#") else line
        if _BOXED.search(bare):
            found.append(_boxed(bare))
            last = i
            continue
        if _MARKER_ALONE.fullmatch(bare.rstrip(": ")) and i + 1 < len(lines):
            follows = lines[i + 1]
            found.append(_boxed(follows) if _BOXED.search(follows) else _stated("", follows))
            last = i + 1
            continue
        marker = _MARKER.search(bare)
        if marker is None:
            continue
        stated = bare[marker.end() :]
        last = i
        if not stated and i + 1 < len(lines):
            stated, last = lines[i + 1], i + 1
        if not stated:
            continue
        found.append(
            _boxed(stated)
            if last > i and _BOXED.search(stated)
            else _stated(_sentence_start(bare[: marker.start()]), stated)
        )
    if not found:
        return None
    tail = lines[last + 1 :]
    if tail and not _only_explains(found[-1], "\n".join(tail)):
        found.append(None)
    return found


def _together(concluded: list[FinalAnswer | None]) -> FinalAnswer | None:
    """Combine all conclusions of a text into one final answer; None if any can't be compared."""
    distinct = list(dict.fromkeys(concluded))
    if None in distinct:
        return None
    if len(distinct) == 1:
        return distinct[0]
    parts = [f"{item.kind}:{item.value}" for item in distinct if item is not None]
    return FinalAnswer("several", json.dumps(parts, ensure_ascii=False))


def _sentence_start(before: str) -> str:
    """Return the last part of `before`: the beginning of the sentence that continues after it."""
    ends = [match.end() for match in _SENTENCE_END.finditer(before)]
    return before[ends[-1] if ends else 0 :].strip()


def _adds_nothing(before: str) -> bool:
    # A reason must end with a comma. Otherwise the sentence may go on and change the conclusion,
    # as in "since I doubt that the answer is".
    reason = _REASON.match(before) and before.endswith(",")
    return bool(_CONNECTIVES.fullmatch(before) or reason)


def _stated(before: str, stated: str) -> FinalAnswer | None:
    """Return the answer of a sentence.

    Args:
        before: The part of the sentence before the words "the answer is".
        stated: The part after these words.
    """
    if not _adds_nothing(before):
        return _canonical(f"{before} … {stated}", _STATED_CHARS)
    return _explained(stated)


def _explained(stated: str) -> FinalAnswer | None:
    """Return the value of a line, without the explanation that may follow it."""
    cut = _THEN_EXPLAINS.search(stated)
    if cut is not None:
        value = _canonical(stated[: cut.start()])
        if _only_explains(value, stated[cut.end() :]):
            return value
    return _canonical(stated, _STATED_CHARS)


def _only_explains(value: FinalAnswer | None, more: str) -> bool:
    """Whether `more` only explains the value that precedes it, and does not correct it.

    Only a number, a choice or a verdict can have an explanation that is no part of the answer. For
    any other value, the client may have asked for exactly this explanation.
    """
    return (
        value is not None
        and value.kind in _SURE_KINDS
        and _EXPLAINS.match(more) is not None
        and _TAKEN_BACK.search(more) is None
    )


def _boxed(line: str) -> FinalAnswer | None:
    """Return the answer of a line with a box: the boxed value, unless other words change it."""
    opened = list(_BOXED.finditer(line))
    end = _closing_brace(line, opened[0].end())
    if end is None:
        return None
    if len(opened) > 1:
        # The line has several boxes, so the whole line is the answer.
        return _canonical(line, _STATED_CHARS)
    inner = line[opened[0].end() : end]
    before = _NEUTRAL_BEFORE.sub("", _sentence_start(line[: opened[0].start()]))
    after = _NEUTRAL_AFTER.sub("", line[end + 1 :]).strip()
    side = _LEFT_SIDE.search(before)
    named = f"{side[1]}=" if side is not None else ""
    if _TURNS.search(before) or (before and not _PLAIN_BEFORE.search(before)):
        named = f"{before} "
    value = _canonical(named + inner)
    if after.strip(".") and not _only_explains(value, after.lstrip(".,;: ")):
        return _canonical(f"{named}{inner} {after}", _STATED_CHARS)
    return value


def _closing_brace(line: str, start: int) -> int | None:
    depth = 1
    for i in range(start, len(line)):
        if line[i] == "{":
            depth += 1
        elif line[i] == "}":
            depth -= 1
            if depth == 0:
                return i
    return None


def _canonical(text: str, most: int = _SHORT_CHARS) -> FinalAnswer | None:
    """Return a value in its canonical form; None if it has more than `most` characters."""
    text = _unwrapped(text)
    for pattern, instead in _LATEX:
        text = pattern.sub(instead, text)
    text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    text = _unwrapped(_AROUND_SIGNS.sub(r"\1", text))
    if not text or len(text) > most or _REFUSAL.search(text):
        return None
    if choice := _CHOICE.fullmatch(text):
        return FinalAnswer("choice", choice[1] or choice[2] or choice[3])
    if (number := _number(text)) is not None:
        return FinalAnswer("number", number)
    if text in _VERDICTS:
        return FinalAnswer("verdict", _VERDICTS[text])
    if both := _CHOICE_AND_TEXT.fullmatch(text):
        text = f"{both[1] or both[2]}) {both[3]}"
    return FinalAnswer("text", text)


def _unwrapped(text: str) -> str:
    """Remove the full stop at the end, and delimiters that enclose the whole value."""
    while True:
        before = text = text.strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        for opens, closes in _WRAPPINGS:
            inner = text[len(opens) : len(text) - len(closes)]
            if (
                text.startswith(opens)
                and text.endswith(closes)
                and len(text) > len(opens) + len(closes)
                and opens not in inner
                and closes not in inner
            ):
                text = inner
        if text == before:
            return text


def _number(text: str) -> str | None:
    """Return a number, with or without a % sign, in its canonical form; None for other text."""
    if fraction := _FRACTION.fullmatch(text):
        return _decimal_of(fraction[1], int(fraction[2]), int(fraction[3]))
    text = text[:-2] + "%" if text.endswith(" %") else text
    found = _NUMBER.fullmatch(text)
    if found is None or not found[2]:
        return None
    sign, digits, exponent, percent = found[1], found[2].replace(",", ""), found[3], found[4]
    if exponent:
        digits = f"{Decimal(digits + exponent):f}"
    whole, _, rest = digits.partition(".")
    # 3.0 equals 3, but 3.10 and 3.1 may be versions. 3.000 may be three thousand, because many
    # languages use the point to group digits.
    grouped = rest == "000" and "," not in found[2] and len(whole) <= 3 and whole not in ("", "0")
    rest = rest if rest.strip("0") or grouped else ""
    return sign + (whole or "0") + (f".{rest}" if rest else "") + percent


def _decimal_of(sign: str, over: int, under: int) -> str | None:
    """Return a fraction as a decimal; None if its decimal does not end.

    The fraction must be in lowest terms, because 2/4 and 3/1 may be no numbers.
    """
    rest = under
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1 or under == 1 or math.gcd(over, under) != 1:
        return None
    return f"{sign}{Decimal(over) / Decimal(under):f}"


def _json(text: str) -> FinalAnswer | None:
    fenced = _FENCE.match(text)
    try:
        value = json.loads(
            fenced[1] if fenced else text,
            parse_float=Decimal,
            parse_int=Decimal,
            parse_constant=_no_constant,
            object_pairs_hook=_distinct,
        )
        return FinalAnswer("json", _written(value))
    except (ValueError, RecursionError, InvalidOperation):
        return None


def _no_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _written(value: Any) -> str:
    """Write a JSON value in its canonical form, with sorted keys and 1.0 as 1.

    Raises:
        ValueError: The value contains a refusal.
    """
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{_written(value[k])}" for k in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    if isinstance(value, Decimal):
        sign, digits, exponent = value.as_tuple()
        bare = "".join(map(str, digits)).lstrip("0")
        short = bare.rstrip("0")
        if not short:
            return "0"
        return f"{'-' * sign}{short}e{int(exponent) + len(bare) - len(short)}"
    if isinstance(value, str) and _REFUSAL.search(value[:_OPENING_CHARS].translate(_SAME_SIGNS)):
        raise ValueError("a refusal")
    return json.dumps(value)


def agreed(finals: Sequence[FinalAnswer | None]) -> bool:
    """Whether every answer has a final answer, and all of these are equal."""
    return bool(finals) and finals[0] is not None and all(f == finals[0] for f in finals)


def majority(finals: Sequence[FinalAnswer | None]) -> int | None:
    """Position of the most frequent final answer; None if there is no final answer.

    If several are equally frequent, the last answer wins.
    """
    given = [i for i, final in enumerate(finals) if final is not None]
    if not given:
        return None
    return max(given, key=lambda i: (sum(finals[i] == other for other in finals), i))


def confidence(logprobs: Sequence[float]) -> float:
    """Compute a model's confidence in its text: the geometric mean of its tokens' probabilities.

    This is the length-normalised log-likelihood of Malinin and Gales, "Uncertainty Estimation in
    Autoregressive Structured Prediction" (2021), as a probability.

    Args:
        logprobs: (tokens,), the natural logarithm of each token's probability.

    Returns:
        The confidence in [0, 1]; 0 without tokens.
    """
    if not logprobs:
        return 0.0
    return math.exp(min(0.0, sum(logprobs) / len(logprobs)))
