"""The config reference, made from the schema: `python -m service.docs` prints it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from service import config

_SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("(top level)", config.Config),
    ("server", config.ServerConfig),
    ("router", config.RouterConfig),
    ("experts.NAME", config.ExpertConfig),
    ("experts.NAME.remote", config.RemoteConfig),
    ("pools.KIND", config.PoolConfig),
    ("pools.KIND.vllm", config.VllmOptions),
    ("pools.KIND.swap", config.SwapOptions),
    ("pools.KIND.simulated", config.SimulatedOptions),
)


def reference() -> str:
    """Every field with its default and description, as Markdown."""
    parts = []
    for path, model in _SECTIONS:
        parts.append(f"### `{path}`\n\n{(model.__doc__ or '').strip()}\n")
        parts.append("| key | default | meaning |\n| --- | --- | --- |")
        for name, field in model.model_fields.items():
            meaning = (field.description or "see below").replace("|", "\\|")
            parts.append(f"| `{name}` | {_default(field)} | {meaning} |")
        parts.append("")
    return "\n".join(parts)


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
