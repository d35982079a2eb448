"""Section `responses`: responses and conversations that the service keeps for its clients."""

from __future__ import annotations

from pydantic import Field

from service.config.section_base import GIB, Bytes, Section


class ResponsesConfig(Section):
    """`store` and `previous_response_id` of `/v1/responses`, and `/v1/conversations`.

    They are kept in a SQLite file, or in Redis with `store.kind: redis`.
    """

    enabled: bool = Field(
        False,
        description="Whether responses are stored. Otherwise `store` changes nothing, and "
        "`previous_response_id` is refused.",
    )
    store_by_default: bool = Field(
        True,
        description="Whether a response is stored whose request has no `store`, as in OpenAI's "
        "API. Lines of batches are never stored.",
    )
    folder: str | None = Field(
        None,
        description="Folder of the SQLite file. Default: $COE_RESPONSES, or responses beside the "
        "admin key.",
    )
    retention_days: float = Field(
        30,
        gt=0,
        le=3650,
        description="Days that a response or conversation is kept after it was last continued.",
    )
    tenant_entries: int = Field(
        10_000,
        ge=1,
        le=1_000_000,
        description="Responses and conversations that a tenant may keep. Those that were not used "
        "for longest make room for new ones.",
    )
    tenant_bytes: Bytes = Field(
        GIB,
        ge=1024,
        description="Bytes of responses and conversations that a tenant may keep, as above.",
    )
    max_chain: int = Field(
        1000,
        ge=1,
        le=100_000,
        description="Most responses that one goes on from by previous_response_id.",
    )
