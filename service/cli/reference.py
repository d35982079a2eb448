"""The config reference, made from the schema, and the table of metrics, from theirs.

`python -m service.cli.reference` prints the first, `python -m service.cli.reference metrics` the second.
"""

from __future__ import annotations

import sys
from typing import Any

from pydantic_core import PydanticUndefined

from service.config import SECTIONS
from service.telemetry import metrics as table
from service.telemetry.labels import LABELS


def reference() -> str:
    """Every field with its default and description, as Markdown."""
    parts = []
    for place, model in SECTIONS.items():
        path = _path(place)
        parts.append(f"### `{path}`\n\n{(model.__doc__ or '').strip()}\n")
        parts.append("| key | default | meaning |\n| --- | --- | --- |")
        for name, field in model.model_fields.items():
            meaning = (field.description or "see below").replace("|", "\\|")
            parts.append(f"| `{name}` | {_default(field)} | {meaning} |")
        parts.append("")
    return "\n".join(parts)


def _path(place: tuple[str, ...]) -> str:
    """`experts.NAME.remote` for ("experts", "*", "remote")."""
    named = {"pools": "KIND"}
    parts = [
        named.get(place[i - 1], "NAME") if part == "*" else part for i, part in enumerate(place)
    ]
    return ".".join(parts) or "(top level)"


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    if field.default_factory is not None:
        return "see below"
    if field.default is PydanticUndefined or field.default is None:
        return "none"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    if isinstance(field.default, tuple):
        return f"`[{', '.join(map(str, field.default))}]`"
    return f"`{field.default}`"


def metrics() -> str:
    """Every metric that the service declares, and what bounds its labels, as Markdown."""
    parts = []
    for group, declared in table.GROUPS.items():
        parts.append(f"### {group}\n")
        parts.append(
            "| metric | kind | process | labels | meaning |\n| --- | --- | --- | --- | --- |"
        )
        for one in declared:
            labels = ", ".join(f"`{label}`" for label in one.labels)
            parts.append(
                f"| `{one.name}` | {one.kind} | {one.side} | {labels} | {_cell(one.meaning)} |"
            )
        parts.append("")
    parts.append("### Labels\n\n| label | values |\n| --- | --- |")
    parts += [f"| `{label}` | {_cell(bound)} |" for label, bound in LABELS.items()]
    parts.append("")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(metrics() if sys.argv[1:] == ["metrics"] else reference())
