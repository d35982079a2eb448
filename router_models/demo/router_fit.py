"""Fits the demo composition's router artifact, and assigns texts to categories.

    python -m router_models.demo.router_fit --data DIR --out router_models/artifacts/demo@1

DIR holds the recorded files named in `router_models/README.md`. The fit is
deterministic. Texts are read, never stored: the artifact holds weights, a
bitmap of hashed n-grams and fingerprints of the files.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from router_models.demo.prompt_templates import DATA, library_functions, templated
from router_models.linear_models import (
    Corpus,
    calibration_error,
    design,
    featurize,
    fit_logistic,
    fit_temperature,
    inverse_document_frequency,
    known_bitmap,
    novelty,
    softmax,
)
from service.classifier.hashed_ngrams import FeatureSpec
from service.classifier.router_artifact import save_artifact

LABELS = ("general", "math", "intents", "code")
SPEC = FeatureSpec()
L2 = 2e-6
FOLDS = 5
SEED = 1

# Of CLINC150: what a person says to any chat model is no voice assistant's command,
# and sums belong to the expert for sums. One-word answers have no category of their own.
_TO_GENERAL = {
    "are_you_a_bot", "do_you_have_pets", "fun_fact", "goodbye", "greeting", "how_old_are_you",
    "meaning_of_life", "tell_joke", "thank_you", "what_are_your_hobbies", "what_can_i_ask_you",
    "what_is_your_name", "where_are_you_from", "who_do_you_work_for", "who_made_you",
    "definition", "spelling", "translate", "oos",
}  # fmt: skip
_TO_MATH = {"calculator"}
_LEFT_OUT = {"yes", "no", "maybe", "repeat", "cancel", "measurement_conversion"}
_LLMROUTER = {
    "gsm8k": "math", "math": "math", "agentverse-mgsm": "math", "mbpp": "code",
    "human_eval": "code", "natural_qa": "general", "trivia_qa": "general", "mmlu": "general",
    "openbook_qa": "general", "arc_challenge": "general", "commonsense_qa": "general",
    "agentverse-logicgrid": "general", "commongen": "general",
}  # fmt: skip
_LABELLED = {"coding": "code", "math": "math"}
_MMLU_PRO = {
    "law", "other", "health", "biology", "psychology", "philosophy", "history", "business",
    "economics",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """A labelled text and its source."""

    text: str
    label: str
    source: str


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, gzipped or not."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            yield json.loads(line)


def recorded_rows(data: Path) -> list[Row]:
    """Rows of the recorded files under `data`. Raises FileNotFoundError naming a missing one."""
    rows: list[Row] = []
    for row in read_lines(data / "gsm8k_train.jsonl.gz"):
        rows.append(Row(row["question"], "math", "gsm8k"))
    for row in read_lines(data / "clinc150.jsonl.gz"):
        intent = row["intent"]
        if intent in _LEFT_OUT:
            continue
        label = "general" if intent in _TO_GENERAL else "math" if intent in _TO_MATH else "intents"
        rows.append(Row(row["text"], label, f"clinc150/{row['split']}"))
    for row in read_lines(data / "labelled_prompts.jsonl.gz"):
        if not row["id"].startswith("gsm8k"):
            rows.append(Row(row["prompt"], _LABELLED.get(row["category"], "general"), "labelled"))
    for row in read_lines(data / "llmrouter.jsonl.gz"):
        if row["category"] in _LLMROUTER:
            rows.append(Row(row["prompt"], _LLMROUTER[row["category"]], row["category"]))
    for row in read_lines(data / "mmlu_pro_dev.jsonl.gz"):
        if row["category"] in _MMLU_PRO:
            # With its choices a question is plainly a benchmark's; without, a person's.
            text = row["prompt"] if zlib.crc32(row["id"].encode()) % 2 else _stem(row["prompt"])
            rows.append(Row(text, "general", "mmlu_pro"))
    return rows


def _stem(prompt: str) -> str:
    return prompt.split("\n(A)")[0]


def authored_rows(seed: int) -> list[Row]:
    """Rows made from our own templates and this Python's standard library."""
    rows = [Row(t, "general", "templates") for t in templated("general", 6000, seed)]
    rows += [Row(t, "code", "templates") for t in templated("code", 4000, seed)]
    rows += [Row(t, "math", "templates") for t in templated("math", 2000, seed)]
    rows += [Row(t, "intents", "templates") for t in templated("intents", 600, seed)]
    rows += [Row(t, "code", "library") for t in library_functions(3000, seed)]
    return rows


