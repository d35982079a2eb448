"""The chart, rendered by real helm 3 and 4 with every value file of helm/ci."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.config import ServerConfig, read_config
from service.launch.ray_environment import every_node, node_env
from service.telemetry import metric_declarations
from tests.support import helm_chart
from tests.support.helm_chart import CHART, HELMS, ROOT, VALUES, Object, of_kind, rendered

KUBERNETES = "1.37.0"
CUSTOM = {"RayService", "HTTPRoute", "PodMonitor", "PrometheusRule"}
# Custom kinds whose schemas are not at hand; a test of their own says what is in them.
OTHER = {"ScaledObject"}


def test_chart_has_enough_value_files() -> None:
    assert len(VALUES) >= 6


@pytest.mark.parametrize("values", VALUES)
def test_chart_lints(version: str, values: str) -> None:
    ran = helm_chart.helm(version, "lint", "--strict", "helm", "-f", f"helm/ci/{values}")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "[WARNING]" not in ran.stdout + ran.stderr


@pytest.mark.parametrize("values", VALUES)
def test_chart_renders_the_same_with_helm_3_and_4(values: str) -> None:
    for name in HELMS:
        if helm_chart.tool(name, "helm") is None:
            pytest.skip(f"{name} is not here (deploy/chart_tools.sh fetches it)")

    def comparable(objects: tuple[Object, ...]) -> dict[str, Object]:
        # Secrets are made anew each time.
        return {
            f"{item['kind']}/{item['metadata']['name']}": item
            for item in objects
            if item["kind"] != "Secret"
        }

    assert comparable(rendered("helm3", values)) == comparable(rendered("helm4", values))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("mode=swarm", "mode"),
        ("modes=plain", "modes"),
        ("gateways.memory=2000", "memory"),
        ("pools.cpu.memroy=2Gi", "memroy"),
        ("pools.gpu.memory=2Gi", "config.pools has no such kind"),
        ("image.digest=sha256:12", "digest"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("config.server.port=80", "port"),
        ("config.server.gateways=0", "gateways"),
        ("service.type=Cluster", "type"),
        ("service.port=70000", "port"),
        ("kuberay.upgrade=Later", "upgrade"),
        ("modelCache.type=nfs", "type"),
        ("modelCache.type=existing", "existingClaim is needed"),
        ("modelCache.size=50", "size"),
        ("networkPolicy.egres.enabled=true", "egres"),
        ("ingress.enabled=true", "ingress.hosts"),
        ("httpRoute.enabled=true", "parentRefs"),
        ("externalRedis.existingSecret=mine", "choose one"),
        ("redis.maxMemory=much", "maxMemory"),
        ("redis.sentinel=true", "sentinel"),
        ("redis.enabled=false,config.experts.a.model=m,config.server.gateways=2", "need a Redis"),
        ("redis.enabled=false,secrets.apiKey=false", "needs config.keys"),
        ("probes.startupSeconds=soon", "startupSeconds"),
        ("ingress.paths[0]=v1", "paths"),
        ("redis.cache.maxMemory=much", "maxMemory"),
        ("tmpSize=4", "tmpSize"),
        ("keda.enabled=true", "for mode plain"),
        ("mode=plain,keda.enabled=true,keda.maxReplicas=0", "maxReplicas"),
        ("mode=plain,keda.enabled=true,keda.minReplicas=9", "at least keda.minReplicas"),
        ("mode=plain,keda.enabled=true,redis.enabled=false", "need a Redis"),
        ("mode=plain,keda.enabled=true,keda.threshold=0", "threshold"),
    ],
)
def test_chart_invalid_values_are_refused(version: str, setting: str, message: str) -> None:
    ran = helm_chart.helm(version, "template", "rel", "helm", "--set", setting)
    assert ran.returncode != 0
    assert message in ran.stderr, ran.stderr


def test_chart_values_are_all_in_the_schema_and_described() -> None:
    """The schema refuses unknown keys at every level that is the chart's own."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def same(place: str, data: Any, part: Any) -> None:
        if not isinstance(data, dict) or "properties" not in part or place == ".config":
            return
        assert part["additionalProperties"] is False, place
        assert data.keys() <= part["properties"].keys(), place
        for key, value in data.items():
            same(f"{place}.{key}", value, part["properties"][key])

    same("", values, schema)
    assert schema["properties"].keys() - {"global"} == values.keys()


