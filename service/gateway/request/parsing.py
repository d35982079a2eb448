"""Parses the fields of a request's body that the gateway needs.

All other fields are for the engine, and the gateway does not change them.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import orjson

from service.broker.model_aliases import AliasChoice
from service.config.tenants import Priority
from service.errors import InvalidRequestError
from service.gateway.request.audio_length import audio_tokens
from service.gateway.request.conversation_turns import TurnState, turn_state
from service.gateway.request.hosted_tool_removal import leave_out_hosted_tools
from service.gateway.request.media_tokens import NOTHING, Media, media_of
from service.gateway.request.stored_turn import StoredTurn
from service.gateway.request.text_pairs import (
    repeated_bytes,
    with_usual_names,
    without_top_n_of_all,
)
from service.gateway.request.thinking_terms import (
    NO_TERMS,
    ThinkingTerms,
    fitting_thinking,
    thinking_terms,
)
from service.http.prompt_endpoints import TABLE, Endpoint
from service.http.token_usage import estimate_tokens
from service.rpc.call_headers import trace_of
from service.types import BATCH, NOBODY, Tenant

CacheMode = Literal["off", "exact", "similar"]
_CACHE: dict[bytes, CacheMode] = {b"off": "off", b"exact": "exact", b"similar": "similar"}
AUTO = "auto"
GENERAL = "general"
_DECIMAL = re.compile(rb"^(?=.{1,64}$)(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,3})?$")
_GIVEN_ID = re.compile(rb"^[A-Za-z0-9._:-]{1,128}$")


@dataclass(frozen=True, slots=True)
class InferenceRequest:
    """A parsed request.

    Attributes:
        endpoint: Its path.
        model: The model that the client named, or what its alias stands for.
        stream: Whether the answer is a stream.
        needs: The capabilities that an expert must have.
        data: The body, without the gateway's own fields.
        raw: The body as the client sent it; empty if it has to be serialized again.
        request_id: The gateway's id of the request.
        client_id: The request id that the client knows.
        deadline_ms: Time from its arrival to the first token of a stream, or to the end of
            another answer.
        own_deadline: Whether the client set the deadline.
        tenant: The tenant that sent it.
        trace: Its W3C trace context, as headers.
        body_bytes: The size of its body, without the gateway's own options.
        repeated_bytes: Bytes of text that a model reads once more with each further prompt.
        max_cost: Upper bound of the total cost of its calls, in units of cost.
        min_quality: Lower bound of the expected quality, in [0, 1].
        allow: The only experts that may be called; None without such a bound.
        deny: Experts that may not be called.
        cache: Which cached answers the client accepts.
        combinable: Whether answers of several experts can be compared.
        clipped: The bound of its answers in tokens, if the gateway lowered it.
        bounded: Whether the gateway bounds its answers, because the client does not.
        media: Its images, sound and video.
        media_tokens: The number of tokens that its media take.
        left_out: Types of the tools that were removed, because the service does not run them.
        turn: Where its conversation stands.
        session_id: The client's own name of the session, from the header `x-session-id`.
        alias: The alias that the client named; None if it named none.
        thinking: What it says about thinking.
        thinking_budget: Most tokens of thinking of each answer, once an expert is chosen; None
            without a bound.
        stored: What it says about stored responses; None where it has nothing to do with them.
    """

    endpoint: str
    model: str
    stream: bool
    needs: frozenset[str]
    data: dict[str, Any]
    raw: bytes
    request_id: str
    client_id: str
    deadline_ms: int
    own_deadline: bool = False
    tenant: Tenant = NOBODY
    trace: Mapping[str, str] = field(default_factory=dict)
    body_bytes: int = 0
    repeated_bytes: int = 0
    max_cost: float | None = None
    min_quality: float = 0.0
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    cache: CacheMode = "off"
    combinable: bool = False
    clipped: int | None = None
    bounded: bool = False
    media: Media = NOTHING
    media_tokens: int = 0
    left_out: tuple[str, ...] = ()
    turn: TurnState = field(default_factory=TurnState)
    session_id: str | None = None
    alias: AliasChoice | None = None
    thinking: ThinkingTerms = NO_TERMS
    thinking_budget: int | None = None
    stored: StoredTurn | None = None

    @property
    def prompt_tokens(self) -> int:
        """Estimated tokens of the prompt: one token for four bytes of text, plus the media."""
        return 1 + estimate_tokens(self._text_bytes) + self.media_tokens

    @property
    def most_prompt_tokens(self) -> int:
        """Upper bound of the prompt's tokens, without the chat template.

        A text never has more tokens than bytes.
        """
        return self._text_bytes + self.media_tokens

    @property
    def _text_bytes(self) -> int:
        return max(0, self.body_bytes - self.media.carried_bytes) + self.repeated_bytes

    @property
    def _reads(self) -> Endpoint:
        return TABLE[self.endpoint]

    @property
    def prompts(self) -> int:
        """The number of prompts, each of which may fill the context."""
        given = self.data.get(self._reads.prompt) if self._reads.several else None
        if isinstance(given, list) and given and not isinstance(given[0], int):
            return len(given)
        return 1

    @property
    def answers(self) -> int:
        """The number of answers: choices times prompts."""
        reads, choices = self._reads, 1
        for name in reads.choices:
            if isinstance(count := self.data.get(name), int) and count > choices:
                choices = count
        return choices * self.prompts if reads.several else choices

    @property
    def sequences(self) -> int:
        """Sequences that the request takes in an engine.

        They are its answers, or its prompts if it generates none.
        """
        return self.answers if self._reads.generates else self.prompts

    @property
    def bounds_choice(self) -> bool:
        """Whether it bounds which experts may answer, how well, how soon, or at what cost."""
        return (
            self.own_deadline
            or self.max_cost is not None
            or self.min_quality > 0
            or self.allow is not None
            or bool(self.deny)
        )

    @property
    def given_tokens(self) -> int | None:
        """The limit of each answer's length that the client set, in tokens."""
        for name in self._reads.lengths:
            given: int | None = self.data.get(name)
            if given is not None:
                return given if given > 0 else None
        return None

    @property
    def most_tokens(self) -> int | None:
        """The limit of each answer's length in tokens, set by the client or the engine.

        It is None if only the context limits the length.
        """
        return self.given_tokens or self._reads.usual_length

    def at_most(self, tokens: int) -> InferenceRequest:
        """Limit each answer to this many tokens, on endpoints that have such a limit."""
        names = self._reads.lengths
        given = {name: self.data[name] for name in names if self.data.get(name) is not None}
        bounds: dict[str, Any] = {name: min(tokens, limit) for name, limit in given.items()}
        bounds = bounds or {names[-1]: tokens}
        if isinstance(least := self.data.get("min_tokens"), int) and least > tokens:
            bounds["min_tokens"] = tokens
        bounds |= fitting_thinking(self.data, tokens)
        return replace(
            self,
            data={**self.data, **bounds},
            raw=b"",
            clipped=tokens,
            bounded=self.bounded or not given,
        )

    def for_member(self, number: int, *, logprobs: bool) -> InferenceRequest:
        """Return the request for one member of a recipe, without streaming.

        Args:
            number: The member's position in the recipe, for the request's id.
            logprobs: Whether the member has to send log probabilities.
        """
        data = {k: v for k, v in self.data.items() if k not in ("stream", "stream_options")}
        if logprobs:
            data["logprobs"] = True
        return replace(
            self,
            stream=False,
            data=data,
            raw=b"",
            request_id=f"{self.request_id}-{number}",
            combinable=False,
        )

    def body_for(self, expert: str) -> bytes:
        """Return the body for an expert. It is unchanged if the client named this expert."""
        if self.data.get("model") == expert and self.raw:
            return self.raw
        try:
            return orjson.dumps({**self.data, "model": expert})
        except orjson.JSONEncodeError:
            # orjson parses up to 1024 levels, but serializes only 254.
            raise InvalidRequestError("the body is nested too deep") from None


