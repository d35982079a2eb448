"""What gateways in Serve replicas measure and ask."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray import serve
from ray.serve.exceptions import RayServeException

from service.deployment.replicas import CpuShare, _count_replicas
from service.errors import UnavailableError


def test_cpu_share_follows_the_processor_time() -> None:
    wall = cpu = 0.0
    share = CpuShare(lambda: wall, lambda: cpu)
    assert share.read() == 0
    seen = []
    for _ in range(60):
        wall, cpu = wall + 1, cpu + 0.5
        seen.append(share.read())
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.5, rel=0.01)
    # Another reading at the same time changes nothing.
    assert share.read() == seen[-1]
    wall += 100
    assert share.read() < 0.01


async def test_count_replicas_tells_scaled_deployments_by_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = {"RUNNING": 2, "STARTING": 1, "PENDING_MIGRATION": 1, "STOPPING": 3}
    deployments = {
        "pool-main": SimpleNamespace(replica_states=states),
        "gateway": SimpleNamespace(replica_states={"RUNNING": 1}),
        "pool-fixed": SimpleNamespace(replica_states={"RUNNING": 9}),
    }
    status = SimpleNamespace(applications={"coe": SimpleNamespace(deployments=deployments)})
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="coe"))
    monkeypatch.setattr(serve, "status", lambda: status)
    assert await _count_replicas({"pool-main", "gateway"}) == {
        "pool-main": {"starting": 2, "running": 2, "stopping": 3},
        "gateway": {"starting": 0, "running": 1, "stopping": 0},
    }
    status.applications.clear()
    assert await _count_replicas({"pool-main"}) == {}


async def test_count_replicas_without_a_controller_raises_our_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone() -> None:
        raise RayServeException("no controller")

    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(app_name="coe"))
    monkeypatch.setattr(serve, "status", gone)
    with pytest.raises(UnavailableError, match="RayServeException"):
        await _count_replicas({"pool-main"})
