"""The path that a request to a misspelled path gets as a hint."""

from __future__ import annotations

import pytest

from service.gateway.unknown_path_hints import hint_for

KNOWN = [
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/models/{name:path}",
    "/v1/responses",
    "/tokenize",
    "/health",
    "/",
]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/chat/completions", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1/messages", "/v1/messages"),
        ("/v1/chat/completions/chat/completions", "/v1/chat/completions"),
        ("/v1/messages/v1/messages", "/v1/messages"),
        ("/models", "/v1/models"),
        ("/v1/models/", "/v1/models"),
        ("/v1/tokenize", "/tokenize"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/health/", "/health"),
    ],
)
def test_path_hint_for_a_misspelled_base_url_names_the_right_path(path: str, meant: str) -> None:
    assert hint_for(path, KNOWN).startswith(f"; did you mean {meant}?")


@pytest.mark.parametrize("path", ["/nothing", "/v1", "", "/", "/wp-login.php", "/v1/" * 10_000])
def test_path_hint_for_an_unrelated_path_is_none(path: str) -> None:
    assert hint_for(path, KNOWN) == ""
