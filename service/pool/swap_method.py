"""Resolves `swap.method: auto` of a pool with the records of `coe doctor`.

It reads the records and the models' headers, and on a GPU it runs nvidia-smi.
`service.engine.swap_proof` makes the choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from service import host_memory
from service.config import Config, VllmOptions
from service.engine.swap_proof import (
    ChoiceSource,
    ProofMachine,
    SwapMethodChoice,
    UnitWeights,
    WeightLayout,
    choose_swap_method,
    unproven_reason,
)
from service.engine.swap_proof_store import SwapProofStore, this_machine
from service.errors import CoeError
from service.gpu_devices import largest_gpu_bytes
from service.models import AdapterInfo, ModelInfo, inspect_model
from service.models.expert_folders import folder_here, folder_of
from service.pool.memory_plan import check_plan, plan_pool, slots_of, weights_bytes


@dataclass(frozen=True, slots=True)
class ResolvedSwapMethod:
    """A pool's choice, and what is needed to withdraw a proof later.

    Attributes:
        choice: The choice.
        machine: The machine whose records were read.
        layouts: The layout of each unit's weights, as far as its folder can be read.
        store: The records.
    """

    choice: SwapMethodChoice
    machine: ProofMachine
    layouts: Mapping[str, WeightLayout] = field(default_factory=dict)
    store: SwapProofStore = field(default_factory=SwapProofStore)

    def withdraw(self, unit: str, method: str, why: str) -> bool:
        """Withdraw the proof of a method that has failed in service, for a reason.

        Returns:
            False where no record had proven it.
        """
        layout = self.layouts.get(unit)
        if layout is None:
            return False
        return self.store.withdraw(self.machine, layout, method, why)


def layout_of(info: ModelInfo, options: VllmOptions, gpus: float) -> WeightLayout:
    """Return the layout of a model's weights in an engine."""
    online = options.args.get("quantization")
    return WeightLayout(
        architecture=info.architecture,
        dtype=info.compute_dtype if options.dtype == "auto" else options.dtype,
        quantization=info.quantization_form or (str(online) if online else "none"),
        eager=options.enforce_eager,
        gpus=options.engine_gpus if gpus > 0 else 0,
    )


def resolve_swap_method(config: Config, kind: str) -> ResolvedSwapMethod | None:
    """Choose the swap method of a pool whose units share slots.

    Args:
        config: The config.
        kind: The pool's name in the config.

    Returns:
        The choice, or None where nothing is swapped: no slot is shared, or the engine is simulated.
    """
    pool = config.pools[kind]
    groups = config.groups(kind)
    of_vllm = [group for group in groups if config.experts[group[0][0]].command is None]
    if pool.engine != "vllm" or not of_vllm or slots_of(config, kind) >= len(groups):
        return None
    on_gpu = pool.gpus > 0
    store = SwapProofStore(Path(config.models_dir) if config.models_dir is not None else None)
    here = this_machine(on_gpu)
    needed = store.folder.is_dir() or (on_gpu and pool.swap.method == "auto")
    units, unread = _units_of(config, kind) if needed else ([], "")
    if not here.is_known:
        unread = "nvidia-smi does not tell which GPU and driver this machine has"
    layouts = {unit.unit: unit.layout for unit in units}
    proofs = {
        layout: proof
        for layout in dict.fromkeys(layouts.values())
        if (proof := store.read(here, layout)) is not None
    }
    if pool.swap.method != "auto":
        choice = SwapMethodChoice(pool.swap.method, ChoiceSource.CONFIG, "the config sets it")
        return ResolvedSwapMethod(choice, here, layouts, store)
    refused = {}
    if on_gpu:
        for method in ("inplace", "sleep"):
            why = unread or unproven_reason(method, units, proofs, on_gpu)
            # Only a proven method is worth a plan.
            if why is None:
                why = _unfit_reason(with_swap_method(config, kind, method), kind)
            if why is not None:
                refused[method] = why
    choice = choose_swap_method(units, proofs, on_gpu=on_gpu, refused=refused)
    return ResolvedSwapMethod(choice, here, layouts, store)


def with_swap_method(config: Config, kind: str, method: str) -> Config:
    """Return the config with another swap method of one pool."""
    pool = config.pools[kind]
    swap = pool.swap.model_copy(update={"method": method})
    pools = {**config.pools, kind: pool.model_copy(update={"swap": swap})}
    return config.model_copy(update={"pools": pools})


def _units_of(config: Config, kind: str) -> tuple[list[UnitWeights], str]:
    """Read the weights of a pool's units.

    Returns:
        The units that can be read, and why another one can't be read; empty where all can.
    """
    units: list[UnitWeights] = []
    unread = ""
    for (name, *_), *_ in config.groups(kind):
        if config.experts[name].command is not None:
            continue
        try:
            path = folder_here(config, name)
            info = inspect_model(path) if path is not None else None
        except CoeError as error:
            unread = error.message
            continue
        if not isinstance(info, ModelInfo):
            unread = f"the weights of expert {name!r} are not on this machine"
            continue
        layout = layout_of(info, config.vllm_of(kind, name), config.pools[kind].gpus)
        size = weights_bytes(info, config.pools[kind].vllm.dtype)
        units.append(UnitWeights(name, info.family, layout, size))
    return units, unread


def _unfit_reason(config: Config, kind: str) -> str | None:
    """Return why this pool can't use its method, or None."""

    def inspect(name: str) -> ModelInfo | AdapterInfo:
        adapter = config.experts[config.owner_of(name)].adapter
        return inspect_model(Path(adapter or folder_of(config, name)))

    try:
        plan = plan_pool(config, kind, inspect, gpu_bytes=largest_gpu_bytes())
        check_plan(plan, None)
    except CoeError as error:
        return f"this pool can't use it: {error.message}"
    if plan.host_bytes > (memory := host_memory.total_bytes()):
        return (
            f"it would keep {plan.host_bytes / 1e9:.1f} GB of weights in host memory, and this "
            f"machine has {memory / 1e9:.1f} GB; set swap.host_bytes"
        )
    return None
