"""What `make setup GPU=1` checks before it fetches anything: one line for each missing thing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.helm_chart import ROOT

SCRIPT = ROOT / "deploy" / "gpu_setup_preflight.sh"
REAL = ("bash", "env", "sort", "head", "tail", "tr", "cat")
FAKES = {
    "uname": "echo Linux x86_64",
    "nvidia-smi": "echo '580.95.05, 9.0, NVIDIA H200'",
    "timeout": '[ "$1 $2 $3" = "-k 1 30" ] && shift 3 && "$@"',
    "gcc": "exit 0",
    "g++": "exit 0",
    "python3": "exit 0",
    "df": "echo Avail; echo 40G",
}


def run(folder: Path, **changed: str | None) -> subprocess.CompletedProcess[str]:
    """Run the check with these programs in place of a GPU machine's; None removes one."""
    fakes = {**FAKES, **{name.replace("_", "-"): body for name, body in changed.items()}}
    for name in REAL:
        real = shutil.which(name)
        assert real is not None
        (folder / name).symlink_to(real)
    for name, body in fakes.items():
        if body is not None:
            (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
            (folder / name).chmod(0o755)
    return subprocess.run(
        [SCRIPT, "python3"],
        env={**os.environ, "PATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_gpu_machine_passes_in_silence(tmp_path: Path) -> None:
    ran = run(tmp_path)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"nvidia_smi": None}, "nvidia-smi is not there: install NVIDIA's driver, 580 or newer"),
        ({"nvidia_smi": "echo 'no devices were found'; exit 6"}, "fails: no devices were found"),
        ({"nvidia_smi": "true"}, "lists no GPU"),
        ({"nvidia_smi": "echo '570.133.20, 8.9, RTX 4090'"}, "driver is 570.133.20, and the CUDA"),
        (
            {"nvidia_smi": "echo '580.1, 9.0, H100'; echo '580.1, 7.0, Tesla V100'"},
            "Tesla V100 has compute capability 7.0, and vLLM needs 7.5",
        ),
        ({"timeout": "exit 124"}, "nvidia-smi does not answer"),
        ({"nvidia_smi": "echo a; exit 137"}, "nvidia-smi does not answer"),
        (
            {"nvidia_smi": "printf 'Fail\\033[2Jed to initialize\\n'"},
            "tells no driver and compute capability: Fail[2Jed to initialize",
        ),
        ({"nvidia_smi": "echo '580.1, [N/A], H100'"}, "tells no driver and compute capability"),
        ({"uname": "echo Linux aarch64"}, "and this is Linux aarch64"),
        ({"gcc": None}, "apt-get install gcc"),
        ({"g++": None}, r"apt-get install g++"),
        ({"python3": "exit 1"}, "apt-get install python3-dev"),
        ({"df": "echo Avail; echo 9G"}, "needs 25 GiB of disk here, and 9 GiB are free"),
    ],
)
def test_what_is_missing_is_named_in_one_line(
    tmp_path: Path, changed: dict[str, str | None], said: str
) -> None:
    ran = run(tmp_path, **changed)
    assert (ran.returncode, ran.stdout) == (1, "")
    (line,) = ran.stderr.splitlines()
    assert line.startswith("setup: ")
    assert said in line


@pytest.mark.parametrize("driver", ["580", "580.65.06", "590.44.01", "1000.1"])
def test_new_drivers_pass(tmp_path: Path, driver: str) -> None:
    assert run(tmp_path, nvidia_smi=f"echo '{driver}, 12.0, RTX 5090'").returncode == 0
