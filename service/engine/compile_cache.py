"""Keeps what engines compile beside the models, so that it outlives a container.

A first start on a GPU compiles kernels for minutes. vLLM, Triton and Inductor keep the results in a
temporary or home folder, which a new pod does not have.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

FOLDER = ".compiled"
"""The folder beside the models."""
_FOLDERS = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


def compile_cache(models: Path, gpu_name: str, given: Mapping[str, str]) -> dict[str, str]:
    """Make the folders for compiled code, one set for each kind of GPU.

    Args:
        models: The folder of the models.
        gpu_name: The name of the GPU, since code for one kind does not run on another.
        given: The environment. A variable that the operator has set stays as it is.

    Returns:
        The variables to set. It is empty where nothing can be written there: then each program
        keeps its own default.
    """
    kind = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-") or "gpu"
    root = models / FOLDER / kind
    variables = {name: str(root / part) for name, part in _FOLDERS.items() if not given.get(name)}
    try:
        for folder in variables.values():
            Path(folder).mkdir(parents=True, exist_ok=True)
            _try_to_write(Path(folder))
    except OSError as error:
        log.warning(
            "%s can't be written (%s): compiled kernels are kept elsewhere, and a new container "
            "compiles them again",
            root,
            error.strerror,
        )
        return {}
    return variables


def _try_to_write(folder: Path) -> None:
    # Permission bits don't tell: the volume may be mounted read-only.
    probe = folder / ".written"
    probe.touch()
    probe.unlink(missing_ok=True)


def without_compiler(given: Mapping[str, str]) -> dict[str, str]:
    """Return what keeps engines on a CPU from compiling where there is no C++ compiler.

    vLLM gives parts of its sampler to Inductor, in eager engines as well. Without a compiler, the
    first request for log probabilities would end an engine with all of its requests.

    Args:
        given: The environment. A variable that the operator has set stays as it is.

    Returns:
        The variables to set. It is empty where Inductor finds a compiler.
    """
    if shutil.which(given.get("CXX") or "g++") is not None or "TORCH_COMPILE_DISABLE" in given:
        return {}
    log.info("no C++ compiler is here: engines compile nothing")
    return {"TORCH_COMPILE_DISABLE": "1"}
