"""Files and batches as clients see them: what they may do, and what they get to know.

A tenant sees its own files and batches only; those of others are as unknown as any other id.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from service.batches.batch_records import (
    ENDPOINTS,
    PURPOSE,
    BatchRecord,
    FileRecord,
    Status,
    new_batch_id,
    new_file_id,
)
from service.batches.batch_state import BatchState, BatchStatistics
from service.batches.batch_types import WINDOW, parse_terms
from service.batches.file_folder import FileFolder, PartialFile
from service.config import BatchesConfig
from service.errors import (
    CoeError,
    ConflictError,
    InvalidRequestError,
    RateLimitExceededError,
    UnknownModelError,
)
from service.http.client_metadata import check_metadata
from service.store.list_page import Page
from service.task_cancellation import cancel_and_wait
from service.types import Tenant

log = logging.getLogger("coe.batches")

_SWEEP_S = 3600.0
_SHORTEST_S, _LONGEST_S = 3600, 2_592_000
_FIELDS = frozenset(
    {
        "input_file_id",
        "endpoint",
        "completion_window",
        "metadata",
        "output_expires_after",
        "coe",
    }
)


class BatchService:
    """The files and batches of one service.

    Args:
        config: The section `batches`.
        state: Their state.
        folder: The contents of files.
        wake: Called when there is a new batch.
        stop_lines: Called with the id of a batch that was cancelled.
        clock: Returns seconds since 1970.
    """

    def __init__(
        self,
        config: BatchesConfig,
        state: BatchState,
        folder: FileFolder,
        wake: Callable[[], None],
        stop_lines: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self._state = state
        self._folder = folder
        self._wake = wake
        self._stop_lines = stop_lines
        self._clock = clock
        self._sweeping: asyncio.Task[None] | None = None
        # Bytes of uploads under way, by tenant.
        self._arriving: Counter[str] = Counter()

    def start(self) -> None:
        """Start to delete what has expired."""
        self._sweeping = asyncio.create_task(self._sweep())

    async def stop(self) -> None:
        """Stop the background task."""
        await cancel_and_wait(self._sweeping)

    # --- files

    @asynccontextmanager
    async def arriving(self, tenant: Tenant) -> AsyncIterator[Callable[[int], None]]:
        """Count what a tenant uploads at once, so that it can't fill the disk before it is refused.

        Yields:
            A function to call with the number of each further bytes, before they are written. It
            raises InvalidRequestError where there is no room for them.

        Raises:
            InvalidRequestError: The tenant's files are too many bytes.
            StoreUnavailableError: The state can't be read.
        """
        stored = await self._check_room(tenant)
        own = 0

        def take(size: int) -> None:
            nonlocal own
            if stored + self._arriving[tenant.name] + size > self.config.tenant_bytes:
                raise self._no_room()
            self._arriving[tenant.name] += size
            own += size

        try:
            yield take
        finally:
            self._arriving[tenant.name] -= own
            if not self._arriving[tenant.name]:
                del self._arriving[tenant.name]

    async def _check_room(self, tenant: Tenant) -> int:
        """The bytes of a tenant's files. Raises InvalidRequestError where they are too many."""
        stored = await self._state.file_bytes(tenant.name)
        if stored > self.config.tenant_bytes:
            raise self._no_room()
        return stored

    def begin_file(self) -> PartialFile:
        """Begin to write a file; it blocks. Raises StorageFullError, StoreUnavailableError."""
        return self._folder.begin()

    async def add_file(
        self,
        tenant: Tenant,
        partial: PartialFile,
        *,
        filename: str,
        purpose: str | None,
        lives_s: int | None,
    ) -> FileRecord:
        """Keep a file that a client has sent.

        Args:
            tenant: The tenant that sent it.
            partial: Its content.
            filename: The client's name of it.
            purpose: What it is for.
            lives_s: How long it is kept, in s; None for the service's usual time.

        Raises:
            InvalidRequestError: Its purpose is not supported, or there is no room for it.
            StorageFullError: The disk is full.
            StoreUnavailableError: It can't be written.
        """
        if purpose != PURPOSE:
            given = "it is missing" if purpose is None else f"not {purpose[:64]!r}"
            raise InvalidRequestError(f"`purpose` must be {PURPOSE!r}; {given}", param="purpose")
        now_s = int(self._clock())
        file_id = new_file_id()
        expires_s = now_s + (lives_s or int(self.config.retention_days * 86_400))
        file = FileRecord(file_id, tenant.name, purpose, filename, partial.size, now_s, expires_s)
        await asyncio.to_thread(partial.keep, file_id)
        kept = False
        try:
            kept = await self._state.add_file(file, self.config.tenant_bytes)
        finally:
            if not kept:
                await asyncio.to_thread(self._folder.delete, file_id)
        if not kept:
            raise self._no_room()
        return file

    def _no_room(self) -> InvalidRequestError:
        return InvalidRequestError(
            f"this tenant's files may have {self.config.tenant_bytes} bytes together: delete some",
            code="storage_quota_exceeded",
        )

    async def file(self, tenant: Tenant, file_id: str) -> FileRecord:
        """Return a tenant's file.

        Raises:
            UnknownModelError: The tenant has no such file.
        """
        file = await self._state.file(file_id)
        if file is None or file.tenant != tenant.name or file.expires_s <= self._clock():
            raise UnknownModelError(
                f"no file {file_id[:64]!r} is kept here", param="id", code="file_not_found"
            )
        return file

    async def files(self, tenant: Tenant, purpose: str | None, page: Page) -> list[FileRecord]:
        """Return a part of the list of a tenant's files."""
        if page.after is not None:
            await self.file(tenant, page.after)
        return await self._state.files(tenant.name, purpose, page)

    async def content(self, tenant: Tenant, file_id: str) -> tuple[FileRecord, Path]:
        """Return a tenant's file, and the path of its content.

        Raises:
            UnknownModelError: The tenant has no such file.
        """
        file = await self.file(tenant, file_id)
        return file, self._folder.path_of(file.id)

    async def delete_file(self, tenant: Tenant, file_id: str) -> None:
        """Delete a tenant's file for good.

        Raises:
            UnknownModelError: The tenant has no such file.
            ConflictError: A batch reads it.
        """
        file = await self.file(tenant, file_id)
        if (batch := await self._state.uses(file.id)) is not None:
            raise ConflictError(f"{batch} reads this file; cancel the batch first")
        await self._state.remove_file(file.id)
        await asyncio.to_thread(self._folder.delete, file.id)

    # --- batches

    async def create(self, tenant: Tenant, body: Mapping[str, Any]) -> BatchRecord:
        """Create a batch.

        Args:
            tenant: The tenant whose batch it is, with the key that it asks with.
            body: The body of `POST /v1/batches`.

        Raises:
            InvalidRequestError: A field is not valid.
                The tenant's files are too many bytes for further output.
            UnknownModelError: The tenant has no such input file.
            RateLimitExceededError: The tenant has too many batches under way.
        """
        body = {name: value for name, value in body.items() if value is not None}
        if unknown := body.keys() - _FIELDS:
            name = min(unknown)[:64]
            raise InvalidRequestError(
                f"there is no field {name!r}; allowed are {', '.join(sorted(_FIELDS))}", param=name
            )
        endpoint = body.get("endpoint")
        if endpoint not in ENDPOINTS:
            raise InvalidRequestError(
                f"`endpoint` must be one of {', '.join(ENDPOINTS)}", param="endpoint"
            )
        if body.get("completion_window") != WINDOW:
            raise InvalidRequestError(
                f"`completion_window` must be {WINDOW!r}; `coe.deadline` sets another time",
                param="completion_window",
            )
        metadata = check_metadata(body.get("metadata"))
        terms = parse_terms(body)
        lives_s = expires_after(body.get("output_expires_after"), "output_expires_after")
        input_id = body.get("input_file_id")
        if not isinstance(input_id, str):
            raise InvalidRequestError(
                "`input_file_id` must be the id of a file", param="input_file_id"
            )
        file = await self.file(tenant, input_id)
        if file.purpose != PURPOSE:
            raise InvalidRequestError(
                f"the purpose of `input_file_id` must be {PURPOSE!r}, not {file.purpose!r}",
                param="input_file_id",
            )
        # Output files are written whatever their size.
        await self._check_room(tenant)
        now_s = int(self._clock())
        batch = BatchRecord(
            new_batch_id(),
            tenant.name,
            tenant.key,
            str(endpoint),
            file.id,
            metadata,
            terms,
            now_s,
            now_s + max(1, round(terms.deadline_s)),
            lives_s,
        )
        if not await self._state.add_batch(batch, self.config.tenant_batches):
            raise RateLimitExceededError(
                f"this tenant may have {self.config.tenant_batches} batches under way at once",
                retry_after_s=60.0,
            )
        self._wake()
        return batch

    async def batch(self, tenant: Tenant, batch_id: str) -> BatchRecord:
        """Return a tenant's batch.

        Raises:
            UnknownModelError: The tenant has no such batch.
        """
        batch = await self._state.batch(batch_id)
        if batch is None or batch.tenant != tenant.name:
            raise UnknownModelError(
                f"no batch {batch_id[:64]!r} is kept here", param="id", code="batch_not_found"
            )
        return batch

    def to_json(self, batch: BatchRecord) -> dict[str, Any]:
        """A batch as clients see it now."""
        return batch.to_json(self._clock())

    async def statistics(self) -> BatchStatistics:
        """Count the batches of all tenants that have not ended."""
        return await self._state.statistics()

    async def batches(self, tenant: Tenant, page: Page) -> list[BatchRecord]:
        """Return a part of the list of a tenant's batches."""
        if page.after is not None:
            await self.batch(tenant, page.after)
        return await self._state.batches(tenant.name, page)

    async def cancel(self, tenant: Tenant, batch_id: str) -> BatchRecord:
        """Cancel a tenant's batch. Its results so far will be in its output files.

        Raises:
            UnknownModelError: The tenant has no such batch.
            ConflictError: The batch is at its end already.
        """
        while True:
            batch = await self.batch(tenant, batch_id)
            if batch.status in (Status.CANCELLING, Status.CANCELLED):
                return batch
            if not batch.runs:
                raise ConflictError(f"a batch that is {batch.status} can't be cancelled")
            cancelled = batch.enter(Status.CANCELLING, self._clock())
            if await self._state.replace(cancelled):
                self._stop_lines(batch.id)
                self._wake()
                return cancelled

    # --- retention

    async def sweep(self) -> None:
        """Delete files and batches whose time is over, and files that nothing knows."""
        now_s = self._clock()
        for file in await self._state.expired_files(now_s):
            await self._state.remove_file(file.id)
            await asyncio.to_thread(self._folder.delete, file.id)
        await self._state.remove_batches(now_s - self.config.retention_days * 86_400)
        old = await asyncio.to_thread(self._folder.unfinished, now_s)
        known = [file_id for file_id in old if await self._state.file(file_id) is not None]
        await asyncio.to_thread(self._folder.delete_orphans, old, known)

    async def _sweep(self) -> None:
        while True:
            try:
                await self.sweep()
            except CoeError as error:
                log.error("expired files can't be deleted: %s", error.code)
            except Exception as error:
                log.error("expired files can't be deleted: %s", type(error).__name__)
            await asyncio.sleep(_SWEEP_S)


def expires_after(given: object, param: str) -> int | None:
    """How long a file is kept, in s, by a client's `{anchor, seconds}`; None without one.

    Raises:
        InvalidRequestError: It is not valid.
    """
    if given is None:
        return None
    seconds = given.get("seconds") if isinstance(given, dict) else None
    if isinstance(seconds, str) and seconds.isdecimal() and len(seconds) < 9:
        seconds = int(seconds)  # a form has texts only
    valid = isinstance(seconds, int) and not isinstance(seconds, bool)
    if (
        not valid
        or not _SHORTEST_S <= seconds <= _LONGEST_S  # type: ignore[operator]
        or not isinstance(given, dict)
        or given.get("anchor") != "created_at"
    ):
        raise InvalidRequestError(
            f"`{param}` must have `anchor` created_at, and `seconds` from {_SHORTEST_S} to "
            f"{_LONGEST_S}",
            param=param,
        )
    return seconds
