"""Records of files and batches, and the states that a batch goes through. Pure.

The objects have OpenAI's shapes: https://platform.openai.com/docs/api-reference/batch/object and
https://platform.openai.com/docs/api-reference/files/object.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

import orjson

from service.batches.batch_progress import ModelCounts, PlannedShare, progress_of
from service.batches.batch_types import WINDOW, BatchTerms

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
"""The endpoints that a batch's lines may be for."""
PURPOSE = "batch"
OUTPUT_PURPOSE = "batch_output"


class Status(StrEnum):
    """The state of a batch."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


ENDED = frozenset({Status.COMPLETED, Status.FAILED, Status.EXPIRED, Status.CANCELLED})
"""The states that a batch does not leave."""
_NEXT: Mapping[Status, frozenset[Status]] = {
    Status.VALIDATING: frozenset(
        {Status.IN_PROGRESS, Status.FAILED, Status.CANCELLING, Status.FINALIZING}
    ),
    Status.IN_PROGRESS: frozenset({Status.FINALIZING, Status.CANCELLING}),
    Status.FINALIZING: frozenset({Status.COMPLETED, Status.EXPIRED}),
    Status.CANCELLING: frozenset({Status.CANCELLED}),
}


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file. Times are seconds since 1970.

    Attributes:
        id: Its id.
        tenant: The tenant that it belongs to.
        purpose: `batch` for what clients upload, `batch_output` for what batches make.
        filename: The client's name of it.
        size: Its size in bytes.
        created_s: When it was made.
        expires_s: When it is deleted.
    """

    id: str
    tenant: str
    purpose: str
    filename: str
    size: int
    created_s: int
    expires_s: int

    def to_json(self) -> dict[str, Any]:
        """OpenAI's object `file`."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size,
            "created_at": self.created_s,
            "expires_at": self.expires_s,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass(frozen=True, slots=True)
class InputError:
    """An error of the input file as a whole.

    Attributes:
        code: The machine-readable reason.
        message: What was wrong, and what is allowed.
        line: The line's number from 1, or None.
        param: The field at fault, or None.
    """

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """What the lines of a batch came to so far.

    Attributes:
        completed: Lines with an answer.
        failed: Lines with an error.
        prompt_tokens: Tokens of all prompts.
        completion_tokens: Tokens of all answers.
        cost: Units of cost of all lines.
        cached_tokens: Those of the prompts' tokens that an engine had in its prefix cache.
        reasoning_tokens: Those of the answers' tokens that were reasoning.
        models: By expert or recipe of the plan, what its lines came to.
    """

    completed: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    models: Mapping[str, ModelCounts] = field(default_factory=dict)

    @property
    def lines(self) -> int:
        """The number of lines with a result."""
        return self.completed + self.failed


@dataclass(frozen=True, slots=True)
class LineResult:
    """The result of one line.

    Attributes:
        line: The line's number, from 0.
        failed: Whether it belongs into the error file.
        body: Its line in the output or error file, without the newline.
        settlements: What settles its claims (`stored_settlement`), until that is delivered.
        prompt_tokens: Tokens of its prompt.
        completion_tokens: Tokens of its answer.
        cost: Its cost, in units of cost.
        cached_tokens: Those of the prompt's tokens that an engine had in its prefix cache.
        reasoning_tokens: Those of the answer's tokens that were reasoning.
        model: The expert or recipe of the plan under which it counts; None for a line without one.
    """

    line: int
    failed: bool
    body: bytes
    settlements: bytes | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    model: str | None = None


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch, without its lines. Times are seconds since 1970.

    Attributes:
        id: Its id.
        tenant: The tenant that it belongs to.
        key: The public id of the key that made it; empty where none was needed.
        endpoint: The endpoint of its lines.
        input_file_id: The file with its lines.
        metadata: The client's notes.
        terms: What the client asks of it as a whole.
        created_s: When it was made.
        expires_s: When it expires.
        output_lives_s: How long its output files are kept, in s; None for the service's usual time.
        status: Its state.
        total: The number of its lines; 0 until they are known.
        errors: The errors of the input file as a whole.
        planned: The plan's expected quality, cost and seconds; None before it is planned.
        output_file_id: The file with answers, or None.
        error_file_id: The file with errors, or None.
        times: When it entered each state but the first, by the state.
        sealed: Whether results are no longer accepted, because the output files are being written.
        expired: Whether its time was over before all lines had a result.
        version: Grows with each change.
        shares: By expert or recipe of the plan, the lines that it gets and their expected tokens.
        counts: What its lines came to; it changes without a new version.
    """

    id: str
    tenant: str
    key: str
    endpoint: str
    input_file_id: str
    metadata: Mapping[str, str] | None
    terms: BatchTerms
    created_s: int
    expires_s: int
    output_lives_s: int | None = None
    status: Status = Status.VALIDATING
    total: int = 0
    errors: tuple[InputError, ...] = ()
    planned: tuple[float, float, float] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    times: Mapping[str, int] = field(default_factory=dict)
    sealed: bool = False
    expired: bool = False
    version: int = 0
    shares: Mapping[str, PlannedShare] = field(default_factory=dict)
    counts: BatchCounts = field(default_factory=BatchCounts)

    @property
    def ended(self) -> bool:
        """Whether it is in a state that it does not leave."""
        return self.status in ENDED

    @property
    def runs(self) -> bool:
        """Whether its lines may run."""
        return self.status in (Status.VALIDATING, Status.IN_PROGRESS)

    def _elapsed_s(self, now_s: float) -> float | None:
        """The time since its lines began, in s; None where they don't run."""
        began_s = self.times.get(Status.IN_PROGRESS.value)
        if self.status is not Status.IN_PROGRESS or began_s is None:
            return None
        return now_s - began_s

    def enter(self, status: Status, now_s: float, **changes: Any) -> BatchRecord:
        """Return the batch in its next state.

        Args:
            status: The next state.
            now_s: Seconds since 1970.
            changes: Other attributes that change with it.

        Raises:
            ValueError: The batch can't go from its state to that one.
        """
        if status not in _NEXT.get(self.status, ()):
            raise ValueError(f"a batch that is {self.status} can't become {status}")
        return replace(
            self,
            status=status,
            times={**self.times, status.value: int(now_s)},
            version=self.version + 1,
            **changes,
        )

    def changed(self, **changes: Any) -> BatchRecord:
        """Return the batch with other attributes, in the same state."""
        return replace(self, version=self.version + 1, **changes)

    def to_json(self, now_s: float) -> dict[str, Any]:
        """OpenAI's object `batch`, and `coe` with terms, plan, cost, and progress by model.

        Args:
            now_s: Seconds since 1970, for the time to go.
        """
        counts = self.counts
        errors = [asdict(error) for error in self.errors]
        at = {f"{status}_at": self.times.get(status) for status in Status}
        del at["validating_at"]
        planned = None
        if self.planned is not None:
            names = ("quality", "cost", "seconds")
            planned = dict(zip(names, self.planned, strict=True))
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": {"object": "list", "data": errors} if errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": WINDOW,
            "status": self.status.value,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_s,
            "expires_at": self.expires_s,
            **at,
            "request_counts": {
                "total": self.total,
                "completed": counts.completed,
                "failed": counts.failed,
            },
            "usage": {
                "input_tokens": counts.prompt_tokens,
                "input_tokens_details": {"cached_tokens": counts.cached_tokens},
                "output_tokens": counts.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
                "total_tokens": counts.prompt_tokens + counts.completion_tokens,
            },
            "metadata": self.metadata,
            "coe": {
                "max_cost": self.terms.max_cost,
                "deadline_s": self.terms.deadline_s,
                "quality": "best" if self.terms.quality is None else self.terms.quality,
                "planned": planned,
                "cost": round(counts.cost, 9),
                **progress_of(self.shares, counts.models, self._elapsed_s(now_s)).to_json(),
            },
        }


