"""Uploads, whole and in pieces, good and hostile."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.batches.file_folder import FileFolder
from service.batches.file_upload import read_upload
from service.errors import (
    BodyTooLargeError,
    CoeError,
    InvalidRequestError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from service.http.asgi_helpers import ClientDisconnectedError

HEADERS = {b"content-type": b"multipart/form-data; boundary=xyz"}
ID = "file-" + "a" * 24


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    more = "" if filename is None else f'; filename="{filename}"'
    head = f'--xyz\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--xyz--\r\n"


def receiving(body: bytes, cuts: list[int]) -> Callable[[], Awaitable[Any]]:
    places = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    pieces = [body[a:b] for a, b in pairwise(places)] or [b""]

    async def receive() -> Any:
        if not pieces:
            return {"type": "http.disconnect"}
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    return receive


async def upload(
    folder: Path, body: bytes, cuts: list[int], headers: dict[bytes, bytes] = HEADERS
) -> tuple[dict[str, str], str | None, bytes]:
    form, partial = await read_upload(
        receiving(body, cuts),
        headers,
        FileFolder(folder).begin,
        max_file_bytes=1000,
        stall_timeout_s=0.2,
    )
    try:
        partial.keep(ID)
        return form.fields, form.filename, (folder / ID).read_bytes()
    finally:
        partial.discard()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.binary(max_size=900).filter(lambda data: b"--xyz" not in data),
    cuts=st.lists(st.integers(0, 1200), max_size=8),
)
def test_upload_in_any_pieces_is_the_file(content: bytes, cuts: list[int], tmp_path: Path) -> None:
    body = form(part("purpose", b"batch"), part("file", content, "in.jsonl"))
    found = asyncio.run(upload(tmp_path, body, cuts))
    assert found == ({"purpose": "batch"}, "in.jsonl", content)
    assert [path.name for path in tmp_path.iterdir()] == [ID]


GOOD = part("file", b"x", "a")


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (form(part("file", b"x" * 1001, "a")), BodyTooLargeError),
        (form(part("purpose", b"batch")), InvalidRequestError),
        (form(GOOD, GOOD), InvalidRequestError),
        (form(GOOD, part("purpose", b"x" * 5000)), InvalidRequestError),
        (form(*[part(f"f{i}", b"") for i in range(17)]), InvalidRequestError),
        (GOOD, InvalidRequestError),
        (b"", InvalidRequestError),
        (b"{}", InvalidRequestError),
        (b"--xyz\r\n" + b"A: b\r\n" * 100 + b"\r\n", InvalidRequestError),
        (b"--xyz\r\nA: " + b"b" * 100_000, InvalidRequestError),
    ],
)
async def test_wrong_form_is_refused_and_leaves_nothing(
    body: bytes, kind: type[CoeError], tmp_path: Path
) -> None:
    for cuts in ([], [10, 50, 900]):
        with pytest.raises(kind):
            await upload(tmp_path, body, cuts)
        assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("headers", "kind"),
    [
        ({}, UnsupportedMediaTypeError),
        ({b"content-type": b"application/json"}, UnsupportedMediaTypeError),
        ({b"content-type": b"multipart/form-data"}, UnsupportedMediaTypeError),
        ({**HEADERS, b"content-length": b"99999999"}, BodyTooLargeError),
    ],
)
async def test_wrong_headers_are_refused_before_the_body(
    headers: dict[bytes, bytes], kind: type[CoeError], tmp_path: Path
) -> None:
    with pytest.raises(kind):
        await upload(tmp_path, form(GOOD), [], headers)
    assert names(tmp_path) == []


async def test_client_that_leaves_or_stalls_leaves_nothing(tmp_path: Path) -> None:
    async def read(receive: Any) -> None:
        await read_upload(
            receive,
            HEADERS,
            FileFolder(tmp_path).begin,
            max_file_bytes=1000,
            stall_timeout_s=0.05,
        )

    sent = [{"type": "http.request", "body": GOOD, "more_body": True}, {"type": "http.disconnect"}]

    async def leaves() -> Any:
        return sent.pop(0)

    with pytest.raises(ClientDisconnectedError):
        await read(leaves)

    async def stalls() -> Any:
        await asyncio.Event().wait()

    with pytest.raises(RequestTimeoutError):
        await read(stalls)
    assert names(tmp_path) == []


async def test_upload_with_more_bytes_than_a_form_needs_is_refused(tmp_path: Path) -> None:
    body = form(part("file", b"abc", "x")) + b"\r\n" * 50_000
    with pytest.raises(BodyTooLargeError):
        await upload(tmp_path, body, list(range(0, len(body), 1000)))
    assert names(tmp_path) == []
