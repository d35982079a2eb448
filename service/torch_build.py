"""The build of torch that is installed here, read without importing it (which takes seconds)."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass
from pathlib import Path

_TOOLKITS = ("cuda", "hip", "xpu")


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """A build of torch.

    Attributes:
        version: Its version, such as `2.13.0+cpu`.
        toolkit: What it was built for, such as `cuda 13.0`. It is empty for a CPU build.
    """

    version: str
    toolkit: str


def torch_build() -> TorchBuild | None:
    """Return the installed build, or None where torch is not installed or says nothing."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    file = Path(spec.submodule_search_locations[0]) / "version.py"
    try:
        return read_build(file.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return None


def read_build(source: str) -> TorchBuild:
    """Read the build from the source of `torch/version.py`, without running it.

    Raises:
        SyntaxError: It is no Python, or has no version.
    """
    constants: dict[str, object] = {}
    for node in ast.parse(source).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign):
            targets = [node.target]
        value = getattr(node, "value", None)
        if isinstance(value, ast.Constant):
            constants |= {t.id: value.value for t in targets if isinstance(t, ast.Name)}
    if not isinstance(version := constants.get("__version__"), str):
        raise SyntaxError("no __version__")
    found = (f"{name} {constants[name]}" for name in _TOOLKITS if constants.get(name))
    return TorchBuild(version, next(found, ""))


def gpu_fault(build: TorchBuild | None) -> str:
    """Tell why engines can't use a GPU with this torch; empty where they can or may."""
    if build is None or build.toolkit:
        return ""
    return (
        f"the installed torch {build.version} is a CPU build, which sees no GPU; install for GPUs "
        "(make setup GPU=1, or the gpu image), or set gpus to 0"
    )
