"""The generated reference documents match the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from click.testing import CliRunner

from service.cli import cli
from service.cli.reference import DOCUMENTS, metrics_reference, write_documents
from service.config import SECTIONS, parse_config
from service.config.section_base import Section
from service.telemetry.metric_declarations import METRICS

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_reference_document_in_the_checkout_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text() == DOCUMENTS[name](), "run `python -m service.cli.reference`"


def test_write_documents_twice_changes_nothing_the_second_time(tmp_path: Path) -> None:
    assert sorted(write_documents(tmp_path)) == sorted(DOCUMENTS)
    assert write_documents(tmp_path) == []


def test_metrics_reference_has_a_row_for_every_metric() -> None:
    text = metrics_reference()
    assert all(f"| `{metric.name}` |" in text for metric in METRICS)


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a key's type may hold, by name or as itself."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections_in(part)]


def test_every_section_of_the_config_is_listed_as_a_section() -> None:
    listed = set(SECTIONS.values())
    for place, model in SECTIONS.items():
        for name, field in model.model_fields.items():
            for inner in sections_in(field.annotation):
                assert inner in listed, (*place, name)


def test_reference_config_names_every_key_and_is_yaml_once_uncommented() -> None:
    lines = (ROOT / "deploy/config/reference.yaml").read_text().splitlines()
    start = lines.index("")
    shown = [line[2:] for line in lines[start:] if line.startswith("# ")]
    parsed = yaml.safe_load("\n".join(shown))
    for place, model in SECTIONS.items():
        node = parsed
        for part in place:
            key = part if part != "*" else next(iter(node))
            node = node[key]
        assert set(model.model_fields) <= set(node), place


def test_config_schema_accepts_what_the_parser_accepts() -> None:
    printed = CliRunner().invoke(cli, ["config", "schema"])
    assert printed.exit_code == 0
    schema = json.loads(printed.output)
    text = (ROOT / "deploy/config/demo.yaml").read_text()
    assert parse_config(text, "demo.yaml")
    assert set(yaml.safe_load(text)) <= set(schema["properties"])
    assert schema["additionalProperties"] is False
