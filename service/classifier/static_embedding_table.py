"""A static semantic table: one vector a token, and their weighted mean for a text.

The vectors are distilled from a sentence encoder (`router_models.static_embedding_distillation`),
so that a text has a meaning at the price of a tokeniser and one sum. The table is a folder with
`table.safetensors` and `tokenizer.json`. The vectors are int8 with one scale a token, which holds
the token's weight, too. Model2Vec has the same idea: Tulkens and van Dongen, "Model2Vec: Fast
State-of-the-Art Static Embeddings", 2024.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from tokenizers import Tokenizer

from service.classifier.router_artifact import Artifact
from service.encoder.unread_scripts import is_unread, unknown_token
from service.errors import ArtifactError

TABLE = "table.safetensors"
TOKENIZER = "tokenizer.json"
WITHIN = "within.safetensors"
"""The covariance of texts within categories, which categories by examples start from."""

BUILT_IN = Path(__file__).with_name("static-minilm-l6")
"""The table of categories by examples, of fits for users, and of earlier artifacts. English."""

MULTILINGUAL = Path(__file__).with_name("static-use-multilingual")
"""The table of the general router, in 12 languages."""

EDGE_CHARS = 600
"""Characters of a text that count, from either end: time stays bounded."""

_MAX_BYTES = 256 << 20


class StaticTable:
    """Computes the vectors of texts. It is immutable, so threads may share it.

    Args:
        vectors: (tokens, dims), int8.
        scale: (tokens,), what each row is multiplied with; 0 for tokens without a meaning.
        tokenizer: A `tokenizer.json` as text.
        digest: SHA-256 of the table's file, by which artifacts name the table.
        within: (dims, dims), the covariance of texts within categories; None if unknown.

    Raises:
        ArtifactError: The parts don't fit each other.
    """

    def __init__(
        self,
        vectors: NDArray[np.int8],
        scale: NDArray[np.floating],
        tokenizer: str,
        digest: str,
        within: NDArray[np.floating] | None = None,
    ) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer)
        except Exception as error:  # the library raises Exception itself
            raise ArtifactError(f"the static table's tokenizer is not valid: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        tokens = self._tokenizer.get_vocab_size()
        if vectors.dtype != np.int8 or vectors.ndim != 2 or vectors.shape[0] != tokens:
            raise ArtifactError(
                f"the static table has shape {list(vectors.shape)} and type {vectors.dtype}; "
                f"expected int8 and {tokens} rows, one a token"
            )
        if scale.shape != (tokens,) or not np.isfinite(scale).all():
            raise ArtifactError("the static table's scale must have one finite number a token")
        self._unknown = unknown_token(self._tokenizer)
        self._vectors = vectors
        self._scale = np.asarray(scale, dtype=np.float32)
        dims = vectors.shape[1]
        if within is not None and (
            within.shape != (dims, dims) or not np.isfinite(within).all() or np.trace(within) <= 0
        ):
            raise ArtifactError(
                f"the static table's covariance must be ({dims}, {dims}) and finite"
            )
        self.digest = digest
        self.within = None if within is None else np.asarray(within, dtype=np.float32)

    @classmethod
    def load(cls, folder: Path | str) -> StaticTable:
        """Load the table of a folder.

        Raises:
            ArtifactError: A file is missing or invalid.
        """
        folder = Path(folder)
        raw = _read(folder / TABLE)
        try:
            tensors = load_tensors(raw)
            vectors, scale = tensors["vectors"], tensors["scale"]
        except (SafetensorError, ValueError, KeyError) as error:
            raise ArtifactError(f"{folder / TABLE}: not a static table: {error!r}") from None
        try:
            tokenizer = _read(folder / TOKENIZER).decode("utf-8")
        except UnicodeDecodeError:
            raise ArtifactError(f"{folder / TOKENIZER}: not UTF-8") from None
        within = None
        if (folder / WITHIN).is_file():
            try:
                within = load_tensors(_read(folder / WITHIN))["within"]
            except (SafetensorError, ValueError, KeyError) as error:
                raise ArtifactError(f"{folder / WITHIN}: not a covariance: {error!r}") from None
        return cls(vectors, scale, tokenizer, hashlib.sha256(raw).hexdigest(), within)

    @property
    def dims(self) -> int:
        """Length of the vectors."""
        return int(self._vectors.shape[1])

    @property
    def memory_bytes(self) -> int:
        """Size of the arrays in bytes."""
        return self._vectors.nbytes + self._scale.nbytes

    def embed(self, text: str) -> NDArray[np.float32]:
        """Compute the vector of a text, (dims,), of length 1.

        It has zeros for an empty text, and for one in a script that the tokeniser does not know.
        """
        text = edges(text)
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids
        if not tokens or is_unread(text, tokens, self._unknown):
            return np.zeros(self.dims, dtype=np.float32)
        ids = np.array(tokens)
        mean = self._scale[ids] @ self._vectors[ids].astype(np.float32)
        length = float(np.sqrt(mean @ mean))
        return np.asarray(mean / np.float32(length if length > 0 else 1.0))


def built_in_table(folder: Path = BUILT_IN) -> StaticTable:
    """Load a table that ships with the package, once.

    Raises:
        ArtifactError: Its files are missing or damaged.
    """
    return _loaded(folder)


@cache
def _loaded(folder: Path) -> StaticTable:
    return StaticTable.load(folder)


def table_of(artifact: Artifact) -> StaticTable | None:
    """Return the table that ships with the package and that an artifact was fitted with.

    Returns:
        The table; that of categories by examples where none fits, so that loading the artifact
        says so; None where the artifact has no head on a table.

    Raises:
        ArtifactError: The files of a table are missing or damaged.
    """
    section = artifact.part("classifier", "static")
    if section is None:
        return None
    multilingual = built_in_table(MULTILINGUAL)
    fits = section.get("table_sha256") == multilingual.digest
    return multilingual if fits else built_in_table()


def edges(text: str) -> str:
    """Return the text's two ends, without lone surrogates, which the tokeniser refuses."""
    if len(text) > 2 * EDGE_CHARS:
        text = f"{text[:EDGE_CHARS]} {text[-EDGE_CHARS:]}"
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _read(path: Path) -> bytes:
    try:
        size_bytes = path.stat().st_size
        if size_bytes > _MAX_BYTES:
            raise ArtifactError(f"{path}: {size_bytes} bytes, at most {_MAX_BYTES} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror or error}") from error
