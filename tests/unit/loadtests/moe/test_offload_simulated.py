"""The traces of the load test for expert slots, and its report."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loadtests.moe import gate_traces, offload_simulated
from service.expert_offload.slot_simulation import GateTrace, prefetch_accuracy


def test_random_choices_repeat_as_often_as_mixtral_does() -> None:
    repeated = gate_traces.repeated_first_choices(
        gate_traces.random_text(6, 6000, np.random.default_rng(3))
    )
    # Table 5 of "Mixtral of Experts", with the error of 6000 tokens around it.
    assert 0.12 < repeated[0] < 0.16
    assert (repeated[1:] > 0.19).all()
    assert (repeated[1:] < 0.29).all()


def test_recorded_choices_of_a_model_are_those_of_its_gates(tmp_path: Path) -> None:
    from tests.support.tiny_moe import EXPERTS, LAYERS, TOP_K, save, tiny_moe

    model = tiny_moe("mixtral")
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight.data.copy_(model.model.layers[0].mlp.gate.weight)
    folder = save(model, tmp_path / "tiny")
    trace = gate_traces.model_trace(folder, ["some words", "and more"], at_once=2)
    assert trace.choices.shape == (LAYERS, 18, TOP_K)
    assert trace.experts == EXPERTS
    assert trace.steps == (2,) * 8 + (1,) * 2
    assert trace.predicted is not None
    # All gates are the same, so the next gate predicts what this one chooses.
    assert np.array_equal(trace.predicted[1], trace.choices[0])
    assert 0 < prefetch_accuracy(trace)[0] < 1


def test_report_has_each_policy_and_the_bound() -> None:
    choices = np.random.default_rng(1).integers(0, 4, (2, 20, 2)).astype(np.int16)
    made = offload_simulated.report({"t": GateTrace(4, choices, (1,) * 20, choices)})
    assert {row[0] for row in made.tables[0].rows} >= {"lru", "cacheable", "Belady"}
    assert [row[0] for row in made.tables[1].rows] == ["none", "frequency", "next_gate"]
    assert made.facts["t"]["belady"]["3"] >= made.facts["t"]["cacheable"]["3"]
    assert "predicts 100.0%" in made.notes[0]
