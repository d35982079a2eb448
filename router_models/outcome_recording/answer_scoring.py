"""Scores an answer by its prompt's check. Pure.

Final answers are those that cascades and votes compare (`service.broker.answer_agreement`). That
module is strict, because a wrong agreement would give a client a wrong answer. A score may look
further: where the text as a whole has no final answer of the wanted kind, its first and its last
line are read, and both must not contradict each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jsonschema
import referencing.exceptions
import regex

from router_models.outcome_recording.answer_check_kinds import (
    ChoiceCheck,
    ContainsAllCheck,
    ExactCheck,
    JsonSchemaCheck,
    NumberCheck,
    RegexCheck,
)
from service.broker.answer_agreement import FinalAnswer, after_thinking, final_answer

TextCheck = ExactCheck | ChoiceCheck | NumberCheck | RegexCheck | JsonSchemaCheck | ContainsAllCheck

_REGEX_TIMEOUT_S = 1.0
_LINE_CHARS = 400
_MAX_JSON_CHARS = 1_000_000
# Differences of this share come from writing a number in decimal.
_ROUNDING = 1e-12
_QUOTES = "\"'“”‘’`«»*"
_CURLY = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": " "})
_NUMBERS = re.compile(
    r"(?<![\w.,/])(?P<sign>[-+\u2212]?)\s?[$€£¥]?\s?"
    r"(?P<over>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?|\.[0-9]+)"
    r"(?:\s?/\s?(?P<under>[0-9]+))?(?![0-9])"
)
_FENCES = re.compile(r"```[A-Za-z]*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_LETTER = re.compile(r"(?:\(([A-J])\)|([A-J])[).:])(?:\s|$)|([A-J])$")


class ScoringError(Exception):
    """An answer could not be scored, which is not the answer's fault."""


@dataclass(frozen=True, slots=True)
class Score:
    """A score in [0, 1], and why it is not 1."""

    value: float
    reason: str = ""


def stated(text: str) -> str | None:
    """The final answer as recipes compare it; None where the text states none."""
    found = final_answer(text)
    return found.value if found is not None else None


def score_text(check: TextCheck, text: str) -> Score:
    """Score an answer by its text alone.

    Raises:
        ScoringError: The check's own pattern takes too long on this text.
    """
    match check:
        case ExactCheck():
            return _exact(check, text)
        case ChoiceCheck():
            return _choice(check, text)
        case NumberCheck():
            return _number(check, text)
        case RegexCheck():
            return _regex(check, text)
        case JsonSchemaCheck():
            return _json_schema(check, text)
        case ContainsAllCheck():
            return _contains_all(check, text)


def _said(text: str) -> Iterator[FinalAnswer]:
    """The final answers of the whole text, then of its first and its last line."""
    if (whole := final_answer(text)) is not None:
        yield whole
    lines = [line.strip() for line in after_thinking(text).split("\n") if line.strip()]
    for line in (lines[-1:] + lines[:1]) if len(lines) > 1 else ():
        if len(line) <= _LINE_CHARS and (found := final_answer(line)) is not None:
            yield found


def _exact(check: ExactCheck, text: str) -> Score:
    def plain(value: str) -> str:
        value = " ".join(value.translate(_CURLY).split()).strip(_QUOTES).rstrip(".").strip(_QUOTES)
        return value.casefold() if check.ignore_case else value

    right = {plain(answer) for answer in check.answers}
    right |= {plain(final.value) for answer in check.answers if (final := final_answer(answer))}
    given = [plain(after_thinking(text))]
    if (final := final_answer(text)) is not None:
        given.append(plain(final.value))
    if any(answer in right for answer in given):
        return Score(1.0)
    return Score(0.0, "another answer" if final is not None else "no final answer")


def _choice(check: ChoiceCheck, text: str) -> Score:
    by_text = {" ".join(text.split()).casefold(): key for key, text in check.choices.items()}

    def letter(final: FinalAnswer) -> str | None:
        if final.kind == "choice":
            return final.value
        if final.kind not in ("text", "number", "verdict"):
            return None
        if key := by_text.get(" ".join(final.value.split()).strip(_QUOTES).casefold()):
            return key
        found = _LETTER.match(final.value)
        return next(filter(None, found.groups())) if found else None

    return _one_of(_first_kind(text, letter), lambda given: given == check.answer)


def _number(check: NumberCheck, text: str) -> Score:
    most = max(check.tolerance, (check.relative_tolerance + _ROUNDING) * abs(check.answer))
    return _one_of(_first_kind(text, _number_in), lambda given: abs(given - check.answer) <= most)


def _first_kind(text: str, read: Any) -> list[Any]:
    """What `read` finds in the whole text's final answer, else in its last and first line's."""
    finals = list(_said(text))
    if finals and finals[0] == final_answer(text):
        if (found := read(finals[0])) is not None:
            return [found]
        if finals[0].kind == "several":
            return []
    values = [value for final in finals if (value := read(final)) is not None]
    return list(dict.fromkeys(values))


