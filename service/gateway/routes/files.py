"""`/v1/files`: clients upload, list, read and delete files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import quote

from fastapi import APIRouter, Request, Response
from starlette.responses import StreamingResponse

from service.batches.batch_service import expires_after
from service.batches.file_upload import read_upload
from service.errors import StoreUnavailableError
from service.gateway.dependencies import (
    BatchEndpoints,
    CountedTenant,
    Services,
    headers_of,
    json_response,
)
from service.gateway.list_pages import page_of, to_list

router = APIRouter()

_PIECE_BYTES = 1 << 18
_MAX_FILES = 10_000


@router.post("/v1/files")
async def upload(
    request: Request, services: Services, batches: BatchEndpoints, tenant: CountedTenant
) -> Response:
    """Keep a file for a batch."""
    async with batches.arriving(tenant) as take:
        form, partial = await read_upload(
            request.receive,
            headers_of(request),
            batches.begin_file,
            max_file_bytes=batches.config.max_file_bytes,
            stall_timeout_s=services.config.server.limits.body_timeout_s,
            take=take,
        )
        try:
            given = {
                name: form.fields[f"expires_after[{name}]"]
                for name in ("anchor", "seconds")
                if f"expires_after[{name}]" in form.fields
            }
            file = await batches.add_file(
                tenant,
                partial,
                filename=form.filename or "file",
                purpose=form.fields.get("purpose"),
                lives_s=expires_after(given or None, "expires_after"),
            )
        finally:
            await asyncio.shield(asyncio.to_thread(partial.discard))
    return json_response(file.to_json())


@router.get("/v1/files")
async def list_files(request: Request, batches: BatchEndpoints, tenant: CountedTenant) -> Response:
    """Return the tenant's files, the newest first."""
    page = page_of(request.query_params, most=_MAX_FILES, usual=_MAX_FILES)
    purpose = request.query_params.get("purpose")
    found = await batches.files(tenant, purpose, page.one_more())
    return json_response(to_list([file.to_json() for file in found], page))


@router.get("/v1/files/{id}")
async def get_file(request: Request, batches: BatchEndpoints, tenant: CountedTenant) -> Response:
    """Return what is known of a file."""
    file = await batches.file(tenant, request.path_params["id"])
    return json_response(file.to_json())


@router.delete("/v1/files/{id}")
async def delete_file(request: Request, batches: BatchEndpoints, tenant: CountedTenant) -> Response:
    """Delete a file for good."""
    file_id = request.path_params["id"]
    await batches.delete_file(tenant, file_id)
    return json_response({"id": file_id, "object": "file", "deleted": True})


@router.get("/v1/files/{id}/content")
async def get_content(request: Request, batches: BatchEndpoints, tenant: CountedTenant) -> Response:
    """Return the content of a file."""
    file, path = await batches.content(tenant, request.path_params["id"])
    try:
        handle = await asyncio.to_thread(path.open, "rb")
    except FileNotFoundError:
        raise StoreUnavailableError("the folder of files has no content of this file") from None

    async def pieces() -> AsyncIterator[bytes]:
        try:
            while piece := await asyncio.to_thread(handle.read, _PIECE_BYTES):
                yield piece
        finally:
            handle.close()

    headers = {
        "content-length": str(file.size),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
    }
    return StreamingResponse(pieces(), headers=headers, media_type="application/octet-stream")
