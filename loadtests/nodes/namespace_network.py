"""Network namespaces on a bridge, each with a link that can be cut or made slow.

A namespace has an address, ports and processes of its own, so that each acts as a machine. Needs
root, `ip` and `iptables`.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

_PREFIX = re.compile(r"coe([0-9]+)[a-z]*")
_SIOCETHTOOL = 0x8946
# Checksums and segmentation by the interface: what a slow link relays must be whole packets.
_TX_CHECKSUM, _TSO, _GSO, _GRO = 0x17, 0x1F, 0x24, 0x2C
_END_S = 10.0
_TRIES = 10


def missing() -> str:
    """Return why this machine can't have such a network, or an empty string."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in ("ip", "iptables") if shutil.which(name) is None]
    return f"this machine has no {' and no '.join(absent)}" if absent else ""


@dataclass
class Namespace:
    """One machine of the network.

    Attributes:
        name: The namespace's name.
        ip: Its address.
        outer: Its link's end on the bridge.
        relay: The process of its slow link, while it is slow.
    """

    name: str
    ip: str
    outer: str
    relay: subprocess.Popen[bytes] | None = None

    def command(self, *words: str) -> list[str]:
        """Return the command that runs `words` in the namespace."""
        return ["ip", "netns", "exec", self.name, *words]

    def processes(self) -> list[psutil.Process]:
        """Return all processes of the namespace."""
        listed = _run("ip", "netns", "pids", self.name)
        found = []
        for pid in listed.split():
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(int(pid)))
        return found

    def kill(self) -> int:
        """Kill all processes of the namespace with SIGKILL.

        Returns:
            Their number.

        Raises:
            RuntimeError: Some are still there.
        """
        killed: set[int] = set()
        for _ in range(_TRIES):
            if not (doomed := self.processes()):
                return len(killed)
            # One that was just starting another may leave it behind for the next turn.
            for process in doomed:
                killed.add(process.pid)
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(doomed, timeout=_END_S)
        raise RuntimeError(f"processes of {self.name} can't be killed: {sorted(killed)}")

    def cut(self) -> None:
        """Drop all packets to and from the namespace, without a word to either end."""
        for chain, side in (("INPUT", "-i"), ("OUTPUT", "-o")):
            _run(*self.command("iptables", "-I", chain, side, "eth0", "-j", "DROP"))

    def heal(self) -> None:
        """End the cut."""
        for chain in ("INPUT", "OUTPUT"):
            _run(*self.command("iptables", "-F", chain))


@dataclass
class Network:
    """The namespaces, and the bridge that joins them with this machine.

    Attributes:
        prefix: First part of the names of all interfaces and namespaces.
        subnet: First three numbers of all addresses.
    """

    prefix: str
    subnet: str
    namespaces: list[Namespace] = field(default_factory=list)

    @property
    def bridge(self) -> str:
        """The bridge's name, on this machine."""
        return self.prefix

    def add(self, letter: str) -> Namespace:
        """Add a namespace; `letter` ends its name."""
        name = self.prefix + letter
        space = Namespace(name, f"{self.subnet}.{len(self.namespaces) + 2}", name + "o")
        inner = name + "i"
        self.namespaces.append(space)
        _run("ip", "netns", "add", name)
        _add_pair(space.outer, inner)
        _run("ip", "link", "set", space.outer, "master", self.bridge, "up")
        _run("ip", "link", "set", inner, "netns", name, "name", "eth0")
        _run("ip", "-n", name, "address", "add", f"{space.ip}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            _run("ip", "-n", name, "link", "set", interface, "up")
        return space

    def slow(self, space: Namespace, delay_ms: float, loss: float) -> None:
        """Delay all packets of a namespace's link by `delay_ms` each way, and lose a share."""
        middle, far = space.name + "m", space.name + "f"
        _add_pair(middle, far)
        _run("ip", "link", "set", middle, "up")
        space.relay = subprocess.Popen(
            [
                *(sys.executable, "-m", "loadtests.nodes.slow_link", space.outer, middle),
                *(str(delay_ms), str(loss)),
            ],
            process_group=0,
        )
        _run("ip", "link", "set", space.outer, "nomaster")
        _run("ip", "link", "set", far, "master", self.bridge, "up")

    def fast(self, space: Namespace) -> None:
        """Take the slow link out again."""
        assert space.relay is not None
        space.relay.terminate()
        space.relay.wait(_END_S)
        space.relay = None
        _run("ip", "link", "delete", space.name + "m")
        _run("ip", "link", "set", space.outer, "master", self.bridge, "up")


@contextmanager
def network() -> Iterator[Network]:
    """A bridge, without namespaces yet. At the end all of their processes are killed.

    Raises:
        RuntimeError: This machine can't have such a network.
    """
    if reason := missing():
        raise RuntimeError(reason)
    sweep()
    made = Network(f"coe{os.getpid()}", f"10.213.{os.getpid() % 250}")
    try:
        _run("ip", "link", "add", made.bridge, "type", "bridge")
        _without_offloads(made.bridge)
        _run("ip", "address", "add", f"{made.subnet}.1/24", "dev", made.bridge)
        _run("ip", "link", "set", made.bridge, "up")
        yield made
    finally:
        for space in made.namespaces:
            if space.relay is not None:
                space.relay.kill()
                space.relay.wait(_END_S)
        _remove(made.prefix)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """End the block with an exception on SIGTERM, so that everything is cleaned up."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def sweep() -> None:
    """Remove the networks of runs that were killed before they could do so."""
    for prefix in sorted({prefix for prefix in _prefixes() if not psutil.pid_exists(prefix)}):
        _remove(f"coe{prefix}")


def left_behind(made: Network) -> list[str]:
    """Return the namespaces and interfaces of a network that are still there."""
    return [name for name in _names() if name.startswith(made.prefix)]


def _prefixes() -> list[int]:
    found = (_PREFIX.fullmatch(name) for name in _names())
    return [int(match[1]) for match in found if match is not None]


def _names() -> list[str]:
    spaces = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip()]
    return spaces + [name for _, name in socket.if_nameindex()]


def _remove(prefix: str) -> None:
    """Remove the namespaces and interfaces whose names begin so, with all processes there."""
    names = [name for name in _names() if re.fullmatch(prefix + "[a-z]*", name)]
    for name in names:
        if os.path.exists(f"/run/netns/{name}"):
            Namespace(name, "", "").kill()
            _run("ip", "netns", "delete", name)
    for name in names:
        # The other end of a pair goes with it.
        if os.path.exists(f"/sys/class/net/{name}"):
            _run("ip", "link", "delete", name)


def _add_pair(one: str, other: str) -> None:
    _run("ip", "link", "add", one, "type", "veth", "peer", "name", other)
    _without_offloads(one)
    _without_offloads(other)


def _without_offloads(interface: str) -> None:
    """Let the kernel make whole packets with checksums, as `ethtool --offload` would."""
    with socket.socket() as any_socket:
        for command in (_TX_CHECKSUM, _TSO, _GSO, _GRO):
            value = array.array("B", struct.pack("II", command, 0))
            request = struct.pack("16sP", interface.encode(), value.buffer_info()[0])
            with contextlib.suppress(OSError):  # one that the interface does not have
                fcntl.ioctl(any_socket, _SIOCETHTOOL, request)


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