@pytest.mark.parametrize("values", VALUES)
def test_chart_core_kinds_are_valid(newest: str, values: str) -> None:
    for item in rendered(newest, values):
        if item["kind"] not in CUSTOM | OTHER:
            kubernetes_validate.validate(item, KUBERNETES, strict=True)
    # Pods inside custom resources are pods all the same.
    for name, pod in helm_chart.pods(rendered(newest, values)):
        made = {"apiVersion": "v1", "kind": "Pod", **pod}
        made["metadata"] = {"name": "pod", **pod.get("metadata", {})}
        kubernetes_validate.validate(made, KUBERNETES, strict=True)
        assert name


@pytest.mark.parametrize("values", VALUES)
def test_chart_custom_kinds_are_valid(newest: str, values: str) -> None:
    archive = helm_chart.crd_archive()
    if archive is None:
        pytest.skip("no CRDs here: name an archive of them with COE_CRDS")
    schemas = helm_chart.crd_schemas(archive)
    for item in rendered(newest, values):
        if item["kind"] in CUSTOM:
            assert helm_chart.crd_faults(schemas[item["apiVersion"], item["kind"]], item) == []


# --- what the objects say


@pytest.mark.parametrize("values", VALUES)
def test_chart_pods_meet_the_restricted_standard(newest: str, values: str) -> None:
    """The restricted Pod Security Standard, and no token where none is needed."""
    volumes = {"configMap", "secret", "emptyDir", "persistentVolumeClaim"}
    if values == "no-monitoring-values.yaml":
        volumes.add("hostPath")  # the one way to have it, said in values.yaml
    for name, pod in helm_chart.pods(rendered(newest, values)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for item in [*spec["containers"], *spec.get("initContainers", [])]:
            security = item["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, name
            assert security["readOnlyRootFilesystem"] is True, name
            assert security["capabilities"] == {"drop": ["ALL"]}, name
            assert item["resources"]["requests"]["memory"] == item["resources"]["limits"]["memory"]
        for volume in spec.get("volumes", []):
            assert (volume.keys() - {"name"}) <= volumes, name
        if not name.endswith("/head"):  # its account is the operator's, for Ray's autoscaler
            assert spec["automountServiceAccountToken"] is False, name


@pytest.mark.parametrize("values", VALUES)
def test_chart_shared_memory_is_within_the_memory_limit(newest: str, values: str) -> None:
    for name, pod in helm_chart.pods(rendered(newest, values)):
        sizes = [
            volume["emptyDir"]["sizeLimit"]
            for volume in pod["spec"].get("volumes", [])
            if volume.get("emptyDir", {}).get("medium") == "Memory"
        ]
        limit = pod["spec"]["containers"][0]["resources"]["limits"]["memory"]
        assert sum(map(_mib, sizes)) <= _mib(limit) / 2, name
    service = of_kind(rendered(newest, values), "RayService")
    for _, pod in helm_chart.pods(service):
        assert [m["mountPath"] for m in pod["spec"]["containers"][0]["volumeMounts"]][:2] == [
            "/tmp",
            "/dev/shm",
        ]


def _mib(amount: str) -> int:
    return int(amount[:-2]) * {"Mi": 1, "Gi": 1024}[amount[-2:]]


def test_chart_pool_memory_is_its_own_plus_shared_memory(newest: str) -> None:
    pod = dict(helm_chart.pods(rendered(newest, "multi-pool-values.yaml")))[
        "RayService/rel-coe/pool-l4"
    ]
    assert pod["spec"]["containers"][0]["resources"]["limits"] == {
        "memory": f"{34 * 1024}Mi",
        "nvidia.com/gpu": 1,
    }


def _shared(newest: str, pool: str, *settings: str) -> tuple[int, int]:
    """MiB of a GPU pool's /dev/shm, and of the limit that it counts in."""
    plain = [] if "pool-" in pool else ["--set", "mode=plain,redis.enabled=false"]
    ran = helm_chart.helm(
        newest, "template", "rel", "helm", "--set", ",".join(
            ["config.experts.a.model=m", "config.pools.g.gpus=1", *settings]
        ), *plain
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    pod = dict(helm_chart.pods([item for item in yaml.safe_load_all(ran.stdout) if item]))[pool]
    (size,) = (
        volume["emptyDir"]["sizeLimit"]
        for volume in pod["spec"]["volumes"]
        if volume["name"] == "shm"
    )
    return _mib(size), _mib(pod["spec"]["containers"][0]["resources"]["limits"]["memory"])


@pytest.mark.parametrize(
    ("amount", "mib"),
    [("40GiB", 40 * 1024), ("1.5 gi", 1536), ("2GB", 1908), ("700M", 668), ("53687091200", 51200)],
)
def test_chart_shared_weights_are_in_shared_memory_and_the_limit(
    newest: str, amount: str, mib: int
) -> None:
    pool = "RayService/rel-coe/pool-g"
    swap = f"config.pools.g.swap.host_bytes={amount}"
    before = _shared(newest, pool, swap)
    after = _shared(newest, pool, swap, "config.pools.g.swap.method=inplace")
    assert after == (before[0] + mib, before[1] + mib)
    plain = _shared(
        newest, "Deployment/rel-coe", swap, "config.pools.g.swap.method=inplace",
        "config.pools.g.max_replicas=2",
    )  # fmt: skip
    assert plain[0] == before[0] + 2 * mib
    assert plain[1] == before[1] + 2 * mib


def test_chart_shared_weights_without_a_bound_are_refused(newest: str) -> None:
    ran = helm_chart.helm(
        newest, "template", "rel", "helm", "--set",
        "config.experts.a.model=m,config.pools.g.gpus=1,config.pools.g.swap.method=inplace",
    )  # fmt: skip
    assert ran.returncode != 0
    assert "it needs host_bytes" in ran.stderr


@pytest.mark.parametrize("values", VALUES)
def test_chart_termination_grace_covers_draining(newest: str, values: str) -> None:
    objects = rendered(newest, values)
    config = _config(objects)
    for name, pod in helm_chart.pods(
        [*of_kind(objects, "RayService"), *of_kind(objects, "Deployment")]
    ):
        grace_s = pod["spec"]["terminationGracePeriodSeconds"]
        assert grace_s >= config["server"]["drain_s"] + 20, name
        (command,) = (
            c["lifecycle"]["preStop"]["exec"]["command"] for c in pod["spec"]["containers"]
        )
        if "deployment.leave" in " ".join(command):
            assert config["server"]["drain_s"] + 10 < int(command[-1]) < grace_s, name


@pytest.mark.parametrize(
    "values", [one for one in VALUES if "cpuLimit:" not in (CHART / "ci" / one).read_text()]
)
def test_chart_sets_no_cpu_limit_by_default(newest: str, values: str) -> None:
    objects = rendered(newest, values)
    pods = helm_chart.pods([*of_kind(objects, "RayService"), *of_kind(objects, "Deployment")])
    limits = [
        container["resources"]["limits"]
        for _, pod in pods
        for container in pod["spec"]["containers"]
    ]
    assert limits
    assert [item for item in limits if "cpu" in item] == []


@pytest.mark.parametrize("values", VALUES)
def test_chart_probes_allow_slow_starts_and_ignore_experts(newest: str, values: str) -> None:
    objects = rendered(newest, values)
    for name, pod in helm_chart.pods(
        [*of_kind(objects, "RayService"), *of_kind(objects, "Deployment")]
    ):
        for container in pod["spec"]["containers"]:
            live = json.dumps(container.get("livenessProbe", {}))
            assert "/ready" not in live, name
            if (start := container.get("startupProbe")) is not None:
                assert start["periodSeconds"] * start["failureThreshold"] >= 600, name
                # Traffic comes when an expert has answered, and stays while the gateway is alive.
                assert start["httpGet"]["path"] == "/ready", name
                assert container["readinessProbe"]["httpGet"]["path"] == "/health", name


def _config(objects: tuple[Object, ...]) -> dict[str, Any]:
    found = next(m for m in of_kind(objects, "ConfigMap") if m["metadata"]["name"] == "rel-coe")
    config: dict[str, Any] = yaml.safe_load(found["data"]["config.yaml"])
    return config


def test_chart_single_gpu_example_equals_the_documented_one() -> None:
    values = yaml.safe_load((CHART / "ci" / "single-gpu-values.yaml").read_text())
    data = yaml.safe_load((ROOT / "deploy" / "config" / "gpu-24gb.yaml").read_text())
    # The image has the artifacts at a place of its own.
    data["router"]["artifact"] = data["router"]["artifact"].replace("../..", "/opt/coe")
    assert values["config"] == data


# --- coe and Ray read what the chart makes


@pytest.mark.parametrize("values", VALUES)
def test_chart_config_is_accepted_by_coe(newest: str, values: str) -> None:
    config = read_config(_config(rendered(newest, values)), values, Path("/etc/coe"))
    assert config.server.host == "0.0.0.0"
    assert config.models_dir == "/models"


def test_chart_services_are_accepted_by_ray(newest: str) -> None:
    """Serve's own schema, our builder, and what Ray's autoscaler makes of the groups."""
    specs = {
        values: services[0]["spec"]
        for values in VALUES
        if (services := of_kind(rendered(newest, values), "RayService"))
    }
    plain = {f"{name}-values.yaml" for name in ("minimal-cpu", "single-gpu", "inference-gateway")}
    assert set(VALUES) - set(specs) == plain
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.rayservice_reader"],
        cwd=ROOT,
        input=json.dumps(specs),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    for values, read in json.loads(ran.stdout).items():
        config = _config(rendered(newest, values))
        kinds = {f"pool-{kind}": f"coe-pool-{kind}" for kind in config["pools"]}
        wanted = {"gateway": "coe-gateway", **kinds}
        assert read["deployments"] == {name: {resource: 1} for name, resource in wanted.items()}
        groups = read["groups"]
        for group, resource in wanted.items():
            assert groups[group]["resources"][resource] == 1
            assert groups[group]["resources"]["CPU"] >= 1
        for kind, pool in config["pools"].items():
            group = groups[f"pool-{kind}"]
            assert group["min_workers"] == (pool or {}).get("min_replicas", 1)
            assert group["resources"].get("GPU", 0) == pool.get("gpus", 0)
        assert groups["headgroup"]["resources"]["CPU"] == 0


def test_chart_scales_gateways_between_their_bounds(newest: str) -> None:
    values = "multi-pool-values.yaml"
    objects = rendered(newest, values)
    server = read_config(_config(objects), values, Path("/etc/coe")).server
    (service,) = of_kind(objects, "RayService")
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert group["groupName"] == "gateway"
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 7)  # one more replaces one that left
    name = "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"
    for container in group["template"]["spec"]["containers"]:
        environment = {one["name"]: one.get("value") for one in container["env"]}
        # Streams through a gateway that is removed outlast HAProxy's change of servers.
        assert environment[name] == every_node(server)[name] == "725"


def test_chart_nodes_have_the_environment_that_serve_needs(newest: str) -> None:
    # Else: python -m service.launch.ray_environment >deploy/ray/node.env
    assert (ROOT / "deploy" / "ray" / "node.env").read_text() == node_env()
    pods = dict(helm_chart.pods(of_kind(rendered(newest, "default-values.yaml"), "RayService")))
    # The operator sets Ray's authentication itself.
    wanted = every_node(ServerConfig(drain_s=60))
    del wanted["RAY_AUTH_MODE"]
    # Else Serve keeps what its replicas say for a file of its own.
    wanted |= {"RAY_SERVE_LOG_TO_STDERR": "1", "RAY_LOG_TO_STDERR": "1"}
    for name, pod in pods.items():
        environment = {e["name"]: e.get("value") for e in pod["spec"]["containers"][0]["env"]}
        assert wanted.items() <= environment.items(), name
        # The operator refuses these, it sets them itself.
        assert not environment.keys() & {"REDIS_PASSWORD", "RAY_AUTH_MODE", "RAY_ADDRESS"}, name


def test_chart_monitoring_resources(newest: str) -> None:
    objects = rendered(newest, "all-on-values.yaml")
    monitor = of_kind(objects, "PodMonitor")[0]["spec"]
    assert monitor["podMetricsEndpoints"][0]["port"] == "coe-metrics"
    for name, pod in helm_chart.pods(of_kind(objects, "RayService")):
        assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        # Rules and dashboards go by the job's name.
        assert pod["metadata"]["labels"][monitor["jobLabel"]] == "coe"
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert ("coe-metrics" in ports) != name.endswith("/head")
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules.yml").read_text())
    assert of_kind(objects, "PrometheusRule")[0]["spec"] == rules
    boards = {
        name: json.loads(text)
        for item in of_kind(objects, "ConfigMap")
        if item["metadata"]["labels"].get("grafana_dashboard") == "1"
        for name, text in item["data"].items()
    }
    folder = ROOT / "deploy" / "grafana" / "dashboards"
    assert boards == {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_chart_scales_whole_services_by_their_queues(newest: str) -> None:
    objects = rendered(newest, "inference-gateway-values.yaml")
    (scaled,) = of_kind(objects, "ScaledObject")
    (deployment,) = of_kind(objects, "Deployment")
    assert scaled["apiVersion"] == "keda.sh/v1alpha1"
    spec = scaled["spec"]
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment["metadata"]["name"]}
    assert spec.pop("scaleTargetRef") == target
    # KEDA decides alone; an upgrade of the release must not set another number.
    assert "replicas" not in deployment["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 6)
    (trigger,) = spec["triggers"]
    query = trigger["metadata"].pop("query")
    assert trigger == {
        "type": "prometheus",
        "metricType": "AverageValue",
        "metadata": {
            "serverAddress": "http://prometheus-operated.monitoring.svc:9090",
            "threshold": "4",
        },
    }
    # It asks for a metric that there is, of the pods of this release alone.
    (name, labels) = re.fullmatch(r"sum\((\w+)\{(.+)\}\)", query).groups()  # type: ignore[union-attr]
    assert name == metric_declarations.REQUESTS_WAITING.name
    pods = dict(re.findall(r'(\w+)=~?"([^"]*)"', labels))
    assert (pods["job"], pods["namespace"]) == ("coe", "coe")
    assert re.fullmatch(pods["pod"], f"{deployment['metadata']['name']}-5d4f8-x2x9z")
    assert not of_kind(rendered(newest, "minimal-cpu-values.yaml"), "ScaledObject")


def test_chart_endpoint_picker_reads_pods_of_whole_services(newest: str) -> None:
    """The selector, the port and the path that the page on inference gateways names."""
    objects = rendered(newest, "inference-gateway-values.yaml")
    page = (ROOT / "docs" / "operations" / "inference-gateway.md").read_text()
    (text,) = re.findall(r"```yaml title=\"picker.yaml\"\n(.*?)```", page, re.DOTALL)
    picker = yaml.safe_load(text)
    (deployment,) = of_kind(objects, "Deployment")
    pod = deployment["spec"]["template"]
    wanted = picker["inferencePool"]["modelServers"]["matchLabels"]
    labels = {**pod["metadata"]["labels"], "app.kubernetes.io/instance": "coe"}
    assert wanted.items() <= labels.items()
    ports = {port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    assert {one["number"] for one in picker["inferencePool"]["targetPorts"]} <= ports
    assert picker["inferenceExtension"]["modelServerMetricsPath"] == "/metrics/model-server"


def test_chart_serve_config_has_no_secrets(newest: str) -> None:
    """Ray shows a Serve config to whoever asks its dashboard."""
    for values in VALUES:
        for service in of_kind(rendered(newest, values), "RayService"):
            config = yaml.safe_load(service["spec"]["serveConfigV2"])
            assert config["applications"][0]["args"]["secret"] == "/run/coe/cluster-secret"
            assert "runtime_env" not in config["applications"][0]
    heads = dict(helm_chart.pods(of_kind(rendered(newest, "default-values.yaml"), "RayService")))
    volumes = {v["name"] for v in heads["RayService/rel-coe/head"]["spec"]["volumes"]}
    assert "secrets" not in volumes


# --- who knows what

# What the values of these tests call the Secrets that the chart does not make.
_KEYS = ("--set", "secrets.environment={remote-keys},secrets.poolEnvironment={hub-token}")


def _knows(pod: Object) -> set[str]:
    """Secrets of a pod: `NAME/KEY` for each key that is mounted or in the environment, `NAME/*`."""
    found = set()
    for volume in pod["spec"].get("volumes", []):
        if (secret := volume.get("secret")) is not None:
            items = [item["key"] for item in secret.get("items", [])] or ["*"]
            found |= {f"{secret['secretName']}/{key}" for key in items}
    for entry in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
        for variable in entry.get("env", []):
            if (of := variable.get("valueFrom", {}).get("secretKeyRef")) is not None:
                found.add(f"{of['name']}/{of['key']}")
        found |= {f"{source['secretRef']['name']}/*" for source in entry.get("envFrom", [])}
    return found


def test_chart_pods_get_only_the_environment_they_need(newest: str) -> None:
    ran = helm_chart.helm(newest, "template", "rel", "helm", *_KEYS)
    assert ran.returncode == 0, ran.stderr
    knows = {
        name: _knows(pod)
        for name, pod in helm_chart.pods([item for item in yaml.safe_load_all(ran.stdout) if item])
    }
    own = "rel-coe-secrets"
    assert knows == {
        "RayService/rel-coe/head": set(),
        "RayService/rel-coe/pool-cpu": {f"{own}/cluster-secret", "hub-token/*"},
        "RayService/rel-coe/gateway": {
            *(f"{own}/{key}" for key in ("cluster-secret", "admin-key", "api-key")),
            "rel-redis/password",
            "remote-keys/*",
        },
        "StatefulSet/rel-redis": {"rel-redis/*"},
        "StatefulSet/rel-cache": {"rel-redis/*"},
        "Pod/rel-coe-test": {f"{own}/api-key"},
    }


@pytest.mark.parametrize("values", VALUES)
def test_chart_pools_have_no_key_in_their_environment(newest: str, values: str) -> None:
    for name, pod in helm_chart.pods(of_kind(rendered(newest, values), "RayService")):
        if "/pool-" in name:
            names = {item["name"] for item in pod["spec"]["containers"][0]["env"]}
            assert not {n for n in names if n.startswith("COE_")} - {"COE_MODELS"}, name


@pytest.mark.parametrize("values", VALUES)
def test_chart_gateways_keep_the_files_of_batches_on_their_volume(newest: str, values: str) -> None:
    objects = rendered(newest, values)
    given = yaml.safe_load((CHART / "values.yaml").read_text())["batches"]
    given |= (yaml.safe_load((CHART / "ci" / values).read_text()) or {}).get("batches", {})
    claims = {
        item["metadata"]["name"]: item["spec"] for item in of_kind(objects, "PersistentVolumeClaim")
    }
    mounted = []
    for name, pod in helm_chart.pods(objects):
        (volume,) = [v for v in pod["spec"].get("volumes", []) if v["name"] == "batches"] or [None]
        mounts = [
            (mount["mountPath"], mount.get("readOnly", False), env)
            for container in pod["spec"]["containers"]
            for mount in container.get("volumeMounts", [])
            if mount["name"] == "batches"
            for env in [{one["name"]: one.get("value") for one in container.get("env", [])}]
        ]
        assert bool(mounts) == (volume is not None), name
        if volume is None:
            continue
        mounted.append(name.split("/", 1)[1])
        ((path, read_only, env),) = mounts
        assert (path, read_only, env["COE_BATCHES"]) == ("/batches", False, "/batches")
        if given["type"] == "emptyDir":
            assert volume["emptyDir"] == {"sizeLimit": given["size"]}
            continue
        claim = volume["persistentVolumeClaim"]["claimName"]
        if given["type"] == "existing":
            assert claim == given["existingClaim"]
            assert claim not in claims
            continue
        assert claims[claim]["resources"]["requests"]["storage"] == given["size"]
        assert claims[claim]["accessModes"] == given["accessModes"]
        assert claims[claim].get("storageClassName", "") == given["storageClass"]
    # Gateways read keys and files; pools get neither.
    assert mounted
    assert not [name for name in mounted if "/pool-" in name]


@pytest.mark.parametrize("setting", ["everysec", "always"])
def test_chart_redis_writes_to_its_disk_as_often_as_it_is_told(newest: str, setting: str) -> None:
    ran = helm_chart.helm(
        newest, "template", "rel", "helm", "--set", f"redis.appendfsync={setting}"
    )
    assert ran.returncode == 0, ran.stderr
    confs = [
        item["data"]["redis.conf"]
        for item in yaml.safe_load_all(ran.stdout)
        if item and item["kind"] == "ConfigMap" and item["metadata"]["name"] == "rel-redis"
    ]
    assert f"appendfsync {setting}" in confs[0]


def test_chart_volatile_store_has_its_own_evicting_redis(newest: str) -> None:
    objects = rendered(newest, "default-values.yaml")
    confs = {
        item["metadata"]["name"]: item["data"]["redis.conf"]
        for item in of_kind(objects, "ConfigMap")
        if "redis.conf" in item["data"]
    }
    assert "maxmemory-policy noeviction" in confs["rel-redis"]
    assert "appendonly yes" in confs["rel-redis"]
    assert "maxmemory-policy allkeys-lru" in confs["rel-cache"]
    assert "appendonly no" in confs["rel-cache"]
    store = _config(objects)["store"]
    assert (store["url_env"], store["cache_url_env"]) == ("COE_REDIS_URL", "COE_CACHE_URL")


def test_chart_without_a_ray_token_ray_containers_exit(newest: str) -> None:
    for name, pod in helm_chart.pods(
        of_kind(rendered(newest, "default-values.yaml"), "RayService")
    ):
        hook = pod["spec"]["containers"][0]["lifecycle"]["postStart"]["exec"]["command"]
        for mode, code in (({"RAY_AUTH_MODE": "token"}, 0), ({}, 1), ({"RAY_AUTH_MODE": ""}, 1)):
            ran = subprocess.run(hook, env=mode, capture_output=True, text=True, check=False)
            assert ran.returncode == code, name
            assert ("RAY_AUTH_MODE is not token" in ran.stdout) == bool(code)
    ran = helm_chart.helm(newest, "template", "rel", "helm", "--set", "kuberay.auth=false")
    assert "postStart" not in ran.stdout


def test_chart_ingress_forwards_the_api_only(newest: str) -> None:
    objects = rendered(newest, "all-on-values.yaml")
    wanted = {"/v1", "/api", "/tokenize", "/detokenize"}
    (ingress,) = of_kind(objects, "Ingress")
    (rule,) = ingress["spec"]["rules"]
    assert {path["path"] for path in rule["http"]["paths"]} == wanted
    (route,) = of_kind(objects, "HTTPRoute")
    matches = route["spec"]["rules"][0]["matches"]
    assert {match["path"]["value"] for match in matches} == wanted


# --- checkov

# Checks that are not ours to pass, each with its reason.
NOT_OURS = {
    "CKV_K8S_8": "the test pod ends by itself",
    "CKV_K8S_9": "the test pod ends by itself",
    "CKV_K8S_11": "a limit of cores throttles a token stream; cpuLimit sets one where it must be",
    "CKV_K8S_15": "tags are versions; pullPolicy sets Always where it must be",
    "CKV_K8S_22": "Redis' image is somebody else's: its root is read-only, and passes",
    "CKV_K8S_38": "the head's pod: the operator gives it an account, for Ray's autoscaler",
    "CKV_K8S_35": "remote experts' keys are named by variable in the config; nothing else is",
    "CKV_K8S_43": "a digest is the operator's choice: image.digest",
}


def test_chart_passes_checkov(newest: str, tmp_path: Path) -> None:
    checkov = helm_chart.tool("checkov", "bin/checkov")
    if checkov is None:
        pytest.skip("checkov is not here (deploy/chart_tools.sh fetches it)")
    seen = 0
    for values in VALUES:
        objects = [check for check in rendered(newest, values) if check["kind"] not in CUSTOM]
        # It does not look into custom resources: their pods are given to it as such.
        for name, pod in helm_chart.pods(of_kind(rendered(newest, values), "RayService")):
            made = {"apiVersion": "v1", "kind": "Pod", **pod}
            meta = {"name": name.rsplit("/", 1)[1], "namespace": "coe", **pod["metadata"]}
            objects.append({**made, "metadata": meta})
        (tmp_path / values).write_text(yaml.safe_dump_all(objects))
        seen += len(objects)
    ran = subprocess.run(
        [
            checkov,
            "--skip-download",
            "--quiet",
            "--compact",
            "--framework",
            "kubernetes",
            "-d",
            tmp_path,
            "-o",
            "json",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    data = json.loads(ran.stdout)
    assert data["summary"]["parsing_errors"] == 0
    assert data["summary"]["resource_count"] >= seen
    failed = {
        f"{check['check_id']} {check['check_name']}: {check['resource']}"
        for check in data["results"]["failed_checks"]
        if check["check_id"] not in NOT_OURS
    }
    assert failed == set()
