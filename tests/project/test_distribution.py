"""The wheel and the source archive run outside a checkout; one place holds the version."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from service import __version__

ROOT = Path(__file__).parents[2]
SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "NOTICE",
    "service",
    "router_models",
    "loadtests",
)
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
WHEEL = ("-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")


def run(command: list[str], cwd: Path, **environment: str) -> str:
    ran = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives, built from a copy so that the checkout stays as it is."""
    copy = tmp_path_factory.mktemp("sources")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "results")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-c", SDIST, str(out)], copy)
    run([sys.executable, *WHEEL, "--wheel-dir", str(out), "."], copy)
    return out


def install(wheel: Path, target: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    run([*pip, "--target", str(target), str(wheel)], target.parent)


def test_wheel_outside_a_checkout_runs_coe(dist: Path, tmp_path: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    target = tmp_path / "site"
    install(wheel, target)
    python = {"PYTHONPATH": str(target)}
    where = run(
        [sys.executable, "-c", "import service; print(service.__file__)"], tmp_path, **python
    )
    assert where.startswith(str(target))
    coe = [str(target / "bin" / "coe")]
    assert run([*coe, "--version"], tmp_path, **python).split()[-1] == __version__
    run([*coe, "init", "--yes", "--output", "made.yaml"], tmp_path, **python)
    # The config names a router artifact: it must be the installed one.
    config = (tmp_path / "made.yaml").read_text()
    named = re.findall(r"^\s*artifact:\s*(\S+)", config, re.MULTILINE)
    assert all(str(target) in path for path in named)


def test_wheel_holds_what_the_service_reads_at_run_time(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "service/py.typed" in names
    assert any(re.fullmatch(r"service/.*/static/index\.html", name) for name in names)
    assert any(re.fullmatch(r"router_models/artifacts/demo@\d+/manifest\.json", n) for n in names)
    assert "router_models/outcomes_builtin/coding.jsonl" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_source_archive_builds_the_same_wheel(dist: Path, tmp_path: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    out = tmp_path / "out"
    out.mkdir()
    run([sys.executable, *WHEEL, "--wheel-dir", str(out), "."], unpacked)
    (again,) = out.glob("*.whl")
    (wheel,) = dist.glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_version_is_the_same_everywhere() -> None:
    chart = (ROOT / "helm" / "Chart.yaml").read_text()
    assert f'appVersion: "{__version__}"' in chart
    assert f"ARG VERSION={__version__}\n" in (ROOT / "Dockerfile").read_text()
    assert f"image: coe:{__version__}-cpu" in (ROOT / "deploy" / "compose.yaml").read_text()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
