"""Whether a pool can take an adapter in: its files, its base's shapes, and who would be touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.config import Config
from service.config.effective_config import AddedExperts, parse_added_expert, with_added
from service.errors import CoeError, ConfigError
from service.pool.added_expert_check import check_diff, check_files
from service.pool.pool_diff import PoolDiff
from tests.unit.models.test_model_folders import POOL, make_llama, make_lora


def check(tmp_path: Path, **changes: Any) -> None:
    """Check an adapter for a real base in a pool on CPU."""
    form = changes.pop("form", "adapter")
    given = Config.model_validate(
        {
            "experts": {"a": {"model": str(make_llama(tmp_path / "base"))}},
            "pools": {"cpu": {"vllm": {**POOL, "enforce_eager": True, "spare_adapters": 1}}},
        }
    )
    folder = make_lora(tmp_path / "adapters" / "b", **changes)
    body = {"name": "b", "base": "a", "adapter": str(folder), "form": form}
    name, one = parse_added_expert(body, 0.0)
    found = with_added(given, AddedExperts().including(name, one, 0.0), unserved=True)
    assert not found.left_out
    check_files(found.config, "cpu", name, one)


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_fitting_adapter_passes(tmp_path: Path, form: str) -> None:
    check(tmp_path, form=form)


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"hidden": 32}, "self_attn.q_proj of 32 × 32, and the base's has 64 × 64"),
        ({"ranks": (4, 4, 4)}, "layers.2.self_attn.q_proj, and the base has 2 layers"),
        ({"ranks": (8, 8)}, "has rank 8"),
        ({"config": {"use_dora": True}}, "DoRA"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], why: str, form: str
) -> None:
    with pytest.raises(CoeError, match=why):
        check(tmp_path, form=form, **changes)


def test_adapter_of_a_greater_rank_than_engines_take_is_refused(tmp_path: Path) -> None:
    wide = {"ranks": (32, 32), "config": {"r": 32}}
    with pytest.raises(ConfigError, match=r"rank is 32, and pools.cpu.vllm.max_lora_rank is 16"):
        check(tmp_path, **wide)


@pytest.mark.parametrize(
    ("diff", "why"),
    [
        (PoolDiff(("n",), (), ()), None),
        (PoolDiff((), ("a",), (), {"a": "it shares a slot"}), "beside 'a' .* it shares a slot"),
        (PoolDiff((), ("a",), ()), "beside 'a' .* loaded anew"),
        (PoolDiff((), (), ("c",)), "beside 'c'"),
    ],
)
def test_addition_that_would_touch_another_expert_is_refused(
    diff: PoolDiff, why: str | None
) -> None:
    if why is None:
        check_diff(diff, "n")
    else:
        with pytest.raises(ConfigError, match=why):
            check_diff(diff, "n")