def parse_request(
    endpoint: str,
    raw: bytes,
    headers: dict[bytes, bytes],
    default_deadline_ms: int,
    tenant: Tenant = NOBODY,
    max_messages: int | None = None,
) -> InferenceRequest:
    """Parse a request.

    Args:
        endpoint: Its path.
        raw: Its body.
        headers: Its headers.
        default_deadline_ms: Its deadline if it sets none.
        tenant: Whose it is.
        max_messages: Most messages and parts of messages; None: no bound. They are counted before
            anything looks into them.

    Raises:
        InvalidRequestError: A field is not valid. The error names the field.
    """
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError(f"the body must be a JSON object, not {_kind(data)}")
    # Clients send null for unset fields, but engines refuse null in many fields.
    unset = [name for name, value in data.items() if value is None]
    for name in unset:
        del data[name]
    model = data.get("model", AUTO)
    if not isinstance(model, str) or not model:
        what = "an empty one" if model == "" else _kind(model)
        raise InvalidRequestError(f"`model` must be a non-empty string, not {what}", param="model")
    stream = data.get("stream", False)
    if not isinstance(stream, bool):
        raise InvalidRequestError(
            f"`stream` must be true or false, not {_kind(stream)}", param="stream"
        )
    options = data.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise InvalidRequestError(
            f"`stream_options` must be an object, not {_kind(options)}", param="stream_options"
        )
    changed = with_usual_names(endpoint, data)
    _check_prompt(endpoint, data)
    changed |= without_top_n_of_all(endpoint, data)
    if max_messages is not None:
        _check_messages(endpoint, data, max_messages)
    _check_integers(data)
    thinking = thinking_terms(endpoint, data)
    left_out = leave_out_hosted_tools(endpoint, data)
    media = media_of(data)
    recording = data["file"] if TABLE[endpoint].listens else ""
    if recording:
        media = replace(media, carried_bytes=len(recording))
    own = data.pop("coe", None)
    coe_options = _parse_coe_options(own, headers)
    request_id = secrets.token_hex(12)
    turn = turn_state(data) if TABLE[endpoint].converses else TurnState()
    given = headers.get(b"x-request-id", b"")
    return InferenceRequest(
        endpoint=endpoint,
        model=model,
        stream=stream,
        needs=_needs(endpoint, data) | media.needs,
        data=data,
        # Engines would refuse `coe`, nulls and hosted tools, so the body is serialized again.
        raw=b"" if coe_options.own_key or unset or left_out or changed else raw,
        request_id=request_id,
        client_id=given.decode() if _GIVEN_ID.match(given) else request_id,
        tenant=_lowered(tenant, headers),
        trace=trace_of(headers),
        deadline_ms=coe_options.deadline_ms or default_deadline_ms,
        own_deadline=coe_options.deadline_ms is not None,
        # The gateway's own options are no prompt: another bound must not change what it costs.
        body_bytes=len(raw) if own is None else max(0, len(raw) - len(orjson.dumps(own))),
        repeated_bytes=repeated_bytes(endpoint, data),
        max_cost=coe_options.max_cost,
        min_quality=coe_options.min_quality,
        allow=coe_options.allow,
        deny=coe_options.deny or frozenset(),
        cache=_cache(headers),
        # The result of a tool goes back to one expert.
        combinable=_combinable(endpoint, data) and not turn.open,
        left_out=left_out,
        turn=turn,
        session_id=_session_id(headers),
        media=media,
        media_tokens=audio_tokens(recording) if recording else 0,
        thinking=thinking,
    )


