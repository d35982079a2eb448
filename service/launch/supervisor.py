"""`coe serve`: one machine's service from start to stop, with something to look at meanwhile."""

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
from typing import Any

import psutil

from service.config import Config, load_config
from service.config.server import LOOPBACK
from service.deployment.config_reload import RunningConfig, config_file, reload
from service.errors import CoeError, StoreUnavailableError
from service.gateway.cross_origin import CrossOriginRules
from service.launch import environment
from service.launch.startup_server import StartupServer
from service.rpc.auth import admin_key_path, make_secret, node_folder, read_secret

_POLL_S = 0.5
_PR_SET_PDEATHSIG = 1
_SETTLED = {"device", "host", "failed"}
_HAPROXY_S = 10.0

# The steps of a start, as the console shows them.
_IMPORTS = "reading the code"
_RAY = "starting Ray"
_SERVE = "starting Ray Serve and HAProxy"
_GATEWAY = "starting gateway and pools"
_EXPERTS = "loading experts"


class _Stop(BaseException):
    """A signal asked us to stop. No `except Exception` on the way may take it for its own."""


def run(config: Config, *, source: Path) -> None:
    """Start, report, wait for a signal, drain, stop. Raises CoeError if it can't start."""
    _lead_own_session()
    began_s = time.monotonic()
    stopping = threading.Event()
    hangup = threading.Event()

    def stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        if stopping.is_set():
            return  # already on the way; a second Ctrl-C doesn't leave processes behind
        stopping.set()
        raise _Stop

    signal.signal(signal.SIGHUP, lambda number, frame: hangup.set())
    config, keyless = _where_keys_allow(config)
    _check_port(config)
    run_dir = _make_run_dir()
    cluster = node = None
    server = config.server
    rules = CrossOriginRules(server.host, server.allowed_hosts, server.cors_origins)
    lobby = StartupServer(
        (_IMPORTS, _RAY, _SERVE, _GATEWAY, _EXPERTS), began_s, rules, keyless=keyless
    )
    _on_signals(stop)
    try:
        secret_path = run_dir / "secret"
        _keep_admin_key()
        node = node_folder(make_secret(secret_path))
        _say(f"starting {source} ({len(config.experts)} experts); logs in {run_dir}")
        url = f"http://{_host(config)}:{config.server.port}"
        lobby.serve_socket(run_dir / "lobby")
        try:
            lobby.serve_port(config.server.host, config.server.port)
            _say(f"watch it start: {url}/console")
        except OSError as error:
            _say(f"nothing to look at until a gateway is there: {error}")
        environment.prepare(run_dir, config.server, run_dir / "lobby")
        from service.deployment.local import LocalCluster

        lobby.done(_IMPORTS)
        in_force = config_file(secret_path)
        RunningConfig(str(source.resolve()), load_config(source), config).save(in_force)
        cluster = LocalCluster(config, run_dir)
        cluster.start_ray()
        lobby.done(_RAY)
        cluster.start_serve()
        _on_signals(stop)  # Ray has put its own in their place
        _leave_to_haproxy(lobby, config)
        _say(f"Ray Serve is up ({lobby.done(_SERVE):.0f} s)")
        cluster.deploy(secret_path, admin_key_path())
        _say(f"the gateway answers at {url} ({lobby.done(_GATEWAY):.0f} s)")
        lobby.finish()
        works = _follow(config, began_s)
        _say(_how_to_call(url) if works else f"no expert works, see above; tried again: {url}")
        while True:
            hangup.wait()
            hangup.clear()
            _reload(in_force)
    except _Stop:
        _say("stopping: letting running requests end")
    finally:
        stopping.set()
        lobby.stopping()
        if cluster is not None:
            cluster.stop()
        lobby.close()
        shutil.rmtree(run_dir, ignore_errors=True)
        if node is not None:
            # A killed process leaves its socket.
            shutil.rmtree(node, ignore_errors=True)
    _say("stopped")


