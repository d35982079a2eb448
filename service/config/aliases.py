"""Section `aliases`: other names of experts, recipes and `auto`, and how traffic is shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from service.config.section_base import Section, shown

AliasName = Annotated[str, Field(pattern=r"^[A-Za-z0-9*][A-Za-z0-9._:/@*-]{0,127}$")]
Weight = Annotated[float, Field(ge=0, le=1e6)]
_WEIGHTS = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0}}


class RollbackConfig(Section):
    """When a target of an alias gets no more requests, because it does worse than the others.

    Each target is compared with the one of the greatest weight, which is never rolled back.
    """

    enabled: bool = Field(True, description="Whether targets are rolled back.")
    min_requests: int = Field(
        50, ge=1, le=1_000_000, description="Requests of a target before it may be rolled back."
    )
    confidence: float = Field(
        0.95,
        ge=0.5,
        lt=1,
        description="How sure a roll-back has to be, however often requests were looked at. For "
        "two targets that do equally well it is wrong with at most the rest of the probability.",
    )
    error_margin: float | None = Field(
        0.05,
        ge=0,
        lt=1,
        description="By how much the share of requests that end with an error of the service may "
        "be above that of the target of the greatest weight. null: errors don't count.",
    )
    refusal_margin: float | None = Field(
        0.1,
        ge=0,
        lt=1,
        description="The same for refusals: answers that the model or its filter refused, and "
        "requests that the expert didn't take. null: refusals don't count.",
    )
    window_s: float = Field(
        3600.0, ge=10, le=604_800, description="Only requests of about this long ago count, in s."
    )


class AliasConfig(Section):
    """Another name of an expert, a recipe or `auto`, or a name that several of them share.

    Its short forms are the name of one target, and targets with their weights.
    """

    to: dict[str, Weight] = Field(
        min_length=1,
        max_length=16,
        description="What the name stands for: an expert, a recipe, `auto` with any preset and "
        "category, or another alias without `*`. Several targets share the requests by their "
        "weights; a weight of 0 keeps a target without requests.",
    )

    rollback: RollbackConfig = Field(default_factory=lambda: RollbackConfig())

    @model_validator(mode="before")
    @classmethod
    def _read_short_forms(cls, data: Any) -> Any:
        return data if isinstance(data, AliasConfig) else alias_section(data)

    @model_validator(mode="after")
    def _check_weights(self) -> AliasConfig:
        if not any(self.to.values()):
            raise ValueError("all weights are 0; at least one must be greater")
        if self.rollback != RollbackConfig() and not self.shares:
            raise ValueError("rollback needs several targets to share the requests")
        return self

    @property
    def shares(self) -> bool:
        """Whether several targets share its requests."""
        return len(self.to) > 1

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        section = handler.resolve_ref_schema(handler(core_schema))
        to = section["properties"]["to"]
        section["properties"]["to"] = {**to, "type": ["string", "object"]}
        return {"anyOf": [{"type": "string"}, _WEIGHTS, section]}


def alias_section(data: Any) -> dict[Any, Any]:
    """Return an alias's data in its long form, with weights under `to`.

    Raises:
        ValueError: It has no form of an alias.
    """
    if isinstance(data, str):
        return {"to": {data: 1.0}}
    if not isinstance(data, dict):
        raise ValueError(
            "an alias is the name of one target, targets with weights, or a section with `to`, "
            f"not {shown(data)}"
        )
    target = data.get("to")
    if isinstance(target, str):
        return {**data, "to": {target: 1.0}}
    # An expert may have the name "to"; it then has a weight.
    if isinstance(target, dict) or any(isinstance(value, dict) for value in data.values()):
        return data
    return {"to": data}


@dataclass(frozen=True, slots=True)
class ResolvedAlias:
    """What an alias stands for, once the aliases that it leads to are followed.

    Attributes:
        shared_by: The alias whose weights share its requests: itself, or one that it leads to;
            None where it stands for one target.
        targets: Experts, recipes or names of `auto`, with their weights; at least one is above 0.
    """

    shared_by: str | None
    targets: Mapping[str, float]


def resolve_aliases(aliases: Mapping[str, AliasConfig]) -> dict[str, ResolvedAlias]:
    """Follow every alias to its targets. A name that is no alias is taken for a target.

    Raises:
        ValueError: Aliases lead in a circle, or through two that share requests. The message
            begins with the alias's place in the config.
    """
    found: dict[str, ResolvedAlias] = {}

    def follow(name: str, way: tuple[str, ...]) -> ResolvedAlias:
        if name in way:
            circle = " → ".join((*way[way.index(name) :], name))
            raise ValueError(
                f"aliases.{name}: it leads back to itself ({circle}); an alias must end at an "
                "expert, a recipe or auto"
            )
        if (known := found.get(name)) is not None:
            return known
        settings = aliases[name]
        shared_by = name if settings.shares else None
        targets: dict[str, float] = {}
        for target, weight in settings.to.items():
            inner = {target: 1.0}
            if target in aliases:
                after = follow(target, (*way, name))
                if settings.shares and after.shared_by is not None:
                    raise ValueError(
                        f"aliases.{name}: its target {target!r} shares requests by weights as "
                        "well; only one alias on the way may do so"
                    )
                shared_by, inner = shared_by or after.shared_by, dict(after.targets)
            for end, share in inner.items():
                targets[end] = targets.get(end, 0.0) + weight * share
        found[name] = ResolvedAlias(shared_by, targets)
        return found[name]

    for name in aliases:
        follow(name, ())
    return found
