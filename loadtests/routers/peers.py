"""Other projects' gateways and routers: packages, versions, and how each is started.

Each is set up as its own guide says for production: one process, no database, quiet logs, metrics
as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from loadtests.lib.child_processes import fetch, running
from loadtests.lib.load_client import Target
from loadtests.routers.peer_environments import NodePackage, PythonPackage, made

_START_S = 180.0


@dataclass(frozen=True, slots=True)
class Site:
    """What a gateway is started with.

    Attributes:
        port: Where it listens.
        metrics_port: Where it may tell its metrics.
        upstream_port: The one upstream, on this machine.
        model: The model's name for clients.
        key: What clients send; the gateways that check keys know no other.
        folder: Where it may write a config.
    """

    port: int
    metrics_port: int
    upstream_port: int
    model: str
    key: str
    folder: Path

    @property
    def upstream(self) -> str:
        """The upstream's URL, without `/v1`."""
        return f"http://127.0.0.1:{self.upstream_port}"


@dataclass(frozen=True, slots=True)
class Peer:
    """A gateway of another project.

    Attributes:
        name: Its name in commands and tables.
        language: What its path of a request is written in.
        package: What is installed, with its version.
        command: The command line, from the environment's folder and the site.
        ready_path: Answers 200 once it serves.
        env: Variables of its environment, from the site.
        headers: What clients send beside the key, from the site.
        rust_router: Whether it only relays: no tenants, prices or budgets.
    """

    name: str
    language: str
    package: PythonPackage | NodePackage
    command: Callable[[Path, Site], list[str]]
    ready_path: str
    env: Callable[[Site], Mapping[str, str]] = field(default=lambda site: {})
    headers: Callable[[Site], tuple[tuple[str, str], ...]] = field(default=lambda site: ())
    rust_router: bool = False

    def environment(self) -> Path:
        """Its environment's folder, made first if need be. Raises CannotInstallError."""
        return made(self.name, self.package)

    def target(self, site: Site) -> Target:
        """Where clients ask."""
        return Target("127.0.0.1", site.port, key=site.key, headers=self.headers(site))

    @contextmanager
    def serving(self, site: Site) -> Iterator[int]:
        """The gateway, ready; gives its pid. Raises RuntimeError if it does not come up."""
        command = self.command(self.environment(), site)

        def ready() -> bool:
            return fetch(site.port, self.ready_path)[0] == 200

        env = {"PYTHONPATH": "", **self.env(site)}
        with running(self.name, command, ready, timeout_s=_START_S, env=env) as process:
            yield process.pid


def _vllm_router(folder: Path, site: Site) -> list[str]:
    return [
        *(str(folder / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(site.port)),
        *("--worker-urls", site.upstream, "--policy", "round_robin"),
        *("--prometheus-port", str(site.metrics_port), "--log-level", "warning"),
    ]


def _sglang_router(folder: Path, site: Site) -> list[str]:
    program = str(folder / "bin" / "sglang-router")
    return [
        *(program, "launch", "--host", "127.0.0.1", "--port", str(site.port)),
        *("--worker-urls", site.upstream, "--policy", "round_robin"),
        *("--prometheus-port", str(site.metrics_port), "--log-level", "warn"),
    ]


def _portkey(folder: Path, site: Site) -> list[str]:
    program = folder / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    return ["node", str(program), "--headless", f"--port={site.port}"]


def _litellm(folder: Path, site: Site) -> list[str]:
    params = {
        "model": "openai/upstream",
        "api_base": f"{site.upstream}/v1",
        "api_key": "none",
    }
    settings = {
        "model_list": [{"model_name": site.model, "litellm_params": params}],
        "litellm_settings": {"set_verbose": False, "telemetry": False, "num_retries": 0},
    }
    path = site.folder / "litellm.yaml"
    path.write_text(yaml.safe_dump(settings))
    return [
        *(str(folder / "bin" / "litellm"), "--config", str(path)),
        *("--host", "127.0.0.1", "--port", str(site.port)),
        *("--num_workers", "1", "--telemetry", "False"),
    ]


def _litellm_env(site: Site) -> Mapping[str, str]:
    # It does not start without a key.
    return {
        "LITELLM_MASTER_KEY": site.key,
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }


PEERS = (
    Peer(
        name="vllm-router",
        language="Rust",
        package=PythonPackage("vllm-router", "0.1.17"),
        command=_vllm_router,
        ready_path="/health",
        rust_router=True,
    ),
    Peer(
        name="sglang-router",
        language="Rust",
        package=PythonPackage("sglang-router", "0.3.2"),
        command=_sglang_router,
        ready_path="/health",
        rust_router=True,
    ),
    Peer(
        name="portkey",
        language="Node",
        # With newer releases of its HTTP server it answers every stream with status 500.
        package=NodePackage(
            "@portkey-ai/gateway", "1.15.2", overrides=[("@hono/node-server", "1.13.8")]
        ),
        command=_portkey,
        ready_path="/",
        headers=lambda site: (
            ("x-portkey-provider", "openai"),
            ("x-portkey-custom-host", f"{site.upstream}/v1"),
        ),
    ),
    Peer(
        name="litellm",
        language="Python",
        # It asks for a certifi of the same week, which mirrors may not have yet; nothing here
        # speaks TLS.
        package=PythonPackage("litellm[proxy]", "1.106.4", overrides=["certifi>=2024"]),
        command=_litellm,
        ready_path="/health/liveliness",
        env=_litellm_env,
    ),
)
