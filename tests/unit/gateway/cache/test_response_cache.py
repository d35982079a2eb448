"""What is kept of a virtual expert's answers is another's once its profile holds something else."""

from __future__ import annotations

from pathlib import Path

from service.config import Config
from service.gateway.cache.response_cache import ResponseCache
from service.store.volatile import MemoryVolatile


def test_another_profile_of_the_same_name_has_other_answers(tmp_path: Path) -> None:
    profile = tmp_path / "p"
    config = Config.model_validate(
        {
            "experts": {"a": {"model": "m"}, "v": {"base": "a", "profile": str(profile)}},
            "pools": {"p": {"engine": "simulated"}},
        }
    )

    def key() -> str:
        cache = ResponseCache(config, MemoryVolatile(1000))
        return cache._hash("tenant", "/v1/completions", {"model": "v"})

    profile.write_text("one")
    first = key()
    assert key() == first
    profile.write_text("another")
    assert key() != first
