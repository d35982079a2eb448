"""Records of `coe doctor` on disk."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.engine.swap_proof import ProofFinding, Verdict
from service.engine.swap_proof_store import FOLDER, SwapProofStore, this_machine
from service.models.model_store import list_models
from tests.unit.engine.test_swap_proof import GPU, LLAMA, PROVEN, QWEN, proof


def test_store_reads_what_it_wrote_for_that_machine_and_layout_only(tmp_path: Path) -> None:
    store = SwapProofStore(tmp_path)
    assert store.read(GPU, LLAMA) is None
    assert store.all() == ()
    one, two = proof(inplace=PROVEN), proof(QWEN, made="2027-01-01", sleep=PROVEN)
    for each in (one, two):
        assert store.write(each).parent == tmp_path / FOLDER
    assert store.read(GPU, LLAMA) == one
    assert store.read(GPU, QWEN) == two
    assert store.read(replace(GPU, driver="581"), LLAMA) is None
    assert store.all() == (two, one)
    # A copy under another name proves nothing for that name's machine.
    store.path(GPU, LLAMA).rename(store.path(replace(GPU, driver="581"), LLAMA))
    assert store.read(replace(GPU, driver="581"), LLAMA) is None
    assert list_models(tmp_path) == (), "the records are taken for a model"


@pytest.mark.parametrize(
    "text", ["", "{", '{"format": 9}', "[1]", "\0", "[" * 500_000, " " * 2**21]
)
def test_store_damaged_record_counts_as_none_and_is_logged(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = SwapProofStore(tmp_path)
    path = store.write(proof())
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert store.read(GPU, LLAMA) is None
        assert store.all() == ()
    assert str(path) in caplog.text
    store.write(proof(inplace=PROVEN))
    assert store.read(GPU, LLAMA) is not None


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_store_something_else_than_a_file_counts_as_none_at_once(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = SwapProofStore(tmp_path)
    path = store.path(GPU, LLAMA)
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.name)
    assert store.read(GPU, LLAMA) is None
    assert store.all() == ()
    assert str(path) in caplog.text


@pytest.mark.parametrize("unknown", [{"hardware": ""}, {"driver": ""}])
def test_store_has_no_record_of_gpus_that_are_not_named(
    tmp_path: Path, unknown: dict[str, str]
) -> None:
    store, nameless = SwapProofStore(tmp_path), replace(GPU, **unknown)
    store.write(replace(proof(inplace=PROVEN), machine=nameless))
    assert store.read(nameless, LLAMA) is None


def test_store_withdraw_changes_proven_methods_once(tmp_path: Path) -> None:
    store = SwapProofStore(tmp_path)
    assert not store.withdraw(GPU, LLAMA, "inplace", "why")
    assert not store.folder.exists(), "a withdrawal made a record"
    store.write(proof(inplace=PROVEN, sleep=PROVEN))
    assert store.withdraw(GPU, LLAMA, "inplace", "why")
    assert not store.withdraw(GPU, LLAMA, "inplace", "why")
    found = store.read(GPU, LLAMA)
    assert found is not None
    assert found.findings == {"inplace": ProofFinding(Verdict.WITHDRAWN, "why"), "sleep": PROVEN}


def test_store_readers_never_see_a_part_of_a_record(tmp_path: Path) -> None:
    store = SwapProofStore(tmp_path)
    figures = [{f"{letter}{i}": 1.0 for i in range(400)} for letter in "ab"]
    texts = [proof(inplace=ProofFinding(Verdict.PROVEN, "", found)) for found in figures]
    store.write(texts[0])
    done = threading.Event()

    def write() -> None:
        for i in range(60):
            store.write(texts[i % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(store.read(GPU, LLAMA))
    writer.join()
    assert seen
    assert all(found in texts for found in seen)
    assert len(list(store.folder.iterdir())) == 1, "an unfinished file stayed"


def test_store_unwritable_folder_does_not_break_a_withdrawal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = SwapProofStore(tmp_path)
    store.write(proof(inplace=PROVEN))

    def refuse(*_: Any) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(os, "fsync", refuse)
    assert not store.withdraw(GPU, LLAMA, "inplace", "why")
    assert "read-only" in caplog.text


def test_this_machine_names_its_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = this_machine(on_gpu=False)
    assert here.device == "cpu"
    assert here.hardware
    assert here.driver == ""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\ncase "$1" in *driver*) echo 580.65.06;; '
        '*) for i in 0 1; do echo "$i, GPU-h$i, NVIDIA H200, 143771, 0, 143000"; done\n'
        'echo "2, GPU-l2, NVIDIA L4, 23034, 0, 22500";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for visible, hardware in {
        "1,0": "NVIDIA H200",
        "GPU-l2": "NVIDIA L4",
        "0,2": "NVIDIA H200, NVIDIA L4",
        "MIG-x": "NVIDIA H200, NVIDIA L4",
    }.items():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        there = this_machine(on_gpu=True)
        assert (there.device, there.hardware, there.driver) == ("gpu", hardware, "580.65.06")

    tool.write_text("#!/bin/sh\nexit 9\n")
    assert (this_machine(on_gpu=True).hardware, this_machine(on_gpu=True).driver) == ("", "")
