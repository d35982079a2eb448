"""The interface of the state of files and batches, which outlives every process.

A gateway leases a batch before it runs it. The lease only saves work: results are accepted from
anybody, each line's first one counts, and none is accepted once the batch is sealed. Results of a
batch with a `max_cost` are accepted from who leased it last.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.batches.batch_records import BatchRecord, FileRecord, LineResult
from service.store.list_page import Page

CANCELLED_LEASE_S = 2.5
"""How long the lease of a batch holds from when it is cancelled, unless it is renewed, in s.

A gateway renews it every second. So another one soon ends a cancelled batch whose gateway died.
"""

MOST_LEASES = 4.0
"""A lease that ends later than in so many of who asks for it is of a clock that was set back.

It holds no more: nobody would run its batch until the clock is there again.
"""


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Batches that have not ended.

    Attributes:
        by_status: Their number, by state.
        oldest_s: When the oldest was made, in seconds since 1970; None without one.
        lines: Their lines with a result.
    """

    by_status: Mapping[str, int] = field(default_factory=dict)
    oldest_s: float | None = None
    lines: int = 0


class BatchState(Protocol):
    """Files, batches and results.

    Every method may raise StoreUnavailableError, and those that write also StorageFullError. A
    method that raised may have written or not, and can be repeated.
    """

    async def start(self) -> None:
        """Open what exists already; nothing is made before it is needed."""

    async def stop(self) -> None:
        """Close it."""

    # --- files

    async def add_file(self, file: FileRecord, most_bytes: int | None) -> bool:
        """Add a file, or replace the one of this id.

        Args:
            file: The file.
            most_bytes: The bytes of files that its tenant may have; None for no bound.

        Returns:
            Whether there was room for it.
        """

    async def file(self, file_id: str) -> FileRecord | None:
        """Return a file of any tenant."""

    async def files(self, tenant: str, purpose: str | None, page: Page) -> list[FileRecord]:
        """Return a part of the list of a tenant's files."""

    async def file_bytes(self, tenant: str) -> int:
        """Return the bytes of a tenant's files."""

    async def remove_file(self, file_id: str) -> bool:
        """Remove a file's record. Return whether there was one."""

    async def expired_files(self, now_s: float) -> list[FileRecord]:
        """Return files whose time is over."""

    # --- batches

    async def add_batch(self, batch: BatchRecord, most_open: int) -> bool:
        """Add a batch, unless its tenant has `most_open` that have not ended."""

    async def batch(self, batch_id: str) -> BatchRecord | None:
        """Return a batch of any tenant."""

    async def batches(self, tenant: str, page: Page) -> list[BatchRecord]:
        """Return a part of the list of a tenant's batches."""

    async def uses(self, file_id: str) -> str | None:
        """Return a batch that has not ended and reads a file, or None."""

    async def replace(self, batch: BatchRecord, plan: bytes | None = None) -> bool:
        """Replace a batch whose version is one less, and write its plan where one is given.

        A batch that has ended loses its plan and its results, which are in its output files. The
        lease of one that is cancelled ends after `CANCELLED_LEASE_S`, unless it is renewed.

        Returns:
            False where the batch was changed by others; then nothing is written.
        """

    async def plan(self, batch_id: str) -> bytes | None:
        """Return a batch's plan."""

    async def remove_batches(self, before_s: float) -> int:
        """Remove the batches that were made before a time and have ended; return how many."""

    async def statistics(self) -> BatchStatistics:
        """Count the batches that have not ended."""

    # --- leases

    async def lease(
        self, owner: str, lease_s: float, without: Collection[str] = ()
    ) -> BatchRecord | None:
        """Lease the next batch that has not ended and that nobody holds.

        Tenants take turns: first comes the tenant with the fewest leased batches. A lease that ends
        later than in `MOST_LEASES` times `lease_s` holds no more.

        Args:
            owner: The gateway that leases it.
            lease_s: How long it is leased, in s.
            without: Tenants whose batches are left out.
        """

    async def renew(self, owner: str, batch_id: str, lease_s: float) -> BatchRecord | None:
        """Renew a lease, and return the batch; None where another owner has it or it has ended."""

    async def release(self, owner: str, batch_id: str) -> None:
        """Give a lease back."""

    # --- results

    async def put_results(
        self, batch_id: str, results: Sequence[LineResult], owner: str | None = None
    ) -> set[int]:
        """Add results of lines, all at once.

        Args:
            batch_id: The batch.
            results: The results.
            owner: The gateway that has to have leased the batch last; None where it does not
                matter.

        Returns:
            The lines whose result was added. A line that has a result already keeps it, and a
            batch that is sealed or gone, or leased by another owner, takes none.
        """

    async def mark_settled(self, batch_id: str, line: int) -> None:
        """Forget a result's settlements, which were delivered."""

    async def unsettled(self, batch_id: str) -> list[tuple[int, bytes]]:
        """Return lines whose settlements may not have been delivered, with these."""

    async def done(self, batch_id: str) -> set[int]:
        """Return the lines that have a result."""

    async def results(
        self, batch_id: str, *, failed: bool, after: int, limit: int
    ) -> Sequence[tuple[int, bytes]]:
        """Return lines with their results, by number.

        Args:
            batch_id: The batch.
            failed: Those for the error file, or those for the output file.
            after: Only lines after this one; -1 for all.
            limit: The most that are returned.
        """