def dump_file(file: FileRecord) -> bytes:
    """Serialize a file's record."""
    return orjson.dumps(asdict(file))


def load_file(data: bytes) -> FileRecord:
    """Parse what `dump_file` wrote."""
    return FileRecord(**orjson.loads(data))


def dump_batch(batch: BatchRecord) -> bytes:
    """Serialize a batch's record, without its counts."""
    fields = asdict(batch)
    del fields["counts"]
    return orjson.dumps(fields)


def load_batch(data: bytes, counts: BatchCounts) -> BatchRecord:
    """Parse what `dump_batch` wrote, and add the counts."""
    fields = orjson.loads(data)
    planned = fields["planned"]
    return BatchRecord(
        **{
            **fields,
            "terms": BatchTerms(**fields["terms"]),
            "status": Status(fields["status"]),
            "errors": tuple(InputError(**error) for error in fields["errors"]),
            "planned": tuple(planned) if planned is not None else None,
            "shares": {
                name: PlannedShare(**share) for name, share in fields.get("shares", {}).items()
            },
            "counts": counts,
        }
    )


def new_file_id() -> str:
    """A new file's id; later ones are greater."""
    return f"file-{_rising()}"


def new_batch_id() -> str:
    """A new batch's id; later ones are greater."""
    return f"batch_{_rising()}"


def _rising() -> str:
    return f"{time.time_ns():016x}{secrets.token_hex(4)}"


def output_id(batch_id: str, *, failed: bool) -> str:
    """The id of a batch's output or error file: the same whoever writes it."""
    return f"file-{_digest(batch_id, 'errors' if failed else 'output')}"


def request_id(batch_id: str, line: int) -> str:
    """The id of a line's request."""
    return f"batch_req_{_digest(batch_id, str(line))}"


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()
