"""Turns requests of Ollama's API into requests of OpenAI's. Pure.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from service.errors import InvalidRequestError
from service.http.prompt_endpoints import OLLAMA_ENDPOINTS

CHAT, GENERATE, EMBED, EMBEDDINGS = OLLAMA_ENDPOINTS

# Ours are passed on to the other endpoint.
_OURS = ("coe", "cache_salt")
_COMMON = ("model", "stream", "options", "format", "keep_alive", "think", "logprobs")
_FIELDS = {
    CHAT: (*_COMMON, "top_logprobs", "messages", "tools"),
    GENERATE: (
        *(*_COMMON, "top_logprobs", "prompt", "system", "images", "raw"),
        *("suffix", "template", "context"),
    ),
    EMBED: ("model", "input", "truncate", "dimensions", "options", "keep_alive"),
    EMBEDDINGS: ("model", "prompt", "options", "keep_alive"),
}
# Options of a request, and the fields that mean the same.
_SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
# Options about how a model is loaded. The operator's config says that, so they change nothing.
LOADING = frozenset(
    {"num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "num_keep", "numa", "low_vram"}
    | {"f16_kv", "vocab_only", "use_mmap", "use_mlock", "embedding_only", "logits_all"}
    | {"penalize_newline"}
)
# Ways of sampling that no engine here has, and the values that turn them off.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "mirostat": (0,),
    "mirostat_tau": (),
    "mirostat_eta": (),
    "tfs_z": (1,),
    "typical_p": (1,),
    "repeat_last_n": (-1,),
}
# Their values mean nothing while `mirostat` is off.
_MIROSTAT = ("mirostat_tau", "mirostat_eta")
_EFFORTS = ("low", "medium", "high", "max")
# The beginnings of images in base64.
_IMAGES = {"iVBOR": "png", "/9j/": "jpeg", "R0lGOD": "gif", "UklGR": "webp"}
_TAG = ":latest"
_DURATION = re.compile(r"(-?)((?:\d+(?:\.\d*)?|\.\d+)(?:ns|us|µs|ms|s|m|h))+")
_PART = re.compile(r"(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class TranslatedRequest:
    """A request of Ollama's API as one of OpenAI's.

    Attributes:
        path: The endpoint of OpenAI's API.
        body: Its body.
        model: The model as the client named it.
        stream: Whether the client gets a stream.
        keep_alive_s: How long the model may stay in memory, in seconds; negative for ever; None
            where the client does not say.
        asks: Whether it has a prompt. Without one a client wants the model loaded, or unloaded.
    """

    path: str
    body: dict[str, Any]
    model: str
    stream: bool
    keep_alive_s: float | None
    asks: bool = True

    @property
    def unloads(self) -> bool:
        """Whether the model's memory is to be given back after the answer."""
        return self.keep_alive_s == 0


def translated(path: str, raw: bytes, known: frozenset[str]) -> TranslatedRequest:
    """Translate a request.

    Args:
        path: Its path, one of `OLLAMA_ENDPOINTS`.
        raw: Its body.
        known: The names of models. Others may have the tag `:latest`, which clients add.

    Raises:
        InvalidRequestError: A field is not valid, or asks for what there is not here.
    """
    data = _object(path, raw)
    model = model_name(data, known)
    keep_alive_s = duration_s(data.get("keep_alive"))
    body: dict[str, Any] = {"model": model}
    body |= {name: data[name] for name in _OURS if name in data}
    if path in (EMBED, EMBEDDINGS):
        body |= _embedding(path, data)
        return TranslatedRequest("/v1/embeddings", body, model, False, keep_alive_s)
    stream = _boolean(data, "stream", True)
    target = "/v1/chat/completions"
    if path == CHAT:
        messages = _messages(data.get("messages", []))
        body["messages"] = messages
        asks = bool(messages)
        if data.get("tools"):
            body["tools"] = data["tools"]
    else:
        asks = bool(data.get("prompt"))
        if _boolean(data, "raw", False):
            target = "/v1/completions"
        body |= _prompt(data, plain=target == "/v1/completions")
    body |= _sampling(data.get("options"))
    body |= _format(data.get("format"))
    body |= _thinking(data.get("think"))
    if target == "/v1/completions" and _boolean(data, "logprobs", False):
        raise InvalidRequestError("`logprobs` goes without `raw`", param="logprobs")
    for name in ("logprobs", "top_logprobs"):
        if name in data:
            body[name] = data[name]
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return TranslatedRequest(target, body, model, stream, keep_alive_s, asks)