def distinct(rows: list[Row]) -> list[Row]:
    """The first of each text."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(row.text, row)
    return list(seen.values())


def balance(labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Row weights that bring the categories halfway to equal size."""
    size = np.bincount(labels, minlength=labels.max() + 1)
    return np.asarray(np.sqrt(len(labels) / np.maximum(size, 1))[labels])


@dataclass(frozen=True, slots=True)
class Model:
    """A fitted classifier: idf (buckets,), weight (buckets, labels), bias (labels,)."""

    idf: NDArray[np.float32]
    weight: NDArray[np.float64]
    bias: NDArray[np.float64]

    def logits(self, corpus: Corpus) -> NDArray[np.float64]:
        """(rows, labels)."""
        return np.asarray(design(corpus.counts, self.idf) @ self.weight + self.bias)


def fit_model(corpus: Corpus, labels: NDArray[np.int64], classes: int, l2: float) -> Model:
    """Fit idf and logistic regression on every row of `corpus`."""
    idf = inverse_document_frequency(corpus.counts)
    target = np.eye(classes)[labels]
    weight, bias = fit_logistic(
        design(corpus.counts, idf), target, l2=l2, row_weight=balance(labels)
    )
    return Model(idf, weight, bias)


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, out: Path) -> None:
    """Fit the demo router on the recorded files under DATA and write the artifact OUT."""
    rows = distinct(recorded_rows(data) + authored_rows(SEED))
    corpus = featurize([row.text for row in rows], SPEC)
    labels = np.array([LABELS.index(row.label) for row in rows])
    fold = np.array([zlib.crc32(row.text.encode("utf-8", "replace")) % FOLDS for row in rows])

    logits = np.zeros((len(rows), len(LABELS)))
    strange = np.zeros(len(rows))
    for k in range(FOLDS):
        inside, outside = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        train = corpus.take(inside)
        test = corpus.take(outside)
        model = fit_model(train, labels[inside], len(LABELS), L2)
        logits[outside] = model.logits(test)
        strange[outside] = novelty(test.marks, known_bitmap(train.marks, SPEC.known_bits))
    # Templates repeat themselves across folds, so only recorded rows calibrate and judge.
    judged = np.array([row.source not in ("templates", "library") for row in rows])
    temperature = fit_temperature(logits[judged], labels[judged])
    posterior = softmax(logits[judged] / temperature)
    truth = labels[judged]
    right = posterior.argmax(axis=1) == truth
    sources = np.array([row.source for row in rows])[judged]
    metrics = {
        "held_out": f"{FOLDS}-fold over {int(judged.sum())} recorded rows",
        "accuracy": round(float(right.mean()), 4),
        "accuracy_by_category": {
            label: round(float(right[truth == i].mean()), 4) for i, label in enumerate(LABELS)
        },
        "accuracy_by_source": {
            source: round(float(right[sources == source].mean()), 4)
            for source in sorted(set(sources.tolist()))
        },
        "ece": round(calibration_error(posterior, truth), 4),
        "log_loss": round(
            float(-np.log(posterior[np.arange(len(truth)), truth] + 1e-12).mean()), 4
        ),
        "novelty_quantiles": {
            str(q): round(float(np.quantile(strange[judged], q)), 4)
            for q in (0.5, 0.9, 0.99, 0.999)
        },
    }
    final = fit_model(corpus, labels, len(LABELS), L2)
    manifest = {
        "categories": list(LABELS),
        "classifier": {
            "features": SPEC.to_json(),
            "categories": list(LABELS),
            "calibration": {"method": "temperature", "temperature": temperature},
            "thresholds": {"min_confidence": MIN_CONFIDENCE, "max_novelty": MAX_NOVELTY},
        },
        "data": fingerprints(data),
        "rows": {label: int((labels == i).sum()) for i, label in enumerate(LABELS)},
        "metrics": metrics,
    }
    tensors: dict[str, NDArray[Any]] = {
        "classifier.idf": final.idf.astype(np.float16),
        "classifier.weight": final.weight.astype(np.float16),
        "classifier.bias": final.bias.astype(np.float32),
        "classifier.known": known_bitmap(corpus.marks, SPEC.known_bits),
    }
    save_artifact(out, manifest, tensors, card(manifest))
    click.echo(json.dumps(metrics, indent=1))


