"""Pins a config's models of the hub to commits. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import yaml


def pin_models(text: str, pinned: Mapping[str, str]) -> str:
    """Replace the models in a config's text; everything else stays, including comments.

    Args:
        text: The config file.
        pinned: Model as the config names it → the same model with its commit.
    """
    root = yaml.compose(text, yaml.SafeLoader)
    places = {
        (node.start_mark.index, node.end_mark.index, node.style or "", node.value)
        for node in _models(root)
        if node.value in pinned
    }
    for begin, end, style, value in sorted(places, reverse=True):
        text = f"{text[:begin]}{style}{pinned[value]}{style}{text[end:]}"
    return text


def _models(root: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Yield the values of `experts.*.model`, including those from merge keys."""
    for key, experts in _pairs(root):
        if key == "experts":
            for _, expert in _pairs(experts):
                yield from _own_model(expert)


def _own_model(expert: yaml.Node) -> Iterator[yaml.ScalarNode]:
    if isinstance(expert, yaml.SequenceNode):  # several maps, merged
        for merged in expert.value:
            yield from _own_model(merged)
    for key, value in _pairs(expert):
        if key == "model" and isinstance(value, yaml.ScalarNode):
            yield value
        elif key == "<<":
            yield from _own_model(value)


def _pairs(node: yaml.Node | None) -> Iterator[tuple[str, yaml.Node]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key.value, value
