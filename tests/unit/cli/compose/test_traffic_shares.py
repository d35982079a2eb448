"""Shares of traffic from files and metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.cli.compose.traffic_shares import read_traffic, shares_of_metrics
from service.errors import ConfigError
from service.telemetry.metric_declarations import REQUESTS


@given(
    st.dictionaries(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["", "math", "law", "co de"])),
        st.integers(0, 1000),
    )
)
def test_shares_of_metrics_adds_up_requests_by_category(
    counts: dict[tuple[str, str], int],
) -> None:
    lines = [f"# HELP {REQUESTS.name} Requests.", f"# TYPE {REQUESTS.name} counter"]
    for (expert, category), n in counts.items():
        labels = f'expert="{expert}",category="{category}",recipe="single",outcome="ok"'
        lines.append(f"{REQUESTS.name}{{{labels}}} {n}")
    text = "\n".join([*lines, "# TYPE other gauge", 'other{category="math"} 5', ""])
    wanted: dict[str, float] = {}
    for (_, category), n in counts.items():
        if category:
            wanted[category] = wanted.get(category, 0.0) + n
    if not sum(wanted.values()):
        with pytest.raises(ConfigError, match="counts no request with a category yet"):
            shares_of_metrics(text, "url")
    else:
        assert shares_of_metrics(text, "url") == wanted


def test_shares_of_metrics_other_text_is_an_error() -> None:
    with pytest.raises(ConfigError, match="these are no metrics"):
        shares_of_metrics("<html>{</html>", "url")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "categories and shares"),
        ('{"x": -1}', "categories and shares"),
        ('{"x": true}', "categories and shares"),
        ('{"x": NaN}', "categories and shares"),
        ('{"x": 0}', "a share above 0"),
        ("{", "Expecting property name"),
    ],
)
def test_read_traffic_bad_file_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "shares.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_traffic(str(file))


def test_read_traffic_file_gives_its_shares(tmp_path: Path) -> None:
    file = tmp_path / "shares.json"
    file.write_text('{"math": 3, "law": 0}')
    assert read_traffic(str(file)) == {"math": 3.0, "law": 0.0}
    with pytest.raises(ConfigError, match="No such file"):
        read_traffic(str(tmp_path / "none.json"))
