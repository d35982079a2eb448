"""The findings of a run on a GPU as a page of Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

_HEAD = """# On a GPU

What `python -m loadtests.gpu` found, written by that program.
"""
NOT_RUN = f"""{_HEAD}
**Not run yet.** Nobody has run it on a GPU. Whoever has one types `make setup GPU=1` and
`.venv/bin/python -m loadtests.gpu --page docs/benchmarks/gpu.md`; a quarter of an hour later this
page holds the figures.
"""


def page(run: Mapping[str, Any], found: Iterable[Mapping[str, Any]]) -> str:
    """Render the findings.

    Args:
        run: Facts of the run: date, versions, machine.
        found: The findings in their order. Each has the name of its part.
    """
    by_part: dict[str, list[Mapping[str, Any]]] = {}
    for finding in found:
        by_part.setdefault(str(finding["part"]), []).append(finding)
    lines = [_HEAD, *(f"- {name}: {_shown(value)}" for name, value in run.items()), ""]
    for part, findings in by_part.items():
        lines += [f"## {part}", "", "| finding | figure |", "| --- | --- |"]
        for finding in findings:
            title = str(finding.get("what", part))
            rest = {k: v for k, v in finding.items() if k not in ("part", "what")}
            lines += [
                f"| {_cell(title)}: {_cell(name)} | {_cell(_shown(value))} |"
                for name, value in _flat(rest)
            ]
        lines.append("")
    return "\n".join(lines)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
