"""The OpenAPI description of the gateway.

The schemas of request bodies contain the fields that the gateway itself checks. All other fields
are for the engine.
"""

from __future__ import annotations

from typing import Any

from service import __version__
from service.batches.batch_records import ENDPOINTS as BATCH_ENDPOINTS
from service.batches.batch_types import WINDOW
from service.config import Config
from service.http.prompt_endpoints import AUDIO
from service.stored_responses.conversation_service import MAX_NEW_ITEMS

_TEXTS = {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_MESSAGES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "required": ["role"],
        "properties": {
            "role": {"type": "string"},
            "content": {
                "oneOf": [
                    {"type": "string"},
                    {"type": "array", "items": {"type": "object"}},
                    {"type": "null"},
                ]
            },
        },
    },
}
_POSTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "/v1/chat/completions": ("Chat completion", {"messages": _MESSAGES}, ["messages"]),
    "/v1/completions": ("Completion", {"prompt": _TEXTS}, ["prompt"]),
    "/v1/embeddings": ("Embeddings", {"input": _TEXTS}, ["input"]),
    "/v1/rerank": (
        "Documents in the order of their relevance to a query",
        {
            "query": {"type": "string"},
            "documents": {"type": "array", "minItems": 1, "items": {"type": "string"}},
            "top_n": {"type": ["integer", "null"], "minimum": 0},
        },
        ["query", "documents"],
    ),
    "/v1/score": (
        "Scores of pairs of texts",
        {"text_1": _TEXTS, "text_2": _TEXTS},
        ["text_1", "text_2"],
    ),
    "/v1/classify": ("Classes of texts", {"input": _TEXTS}, ["input"]),
    "/v1/responses": ("Response", {"input": {}}, ["input"]),
    "/v1/responses/input_tokens": ("Count a response's input tokens", {"input": {}}, ["input"]),
    "/v1/messages": (
        "Anthropic message",
        {"messages": _MESSAGES, "max_tokens": {"type": "integer", "minimum": 1}},
        ["messages", "max_tokens"],
    ),
    "/v1/messages/count_tokens": (
        "Count an Anthropic message's tokens",
        {"messages": _MESSAGES},
        ["messages"],
    ),
    "/v1/route": (
        "Dry run: which expert would answer, and every candidate's utility",
        {"messages": _MESSAGES},
        ["messages"],
    ),
    "/tokenize": ("Tokens of a prompt", {"prompt": {"type": "string"}}, []),
    "/detokenize": (
        "Text of tokens",
        {"tokens": {"type": "array", "items": {"type": "integer", "minimum": 0}}},
        ["tokens"],
    ),
}
_OLLAMA_POSTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "/api/chat": ("Ollama: chat", {"messages": _MESSAGES}, []),
    "/api/generate": ("Ollama: an answer to one prompt", {"prompt": {"type": "string"}}, []),
    "/api/embed": ("Ollama: embeddings", {"input": _TEXTS}, ["input"]),
    "/api/embeddings": ("Ollama: one embedding", {"prompt": {"type": "string"}}, ["prompt"]),
    "/api/show": ("Ollama: one model", {}, []),
}
_GETS = {
    "/api/tags": "Ollama: the models that the key may use",
    "/api/ps": "Ollama: those whose weights are on a device",
    "/api/version": "Ollama: the version of its API",
    "/v1/models": "The experts, and where their weights are",
    "/v1/models/{name}": "One expert",
    "/v1/usage": "The key's limits, what is left of them, and its use by day",
    "/health": "Alive",
    "/ready": "200 once at least one expert answers",
    "/metrics": "Prometheus metrics of this gateway and its pools",
    "/metrics/model-server": "The sums by which an endpoint picker of Kubernetes chooses",
    "/openapi.json": "This description",
}
_VOTE = {
    "type": "object",
    "required": ["id", "score"],
    "additionalProperties": False,
    "properties": {
        "id": {"type": "string", "minLength": 1, "maxLength": 200},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
    },
}
_EXPIRES_AFTER = {
    "type": ["object", "null"],
    "required": ["anchor", "seconds"],
    "properties": {
        "anchor": {"const": "created_at"},
        "seconds": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
_TERMS = {
    "type": ["object", "null"],
    "description": "What the batch as a whole may cost and take.",
    "additionalProperties": False,
    "properties": {
        "max_cost": {"type": ["number", "null"], "exclusiveMinimum": 0},
        "deadline": {"type": ["string", "number"], "examples": ["90m", "24h", "2d"]},
        "quality": {"oneOf": [{"const": "best"}, {"type": "number"}]},
    },
}
_NEW_BATCH = {
    "type": "object",
    "required": ["input_file_id", "endpoint", "completion_window"],
    "additionalProperties": False,
    "properties": {
        "input_file_id": {"type": "string"},
        "endpoint": {"enum": [*BATCH_ENDPOINTS]},
        "completion_window": {"const": WINDOW},
        "metadata": {
            "type": ["object", "null"],
            "maxProperties": 16,
            "additionalProperties": {"type": "string", "maxLength": 512},
        },
        "output_expires_after": _EXPIRES_AFTER,
        "coe": _TERMS,
    },
}
_FORECAST = {
    "type": "object",
    "required": ["endpoint"],
    "additionalProperties": False,
    "properties": {
        "input_file_id": {"type": "string"},
        "requests": {"type": "array", "items": {"type": "object"}},
        "endpoint": {"enum": [*BATCH_ENDPOINTS]},
        "budgets": {"type": "array", "items": {"type": "number", "minimum": 0}},
        "metadata": {"type": ["object", "null"]},
        "coe": _TERMS,
    },
}
_NEW_FILE = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"const": "batch"},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer"},
    },
}
# There is no "type: string", because some clients validate the fields of each event against it.
_EVENTS = {
    "description": "Server-sent events; the data of each is a JSON object, of the last [DONE]"
}
_STREAMING = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
_ERROR = {
    "description": "An error in OpenAI's shape",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
}
_ANTHROPIC_ERROR = {
    "description": "An error in Anthropic's shape",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/AnthropicError"}}},
}
_OLLAMA_ERROR = {
    "description": "An error in Ollama's shape",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/OllamaError"}}},
}
# The empty alternative stands for a service that has never had a key.
_KEY: list[dict[str, list[str]]] = [{"key": []}, {}]
_HEADERS = [
    {
        "name": "x-coe-deadline-ms",
        "in": "header",
        "description": "To the first token when streaming, else to the end.",
        "schema": {"type": "integer", "minimum": 1, "maximum": 86_400_000},
    },
    {
        "name": "x-coe-max-cost",
        "in": "header",
        "description": "The most that all calls for it may cost together, in units of price.",
        "schema": {"type": "number", "minimum": 0},
    },
    {
        "name": "x-coe-min-quality",
        "in": "header",
        "description": "The least expected quality of the answer.",
        "schema": {"type": "number", "minimum": 0, "maximum": 1},
    },
    {
        "name": "x-coe-allow",
        "in": "header",
        "description": "The only experts that may be called, with commas between them.",
        "schema": {"type": "string"},
    },
    {
        "name": "x-coe-deny",
        "in": "header",
        "description": "Experts that may not be called, with commas between them.",
        "schema": {"type": "string"},
    },
    {
        "name": "x-coe-cache",
        "in": "header",
        "description": "Whether an answer that was kept will do, where the tenant has a cache.",
        "schema": {"type": "string", "enum": ["off", "exact", "similar"]},
    },
    {
        "name": "x-coe-priority",
        "in": "header",
        "description": "A lower class in queues than the tenant's; a higher one changes nothing.",
        "schema": {"type": "string", "enum": ["high", "normal", "low"]},
    },
    {
        "name": "x-session-id",
        "in": "header",
        "description": "Names the session of this conversation, so that tool results go back to "
        "the expert that called the tool. Without it `prompt_cache_key` or the first message does.",
        "schema": {"type": "string"},
    },
    {
        "name": "x-request-id",
        "in": "header",
        "description": "Yours, given back in the reply.",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    },
]