def _session_id(headers: dict[bytes, bytes]) -> str | None:
    """The client's name of the session. HAProxy renames the header, which Serve would obey."""
    given = headers.get(b"x-coe-session-id") or headers.get(b"x-session-id", b"")
    return given.decode("latin-1") or None


def _check_prompt(endpoint: str, data: dict[str, Any]) -> None:
    name, kinds = TABLE[endpoint].prompt, TABLE[endpoint].prompt_types
    if not name:
        return
    if data.get(name) is None:
        raise InvalidRequestError(f"`{name}` is required", param=name)
    prompt = data[name]
    if not isinstance(prompt, kinds):
        allowed = " or ".join("a string" if kind is str else "a list" for kind in kinds)
        raise InvalidRequestError(f"`{name}` must be {allowed}, not {_kind(prompt)}", param=name)
    if TABLE[endpoint].several and prompt == []:
        raise InvalidRequestError(f"`{name}` must not be empty", param=name)
    if name == "messages" and isinstance(prompt, list):
        if not prompt:
            raise InvalidRequestError("`messages` must hold at least one message", param=name)
        for i, message in enumerate(prompt):
            if not isinstance(message, dict):
                raise InvalidRequestError(
                    f"`messages[{i}]` must be an object, not {_kind(message)}",
                    param=f"messages[{i}]",
                )


