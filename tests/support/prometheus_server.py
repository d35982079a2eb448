"""Debian's Prometheus, started for a test."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.coe_serve_process import wait_until

RULES = Path(__file__).parents[2] / "deploy/prometheus/rules.yml"
# So much shorter than anybody's, that a test need not wait.
SCRAPE_MS = 500
RATE = "20s"

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus is not installed: deploy/test_tools.sh",
)


@dataclass(frozen=True)
class Prometheus:
    """A running one."""

    url: str

    def series(self, expr: str) -> list[dict[str, Any]]:
        """The series of an instant query that have a value."""
        query = expr.replace("$__rate_interval", RATE).replace("$expert", ".*")
        with urllib.request.urlopen(
            f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': query})}", timeout=10
        ) as reply:
            found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
        return [item for item in found if item["value"][1] != "NaN"]

    def ready(self) -> bool:
        """Whether it answers, and has scraped its target."""
        try:
            return any(entry["value"][1] == "1" for entry in self.series('up{job="coe"}'))
        except (urllib.error.URLError, ConnectionError):
            return False

    def rules(self) -> dict[str, str]:
        """The health of every rule, by its name."""
        with urllib.request.urlopen(f"{self.url}/api/v1/rules", timeout=10) as reply:
            groups = json.load(reply)["data"]["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """One that scrapes `target`, a URL with /metrics at its root; ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "global": {"scrape_interval": f"{SCRAPE_MS}ms", "evaluation_interval": "1s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "coe",
                "static_configs": [{"targets": [target.removeprefix("http://")]}],
            }
        ],
    }
    # JSON is YAML, too.
    (folder / "prometheus.yml").write_text(json.dumps(config))
    with open(folder / "prometheus.log", "wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        made = Prometheus(f"http://{address}")
        wait_until(lambda: made.ready() or process.poll() is not None, "Prometheus scrapes")
        assert process.poll() is None, (folder / "prometheus.log").read_text()
        yield made
    finally:
        process.terminate()
        process.wait(20)