def model_name(data: Mapping[str, Any], known: frozenset[str]) -> str:
    """The model that a body names, without the tag `:latest` that clients add.

    Raises:
        InvalidRequestError: It names none.
    """
    given = data.get("model", data.get("name"))
    if not isinstance(given, str) or not given:
        raise InvalidRequestError("`model` must be a non-empty string", param="model")
    return given if given in known else given.removesuffix(_TAG)


def duration_s(given: object) -> float | None:
    """The seconds of a `keep_alive`: a number, or a text such as `5m` or `1h30m`.

    Raises:
        InvalidRequestError: It is neither.
    """
    if given is None:
        return None
    if isinstance(given, int | float) and not isinstance(given, bool):
        return float(given)
    if isinstance(given, str):
        if re.fullmatch(r"-?\d{1,9}", given):
            return float(given)
        if len(given) <= 64 and (match := _DURATION.fullmatch(given)) is not None:
            total = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(given))
            return -total if match[1] else total
    raise InvalidRequestError(
        "`keep_alive` must be a number of seconds, or a duration such as 5m", param="keep_alive"
    )


def _object(path: str, raw: bytes) -> dict[str, Any]:
    data = json_object(raw)
    fields = _FIELDS[path]
    unknown = sorted(data.keys() - {*fields, *_OURS, "name"})
    if unknown:
        raise InvalidRequestError(
            f"there is no field `{unknown[0][:64]}` here; fields: {', '.join(fields)}",
            param=unknown[0][:64],
        )
    return data


def json_object(raw: bytes) -> dict[str, Any]:
    """A body that is a JSON object, without nulls at its top level.

    Raises:
        InvalidRequestError: It is something else.
    """
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise InvalidRequestError("the body must be a JSON object")
    return {name: value for name, value in data.items() if value is not None}


def _boolean(data: Mapping[str, Any], name: str, usual: bool) -> bool:
    value = data.get(name, usual)
    if not isinstance(value, bool):
        raise InvalidRequestError(f"`{name}` must be true or false", param=name)
    return value


def _embedding(path: str, data: Mapping[str, Any]) -> dict[str, Any]:
    name = "input" if path == EMBED else "prompt"
    if not data.get(name):
        raise InvalidRequestError(f"`{name}` is required", param=name)
    _sampling(data.get("options"))  # a vector is not sampled; unknown options are refused
    body = {"input": data[name]}
    if _boolean(data, "truncate", False):
        body["truncate_prompt_tokens"] = -1  # vLLM's word for the length of the context
    if "dimensions" in data:
        body["dimensions"] = data["dimensions"]
    return body


def _prompt(data: Mapping[str, Any], *, plain: bool) -> dict[str, Any]:
    prompt, system = data.get("prompt", ""), data.get("system", "")
    for name, value in (("prompt", prompt), ("system", system)):
        if not isinstance(value, str):
            raise InvalidRequestError(f"`{name}` must be a string", param=name)
    for name, why in (
        ("template", "the expert's own chat template is used; `raw` uses none"),
        ("context", "no tokens of earlier answers are kept; use /api/chat"),
        ("suffix", "no engine here fills in between two texts; write the model's own marks, `raw`"),
    ):
        if data.get(name):
            raise InvalidRequestError(f"`{name}` is not supported: {why}", param=name)
    if plain:
        if system or data.get("images"):
            raise InvalidRequestError("`raw` takes a prompt alone", param="raw")
        return {"prompt": prompt}
    message = {"role": "user", "content": prompt, "images": data.get("images", [])}
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": _messages([*messages, message])}


