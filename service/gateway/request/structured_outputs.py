"""Limits the schemas, patterns and grammars in a request, in every field that can hold them.

An engine compiles them to automata in native code. Their author thus controls how much stack and
time the engine needs. This module checks size, nesting and number of properties before an engine
gets the request. The engine tests the rest by compiling them in a separate process
(`engine.grammar_check`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from service.config.request_limits import RequestLimits
from service.errors import InvalidRequestError

# Fields that are constraints (`_WHOLE`), or that hold one in their `format` (`_IN_FORMAT`).
_WHOLE = (
    "response_format",
    "structured_outputs",
    "output_format",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_whitespace_pattern",
)
_IN_FORMAT = ("text", "output_config")
_LISTED = ("tools", "functions")
# Keys whose string is a pattern, a grammar, or JSON.
_PATTERNS = frozenset({"pattern", "regex", "whitespace_pattern"})
_PATTERNS |= {"guided_regex", "guided_whitespace_pattern"}
_GRAMMARS = frozenset({"grammar", "guided_grammar", "definition", "ebnf", "lark"})
_JSON = frozenset({"json", "guided_json", "schema", "json_schema", "structural_tag"})
_PROPERTIES = frozenset(
    {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}
)
# All constraints of a request together may have this many times the bytes of one constraint.
_ALL_TOGETHER = 8
# Text of patterns and grammars whose brackets open no group: escapes, character classes, and
# literals.
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_CLASS = re.compile(r"\[[^\]]*(?:\]|\Z)")
# One expression finds all of these, because the first to begin hides the others. For example, a
# quote in a character class begins no literal.
_LITERAL = re.compile(
    r"""\\.|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|\#[^\n]*|//[^\n]*"""
    r"""|/(?P<pattern>(?:\\.|[^/\\\n])+)/|\[(?:\\.|[^\]\\])*(?:\]|\Z)""",
    re.DOTALL,
)
# Bounds of lists that an engine processes item by item when it accepts a request.
_MOST_LETTERS = 65_536
_ITEMS = {
    "stop": 64,
    "stop_sequences": 64,
    "stop_token_ids": 256,
    "bad_words": 256,
    "allowed_token_ids": 65_536,
    "logit_bias": 1024,
    "logprob_token_ids": 1024,
}


class StructuredOutputBounds:
    """Checks constraints against a config's `server.limits`."""

    def __init__(self, limits: RequestLimits) -> None:
        self._limits = limits

    def check(self, data: Mapping[str, Any]) -> None:
        """Check every field of a body that can constrain an answer.

        Raises:
            InvalidRequestError: A field exceeds a limit. The error states the field and the limit.
        """
        most = self._limits
        total = 0
        for param, where, value in _constraints(data, most.max_tools):
            size = _size(value, param)
            if size > most.max_schema_bytes:
                raise InvalidRequestError(
                    f"`{where}` has {size} bytes; at most {most.max_schema_bytes} are allowed",
                    param=param,
                )
            total += size
            if total > _ALL_TOGETHER * most.max_schema_bytes:
                raise InvalidRequestError(
                    f"the schemas of the request have more than {total - 1} bytes together; "
                    f"at most {_ALL_TOGETHER * most.max_schema_bytes} are allowed",
                    param=param,
                )
            _Walk(most, param, where).value(value, where.rpartition(".")[2], 1)
        for name in _ITEMS.keys() & data.keys():
            items = data[name]
            if isinstance(items, (list, dict)) and len(items) > _ITEMS[name]:
                raise InvalidRequestError(
                    f"`{name}` has {len(items)} items; at most {_ITEMS[name]} are allowed",
                    param=name,
                )
            if isinstance(items, list):
                size = sum(len(item) for item in items if isinstance(item, str))
                if size > _MOST_LETTERS:
                    raise InvalidRequestError(
                        f"`{name}` has {size} characters; at most {_MOST_LETTERS} are allowed",
                        param=name,
                    )


