"""The acknowledgements of a pool: the last call of each gateway."""

from __future__ import annotations

from service.pool.call_acknowledgements import Acknowledgements


def test_acknowledge_out_of_order_calls_keeps_the_highest_sequence() -> None:
    acks = Acknowledgements()
    for seq in (1, 3, 2):
        acks.record("a", seq)
    assert acks.to_wire() == {"a": 3}


def test_acknowledge_drops_gateways_not_heard_of_for_long() -> None:
    acks = Acknowledgements()
    for seq in range(1, 1000):
        acks.record("always", seq)
        acks.record(f"gateway-{seq}", seq)
    wire = acks.to_wire()
    assert len(wire) <= 256
    assert wire["always"] == wire["gateway-999"] == 999
