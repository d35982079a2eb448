"""`python -m loadtests.swap --engines command --llama-server PATH --gguf A --gguf B`.

Two models of llama.cpp take turns, with room for one: as experts by command of this service, in
llama-server's own router mode, and started by hand. All three get the same streamed requests over
HTTP in turn. The start by hand polls every millisecond, so that it is the least that a swap takes.
"""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loadtests.lib import coe_service
from loadtests.lib.child_processes import fetch, running, say
from loadtests.lib.median_intervals import differences, median
from loadtests.lib.targets_and_report import Report, Table, at_most
from service.engine.command.port_owner import free_port

_SWAP_MS = 100.0
_HOST = "127.0.0.1"
_NAMES = ("a", "b")
_CONTEXT, _THREADS = 2048, 1
_TOKENS = 16
_POLL_S = 0.001
_UP_S = 60.0
_TIMEOUT_S = 600.0
OURS, ROUTER, BY_HAND = "this service", "llama-server's router", "by hand"


@dataclass(frozen=True, slots=True)
class Asked:
    """When parts of an answer came, in seconds after the request."""

    first_s: float
    all_s: float


def ask(port: int, model: str) -> Asked:
    """Send a streamed request.

    Raises:
        RuntimeError: The answer is an error, or has no text.
    """
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": _TOKENS,
        "stream": True,
        "temperature": 0,
    }
    connection = http.client.HTTPConnection(_HOST, port, timeout=_TIMEOUT_S)
    first_s = None
    began_s = time.perf_counter()
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        reply = connection.getresponse()
        if reply.status != 200:
            raise RuntimeError(f"status {reply.status}: {reply.read(500)!r}")
        while line := reply.readline():
            if first_s is None and has_text(line):
                first_s = time.perf_counter() - began_s
    finally:
        connection.close()
    if first_s is None:
        raise RuntimeError("an answer without text")
    return Asked(first_s, time.perf_counter() - began_s)


def has_text(line: bytes) -> bool:
    """Return whether a line of a stream has a part of the answer's text.

    Raises:
        RuntimeError: It is an error.
    """
    data = line.removeprefix(b"data:").strip()
    if not line.startswith(b"data:") or data == b"[DONE]":
        return False
    event = json.loads(data)
    if "error" in event:
        raise RuntimeError(f"an error in the stream: {event['error']}")
    return any(choice["delta"].get("content") for choice in event.get("choices", ()))


# --- the three


def server_command(program: Path, model: Path, port: int | str) -> list[str]:
    """Return the command of one model's server."""
    sizes = ["-c", str(_CONTEXT), "-t", str(_THREADS)]
    return [str(program), "-m", str(model), "--port", str(port), *sizes]


@contextmanager
def _ours(program: Path, models: Sequence[Path]) -> Iterator[int]:
    port = free_port(_HOST)
    experts = {
        name: {"command": {"run": server_command(program, model, "{port}"), "memory_bytes": "1GiB"}}
        for name, model in zip(_NAMES, models, strict=True)
    }
    pools = {"cpu": {"slots": 1, "swap": {"min_stay_s": 0.0}}}
    settings = coe_service.config(port, experts, pools)
    with coe_service.serving(settings, scaled_to_zero=True):
        yield port


def presets(models: Sequence[Path]) -> str:
    """Return the router's file of presets."""
    parts = [f"[{name}]\nmodel = {model}\n" for name, model in zip(_NAMES, models, strict=True)]
    return "\n".join(["version = 1\n", *parts])


@contextmanager
def _router(program: Path, models: Sequence[Path]) -> Iterator[int]:
    port = free_port(_HOST)
    with tempfile.TemporaryDirectory(prefix="loadtests-") as folder:
        path = Path(folder) / "presets.ini"
        path.write_text(presets(models))
        sizes = ["-c", str(_CONTEXT), "-t", str(_THREADS), "--port", str(port)]
        command = [str(program), "--models-preset", str(path), "--models-max", "1", *sizes]

        def ready() -> bool:
            return fetch(port, "/health")[0] == 200

        with running("llama-server", command, ready, timeout_s=_UP_S):
            yield port


