"""Which torch is installed, as its version file says."""

from __future__ import annotations

import sys

import pytest

from service.torch_build import TorchBuild, read_build, torch_build

WHEEL = """from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip', 'rocm', 'xpu']
__version__ = '2.13.0{local}'
debug = False
cuda: Optional[str] = {cuda}
git_version = 'abc'
hip: Optional[str] = {hip}
rocm: Optional[str] = None
xpu: Optional[str] = None
"""


@pytest.mark.parametrize(
    ("local", "cuda", "hip", "toolkit"),
    [
        ("+cpu", None, None, ""),
        ("+cu130", "13.0", None, "cuda 13.0"),
        ("", "12.8", None, "cuda 12.8"),
        ("", None, "7.0.2", "hip 7.0.2"),
    ],
)
def test_read_build_finds_what_torch_was_built_for(
    local: str, cuda: str | None, hip: str | None, toolkit: str
) -> None:
    source = WHEEL.format(local=local, cuda=repr(cuda), hip=repr(hip))
    assert read_build(source) == TorchBuild(f"2.13.0{local}", toolkit)


def test_read_build_reads_older_plain_assignments() -> None:
    assert read_build("__version__ = '2.0'\ncuda = '11.8'\nhip = None") == TorchBuild(
        "2.0", "cuda 11.8"
    )


@pytest.mark.parametrize("source", ["", "cuda = '13.0'", "__version__ = f()", "def ("])
def test_read_build_without_a_version_raises(source: str) -> None:
    with pytest.raises(SyntaxError):
        read_build(source)


def test_torch_build_agrees_with_torch_and_does_not_import_it() -> None:
    import subprocess

    code = (
        "import sys; from service.torch_build import torch_build; b = torch_build();"
        "assert 'torch' not in sys.modules; import torch;"
        "print(b.version == torch.__version__, bool(b.toolkit) == bool(torch.version.cuda))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert torch_build() is not None
    assert ran.stdout.split() == ["True", "True"]
