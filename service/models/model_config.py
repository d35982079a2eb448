"""Reads the JSON files of a model folder. It does not trust them and does not need torch."""

from __future__ import annotations

import json
import logging
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError

_log = logging.getLogger("coe.models")
_MAX_JSON_BYTES = 100_000_000
_MAX_NUMBER = 2**53
# The keys under which multimodal models keep the config of their language model, outermost first.
# Such a config may hold another (Qwen-Omni's `thinker_config` has a `text_config`).
_LANGUAGE_PARTS = ("thinker_config", "text_config", "llm_config", "language_config")
# The sizes that every plan needs, each with its names in the different architectures.
HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head")
LAYERS = ("num_hidden_layers", "n_layer")
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
VOCABULARY = ("vocab_size",)
_NEEDED = (HIDDEN_SIZE, HEADS, LAYERS, CONTEXT, VOCABULARY)
_OFTEN_DEFAULT = (("num_key_value_heads",), ("head_dim",))


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The cache that a model's layers keep per request, for a lower bound of its KV cache.

    `elements` is the number of cached elements for a token in a layer. `window_layers` attend only
    to the last `window_tokens`. Layers with a state of fixed size (linear attention) count in
    neither number of layers.
    """

    full_layers: int
    window_layers: int
    window_tokens: int
    elements: int

    def least_bytes(self, tokens: int, element_bytes: int) -> int:
        """Return the least bytes of the KV cache for a request of this many tokens, unsharded."""
        windowed = self.window_layers * min(tokens, self.window_tokens)
        return (self.full_layers * tokens + windowed) * self.elements * element_bytes


def kv_layout(sizes: dict[str, Any], layers: int, kv_heads: int, head_size: int) -> KvLayout:
    """Compute the layout from `layer_types`, the window's size and pattern, and the MLA ranks."""
    latent = optional_integer(sizes, "kv_lora_rank") or 0
    elements = 2 * kv_heads * head_size
    if latent > 0:
        elements = latent + max(0, optional_integer(sizes, "qk_rope_head_dim") or 0)
    window = optional_integer(sizes, "sliding_window", "attention_chunk_size") or 0
    if sizes.get("use_sliding_window") is False:
        window = 0
    types = sizes.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        full = sum(type_ in ("full_attention", "attention") for type_ in types)
        local = ("sliding_attention", "chunked_attention")
        windowed = sum(type_ in local for type_ in types) if window > 0 else 0
        return KvLayout(full, windowed, max(0, window), elements)
    if window <= 0:
        return KvLayout(layers, 0, 0, elements)
    pattern = optional_integer(sizes, "sliding_window_pattern", "_sliding_window_pattern") or 0
    full = layers // pattern if pattern > 1 else 0
    return KvLayout(full, layers - full, window, elements)


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        ModelStoreError: The file can't be read or has no JSON object.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            # A pipe would never end, nor would a device such as /dev/zero.
            raise ModelStoreError(f"{path}: not a file")
        if found.st_size > _MAX_JSON_BYTES:
            raise ModelStoreError(f"{path}: larger than {_MAX_JSON_BYTES // 10**6} MB")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelStoreError(f"{path}: can't be read: {error.strerror or error}") from error
    except RecursionError:
        raise ModelStoreError(f"{path}: not valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise ModelStoreError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ModelStoreError(f"{path}: must hold a JSON object")
    return data


def optional_integer(sizes: dict[str, Any], *keys: str) -> int | None:
    """Return the integer of the first key that has a number."""
    for key in keys:
        value = sizes.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        # An integer may be too large for a float, and infinity can't become an integer.
        if -_MAX_NUMBER <= value <= _MAX_NUMBER:
            return int(value)
    return None


def integer(sizes: dict[str, Any], where: Path, *keys: str) -> int:
    """Return the integer of the first key that has a number.

    Raises:
        ModelStoreError: There is no value above 0.
    """
    value = optional_integer(sizes, *keys)
    if value is None or value < 1:
        raise ModelStoreError(f"{where}: {keys[0]!r} is missing or not a positive number")
    return value


def language_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """Return the sizes of the language model, which may be a part of the config.

    Missing sizes have the default of the architecture's class. If a required size is missing, it
    comes from transformers. This takes seconds, because it imports torch. No code of the model is
    run. Sizes that transformers does not know stay missing.
    """
    sizes = config
    for name in _LANGUAGE_PARTS:
        part = sizes.get(name)
        if isinstance(part, dict):
            sizes = {**sizes, **part}
    nested = sizes is not config
    wanted = (*_NEEDED, *_OFTEN_DEFAULT) if nested else _NEEDED
    if all(optional_integer(sizes, *keys) is not None for keys in wanted):
        return sizes
    given = {key: value for key, value in sizes.items() if value is not None}
    flat = {key: value for key, value in given.items() if not key.endswith("_config")}
    # The whole config comes first, because its class knows the types of its parts.
    for item in (config, flat) if nested else (config,):
        if defaults := _class_defaults(item):
            return {**defaults, **given}
    return sizes


def _class_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of a config as its architecture's class completes it.

    The result is empty if transformers does not know the architecture or refuses the config.
    """
    kind = config.get("model_type")
    given = {key: value for key, value in config.items() if value is not None}
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
            return {}
        found: dict[str, Any] = CONFIG_MAPPING[kind](**given).get_text_config().to_dict()
    except Exception as error:
        # A class may refuse a config with any error. A later check then names the missing size.
        _log.debug("no defaults for model_type %s: %s", kind, type(error).__name__)
        return {}
    return found
