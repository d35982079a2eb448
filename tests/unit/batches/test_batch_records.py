"""The states of a batch, and its records."""

from __future__ import annotations

import pytest

from service.batches.batch_records import (
    ENDED,
    BatchCounts,
    BatchRecord,
    InputError,
    Status,
    dump_batch,
    load_batch,
    new_batch_id,
    new_file_id,
    output_id,
    request_id,
)
from service.batches.batch_types import BatchTerms

BATCH = BatchRecord(
    "batch_1", "acme", "k", "/v1/embeddings", "file-1", {"a": "b"}, BatchTerms(1.5, 60, 0.5), 10, 70
)
# As in OpenAI's guide: https://platform.openai.com/docs/guides/batch
ALLOWED = {
    ("validating", "in_progress"),
    ("validating", "failed"),
    ("validating", "cancelling"),
    ("validating", "finalizing"),
    ("in_progress", "finalizing"),
    ("in_progress", "cancelling"),
    ("finalizing", "completed"),
    ("finalizing", "expired"),
    ("cancelling", "cancelled"),
}


def at(status: Status) -> BatchRecord:
    from dataclasses import replace

    return replace(BATCH, status=status)


@pytest.mark.parametrize("first", Status)
@pytest.mark.parametrize("then", Status)
def test_batch_enters_only_the_states_that_may_follow(first: Status, then: Status) -> None:
    batch = at(first)
    if (first.value, then.value) not in ALLOWED:
        with pytest.raises(ValueError, match="can't become"):
            batch.enter(then, 99.5)
        return
    entered = batch.enter(then, 99.5)
    assert entered.version == batch.version + 1
    assert entered.to_json(100.0)[f"{then}_at"] == 99
    assert entered.ended == (then in ENDED)
    assert first not in ENDED


def test_batch_as_json_has_openai_s_fields() -> None:
    shown = BATCH.to_json(100.0)
    openai = {
        "id", "object", "endpoint", "errors", "input_file_id", "completion_window", "status",
        "output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at",
        "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at",
        "cancelled_at", "request_counts", "usage", "metadata",
    }  # fmt: skip
    assert shown.keys() == {*openai, "coe"}
    assert "acme" not in str(shown)


def test_batch_record_is_read_as_it_was_written() -> None:
    batch = BATCH.enter(
        Status.FAILED, 5, errors=(InputError("a", "b", 3, "c"),), planned=(0.1, 2.0, 3.0)
    )
    counts = BatchCounts(1, 2, 3, 4, 5.5)
    found = load_batch(dump_batch(batch), counts)
    assert found.counts == counts
    assert load_batch(dump_batch(batch), batch.counts) == batch


def test_ids_rise_and_those_of_outputs_depend_on_the_batch_alone() -> None:
    for make in (new_batch_id, new_file_id):
        made = [make() for _ in range(100)]
        assert made == sorted(made)
        assert len(set(made)) == 100
    assert output_id("a", failed=True) == output_id("a", failed=True)
    found = {output_id(name, failed=failed) for name in "ab" for failed in (True, False)}
    assert len(found) == 4
    assert len({request_id(name, line) for name in "ab" for line in range(9)}) == 18
