"""Whether a pool can take an added expert in without touching another one."""

from __future__ import annotations

from pathlib import Path

from service.config import Config
from service.config.effective_config import AddedExpert, is_hub_adapter
from service.errors import ConfigError
from service.models import AdapterInfo, ModelInfo, inspect_model
from service.models.expert_folders import folder_here
from service.models.lora_adapters import inspect_adapter
from service.pool.memory_plan import check_plan, plan_pool
from service.pool.pool_diff import PoolDiff


def check_files(config: Config, kind: str, name: str, added: AddedExpert) -> None:
    """Check that a pool can load an added expert. It reads headers of files, and never weights.

    Args:
        config: The config with the expert.
        kind: The pool's name in the config.
        name: The expert.
        added: The expert, as the admin named its adapter.

    Raises:
        ConfigError: The pool can't serve the adapter on its base.
        ModelStoreError: The adapter's files are missing or damaged.
    """
    pool = config.pools[kind]
    if added.expert.adapter is not None:
        folder = Path(config.experts[name].adapter or "")
        if is_hub_adapter(added.expert.adapter) and not folder.is_dir():
            raise ConfigError(
                f"expert {name!r}: adapter: {added.expert.adapter} is not in the model store; get "
                f"it with: coe models pull {added.expert.adapter}"
            )
        info = inspect_adapter(folder)
        if added.expert.form == "adapter" and info.rank > pool.vllm.max_lora_rank:
            raise ConfigError(
                f"expert {name!r}: adapter: its rank is {info.rank}, and "
                f"pools.{kind}.vllm.max_lora_rank is {pool.vllm.max_lora_rank}"
            )
    if pool.engine != "vllm":
        return

    def inspect(expert: str) -> ModelInfo | AdapterInfo:
        adapter = config.experts[config.owner_of(expert)].adapter
        folder = Path(adapter) if adapter is not None else folder_here(config, expert)
        if folder is None:
            raise ConfigError(f"experts.{expert}: its model is not on this machine yet")
        return inspect_model(folder)

    check_plan(plan_pool(config, kind, inspect), None)


def check_diff(diff: PoolDiff, name: str) -> None:
    """Check that no other expert would leave the pool, even for a moment.

    Raises:
        ConfigError: One would.
    """
    if not (leaving := diff.leaving):
        return
    first = leaving[0]
    why = diff.restarts.get(first, "it would be loaded anew")
    raise ConfigError(f"expert {name!r}: it can't be added beside {first!r} while it runs: {why}")
