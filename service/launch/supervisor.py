"""`coe serve`: starts, supervises, reloads and stops the service on one machine."""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil

from service.config import Config, load_config
from service.config.server import LOOPBACK
from service.deployment.config_reload import RunningConfig, config_file, reload, version
from service.errors import CoeError, StoreUnavailableError
from service.gateway.cross_site_guard import CrossOriginRules
from service.launch import ray_environment
from service.launch.startup_server import StartupServer
from service.rpc.cluster_secret import make_secret, read_secret
from service.rpc.local_paths import admin_key_path, node_folder

if TYPE_CHECKING:
    from service.deployment.local_cluster import LocalCluster

_POLL_S = 0.5
_RETRY_S = 10.0
_PR_SET_PDEATHSIG = 1
_SETTLED = {"device", "host", "failed"}
_HAPROXY_TIMEOUT_S = 10.0

# The steps of a start, as the console shows them.
_IMPORTS = "importing modules"
_RAY = "starting Ray"
_SERVE = "starting Ray Serve and HAProxy"
_GATEWAY = "starting gateway and pools"
_EXPERTS = "loading experts"


class _Stop(BaseException):
    """A signal asked to stop. It is a BaseException so that no `except Exception` catches it."""


def run(config: Config, *, source: Path) -> None:
    """Start the service, report, wait for a signal, drain and stop.

    Raises:
        CoeError: The service can't start.
    """
    _lead_own_session()
    began_s = time.monotonic()
    stopping = threading.Event()
    hangup = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        if stopping.is_set():
            return  # already stopping; a second Ctrl-C must not leave processes behind
        stopping.set()
        raise _Stop

    signal.signal(signal.SIGHUP, lambda number, frame: hangup.set())
    config, keyless = _restrict_host(config)
    _check_port(config)
    run_dir = _make_run_dir()
    cluster = node = None
    server = config.server
    rules = CrossOriginRules(server.host, server.allowed_hosts, server.cors_origins)
    startup_server = StartupServer(
        (_IMPORTS, _RAY, _SERVE, _GATEWAY, _EXPERTS), began_s, rules, keyless=keyless
    )
    _on_signals(stop)
    try:
        secret_path = run_dir / "secret"
        _keep_admin_key()
        node = node_folder(make_secret(secret_path))
        _say(f"starting {source} ({len(config.experts)} experts); logs in {run_dir}")
        url = f"http://{_host(config)}:{config.server.port}"
        startup_server.serve_socket(run_dir / "startup.sock")
        try:
            startup_server.serve_port(config.server.host, config.server.port)
            _say(f"the console shows the start: {url}/console")
        except OSError as error:
            _say(f"no console until a gateway is up: {error}")
        ray_environment.prepare(run_dir, config.server, run_dir / "startup.sock")
        from service.deployment.local_cluster import LocalCluster

        startup_server.done(_IMPORTS)
        in_force = config_file(secret_path)
        RunningConfig(str(source.resolve()), load_config(source), config).save(in_force)
        seen = version(in_force)
        cluster = LocalCluster(config, run_dir)
        cluster.start_ray()
        startup_server.done(_RAY)
        cluster.start_serve()
        _on_signals(stop)  # Ray has replaced the handlers
        _hand_port_to_haproxy(startup_server, config)
        _say(f"Ray Serve is up ({startup_server.done(_SERVE):.0f} s)")
        cluster.deploy(secret_path, admin_key_path())
        _say(f"the gateway answers at {url} ({startup_server.done(_GATEWAY):.0f} s)")
        startup_server.finish()
        any_ready = report_experts(config, began_s)
        _say(_usage(url) if any_ready else f"every expert failed, see above; retrying: {url}")
        retry_s = 0.0
        while True:
            if hangup.wait(retry_s or _POLL_S):
                hangup.clear()
                _reload(in_force, cluster.resources)
            # A gateway may have reloaded the config as well.
            now = version(in_force)
            if now is None or (now == seen and not retry_s):
                continue
            seen = now
            retry_s = 0.0 if _redeploy(cluster, in_force) else _RETRY_S
    except _Stop:
        _say("stopping: waiting for running requests")
    finally:
        stopping.set()
        startup_server.stopping()
        if cluster is not None:
            cluster.stop()
        startup_server.close()
        shutil.rmtree(run_dir, ignore_errors=True)
        if node is not None:
            # A killed process leaves its socket.
            shutil.rmtree(node, ignore_errors=True)
    _say("stopped")


