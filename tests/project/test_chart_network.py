"""Network policies and services that the chart renders."""

from __future__ import annotations

import pytest

from tests.support import helm_chart
from tests.support.helm_chart import VALUES, of_kind, rendered

# Ray's, HAProxy's, Redis's, the gateways' own and the pools' ports.
CLOSED = (6379, 8265, 10001, 8404, 9101, 52365, 30000, 30999, 31100, 31999, 44217)


@pytest.mark.parametrize("values", VALUES)
def test_service_selects_gateways_only(newest: str, values: str) -> None:
    objects = rendered(newest, values)
    service = next(s for s in of_kind(objects, "Service") if s["metadata"]["name"] == "rel-coe")
    selected = {
        name
        for name, pod in helm_chart.pods(objects)
        if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    }
    plain = bool(of_kind(objects, "Deployment"))
    assert selected == ({"Deployment/rel-coe"} if plain else {"RayService/rel-coe/gateway"})


def _labels(component: str) -> dict[str, str]:
    return {
        "app.kubernetes.io/part-of": "coe",
        "app.kubernetes.io/instance": "rel",
        "app.kubernetes.io/component": component,
    }


def test_network_policies_close_everything_but_the_service(newest: str) -> None:
    objects = rendered(newest, "default-values.yaml")
    stranger: dict[str, str] = {}
    redis = {"app.kubernetes.io/name": "redis", "app.kubernetes.io/instance": "rel"}
    gateway, pool, head = map(_labels, ("gateway", "pool", "head"))
    assert helm_chart.may_reach(objects, stranger, gateway, 8000)
    cache = redis | {"app.kubernetes.io/name": "redis-cache"}
    for target in (gateway, pool, head, redis, cache):
        for port in CLOSED:
            assert not helm_chart.may_reach(objects, stranger, target, port), (target, port)
    assert not helm_chart.may_reach(objects, stranger, pool, 8000)
    # Pools' ports are gateways' alone; Ray's are for all nodes of the release.
    assert helm_chart.may_reach(objects, gateway, pool, 31500)
    assert not helm_chart.may_reach(objects, pool, pool, 31500)
    assert not helm_chart.may_reach(objects, head, pool, 31500)
    for source in (gateway, pool, head):
        assert helm_chart.may_reach(objects, source, head, 6379)
        assert helm_chart.may_reach(objects, source, pool, 10002)
    # What counts, and what may be lost, is asked by gateways alone.
    for store in (redis, cache):
        assert helm_chart.may_reach(objects, gateway, store, 6379)
        assert not helm_chart.may_reach(objects, pool, store, 6379)
        assert not helm_chart.may_reach(objects, head, store, 6379)
    other = gateway | {"app.kubernetes.io/instance": "another"}
    assert not helm_chart.may_reach(objects, other, pool, 31500)
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    assert helm_chart.may_reach(objects, operator, head, 8265, namespace="kuberay-system")
    assert not helm_chart.may_reach(objects, operator, head, 8265, namespace="somebody-s")
    assert not helm_chart.may_reach(objects, operator, pool, 8265, namespace="kuberay-system")
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    assert helm_chart.may_reach(objects, prometheus, pool, 9464, namespace="monitoring")
    assert not helm_chart.may_reach(objects, prometheus, pool, 9464, namespace="somebody-s")


def test_network_policies_let_the_head_reach_its_redis(newest: str) -> None:
    objects = rendered(newest, "all-on-values.yaml")
    redis = {"app.kubernetes.io/name": "redis", "app.kubernetes.io/instance": "rel"}
    for component, may in (("gateway", True), ("head", True), ("pool", False)):
        assert helm_chart.may_reach(objects, _labels(component), redis, 6379) is may


def test_network_policies_in_plain_mode_open_only_the_port(newest: str) -> None:
    objects = rendered(newest, "minimal-cpu-values.yaml")
    assert helm_chart.may_reach(objects, {}, _labels("gateway"), 8000)
    for port in CLOSED:
        assert not helm_chart.may_reach(objects, {}, _labels("gateway"), port)


def test_network_policies_with_named_clients_admit_them_only(newest: str) -> None:
    objects = rendered(newest, "external-redis-values.yaml")
    assert not helm_chart.may_reach(objects, {"app": "stranger"}, _labels("gateway"), 8000)
    assert helm_chart.may_reach(objects, _labels("test"), _labels("gateway"), 8000)
