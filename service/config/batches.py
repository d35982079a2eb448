"""Section `batches`: files that clients upload, and batches of requests."""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import GIB, Bytes, Section


class BatchesConfig(Section):
    """The endpoints `/v1/files` and `/v1/batches`.

    The files are in a folder. The state of batches is beside them, or in Redis with `store.kind:
    redis`.
    """

    enabled: bool = Field(True, description="Whether the service has these endpoints.")
    folder: str | None = Field(
        None,
        description="Folder of the files. Several gateways need a folder that all of them see. "
        "Default: $COE_BATCHES, or batches beside the admin key.",
    )
    max_file_bytes: Bytes = Field(
        200 * 1024**2, ge=1024, description="Largest file that is accepted, in bytes."
    )
    max_lines: int = Field(
        50_000, ge=1, le=1_000_000, description="Most requests in the input file of a batch."
    )
    tenant_bytes: Bytes = Field(
        4 * GIB,
        ge=1024,
        description="Bytes of files that a tenant may keep; an upload beyond them is refused.",
    )
    tenant_batches: int = Field(
        100, ge=1, le=100_000, description="Batches of a tenant that may be under way at once."
    )
    retention_days: float = Field(
        30,
        gt=0,
        le=3650,
        description="Days after which files, and batches that ended, are deleted.",
    )
    max_running: int = Field(
        4,
        ge=1,
        le=1000,
        description="Batches that a gateway runs at once; others wait. The first one of each "
        "tenant does not.",
    )
    max_in_flight: int = Field(
        16, ge=1, le=10_000, description="Requests of batches that a gateway has under way at once."
    )
    line_timeout_s: float = Field(
        3600.0,
        ge=1,
        le=86_400,
        description="Longest wait for the answer to a line, in s. It is "
        "tried again after that, as long as the batch has time; three times in all, where an "
        "engine had begun the answer.",
    )
    lease_s: float = Field(
        15.0,
        ge=1,
        le=3600,
        description="Time in s after which another gateway, or the same one "
        "after a restart, goes on with the batches of a gateway that died.",
    )
