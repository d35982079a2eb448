"""Embeddings in vLLM equal those that the model itself computes."""

from __future__ import annotations

import base64
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import pytest_asyncio
from numpy.typing import NDArray

from service.config import Config, VllmOptions
from service.engine.engine_interface import EngineRequest, Message
from service.engine.vllm.engine import VllmEngine, VllmModel
from service.engine.vllm.swapping_engine import SwappingVllmEngine, Weights
from service.models import inspect_model
from service.pool.memory_plan import check_plan, plan_pool
from tests.support.engine.real_engines import BASE
from tests.support.small_models import tiny_embedder

pytestmark = [
    pytest.mark.engine,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not Path(BASE).is_dir(), reason="coe models pull smollm2-135m-instruct"),
]
OPTIONS = VllmOptions(
    dtype="float32",
    max_model_len=256,
    max_num_seqs=4,
    threads=1,
    enforce_eager=True,
    kv_cache_bytes=16 * 1024**2,
)
ENDPOINTS = {"/v1/embeddings", "/v1/score", "/v1/rerank", "/tokenize", "/detokenize"}
TEXTS = (
    "A ship comes in.",
    "The harbour master writes down its flag and its cargo.",
    "Two trains leave at nine.",
    "x",
)
_ids = itertools.count()


@pytest.fixture(scope="module", params=["bert", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_embedder(tmp_path_factory.mktemp(request.param), request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(folder: Path) -> AsyncIterator[VllmEngine]:
    found = VllmEngine(
        VllmModel("vectors", str(folder), {}, pooling_runner=True), OPTIONS, on_cpu=True
    )
    report = await found.start()
    assert report.endpoints == ENDPOINTS
    yield found
    await found.stop()


async def embed(
    engine: VllmEngine, given: Any, expert: str = "vectors", **more: Any
) -> dict[str, Any]:
    return await ask(engine, "/v1/embeddings", expert, input=given, **more)


async def ask(engine: VllmEngine, path: str, expert: str, **body: Any) -> dict[str, Any]:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    raw = orjson.dumps({"model": expert, **body})
    await engine.run(EngineRequest(path, expert, raw, f"r{next(_ids)}"), send)
    assert sent[0]["status"] == 200, sent
    data: dict[str, Any] = orjson.loads(b"".join(m.get("body", b"") for m in sent[1:]))
    return data


def vectors(answer: dict[str, Any]) -> NDArray[np.float64]:
    return np.array([item["embedding"] for item in answer["data"]])


def by_transformers(folder: Path) -> NDArray[np.float64]:
    """The same vectors, computed by the library that made the model."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    at = 0 if model.config.model_type == "bert" else -1
    found = []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            one = model(input_ids=ids).last_hidden_state[0, at]
            found.append((one / one.norm()).numpy())
    return np.array(found)


async def test_embeddings_equal_the_model_s_own(engine: VllmEngine, folder: Path) -> None:
    answer = await embed(engine, list(TEXTS))
    got = vectors(answer)
    assert [item["index"] for item in answer["data"]] == list(range(len(TEXTS)))
    assert got.shape == (len(TEXTS), 64)
    assert np.allclose(np.linalg.norm(got, axis=1), 1, atol=1e-4)
    assert np.abs(got - by_transformers(folder)).max() < 1e-3
    likeness = got @ got.T
    assert likeness[~np.eye(len(TEXTS), dtype=bool)].max() < 0.999


async def test_embedding_of_a_text_is_the_same_alone_and_batched(engine: VllmEngine) -> None:
    together = vectors(await embed(engine, list(TEXTS)))
    for text, item in zip(TEXTS, together, strict=True):
        assert np.abs(vectors(await embed(engine, text))[0] - item).max() < 1e-4


async def test_embeddings_usage_counts_every_text(engine: VllmEngine) -> None:
    alone = [(await embed(engine, text))["usage"]["prompt_tokens"] for text in TEXTS]
    assert (await embed(engine, list(TEXTS)))["usage"]["prompt_tokens"] == sum(alone)
    assert min(alone) > 0


async def test_embeddings_base64_has_the_same_numbers(engine: VllmEngine) -> None:
    plain = vectors(await embed(engine, TEXTS[0]))[0]
    coded = (await embed(engine, TEXTS[0], encoding_format="base64"))["data"][0]["embedding"]
    assert np.allclose(np.frombuffer(base64.b64decode(coded), np.float32), plain, atol=1e-6)


async def test_scores_and_ranks_are_cosines_of_the_embeddings(engine: VllmEngine) -> None:
    found = vectors(await embed(engine, list(TEXTS)))
    cosines = found[1:] @ found[0]
    pairs = {"text_1": TEXTS[0], "text_2": list(TEXTS[1:])}
    answer = await ask(engine, "/v1/score", "vectors", **pairs)
    scores = [item["score"] for item in answer["data"]]
    assert np.abs(np.array(scores) - cosines).max() < 1e-4
    assert answer["usage"]["prompt_tokens"] > 0
    asked = {"query": TEXTS[0], "documents": list(TEXTS[1:]), "top_n": 2}
    ranks = (await ask(engine, "/v1/rerank", "vectors", **asked))["results"]
    assert [item["index"] for item in ranks] == np.argsort(-cosines)[:2].tolist()
    assert [item["document"]["text"] for item in ranks] == [TEXTS[1 + i["index"]] for i in ranks]


async def test_embedding_models_of_one_family_share_an_engine(tmp_path: Path) -> None:
    """As on CPU by default: exchanged in place, and looked at by their vectors."""
    from safetensors.torch import load_file, save_file

    folders = [tiny_embedder(tmp_path / name, "bert") for name in ("one", "other")]
    file = folders[1] / "model.safetensors"
    changed = {name: weight * 1.3 + 0.01 for name, weight in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    weights = {f.name: Weights(str(f), pooling_runner=True) for f in folders}
    engine = SwappingVllmEngine(
        "one", weights, OPTIONS, on_cpu=True, canary_interval=1, canaries={}
    )
    await engine.start()
    try:
        before = vectors(await embed(engine, "x", "one"))
        for name in ("other", "one", "other"):
            await engine.load_to_host(name)
            assert (await engine.swap_in(name)).ok
            got = vectors(await embed(engine, "x", name))
            assert (np.abs(got - before).max() < 1e-4) == (name == "one")
    finally:
        await engine.stop()


async def test_embedding_model_pool_can_be_planned(folder: Path) -> None:
    config = Config.model_validate(
        {
            "experts": {"vectors": {"model": str(folder), "capabilities": ["embeddings"]}},
            "pools": {"cpu": {"engine": "vllm", "vllm": {"max_model_len": 256}}},
        }
    )
    plan = plan_pool(config, "cpu", lambda name: inspect_model(folder))
    check_plan(plan, None)
    assert 0 < plan.total_bytes < 8 * 1024**3
