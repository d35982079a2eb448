"""The shipped screen for personal data and secrets: shapes, and check digits where there are any.

It finds what has a shape: addresses of mail, phone and card numbers, IBANs, US social
security numbers, IP addresses, keys of well-known services. It knows no names, no postal
addresses, no birthdays and nothing of health: for those plug in a model.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence

from service.gateway.guard.screen import NOTHING, Finding, Span, Text, aside

# Each is linear: no part of it can match the same characters in two ways, and what may begin
# inside of what it has just looked through looks no further than some bound.
_SHAPES: dict[str, re.Pattern[str]] = {
    "secret": re.compile(
        r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----"
        r"|\b(?:sk|rk|pk)[-_](?:[A-Za-z0-9]+[-_]){0,3}[A-Za-z0-9]{16,}\b"
        r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
        r"|\bgh[pousr]_[A-Za-z0-9]{30,}\b"
        r"|\bgithub_pat_[A-Za-z0-9_]{22,}\b"
        r"|\bxox[abprs]-[A-Za-z0-9-]{10,}\b"
        r"|\bAIza[A-Za-z0-9_-]{35}\b"
        r"|\bhf_[A-Za-z0-9]{30,}\b"
        r"|\beyJ[A-Za-z0-9_-]{10,1000}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
    ),
    "email": re.compile(
        r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"
    ),
    "iban": re.compile(r"\b[A-Z]{2}[0-9]{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "card": re.compile(r"(?<![0-9])(?:[0-9][ -]?){12,18}[0-9](?![0-9])"),
    "ssn": re.compile(
        r"(?<![0-9-])(?!000|666|9)[0-9]{3}-(?!00)[0-9]{2}-(?!0000)[0-9]{4}(?![0-9-])"
    ),
    "ip": re.compile(
        r"(?<![0-9A-Za-z.:])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9])(?!\.[0-9])"
        r"|(?<![0-9A-Za-z:.])(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}(?![0-9A-Za-z:])"
    ),
    "phone": re.compile(
        r"(?<![0-9A-Za-z.+-])(?:\+[0-9]{1,3}[ .()/-]{0,2}|00[1-9][0-9]{0,2}[ .()/-]{1,2}|\()"
        r"[0-9]{1,4}(?:[ .()/-]{0,2}[0-9]{2,5}){2,4}(?![0-9A-Za-z])"
        r"|(?<![0-9A-Za-z.-])(?:[2-9][0-9]{2}[.-][2-9][0-9]{2}[.-][0-9]{4}|"
        r"0[1-9][0-9]{1,4}[ /-][0-9]"
        r"{2,4}(?:[ -]?[0-9]{2,4}){1,3})(?![0-9A-Za-z.-])"
    ),
}


def _luhn(text: str) -> bool:
    digits = [int(one) for one in text if one.isdigit()]
    if len(set(digits)) == 1:
        return False
    total = sum(digits[-1::-2]) + sum(sum(divmod(2 * one, 10)) for one in digits[-2::-2])
    return total % 10 == 0


def _iban(text: str) -> bool:
    bare = text.replace(" ", "")
    turned = bare[4:] + bare[:4]
    return 15 <= len(bare) <= 34 and int("".join(str(int(c, 36)) for c in turned)) % 97 == 1


def _public_ip(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # One's own machine and network are nobody's data.
    return address.is_global


def _phone(text: str) -> bool:
    return 8 <= sum(one.isdigit() for one in text) <= 15


_CHECKS: dict[str, Callable[[str], bool]] = {
    "card": _luhn,
    "iban": _iban,
    "ip": _public_ip,
    "phone": _phone,
}


class PiiScreen:
    """Finds the kinds it is told to, anywhere in a prompt."""

    name = "pii"

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = [kind for kind in _SHAPES if kind in kinds]

    async def look(self, texts: Sequence[Text]) -> Finding:
        """Score 1 where anything was found. Never raises."""
        return await aside(self._look, texts)

    def _look(self, texts: Sequence[Text]) -> Finding:
        spans = [
            Span(i, start, end, kind)
            for i, one in enumerate(texts)
            for start, end, kind in self._found(one.text)
        ]
        if not spans:
            return NOTHING
        kinds = tuple(sorted({span.kind for span in spans}))
        return Finding(1.0, kinds, tuple(spans))

    def _found(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Where, and what; of two that overlap the kind that is named first."""
        taken = bytearray(len(text))
        for kind in self._kinds:
            check = _CHECKS.get(kind)
            for match in _SHAPES[kind].finditer(text):
                start, end = match.span()
                if check is not None and not check(match[0]):
                    continue
                if taken.find(1, start, end) >= 0:
                    continue
                taken[start:end] = b"\1" * (end - start)
                yield start, end, kind


def redacted(text: str, spans: Sequence[Span]) -> str:
    """The text with `[EMAIL]` and so on where something was found."""
    parts: list[str] = []
    at = 0
    for span in sorted(spans, key=lambda one: one.start):
        parts += [text[at : span.start], f"[{span.kind.upper()}]"]
        at = span.end
    return "".join([*parts, text[at:]])
