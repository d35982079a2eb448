"""Runs a sentence encoder from a folder, by ONNX Runtime on the CPU.

A folder holds one ONNX model, `tokenizer.json` and perhaps `1_Pooling/config.json`, as
sentence-transformers writes it. Nothing else is read, and nothing from the folder is executed but
the operators of ONNX Runtime itself. The vectors have length 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.encoder.unread_scripts import is_unread, unknown_token
from service.errors import ArtifactError

# Where a model may stand in its folder. The first that exists is taken, the smaller ones first.
MODEL_FILES = (
    "model_int8.onnx",
    "onnx/model_int8.onnx",
    "onnx/model_quantized.onnx",
    "model_quantized.onnx",
    "onnx/model.onnx",
    "model.onnx",
)
TOKENIZER = "tokenizer.json"
_POOLING = "1_Pooling/config.json"
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
# A batch is split where padding would make it longer than this many times its tokens.
_MAX_PADDING = 1.3
_MAX_FILE_BYTES = 64 << 20

Vectors = NDArray[np.float32]


def find_model(folder: Path) -> Path | None:
    """Return the ONNX file of an encoder's folder, or None without one."""
    return next((folder / name for name in MODEL_FILES if (folder / name).is_file()), None)


class OnnxEncoder:
    """A loaded encoder. It is used by one thread at a time.

    Args:
        folder: The encoder's folder.
        threads: Threads of ONNX Runtime for one batch.
        max_tokens: Tokens of a text that count. Of a longer text, the first and the last half do.

    Attributes:
        dims: Length of the vectors.

    Raises:
        ArtifactError: A file or package is missing, or the model is no sentence encoder.
    """

    def __init__(self, folder: Path, *, threads: int = 1, max_tokens: int = 128) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ArtifactError(
                f"an encoder needs the package {error.name}; install coe[encoder]"
            ) from None
        file = find_model(folder)
        if file is None:
            raise ArtifactError(f"{folder}: no ONNX model; one of {', '.join(MODEL_FILES)}")
        self._max_tokens = max_tokens
        self._cls = _pools_by_first_token(folder)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # errors come as exceptions
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
            self._session = onnxruntime.InferenceSession(
                str(file), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # both libraries raise types of their own
            said = str(error).strip().splitlines()
            raise ArtifactError(f"{folder}: can't be loaded: {said[0] if said else ''}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        pad = self._tokenizer.token_to_id("[PAD]")
        self._pad = self._tokenizer.token_to_id("<pad>") if pad is None else pad
        self._unknown = unknown_token(self._tokenizer)
        self._inputs = [given.name for given in self._session.get_inputs()]
        if not {"input_ids", "attention_mask"} <= {*self._inputs} <= _INPUTS:
            raise ArtifactError(f"{file}: takes {self._inputs}; a sentence encoder takes {_INPUTS}")
        names = [found.name for found in self._session.get_outputs()]
        self._output = "sentence_embedding" if "sentence_embedding" in names else names[0]
        self.dims = int(self.encode(["probe"]).shape[1])

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens."""
        return int(self._tokenizer.get_vocab_size())

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts, with the tokens that the model wants around them."""
        found = self._tokenizer.encode_batch([_clean(text) for text in texts])
        return [_clip(encoding.ids, self._max_tokens) for encoding in found]

    def encode(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of texts, (texts, dims).

        They have zeros for texts in a script that the tokeniser does not read.

        Raises:
            ArtifactError: The model's output has not the shape of an encoder's.
        """
        clean = [_clean(text) for text in texts]
        found = self._tokenizer.encode_batch(clean)
        vectors = self.encode_ids([_clip(encoding.ids, self._max_tokens) for encoding in found])
        for i, (text, encoding) in enumerate(zip(clean, found, strict=True)):
            # Tokens that the model wants around a text are no part of it.
            marks = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
            if is_unread(text, [token for token, mark in marks if not mark], self._unknown):
                vectors[i] = 0
        return vectors

    def encode_ids(self, ids: Sequence[Sequence[int]]) -> Vectors:
        """Return the vectors of token sequences, (sequences, dims). Like lengths go together.

        Raises:
            ArtifactError: The model's output has not the shape of an encoder's.
        """
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        parts: list[Vectors] = []
        begin = 0
        while begin < len(order):
            end, tokens = begin, 0
            while end < len(order):
                longest = len(ids[order[end]])
                tokens += longest
                if longest * (end - begin + 1) > _MAX_PADDING * tokens:
                    break
                end += 1
            parts.append(self._run([ids[i] for i in order[begin:end]]))
            begin = end
        joined = np.concatenate(parts) if parts else np.zeros((0, self.dims), np.float32)
        found = np.empty_like(joined)
        found[order] = joined
        return found

    def _run(self, ids: Sequence[Sequence[int]]) -> Vectors:
        longest = max(1, *(len(row) for row in ids))
        tokens = np.full((len(ids), longest), self._pad or 0, dtype=np.int64)
        mask = np.zeros_like(tokens)
        for i, row in enumerate(ids):
            tokens[i, : len(row)] = row
            mask[i, : len(row)] = 1
        given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": tokens * 0}
        try:
            (hidden,) = self._session.run(
                [self._output], {name: given[name] for name in self._inputs}
            )
        except Exception as error:
            said = str(error).strip().splitlines()
            raise ArtifactError(f"the encoder failed: {said[0] if said else ''}") from None
        return _unit(self._pooled(np.asarray(hidden, dtype=np.float32), mask))

    def _pooled(self, hidden: Vectors, mask: NDArray[np.int64]) -> Vectors:
        if hidden.ndim == 2 and hidden.shape[0] == len(mask):
            return hidden
        if hidden.ndim != 3 or hidden.shape[:2] != mask.shape:
            raise ArtifactError(
                f"the encoder's output has shape {list(hidden.shape)}; expected (texts, dims) or "
                "(texts, tokens, dims)"
            )
        if self._cls:
            return hidden[:, 0]
        share = mask / np.maximum(mask.sum(axis=1, keepdims=True), 1)
        mean: Vectors = np.einsum("bt,btd->bd", share.astype(np.float32), hidden)
        return mean


def _unit(vectors: Vectors) -> Vectors:
    if not np.isfinite(vectors).all():
        raise ArtifactError("the encoder's output holds NaN or infinity")
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(length, 1e-9), dtype=np.float32)


def _clip(ids: list[int], most: int) -> list[int]:
    if len(ids) <= most:
        return ids
    return [*ids[: most - most // 2], *ids[-(most // 2) :]]


def _clean(text: str) -> str:
    """Replace lone surrogates, which a tokenizer refuses."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _pools_by_first_token(folder: Path) -> bool:
    file = folder / _POOLING
    try:
        if not file.is_file() or file.stat().st_size > _MAX_FILE_BYTES:
            return False
        settings: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and settings.get("pooling_mode_cls_token") is True