def _one_of(values: list[Any], right: Any) -> Score:
    if len(values) != 1:
        return Score(0.0, "answers that contradict each other" if values else "no final answer")
    return Score(1.0) if right(values[0]) else Score(0.0, "another answer")


def _number_in(final: FinalAnswer) -> float | None:
    """The only number that a final answer has; the one after the last `=` where there is one."""
    if final.kind not in ("number", "text"):
        return None
    found = list(_NUMBERS.finditer(final.value.rpartition("=")[2]))
    if len(found) != 1:
        return None
    over, under = found[0]["over"].replace(",", ""), found[0]["under"] or "1"
    if float(under) == 0:
        return None
    return (-1 if found[0]["sign"] in ("-", "\u2212") else 1) * float(over) / float(under)


def _regex(check: RegexCheck, text: str) -> Score:
    flags = regex.IGNORECASE if check.ignore_case else 0
    find = regex.fullmatch if check.full else regex.search
    answer = after_thinking(text).strip()
    try:
        found = find(check.pattern, answer, flags=flags, timeout=_REGEX_TIMEOUT_S)
    except TimeoutError:
        raise ScoringError(f"the pattern took more than {_REGEX_TIMEOUT_S:.0f} s") from None
    return Score(1.0) if found else Score(0.0, "no match")


def _json_schema(check: JsonSchemaCheck, text: str) -> Score:
    answer = after_thinking(text).strip()
    fences = _FENCES.findall(answer)
    if len(answer) > _MAX_JSON_CHARS or len(fences) > 1:
        return Score(0.0, "more than one JSON value" if fences else "too long")
    try:
        value = json.loads(
            fences[0] if fences else answer,
            object_pairs_hook=_distinct,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError):
        return Score(0.0, "no JSON")
    try:
        error = next(iter(_Validator(check.schema_).iter_errors(value)), None)
    except RecursionError:
        return Score(0.0, "nested too deep")
    except OverflowError:
        return Score(0.0, "a number that is too large")
    except referencing.exceptions.Unresolvable as unresolved:
        raise ScoringError(f"the schema refers to nothing: {unresolved}") from None
    if error is not None:
        return Score(0.0, "the JSON does not fit the schema")
    if not check.expected:
        return Score(1.0)
    right = sum(_same(_at(value, at), wanted) for at, wanted in check.expected.items())
    return Score(right / len(check.expected), f"{right} of {len(check.expected)} values")


def _pattern(_: Any, pattern: str, instance: Any, __: Any) -> Iterator[Any]:
    """The keyword `pattern`, with a bound on its time."""
    if not isinstance(instance, str):
        return
    try:
        found = regex.search(pattern, instance, timeout=_REGEX_TIMEOUT_S)
    except TimeoutError:
        raise ScoringError(f"a pattern took more than {_REGEX_TIMEOUT_S:.0f} s") from None
    if not found:
        yield jsonschema.ValidationError("does not match")


_Validator: Any = jsonschema.validators.extend(
    jsonschema.Draft202012Validator, {"pattern": _pattern}
)
_NOTHING = object()


def _at(value: Any, pointer: str) -> Any:
    """The value at a JSON pointer (RFC 6901), or at a top key without a slash."""
    parts = pointer[1:].split("/") if pointer.startswith("/") else [pointer]
    for part in parts:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _NOTHING
    return value


def _same(given: Any, wanted: Any) -> bool:
    """Whether JSON values are equal: 1 equals 1.0, true does not equal 1."""
    if isinstance(given, bool) or isinstance(wanted, bool):
        return given is wanted
    if isinstance(given, str) and isinstance(wanted, str):
        return " ".join(given.split()) == " ".join(wanted.split())
    if isinstance(given, list) and isinstance(wanted, list):
        return len(given) == len(wanted) and all(map(_same, given, wanted))
    if isinstance(given, dict) and isinstance(wanted, dict):
        return given.keys() == wanted.keys() and all(_same(given[k], wanted[k]) for k in wanted)
    return bool(given == wanted)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"JSON has no {name}")


def _contains_all(check: ContainsAllCheck, text: str) -> Score:
    def plain(value: str) -> str:
        value = " ".join(value.translate(_CURLY).split())
        return value.casefold() if check.ignore_case else value

    answer = plain(after_thinking(text))
    if any(plain(item) in answer for item in check.none_of):
        return Score(0.0, "contains a forbidden text")
    found = sum(plain(item) in answer for item in check.texts)
    share = found / len(check.texts)
    reason = f"{found} of {len(check.texts)} texts"
    return Score(share if check.partial else float(share == 1.0), reason)
