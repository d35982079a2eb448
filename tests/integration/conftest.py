"""The demo with its real engine, started once for all tests that use it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.coe_serve_process import Service, serve
from tests.support.small_models import small_model

DEMO = Path(__file__).parents[2] / "deploy" / "config" / "demo.yaml"


@pytest.fixture(scope="package")
def demo() -> Iterator[Service]:
    """The running demo; the last test that uses it stops it."""
    small_model()
    with serve(DEMO, ready_s=300) as running:
        yield running
