"""Records of `coe doctor` on disk."""

from __future__ import annotations

import logging
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.engine import swap_proof_store
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


@pytest.mark.parametrize("text", ["", "{", '{"format": 9}', "[1]", "\0"])
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
    texts = [proof(inplace=ProofFinding(Verdict.FAILED, letter * 4000)) for letter in "ab"]
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

    monkeypatch.setattr(swap_proof_store.os, "fsync", refuse)
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
        '*) echo "NVIDIA H200, 143771"; echo "NVIDIA H200, 143771";; esac\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    there = this_machine(on_gpu=True)
    assert (there.device, there.hardware, there.driver) == ("gpu", "NVIDIA H200", "580.65.06")

    def hang(*_: Any, **__: Any) -> None:
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(subprocess, "run", hang)
    assert (this_machine(on_gpu=True).hardware, this_machine(on_gpu=True).driver) == ("", "")