class _ByHand:
    """One server at a time, stopped and started by hand.

    Args:
        program: The path of llama-server.
        models: The files of both models.
    """

    def __init__(self, program: Path, models: Sequence[Path]) -> None:
        self._program = program
        self._models = dict(zip(_NAMES, models, strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    def swap(self, name: str) -> float:
        """Stop the server and start another one. Return the seconds until it is ready.

        Raises:
            RuntimeError: It ended instead.
        """
        began_s = time.perf_counter()
        self.stop()
        self._port = free_port(_HOST)
        command = server_command(self._program, self._models[name], self._port)
        self._process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while fetch(self._port, "/health")[0] != 200:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._program} ended with status {self._process.returncode}")
            time.sleep(_POLL_S)
        return time.perf_counter() - began_s

    def ask(self, name: str) -> Asked:
        """Ask the running server."""
        return ask(self._port, name)

    def stop(self) -> None:
        """Stop the server, and wait until it has ended."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            process.wait()


# --- measurements


@dataclass(slots=True)
class Found:
    """Seconds of each contender, one entry a swap.

    Attributes:
        swapped: From the request to the first text, with the swap.
        resident: The same of the request after it, without a swap.
        whole: Of that request, until its end.
    """

    swapped: dict[str, list[float]]
    resident: dict[str, list[float]]
    whole: dict[str, list[float]]


def measure(program: Path, models: Sequence[Path], times: int) -> Found:
    """Let the contenders swap in turn.

    Raises:
        RuntimeError: One of them failed.
    """
    names = (OURS, ROUTER, BY_HAND)
    swapped, resident, whole = ({name: list[float]() for name in names} for _ in range(3))
    found = Found(swapped, resident, whole)
    with ExitStack() as stack:
        hand = _ByHand(program, models)
        stack.callback(hand.stop)
        say("by hand")
        hand.swap("a")
        hand.ask("a")
        asks: dict[str, Callable[[str], Asked]] = {}
        for name, start in ((OURS, _ours), (ROUTER, _router)):
            asks[name] = partial(ask, stack.enter_context(start(program, models)))
            asks[name]("b")
            asks[name]("a")
        asks[BY_HAND] = hand.ask
        for i in range(times):
            model = _NAMES[(i + 1) % 2]
            # Another one is the first each time, because caches of the machine favour the last.
            for name in names[i % 3 :] + names[: i % 3]:
                started_s = hand.swap(model) if name == BY_HAND else 0.0
                found.swapped[name].append(started_s + asks[name](model).first_s)
                again = asks[name](model)
                found.resident[name].append(again.first_s)
                found.whole[name].append(again.all_s)
            say(f"swap {i + 1} of {times}")
    return found


def version_of(program: Path) -> str:
    """Return what `llama-server --version` says first.

    Raises:
        RuntimeError: It is not llama-server.
    """
    done = subprocess.run(
        [str(program), "--version"], capture_output=True, text=True, check=False, timeout=_UP_S
    )
    lines = [
        line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version:")
    ]
    if done.returncode != 0 or not lines:
        raise RuntimeError(f"{program} --version fails; is it llama-server?")
    return lines[0].strip()


def table_of(found: Found) -> Report:
    """Table and target."""
    report = Report("swaps of llama.cpp's servers")
    table = Table(
        "medians with 95 % intervals, ms; added: to the same by hand, in pairs",
        ("until", "who", "times", "ms", "added, ms"),
    )
    parts = (
        ("first text, with a swap", found.swapped),
        ("first text, without", found.resident),
        (f"the end of {_TOKENS} tokens, without", found.whole),
    )
    for what, seconds in parts:
        in_ms = {name: [1000 * s for s in times] for name, times in seconds.items()}
        for name, times in in_ms.items():
            added = differences(times, in_ms[BY_HAND])
            shown = "" if name == BY_HAND else added.text(1)
            table.rows.append((what, name, str(len(times)), median(times).text(1), shown))
            report.facts[f"{what}: {name}"] = {
                "ms": median(times).as_json(),
                "added_ms": added.as_json(),
            }
    hand = found.swapped[BY_HAND]
    added = differences([1000 * s for s in found.swapped[OURS]], [1000 * s for s in hand])
    report.reach.append(at_most("added to a swap, ms", _SWAP_MS, added))
    report.tables.append(table)
    return report


def report_of(program: Path, models: Sequence[Path], times: int) -> Report:
    """Measure, and report.

    Raises:
        RuntimeError: A file is missing, or a server failed.
    """
    if len(models) != len(_NAMES):
        raise RuntimeError("--gguf is needed twice: two models take turns")
    program, *models = (path.resolve() for path in (program, *models))
    for path in (program, *models):
        if not path.is_file():
            raise RuntimeError(f"{path} is not there")
    version = version_of(program)
    report = table_of(measure(program, models, times))
    report.facts["llama-server"] = version
    sizes = " and ".join(f"{path.stat().st_size / 1e6:.0f} MB" for path in models)
    report.notes.append(
        f"llama-server: {version}, built for the CPU, {_THREADS} threads; models of {sizes}. "
        f"The router runs with --models-max 1."
    )
    return report
