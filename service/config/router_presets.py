"""Section `router.presets`: what one point of quality is worth in `auto:fast`, `auto`, `auto:best`.

A point is a hundredth of the quality's range of [0, 1]. `python -m router_models.cli calibrate`
derives the shares of cost from recorded outcomes. The seconds follow from how long people wait:
`docs/concepts/prices.md` has the sources.
"""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import Section

_COST = (
    "What one point of quality may cost, as a share of the cost of the best expert's answer. "
    "Great values, such as 1000, let cost matter only where quality is equal. Where the router's "
    "artifact was fitted to outcomes of these experts, their figure is the default."
)
_WAIT = "What one point of quality may take, in s of waiting."


class PresetConfig(Section):
    """What one point of quality is worth in a preset."""

    point_cost: float = Field(gt=0, le=1e6)
    point_s: float = Field(gt=0, le=1e6)

    @property
    def cost_weight(self) -> float:
        """Quality that is given up to save the whole cost of the best expert's answer."""
        return 0.01 / self.point_cost

    @property
    def time_price(self) -> float:
        """Quality per second of waiting."""
        return 0.01 / self.point_s


class FastPresetConfig(PresetConfig):
    """The preset `auto:fast`: a quick and cheap answer."""

    point_cost: float = Field(0.07, gt=0, le=1e6, description=_COST)
    point_s: float = Field(0.04, gt=0, le=1e6, description=_WAIT)


class AutoPresetConfig(PresetConfig):
    """The preset `auto`."""

    point_cost: float = Field(0.22, gt=0, le=1e6, description=_COST)
    point_s: float = Field(0.2, gt=0, le=1e6, description=_WAIT)


class BestPresetConfig(PresetConfig):
    """The preset `auto:best`: quality first."""

    point_cost: float = Field(2.0, gt=0, le=1e6, description=_COST)
    point_s: float = Field(1.2, gt=0, le=1e6, description=_WAIT)


class PresetsConfig(Section):
    """What one point of quality is worth in each preset."""

    fast: FastPresetConfig = Field(default_factory=lambda: FastPresetConfig())
    auto: AutoPresetConfig = Field(default_factory=lambda: AutoPresetConfig())
    best: BestPresetConfig = Field(default_factory=lambda: BestPresetConfig())

    def of(self, model: str) -> PresetConfig:
        """The preset of `auto` with a suffix: "" is `auto` itself.

        Raises:
            KeyError: There is no such preset.
        """
        return {"fast": self.fast, "": self.auto, "best": self.best}[model]