def _check_messages(endpoint: str, data: dict[str, Any], most: int) -> None:
    name = TABLE[endpoint].prompt or "messages"  # /tokenize takes a text or messages
    given = None if TABLE[endpoint].several else data.get(name)
    if not isinstance(given, list):
        return
    parts = (item.get("content") for item in given if isinstance(item, dict))
    count = len(given) + sum(len(part) for part in parts if isinstance(part, list))
    if count > most:
        raise InvalidRequestError(
            f"`{name}` holds {count} messages and parts of messages; at most {most} are allowed",
            param=name,
        )


def _check_integers(data: dict[str, Any]) -> None:
    """Check that counts and lengths are integers, on every endpoint.

    Engines also accept "16" and 16.0, but gateway and engine must agree on the numbers.

    Raises:
        InvalidRequestError: A value is no integer.
    """
    for name, value in data.items():
        counts = name in ("n", "best_of") or name.startswith("max_")
        if counts and (isinstance(value, bool) or not isinstance(value, int)):
            raise InvalidRequestError(
                f"`{name}` must be an integer, not {_kind(value)}", param=name
            )


def _needs(endpoint: str, data: dict[str, Any]) -> frozenset[str]:
    needs: set[str] = set()
    if own := TABLE[endpoint].needs:
        needs.add(own)
    if data.get("tools") and data.get("tool_choice") != "none":
        needs.add("tools")
    form = data.get("response_format")
    if isinstance(form, dict) and form.get("type") in ("json_object", "json_schema"):
        needs.add("json")
    return frozenset(needs)


def _combinable(endpoint: str, data: dict[str, Any]) -> bool:
    """Whether answers of several experts to a request can be compared.

    Each answer must be a single text without tool calls and log probabilities.
    """
    return (
        endpoint == "/v1/chat/completions"
        and data.get("n") in (None, 1)
        and not data.get("tools")
        and not data.get("functions")
        and not data.get("logprobs")
    )


@dataclass(frozen=True, slots=True)
class _CoeOptions:
    own_key: bool = False
    deadline_ms: int | None = None
    max_cost: float | None = None
    min_quality: float = 0.0
    allow: frozenset[str] | None = None
    deny: frozenset[str] | None = None


_COE_OPTIONS = ("deadline_ms", "max_cost", "min_quality", "allow", "deny")
_MAX_NAMES = 1000
_MAX_DEADLINE_MS = 86_400_000
# From the first to the last in pools' queues.
_PRIORITIES = get_args(Priority)


