"""The model store: fetches, lists and inspects models without loading them.

Weights are safetensors only, and no code of a model folder is ever run.
"""

from service.models.builtin_models import CATALOGUE, CatalogueEntry
from service.models.lora_adapters import AdapterInfo
from service.models.model_inspection import ModelInfo, MoeInfo, inspect_model
from service.models.model_store import (
    Manifest,
    StoredFile,
    StoredModel,
    list_models,
    model_root,
    verify,
)
from service.models.pull import locate, pinned_source, pull
from service.models.pull_progress import Progress, Silent, progress_for

__all__ = [
    "CATALOGUE",
    "AdapterInfo",
    "CatalogueEntry",
    "Manifest",
    "ModelInfo",
    "MoeInfo",
    "Progress",
    "Silent",
    "StoredFile",
    "StoredModel",
    "inspect_model",
    "list_models",
    "locate",
    "model_root",
    "pinned_source",
    "progress_for",
    "pull",
    "verify",
]
