"""The swaps of llama.cpp's servers, as far as they are measured without one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from loadtests.swap import __main__ as swap
from loadtests.swap import llama_servers
from loadtests.swap.llama_servers import BY_HAND, OURS, ROUTER, Found, has_text, table_of


def line(**delta: str | None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (line(role="assistant", content=None), False),
        (line(content=""), False),
        (line(), False),
        (b"\n", False),
        (b": ping\n", False),
        (b"data: [DONE]\n", False),
        (b'data: {"choices": [], "usage": {}}\n', False),
        (line(content="a"), True),
    ],
)
def test_has_text_finds_the_first_part_of_an_answer(text: bytes, found: bool) -> None:
    assert has_text(text) is found


def test_has_text_raises_for_an_error_in_the_stream() -> None:
    with pytest.raises(RuntimeError, match="engine_dead"):
        has_text(b'data: {"error": {"code": "engine_dead"}}\n')


def test_table_compares_each_with_the_same_by_hand() -> None:
    swapped = {OURS: [0.45, 0.55], ROUTER: [0.5, 0.5], BY_HAND: [0.4, 0.5]}
    other = {name: [0.01, 0.01] for name in swapped}
    report = table_of(Found(swapped, other, other))
    rows = {row[:2]: row for row in report.tables[0].rows}
    assert rows["first text, with a swap", OURS][4].startswith("50.0 ")
    assert rows["first text, with a swap", BY_HAND][4] == ""
    (reach,) = report.reach
    assert reach.ok


def test_both_get_the_same_models_under_the_same_names() -> None:
    models = [Path("/m/one.gguf"), Path("/m/two.gguf")]
    assert llama_servers.presets(models) == (
        "version = 1\n\n[a]\nmodel = /m/one.gguf\n\n[b]\nmodel = /m/two.gguf\n"
    )
    command = llama_servers.server_command(Path("/bin/llama-server"), models[0], "{port}")
    assert command[:5] == ["/bin/llama-server", "-m", "/m/one.gguf", "--port", "{port}"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--llama-server", "/bin/true"], "go together"),
        (["--gguf", "a"], "go together"),
        (["--llama-server", "/bin/true", "--gguf", "a"], "is for --engines command"),
    ],
)
def test_options_that_need_each_other_are_refused_alone(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["swap", *words])
    with pytest.raises(SystemExit):
        swap.main()
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "models", "why"),
    [
        ("/bin/true", ["a"], "--gguf is needed twice"),
        ("/no/llama-server", ["/bin/true", "/bin/true"], "llama-server is not there"),
        ("/bin/true", ["/bin/true", "/no/b.gguf"], "b.gguf is not there"),
        ("/bin/true", ["/bin/true", "/bin/true"], "is it llama-server"),
    ],
)
def test_wrong_files_are_named_before_anything_starts(
    program: str, models: list[str], why: str
) -> None:
    with pytest.raises(RuntimeError, match=why):
        llama_servers.report_of(Path(program), [Path(model) for model in models], 1)
