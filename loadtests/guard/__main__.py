"""`python -m loadtests.guard`: Measures what the shipped screens find, and their cost.

The figures show what the screens find, not that this is enough: the authors of the screens also
wrote both sets of prompts.
"""

from __future__ import annotations

import asyncio
import sys
import time

from loadtests.guard.labelled_prompts import ATTACKS, HARMLESS, PERSONAL, fitted, held_out
from loadtests.lib.command_line import parser, tell
from loadtests.lib.targets_and_report import Report, Table, TargetCheck
from service.gateway.guard.injection_screen import InjectionScreen
from service.gateway.guard.pii_screen import PiiScreen
from service.gateway.guard.screen_interface import Text

_KINDS = ("email", "phone", "card", "iban", "ssn", "ip", "secret")
_THRESHOLD = 0.5
_CHARACTERS = 2000
_ROUNDS = 50
_MS = 5.0


async def _share(screen: InjectionScreen, prompts: tuple[str, ...]) -> float:
    """Return the share of prompts that score at least the default threshold."""
    looks = [await screen.look([Text(item, trusted=False)]) for item in prompts]
    return sum(item.score >= _THRESHOLD for item in looks) / len(prompts)


async def measure() -> Report:
    """Every figure."""
    report = Report("guard")
    injection, personal = InjectionScreen(), PiiScreen(_KINDS)
    table = Table("Injection screen", ("prompts", "attacks caught", "harmless taken for attacks"))
    for name, half in (("fitted to", fitted), ("held out", held_out)):
        caught, wrong = (
            await _share(injection, half(ATTACKS)),
            await _share(injection, half(HARMLESS)),
        )
        table.rows.append((name, f"{caught:.0%}", f"{wrong:.0%}"))
        report.facts[name.replace(" ", "_")] = {"caught": caught, "wrong": wrong}
    report.tables.append(table)
    right = 0
    kinds = Table("Personal data", ("text", "in it", "found"))
    for text, inside in PERSONAL:
        found = frozenset((await personal.look([Text(text, trusted=False)])).kinds)
        right += found == inside
        if found != inside:
            named = [", ".join(sorted(item)) or "nothing" for item in (inside, found)]
            kinds.rows.append((text, *named))
    report.tables.append(kinds)
    report.facts["personal_right"] = right / len(PERSONAL)
    report.notes.append(
        f"{right} of {len(PERSONAL)} texts had exactly the kinds found that are in it."
    )
    prose = (" ".join(HARMLESS) * 2)[:_CHARACTERS]
    times_ms = []
    for _ in range(_ROUNDS):
        began_s = time.perf_counter()
        await injection.look([Text(prose, trusted=False)])
        await personal.look([Text(prose, trusted=False)])
        times_ms.append((time.perf_counter() - began_s) * 1000)
    median_ms = sorted(times_ms)[_ROUNDS // 2]
    name = f"ms for both screens on {_CHARACTERS} characters, at most"
    report.reach.append(TargetCheck(name, _MS, round(median_ms, 3), median_ms <= _MS))
    return report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    given = parser("guard", __doc__).parse_args()
    return tell(lambda _: asyncio.run(measure()), as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
