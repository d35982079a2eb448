"""Turns between two steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from service.engine.vllm.worker.step_turns import StepTurns


def _load(turns: StepTurns, parts: list[Callable[[], None]], errors: list[Any]) -> threading.Thread:
    def run() -> None:
        for part in parts:
            try:
                turns.take(part)
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _serve(turns: StepTurns, thread: threading.Thread, budget_s: float) -> int:
    """Serve until the load has ended. Returns how often it was asked."""
    until_s, asked = time.monotonic() + 30, 0
    while thread.is_alive():
        assert time.monotonic() < until_s
        turns.serve(budget_s)
        asked += 1
        time.sleep(0.0005)  # a thread of the load's own: there is no event to await
    return asked


@pytest.mark.parametrize("budget_s", [0.0, 0.01])
def test_parts_run_in_order_in_the_workers_thread_and_errors_come_back(budget_s: float) -> None:
    turns = StepTurns()
    ran: list[tuple[int, threading.Thread]] = []
    errors: list[Any] = []

    def part(number: int) -> Callable[[], None]:
        def run() -> None:
            ran.append((number, threading.current_thread()))
            if number == 3:
                raise RuntimeError("no kernel")

        return run

    thread = _load(turns, [part(number) for number in range(6)], errors)
    _serve(turns, thread, budget_s)
    assert ran == [(number, threading.main_thread()) for number in range(6)]
    assert [str(error) for error in errors] == ["no kernel"]


def test_one_part_runs_for_each_question_however_long_it_takes() -> None:
    turns = StepTurns()
    errors: list[Any] = []
    thread = _load(turns, [lambda: time.sleep(0.01)] * 4, errors)
    assert _serve(turns, thread, 0.0) >= 4
    assert turns.longest_s >= 0.01
    assert errors == []


def test_load_without_parts_takes_no_time_of_the_running_model() -> None:
    turns = StepTurns()
    began_s = time.process_time()
    wall_s = time.monotonic()
    for _ in range(200):
        turns.serve(1.0)
    assert time.process_time() - began_s < 0.1
    assert time.monotonic() - wall_s < 60  # of 200 s
