"""Reads an upload (`multipart/form-data`) as it comes, and writes its file to the disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from service.batches.file_folder import PartialFile
from service.http.asgi_helpers import Receive
from service.http.multipart_forms import UploadForm, boundary_of, read_form

_FLUSH_BYTES = 1 << 18


async def read_upload(
    receive: Receive,
    headers: dict[bytes, bytes],
    begin: Callable[[], PartialFile],
    *,
    max_file_bytes: int,
    stall_timeout_s: float,
    take: Callable[[int], None] | None = None,
) -> tuple[UploadForm, PartialFile]:
    """Read an upload. The caller has to keep or discard the file.

    Args:
        receive: The request's ASGI `receive`.
        headers: The request's headers, by name.
        begin: Begins a file; it is called in a thread.
        max_file_bytes: The largest file.
        stall_timeout_s: The longest wait for the next bytes, in s.
        take: Called with the number of further bytes before they are written; raises where there
            is no room for them.

    Raises:
        UnsupportedMediaTypeError: The body is no form.
        InvalidRequestError: The form is not valid, or has no file.
        BodyTooLargeError: The file is too large.
        RequestTimeoutError: The next bytes did not come in time.
        StorageFullError: The disk is full.
        StoreUnavailableError: The file can't be written.
        ClientDisconnectedError: The client left.
    """
    # Nothing is written for a body that is no form.
    boundary_of(headers, max_file_bytes)
    partial = await asyncio.to_thread(begin)

    async def write(pending: bytearray, last: bool) -> None:
        if len(pending) >= _FLUSH_BYTES or (last and pending):
            if take is not None:
                take(len(pending))
            await asyncio.to_thread(partial.write, bytes(pending))
            pending.clear()

    try:
        form = await read_form(
            receive,
            headers,
            write,
            max_file_bytes=max_file_bytes,
            stall_timeout_s=stall_timeout_s,
        )
    except BaseException:
        await asyncio.shield(asyncio.to_thread(partial.discard))
        raise
    return form, partial