def _lead_own_session() -> None:
    """Continue in a child that leads its own session. The parent only forwards signals.

    Otherwise a signal to the whole process group (a terminal's Ctrl-C, `timeout`) would reach
    Ray's processes before they could drain. The parent never returns, and exits with the child's
    status. The child gets SIGTERM if the parent is killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # the parent was killed before prctl took effect
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: _forward_signal(child, number))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _redeploy(cluster: LocalCluster, in_force: Path) -> bool:
    """Let Serve change the pools as the config in force says; False if that failed."""
    try:
        for sentence in cluster.redeploy(RunningConfig.load(in_force).config).sentences():
            _say(sentence)
    except Exception as error:
        # The loop must survive any error, because it has to stop the service in the end.
        _say(f"changing the pools failed, trying again in {_RETRY_S:.0f} s: {error}")
        return False
    return True


def _reload(in_force: Path, resources: Callable[[], dict[str, float]]) -> None:
    """Reload the user's config. A refused config is reported, and the present config stays."""
    try:
        diff = reload(in_force, resources())
    except Exception as error:
        # Whatever is wrong with a new config must not end a service that runs.
        message = error.message if isinstance(error, CoeError) else f"{error!r:.400}"
        _say(f"the config stays as it was: {message}")
        return
    changes = [
        f"{change} {', '.join(names)}"
        for change, names in diff.items()
        if change != "pools" and names
    ]
    _say(f"config reloaded: {'; '.join(changes) or 'no expert changed'}")


def _forward_signal(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _hand_port_to_haproxy(startup_server: StartupServer, config: Config) -> None:
    """Close the startup server's port after HAProxy has started to listen on it."""
    end_s = time.monotonic() + _HAPROXY_TIMEOUT_S
    while time.monotonic() < end_s:
        for peer in psutil.net_connections(kind="tcp"):
            listens = peer.status == psutil.CONN_LISTEN and peer.laddr.port == config.server.port
            if listens and peer.pid not in (None, os.getpid()):
                startup_server.leave_port()
                return
        time.sleep(0.05)
    startup_server.leave_port()
    raise CoeError(f"HAProxy does not listen on port {config.server.port}")


def _make_run_dir() -> Path:
    """Make a private folder for the files of this run.

    HAProxy accepts socket paths of 97 characters, and Serve adds 78 characters to this folder's
    path.
    """
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="coe-", dir=parent if len(parent) <= 6 else "/tmp"))


def _keep_admin_key() -> None:
    try:
        read_secret(admin_key_path())
    except OSError:
        try:
            make_secret(admin_key_path())
        except OSError as error:
            raise CoeError(f"cannot write {admin_key_path()}: {error.strerror}") from None
        _say(f"created an admin key in {admin_key_path()}")


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def report_experts(config: Config, began_s: float) -> bool:
    """Report the experts' states until each expert is ready or has failed.

    Returns:
        False where all experts have failed.
    """
    reported: dict[str, str] = {}
    # Experts of a pool that is scaled to zero start on demand.
    asleep = set(config.experts) - {
        name
        for kind, pool in config.pools.items()
        if pool.min_replicas > 0
        for name in config.local_experts(kind)
    }
    asleep -= {name for name, expert in config.experts.items() if expert.remote is not None}
    last_report_s = 0.0
    while True:
        experts = {name: s for name, s in _ready(config).items() if name not in asleep}
        for name, state in experts.items():
            now = str(state["state"])
            if reported.get(name) == now:
                continue
            reported[name] = now
            if now == "device":
                _say(f"expert {name} is ready ({time.monotonic() - began_s:.0f} s)")
            elif now == "failed":
                _say(f"expert {name} failed: {state.get('reason', 'no reason given')}")
        if not config.experts.keys() - asleep:
            return True
        if experts and all(map(_settled, experts.values())):
            return bool(asleep) or any(s["state"] != "failed" for s in experts.values())
        if time.monotonic() - last_report_s > 5:
            last_report_s = time.monotonic()
            loading = {n: s for n, s in experts.items() if not _settled(s)}
            if loading:
                eta_s = max(float(state.get("eta_s", 0)) for state in loading.values())
                about = f", about {eta_s:.0f} s to go" if eta_s else ""
                _say(f"loading {', '.join(loading)}{about}")
        time.sleep(_POLL_S)


