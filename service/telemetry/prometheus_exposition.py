"""Prometheus text exposition, and merging the expositions of several processes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FAMILY = re.compile(r"^# HELP (\S+) ", re.MULTILINE)


class _Labelled(Collector):
    """Adds labels to each sample of another collector."""

    def __init__(self, inner: Collector, labels: Mapping[str, str]) -> None:
        self._inner = inner
        self._labels = labels

    def collect(self) -> Iterable[Metric]:
        for family in self._inner.collect():
            labelled = Metric(family.name, family.documentation, family.type)
            labelled.samples = [
                sample._replace(labels={**sample.labels, **self._labels})
                for sample in family.samples
            ]
            yield labelled


def text_of(collectors: Iterable[tuple[Collector, Mapping[str, str]]]) -> str:
    """Render one process's metrics; each collector's labels are added to its samples.

    With engines this takes milliseconds, so call it outside the event loop.
    """
    texts = []
    for collector, labels in collectors:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Labelled(collector, labels))
        texts.append(generate_latest(registry).decode())
    return join(texts)


def join(texts: Iterable[str]) -> str:
    """Merge several expositions into one, with each metric family once.

    Prometheus requires each family to appear once. The samples stay unchanged, because the
    processes' labels differ.
    """
    families: dict[str, list[str]] = {}
    for text in texts:
        starts = [(match.start(), match[1]) for match in _FAMILY.finditer(text)]
        for i, (start, name) in enumerate(starts):
            end = starts[i + 1][0] if i + 1 < len(starts) else len(text)
            block = text[start:end]
            known = families.get(name)
            if known is None:
                families[name] = [block]
            else:
                # Without its HELP and TYPE lines.
                known.append(block.split("\n", 2)[2])
    return "".join(part for parts in families.values() for part in parts)
