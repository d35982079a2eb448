"""The cache key of a virtual expert changes with its steering profile."""

from __future__ import annotations

from pathlib import Path

from service.config import Config
from service.gateway.cache.response_cache import ResponseCache
from service.store.volatile_store import MemoryVolatileStore


def test_cache_key_changes_with_the_content_of_the_steering_profile(tmp_path: Path) -> None:
    profile = tmp_path / "p"
    config = Config.model_validate(
        {
            "experts": {"a": {"model": "m"}, "v": {"base": "a", "profile": str(profile)}},
            "pools": {"p": {"engine": "simulated"}},
        }
    )

    def key() -> str:
        cache = ResponseCache(config, MemoryVolatileStore(1000))
        return cache._hash("tenant", "/v1/completions", {"model": "v"})

    profile.write_text("one")
    first = key()
    assert key() == first
    profile.write_text("another")
    assert key() != first
