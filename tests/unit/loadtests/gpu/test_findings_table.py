"""The page of a run's findings."""

from __future__ import annotations

from pathlib import Path

from loadtests.gpu.findings_table import NOT_RUN, page

PAGE = Path(__file__).parents[4] / "docs" / "benchmarks" / "gpu.md"


def test_page_has_a_row_for_each_figure_by_part() -> None:
    found = [
        {"part": "copies", "what": "bus", "memory": "pinned", "to_gb_s": 52.34567},
        {"part": "swaps", "facts": {"in place": {"value": 0.14, "times": 10}}},
        {"part": "copies", "what": "copy_all", "every_tensor_is_right": True, "why": "a|b\nc"},
    ]
    text = page({"date": "2026-11-30", "GPUs": "NVIDIA H200"}, found)
    assert "- GPUs: NVIDIA H200" in text
    assert text.index("## copies") < text.index("## swaps")
    for row in (
        "| bus: memory | pinned |",
        "| bus: to_gb_s | 52.35 |",
        "| copy_all: every_tensor_is_right | true |",
        "| copy_all: why | a\\|b c |",
        "| swaps: facts, in place, value | 0.14 |",
    ):
        assert row in text


def test_page_of_the_documents_is_either_found_or_says_that_it_was_not_run() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == NOT_RUN or "## copies" in text
