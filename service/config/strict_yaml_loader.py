"""A strict YAML loader for config files.

YAML 1.1, which PyYAML reads, takes `no` and `on` for booleans, `1:30` for 90 and `010` for 8. This
loader follows the core schema of YAML 1.2 instead, and keeps the merge keys (`<<`) of 1.1. Keys are
always strings, so an expert may have the name `no`, `1.5` or `7`. Duplicate keys are errors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

_MERGE = "tag:yaml.org,2002:merge"
_RULES: tuple[tuple[str, str, str], ...] = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("merge", r"<<", "<"),
)


class ConfigLoader(yaml.SafeLoader):
    """The safe loader with these rules; it refuses duplicate keys and a second document."""

    # PyYAML keeps resolvers in a dictionary on the class; this class starts with an empty one.
    yaml_implicit_resolvers = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Check a mapping's keys before merge keys add others."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a name, not a list or a mapping", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
            if key.tag != _MERGE:
                key.tag = "tag:yaml.org,2002:str"
        return node

    def construct_int(self, node: yaml.ScalarNode) -> int:
        """Convert a decimal, octal (0o) or hexadecimal (0x) number."""
        text = self.construct_scalar(node)
        if len(text) > 4000:
            raise yaml.constructor.ConstructorError(
                None, None, "a number of more than 4,000 digits", node.start_mark
            )
        return int(text, 0)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        """Convert a number, also `.inf`, `.nan`, and 1e3 without a point."""
        text = self.construct_scalar(node).lower()
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))


for _kind, _pattern, _firsts in _RULES:
    ConfigLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}",
        re.compile(f"(?:{_pattern})$"),
        [*_firsts, ""] if _kind == "null" else [*_firsts],
    )
ConfigLoader.add_constructor("tag:yaml.org,2002:int", ConfigLoader.construct_int)
ConfigLoader.add_constructor("tag:yaml.org,2002:float", ConfigLoader.construct_float)


class ConfigDumper(yaml.SafeDumper):
    """The safe dumper, which also quotes texts that `ConfigLoader` would read as something else."""

    # A text that any of these matches is quoted.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [
            *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
            *ConfigLoader.yaml_implicit_resolvers.get(first, []),
        ]
        for first in {
            *yaml.SafeDumper.yaml_implicit_resolvers,
            *ConfigLoader.yaml_implicit_resolvers,
        }
    }


def written_at(text: str, place: Sequence[int | str]) -> str | None:
    """Return a value that is not a string as the file has it; None if it can't be found.

    Errors need it: `3.10` arrives as 3.1, which the user would not recognise.
    """
    node = _node_at(text, place)
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":str"):
        return None
    return str(node.value)


def line_of(text: str, place: Sequence[int | str]) -> int | None:
    """Return the line, from 1, on which a value begins; None if it can't be found."""
    node = _node_at(text, place)
    return None if node is None else int(node.start_mark.line) + 1


def _node_at(text: str, place: Sequence[int | str]) -> yaml.Node | None:
    try:
        node = yaml.compose(text, ConfigLoader)
    except yaml.YAMLError:
        return None
    for part in place:
        if isinstance(node, yaml.MappingNode):
            node = next((value for key, value in node.value if key.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part] if part < len(node.value) else None
        else:
            return None
    return node
