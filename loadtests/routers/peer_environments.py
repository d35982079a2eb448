"""Environments of other gateways: one folder each, outside the repository, made on demand.

A package brings the versions of its own requirements, which would not fit beside ours.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from loadtests.lib.child_processes import say

# Needed to override what a package asks for, which pip can't do.
_UV = "uv==0.13.9"
_INSTALL_S = 600.0


class CannotInstallError(RuntimeError):
    """A gateway's packages are not there and could not be fetched."""


def environments_folder() -> Path:
    """Where all environments are: `coe/loadtests` in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "coe" / "loadtests"


def made(name: str, install: PythonPackage | NodePackage) -> Path:
    """The folder of an environment, made first if it isn't there.

    Raises:
        CannotInstallError: The packages can't be fetched, or a program to do so is missing.
    """
    folder = environments_folder() / f"{name}-{install.version}"
    complete = folder / "complete.json"
    recipe = json.dumps(install.recipe())
    if complete.is_file() and complete.read_text() == recipe:
        return folder
    say(f"installing {install.package} {install.version} into {folder}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    install.into(folder)
    complete.write_text(recipe)
    return folder


class PythonPackage:
    """A package of the Python index, in a virtual environment.

    Args:
        package: Its name, with extras.
        version: The one version.
        overrides: Requirements that replace those of other packages.
    """

    def __init__(self, package: str, version: str, overrides: Sequence[str] = ()) -> None:
        self.package = package
        self.version = version
        self._overrides = tuple(overrides)

    def recipe(self) -> list[str]:
        """What decides the environment's content."""
        return [self.package, self.version, *self._overrides]

    def into(self, folder: Path) -> None:
        """Install it. Raises CannotInstallError."""
        venv.create(folder, with_pip=True)
        python = str(folder / "bin" / "python")
        _run(self, python, "-m", "pip", "install", "--quiet", _UV)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
            overrides.write("\n".join(self._overrides))
            overrides.flush()
            wanted = f"{self.package}=={self.version}"
            command = [python, "-m", "uv", "pip", "install", "--quiet", "--python", python]
            _run(self, *command, wanted, "--override", overrides.name)


class NodePackage:
    """A package of the Node index, in a folder of its own, without its installation scripts.

    Args:
        package: Its name.
        version: The one version.
        overrides: Versions of packages that it needs, by their names.
    """

    def __init__(
        self, package: str, version: str, overrides: Sequence[tuple[str, str]] = ()
    ) -> None:
        self.package = package
        self.version = version
        self._overrides = dict(overrides)

    def recipe(self) -> list[object]:
        """What decides the environment's content."""
        return [self.package, self.version, self._overrides]

    def into(self, folder: Path) -> None:
        """Install it. Raises CannotInstallError."""
        npm = shutil.which("npm")
        if npm is None or shutil.which("node") is None:
            raise CannotInstallError(f"{self.package} needs node and npm, which are not there")
        wanted = {"dependencies": {self.package: self.version}, "overrides": self._overrides}
        (folder / "package.json").write_text(json.dumps(wanted))
        flags = ["--no-audit", "--no-fund", "--ignore-scripts", "--loglevel", "error"]
        _run(self, npm, "install", "--prefix", str(folder), *flags)


def _run(package: PythonPackage | NodePackage, *command: str) -> None:
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=_INSTALL_S,
            # The load test's own packages are none of the environment's.
            env={**os.environ, "PYTHONPATH": ""},
        )
    except subprocess.TimeoutExpired as error:
        raise CannotInstallError(
            f"{package.package} {package.version} was not installed in {_INSTALL_S:.0f} s"
        ) from error
    if done.returncode:
        raise CannotInstallError(
            f"{package.package} {package.version} can't be installed; is a package index within "
            f"reach? {done.stdout.strip()[-300:]}"
        )
