"""Judges a general router on prompts that it was not fitted on, and on other forms of them.

    python -m router_models.general.router_evaluation --artifact router_models/artifacts/general@2

The held-out prompts (`test/`) are by another author than those of the fit; those in further
languages (`test/same-team/`) are by the same team, and counted apart. Each stage is judged alone
with those before it: n-grams and static table, and as it is served, with the encoder asked where
these are unsure.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from router_models.general.held_out_prompts import (
    held_out_prompts,
    paraphrases,
    same_team_prompts,
)
from router_models.general.perturbations import perturbed_pairs
from router_models.linear_models import top_error
from router_models.stage_fit import encode
from service.classifier.classifier import GENERAL, Classifier
from service.classifier.router_artifact import Artifact, load_artifact
from service.classifier.static_embedding_table import StaticTable, table_of
from service.encoder.onnx_encoder import OnnxEncoder
from service.errors import CoeError
from service.models.encoder_store import require_encoder
from service.types import CategoryScores

WHEN_BELOW = 0.8
"""The encoder is asked below this confidence, as the config's default says."""
FEW_EXPERTS = {
    "math-word-problems": "math",
    "symbolic-math": "math",
    "commands": "intents",
    "coding": "code",
    "shell-sql": "code",
}
"""The demo's experts by category; all other prompts go to its fourth, `general`."""
_GIVEN_UP = (0.05, 0.1, 0.2, 0.3)
_BARS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.01)
_SEED = 0


@dataclass(frozen=True, slots=True)
class Answers:
    """What each stage says of some texts.

    Attributes:
        first: By n-grams and static table.
        both: By the encoder as well.
    """

    first: list[CategoryScores]
    both: list[CategoryScores]

    def served(self, bar: float = WHEN_BELOW) -> list[CategoryScores]:
        """What is served: the encoder is asked below a confidence, and where the first gave up."""
        return [b if _is_unsure(a, bar) else a for a, b in zip(self.first, self.both, strict=True)]

    def asked(self, bar: float) -> float:
        """Share of texts that reach the encoder."""
        return sum(_is_unsure(a, bar) for a in self.first) / max(len(self.first), 1)


def _is_unsure(first: CategoryScores, bar: float) -> bool:
    return first.confidence < bar or (bar > 0 and first.stage == GENERAL)


def answers(
    artifact: Artifact, table: StaticTable, encoder: OnnxEncoder, texts: Sequence[str]
) -> Answers:
    """Classify texts by every stage."""
    classifier = Classifier.from_artifact(artifact, table)
    vectors = encode(encoder, texts)

    def say(text: str, vector: NDArray[np.float32] | None) -> CategoryScores:
        found = classifier.read(text, vector)
        return classifier.decide(found.posterior, found.novelty, found.stage)

    return Answers(
        [say(text, None) for text in texts],
        [say(text, vector) for text, vector in zip(texts, vectors, strict=True)],
    )


