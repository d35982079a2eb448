"""The GPUs of this machine, as nvidia-smi lists them."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass

_MIB = 1024**2
_TIMEOUT_S = 20.0
_MEMORY_QUERY = "index,uuid,name,memory.total,memory.used,memory.free"


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """The memory of one GPU, as its driver counts it for all processes together.

    Attributes:
        index: Its number in nvidia-smi's list.
        uuid: Its lasting id.
        name: Its product name.
        total_bytes: The whole memory.
        used_bytes: What processes hold.
        free_bytes: What a new process could take. The driver keeps some of the rest.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    free_bytes: int


def gpus() -> tuple[Gpu, ...]:
    """Return the GPUs that nvidia-smi lists; none without nvidia-smi."""
    return read_gpus(_query("name,memory.total"))


def gpu_memory() -> tuple[GpuMemory, ...]:
    """Return the memory of every GPU that nvidia-smi lists; none without nvidia-smi."""
    return read_gpu_memory(_query(_MEMORY_QUERY))


def driver_version() -> str:
    """Return the version of NVIDIA's driver, or an empty string."""
    first = next(iter(_query("driver_version").split()), "")
    return first if re.fullmatch(r"[0-9]+(\.[0-9]+)*", first) else ""


def _query(fields: str) -> str:
    """Ask nvidia-smi; the result is empty where it is missing, fails, or takes too long."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return ""
    assert process.stdout is not None
    try:
        output, _ = process.communicate(timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        # A driver that hangs holds its processes in the kernel, where no signal ends them.
        process.kill()
        process.stdout.close()
        threading.Thread(target=process.wait, daemon=True).start()
        return ""
    return output.decode("ascii", errors="replace") if process.returncode == 0 else ""


def _is_number(text: str) -> bool:
    # Other digits than these are not all numbers to int().
    return text.isascii() and text.isdigit() and len(text) <= 12


def _printable(text: str) -> str:
    """Return a text of the driver's tool without control characters."""
    return "".join(filter(str.isprintable, text))


def read_gpus(text: str) -> tuple[Gpu, ...]:
    """Parse lines of name and MiB."""
    found = []
    for line in text.splitlines():
        name, comma, memory = line.rpartition(",")
        if comma and _is_number(memory.strip()):
            found.append(Gpu(_printable(name.strip()), int(memory) * _MIB))
    return tuple(found)


def read_gpu_memory(text: str) -> tuple[GpuMemory, ...]:
    """Parse lines of index, uuid, name, and MiB in total, used and free. Others are left out."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        index, uuid, *name = parts[:-3] if len(parts) > 5 else ("", "")
        sizes = parts[-3:]
        if all(map(_is_number, (index, *sizes))):
            total, used, free = (int(size) * _MIB for size in sizes)
            uuid, product = _printable(uuid), _printable(",".join(name))
            found.append(GpuMemory(int(index), uuid, product, total, used, free))
    return tuple(found)


def visible_gpus(found: tuple[GpuMemory, ...], environ: Mapping[str, str]) -> tuple[GpuMemory, ...]:
    """Return the GPUs that CUDA shows to a process, in CUDA's order.

    Args:
        found: All GPUs of the machine.
        environ: The process's environment. `CUDA_VISIBLE_DEVICES` names indices or (prefixes of)
            ids; without it, all are visible. CUDA ignores what follows an unknown name.
    """
    given = environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return found
    visible = []
    for name in filter(None, (part.strip() for part in given.split(","))):
        match = [
            gpu
            for gpu in found
            if (_is_number(name) and gpu.index == int(name))
            or (not _is_number(name) and gpu.uuid.startswith(name))
        ]
        if len(match) != 1 or match[0] in visible:
            break
        visible.append(match[0])
    return tuple(visible)


def largest_gpu_bytes() -> int | None:
    """Return the memory of the largest GPU here, or None without nvidia-smi."""
    return max((gpu.memory_bytes for gpu in gpus()), default=None)