# Chosen on held-out rows: 99.9 % of them are less strange than this; below this
# confidence the top label is wrong about every second time.
MIN_CONFIDENCE = 0.5
MAX_NOVELTY = 0.4

_FILES = {
    "gsm8k_train.jsonl.gz": ("GSM8K, train questions (openai/grade-school-math)", "MIT"),
    "clinc150.jsonl.gz": ("CLINC150 (clinc/oos-eval)", "CC-BY-3.0"),
    "labelled_prompts.jsonl.gz": ("MT-Bench and Arena-Hard v2.0 prompts", "Apache-2.0"),
    "llmrouter.jsonl.gz": ("LLMRouter prompts (ulab-uiuc/LLMRouter)", "MIT"),
    "mmlu_pro_dev.jsonl.gz": ("MMLU-Pro questions (TIGER-AI-Lab/MMLU-Pro)", "Apache-2.0"),
}


def fingerprints(data: Path) -> list[dict[str, str]]:
    """SHA-256, source and licence of each file read, and of our own templates."""
    found = [
        {
            "file": name,
            "source": source,
            "licence": licence,
            "sha256": hashlib.sha256((data / name).read_bytes()).hexdigest(),
        }
        for name, (source, licence) in _FILES.items()
    ]
    own = DATA
    found.append(
        {
            "file": own.name,
            "source": "templates of this project; docstrings of Python's standard library",
            "licence": "Apache-2.0; PSF-2.0",
            "sha256": hashlib.sha256(own.read_bytes()).hexdigest(),
        }
    )
    return found


def card(manifest: dict[str, Any]) -> str:
    """The model card: what it is for, what it was made of, how good it is, what it can't do."""
    m = manifest["metrics"]
    data = "\n".join(
        f"| {d['file']} | {d['source']} | {d['licence']} | `{d['sha256'][:16]}` |"
        for d in manifest["data"]
    )
    by_category = "\n".join(
        f"| {label} | {manifest['rows'][label]} | {100 * m['accuracy_by_category'][label]:.1f} % |"
        for label in LABELS
    )
    by_source = "\n".join(
        f"| {source} | {100 * value:.1f} % |" for source, value in m["accuracy_by_source"].items()
    )
    c = manifest["classifier"]
    return f"""# demo: which of four experts a prompt is for

Stage 1 of the router of the demo composition. A multinomial logistic model over
hashed character and word n-grams, calibrated by temperature
({c["calibration"]["temperature"]:.3f}). CPU only, well under a millisecond a prompt.
Licence of the weights: Apache-2.0.

Categories: `general` (everything else, the base model's), `math` (word problems
and sums), `intents` (utterances to a voice assistant: bank, travel, home, work),
`code` (programming, mostly Python). Below a confidence of
{c["thresholds"]["min_confidence"]} or above a novelty of {c["thresholds"]["max_novelty"]}
a prompt counts as `general`.

## Data

No text is contained in the artifact, only weights and a bitmap of hashed n-grams.

| file | what | licence | SHA-256 begins |
| --- | --- | --- | --- |
{data}

Of CLINC150, small talk, definitions, spelling, translation and out-of-scope
utterances count as `general`, the calculator as `math`; yes, no, maybe, repeat,
cancel and measurement conversion are left out.

## Metrics

{m["held_out"]}: accuracy {100 * m["accuracy"]:.2f} %, expected calibration error
{m["ece"]:.4f}, log loss {m["log_loss"]:.4f}.

| category | rows | held-out accuracy |
| --- | --- | --- |
{by_category}

| source | held-out accuracy |
| --- | --- |
{by_source}

## Limits

English; other languages and scripts are mostly far from the training data and
go to `general`. Benchmarks are easier to tell apart than what people type: see
the hand-written test set in `tests/unit/classifier/test_demo_artifact.py`. Made again by
`python -m router_models.demo.router_fit --data DIR --out router_models/artifacts/demo@1`.
"""


if __name__ == "__main__":
    main()
