"""Packages of a lock and their licences, from the lock and the packages' metadata."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

LOCKS = Path(__file__).resolve().parent / "locks"
IMAGE_CPU = (LOCKS / "torch-cpu.txt", LOCKS / "image-cpu.txt")
IMAGE_GPU = (LOCKS / "image-gpu.txt",)

# Where the metadata says nothing exact, or the package is for another Python or platform than this
# one: what its licence file says.
_TOLD = {
    "async-timeout": "Apache-2.0",
    "intel-cmplr-lib-ur": "LicenseRef-Intel-EULA",
    "intel-openmp": "LicenseRef-Intel-EULA",
    "jinja2": "BSD-3-Clause",
    "mpmath": "BSD-3-Clause",
    "numba": "BSD-3-Clause",
    "numpy": "BSD-3-Clause",
    "oss-harmony": "Apache-2.0",
    "py-cpuinfo": "MIT",
    "pyasn1-modules": "BSD-2-Clause",
    "scipy": "BSD-3-Clause",
    "setuptools": "MIT",
    "sympy": "BSD-3-Clause",
}
# Free text and classifiers → SPDX.
_SPDX = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache software license; mit license": "Apache-2.0 OR MIT",
    "bsd-derived (http://www.repoze.org/license.txt)": "LicenseRef-Repoze",
    "gplv2": "GPL-2.0-only",
    "isc license (iscl)": "ISC",
    "isc license": "ISC",
    "mit license": "MIT",
    "mit license; apache software license": "MIT OR Apache-2.0",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "nvidia proprietary software": "LicenseRef-NVIDIA",
    "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense",
}
_EXPRESSION = re.compile(
    r"\(*[A-Za-z0-9.+-]+\)*(?: (?:AND|OR|WITH) \(*[A-Za-z0-9.+-]+\)*)*", re.ASCII
)
_KNOWN = re.compile(
    r"(?:0BSD|Apache-2\.0|BSD-[23]-Clause|BSL-1\.0|CC0-1\.0|CNRI-Python|GPL-2\.0-(?:only|or-later)|ISC|"
    r"LGPL-[23]\.[01]-(?:only|or-later)|LLVM-exception|LicenseRef-[A-Za-z-]+|MIT|MIT-0|MIT-CMU|MPL-2\.0|"
    r"PSF-2\.0|Unlicense|Zlib)"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A package of a lock. `sha256`: hashes of every file that may be installed for it."""

    name: str
    version: str
    sha256: tuple[str, ...]


def locked(*locks: Path) -> list[Package]:
    """The packages of some locks together, by name."""
    found = {}
    for lock in locks:
        for part in re.split(r"^(?=[a-z0-9])", lock.read_text(encoding="utf-8"), flags=re.M)[1:]:
            match = re.match(r"([a-z0-9][a-z0-9._-]*)==([^\s;\\]+)", part)
            assert match is not None, f"{lock}: {part.splitlines()[0]}"
            hashes = tuple(re.findall(r"--hash=sha256:([0-9a-f]{64})", part))
            found[match[1]] = Package(match[1], match[2], hashes)
    return [found[name] for name in sorted(found)]


def is_installed(name: str) -> bool:
    """Return whether the package is installed in this environment."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def licence_of(name: str) -> str:
    """A package's licence as an SPDX expression. Raises KeyError where nothing tells it."""
    if name in _TOLD:
        return _TOLD[name]
    try:
        package_metadata = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        raise KeyError(f"{name}: it is not installed, so that its licence is not known") from None
    free = str(package_metadata.get("License") or "").strip().split("\n")[0].strip()
    kinds = [
        classifier.split(" :: ")[-1]
        for classifier in package_metadata.get_all("Classifier") or ()
        if classifier.startswith(("License :: OSI Approved :: ", "License :: Other"))
    ]
    for text in (package_metadata.get("License-Expression"), free, "; ".join(kinds)):
        spdx = _as_spdx(str(text)) if text else None
        if spdx is not None:
            return spdx
    raise KeyError(f"{name}: its metadata does not tell its licence: {free!r}, {kinds}")


def _as_spdx(text: str) -> str | None:
    text = _SPDX.get(text.lower(), text)
    if _EXPRESSION.fullmatch(text) is None:
        return None
    return text if all(_KNOWN.fullmatch(one) for one in identifiers(text)) else None


def identifiers(expression: str) -> set[str]:
    """The licences and exceptions that an SPDX expression names."""
    return set(re.findall(r"[^\s()]+", expression)) - {"AND", "OR", "WITH"}
