"""Fetches models from the Hugging Face hub.

It fetches only the files of a safetensors model, and never pickles or code. The hub client keeps
partial files in the folder and resumes them.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from service.errors import ModelStoreError
from service.models.model_files import MODULES, wanted_files
from service.models.model_store import one_line_errors, require_free, sha256_of
from service.models.pull_progress import Progress, watch_folder

# The token is read when the process starts, because it is hidden from the environment while an
# engine's core starts. Without a token here the client looks for a token in its own files.
_TOKEN = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
_ACCESS: dict[str, Any] = {"token": _TOKEN} if _TOKEN else {}
_MOST_MODULES_BYTES = 1_000_000


def fetch_snapshot(
    repository: str,
    revision: str | None,
    folder: Path,
    progress: Progress,
    files: tuple[str, ...] | None = None,
) -> tuple[str, str | None]:
    """Fetch a model into `folder`, and check every file against the commit's checksum.

    Args:
        repository: Its name on the hub.
        revision: A branch, a tag or a commit; None: the main branch.
        folder: Where its files go.
        progress: Receives the progress.
        files: Patterns of the files of a sentence encoder; None: those of a safetensors model.

    Returns:
        The model's commit, and the licence of its model card.
    """
    try:
        import huggingface_hub
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # made at run time
            disable_progress_bars,
            enable_progress_bars,
            filter_repo_objects,
        )
    except ImportError as error:
        raise ModelStoreError(
            "pulling from the hub needs the package 'huggingface_hub': pip install huggingface_hub"
        ) from error
    try:
        api = huggingface_hub.HfApi(**_ACCESS)
        info = api.model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:
        # The client raises its own errors and, by version, errors of requests and httpx.
        raise _explain(repository, revision, error) from error
    if revision is not None and is_commit(revision) and info.sha != revision:
        raise ModelStoreError(f"{repository}: the hub gave commit {info.sha} for {revision}")

    def fetch(names: list[str]) -> None:
        disable_progress_bars()
        try:
            with one_line_errors(repository, folder):
                huggingface_hub.snapshot_download(
                    repository,
                    revision=info.sha,
                    local_dir=folder,
                    allow_patterns=names,
                    **_ACCESS,
                )
        except ModelStoreError:
            raise
        except Exception as error:
            raise _explain(repository, revision, error) from error
        finally:
            enable_progress_bars()

    there = {file.rfilename: file for file in info.siblings or []}
    if files:
        names = list(filter_repo_objects(there, allow_patterns=list(files)))
    else:
        modules = None
        if MODULES in there and (there[MODULES].size or 0) <= _MOST_MODULES_BYTES:
            fetch([MODULES])
            modules = (folder / MODULES).read_bytes()
        names = wanted_files(there, modules)
    wanted = {name: there[name] for name in names}
    if files and not any(name.endswith(".onnx") for name in wanted):
        raise ModelStoreError(f"{repository}: no ONNX model in it, which an encoder needs")
    if not files and not any(n.endswith(".safetensors") and "/" not in n for n in wanted):
        raise ModelStoreError(
            f"{repository}: no safetensors in it; other weight formats can run code and are not "
            "loaded"
        )
    total_bytes = sum(file.size or 0 for file in wanted.values())
    require_free(folder, total_bytes, repository)
    with (
        progress.stage(f"{repository}: downloading", total_bytes) as advance,
        watch_folder(folder, advance, limit_bytes=total_bytes),
    ):
        fetch(names)
    for name, file in wanted.items():
        if not _is_what_the_commit_has(folder / name, file):
            (folder / name).unlink()
            raise ModelStoreError(
                f"{repository}: {name} has a wrong checksum; thrown away, pull again"
            )
    licence = info.card_data.get("license") if info.card_data is not None else None
    return str(info.sha), None if licence is None else str(licence)


def is_commit(revision: str) -> bool:
    """Return whether a revision is a full commit instead of a branch or tag that may move."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _is_what_the_commit_has(path: Path, file: Any) -> bool:
    """Return whether a file equals the commit's file.

    A commit has the SHA-256 of large files, and git's blob id of small files (config, tokenizer).
    """
    if file.lfs is not None:
        return sha256_of(path) == str(file.lfs.sha256)
    return file.blob_id is None or git_blob_id(path) == str(file.blob_id)


def git_blob_id(path: Path) -> str:
    """Return git's id of a file's content: the SHA-1 of its length and bytes."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _explain(repository: str, revision: str | None, error: Exception) -> ModelStoreError:
    kind = type(error).__name__
    if kind == "GatedRepoError":
        return ModelStoreError(
            f"{repository}: this model is gated; accept its terms on the hub and log in "
            "(hf auth login, or HF_TOKEN)"
        )
    if kind == "RevisionNotFoundError":
        return ModelStoreError(f"{repository}: the hub has no revision {revision!r} of it")
    if kind == "RepositoryNotFoundError":
        return ModelStoreError(f"{repository}: the hub has no such model, or it is private")
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return ModelStoreError(f"{repository}: can't reach the hub ({kind}: {first})")
