"""Section `added_experts`: what an admin may add while the service runs."""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import Section


class AddedExpertsConfig(Section):
    """Experts that an admin adds while the service runs, on bases of this config."""

    most: int = Field(
        64, ge=0, le=1000, description="Most of them at a time; 0 refuses every addition."
    )
    roots: tuple[str, ...] = Field(
        (),
        description="Folders below which their adapters may lie, beside the model store. On a "
        "cluster the same on every node.",
    )
    downloads: bool = Field(
        False,
        description="Fetch adapters that are named ORG/NAME@COMMIT from the hub. Default: they "
        "have to be in the model store.",
    )
    file: str | None = Field(
        None,
        description="With store.kind memory: file that keeps them over restarts. Default: "
        "experts-PORT.json beside the admin key.",
    )
