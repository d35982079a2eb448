"""Trials of grammars in another process, before vLLM parses the grammars in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import orjson

from service.engine.grammar_check import Grammar, GrammarChecker, SharedChecker, Vocabulary
from service.engine.vllm.async_llm_handle import grammar_from_text

_CPU_S = 2.0
# A body without these words has no grammar that vLLM parses before its reply begins.
_MARKS = (b"structural_tag", b"structured_outputs", b"json_schema", b"strict", b"\\u")

checkers = SharedChecker(lambda: GrammarChecker(_CPU_S))

# The tenant of the running request. vLLM's handlers run in its task and in tasks that they start.
_TENANT: ContextVar[str] = ContextVar("grammar_trials_tenant", default="")


class GrammarTrials:
    """Trials of the grammars of one engine's requests."""

    def __init__(self) -> None:
        self._checker: GrammarChecker | None = None
        self._vocabulary: Vocabulary | None = None
        self._starting: asyncio.Task[None] | None = None

    async def start(self, read_vocabulary: Callable[[], Vocabulary | None]) -> None:
        """Start to check grammars.

        Args:
            read_vocabulary: A function that returns the vocabulary that the engine compiles
                grammars for. It is called in a thread.
        """
        self._checker = checkers.acquire()
        self._vocabulary = await asyncio.to_thread(read_vocabulary)
        self._starting = asyncio.create_task(self._checker.start())

    async def stop(self) -> None:
        """Stop checking grammars."""
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._checker is not None:
            self._checker = None
            await checkers.release()

    async def check(self, grammar: Grammar) -> None:
        """Try out one grammar.

        Raises:
            InvalidRequestError: The grammar is invalid, costs too much, or crashes its parser.
            OverCapacityError: The grammar could not be tried out now.
        """
        if self._checker is not None:
            await self._checker.check(grammar, self._vocabulary, _TENANT.get())

    async def check_body(self, body: bytes, tenant: str = "") -> None:
        """Try out the grammars that vLLM parses together with a body, or after its reply began.

        Grammars that `check` gets later in the same task count for the same tenant.

        Args:
            body: The request's body.
            tenant: The tenant that sent it.

        Raises:
            InvalidRequestError: A grammar is invalid, costs too much, or crashes its parser.
            OverCapacityError: A grammar could not be tried out now.
        """
        _TENANT.set(tenant)
        if self._checker is None or not any(mark in body for mark in _MARKS):
            return
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError:
            return  # vLLM reports the fault of the body
        if not isinstance(data, dict):
            return
        for grammar in _grammars_in(data):
            await self._checker.check(grammar, self._vocabulary, tenant)


def _grammars_in(data: dict[str, Any]) -> list[Grammar]:
    """Return the grammars in a body of any endpoint."""
    grammars = []
    form = data.get("response_format")
    if isinstance(form, dict) and form.get("type") == "structural_tag":
        grammars.append(Grammar("structural_tag", _text(form)))
    params = data.get("structured_outputs")
    if isinstance(params, dict):
        tag, schema, regex = (params.get(name) for name in ("structural_tag", "json", "regex"))
        if isinstance(tag, str):
            grammars.append(Grammar("structural_tag", tag))
        if isinstance(schema, (dict, str)):
            grammars.append(Grammar("json", _text(schema)))
        if isinstance(regex, str):
            grammars.append(Grammar("regex", regex))
        if isinstance(text := params.get("grammar"), str):
            grammars.append(grammar_from_text(text))
    schemas = [
        _at(form, "json_schema", "schema"),
        _at(data.get("text"), "format", "schema"),
        _at(data.get("output_config"), "format", "schema"),
    ]
    tools = data.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if isinstance(function, dict) and function.get("strict"):
            schemas += [function.get("parameters"), function.get("input_schema")]
    return grammars + [
        Grammar("json", _text(schema)) for schema in schemas if isinstance(schema, dict)
    ]


def _at(value: object, *names: str) -> object:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text(value: dict[str, Any] | str) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()
