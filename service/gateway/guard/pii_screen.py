"""The built-in screen for personal data and secrets. It uses patterns and check digits.

It finds data with a fixed format: email addresses, phone and card numbers, IBANs, US social
security numbers, IP addresses, and keys of well-known services. It does not find names, postal
addresses, birthdays or health data. A model in place of this screen can find those.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator, Sequence

from service.gateway.guard.screen_interface import NOTHING, Finding, Span, Text, aside

# Every pattern takes linear time. None of its parts can match the same characters in two ways. A
# match that may begin inside of a failed match has a bounded length.
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
    digits = [int(digit) for digit in text if digit.isdigit()]
    if len(set(digits)) == 1:
        return False
    total = sum(digits[-1::-2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[-2::-2])
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
    # Private and loopback addresses identify nobody.
    return address.is_global


def _phone(text: str) -> bool:
    return 8 <= sum(item.isdigit() for item in text) <= 15


_CHECKS: dict[str, Callable[[str], bool]] = {
    "card": _luhn,
    "iban": _iban,
    "ip": _public_ip,
    "phone": _phone,
}


class PiiScreen:
    """Searches all texts of a prompt for the configured kinds of data."""

    name = "pii"

    def __init__(self, kinds: Sequence[str]) -> None:
        self._kinds = [kind for kind in _SHAPES if kind in kinds]

    async def look(self, texts: Sequence[Text]) -> Finding:
        """Search the texts. The score is 1 if anything was found. It raises no errors."""
        return await aside(self._look, texts)

    def _look(self, texts: Sequence[Text]) -> Finding:
        spans = [
            Span(i, start, end, kind)
            for i, text in enumerate(texts)
            for start, end, kind in self._found(text.text)
        ]
        if not spans:
            return NOTHING
        kinds = tuple(sorted({span.kind for span in spans}))
        return Finding(1.0, kinds, tuple(spans))

    def _found(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Yield start, end and kind of each finding.

        If two findings overlap, the kind that comes first in `_SHAPES` wins.
        """
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
    """Replace each finding in a text by its kind, for example by `[EMAIL]`."""
    parts: list[str] = []
    at = 0
    for span in sorted(spans, key=lambda found: found.start):
        parts += [text[at : span.start], f"[{span.kind.upper()}]"]
        at = span.end
    return "".join([*parts, text[at:]])
