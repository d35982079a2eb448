"""Killing the supervisor of `coe serve` with SIGKILL leaves no process behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from tests.support.coe_serve_process import serve, wait_until

pytestmark = pytest.mark.cluster

CONFIG: dict[str, Any] = {
    "server": {"drain_s": 20},
    "experts": {"one": {"model": "m"}},
    "pools": {"main": {"engine": "simulated", "cpus": 0.1, "simulated": {"decode_ms": 20}}},
}


def test_service_drains_and_ends_after_its_supervisor_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "coe.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    with (
        serve(path) as service,
        openai.OpenAI(base_url=service.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        stream = client.chat.completions.create(
            model="one",
            messages=[{"role": "user", "content": "hi"}],
            stream=True,
            max_tokens=150,
        )
        chunks = [next(stream)]
        service.tree()
        run_dir = service.run_dir
        os.kill(service.process.pid, signal.SIGKILL)
        service.process.wait(10)
        chunks += list(stream)
        assert len(chunks) == 150
        wait_until(lambda: service.left() == [], "no process is left")
        assert not run_dir.exists()
