"""The heat map and the picture of `coe moe show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from service.cli.moe.show import draw, heat_map, shade

EXPERTS = 4


def told_of(layers: int = 2, experts: int = EXPERTS) -> dict[str, Any]:
    rows = [
        {
            "layer": i,
            "load": [100 if e == i else 1 for e in range(experts)],
            "imbalance": 2.0,
            "entropy": 0.5,
            "entropy_bits": 1.0,
            "srp": None,
            "sch": 1.0,
        }
        for i in range(layers)
    ]
    shape = {"layers": layers, "experts": experts, "top_k": 2}
    return {"expert": "[a]", "shape": shape, "tokens": 9, "every": 1, "layers": rows}


@pytest.mark.parametrize("experts", [4, 40, 300])
def test_heat_map_fits_the_width_and_works_without_colours(experts: int) -> None:
    plain = Console(width=90, no_color=True, force_terminal=True)
    with plain.capture() as capture:
        plain.print(heat_map(told_of(experts=experts), 90))
    text = re.sub(r"\x1b\[[0-9;]*m", "", capture.get())
    assert "[a]: 2 layers" in text
    first, second = (line for line in text.splitlines() if "2.00" in line)
    assert len(first) <= 90
    assert first.index("█") < second.index("█") or experts == 300
    assert "–" in first
    assert ("share a mark" in text) == (experts == 300)
    colours = Console(width=90, color_system="256", force_terminal=True)
    with colours.capture() as capture:
        colours.print(heat_map(told_of(), 90))
    assert "38;5;202" in capture.get() or "38;5;196" in capture.get()


def test_shade_grows_with_load() -> None:
    assert shade(0, 10) == shade(5, 0) == (" ", 233)
    assert [shade(load, 10)[0] for load in (1, 4, 10, 20, 99)] == ["·", "░", "▒", "▓", "█"]


def test_draw_writes_a_png(tmp_path: Path) -> None:
    draw(told_of(), tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
