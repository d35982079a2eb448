"""Every installed file is pinned by its SHA-256, torch and uv included."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support.helm_chart import ROOT

LOCKS = ROOT / "deploy" / "locks"
SCRIPTS = sorted((ROOT / "deploy").glob("*.sh"))
# Installed by nobody but who asks for it, and some 3 GB: too much to pin file by file.
NOT_LOCKED = {"open_webui.sh": 1}


@pytest.mark.parametrize("lock", sorted(LOCKS.rglob("*.txt")), ids=lambda path: path.name)
def test_lock_has_a_hash_for_every_package(lock: Path) -> None:
    text = lock.read_text()
    packages = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert packages
    for package in packages:
        assert re.match(r"[a-z0-9._-]+==\S+", package), package
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", package), package
    assert not re.search(r"\bgit\+|https?://", text)


def test_torch_lock_has_a_file_for_every_python_and_platform() -> None:
    text = (LOCKS / "torch-cpu.txt").read_text()
    hashes = re.findall(r"--hash=sha256:([0-9a-f]{64})", text)
    assert len(set(hashes)) == 3 * 2
    assert re.findall(r"^torch==(\S+)\+cpu", text, re.MULTILINE) == re.findall(
        r"^torch==(\S+)", (LOCKS / "image-gpu.txt").read_text(), re.MULTILINE
    )


def installs(text: str) -> list[str]:
    """Every command of a script that installs or fetches packages, lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return re.findall(r"\bpip\"? [^&|\n]*\b(?:install|download)\b[^&|\n]*", joined)


@pytest.mark.parametrize(
    "path", [*SCRIPTS, ROOT / "Makefile", ROOT / "Dockerfile"], ids=lambda path: path.name
)
def test_install_script_installs_by_hashes_only(path: Path) -> None:
    loose = [
        command
        for command in installs(path.read_text())
        # coe itself comes from this folder.
        if "--require-hashes" not in command
        and not re.search(r"-e \.|isolation (?:--root \S+ )?\.", command)
    ]
    assert len(loose) == NOT_LOCKED.get(path.name, 0), loose


def test_installs_finds_every_form_of_the_command() -> None:
    assert (
        len(installs("pip install x\n$v/bin/pip --quiet install \\\n  y && uv pip install z")) == 3
    )


def test_uv_is_pinned_in_one_place() -> None:
    (pinned,) = re.findall(r"^uv==(\S+)", (LOCKS / "tools" / "uv.txt").read_text(), re.MULTILINE)
    named = {
        version
        for path in (*SCRIPTS, ROOT / "Makefile", ROOT / "Dockerfile")
        for version in re.findall(r"uv==([\d.]+)", path.read_text())
    }
    assert named == {pinned}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty virtual environment, for all of this module's installs to fail in or not."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=True)
    return folder


def wheel(folder: Path, version: str) -> str:
    """A wheel that calls itself torch; its SHA-256."""
    folder.mkdir(exist_ok=True)
    path = folder / f"torch-{version}-py3-none-any.whl"
    about = f"torch-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("torch.py", "")
        archive.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
        )
        archive.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{about}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def install(
    folder: Path, environment: Path, wheels: Path, sha256: str
) -> subprocess.CompletedProcess[str]:
    """Run a copy of torch.sh with a lock of one hash; pip sees a folder of wheels and no index."""
    locks = folder / "locks" / "tools"
    locks.mkdir(parents=True)
    shutil.copy(ROOT / "deploy" / "torch.sh", folder)
    shutil.copy(LOCKS / "tools" / "uv.txt", locks)
    lock = f"# A comment.\ntorch==2.13.0+cpu \\\n    --hash=sha256:{sha256}\n"
    (folder / "locks" / "torch-cpu.txt").write_text(lock)
    own = {"PIP_FIND_LINKS": str(wheels), "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    return subprocess.run(
        [folder / "torch.sh", environment],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        check=False,
    )


def version_there(environment: Path) -> str:
    """The version of torch in the environment, or nothing."""
    found = sorted(environment.glob("lib/python*/site-packages/torch-*.dist-info"))
    return found[0].name.removeprefix("torch-").removesuffix(".dist-info") if found else ""


def test_torch_script_takes_the_file_of_the_lock_only(tmp_path: Path, environment: Path) -> None:
    known = wheel(tmp_path / "wheels", "2.13.0+cpu")
    other = install(tmp_path / "other", environment, tmp_path / "wheels", "0" * 64)
    assert other.returncode == 1
    assert "torch 2.13.0+cpu that pip finds is not one of those in" in other.stderr
    assert version_there(environment) == ""
    nothing = install(tmp_path / "nothing", environment, tmp_path / "none", known)
    assert nothing.returncode == 1
    assert "can't get uv" in nothing.stderr
    assert version_there(environment) == ""
    good = install(tmp_path / "good", environment, tmp_path / "wheels", known)
    assert (good.returncode, good.stderr) == (0, "")
    assert version_there(environment) == "2.13.0+cpu"
    # There already: nothing is looked for.
    again = install(tmp_path / "again", environment, tmp_path / "none", "0" * 64)
    assert (again.returncode, again.stderr) == (0, "")


