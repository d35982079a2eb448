"""vLLM's engine client with grammars tried out elsewhere before vLLM reads them in this process."""

from __future__ import annotations

import asyncio
import hashlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import orjson

from service.engine.grammar_check import Grammar, GrammarChecker, SharedChecker, Vocabulary
from service.errors import InvalidRequestError, OverCapacityError

# vLLM compiles all grammars of an engine with the one backend that the first of them was checked
# for. Left to choose by request, the first client would decide for all others.
BACKEND = "xgrammar"
_CPU_S = 2.0
# Bodies with none of these hold no grammar that vLLM reads before it has begun a reply.
_MARKS = (b"structural_tag", b"structured_outputs", b"json_schema", b"strict", b"\\u")

checkers = SharedChecker(lambda: GrammarChecker(_CPU_S))


def llm_class(grammars: GrammarTrials) -> Any:
    """`AsyncLLM`, with every grammar that vLLM has derived from a request tried out first."""
    from vllm.exceptions import QueueOverflowError, VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    class CheckedLLM(AsyncLLM):  # type: ignore[misc]  # vllm has no types here
        """vLLM validates in `add_request`, on the event loop, whatever the request's form was."""

        async def add_request(
            self, request_id: str, prompt: Any, params: Any, *args: Any, **more: Any
        ) -> Any:
            asked = getattr(params, "structured_outputs", None)
            try:
                if asked is not None:
                    await grammars.check(asked)
                return await super().add_request(request_id, prompt, params, *args, **more)
            except InvalidRequestError as error:
                _note(error)
                raise VLLMValidationError(error.message) from None
            except OverCapacityError as error:
                _note(error)
                raise QueueOverflowError from None
            except ValueError as error:
                _note(InvalidRequestError(str(error)))
                raise

    return CheckedLLM


@dataclass(slots=True)
class Refusal:
    """Why vLLM was not given a request that its own layer had taken in; None: it was given it.

    Some of vLLM's streams, once begun, can't tell a client's fault from their own any more.
    """

    error: InvalidRequestError | OverCapacityError | None = None


_REFUSAL: ContextVar[Refusal | None] = ContextVar("refusal", default=None)


def watch_refusal() -> Refusal:
    """What becomes of the request that this task, or those that it starts, give to vLLM."""
    made = Refusal()
    _REFUSAL.set(made)
    return made


def _note(error: InvalidRequestError | OverCapacityError) -> None:
    if (refusal := _REFUSAL.get()) is not None:
        refusal.error = error


class GrammarTrials:
    """Trials of the grammars of one engine's requests."""

    def __init__(self) -> None:
        self._checker: GrammarChecker | None = None
        self._vocabulary: Vocabulary | None = None
        self._starting: asyncio.Task[None] | None = None

    async def start(self, tokenizer: Any, vocab_size: int) -> None:
        """Begin to check: for the engine's own tokens."""
        self._checker = checkers.take()
        self._vocabulary = await asyncio.to_thread(_vocabulary, tokenizer, vocab_size)
        self._starting = asyncio.create_task(self._checker.start())

    async def stop(self) -> None:
        """Check no more."""
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._checker is not None:
            self._checker = None
            await checkers.give_back()

    async def check(self, asked: Any) -> None:
        """Try out vLLM's `StructuredOutputsParams`.

        Raises InvalidRequestError, OverCapacityError.
        """
        if self._checker is not None and (grammar := _grammar_of(asked)) is not None:
            await self._checker.check(grammar, self._vocabulary)

    async def check_body(self, body: bytes) -> None:
        """Try out what vLLM reads of a body while it parses it, or when its reply has begun.

        Raises:
            InvalidRequestError: A grammar is not valid, too costly, or crashes who reads it.
            OverCapacityError: It could not be tried out now.
        """
        if self._checker is None or not any(mark in body for mark in _MARKS):
            return
        try:
            data = orjson.loads(body)
        except orjson.JSONDecodeError:
            return  # vLLM says what is wrong with it
        if not isinstance(data, dict):
            return
        for grammar in _written(data):
            await self._checker.check(grammar, self._vocabulary)


def _written(data: dict[str, Any]) -> list[Grammar]:
    """The grammars that stand in a body as they are: of any endpoint."""
    found = []
    form = data.get("response_format")
    if isinstance(form, dict) and form.get("type") == "structural_tag":
        found.append(Grammar("structural_tag", _text(form)))
    given = data.get("structured_outputs")
    if isinstance(given, dict):
        tag, schema, regex = (given.get(name) for name in ("structural_tag", "json", "regex"))
        if isinstance(tag, str):
            found.append(Grammar("structural_tag", tag))
        if isinstance(schema, (dict, str)):
            found.append(Grammar("json", _text(schema)))
        if isinstance(regex, str):
            found.append(Grammar("regex", regex))
        if isinstance(grammar := given.get("grammar"), str):
            found.append(_written_grammar(grammar))
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
    return found + [Grammar("json", _text(one)) for one in schemas if isinstance(one, dict)]


def _at(value: object, *names: str) -> object:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _text(value: dict[str, Any] | str) -> str:
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _written_grammar(text: str) -> Grammar:
    from vllm.v1.structured_output.utils import grammar_is_likely_lark

    return Grammar("lark" if grammar_is_likely_lark(text) else "ebnf", text)


def _grammar_of(asked: Any) -> Grammar | None:
    """What vLLM gives to xgrammar for these parameters; None where that is nothing of theirs."""
    from vllm.v1.structured_output.utils import choice_as_grammar

    if asked.regex:
        return Grammar("regex", asked.regex)
    if asked.choice:
        return Grammar("ebnf", choice_as_grammar(asked.choice))
    if asked.json:
        return Grammar("json", _text(asked.json))
    if asked.grammar:
        return _written_grammar(asked.grammar)
    if asked.structural_tag:
        return Grammar("structural_tag", asked.structural_tag)
    return None


def _vocabulary(tokenizer: Any, vocab_size: int) -> Vocabulary | None:
    """The tokens that a core compiles for; None where they have no form that can be passed on."""
    import xgrammar as xgr
    from vllm.utils.mistral import is_mistral_tokenizer

    if tokenizer is None or is_mistral_tokenizer(tokenizer):
        return None
    try:
        info = xgr.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size).serialize_json()
    except (ValueError, RuntimeError):
        return None  # then the core can't compile for it either, and says so
    return Vocabulary(hashlib.sha256(info.encode()).hexdigest(), info)
