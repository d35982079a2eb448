"""Environment variables that an engine's core process inherits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from service.config import Config
from service.engine.scoped_env import (
    TUNED_CONFIG_FOLDER,
    scoped_env,
    secret_variables,
    without_secrets,
)

ROOT = Path(__file__).parents[3]
SECRETS = {
    "COE_API_KEY": "coe-1",
    "OPENAI_API_KEY": "sk-1",
    "HF_TOKEN": "hf_1",
    "AWS_SECRET_ACCESS_KEY": "x",
    "COE_REDIS_PASSWORD": "x",
    "MY_APIKEY": "x",
    "GOOGLE_CREDENTIALS": "{}",
    "COE_REDIS_URL": "rediss://:hidden@redis:6379/0",
    "DATABASE": "postgres://user:hidden@db/x",
}
OTHERS = {
    "PATH": "/bin",
    "VLLM_CPU_KVCACHE_SPACE": "4",
    "TOKENIZERS_PARALLELISM": "false",
    "MONKEY": "x",
    "KEYBOARD": "us",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": "/run/coe/ray-token",
    "HF_TOKEN_PATH": "/somewhere/token",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318/a@b:c",
    "HTTP_PROXY": "http://proxy:3128",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name != "PATH":
            monkeypatch.delenv(name)
    for name, value in {**SECRETS, **OTHERS}.items():
        monkeypatch.setenv(name, value)


def test_secret_variables_are_those_named_like_keys_or_passwords() -> None:
    assert secret_variables() == sorted(SECRETS)
    assert secret_variables(["KEYBOARD", "absent"]) == sorted([*SECRETS, "KEYBOARD"])


def test_without_secrets_hides_them_from_children_and_restores_them() -> None:
    read = [sys.executable, "-c", "import os; print(sorted(os.environ))"]
    with without_secrets(["KEYBOARD"]), scoped_env(TUNED_CONFIG_FOLDER, "/kernels"):
        result = subprocess.run(read, capture_output=True, text=True, check=True).stdout
    assert not set(eval(result)) & {*SECRETS, "KEYBOARD"}
    assert set(OTHERS) - {"KEYBOARD"} < set(eval(result))
    assert TUNED_CONFIG_FOLDER in eval(result)
    assert {name: os.environ.get(name) for name in SECRETS} == SECRETS
    assert os.environ["KEYBOARD"] == "us"


def test_without_secrets_overlapping_starts_restore_after_the_last() -> None:
    inside, leave = threading.Barrier(3), threading.Event()

    def start() -> None:
        with without_secrets():
            inside.wait(10)
            leave.wait(10)

    threads = [threading.Thread(target=start) for _ in range(2)]
    with without_secrets():
        for thread in threads:
            thread.start()
        inside.wait(10)
    assert secret_variables() == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert secret_variables() == sorted(SECRETS)


def test_secrets_of_a_config_are_the_variables_that_it_names(tmp_path: Path) -> None:
    remote = {"url": "https://llm.example/v1", "model": "m", "api_key_env": "LETMEIN"}
    config = Config.model_validate(
        {
            "experts": {"r": {"remote": remote}},
            "keys": {"k": {"key_env": "DOOR"}},
            "store": {"kind": "redis", "url_env": "SHELF", "cache_url_env": "DRAWER"},
        }
    )
    assert config.key_variables == {"LETMEIN", "DOOR", "SHELF", "DRAWER"}


def test_without_secrets_does_not_hide_the_hub_token_from_a_concurrent_pull() -> None:
    # In a process of its own: the token is read when that starts.
    code = """
import huggingface_hub
from service.engine.scoped_env import without_secrets
from service.models import hub_download
class Api:
    def __init__(self, token=None):
        print("asked with", token)
        raise OSError("far enough")
huggingface_hub.HfApi = Api
with without_secrets():
    try:
        hub_download.fetch_snapshot("org/name", None, None, None)
    except Exception as error:
        print(type(error).__name__)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert result.splitlines() == ["asked with hf_1", "ModelStoreError"]