def judge_artifact(artifact: Artifact, table: StaticTable, encoder: OnnxEncoder) -> dict[str, Any]:
    """Judge an artifact on the held-out prompts and on pairs of forms.

    Raises:
        HeldOutError: The held-out prompts are missing; wheels don't hold them.
    """
    prompts = held_out_prompts()
    found = answers(artifact, table, encoder, [p.prompt for p in prompts])
    truth = [p.category for p in prompts]
    languages = [p.language for p in prompts]
    stages = {"static": found.first, "encoder": found.served()}
    pairs = perturbed_pairs(prompts, paraphrases(), _SEED)
    before = answers(artifact, table, encoder, [p.original.prompt for p in pairs])
    after = answers(artifact, table, encoder, [p.prompt for p in pairs])
    kinds = [p.kind for p in pairs]
    forms = {
        "static": (before.first, after.first),
        "encoder": (before.served(), after.served()),
    }
    changes = {name: unchanged(*both, kinds) for name, both in forms.items()}
    experts = {name: unchanged(*both, kinds, FEW_EXPERTS) for name, both in forms.items()}
    others = same_team_prompts()
    said = answers(artifact, table, encoder, [p.prompt for p in others])
    same_team = {
        name: measured(scores, [p.category for p in others], [p.language for p in others])
        for name, scores in (("static", said.first), ("encoder", said.served()))
    }
    return {
        "prompts": len(prompts),
        "when_below": WHEN_BELOW,
        "asked": round(found.asked(WHEN_BELOW), 4),
        "stages": {
            name: measured(scores, truth, languages)
            | {
                "unchanged": changes[name],
                "unchanged_expert": experts[name],
                "giving_up": giving_up(scores, truth),
            }
            for name, scores in stages.items()
        },
        "curve": [
            {
                "when_below": min(bar, 1.0),
                "asked": round(found.asked(bar), 4),
                "accuracy": measured(found.served(bar), truth, languages)["accuracy"],
            }
            for bar in _BARS
        ],
        "confusion": confusion(found.served(), truth),
        "same_team": {
            "prompts": len(others),
            "stages": {
                name: {key: stage[key] for key in ("accuracy", "ece", "by_language")}
                for name, stage in same_team.items()
            },
        },
    }


