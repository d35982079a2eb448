"""Half-sent, slow, pipelined and broken requests through Serve and HAProxy.

Also clients that read nothing, and a thousand silent ones. One `coe serve` serves all tests.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import psutil
import pytest
import yaml

from tests.support.coe_serve_process import Service, serve, wait_until

pytestmark = pytest.mark.cluster

CONFIG = {
    "server": {
        "host": "0.0.0.0",
        "allow_unauthenticated": True,
        "cors_origins": ["http://friend.example"],
        "drain_s": 5,
        "max_body_bytes": 12_000_000,
        "limits": {
            "header_timeout_s": 2,
            "body_timeout_s": 3,
            "stall_timeout_s": 4,
            "max_headers": 50,
        },
    },
    "experts": {"general": {"model": "m", "categories": ["general"]}},
    "pools": {
        "main": {
            "engine": "simulated",
            "cpus": 0.1,
            "simulated": {"tokens": 4, "max_model_len": 10_000_000},
        }
    },
}
GATEWAY, POOL = "ray::ServeReplica:coe:gateway", "ray::ServeReplica:coe:pool-main"
BODY = json.dumps(
    {"model": "general", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
).encode()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = tmp_path_factory.mktemp("hostile") / "coe.yaml"
    path.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    with serve(path) as running:
        yield running


def connect(service: Service) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", service.port), timeout=60)
    return made


def request(
    body: bytes = BODY, headers: bytes = b"", path: bytes = b"/v1/chat/completions"
) -> bytes:
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n" % path
    return head + b"content-length: %d\r\n%s\r\n" % (len(body), headers) + body


def read_reply(made: socket.socket) -> tuple[int, dict[bytes, bytes], bytes]:
    """One reply with a content-length."""
    data = b""
    while b"\r\n\r\n" not in data:
        piece = made.recv(65536)
        assert piece, f"closed after {data!r}"
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.split(b"\r\n")
    headers = {
        name.lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)
    }
    length = int(headers.get(b"content-length", b"0"))
    while len(body) < length:
        piece = made.recv(65536)
        assert piece, "closed within a body"
        body += piece
    return int(first.split()[1]), headers, body[:length]


def ask(service: Service, raw: bytes) -> tuple[int, dict[bytes, bytes], bytes]:
    with closing(connect(service)) as made:
        made.sendall(raw)
        return read_reply(made)


def works(service: Service) -> bool:
    return ask(service, request())[0] == 200


@pytest.mark.parametrize(
    "header",
    [
        b"x-request-id: \xff\xfe\r\n",
        b"x-request-id: " + b"a" * 5000 + b"\r\n",
        b"x-request-id: a\r\nx-request-id: b\r\n",
        b"x-request-timeout-seconds: 0.000001\r\n",
        b"x-request-timeout-seconds: \xff\r\n",
        b"x-request-disconnect-disabled: ?1\r\n",
        b"x-session-id: \xff\r\n",
        b"serve-multiplexed-model-id: \xff\r\n",
        b"accept: \xff\r\n",
        b"user-agent: \x80\r\n",
    ],
)
def test_hostile_headers_do_not_upset_serve(service: Service, header: bytes) -> None:
    status, answer, _ = ask(service, request(headers=header))
    assert status == 200
    assert b"server" not in answer
    assert len(answer[b"x-request-id"]) <= 128


def test_valid_request_id_is_returned(service: Service) -> None:
    _, answer, _ = ask(service, request(headers=b"x-request-id: mine-1\r\n"))
    assert answer[b"x-request-id"] == b"mine-1"


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
        b"content-length: 6\r\n\r\nabcdef",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
        b"transfer-encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: " + b"b" * 20_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\n"
        + b"".join(b"a%d: b\r\n" % i for i in range(500))
        + b"\r\n",
    ],
)
def test_malformed_http_is_a_400(service: Service, raw: bytes) -> None:
    assert ask(service, raw)[0] == 400
    assert works(service)


def test_too_many_headers_are_a_431(service: Service) -> None:
    many = b"".join(b"a%d: b\r\n" % i for i in range(60))
    status, _, body = ask(service, request(headers=many))
    assert (status, json.loads(body)["error"]["code"]) == (431, "headers_too_large")


def test_pipelined_requests_are_answered_in_order(service: Service) -> None:
    with closing(connect(service)) as made:
        bodies = [BODY, b"{", BODY, b"\xff" * 100, BODY]
        made.sendall(b"".join(map(request, bodies)))
        # HAProxy reads them one by one from its buffer.
        reader = made.makefile("rb")
        statuses = []
        for _ in bodies:
            statuses.append(int(reader.readline().split()[1]))
            length = 0
            while (line := reader.readline()) != b"\r\n":
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            reader.read(length)
        assert statuses == [200, 400, 200, 400, 200]


def test_half_a_head_or_body_times_out(service: Service) -> None:
    began_s = time.monotonic()
    with closing(connect(service)) as head, closing(connect(service)) as body:
        head.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost")
        body.sendall(request()[:-10])
        assert read_reply(body)[0] in (400, 408)
        status = head.recv(4096)
        assert status == b"" or b" 408 " in status.split(b"\r\n")[0]
    assert time.monotonic() - began_s < 60
    assert works(service)


def test_trickling_body_times_out(service: Service) -> None:
    with closing(connect(service)) as made:
        made.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            b"content-type: application/json\r\ncontent-length: 900\r\n\r\n"
        )
        made.settimeout(0.2)
        data = b""
        end_s = time.monotonic() + 20
        while not data and time.monotonic() < end_s:
            try:
                made.sendall(b" ")
                data = made.recv(65536)
            except TimeoutError:
                continue
        assert b" 408 " in data.split(b"\r\n")[0]
        assert b"request_timeout" in data


def test_ten_megabyte_prompt_is_answered_and_a_larger_one_refused(service: Service) -> None:
    text = "word " * 2_000_000
    body = json.dumps(
        {"model": "auto", "messages": [{"role": "user", "content": text}], "max_tokens": 2}
    ).encode()
    assert ask(service, request(body))[0] == 200
    declared = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 99999999999\r\n\r\n"
    )
    assert ask(service, declared)[0] == 413
    assert works(service)


def test_browser_page_is_admitted_by_its_origin_only(service: Service) -> None:
    ask_for = b"access-control-request-method: POST\r\naccess-control-request-headers: x-a\r\n\r\n"
    head = b"OPTIONS /v1/chat/completions HTTP/1.1\r\nhost: x\r\norigin: %s\r\n" + ask_for
    status, answer, _ = ask(service, head % b"http://friend.example")
    assert (status, answer[b"access-control-allow-origin"]) == (200, b"http://friend.example")
    assert answer[b"access-control-allow-headers"] == b"x-a"
    status, answer, _ = ask(service, head % b"http://attacker.example")
    assert (status, b"access-control-allow-origin" in answer) == (400, False)
    for trick in (b"origin: http://attacker.example\r\n", b"sec-fetch-site: cross-site\r\n"):
        assert ask(service, request(headers=trick))[0] == 403
    rebound = request().replace(b"host: x", b"host: attacker.example")
    assert ask(service, rebound)[0] == 403
    text = request().replace(b"application/json", b"text/plain")
    assert ask(service, text)[0] == 415


def test_only_the_service_listens_on_every_interface(service: Service) -> None:
    """Serve's gateways, and HAProxy's statistics, are reached from this machine only."""
    # Ray's own ports in these processes need its token.
    found = [
        (item.address, item.port)
        for item in service.listening()
        if "haproxy" in item.process or 30000 <= item.port < 32000
    ]
    assert any(30000 <= port < 31000 for _, port in found)
    assert ("0.0.0.0", service.port) in found
    assert {address for address, port in found if port != service.port} == {"127.0.0.1"}


def test_gateway_port_ignores_headers_that_keep_a_generation_alive(service: Service) -> None:
    ports = [item.port for item in service.listening() if GATEWAY in item.process]
    body = {"model": "general", "messages": [{"role": "user", "content": "x"}], "stream": True}
    long = json.dumps({**body, "max_tokens": 1_000_000}).encode()
    port = next(port for port in ports if 30000 <= port < 31000)
    with closing(socket.create_connection(("127.0.0.1", port), timeout=60)) as made:
        made.sendall(request(long, headers=b"x-request-disconnect-disabled: ?1\r\n"))
        assert b" 200 " in made.recv(65536)
    wait_until(lambda: running(service) == 0, "it ended with its client")


async def test_thousand_idle_connections_do_not_block_requests(service: Service) -> None:
    writers = []
    for _ in range(10):
        made = await asyncio.gather(
            *(asyncio.open_connection("127.0.0.1", service.port) for _ in range(100))
        )
        writers += [writer for _, writer in made]
    try:
        for _ in range(5):
            assert await asyncio.to_thread(works, service)
    finally:
        for writer in writers:
            writer.close()
        await asyncio.gather(*(w.wait_closed() for w in writers), return_exceptions=True)
    assert await asyncio.to_thread(works, service)


def resident(service: Service) -> int:
    sizes = 0
    for process in [*service.named(GATEWAY), *service.named(POOL)]:
        sizes += process.memory_info().rss
    return sizes


def running(service: Service) -> float:
    _, _, body = ask(service, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
    lines = [
        line for line in body.decode().splitlines() if line.startswith("coe_requests_running{")
    ]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def test_unread_stream_uses_bounded_memory_and_is_ended(service: Service) -> None:
    """Each would have 170 MB to say; the engine's own words take 7."""
    before = resident(service)
    body: Any = {
        "model": "general",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 100_000,
        "n": 8,
        "stream": True,
    }
    with ExitStack() as stack:
        for _ in range(4):
            made = stack.enter_context(closing(socket.socket()))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            made.settimeout(20)
            made.connect(("127.0.0.1", service.port))
            made.sendall(request(json.dumps(body).encode()))
            assert made.recv(12) == b"HTTP/1.1 200"
        most = before
        end_s = time.monotonic() + 120
        while time.monotonic() < end_s:
            most = max(most, resident(service))
            if running(service) == 0:
                break
            time.sleep(0.2)
        assert running(service) == 0, "they still hold their places"
        assert (most - before) / 2**20 < 100
    assert works(service)


def test_hostile_input_is_in_no_log(service: Service) -> None:
    """And no traceback either."""
    logs = [
        path
        for path in service.run_dir.rglob("*")
        if path.is_file() and path.suffix in (".log", ".err", ".out")
    ]
    assert logs
    found = [str(path) for path in logs if b"Traceback" in path.read_bytes()]
    # Workers' own files: what our code prints goes there.
    assert [item for item in found if "worker" in item or "replica" in item] == []
    assert "Traceback" not in service.log


def test_file_descriptors_are_released(service: Service) -> None:
    def few() -> bool:
        return all(
            p.num_fds() < 200 for p in service.named(GATEWAY) if isinstance(p, psutil.Process)
        )

    wait_until(few, "connections are closed")