def test_torch_script_calls_uv_without_settings_that_omit_torch() -> None:
    # The project tells uv to leave torch out of the lock; uv would leave it out here as well, and
    # say that all went well.
    assert "torch ; sys_platform == 'never'" in (ROOT / "pyproject.toml").read_text()
    commands = installs((ROOT / "deploy" / "torch.sh").read_text())
    (by_uv,) = [command for command in commands if "--torch-backend cpu" in command]
    assert "--no-config" in by_uv


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("libnuma", "apt-get install libnuma1"),
        ("version_info", "Python 3.11, 3.12 or 3.13 is needed"),
    ],
)
def test_setup_names_missing_system_packages_before_it_installs(
    tmp_path: Path, missing: str, told: str
) -> None:
    (tmp_path / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "setup.sh", tmp_path / "deploy")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *{missing}*) exit 1 ;; esac\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    ran = subprocess.run(
        [tmp_path / "deploy" / "setup.sh"],
        env={**os.environ, "PYTHON": str(python)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert told in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deploy", "python"]


# A stand-in for `python3` and for the pip in the environment that it makes. It notes what is
# installed, and is interrupted where the environment says so.
PYTHON = r"""#!/bin/bash
case "$*" in
    *"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/pip" ;;
    *"pip "*) [ -z "$INTERRUPT" ] || kill -9 $PPID; echo "${@: -1}" >>"$NOTES" ;;
    -V) echo Python 3.11 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with what `deploy/setup.sh` reads, and programs that only pretend."""
    (tmp_path / "deploy" / "locks").mkdir(parents=True)
    for script in ("setup.sh", "torch.sh", "gpu_setup_preflight.sh"):
        (tmp_path / "deploy" / script).write_text("#!/bin/bash\nexit 0\n")
        (tmp_path / "deploy" / script).chmod(0o755)
    shutil.copy(ROOT / "deploy" / "setup.sh", tmp_path / "deploy")
    for name in ("cpu", "gpu", "torch-cpu"):
        (tmp_path / "deploy" / "locks" / f"{name}.txt").write_text(name)
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def set_up(checkout: Path, **given: str) -> tuple[int, list[str]]:
    """Run `deploy/setup.sh`.

    Returns:
        Its exit status, and the locks that it installed from.
    """
    notes = checkout / "notes"
    notes.unlink(missing_ok=True)
    made = {name: value for name, value in os.environ.items() if name not in ("GPU", "INTERRUPT")}
    ran = subprocess.run(
        [checkout / "deploy" / "setup.sh"],
        env={**made, "PYTHON": str(checkout / "python"), "NOTES": str(notes), **given},
        capture_output=True,
        check=False,
    )
    lines = notes.read_text().splitlines() if notes.exists() else []
    return ran.returncode, [line for line in lines if line != "."]


CPU, GPU = "deploy/locks/cpu.txt", "deploy/locks/gpu.txt"


def test_setup_keeps_to_the_kind_that_is_there_and_does_nothing_twice(checkout: Path) -> None:
    assert set_up(checkout) == (0, [CPU])
    assert set_up(checkout) == (0, [])
    assert set_up(checkout, GPU="1") == (0, [GPU])
    assert set_up(checkout) == (0, [])
    assert set_up(checkout, GPU="0") == (0, [CPU])
    assert not (checkout / ".venv.old").exists()


@pytest.mark.parametrize("kind", ["", "tpu", "../../x", "cpu\ngpu", "-n"])
def test_setup_takes_an_unknown_kind_for_the_cpu(checkout: Path, kind: str) -> None:
    assert set_up(checkout) == (0, [CPU])
    (checkout / ".venv" / ".kind").write_text(kind)
    assert set_up(checkout) == (0, [])
    assert set_up(checkout, GPU="1") == (0, [GPU])


def test_setup_interrupted_is_not_taken_for_finished(checkout: Path) -> None:
    assert set_up(checkout) == (0, [CPU])
    lock = checkout / CPU
    lock.write_text("newer")
    assert set_up(checkout, INTERRUPT="1")[0] != 0
    lock.write_text("cpu")  # back to the commit whose packages were there
    assert set_up(checkout) == (0, [CPU])
    assert set_up(checkout, GPU="1", INTERRUPT="1")[0] != 0
    assert set_up(checkout) == (0, [GPU])


def test_setup_interrupted_while_it_removes_leaves_no_half_environment(checkout: Path) -> None:
    assert set_up(checkout, GPU="1") == (0, [GPU])
    remove = checkout / "rm"
    remove.write_text(
        "#!/bin/bash\nfor last; do :; done\n"
        f'case "$*" in *.ready*) exec {shutil.which("rm")} "$@" ;; esac\n'
        f'[ ! -e "$last/.kind" ] || {{ {shutil.which("rm")} "$last/.kind"; kill -9 $PPID; }}\n'
    )
    remove.chmod(0o755)
    ran, _ = set_up(checkout, GPU="0", PATH=f"{checkout}:{os.environ['PATH']}")
    assert ran != 0
    # What is left of the GPU's packages is not where the CPU's are installed.
    assert not (checkout / ".venv").exists()
    remove.unlink()
    assert set_up(checkout) == (0, [CPU])
    assert not (checkout / ".venv.old").exists()
