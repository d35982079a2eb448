"""`POST /v1/batches/plan`: what a batch would cost, take and be worth, without running it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from service.batches.batch_records import ENDPOINTS, PURPOSE
from service.batches.batch_types import BatchLine, parse_terms
from service.batches.input_lines import InputLines, read_index
from service.errors import InvalidRequestError
from service.gateway.dependencies import CountedTenant, Services, headers_of, json_response
from service.http.asgi_helpers import read_body
from service.types import Tenant

router = APIRouter()

_FIELDS = ("input_file_id", "requests", "endpoint", "coe", "metadata", "budgets")
_MOST_BUDGETS = 20


@router.post("/v1/batches/plan")
async def plan_batch(request: Request, services: Services, tenant: CountedTenant) -> Response:
    """Forecast a batch by its terms, and for several budgets."""
    server = services.config.server
    raw = await read_body(
        request.receive,
        server.max_body_bytes,
        declared=headers_of(request).get(b"content-length", b""),
        timeout_s=server.limits.body_timeout_s,
    )
    # A body of a line is inside of `requests` and of the line.
    await asyncio.to_thread(services.intake.check_shape, raw, 3)
    try:
        body = await asyncio.to_thread(orjson.loads, raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidRequestError("the body must be a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    if unknown := body.keys() - {*_FIELDS}:
        name = min(unknown)[:64]
        raise InvalidRequestError(
            f"there is no field {name!r}; allowed are {', '.join(_FIELDS)}", param=name
        )
    endpoint = body.get("endpoint")
    if endpoint not in ENDPOINTS:
        raise InvalidRequestError(
            f"`endpoint` must be one of {', '.join(ENDPOINTS)}", param="endpoint"
        )
    terms, budgets = parse_terms(body), _budgets(body.get("budgets", []))
    if ("requests" in body) == ("input_file_id" in body):
        raise InvalidRequestError("give the lines once: as `input_file_id` or as `requests`")
    assert services.batch_planner is not None
    planner = services.batch_planner
    async with planner.asked_by(tenant):
        if "requests" in body:
            lines = _inline(body["requests"], services.config.batches.max_lines)
            outlook = await planner.forecast(str(endpoint), lines, terms, tenant, budgets)
            invalid = 0
        else:
            found, invalid = await _from_file(
                services, tenant, body["input_file_id"], str(endpoint)
            )
            try:
                outlook = await planner.forecast(str(endpoint), found, terms, tenant, budgets)
            finally:
                found.close()
    unit = services.config.prices.unit
    return json_response({**outlook.to_json(), "invalid": invalid, "cost_unit": unit})


def _inline(given: object, most: int) -> Sequence[BatchLine]:
    """The lines of a body: bodies of requests, or whole lines of an input file."""
    if not isinstance(given, list) or not 1 <= len(given) <= most:
        raise InvalidRequestError(f"`requests` must be a list of 1 to {most}", param="requests")
    lines = []
    for number, line in enumerate(given):
        whole = isinstance(line, dict) and isinstance(line.get("body"), dict)
        body = line["body"] if whole else line
        if not isinstance(body, dict):
            raise InvalidRequestError(f"`requests[{number}]` must be an object", param="requests")
        lines.append(BatchLine(number, str(number), body))
    return lines


async def _from_file(
    services: Services, tenant: Tenant, file_id: object, endpoint: str
) -> tuple[InputLines, int]:
    """The lines of an uploaded file that can run, and the number of those that can't.

    Raises:
        InvalidRequestError: The file is not for batches, or none of its lines can run.
        UnknownModelError: The tenant has no such file.
    """
    if not isinstance(file_id, str):
        raise InvalidRequestError("`input_file_id` must be the id of a file", param="input_file_id")
    assert services.batches is not None
    file, path = await services.batches.content(tenant, file_id)
    if file.purpose != PURPOSE:
        raise InvalidRequestError(
            f"the purpose of `input_file_id` must be {PURPOSE!r}, not {file.purpose!r}",
            param="input_file_id",
        )
    config = services.config
    index = await asyncio.to_thread(
        read_index,
        path,
        endpoint,
        max_lines=config.batches.max_lines,
        max_line_bytes=config.server.max_body_bytes,
        check=partial(services.intake.check_shape, wrapped=1),
    )
    if index.errors:
        raise InvalidRequestError(index.errors[0].message, param="input_file_id")
    return InputLines(path, endpoint, index), len(index.faults)


def _budgets(given: Any) -> list[float]:
    valid = isinstance(given, list) and len(given) <= _MOST_BUDGETS
    if not valid or not all(
        isinstance(one, (int, float)) and not isinstance(one, bool) and 0 < one < math.inf
        for one in given
    ):
        raise InvalidRequestError(
            f"`budgets` must be a list of at most {_MOST_BUDGETS} numbers greater than 0",
            param="budgets",
        )
    return sorted(float(one) for one in given)
