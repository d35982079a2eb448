"""`coe moe`: experts within one model, chosen for each token."""

from __future__ import annotations

import click

from service.cli.lazy_group import LazyGroup

_COMMANDS: dict[str, tuple[str, str]] = {
    "show": ("service.cli.moe.show:show", "Which experts a model's layers choose: a heat map."),
    "profile": (
        "service.cli.moe.profile:profile",
        "Learn which experts a domain needs, as a steering profile.",
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
    """Look inside mixtures of experts, steer, build and place them."""
