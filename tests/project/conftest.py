"""The installed versions of helm, for the chart's tests."""

from __future__ import annotations

import pytest

from tests.support import helm_chart
from tests.support.helm_chart import HELMS


@pytest.fixture(params=HELMS)
def version(request: pytest.FixtureRequest) -> str:
    """Each helm that is here."""
    name: str = request.param
    if helm_chart.tool(name, "helm") is None:
        pytest.skip(f"{name} is not here (deploy/chart_tools.sh fetches it)")
    return name


@pytest.fixture
def newest() -> str:
    """A helm, for what does not depend on which."""
    if helm_chart.tool("helm4", "helm") is None:
        pytest.skip("helm4 is not here (deploy/chart_tools.sh fetches it)")
    return "helm4"