_NAMES = {
    "type": ["array", "null"],
    "items": {"type": "string"},
    "minItems": 1,
    "maxItems": 1000,
}
_COE = {
    "type": ["object", "null"],
    "description": "Bounds of this request. No engine sees them. A header comes before a field.",
    "additionalProperties": False,
    "properties": {
        "min_quality": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "max_cost": {"type": ["number", "null"], "minimum": 0},
        "deadline_ms": {"type": ["integer", "null"], "minimum": 1, "maximum": 86_400_000},
        "allow": _NAMES,
        "deny": _NAMES,
    },
}


def describe(config: Config, *, named: bool = True) -> dict[str, Any]:
    """Return the whole description in OpenAPI 3.1.

    Args:
        config: The config.
        named: Whether the description contains the names of experts.
    """
    paths: dict[str, Any] = {}
    model = {
        "type": "string",
        "description": "auto, auto:fast, auto:best, auto/<category>, an expert, a recipe, or an "
        "alias",
        "examples": ["auto", *(config.experts if named else ())],
    }
    for path, (summary, properties, required) in _POSTS.items():
        fields = {"model": model, **properties, "coe": _COE}
        if path in _STREAMING:
            fields["stream"] = {"type": ["boolean", "null"]}
        ok: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if path in _STREAMING:
            ok["text/event-stream"] = {"schema": _EVENTS}
        body = {
            "type": "object",
            "properties": fields,
            "required": required,
            "additionalProperties": True,
        }
        paths[path] = {"post": _post(path, summary, body, ok, _HEADERS)}
    paths |= _ollama_paths(model)
    paths[AUDIO] = {"post": _transcription(model)}
    if config.feedback.enabled:
        path, summary = "/v1/feedback", "Say how good a reply of `auto` was: each has one vote"
        counted = {"application/json": {"schema": {"type": "object"}}}
        paths[path] = {"post": _post(path, summary, _VOTE, counted, [])}
    if config.batches.enabled:
        paths |= _batch_paths()
    if config.responses.enabled:
        paths |= _stored_response_paths() | _conversation_paths()
    for path, summary in _GETS.items():
        operation: dict[str, Any] = {
            "summary": summary,
            "responses": {"200": {"description": summary}, "default": _error_of(path)},
        }
        if "{name}" in path:
            operation["parameters"] = [
                {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
            ]
        if path == "/v1/usage":
            days = {"type": "integer", "minimum": 1, "maximum": 400, "default": 30}
            operation["parameters"] = [{"name": "days", "in": "query", "schema": days}]
        if path.startswith(("/v1/", "/api/")) and path != "/api/version":
            operation["security"] = _KEY
        paths[path] = {"get": operation}
    error = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": {"type": ["string", "null"]},
                    "code": {"type": ["string", "null"]},
                    "nearest": {
                        "type": "object",
                        "description": "With code infeasible_bounds: bounds that are possible.",
                    },
                },
            }
        },
    }
    anthropic_error = {
        "type": "object",
        "required": ["type", "error"],
        "properties": {
            "type": {"const": "error"},
            "error": {
                "type": "object",
                "required": ["type", "message"],
                "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "coe", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {
                "Error": error,
                "AnthropicError": anthropic_error,
                "OllamaError": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {"error": {"type": "string"}},
                },
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


_OK = {"application/json": {"schema": {"type": "object"}}}
_BY_ID = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
_PAGES = [
    {"name": name, "in": "query", "schema": schema}
    for name, schema in (
        ("limit", {"type": "integer", "minimum": 1, "maximum": 100}),
        ("after", {"type": "string"}),
        ("order", {"enum": ["asc", "desc"]}),
    )
]


def _operation(summary: str, name: str, *parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the operation object of an endpoint without a body."""
    return {
        "summary": summary,
        "operationId": name,
        "parameters": [*parameters],
        "security": _KEY,
        "responses": {"200": {"description": summary, "content": _OK}, "default": _ERROR},
    }


def _stored_response_paths() -> dict[str, Any]:
    """Return the paths of stored responses."""
    cancel = _operation("Refused: no response runs in the background", "v1_response_cancel", _BY_ID)
    del cancel["responses"]["200"]
    return {
        "/v1/responses/{id}": {
            "get": _operation("A stored response", "v1_response", _BY_ID),
            "delete": _operation("Delete a response for good", "v1_response_delete", _BY_ID),
        },
        "/v1/responses/{id}/cancel": {"post": cancel},
        "/v1/responses/{id}/input_items": {
            "get": _operation(
                "The items that a response was made from", "v1_response_items", _BY_ID, *_PAGES
            )
        },
    }


def _ollama_paths(model: dict[str, Any]) -> dict[str, Any]:
    """Return the paths of Ollama's API that take a body."""
    paths = {}
    for path, (summary, properties, required) in _OLLAMA_POSTS.items():
        fields = {"model": model, **properties}
        ok: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
        if path in ("/api/chat", "/api/generate"):
            fields["stream"] = {"type": "boolean", "default": True}
            ok["application/x-ndjson"] = {
                "schema": {"description": "One JSON object a line; the last has the counts"}
            }
        body = {"type": "object", "properties": fields, "required": ["model", *required]}
        headers = [] if path == "/api/show" else _HEADERS
        paths[path] = {"post": _post(path, summary, body, ok, headers)}
    return paths


def _transcription(model: dict[str, Any]) -> dict[str, Any]:
    text = {"type": "string"}
    number = {"type": "number"}
    form = {
        "type": "object",
        "required": ["file"],
        "additionalProperties": False,
        "properties": {
            "file": {"type": "string", "format": "binary"},
            "model": model,
            **dict.fromkeys(("language", "prompt", "hotwords"), text),
            "response_format": {"enum": ["json", "text", "srt", "verbose_json", "vtt"]},
            "temperature": number,
            "timestamp_granularities[]": {
                "type": "array",
                "items": {"enum": ["word", "segment"]},
            },
        },
    }
    ok = {"application/json": {"schema": {"type": "object"}}, "text/plain": {}}
    operation = _post(AUDIO, "The text of a recording", {}, ok, _HEADERS)
    operation["requestBody"]["content"] = {"multipart/form-data": {"schema": form}}
    return operation


def _error_of(path: str) -> dict[str, Any]:
    if path.startswith("/api/"):
        return _OLLAMA_ERROR
    return _ANTHROPIC_ERROR if path.startswith("/v1/messages") else _ERROR


def _conversation_paths() -> dict[str, Any]:
    """Return the paths of conversations."""
    root = "/v1/conversations"
    items = {"type": "array", "maxItems": MAX_NEW_ITEMS, "items": {"type": "object"}}
    metadata = {"type": "object", "additionalProperties": {"type": "string"}}
    made = {"type": "object", "properties": {"items": items, "metadata": metadata}}
    changed = {"type": "object", "properties": {"metadata": metadata}, "required": ["metadata"]}
    added = {"type": "object", "properties": {"items": items}, "required": ["items"]}
    by_item = {**_BY_ID, "name": "item_id"}
    update = _post(f"{root}/one", "Replace a conversation's metadata", changed, _OK, [_BY_ID])
    add = _post(f"{root}/items", "Add items to a conversation", added, _OK, [_BY_ID])
    return {
        root: {"post": _post(root, "Begin a conversation", made, _OK, [])},
        f"{root}/{{id}}": {
            "get": _operation("A conversation", "v1_conversation", _BY_ID),
            "post": update,
            "delete": _operation(
                "Delete a conversation with all its items", "v1_conversation_delete", _BY_ID
            ),
        },
        f"{root}/{{id}}/items": {
            "get": _operation("A conversation's items", "v1_conversation_list", _BY_ID, *_PAGES),
            "post": add,
        },
        f"{root}/{{id}}/items/{{item_id}}": {
            "get": _operation("One item", "v1_conversation_item", _BY_ID, by_item),
            "delete": _operation(
                "Delete an item for good", "v1_conversation_item_delete", _BY_ID, by_item
            ),
        },
    }


def _batch_paths() -> dict[str, Any]:
    """Return the paths of files and batches."""
    upload = _operation("Upload a file of requests", "v1_files")
    form = {"multipart/form-data": {"schema": _NEW_FILE}}
    upload["requestBody"] = {"required": True, "content": form}
    content = _operation("The content of a file", "v1_file_content", _BY_ID)
    content["responses"]["200"]["content"] = {"application/octet-stream": {}}
    purpose = {"name": "purpose", "in": "query", "schema": {"type": "string"}}
    return {
        "/v1/files": {
            "post": upload,
            "get": _operation("The tenant's files", "v1_files_list", *_PAGES, purpose),
        },
        "/v1/files/{id}": {
            "get": _operation("One file", "v1_file", _BY_ID),
            "delete": _operation("Delete a file for good", "v1_file_delete", _BY_ID),
        },
        "/v1/files/{id}/content": {"get": content},
        "/v1/batches": {
            "post": _post("/v1/batches", "Run a file of requests", _NEW_BATCH, _OK, []),
            "get": _operation("The tenant's batches", "v1_batches_list", *_PAGES),
        },
        "/v1/batches/plan": {
            "post": _post("/v1/batches/plan", "Forecast a batch", _FORECAST, _OK, []),
        },
        "/v1/batches/{id}": {"get": _operation("One batch", "v1_batch", _BY_ID)},
        "/v1/batches/{id}/cancel": {
            "post": _operation("Cancel a batch", "v1_batch_cancel", _BY_ID),
        },
    }


def _post(
    path: str,
    summary: str,
    body: dict[str, Any],
    ok: dict[str, Any],
    headers: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return the operation object of an endpoint that takes JSON."""
    return {
        "summary": summary,
        "operationId": path.strip("/").replace("/", "_"),
        "parameters": headers,
        "security": _KEY,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {"description": "The answer", "content": ok},
            "default": _error_of(path),
        },
    }
