"""The config reference, made from the schema: `python -m service.docs` prints it."""

from __future__ import annotations

from typing import Any

from pydantic_core import PydanticUndefined

from service.config import SECTIONS


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
    named = {"experts": "NAME", "pools": "KIND"}
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


if __name__ == "__main__":
    print(reference())
