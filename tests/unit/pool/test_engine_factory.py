"""What a pool's factory of engines knows beside the engines that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from service.config import Config
from service.engine.command.server_log import log_path
from service.engine.scoped_env import without_secrets
from service.pool.engine_factory import EngineFactory


def test_server_log_has_no_keys_while_another_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "hf_do_not_show")
    command = {"run": ["x", "{port}"], "memory_bytes": 1, "secret_env": ["SOME_TOKEN"]}
    config = Config.model_validate({"experts": {"a": {"command": command}}, "pools": {"p": {}}})
    made = EngineFactory(config, "p", cast(Any, None), tmp_path)
    log_path(tmp_path, "a").write_text("my key is hf_do_not_show\n")
    assert made.server_log("a", 5) == ["my key is ***"]
    with without_secrets():
        assert made.server_log("a", 5) == ["my key is ***"]
