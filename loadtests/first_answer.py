"""Measures the time from a clone to the first streamed answer, at the first and at later starts.

`python -m loadtests.first_answer` clones this repository at HEAD into a temporary folder, and runs
`make serve` there. It records when the terminal prints its first line, when the console answers,
and when the first token of a streamed answer arrives. It then stops the service and repeats the
measurement with the installed packages. Packages come from the index and the cache that pip is
configured with. The model comes from this machine's store, or is downloaded again with `--fetch`.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtests.lib.coe_service import ROOT
from loadtests.lib.command_line import parser, tell
from loadtests.lib.median_intervals import Estimate
from loadtests.lib.targets_and_report import Report, Table, at_most

_FIRST_S = 300.0
_SECOND_S = 60.0
_LOOK_S = 3.0
_GIVE_UP_S = 1800.0
_STOP_S = 90.0


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds from the command until then."""

    words_s: float
    console_s: float
    answer_s: float


def time_start(folder: Path, environment: dict[str, str]) -> Start:
    """Run `make serve` until its first token. Raises RuntimeError if none comes."""
    port = _free_port()
    config = (folder / "deploy" / "config" / "demo.yaml").read_text()
    path = folder / "deploy" / "config" / "first.yaml"
    path.write_text(config.replace("port: 8000", f"port: {port}"))
    log = folder / "first.log"
    began_s = time.monotonic()
    with open(log, "wb") as out:
        process = subprocess.Popen(
            ["make", "serve", "CONFIG=deploy/config/first.yaml"],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    words_s = console_s = 0.0
    try:
        while process.poll() is None:
            now_s = time.monotonic() - began_s
            if now_s > _GIVE_UP_S:
                break
            if not words_s and log.stat().st_size:
                words_s = now_s
            if not console_s and _status(port, "/console") == 200:
                console_s = time.monotonic() - began_s
            if console_s and _first_token(port):
                return Start(words_s, console_s, time.monotonic() - began_s)
            time.sleep(0.05)
        raise RuntimeError(f"no answer came:\n{log.read_text(errors='replace')[-3000:]}")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        process.wait(_STOP_S)


def _status(port: int, path: str) -> int:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0


def _first_token(port: int) -> bool:
    """Return whether a stream started; waits for its first token."""
    body = {
        "model": "auto",
        "stream": True,
        "max_tokens": 16,
        "messages": [{"role": "user", "content": "book a flight to Paris"}],
    }
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=130)) as connection:
        try:
            connection.request(
                "POST",
                "/v1/chat/completions",
                json.dumps(body),
                {"content-type": "application/json"},
            )
            reply = connection.getresponse()
            return reply.status == 200 and b"data: {" in reply.readline()
        except (OSError, http.client.HTTPException):
            return False


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def measure(*, fetch: bool) -> Report:
    """Both starts, in a clone of their own. `fetch`: the model is fetched anew."""
    folder = Path(tempfile.mkdtemp(prefix="coe-first-"))
    environment = os.environ | {"COE_HOME": str(folder / "home")}
    for name in ("PYTHONPATH", "VIRTUAL_ENV"):
        environment.pop(name, None)
    if fetch:
        environment["COE_MODELS"] = str(folder / "models")
    try:
        began_s = time.monotonic()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "coe")], check=True)
        clone_s = time.monotonic() - began_s
        first = time_start(folder / "coe", environment)
        second = time_start(folder / "coe", environment)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = Report("first answer")
    rows = Table("Seconds", ("start", "words", "console", "first token"))
    for name, item in (("first", first), ("second", second)):
        shown = (f"{value:.1f}" for value in (item.words_s, item.console_s, item.answer_s))
        rows.rows.append((name, *shown))
    report.tables.append(rows)
    report.reach = [
        at_most(f"s {what}", target, Estimate(value, value, value))
        for what, target, value in (
            ("from clone to the first streamed answer", _FIRST_S, clone_s + first.answer_s),
            ("to the first streamed answer of the second start", _SECOND_S, second.answer_s),
            ("to something to look at at the second start", _LOOK_S, second.console_s),
        )
    ]
    report.facts = {"clone_s": round(clone_s, 1), "first": asdict(first), "second": asdict(second)}
    return report


def main() -> int:
    """Return 0 after a measurement, whatever its result, or 1 if it was impossible."""
    words = parser("first_answer", __doc__)
    words.add_argument("--fetch", action="store_true", help="also download the model again")
    given = words.parse_args()
    return tell(lambda _: measure(fetch=given.fetch), as_json=given.json)


if __name__ == "__main__":
    sys.exit(main())
