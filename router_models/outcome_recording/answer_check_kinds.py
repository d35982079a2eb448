"""The kinds of checks that a prompt may have: how an expert's answer to it is scored."""

from __future__ import annotations

import ast
from typing import Annotated, Any, Literal

import jsonschema
import regex
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_MAX_TESTS = 200


class _Check(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ExactCheck(_Check):
    """The final answer is one of the given texts, white space and a full stop at its end aside."""

    kind: Literal["exact"]
    answer: str | list[str] = Field(description="The right answer, or several that are right.")
    ignore_case: bool = True

    @field_validator("answer")
    @classmethod
    def _some(cls, given: str | list[str]) -> str | list[str]:
        return _texts([given])[0] if isinstance(given, str) else _texts(given)

    @property
    def answers(self) -> list[str]:
        """All right answers."""
        return [self.answer] if isinstance(self.answer, str) else self.answer


class ChoiceCheck(_Check):
    """The final answer is the letter of a choice, or the choice itself where `choices` has it."""

    kind: Literal["choice"]
    answer: str = Field(pattern=r"^[A-J]$", description="The letter of the right choice.")
    choices: dict[str, str] = Field(
        default_factory=dict, description="Letter → text; an answer by its text then counts too."
    )

    @model_validator(mode="after")
    def _among(self) -> ChoiceCheck:
        if self.choices and self.answer not in self.choices:
            raise ValueError(
                f"answer is {self.answer}, and choices has only {', '.join(sorted(self.choices))}"
            )
        return self


class NumberCheck(_Check):
    """The final answer is this number, units and currency signs around it aside."""

    kind: Literal["number"]
    answer: float = Field(allow_inf_nan=False, strict=False)
    tolerance: float = Field(0.0, ge=0, strict=False, description="Largest absolute difference.")
    relative_tolerance: float = Field(
        0.0, ge=0, lt=1, strict=False, description="Largest difference as a share of the answer."
    )


class RegexCheck(_Check):
    """The answer matches a regular expression (of the package `regex`), anywhere unless `full`."""

    kind: Literal["regex"]
    pattern: str = Field(min_length=1)
    full: bool = Field(False, description="The whole answer must match, not a part of it.")
    ignore_case: bool = False

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, given: str) -> str:
        try:
            regex.compile(given)
        except regex.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return given


class JsonSchemaCheck(_Check):
    """The answer is JSON, alone or in one fence, that fits a schema and has expected values."""

    kind: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema", description="A JSON schema (2020-12).")
    expected: dict[str, Any] = Field(
        default_factory=dict,
        description="JSON pointer (`/items/0/name`) or name of a top key → its right value. "
        "The score is the share of right values.",
    )

    @field_validator("schema_")
    @classmethod
    def _is_schema(cls, given: dict[str, Any]) -> dict[str, Any]:
        try:
            jsonschema.Draft202012Validator.check_schema(given)
        except jsonschema.SchemaError as error:
            raise ValueError(f"is no JSON schema: {error.message}") from None
        if _outside(given):
            raise ValueError("refers to a schema outside of itself; only `#…` is followed")
        return given


class ContainsAllCheck(_Check):
    """The answer contains all given texts, and none of the forbidden ones."""

    kind: Literal["contains_all"]
    texts: list[str] = Field(min_length=1, description="What the answer must contain.")
    none_of: list[str] = Field(default_factory=list, description="What it must not contain.")
    ignore_case: bool = True
    partial: bool = Field(False, description="Score the share of texts, rather than all or none.")

    @field_validator("texts", "none_of")
    @classmethod
    def _some(cls, given: list[str]) -> list[str]:
        return _texts(given) if given else given


class UnitTestsCheck(_Check):
    """The Python code in the answer passes tests, each with one `assert` as its last statement."""

    kind: Literal["unit_tests"]
    tests: list[str] = Field(min_length=1, max_length=_MAX_TESTS)
    partial: bool = Field(False, description="Score the share of tests, rather than all or none.")
    timeout_s: float = Field(5.0, gt=0, le=60, strict=False)
    memory_bytes: int = Field(512 * 1024**2, ge=64 * 1024**2, le=8 * 1024**3)

    @field_validator("tests")
    @classmethod
    def _asserts(cls, given: list[str]) -> list[str]:
        for i, test in enumerate(given):
            try:
                body = ast.parse(test).body
            except SyntaxError as error:
                raise ValueError(f"[{i}] is no Python: {error.msg}") from None
            if not body or not isinstance(body[-1], ast.Assert):
                raise ValueError(f"[{i}] must end with an `assert`")
        return given


class JudgeCheck(_Check):
    """A judge expert compares the answer with a reference, or grades it by a rubric."""

    kind: Literal["judge"]
    reference: str | None = Field(
        None, min_length=1, description="A good answer; the judge sees both, in both orders."
    )
    rubric: str | None = Field(
        None, min_length=1, description="What a good answer has. Alone: graded from 1 to 10."
    )

    @model_validator(mode="after")
    def _something(self) -> JudgeCheck:
        if self.reference is None and self.rubric is None:
            raise ValueError("needs a reference, a rubric, or both")
        return self


Check = Annotated[
    ExactCheck
    | ChoiceCheck
    | NumberCheck
    | RegexCheck
    | JsonSchemaCheck
    | ContainsAllCheck
    | UnitTestsCheck
    | JudgeCheck,
    Field(discriminator="kind"),
]


def _texts(given: list[str]) -> list[str]:
    if not given or not all(text.strip() for text in given):
        raise ValueError("must be texts that are not empty")
    return given


def _outside(schema: Any) -> bool:
    """Whether a schema refers to another document, which would be fetched."""
    if isinstance(schema, dict):
        reference = schema.get("$ref", "#")
        if isinstance(reference, str) and not reference.startswith("#"):
            return True
        return any(map(_outside, schema.values()))
    return isinstance(schema, list) and any(map(_outside, schema))