def _parse_coe_options(given: object, headers: dict[bytes, bytes]) -> _CoeOptions:
    """Parse the options for the gateway itself, from the body's `coe` or from headers.

    Raises:
        InvalidRequestError: An option is unknown or not valid.
    """
    if given is not None and not isinstance(given, dict):
        raise InvalidRequestError(f"`coe` must be an object, not {_kind(given)}", param="coe")
    coe_options: dict[str, Any] = dict(given or {})
    unknown = coe_options.keys() - {*_COE_OPTIONS}
    if unknown:
        raise InvalidRequestError(
            f"`coe` has no {min(unknown)[:64]!r}; it takes {', '.join(_COE_OPTIONS)}", param="coe"
        )
    deadline_ms = coe_options.get("deadline_ms")
    header = headers.get(b"x-coe-deadline-ms")
    where = "`coe.deadline_ms`"
    if header is not None:
        where = "the header x-coe-deadline-ms"
        deadline_ms = int(header) if len(header) <= 8 and header.isdigit() else -1
    if deadline_ms is not None and (
        isinstance(deadline_ms, bool)
        or not isinstance(deadline_ms, int)
        or not 1 <= deadline_ms <= _MAX_DEADLINE_MS
    ):
        raise InvalidRequestError(
            f"{where} must be an integer from 1 to {_MAX_DEADLINE_MS}",
            param=where.split()[-1].strip("`"),
        )
    return _CoeOptions(
        given is not None,
        deadline_ms,
        _number("max_cost", coe_options, headers),
        _number("min_quality", coe_options, headers, most=1) or 0.0,
        _names("allow", coe_options, headers),
        _names("deny", coe_options, headers),
    )


def _lowered(tenant: Tenant, headers: dict[bytes, bytes]) -> Tenant:
    """The tenant with the class of the header `x-coe-priority`, which can only be a lower one.

    Lines of batches have a class below all of them.

    Raises:
        InvalidRequestError: The header has an unknown value.
    """
    if tenant.priority == BATCH:
        return tenant
    given = headers.get(b"x-coe-priority", tenant.priority.encode()).decode("latin-1")
    if given not in _PRIORITIES:
        raise InvalidRequestError(
            f"the header x-coe-priority takes {', '.join(_PRIORITIES)}", param="x-coe-priority"
        )
    lowest = max(given, tenant.priority, key=_PRIORITIES.index)
    return tenant if lowest == tenant.priority else replace(tenant, priority=lowest)


def _cache(headers: dict[bytes, bytes]) -> CacheMode:
    """Parse the header `x-coe-cache`: which cached answers the client accepts.

    Raises:
        InvalidRequestError: The header has an unknown value.
    """
    given = headers.get(b"x-coe-cache", b"off")
    found = _CACHE.get(given)
    if found is None:
        raise InvalidRequestError(
            "the header x-coe-cache takes exact, similar or off", param="x-coe-cache"
        )
    return found


def _place(name: str, headers: dict[bytes, bytes]) -> tuple[bytes | None, str, str]:
    """Return an option's header, its name for errors, and the parameter that errors name."""
    header = f"x-coe-{name.replace('_', '-')}"
    given = headers.get(header.encode())
    if given is None:
        return None, f"`coe.{name}`", f"coe.{name}"
    return given, f"the header {header}", header


def _number(
    name: str, coe_options: dict[str, Any], headers: dict[bytes, bytes], *, most: float = 1e15
) -> float | None:
    """Parse a number of at least 0; a header comes before the body."""
    header, where, param = _place(name, headers)
    given = coe_options.get(name)
    if header is not None:
        # A longer one must not be cut, which could take its exponent away.
        given = float(header) if _DECIMAL.match(header) else -1
    if given is None:
        return None
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not number or not 0 <= given <= most:
        allowed = "of at least 0" if most > 1 else "from 0 to 1"
        raise InvalidRequestError(f"{where} must be a number {allowed}", param=param)
    return float(given)


def _names(
    name: str, coe_options: dict[str, Any], headers: dict[bytes, bytes]
) -> frozenset[str] | None:
    """Parse a list of experts; a header, with commas between them, comes before the body."""
    header, where, param = _place(name, headers)
    given = coe_options.get(name)
    if header is not None:
        given = [part.strip() for part in header.decode("latin-1").split(",") if part.strip()]
    if given is None:
        return None
    if (
        not isinstance(given, list)
        or not 1 <= len(given) <= _MAX_NAMES
        or not all(isinstance(name, str) and name for name in given)
    ):
        raise InvalidRequestError(
            f"{where} must be a list of 1 to {_MAX_NAMES} names of experts", param=param
        )
    return frozenset(given)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")
