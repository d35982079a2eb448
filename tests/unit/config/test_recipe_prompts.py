"""Templates have the placeholders that they need, and no others."""

from __future__ import annotations

import pytest

from service.config.recipe_prompts import (
    AGGREGATE,
    AGGREGATE_PLACEHOLDERS,
    REVIEW,
    REVIEW_PLACEHOLDERS,
    REVISE,
    REVISE_PLACEHOLDERS,
    check_template,
)


@pytest.mark.parametrize(
    ("text", "required"),
    [
        (REVIEW, REVIEW_PLACEHOLDERS),
        (REVISE, REVISE_PLACEHOLDERS),
        (AGGREGATE, AGGREGATE_PLACEHOLDERS),
        ('{"score": 1} {question} {answers} {Not}', REVIEW_PLACEHOLDERS),
    ],
)
def test_check_template_takes_complete_templates(text: str, required: frozenset[str]) -> None:
    check_template("review", text, required)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{question}", r"review: lacks the placeholder \{answers\}; it needs \{answers\}, "),
        ("{question} {answers} {name}", r"review: has no placeholder \{name\}; it has \{answers\}"),
    ],
)
def test_check_template_names_the_fault(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_template("review", text, REVIEW_PLACEHOLDERS)
