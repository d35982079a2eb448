"""The messages of `coe serve` about its start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.config import Config
from service.launch import supervisor


def config(**experts: dict[str, Any]) -> Config:
    pools = {"cpu": {"engine": "simulated"}}
    return Config.model_validate({"experts": experts, "pools": pools})


@pytest.mark.parametrize(
    ("states", "works"),
    [
        ({"a": "device", "b": "failed"}, True),
        ({"a": "disk", "b": "failed"}, True),
        ({"a": "failed", "b": "failed"}, False),
    ],
)
def test_ready_is_printed_only_when_the_service_can_answer(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    states: dict[str, str],
    works: bool,
) -> None:
    why = {"failed": {"reason": "told to"}}
    details = {name: {"state": state, **why.get(state, {})} for name, state in states.items()}
    monkeypatch.setattr(supervisor, "_ready", lambda _: details)
    assert supervisor.report_experts(config(a={"model": "m"}, b={"model": "m"}), 0.0) is works
    assert "expert b failed: told to" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [RuntimeError("Ray is away"), OSError("no"), KeyError("x")])
def test_reload_that_fails_in_any_way_does_not_end_the_service(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: Exception
) -> None:
    def resources() -> dict[str, float]:
        raise fault

    supervisor._reload(tmp_path / "config.json", resources)
    said = "".join(capsys.readouterr())
    assert "the config stays as it was" in said
    assert str(fault) in said
