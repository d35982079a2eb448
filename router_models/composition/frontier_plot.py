"""Draws the frontiers of a report as SVG, without a library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from router_models.composition.composition_report import Point, Report

_WIDTH, _HEIGHT, _MARGIN = 420, 300, 56
_TICKS = 4


def frontier_svg(report: Report) -> str:
    """Return an SVG with quality against memory, and against the mean cost of a request."""
    panels = [
        ("memory, GiB", report.memory, report.composition.quality),
        ("mean cost of a request", report.budget, report.composition.quality),
    ]
    inner = "".join(
        f'<g transform="translate({i * _WIDTH} 0)">{_panel(title, points, level)}</g>'
        for i, (title, points, level) in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _WIDTH}" height="{_HEIGHT}" '
        f'viewBox="0 0 {2 * _WIDTH} {_HEIGHT}" font-family="sans-serif" font-size="11" '
        f'role="img" aria-label="Expected quality against memory and against cost">'
        f'<rect width="100%" height="100%" fill="white"/>{inner}</svg>\n'
    )


def _panel(title: str, points: Sequence[Point], level: float) -> str:
    left, right = _MARGIN, _WIDTH - 16
    top, bottom = 20, _HEIGHT - 44
    text = f'<text x="{(left + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
    label = f"{text}{escape(title)}</text>"
    if not points:
        return f"{label}<text x='{left}' y='{top + 20}'>not computed in the time given</text>"
    most_x = max(p.bound for p in points) or 1.0
    low = min([level, *(p.quality for p in points)])
    high = max([level, *(p.quality + p.gap for p in points)])
    pad = max(0.1 * (high - low), 0.005)
    low, high = max(0.0, low - pad), min(1.0, high + pad)

    def x(value: float) -> float:
        return left + (right - left) * value / most_x

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (high - low)

    parts = [label]
    for i in range(_TICKS + 1):
        at_x, at_y = most_x * i / _TICKS, low + (high - low) * i / _TICKS
        parts.append(
            f'<line x1="{left}" x2="{right}" y1="{y(at_y):.1f}" y2="{y(at_y):.1f}" '
            f'stroke="#ddd"/><text x="{left - 6}" y="{y(at_y) + 4:.1f}" text-anchor="end">'
            f"{100 * at_y:.1f} %</text>"
            f'<text x="{x(at_x):.1f}" y="{bottom + 16}" text-anchor="middle">{at_x:.3g}</text>'
        )
    path = " ".join(f"{x(p.bound):.1f},{y(p.quality):.1f}" for p in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="2"/>')
    for p in points:
        at = f'cx="{x(p.bound):.1f}" cy="{y(p.quality):.1f}"'
        tip = escape(f"{p.bound:.4g}: {100 * p.quality:.2f} %")
        parts.append(f'<circle {at} r="3.5" fill="#1f5fa8"><title>{tip}</title></circle>')
        if p.gap > 1e-6:
            parts.append(
                f'<line x1="{x(p.bound):.1f}" x2="{x(p.bound):.1f}" y1="{y(p.quality):.1f}" '
                f'y2="{y(min(high, p.quality + p.gap)):.1f}" stroke="#1f5fa8"/>'
            )
    parts.append(
        f'<line x1="{left}" x2="{right}" y1="{y(level):.1f}" y2="{y(level):.1f}" '
        'stroke="#b3402a" stroke-dasharray="4 3"/>'
    )
    return "".join(parts)