def _settled(state: dict[str, Any]) -> bool:
    # An expert on disk without a reason shares a slot and is loaded on demand.
    return state["state"] in _SETTLED or (state["state"] == "disk" and "reason" not in state)


def _ready(config: Config) -> dict[str, dict[str, Any]]:
    connection = http.client.HTTPConnection(_host(config), config.server.port, timeout=5)
    try:
        headers = {}
        with contextlib.suppress(OSError):
            headers["Authorization"] = f"Bearer {read_secret(admin_key_path())}"
        connection.request("GET", "/ready", headers=headers)
        data = json.loads(connection.getresponse().read())
        experts: dict[str, dict[str, Any]] = data["experts"]
        return experts
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return {}
    finally:
        connection.close()


def _host(config: Config) -> str:
    return "127.0.0.1" if config.server.host in ("0.0.0.0", "") else config.server.host


def _check_port(config: Config) -> None:
    with contextlib.closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.server.host, config.server.port))
        except OSError as error:
            raise CoeError(
                f"cannot listen on {config.server.host}:{config.server.port}: "
                f"{error.strerror}; choose another port with --port"
            ) from None


def _restrict_host(config: Config) -> tuple[Config, bool]:
    """Restrict a service without API keys to loopback, unless the config allows otherwise.

    Returns:
        The config with the address to listen on, and whether requests need no key.

    Raises:
        CoeError: The store is unreachable, and the address is not loopback.
        ConfigError: The store's config is wrong.
    """
    import asyncio

    from service.gateway.store_setup import has_keys

    host = config.server.host
    try:
        keys = asyncio.run(has_keys(config))
    except StoreUnavailableError as error:
        if host in LOOPBACK:
            _say(f"warning: {error.message}; requests get 503 until it is back")
            return config, False
        raise CoeError(
            f"{error.message}: cannot check for API keys, and without keys the service listens "
            "on loopback only"
        ) from None
    if keys:
        return config, False
    if host in LOOPBACK:
        _say(f"no API key yet: every user of this machine can send requests, on {host} only")
        return config, True
    if config.server.allow_unauthenticated:
        _say(
            f"warning: no API key yet, and server.allow_unauthenticated is set: every "
            f"client that reaches {host} port {config.server.port} can use every expert"
        )
        return config, True
    _say(
        f"no API key yet: listening on 127.0.0.1 only, not on {host}; create a key with "
        "`coe keys create`, and restart"
    )
    server = config.server.model_copy(update={"host": "127.0.0.1"})
    return config.model_copy(update={"server": server}), True


def _usage(url: str) -> str:
    # max_tokens, because a small model may not stop by itself.
    body = (
        '{"model": "auto", "max_tokens": 64, '
        '"messages": [{"role": "user", "content": "book a flight to Paris"}]}'
    )
    return (
        f"ready: {url}\n\n"
        f"  curl -i {url}/v1/chat/completions -H 'content-type: application/json' \\\n"
        f"    -d '{body}'\n\n"
        "Ctrl-C stops it."
    )


def _say(text: str) -> None:
    print(f"coe: {text}", file=sys.stderr, flush=True)
