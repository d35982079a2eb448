"""Shares of traffic by category: from a file, or from a running service's metrics."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.errors import ConfigError

_REQUESTS = "coe_requests_total"


def read_traffic(source: str) -> dict[str, float]:
    """Read shares from a JSON file, or the URL of metrics.

    Raises:
        ConfigError: It has no shares.
        CoeError: The URL can't be reached.
    """
    if source.startswith(("http://", "https://")):
        return shares_of_metrics(fetch_metrics(source), source)
    try:
        data = json.loads(Path(source).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from None
    if not isinstance(data, dict) or not all(_is_share(value) for value in data.values()):
        raise ConfigError(f"{source}: an object of categories and shares >= 0 is needed")
    if not sum(data.values()) > 0:
        raise ConfigError(f"{source}: a share above 0 is needed")
    return {str(name): float(value) for name, value in data.items()}


def _is_share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0


def fetch_metrics(url: str) -> str:
    """Fetch Prometheus' text from a service, with the admin key where there is one."""
    from urllib.parse import urlsplit

    from service.cli.http_client import admin_headers, open_reply

    parts = urlsplit(url)
    root = f"{parts.scheme}://{parts.netloc}"
    path = parts.path if parts.path not in ("", "/") else "/metrics"
    with open_reply(root, "GET", path, admin_headers(root)) as reply:
        return str(reply.read().decode("utf-8", "replace"))


def measure_rate(
    url: str, window_s: float, sleep: Callable[[float], None], fetch: Callable[[str], str]
) -> float:
    """Measure the requests per second that have a category.

    Args:
        url: The service.
        window_s: Seconds to measure for.
        sleep: Waits for some seconds.
        fetch: Fetches the metrics' text.
    """
    before = _total(fetch(url), url)
    sleep(window_s)
    # A service that restarted meanwhile has fewer.
    return max(0.0, _total(fetch(url), url) - before) / window_s


def _total(text: str, source: str) -> float:
    try:
        return sum(shares_of_metrics(text, source).values())
    except ConfigError:
        return 0.0


def shares_of_metrics(text: str, source: str) -> dict[str, float]:
    """Return the number of requests of each category, from Prometheus' text.

    Requests that name an expert have no category and do not count.

    Raises:
        ConfigError: There are none, or this is not Prometheus' text.
    """
    from prometheus_client.parser import text_string_to_metric_families

    counts: dict[str, float] = defaultdict(float)
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == _REQUESTS and (category := sample.labels.get("category")):
                    counts[category] += sample.value
    except ValueError as error:
        raise ConfigError(f"{source}: these are no metrics: {error}") from None
    if not sum(counts.values()) > 0:
        raise ConfigError(
            f"{source}: {_REQUESTS} counts no request with a category yet; send requests to auto, "
            "or give --traffic FILE"
        )
    return dict(counts)
