"""Failure reasons as clients read them."""

from __future__ import annotations

import pytest

from service.gateway.folder_redaction import without_folders


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        ("/srv/models/m/config.json: not JSON", "config.json: not JSON"),
        ("no file '/srv/models/m/model.safetensors'", "no file 'model.safetensors'"),
        ("~/.cache/coe/models/x is missing", "x is missing"),
        ("/secret: Permission denied", "secret: Permission denied"),
        ("'/a/b' and (/c/d/e), or [/f/g]", "'b' and (e), or [g]"),
        ("http://far:8000/v1/models refused", "http://far:8000/v1/models refused"),
        ("org/model has no /v1/completions", "org/model has no /v1/completions"),
        ("3/4 of a token/s", "3/4 of a token/s"),
        ("not enough memory", "not enough memory"),
        ("", ""),
    ],
)
def test_redact_reason_removes_paths_and_keeps_words(reason: str, expected: str) -> None:
    assert without_folders(reason) == expected
