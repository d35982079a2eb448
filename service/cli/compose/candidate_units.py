"""The units that a config's experts can be bought as, with sizes and times."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from router_models.composition.composition_problem import Unit
from service.config import Config
from service.config.pools import VllmOptions
from service.config.section_base import parse_bytes
from service.default_prices import billions_in_name
from service.errors import CoeError, ConfigError
from service.models import AdapterInfo, ModelInfo, inspect_model
from service.models.expert_folders import folder_here
from service.pool.memory_plan import PACKING, weights_bytes

# Estimates, until `coe compose --live` measures them or --sizes states them.
_DISK_BYTES_PER_S = 1.5e9
_LINK_BYTES_PER_S = 20e9
_START_S = 40.0
_CPU_SWAP_S = 0.05
_ELEMENT_BYTES = {"float32": 4}
_KEYS = frozenset({"bytes", "family", "swap_s", "load_s", "start_s", "busy_s"})


@dataclass(frozen=True, slots=True)
class Size:
    """What a file of sizes says of an expert; None where it says nothing.

    `bytes` are those of the weights. On a CPU they count twice, as the memory plan counts them.
    """

    bytes: int | None = None
    family: str | None = None
    swap_s: float | None = None
    load_s: float | None = None
    start_s: float | None = None
    busy_s: float | None = None


@dataclass(slots=True)
class Candidates:
    """The units to choose among.

    Attributes:
        units: The units.
        forms: By unit, the form that each of its experts has there; None: as in the config.
        remote: Experts behind other APIs.
        notes: What was estimated, a line each.
    """

    units: list[Unit] = field(default_factory=list)
    forms: dict[str, dict[str, str | None]] = field(default_factory=dict)
    remote: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def read_sizes(path: Path) -> dict[str, Size]:
    """Read a file of sizes: expert → bytes, or an object with `bytes` and times.

    Raises:
        ConfigError: It is not of this form.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: an object of expert names and sizes is needed")
    return {name: _size(f"{path}: {name}", given) for name, given in data.items()}


def _size(where: str, given: Any) -> Size:
    if not isinstance(given, dict):
        given = {"bytes": given}
    if unknown := sorted(set(given) - _KEYS):
        raise ConfigError(
            f"{where}: unknown key {unknown[0]!r}; allowed: {', '.join(sorted(_KEYS))}"
        )
    found: dict[str, Any] = {}
    for key, value in given.items():
        if key == "family":
            found[key] = str(value)
        elif key == "bytes":
            try:
                found[key] = bytes_of(value)
            except ValueError as error:
                raise ConfigError(f"{where}: {error}") from None
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < 1e9:
                raise ConfigError(f"{where}.{key}: seconds >= 0 are needed")
            found[key] = float(value)
    return Size(**found)


def bytes_of(value: object) -> int:
    """Return a number of bytes above 0, from a number or a text such as `15GiB`.

    Raises:
        ValueError: It is none.
    """
    size = parse_bytes(value)
    if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < 1e18:
        raise ValueError('bytes above 0 are needed, such as 1073741824 or "15GiB"')
    return int(size)


def candidates(
    config: Config,
    sizes: Mapping[str, Size],
    options: VllmOptions,
    *,
    on_gpu: bool,
    merge: bool,
    wanted: Collection[str],
    measured_swap_s: Mapping[str, float] | None = None,
) -> Candidates:
    """Find the units of a config's experts.

    A base is a unit alone, and another one together with its adapters or virtual experts. On a CPU
    an adapter can also be merged into a copy of its base.

    Args:
        config: The config.
        sizes: What is known of experts beside their folders.
        options: vLLM's options of the pools.
        on_gpu: Whether the units run on GPUs.
        merge: Whether adapters may be merged.
        wanted: The experts that may be bought. Their bases may be, too.
        measured_swap_s: Measured seconds of swaps by expert.

    Raises:
        ConfigError: The size of an expert is unknown.
    """
    found = Candidates()
    swaps = measured_swap_s or {}
    wanted = {*wanted, *(config.owner_of(name) for name in wanted)}
    for name, expert in config.experts.items():
        if expert.remote is not None:
            if name in wanted:
                found.remote.add(name)
            continue
        built = [
            other
            for other, one in config.experts.items()
            if one.base == name and other in wanted and not one.is_variant
        ]
        if expert.model is None and expert.command is None:
            continue
        if name not in wanted and not built:
            continue
        if not config.uses_pooling_runner(name):
            _add_base(found, config, name, built, sizes, options, on_gpu=on_gpu, merge=merge)
        else:
            found.units.append(_unit(found, config, name, sizes, options, on_gpu=on_gpu)[0])
            found.forms[name] = {name: None}
    for i, unit in enumerate(found.units):
        # Variants are asked as the expert whose weights they share.
        asked = [v for v, one in config.experts.items() if one.is_variant and v in wanted]
        ways = tuple(name for name in asked if config.owner_of(name) in unit.experts)
        found.units[i] = replace(unit, experts=(*unit.experts, *ways))
        found.forms[unit.name] |= dict.fromkeys(ways)
    found.units = [
        replace(unit, swap_s=max(swaps[e] for e in unit.experts if e in swaps))
        if any(e in swaps for e in unit.experts)
        else unit
        for unit in found.units
    ]
    return found


