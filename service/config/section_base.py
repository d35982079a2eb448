"""Base class and common types of the config's sections."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

GIB = 1024**3
ENV_VARIABLE_PATTERN = r"^[A-Z_][A-Z0-9_]{0,63}$"
_BYTES = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)?\s*$", re.IGNORECASE)
_BYTE_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for base, suffixes in ((1000, ("b", "")), (1024, ("ib", "i")))
    for suffix in suffixes
}


def parse_bytes(value: object) -> object:
    """Convert `"512MiB"`, `"2 GB"` or a plain number to bytes; leave the rest to pydantic."""
    if isinstance(value, str):
        match = _BYTES.match(value)
        if match is None:
            raise ValueError(
                'input should be a number of bytes, or one with a unit such as "512MiB" or "2GB", '
                f"not {shown(value)}"
            )
        return int(float(match[1]) * _BYTE_UNITS[(match[2] or "").lower()])
    return value


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}$")]


def is_path(source: str) -> bool:
    """Return whether a model's source is a path: it begins with ./, ../, / or ~.

    Other names never refer to the working directory.
    """
    return source in (".", "..") or source.startswith(("./", "../", "/", "~"))


def shown(value: object) -> str:
    """Format a value for an error, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