def _messages(given: object) -> list[dict[str, Any]]:
    """Messages of OpenAI's chat. Ollama's calls of tools have no ids, so they get some."""
    if not isinstance(given, list):
        raise InvalidRequestError("`messages` must be a list", param="messages")
    messages: list[dict[str, Any]] = []
    # Calls without a result yet: the id and the tool's name.
    waiting: list[tuple[str, str]] = []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InvalidRequestError(f"`{where}` must be an object with a role", param=where)
        content = message.get("content") or ""
        made: dict[str, Any] = {"role": message["role"], "content": content}
        if message.get("images"):
            made["content"] = [{"type": "text", "text": content}] if content else []
            made["content"] += _images(message["images"], where)
        if isinstance(message.get("thinking"), str) and message["thinking"]:
            made["reasoning"] = message["thinking"]
        if message.get("tool_calls"):
            made["tool_calls"] = calls = _calls(message["tool_calls"], i, where)
            waiting += [(call["id"], call["function"]["name"]) for call in calls]
        if message["role"] == "tool":
            made["tool_call_id"] = _call_id(message, waiting, where)
        messages.append(made)
    return messages


def _images(given: object, where: str) -> list[dict[str, Any]]:
    parts = []
    for image in given if isinstance(given, list) else [given]:
        kind = None
        if isinstance(image, str):
            kind = next((name for start, name in _IMAGES.items() if image.startswith(start)), None)
        if kind is None:
            raise InvalidRequestError(
                f"`{where}.images` takes PNG, JPEG, GIF and WebP in base64", param="images"
            )
        url = f"data:image/{kind};base64,{image}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def _calls(given: object, number: int, where: str) -> list[dict[str, Any]]:
    calls = []
    for j, call in enumerate(given if isinstance(given, list) else [given]):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(
                f"`{where}.tool_calls[{j}]` must have a function with a name", param=where
            )
        arguments = function.get("arguments", {})
        if not isinstance(arguments, str):
            arguments = orjson.dumps(arguments).decode()
        own = call.get("id")
        calls.append(
            {
                "id": own if isinstance(own, str) and own else f"call_{number}_{j}",
                "type": "function",
                "function": {"name": function["name"], "arguments": arguments},
            }
        )
    return calls


def _call_id(message: Mapping[str, Any], waiting: list[tuple[str, str]], where: str) -> str:
    """The id of the call whose result a message has: the first one of that tool without any."""
    own = message.get("tool_call_id")
    tool = message.get("tool_name", message.get("name"))
    for at, (call, name) in enumerate(waiting):
        if call == own or (own is None and tool in (None, name)):
            del waiting[at]
            return call
    if isinstance(own, str) and own:
        return own
    raise InvalidRequestError(
        f"`{where}` is the result of a call that no message has made", param=where
    )


def _sampling(given: object) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidRequestError("`options` must be an object", param="options")
    body: dict[str, Any] = {}
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if name in LOADING:
            continue
        where = f"options.{name[:64]}"
        if name == "num_predict":
            if isinstance(value, bool) or not isinstance(value, int) or value == 0:
                raise InvalidRequestError(
                    f"`{where}` must be an integer from 1 on, or negative for no bound", param=where
                )
            if value > 0:
                body["max_tokens"] = value
        elif name in _SAMPLING:
            body[_SAMPLING[name]] = value
        elif name in _NEUTRAL:
            off = name in _MIROSTAT and options.get("mirostat", 0) == 0
            if not off and value not in _NEUTRAL[name]:
                raise InvalidRequestError(f"no engine here has `{where}`", param=where)
        else:
            known = ("num_predict", *_SAMPLING, *sorted(LOADING))
            raise InvalidRequestError(
                f"there is no `{where}`; options: {', '.join(known)}", param=where
            )
    return body


def _format(given: object) -> dict[str, Any]:
    if given is None or given == "":
        return {}
    if given == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(given, dict):
        schema = {"name": "answer", "schema": given, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}
    raise InvalidRequestError("`format` must be json or a JSON schema", param="format")


def _thinking(given: object) -> dict[str, Any]:
    if given is None or given == "":
        return {}
    if isinstance(given, bool):
        return {"enable_thinking": given}
    if given in _EFFORTS:
        return {"reasoning_effort": given}
    raise InvalidRequestError(
        f"`think` must be true, false or one of {', '.join(_EFFORTS)}", param="think"
    )