def measured(
    scores: Sequence[CategoryScores], truth: Sequence[str], languages: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, calibration error and what counts as `general`.

    Accuracies are of prompts with a category; one that counts as `general` is wrong.
    """
    right = np.array([s.category == t for s, t in zip(scores, truth, strict=True)])
    known = np.array([t != GENERAL for t in truth])
    given_up = np.array([s.category == GENERAL for s in scores])
    sure = np.array([s.confidence for s in scores])
    top = np.array([s.labels[int(np.argmax(s.probabilities))] for s in scores]) == np.array(truth)
    wrong_and_sure = known & ~right & ~given_up & (sure >= 0.9)

    def groups(names: Sequence[str], among: NDArray[np.bool_]) -> dict[str, list[float]]:
        each = np.array(names)
        return {
            name: interval(
                int(right[among & (each == name)].sum()), int((among & (each == name)).sum())
            )
            for name in sorted(set(each[among].tolist()))
        }

    return {
        "accuracy": interval(int(right[known].sum()), int(known.sum())),
        "ece": round(top_error(sure[known], top[known]), 4),
        "unknown_to_general": interval(int(given_up[~known].sum()), int((~known).sum())),
        "known_to_general": interval(int(given_up[known].sum()), int(known.sum())),
        "wrong_above_0.9": interval(int(wrong_and_sure.sum()), int(known.sum())),
        "by_category": groups(truth, known),
        "by_language": groups(languages, known),
    }


def giving_up(scores: Sequence[CategoryScores], truth: Sequence[str]) -> list[dict[str, float]]:
    """What more prompts of no category that get `general` cost.

    A prompt gets `general` as it is served, and also where the probability of `general` is above a
    bar. Each point has that bar, the shares of prompts of no category and of a category that get
    `general`, and the accuracy on the latter.
    """
    known = np.array([t != GENERAL for t in truth])
    p = np.array(
        [dict(zip(s.labels, s.probabilities, strict=True)).get(GENERAL, 0) for s in scores]
    )
    found = []
    for bar in (1.0, *reversed(_GIVEN_UP)):
        given = [GENERAL if q > bar else s.category for s, q in zip(scores, p, strict=True)]
        up = np.array([category == GENERAL for category in given])
        right = np.array([category == t for category, t in zip(given, truth, strict=True)])
        shares = (up[~known], up[known], right[known])
        unknown, lost, accuracy = (round(float(x.mean()), 4) if len(x) else 0.0 for x in shares)
        found.append({"above": bar, "unknown": unknown, "known": lost, "accuracy": accuracy})
    return found


def unchanged(
    before: Sequence[CategoryScores],
    after: Sequence[CategoryScores],
    kinds: Sequence[str],
    experts: Mapping[str, str] | None = None,
) -> dict[str, list[float]]:
    """Share of pairs that get the same expert, of all kinds and of each.

    Args:
        before: The scores of the prompts.
        after: The scores of their other forms.
        kinds: How each pair differs.
        experts: Category to expert, where one is not named: `general`. None: each category has an
            expert of its own.
    """

    def expert(scores: CategoryScores) -> str:
        return scores.category if experts is None else experts.get(scores.category, GENERAL)

    same = np.array([expert(a) == expert(b) for a, b in zip(before, after, strict=True)])
    kind = np.array(kinds)
    found = {"all": interval(int(same.sum()), len(same))}
    for name in dict.fromkeys(kinds):
        found[name] = interval(int(same[kind == name].sum()), int((kind == name).sum()))
    return found


def interval(right: int, count: int) -> list[float]:
    """Share, and the ends of its 95 % interval (Wilson, 1927), rounded; zeros for no prompts."""
    if not count:
        return [0.0, 0.0, 0.0]
    z, p = 1.96, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * (p * (1 - p) / count + z * z / (4 * count * count)) ** 0.5
    return [round(x, 4) for x in (p, max(0.0, middle - half), min(1.0, middle + half))]


def confusion(scores: Sequence[CategoryScores], truth: Sequence[str]) -> dict[str, dict[str, int]]:
    """Prompts of each category by the category that they were given."""
    found: dict[str, dict[str, int]] = {}
    for score, want in zip(scores, truth, strict=True):
        row = found.setdefault(want, {})
        row[score.category] = row.get(score.category, 0) + 1
    return dict(sorted(found.items()))


def readable(tested: dict[str, Any]) -> list[str]:
    """The result as lines."""
    lines = [
        f"{tested['prompts']} held-out prompts, {100 * tested['asked']:.0f} % reach the encoder"
    ]
    for name, stage in tested["stages"].items():
        lines += [
            f"{name}: accuracy {percent(stage['accuracy'])}, calibration error {stage['ece']:.3f}",
            f"  unknown to general {percent(stage['unknown_to_general'])}, "
            f"known to general {percent(stage['known_to_general'])}, "
            f"wrong with 0.9 or more {percent(stage['wrong_above_0.9'])}",
            "  unchanged: " + ", ".join(f"{k} {percent(v)}" for k, v in stage["unchanged"].items()),
            "  unchanged, four experts: "
            + ", ".join(f"{k} {percent(v)}" for k, v in stage["unchanged_expert"].items()),
            "  " + ", ".join(f"{k} {percent(v)}" for k, v in stage["by_language"].items()),
        ]
    lines.append(f"{tested['same_team']['prompts']} held-out prompts by the team of the fit")
    for name, stage in tested["same_team"]["stages"].items():
        lines += [
            f"{name}: accuracy {percent(stage['accuracy'])}, calibration error {stage['ece']:.3f}",
            "  " + ", ".join(f"{k} {percent(v)}" for k, v in stage["by_language"].items()),
        ]
    return lines


def percent(given: Sequence[float]) -> str:
    """A share with its interval in percent."""
    share, low, high = (100 * x for x in given)
    return f"{share:.1f} % ({low:.0f} to {high:.0f})"


@click.command()
@click.option(
    "--artifact",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(__file__).parents[1] / "artifacts" / "general@2",
)
@click.option("--encoder", default="use-multilingual-v3", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(artifact: Path, encoder: str, as_json: bool) -> None:
    """Judge ARTIFACT on the held-out prompts and on pairs of forms."""
    try:
        loaded = OnnxEncoder(require_encoder(encoder))
        read = load_artifact(artifact)
        table = table_of(read)
        if table is None:
            raise click.ClickException(f"{read.name} was fitted without a static table")
        found = judge_artifact(read, table, loaded)
    except CoeError as error:
        raise click.ClickException(error.message) from error
    click.echo(json.dumps(found) if as_json else "\n".join(readable(found)))


if __name__ == "__main__":
    main()
