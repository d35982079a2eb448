"""`coe moe`: commands for mixture-of-experts models."""

from __future__ import annotations

import click

from service.cli.lazy_group import LazyGroup

_COMMANDS: dict[str, tuple[str, str]] = {
    "show": (
        "service.cli.moe.show:show",
        "Show the load of a model's routed experts as a heat map.",
    ),
    "profile": (
        "service.cli.moe.profile:profile",
        "Learn a steering profile: the routed experts that a domain needs.",
    ),
    "upcycle": (
        "service.cli.moe.upcycle:upcycle",
        "Join dense experts of one family into one mixture, without training.",
    ),
    "place": (
        "service.cli.moe.place:place",
        "Spread routed experts over devices by recorded loads.",
    ),
}


@click.group(cls=LazyGroup, table=_COMMANDS)
def moe() -> None:
    """Inspect, steer, build and place mixtures of experts."""