def _lead_own_session() -> None:
    """Go on in a child that leads a session of its own; the parent only passes signals on.

    A signal to a whole process group (a terminal's Ctrl-C, `timeout`) would otherwise
    reach Ray's processes before anything could drain. The parent never returns: it
    exits as the child did, and the child is told to stop if the parent is killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)  # killed before we could ask to be told
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: _pass_on(child, number))
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _reload(in_force: Path) -> None:
    """Put the user's config in force anew; where it can't be, say why, and go on as before."""
    try:
        told = reload(in_force)
    except CoeError as error:
        _say(f"the config stays as it was: {error.message}")
        return
    changes = [f"{what} {', '.join(names)}" for what, names in told.items() if names]
    _say(f"config reloaded: {'; '.join(changes) or 'no expert changed'}")


def _pass_on(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _leave_to_haproxy(lobby: StartupServer, config: Config) -> None:
    """Give the port up once HAProxy listens there too."""
    end_s = time.monotonic() + _HAPROXY_S
    while time.monotonic() < end_s:
        for one in psutil.net_connections(kind="tcp"):
            listens = one.status == psutil.CONN_LISTEN and one.laddr.port == config.server.port
            if listens and one.pid not in (None, os.getpid()):
                lobby.leave_port()
                return
        time.sleep(0.05)
    lobby.leave_port()
    raise CoeError(f"HAProxy does not listen on port {config.server.port}")


def _make_run_dir() -> Path:
    """A new folder, its owner's alone, for everything that this run writes.

    HAProxy takes 97 characters for the path of a socket, and Serve puts 78 of its
    own below this folder's.
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
            raise CoeError(f"can't write {admin_key_path()}: {error.strerror}") from None
        _say(f"made an admin key in {admin_key_path()}")


def _on_signals(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def _follow(config: Config, began_s: float) -> bool:
    """Tell how the experts come up, until each one answers or has failed. False: all have."""
    told: dict[str, str] = {}
    # Those of a pool scaled to zero come when they are asked for.
    asleep = set(config.experts) - {
        name
        for kind, pool in config.pools.items()
        if pool.min_replicas > 0
        for name in config.local_experts(kind)
    }
    asleep -= {name for name, expert in config.experts.items() if expert.remote is not None}
    last_tell_s = 0.0
    while True:
        experts = {name: one for name, one in _ready(config).items() if name not in asleep}
        for name, state in experts.items():
            now = str(state["state"])
            if told.get(name) == now:
                continue
            told[name] = now
            if now == "device":
                _say(f"expert {name} answers ({time.monotonic() - began_s:.0f} s)")
            elif now == "failed":
                _say(f"expert {name} failed: {state.get('reason', 'no reason given')}")
        if not config.experts.keys() - asleep:
            return True
        if experts and all(map(_settled, experts.values())):
            return bool(asleep) or any(one["state"] != "failed" for one in experts.values())
        if time.monotonic() - last_tell_s > 5:
            last_tell_s = time.monotonic()
            loading = {n: s for n, s in experts.items() if not _settled(s)}
            if loading:
                eta_s = max(float(state.get("eta_s", 0)) for state in loading.values())
                about = f", about {eta_s:.0f} s to go" if eta_s else ""
                _say(f"loading {', '.join(loading)}{about}")
        time.sleep(_POLL_S)


def _settled(state: dict[str, Any]) -> bool:
    # On disk without a reason: it shares a slot, and comes when it is asked for.
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
                f"can't listen on {config.server.host}:{config.server.port}: "
                f"{error.strerror}; choose another with --port"
            ) from None


def _where_keys_allow(config: Config) -> tuple[Config, bool]:
    """The config with the address that it may listen on, and whether requests need no key.

    Raises CoeError, ConfigError.
    """
    import asyncio

    from service.gateway.store_setup import has_keys

    host = config.server.host
    try:
        keys = asyncio.run(has_keys(config))
    except StoreUnavailableError as error:
        if host in LOOPBACK:
            _say(f"warning: {error.message}; requests get 503 until it can")
            return config, False
        raise CoeError(
            f"{error.message}: whether there are API keys is not known, and without any it "
            "must not listen on other addresses than loopback"
        ) from None
    if keys:
        return config, False
    if host in LOOPBACK:
        _say(f"no API key yet: whoever can use this machine may ask, on {host} only")
        return config, True
    if config.server.allow_unauthenticated:
        _say(
            f"warning: no API key yet, and server.allow_unauthenticated is set: every "
            f"client that reaches {host} port {config.server.port} can use every expert"
        )
        return config, True
    _say(
        f"no API key yet: listening on 127.0.0.1 only, not on {host}; make a key with "
        "`coe keys create`, and start again"
    )
    server = config.server.model_copy(update={"host": "127.0.0.1"})
    return config.model_copy(update={"server": server}), True


def _how_to_call(url: str) -> str:
    # Bounded: a small model that finds no end would keep a newcomer waiting.
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