def _add_base(
    found: Candidates,
    config: Config,
    name: str,
    built: Sequence[str],
    sizes: Mapping[str, Size],
    options: VllmOptions,
    *,
    on_gpu: bool,
    merge: bool,
) -> None:
    base, info = _unit(found, config, name, sizes, options, on_gpu=on_gpu)
    found.units.append(base)
    found.forms[name] = {name: None}
    plain = info is None or info.quantization is None
    dense = info is None or not info.is_moe
    beside: dict[str, str | None] = {}
    extra = 0
    for other in built:
        expert = config.experts[other]
        if expert.profile is not None:
            beside[other] = None
            continue
        adapter = _adapter(config, other)
        if expert.strength == 1.0 and (on_gpu or dense):
            beside[other] = "adapter"
            extra += _adapter_bytes(found, other, adapter, base, sizes, options)
        if merge and plain and not on_gpu and (adapter is None or not adapter.not_merged):
            merged = replace(
                base,
                name=f"{other} merged",
                experts=(other,),
                needs=name,
                swap_s=_given(sizes, other, "swap_s", base.swap_s),
                load_s=_given(sizes, other, "load_s", base.load_s),
            )
            found.units.append(merged)
            found.forms[merged.name] = {other: "merged"}
    if beside:
        both = replace(
            base,
            name=f"{name} with {', '.join(beside)}",
            experts=(name, *beside),
            size_bytes=base.size_bytes + extra,
            adapter_bytes=extra,
        )
        found.units.append(both)
        found.forms[both.name] = {name: None, **beside}


def _unit(
    found: Candidates,
    config: Config,
    name: str,
    sizes: Mapping[str, Size],
    options: VllmOptions,
    *,
    on_gpu: bool,
) -> tuple[Unit, ModelInfo | None]:
    given = sizes.get(name, Size())
    info = _info(config, name)
    packing = 1 if on_gpu else PACKING
    if given.bytes is not None:
        size = given.bytes * packing
    elif (command := config.experts[name].command) is not None:
        size = command.memory_bytes
    elif info is not None:
        size = weights_bytes(info, options.dtype) * packing
    elif (billions := billions_in_name(config.experts[name].model or "")) is not None:
        size = int(billions * 1e9) * _ELEMENT_BYTES.get(options.dtype, 2) * packing
        found.notes.append(f"{name}: not on this machine; its size is estimated from its name")
    else:
        raise ConfigError(
            f"experts.{name}.model: {config.experts[name].model!r} is not on this machine and its "
            f"name states no size; get it with coe models pull, or give --sizes with {name!r}"
        )
    family = given.family or (info.family if info is not None else f"of {name}")
    swap_s = size / _LINK_BYTES_PER_S if on_gpu else _CPU_SWAP_S
    load_s = size / packing / _DISK_BYTES_PER_S
    unit = Unit(
        name,
        (name,),
        size,
        family,
        swap_s=swap_s if given.swap_s is None else given.swap_s,
        load_s=load_s if given.load_s is None else given.load_s,
        start_s=_START_S + load_s if given.start_s is None else given.start_s,
    )
    return unit, info


def _given(sizes: Mapping[str, Size], name: str, key: str, default: float) -> float:
    value = getattr(sizes.get(name, Size()), key)
    return default if value is None else float(value)


def _info(config: Config, name: str) -> ModelInfo | None:
    try:
        folder = folder_here(config, name)
        info = inspect_model(folder) if folder is not None else None
    except (OSError, CoeError):
        return None
    return info if isinstance(info, ModelInfo) else None


def _adapter(config: Config, name: str) -> AdapterInfo | None:
    folder = config.experts[name].adapter
    try:
        info = inspect_model(Path(folder)) if folder is not None else None
    except (OSError, CoeError):
        return None
    return info if isinstance(info, AdapterInfo) else None


def _adapter_bytes(
    found: Candidates,
    name: str,
    info: AdapterInfo | None,
    base: Unit,
    sizes: Mapping[str, Size],
    options: VllmOptions,
) -> int:
    given = sizes.get(name, Size())
    if given.bytes is not None:
        return given.bytes
    if info is not None:
        return info.parameters * _ELEMENT_BYTES.get(options.dtype, 2)
    found.notes.append(f"{name}: its adapter can't be read; 1 % of its base is taken for its size")
    return base.size_bytes // 100
