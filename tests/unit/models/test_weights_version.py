"""File changes that make an expert another one for tokenizer, canary and reload."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest

from service.config import Config, load_config
from service.deployment.config_reload import RunningConfig, reload
from service.engine.engine_interface import EngineRequest, Send
from service.engine.vllm.engine import VllmEngine
from service.engine.vllm.swapping_engine import Canary, SwappingVllmEngine
from service.engine.vllm.tokenizer_digest import tokenizer_digest
from service.models.weights_version import version_of
from service.pool.pool import Pool
from service.pool.pool_builder import PoolBuilder
from service.telemetry.pool_metrics import PoolMetrics

# Whatever a tokenizer, a template, a processor or the end of an answer is read from.
FACE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "qwen.tiktoken",
    "tokenization_own.py",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates/default.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "params.json",
    "config.json",
)
NOT_OF_THE_FACE = (
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "consolidated.00.pth",
    "README.md",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    ".gitattributes",
    ".cache/huggingface/download/x.lock",
    "onnx/model.onnx",
)


def _folder(where: Path, **files: str) -> Path:
    for name, text in {"config.json": '{"x":1}', "tokenizer.json": "{}", **files}.items():
        path = where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return where


@pytest.mark.parametrize("name", FACE_FILES)
def test_tokenizer_digest_changes_with_any_tokenizer_file(tmp_path: Path, name: str) -> None:
    plain = tokenizer_digest(str(_folder(tmp_path / "plain")))
    one = tokenizer_digest(str(_folder(tmp_path / "one", **{name: '{"a":1}'})))
    other = tokenizer_digest(str(_folder(tmp_path / "other", **{name: '{"a":2}'})))
    same = tokenizer_digest(str(_folder(tmp_path / "same", **{name: '{"a":1}'})))
    assert len({plain, one, other}) == 3
    assert same == one


@pytest.mark.parametrize("name", NOT_OF_THE_FACE)
def test_tokenizer_digest_ignores_weights_and_documents(tmp_path: Path, name: str) -> None:
    one = tokenizer_digest(str(_folder(tmp_path / "one", **{name: "a"})))
    assert one == tokenizer_digest(str(_folder(tmp_path / "other", **{name: "b"})))


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id", "image_token_id"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_tokenizer_digest_changes_with_special_tokens_in_a_config(
    tmp_path: Path, name: str, key: str
) -> None:
    digests = {
        tokenizer_digest(str(_folder(tmp_path / str(token), **{name: json.dumps({key: token})})))
        for token in (2, 3, [2, 3])
    }
    assert len(digests) == 3


def test_tokenizer_digest_ignores_metadata_in_a_config(tmp_path: Path) -> None:
    one = {"eos_token_id": 2, "transformers_version": "4.50.0", "_name_or_path": "a"}
    other = {"transformers_version": "5.0.0", "eos_token_id": 2, "torch_dtype": "bfloat16"}
    first = tokenizer_digest(str(_folder(tmp_path / "1", **{"config.json": json.dumps(one)})))
    second = tokenizer_digest(str(_folder(tmp_path / "2", **{"config.json": json.dumps(other)})))
    assert first == second


@pytest.mark.parametrize(
    "name", ["model.safetensors", "chat_templates/default.jinja", "tokenizer.json"]
)
def test_file_version_changes_when_files_are_replaced(tmp_path: Path, name: str) -> None:
    folder = _folder(tmp_path / "m", **{name: "a", ".cache/lock": "a"})
    before = version_of(str(folder), None, 1.0)
    (folder / ".cache/lock").write_text("what a download left")
    assert version_of(str(folder), None, 1.0) == before
    fresh = tmp_path / "fresh"
    fresh.write_text("b")
    fresh.rename(folder / name)
    assert version_of(str(folder), None, 1.0) != before


class FixedAnswers(VllmEngine):
    """An engine that answers with its `tokens`."""

    tokens: list[int]

    async def run(self, request: EngineRequest, send: Send) -> None:
        logprobs = {"token_logprobs": [-0.1] * len(self.tokens)}
        choice = {"token_ids": self.tokens, "logprobs": logprobs}
        await send({"body": orjson.dumps({"choices": [choice]})})


class Speaks(SwappingVllmEngine, FixedAnswers):
    """An engine that swaps, and says what it is told to."""

    def __init__(self, canaries: dict[str, Canary], version: str, tokens: list[int]) -> None:
        self._on_cpu = True
        self._canaries = canaries
        self._own_canaries = {}
        self._versions = {"math": version}
        self._broken = None
        self._handle = SimpleNamespace(generates=True, max_model_len=2048, vocab_size=49152)
        self.tokens = tokens


async def test_canary_after_files_were_replaced_is_that_of_the_new_files() -> None:
    canaries: dict[str, Canary] = {}
    assert await Speaks(canaries, "old", [1, 2, 3]).check_canary("math")
    # The same files that answer otherwise are spoiled, in whatever engine.
    assert not await Speaks(canaries, "old", [1, 2, 9]).check_canary("math")
    assert await Speaks(canaries, "new", [1, 2, 9]).check_canary("math")
    assert await Speaks(canaries, "new", [1, 2, 9]).check_canary("math")
    assert not await Speaks(canaries, "new", [1, 2, 3]).check_canary("math")


def test_reload_reports_experts_whose_files_were_replaced(tmp_path: Path) -> None:
    model = _folder(tmp_path / "m")
    source = tmp_path / "coe.yaml"
    source.write_text(f"experts: {{x: {{model: {model}}}}}\npools: {{p: {{engine: simulated}}}}\n")
    kept = tmp_path / "config.json"
    config = load_config(source)
    RunningConfig(str(source), config, config).save(kept)
    assert reload(kept)["changed"] == []
    (model / "tokenizer.json").write_text('{"new": 1}')
    assert reload(kept)["changed"] == ["x"]
    assert reload(kept)["changed"] == []


class _Noted(Pool):
    """A pool that notes who is removed."""

    def __init__(self) -> None:
        super().__init__("p")
        self.removed: list[str] = []

    async def remove(self, expert: str, reason: str, successors: Collection[str] = ()) -> None:
        self.removed.append(expert)
        await super().remove(expert, reason, successors)


async def test_reload_restarts_experts_whose_files_were_replaced_only(
    tmp_path: Path,
) -> None:
    folders = {name: str(_folder(tmp_path / name)) for name in "ab"}
    adapter = _folder(tmp_path / "tuned", **{"adapter_model.safetensors": "a"})
    config = Config.model_validate(
        {
            "experts": {
                **{name: {"model": folder} for name, folder in folders.items()},
                "merged": {"base": "a", "adapter": str(adapter), "form": "merged"},
                "later": {"model": str(tmp_path / "later")},
            },
            "pools": {"p": {"engine": "simulated", "slots": 1}},
        }
    )
    pool = _Noted()
    assembly = PoolBuilder(config, "p", pool, PoolMetrics())
    pool.start()
    await assembly.reload(config)
    await assembly.settled()
    # What was fetched since is not another expert.
    _folder(tmp_path / "later")
    await assembly.reload(config)
    await assembly.settled()
    assert pool.removed == []
    (adapter / "adapter_model.safetensors").write_text("retrained")
    await assembly.reload(config)
    await assembly.settled()
    assert pool.removed == ["merged"]
    (tmp_path / "a/tokenizer.json").write_text('{"new": 1}')
    await assembly.reload(config)
    await assembly.settled()
    assert pool.removed[1:] == ["a", "merged"]
    # A store that can't be looked at for a moment has changed nothing.
    (tmp_path / "b").rename(tmp_path / "away")
    await assembly.reload(config)
    await assembly.settled()
    (tmp_path / "away").rename(tmp_path / "b")
    await assembly.reload(config)
    await assembly.settled()
    assert pool.removed[3:] == []
    assert set(pool.snapshot().experts) == {"a", "b", "merged", "later"}
    await pool.stop(0)
