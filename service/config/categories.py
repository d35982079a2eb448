"""Section `categories`: categories of prompts by description and examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pydantic import Field

from service.config.section_base import Section

MIN_EXAMPLES = 3
_MAX_EXAMPLES = 1000
_MAX_CHARS = 8000


class CategoryConfig(Section):
    """A category of prompts that the router learns from examples, without a fit."""

    description: str = Field(
        "",
        max_length=_MAX_CHARS,
        description="What belongs here, in one sentence: the subjects by name. It counts as much "
        "as five examples.",
    )
    examples: tuple[str, ...] = Field(
        description=f"Prompts of this category, at least {MIN_EXAMPLES}; ten are better. The same "
        "prompt may not stand in two categories.",
        max_length=_MAX_EXAMPLES,
    )
    expert: str | None = Field(
        None,
        description="The expert for prompts of this category. Default: the expert that names it in "
        "its `categories`.",
    )


Fault = tuple[tuple[str | int, ...], str]


def example_faults(categories: Mapping[str, CategoryConfig]) -> Iterator[Fault]:
    """Yield what is wrong with the examples: the place in the config, and the error."""
    first: dict[str, tuple[str, int]] = {}
    for name, category in categories.items():
        place = (name, "examples")
        if len(category.examples) < MIN_EXAMPLES:
            yield (
                place,
                f"{len(category.examples)} examples are too few: at least {MIN_EXAMPLES} are "
                "needed, and ten are better",
            )
        for number, text in enumerate(category.examples):
            here = (*place, number)
            if not text.strip():
                yield here, "an example must not be empty"
                continue
            if len(text) > _MAX_CHARS:
                yield here, f"an example may have {_MAX_CHARS:,} characters, not {len(text):,}"
                continue
            # Case and white space make no other prompt.
            other, at = first.setdefault(" ".join(text.casefold().split()), (name, number))
            if (other, at) != (name, number):
                yield here, f"the same example as categories.{other}.examples.{at}; remove one"
