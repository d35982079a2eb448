"""Distils a static semantic table from a sentence encoder.

    python -m router_models.static_embedding_distillation --encoder DIR --prompts PROMPTS --out OUT

The built-in table is `service/classifier/static-minilm-l6`, with `router_models/general/prompts`.

Each token of the encoder's vocabulary goes through the encoder alone, between the tokens that the
encoder wants around a text. PCA brings the vectors to `--dims`, each is weighted by its rank in the
vocabulary (Zipf: the commonest tokens say least), and a text is the mean of its tokens. The method
is Model2Vec's (Tulkens and van Dongen, 2024). The result is int8 with one scale a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from router_models.labelled_prompt_reader import LabelledPrompt, prompt_files, read_prompts
from service.classifier.static_embedding_table import TABLE, TOKENIZER, WITHIN, StaticTable
from service.encoder.onnx_encoder import OnnxEncoder, find_model
from service.errors import ArtifactError

Floats = NDArray[np.float32]

_BATCH = 256


def token_vectors(encoder: OnnxEncoder, tokens: int) -> Floats:
    """The encoder's vector of every token alone, (tokens, the encoder's dims)."""
    around = encoder.token_ids([""])[0]
    before, after = around[: len(around) // 2], around[len(around) // 2 :]
    sequences = [[*before, token, *after] for token in range(tokens)]
    parts = [encoder.encode_ids(sequences[i : i + _BATCH]) for i in range(0, tokens, _BATCH)]
    return np.concatenate(parts)


def principal(vectors: Floats, dims: int) -> Floats:
    """Centre the vectors and keep their first principal components, (rows, dims)."""
    centred = vectors - vectors.mean(axis=0)
    _, directions = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    return np.asarray(centred @ directions[:, ::-1][:, :dims], dtype=np.float32)


def zipf_weights(tokens: int) -> Floats:
    """ln(1 + rank), (tokens,): a vocabulary is in order of frequency, the commonest first."""
    return np.asarray(np.log1p(np.arange(1, tokens + 1)), dtype=np.float32)


def quantise(vectors: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Round each row to int8: (tokens, dims) and its scale, (tokens,)."""
    scale = np.abs(vectors).max(axis=1) / 127
    divisor = np.where(scale > 0, scale, 1)[:, None]
    return np.round(vectors / divisor).astype(np.int8), scale.astype(np.float32)


def within_covariance(table: StaticTable, rows: Sequence[LabelledPrompt]) -> Floats:
    """The covariance of prompts around the mean of their category and language, (dims, dims)."""
    groups: dict[tuple[str, str], list[Floats]] = {}
    for row in rows:
        groups.setdefault((row.category, row.language), []).append(table.embed(row.prompt))
    apart = np.concatenate([np.stack(group) - np.mean(group, axis=0) for group in groups.values()])
    return np.asarray(apart.T @ apart / max(len(rows) - len(groups), 1), dtype=np.float32)


def distil(folder: Path, out: Path, dims: int) -> StaticTable:
    """Distil the encoder in `folder` into the folder `out`, and read the table back.

    Raises:
        ArtifactError: The encoder can't be used.
    """
    encoder = OnnxEncoder(folder)
    if not 1 <= dims <= encoder.dims:
        raise ArtifactError(f"dims: 1..{encoder.dims} are allowed for this encoder, not {dims}")
    tokenizer = json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))
    tokenizer["padding"] = tokenizer["truncation"] = None
    special = [token["id"] for token in tokenizer["added_tokens"] if token["special"]]
    tokens = encoder.vocabulary_size
    vectors, scale = quantise(principal(token_vectors(encoder, tokens), dims))
    scale *= zipf_weights(tokens)
    scale[special] = 0
    out.mkdir(parents=True, exist_ok=True)
    (out / TABLE).write_bytes(save({"vectors": vectors, "scale": scale}))
    (out / TOKENIZER).write_text(
        json.dumps(tokenizer, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    model = find_model(folder)
    assert model is not None
    (out / "README.md").write_text(card(model, vectors.shape, out.name), encoding="utf-8")
    return StaticTable.load(out)


def card(model: Path, shape: tuple[int, ...], name: str) -> str:
    """The table's card."""
    tokens, dims = shape
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    return f"""# {name}: a static semantic table

{tokens:,} tokens, {dims} numbers each, int8 with one scale a token. A text is the mean of its
tokens' vectors, weighted by rank in the vocabulary. It gives the router's first stage a sense of
meaning without running an encoder.

Distilled from all-MiniLM-L6-v2 (sentence-transformers; ONNX export of onnx-community; file
`{model.name}`, SHA-256 begins `{digest[:16]}`), whose licence is Apache-2.0. The licence
of this table is Apache-2.0, too. The tokeniser's vocabulary is that of BERT base uncased, which is
Apache-2.0 as well.

Made by
`python -m router_models.static_embedding_distillation --encoder DIR --out DIR --dims {dims}`:
each token through the encoder, PCA, weights ln(1 + rank), int8. No text was used for that.
`within.safetensors` is the covariance of prompts around the means of their categories, from the
project's own prompts in `router_models/general/prompts` (`--prompts`); it holds no text.

Limits: mostly English. The order of words does not count. Tokens of other scripts are in the
vocabulary as single letters, which say little.
"""


@click.command()
@click.option("--encoder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--dims", type=int, default=256, show_default=True)
@click.option(
    "--prompts",
    type=click.Path(exists=True, path_type=Path),
    multiple=True,
    help="Labelled prompts for the covariance within categories.",
)
def main(encoder: Path, out: Path, dims: int, prompts: tuple[Path, ...]) -> None:
    """Distil the encoder in the folder ENCODER into the table OUT."""
    try:
        table = distil(encoder, out, dims)
        if prompts:
            rows, _ = read_prompts(prompt_files(prompts))
            within = within_covariance(table, rows).astype(np.float16)
            (out / WITHIN).write_bytes(save({"within": within}))
            StaticTable.load(out)
    except ArtifactError as error:
        raise click.ClickException(error.message) from error
    click.echo(f"wrote {out}: {table.memory_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
