"""Reads files of prompts with checks: one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from router_models.outcome_reader import OutcomeError
from router_models.outcome_recording.answer_check_kinds import Check

_MAX_ERRORS = 20
_MAX_FILE_BYTES = 1 << 30


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class Task(BaseModel):
    """A prompt, or a conversation that ends with one, and how answers to it are scored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(
        "", max_length=200, description="Default: made from the prompt and the category."
    )
    prompt: str | None = Field(None, min_length=1)
    messages: tuple[Message, ...] | None = Field(None, min_length=1)
    category: str | None = Field(None, min_length=1, max_length=100)
    check: Check
    max_tokens: int | None = Field(
        None, ge=1, description="Longest answer in tokens, where shorter than --max-tokens."
    )

    @model_validator(mode="before")
    @classmethod
    def _identify(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("id") in (None, ""):
            fields = [data.get("prompt"), data.get("messages"), data.get("category")]
            digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
            return {**data, "id": digest[:16]}
        return data

    @model_validator(mode="after")
    def _check_prompt(self) -> Task:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("needs exactly one of prompt, messages")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("messages must end with one of the role user")
        return self

    @property
    def text(self) -> str:
        """The prompt as routers see it: the last message of the user."""
        return self.prompt if self.prompt is not None else self._conversation()[-1]["content"]

    def _conversation(self) -> list[dict[str, str]]:
        assert self.messages is not None
        return [{"role": message.role, "content": message.content} for message in self.messages]

    def conversation(self) -> list[dict[str, str]]:
        """The messages of the request."""
        if self.prompt is not None:
            return [{"role": "user", "content": self.prompt}]
        return self._conversation()


def read_tasks(files: Sequence[Path]) -> list[Task]:
    """All tasks of the files, in order.

    Raises:
        OutcomeError: A line is no task, or an id is there twice; the message names file, line and
            field of up to 20 errors.
    """
    found: dict[str, Task] = {}
    errors: list[str] = []
    for file in files:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OutcomeError(f"{file}: {getattr(error, 'strerror', None) or error}") from None
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            place = f"{file}:{number}"
            try:
                task = Task.model_validate(json.loads(line))
            except ValidationError as error:
                errors += (f"{place}: {_field(item)}" for item in error.errors())
            except (ValueError, RecursionError) as error:
                errors.append(f"{place}: is no JSON: {error}")
            else:
                if task.id in found:
                    errors.append(f"{place}: id: {task.id!r} was on an earlier line")
                found.setdefault(task.id, task)
    if errors:
        more = len(errors) - _MAX_ERRORS
        raise OutcomeError(
            "\n".join(errors[:_MAX_ERRORS]) + (f"\nand {more} more errors" if more > 0 else "")
        )
    if not found:
        raise OutcomeError(f"{', '.join(map(str, files))}: no prompt in it")
    return list(found.values())


def builtin_files() -> list[Path]:
    """The files of prompts that come with the project."""
    folder = Path(str(resources.files("router_models"))) / "outcomes_builtin"
    return sorted(folder.glob("*.jsonl"))


def _field(error: Any) -> str:
    parts: Iterable[Any] = error["loc"]
    where = ".".join(str(part) for part in parts)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "union_tag_invalid":
        message = f"kind {error['ctx']['tag']!r} is unknown; known: {error['ctx']['expected_tags']}"
    return f"{where}: {message}" if where else message
