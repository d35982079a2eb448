"""Dashboards and rules equal their source, use existing metrics, and pass promtool."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from promql_parser import (
    AggregateExpr,
    BinaryExpr,
    Call,
    Expr,
    MatrixSelector,
    NumberLiteral,
    ParenExpr,
    StringLiteral,
    SubqueryExpr,
    UnaryExpr,
    VectorSelector,
)

from service.telemetry.metric_declarations import METRICS
from service.telemetry.metric_types import Kind
from tests.support.prometheus_server import RULES, needs_prometheus

ROOT = Path(__file__).parents[2]
BOARDS = sorted((ROOT / "deploy/grafana/dashboards").glob("*.json"))
PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total", "up"}


def panels(board: Path) -> Iterator[dict[str, Any]]:
    """A dashboard's panels, those inside rows included; rows themselves left out."""
    for panel in json.loads(board.read_text())["panels"]:
        yield from panel.get("panels", [])
        if panel["type"] != "row":
            yield panel


def selectors(expr: Expr) -> Iterator[VectorSelector]:
    """Every series that an expression asks for."""
    match expr:
        case VectorSelector():
            yield expr
        case MatrixSelector():
            yield expr.vector_selector
        case BinaryExpr():
            yield from selectors(expr.lhs)
            yield from selectors(expr.rhs)
        case Call():
            for arg in expr.args:
                yield from selectors(arg)
        case AggregateExpr() | ParenExpr() | UnaryExpr() | SubqueryExpr():
            yield from selectors(expr.expr)
        case NumberLiteral() | StringLiteral():
            return
        case _:
            raise AssertionError(f"unknown kind of expression: {type(expr).__name__}")


def known_samples() -> dict[str, set[str]]:
    """Every sample of ours by its name, with the labels that it may be asked by."""
    found: dict[str, set[str]] = {}
    for metric in METRICS:
        labels = {*metric.labels, "pool", "gateway"}
        if metric.kind is Kind.HISTOGRAM:
            found |= {f"{metric.name}_sum": labels, f"{metric.name}_count": labels}
            found[f"{metric.name}_bucket"] = labels | {"le"}
        else:
            found[metric.name] = labels
    return found


def check(expr: str) -> None:
    parsed = promql_parser.parse(expr.replace("$__rate_interval", "1m").replace("$expert", ".*"))
    known = known_samples()
    found = list(selectors(parsed))
    assert found, expr
    for item in found:
        name = item.name
        assert name is not None
        if name.startswith(("vllm:", "coe:")) or name in PROCESS:
            continue
        assert name in known, f"{name} is no metric of ours, in: {expr}"
        used = {matcher.name for matcher in item.matchers.matchers}
        assert used <= known[name], f"{name} has no label {used - known[name]}"


def test_dashboards_equal_their_rendered_source() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "deploy.grafana.render_dashboards", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("board", BOARDS, ids=lambda path: path.stem)
def test_dashboard_queries_use_existing_metrics(board: Path) -> None:
    data = json.loads(board.read_text())
    assert data["uid"] == board.stem
    found = list(panels(board))
    assert len({panel["id"] for panel in found}) == len(found)
    for panel in found:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            check(target["expr"])


def test_every_metric_is_in_a_dashboard() -> None:
    text = "".join(board.read_text() for board in BOARDS)
    left = {
        metric.name
        for metric in METRICS
        if not re.search(rf"\b{metric.name}(_bucket|_sum)?\b", text)
    }
    # Its labels are all that it tells.
    assert left == {"coe_build_info"}


def test_rules_use_existing_metrics() -> None:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            check(rule["expr"])


def test_each_alert_has_a_firing_and_a_quiet_test_case() -> None:
    rules = yaml.safe_load(RULES.read_text())
    cases = yaml.safe_load((RULES.parent / "rules_test.yml").read_text())
    alerts = {r["alert"] for g in rules["groups"] for r in g["rules"] if "alert" in r}
    tried = [case for test in cases["tests"] for case in test.get("alert_rule_test", [])]
    assert {case["alertname"] for case in tried if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in tried if not case["exp_alerts"]} == alerts
    documented = (ROOT / "docs" / "operations" / "alerts.md").read_text()
    assert [alert for alert in sorted(alerts) if f"`{alert}`" not in documented] == []


@needs_prometheus
@pytest.mark.parametrize(
    "args",
    [
        ["check", "rules", "rules.yml"],
        ["check", "config", "prometheus.yml"],
        ["test", "rules", "rules_test.yml"],
    ],
    ids=" ".join,
)
def test_rules_pass_promtool(args: list[str]) -> None:
    ran = subprocess.run(
        ["promtool", *args], cwd=RULES.parent, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
