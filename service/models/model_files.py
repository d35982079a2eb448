"""Which files of a repository or folder make up a model.

They are safetensors, configs, tokenizers and chat templates, never pickles or code. They lie beside
each other; copies of the same weights in other formats lie in folders. Two kinds of folders belong
to the model: those of named chat templates, and those of the modules of a sentence transformer,
which its `modules.json` names (https://sbert.net/docs/package_reference/sentence_transformer).
vLLM reads from them how an embedding is pooled and projected.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Collection

from service.models.model_inspection import is_second_copy

WANTED = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model*",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "LICENSE*",
    "README.md",
)
TEMPLATES = "additional_chat_templates"
MODULES = "modules.json"
# Folders of a sentence transformer's modules, such as `1_Pooling` and `2_Dense`.
_MODULE = re.compile(r"[0-9]{1,2}_\w{1,64}", re.ASCII)


def is_module(folder: str) -> bool:
    """Return whether a folder may be that of a sentence transformer's module, by its name."""
    return _MODULE.fullmatch(folder) is not None


def wanted_files(names: Collection[str], modules: bytes | None) -> list[str]:
    """Return the names of a model's own files, in the order in which they are given.

    Args:
        names: Names of all files, with `/` between folders.
        modules: The content of `modules.json`; None where there is none.
    """
    named = _module_folders(modules)
    found = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if not any(fnmatch.fnmatchcase(file, pattern) for pattern in WANTED):
            continue
        if (
            not is_second_copy(name, names)
            if not folder
            else folder in named or (folder == TEMPLATES and file.endswith(".jinja"))
        ):
            found.append(name)
    return found


def _module_folders(modules: bytes | None) -> set[str]:
    """Return the folders of the modules; a damaged `modules.json` names none."""
    try:
        listed = json.loads(modules or b"[]")
    except (ValueError, RecursionError):
        return set()
    if not isinstance(listed, list):
        return set()
    paths = [module.get("path") for module in listed if isinstance(module, dict)]
    return {path for path in paths if isinstance(path, str) and is_module(path)}
