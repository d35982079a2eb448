"""The prices of experts without a price of their own: computation for local ones.

The default price of a local expert is its active parameters, in billions, times
`prices.per_billion_parameters`, for each million tokens of prompt or answer. At the default rate
of 1 a unit of cost is one billion parameters applied to one million tokens, about 2 PFLOP. Only a
mixture of experts has fewer active parameters than parameters. An adapter, a virtual expert or
another expert with a `base` costs as much as its base.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.config import Config, PriceConfig
from service.errors import CoeError
from service.models import ModelInfo, inspect_model
from service.models.expert_folders import folder_here

_BILLION = 1e9
# Sizes in names of models: "30B-A3B", "8x7B", "0.5B", "135M".
_ACTIVE = re.compile(r"(?<![a-z0-9.])a(\d+(?:\.\d+)?)b(?![a-z0-9])", re.IGNORECASE)
_MIXTURE = re.compile(r"(?<![a-z0-9.])\d+x(\d+(?:\.\d+)?)b(?![a-z0-9])", re.IGNORECASE)
_DENSE = re.compile(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)([bm])(?![a-z0-9])", re.IGNORECASE)
# Mixtures that are named by the size of a member, such as 8x7B, use two members for a token.
_MEMBERS_PER_TOKEN = 2


@dataclass(frozen=True, slots=True)
class ActiveParameters:
    """The parameters that one token uses, in billions, of every expert with weights of its own.

    Attributes:
        of: Expert → billions of active parameters.
        unknown: The experts whose size is unknown: their model is not on this machine, and its
            name states no size.
    """

    of: Mapping[str, float]
    unknown: tuple[str, ...]


def active_parameters(config: Config) -> ActiveParameters:
    """Find the active parameters of the experts with full weights.

    The headers of the weight files give them, or else the model's name.
    """
    found: dict[str, float] = {}
    unknown = []
    for name, expert in config.experts.items():
        if expert.model is None:
            continue
        billions = _from_folder(config, name) or billions_in_name(expert.model)
        if billions is None:
            unknown.append(name)
        else:
            found[name] = billions
    return ActiveParameters(found, tuple(unknown))


def billions_in_name(model: str) -> float | None:
    """Return the billions of active parameters that a model's name states; None without any."""
    name = model.rsplit("/", 1)[-1].partition("@")[0]
    if match := _ACTIVE.search(name):
        billions = float(match[1])
    elif match := _MIXTURE.search(name):
        billions = _MEMBERS_PER_TOKEN * float(match[1])
    elif match := _DENSE.search(name):
        billions = float(match[1]) / (1 if match[2] in "bB" else 1000)
    else:
        return None
    return billions or None


def with_default_prices(config: Config) -> Config:
    """The config with a price for each expert.

    A price in the config stands. A local expert of unknown size costs as much as the dearest one of
    known size, so that nothing is sent to it because it seems free. A remote expert without a price
    costs nothing.
    """
    rate = config.computation_rate
    billions: Mapping[str, float] = active_parameters(config).of if rate > 0 else {}
    dearest = max(billions.values(), default=0.0)
    prices: dict[str, PriceConfig] = {}
    for name, expert in config.experts.items():
        owner = config.owner_of(name)
        source = config.experts[owner].base or owner
        sources = (expert, config.experts[owner], config.experts[source])
        given = next((section.price for section in sources if section.price is not None), None)
        if given is not None:
            prices[name] = given
        elif expert.remote is not None:
            prices[name] = PriceConfig()
        else:
            each = rate * billions.get(source, dearest)
            prices[name] = PriceConfig(prompt=each, completion=each)
    experts = {
        name: expert.model_copy(update={"price": prices[name]})
        for name, expert in config.experts.items()
    }
    return config.model_copy(update={"experts": experts})


def price_warnings(config: Config) -> tuple[str, ...]:
    """Return a line for each way in which the config's prices do not matter or compare."""
    prices = {name: one.price for name, one in with_default_prices(config).experts.items()}
    free = [name for name, price in prices.items() if price is None or price == PriceConfig()]
    local = [name for name in free if config.experts[name].remote is None]
    remote = [name for name in free if config.experts[name].remote is not None]
    if len(free) == len(prices):
        if len(prices) == 1 and not config.budgets:
            return ()
        return (
            "prices: every expert costs 0, so `auto` never saves and budgets never run out; set "
            "experts.NAME.price, or fetch the models, or leave prices.per_billion_parameters at "
            "its default",
        )
    lines = []
    if local and config.prices.per_billion_parameters is None:
        lines.append(
            f"prices: {_listed(local)} cost 0 beside experts with a price; set "
            "prices.per_billion_parameters to what computation costs in their unit"
        )
    if remote:
        lines.append(f"prices: {_listed(remote)} are remote and cost 0; set experts.NAME.price")
    unknown = active_parameters(config).unknown if config.computation_rate > 0 else ()
    unpriced = [name for name in unknown if config.experts[name].price is None]
    if unpriced:
        lines.append(
            f"prices: the sizes of {_listed(unpriced)} are unknown, so that they cost as much as "
            "the dearest local expert; set experts.NAME.price, or fetch the models"
        )
    return tuple(lines)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _from_folder(config: Config, expert: str) -> float | None:
    try:
        folder = folder_here(config, expert)
        info = inspect_model(Path(folder)) if folder is not None else None
    except (OSError, CoeError):
        return None
    return info.active_parameters / _BILLION if isinstance(info, ModelInfo) else None