def _constraints(
    data: Mapping[str, Any], max_tools: int
) -> Iterator[tuple[str, str, dict[str, Any] | list[Any] | str]]:
    """Yield the field, the path and the value of everything that may hold a constraint.

    Raises:
        InvalidRequestError: There are too many tools.
    """
    for name in _WHOLE:
        if isinstance(value := data.get(name), (dict, list, str)):
            yield name, name, value
    for name in _IN_FORMAT:
        outer = data.get(name)
        value = outer.get("format") if isinstance(outer, dict) else None
        if isinstance(value, (dict, list, str)):
            yield name, f"{name}.format", value
    for name in _LISTED:
        tools = data.get(name)
        if not isinstance(tools, list):
            continue
        if len(tools) > max_tools:
            raise InvalidRequestError(
                f"`{name}` has {len(tools)} items; at most {max_tools} are allowed",
                param=name,
            )
        for i, tool in enumerate(tools):
            if isinstance(tool, (dict, list)):
                yield name, f"{name}[{i}]", tool


def _size(value: dict[str, Any] | list[Any] | str, param: str) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))
    try:
        return len(orjson.dumps(value))
    except orjson.JSONEncodeError:
        raise InvalidRequestError(f"`{param}` is nested too deep", param=param) from None


class _Walk:
    """Walks through one constraint, and counts its properties."""

    def __init__(self, limits: RequestLimits, param: str, where: str) -> None:
        self._most = limits
        self._param = param
        self._where = where
        self._properties = 0

    def value(self, value: object, key: str, depth: int) -> None:
        """Check the value of a key.

        Raises:
            InvalidRequestError: The value exceeds a limit.
        """
        if isinstance(value, str):
            self._string(value, key, depth)
            return
        if not isinstance(value, (dict, list)):
            return
        if depth > self._most.max_json_depth:
            raise self._error(
                f"is nested more than {self._most.max_json_depth} levels deep, which is the most "
                "that is allowed"
            )
        if isinstance(value, list):
            for item in value:
                self.value(item, key, depth + 1)
            return
        if key in _PROPERTIES:
            self._properties += len(value)
            if self._properties > self._most.max_schema_properties:
                raise self._error(
                    f"has {self._properties} properties or more; "
                    f"at most {self._most.max_schema_properties} are allowed"
                )
        for name, inner in value.items():
            if key == "patternProperties":
                self._pattern(name)
            self.value(inner, name, depth + 1)

    def _string(self, text: str, key: str, depth: int) -> None:
        if key in _PATTERNS:
            self._pattern(text)
        elif key in _GRAMMARS:
            self._bounded(text, "grammar", self._most.max_grammar_bytes)
            self._nesting(_LITERAL.sub("", text), "grammar")
            for literal in _LITERAL.finditer(text):
                if (pattern := literal["pattern"]) is not None:
                    self._pattern(pattern)
        elif key in _JSON and text.lstrip()[:1] in ("{", "["):
            try:
                parsed = orjson.loads(text)
            except (orjson.JSONDecodeError, UnicodeEncodeError):
                raise self._error(f"has a `{key}` that is not valid JSON") from None
            self.value(parsed, key, depth)

    def _pattern(self, text: str) -> None:
        self._bounded(text, "pattern", self._most.max_pattern_bytes)
        self._nesting(_CLASS.sub("", _ESCAPED.sub("", text)), "pattern")

    def _bounded(self, text: str, what: str, most: int) -> None:
        size = len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
        if size > most:
            raise self._error(f"has a {what} of {size} bytes; at most {most} are allowed")

    def _nesting(self, text: str, what: str) -> None:
        most = self._most.max_pattern_depth
        if text.count("(") + text.count("[") + text.count("{") <= most:
            return
        depth = 0
        for letter in text:
            if letter in "([{":
                depth += 1
                if depth > most:
                    raise self._error(
                        f"has a {what} whose groups are nested more than {most} levels deep, which "
                        "is the most that is allowed"
                    )
            elif letter in ")]}":
                # A bracket that was never opened closes nothing.
                depth = max(0, depth - 1)

    def _error(self, what: str) -> InvalidRequestError:
        return InvalidRequestError(f"`{self._where}` {what}", param=self._param)
