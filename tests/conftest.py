"""Fixtures that all tests share."""

from __future__ import annotations

import gc
import itertools
import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

_homes = itertools.count()

# Before anything imports vLLM or torch. Its own thread binding puts every engine
# on one core, and too many threads make a small machine crawl.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)


# An example may take as long as a busy machine lets it.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Leave what the collection made out of every later search for garbage.

    A full search through all modules and 12,000 tests takes half a second, and tests and libraries
    ask for hundreds of them.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _sockets_of_engines(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the sockets that vLLM leaves behind in pytest's own folders."""
    os.environ["VLLM_RPC_BASE_PATH"] = str(tmp_path_factory.mktemp("rpc"))


@pytest.fixture(autouse=True)
def _level_of_logs() -> None:
    """Reset the root logger's level, which vLLM sets when it is imported."""
    logging.getLogger().setLevel(logging.WARNING)


@pytest.fixture(autouse=True, scope="session")
def _home_of_all_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What fixtures of whole modules keep is not this user's, either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COE_HOME", str(tmp_path_factory.getbasetemp() / "home-of-modules"))
        yield


@pytest.fixture(autouse=True)
def _home_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys made by a test are not this user's, nor another test's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COE_HOME", str(tmp_path_factory.getbasetemp() / f"home-{next(_homes)}"))
        yield
