"""`coe router try`: how well a config's categories are told apart, from examples held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from router_models.labelled_prompt_reader import prompt_files, read_prompts
from router_models.stage_fit import encode
from service.classifier.built_in_artifact import encoder_for
from service.classifier.example_classifier import (
    ExampleClassifier,
    ExampleVectors,
    confusion,
    example_texts,
    example_vectors,
    fit_head,
    held_out,
    joint_temperature,
)
from service.classifier.linear_heads import Head
from service.classifier.router_artifact import load_artifact
from service.classifier.static_embedding_table import BUILT_IN, StaticTable
from service.config import Config, load_config
from service.config.router import NO_ARTIFACT
from service.encoder.onnx_encoder import OnnxEncoder
from service.errors import ConfigError
from service.models.encoder_store import require_encoder


def run(path: Path, *, encoder: str | None = None, test: Sequence[Path] = ()) -> dict[str, Any]:
    """Judge the categories of a config by each stage.

    Without `test` every example is judged by the others, with it these prompts are judged by all.

    Raises:
        ConfigError: The config is wrong, or has no categories.
        OutcomeError: A test file is wrong.
        ArtifactError: The encoder can't be used.
        ModelStoreError: There is no such encoder.
    """
    config = load_config(path)
    if not config.categories:
        raise ConfigError(f"{path}: there are no `categories` with examples to try")
    names = tuple(config.categories)
    table = StaticTable.load(BUILT_IN)
    stages: dict[str, ExampleVectors] = {}
    if config.router.static:
        texts = example_texts(config.categories)
        vectors = np.stack([table.embed(text) for text in texts])
        stages["static"] = example_vectors(config.categories, vectors, table.within)
    model = encoder or _encoder_of(config)
    loaded = OnnxEncoder(require_encoder(model)) if model is not None else None
    if loaded is not None:
        stages["encoder"] = example_vectors(
            config.categories, encode(loaded, example_texts(config.categories))
        )
    if test:
        return _tested(names, stages, table, loaded, test)
    found: dict[str, Any] = {"categories": list(names), "held_out": "examples", "stages": {}}
    for stage, given in stages.items():
        logits, _ = held_out(given)
        found["stages"][stage] = {
            "accuracy": float((logits.argmax(axis=1) == given.category).mean()),
            "confusion": confusion(names, logits, given.category),
        }
    return found


def _encoder_of(config: Config) -> str | None:
    """The config's encoder, or that of its artifact; None where it has none."""
    if config.router.encoder is None:
        return None
    path = config.router.artifact
    artifact = None if path is None or path == NO_ARTIFACT else load_artifact(path)
    return encoder_for(config.router.encoder.model, artifact)


def _tested(
    names: tuple[str, ...],
    stages: dict[str, ExampleVectors],
    table: StaticTable,
    encoder: OnnxEncoder | None,
    test: Sequence[Path],
) -> dict[str, Any]:
    rows, _ = read_prompts(prompt_files(test))
    heads: dict[str, Head] = {stage: fit_head(given) for stage, given in stages.items()}
    found: dict[str, Any] = {"categories": list(names), "held_out": "test", "stages": {}}
    for stage in stages:
        both = stage == "encoder" and "static" in stages
        classifier = ExampleClassifier(
            names,
            table,
            heads.get("static"),
            heads["encoder"] if stage == "encoder" else None,
            joint=joint_temperature(stages["static"], stages["encoder"]) if both else 1.0,
        )
        vectors = (
            encode(encoder, [row.prompt for row in rows])
            if stage == "encoder" and encoder is not None
            else None
        )
        table_of: dict[str, dict[str, int]] = {}
        right = 0
        for i, row in enumerate(rows):
            read = classifier.read(row.prompt, None if vectors is None else vectors[i])
            given = classifier.decide(read.posterior, read.novelty, read.stage).category
            right += given == row.category
            line = table_of.setdefault(row.category, {})
            line[given] = line.get(given, 0) + 1
        found["stages"][stage] = {"accuracy": right / len(rows), "confusion": table_of}
    return found


def readable(result: dict[str, Any]) -> list[str]:
    """The result as lines: for each stage its accuracy and its confusion table."""
    lines: list[str] = []
    for stage, found in result["stages"].items():
        lines.append(f"{stage}: {100 * found['accuracy']:.1f} % right ({result['held_out']})")
        width = max(len(name) for name in found["confusion"])
        for want, row in found["confusion"].items():
            total = sum(row.values())
            ranked = sorted(((n, other) for other, n in row.items() if n), reverse=True)
            cells = ", ".join(f"{other} {n}" for n, other in ranked)
            share = 100 * row.get(want, 0) / max(total, 1)
            lines.append(f"  {want:{width}s} {share:5.1f} %  {cells}")
        lines.append("")
    return lines[:-1]
