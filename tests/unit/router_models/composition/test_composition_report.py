"""Frontier, shadow prices and the worth of experts, and their forms as text, JSON and SVG."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from loadtests.compose.random_problems import large
from router_models.composition.composition_problem import Bounds
from router_models.composition.composition_report import Report, analyse, readable, to_json, without
from router_models.composition.frontier_plot import frontier_svg
from router_models.composition.highs_solver import ROUNDING, solve

PROBLEM = large(2, experts=10, categories=4, accelerators=2, cascades=4)
FOUND = solve(PROBLEM)
REPORT = analyse(PROBLEM, FOUND, time_limit_s=60)


def test_analyse_more_of_a_bound_never_lowers_quality() -> None:
    for points in (REPORT.memory, REPORT.budget):
        assert len(points) >= 3
        for less, more in pairwise(points):
            assert less.bound < more.bound
            assert more.quality + more.gap >= less.quality - 2e-2  # swaps cost a little quality
    assert all(p.cost <= p.bound * (1 + 1e-6) for p in REPORT.budget)


def test_analyse_prices_are_differences_of_the_whole_program() -> None:
    prices = {price.of: price for price in REPORT.prices}
    assert set(prices) == {"memory of each accelerator", "accelerators", "mean cost of a request"}
    price = prices["mean cost of a request"]
    bounds = replace(PROBLEM.bounds, cost=PROBLEM.bounds.cost + price.step)
    again = solve(replace(PROBLEM, bounds=bounds))
    assert price.gain == pytest.approx(again.value - FOUND.value, abs=price.open + ROUNDING)


def test_analyse_worth_is_what_is_lost_without_an_expert() -> None:
    used = {e for recipe in FOUND.recipes.values() for e in recipe.experts}
    assert set(REPORT.worth) == used - PROBLEM.required
    for expert, loss in REPORT.worth.items():
        again = solve(without(PROBLEM, expert))
        assert loss == pytest.approx(FOUND.value - again.value, abs=2e-3)
        assert all(expert not in recipe.experts for recipe in again.recipes.values())
    assert set(REPORT.unbought).isdisjoint(used)
    assert set(REPORT.worthless) <= set(REPORT.unbought)


def test_report_texts_name_every_part_and_no_number_is_infinite() -> None:
    text = "\n".join(readable(PROBLEM, REPORT, "EUR"))
    for name in (*PROBLEM.categories, *REPORT.unbought, "exact: no composition is better"):
        assert name in text
    for line in ("EUR a request", "cost in EUR"):
        assert line in text
    assert " cost more: " not in text
    found = to_json(PROBLEM, replace(REPORT, worth={"x": math.inf}), "EUR")
    told = json.loads(json.dumps(found, allow_nan=False))
    assert told["worth"] == {"x": None}
    assert told["cost_unit"] == "EUR"
    assert set(told["categories"]) == set(PROBLEM.categories)
    assert told["shadow_prices"]["method"].startswith("finite differences")


def test_report_unproven_composition_says_so() -> None:
    open_ = replace(REPORT, composition=replace(FOUND, exact=False, gap=0.03))
    text = "\n".join(readable(PROBLEM, open_, "EUR"))
    assert "not proven: another one may be better by up to 0.03" in text
    assert "exact" not in text


def test_analyse_time_that_is_up_leaves_parts_out() -> None:
    began = time.monotonic()
    report = analyse(PROBLEM, FOUND, time_limit_s=0.0)
    assert time.monotonic() - began < 5
    assert report.worth == {}
    assert "not weighed in the time given: " in "\n".join(readable(PROBLEM, report, "EUR"))
    assert [p.bound for p in report.memory] == [pytest.approx(44.0)]


def test_analyse_bounds_of_waits_and_host_memory_have_prices() -> None:
    bounds = Bounds(cost=10.0, wait_s=100.0, host_bytes=10 * 1024**3)
    problem = replace(PROBLEM, bounds=bounds)
    report = analyse(problem, solve(problem), time_limit_s=60)
    assert {"host memory", "wait for swaps"} <= {price.of for price in report.prices}
    assert all(price.gain >= 0 for price in report.prices)


def test_frontier_svg_draws_each_point() -> None:
    root = ElementTree.fromstring(frontier_svg(REPORT))
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(REPORT.memory) + len(REPORT.budget)
    empty = frontier_svg(Report(FOUND, (), (), (), {}, (), (), ()))
    assert "not computed in the time given" in empty
    ElementTree.fromstring(empty)
