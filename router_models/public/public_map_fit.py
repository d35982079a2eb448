"""Fits the map of public models on MMLU-Pro's recorded outcomes.

    python -m router_models.public.public_map_fit --data DIR --classifier A@1 --out public@1

DIR has `mmlu_pro_dev.jsonl.gz`: prompts of MMLU-Pro with the outcomes of models, from the
benchmark's own `eval_results` (Apache-2.0). The texts are read, never stored. `--out` gets the
artifact, the models as the base config of `coe compose` (`experts.yaml`), and their sizes
(`sizes.json`).
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import yaml

from router_models import expert_map_for_classifier
from service.http.token_usage import estimate_tokens

FILE = "mmlu_pro_dev.jsonl.gz"
SOURCE = "MMLU-Pro, eval_results (TIGER-AI-Lab/MMLU-Pro), half of the questions; Apache-2.0"
MODELS = Path(__file__).with_name("models.yaml")
FALLBACK = "small"
# The pools that compositions are made from. The smallest context among the models is 4,096 tokens.
# `pair` is for models that need two accelerators.
_GPU = {"dtype": "bfloat16", "max_model_len": 4096, "max_num_seqs": 64}
POOLS = {
    "gpu": {
        "gpus": 1,
        "swap": {"method": "sleep", "min_stay_s": 10, "max_wait_s": 60},
        "vllm": _GPU,
    },
    "pair": {"gpus": 2, "vllm": {**_GPU, "tensor_parallel_size": 2, "max_num_seqs": 256}},
    "cpu": {
        "vllm": {
            "dtype": "bfloat16",
            "max_model_len": 4096,
            "kv_cache_bytes": "4GiB",
            "max_num_seqs": 32,
            "enforce_eager": True,
        },
    },
}
# Characters of a token of English, and bytes of a parameter of bfloat16.
_CHARS = 4.0
_BYTES = 2


@dataclass(frozen=True, slots=True)
class PublicModel:
    """A public model.

    Attributes:
        recorded: Its name in the recorded outcomes.
        model: Its name on the hub.
        licence: Its licence.
        parameters: Billions of parameters.
        active: Billions of parameters that a token uses.
        description: For the config.
    """

    recorded: str
    model: str
    licence: str
    parameters: float
    active: float
    description: str


def read_models(path: Path = MODELS) -> dict[str, PublicModel]:
    """Read the models by the names of their experts."""
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: PublicModel(**one) for name, one in given.items()}


def outcome_rows(file: Path, models: Mapping[str, PublicModel]) -> Iterator[dict[str, Any]]:
    """Yield the rows with the experts' names and costs, in the units of the default prices.

    An answer costs its model's active parameters for each token of prompt and answer. Tokens are
    estimated from characters, also for the map's lengths of answers. Questions come without their
    choices, because a question with ten choices looks to a classifier like work on a given text.
    """
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            question = stem(row["prompt"])
            # As the gateway counts it: a model's own template is not recorded.
            asked_tokens = 1 + estimate_tokens(len(question.encode()))
            outcomes = {}
            for name, model in models.items():
                given = row["outcomes"].get(model.recorded)
                if given is None:
                    continue
                answer_chars = given.get("output_chars", 0)
                tokens = (len(row["prompt"]) + answer_chars) / _CHARS
                outcomes[name] = {
                    "score": given["score"],
                    "answer": given.get("answer"),
                    "cost": model.active * tokens / 1e6,
                    "prompt_tokens": asked_tokens,
                    "completion_tokens": round(answer_chars / _CHARS),
                }
            yield {
                "id": row["id"],
                "prompt": question,
                "category": row["category"],
                "outcomes": outcomes,
            }


def stem(prompt: str) -> str:
    """A question without its choices, as a person would ask it."""
    return prompt.split("\n(A)")[0]


def experts_config(models: Mapping[str, PublicModel]) -> str:
    """The base config of the models, as YAML."""
    experts = {
        name: {
            "model": one.model,
            "description": one.description,
            "price": {"prompt": one.active, "completion": one.active},
        }
        for name, one in models.items()
    }
    data = {
        "router": {"artifact": ".", "fallback": FALLBACK},
        "experts": experts,
        "pools": POOLS,
    }
    licences = "".join(f"#   {name}: {one.model}, {one.licence}\n" for name, one in models.items())
    return (
        "# Public models with open licences; `coe init` and `coe compose` buy of them.\n"
        f"{licences}" + yaml.safe_dump(data, sort_keys=False)
    )


def sizes(models: Mapping[str, PublicModel]) -> dict[str, int]:
    """Bytes of each model's weights in bfloat16."""
    return {name: int(one.parameters * 1e9) * _BYTES for name, one in models.items()}


@click.command()
@click.option(
    "--data", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True
)
@click.option(
    "--classifier", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(data: Path, classifier: Path, out: Path) -> None:
    """Fit the map on the recorded outcomes under DATA, for the categories of CLASSIFIER."""
    models = read_models()
    with tempfile.TemporaryDirectory() as folder:
        # The rows of these models alone, named as the file that they come from.
        rows = Path(folder) / FILE.removesuffix(".gz")
        with rows.open("w", encoding="utf-8") as file:
            for row in outcome_rows(data / FILE, models):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        expert_map_for_classifier.run(
            classifier=classifier, outcomes=[rows], out=out, source=SOURCE, say=click.echo
        )
    (out / "experts.yaml").write_text(experts_config(models), encoding="utf-8")
    (out / "sizes.json").write_text(json.dumps(sizes(models), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
