"""Reads forms (`multipart/form-data`) as they come: their fields, and one file within a bound."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    RequestTimeoutError,
    UnsupportedMediaTypeError,
)
from service.http.asgi_helpers import ClientDisconnectedError, Receive

_MAX_FIELD_BYTES = 4096
_MAX_PARTS = 32
_MAX_NAME = 255
# What the form adds to the file: its fields, and the headers of its parts.
_FORM_BYTES = 64 * 1024


@dataclass(slots=True)
class UploadForm:
    """The fields of an upload.

    Attributes:
        fields: The text fields, by name; of several of one name the last.
        repeated: All values of each text field, in their order.
        filename: The client's name of the file; None before the file came.
    """

    fields: dict[str, str] = field(default_factory=dict)
    repeated: dict[str, list[str]] = field(default_factory=dict)
    filename: str | None = None


class _Parts:
    """Takes the parts of a form from the parser: fields as texts, the file as bytes."""

    def __init__(self, max_file_bytes: int) -> None:
        self.form = UploadForm()
        self.pending = bytearray()
        self.ended = False
        self._max_file_bytes = max_file_bytes
        self._file_bytes = 0
        self._count = 0
        self._header = [b"", b""]
        self._disposition = b""
        self._name: str | None = None
        self._value = bytearray()

    def on_part_begin(self) -> None:
        self._count += 1
        if self._count > _MAX_PARTS:
            raise InvalidRequestError(f"the form has more than {_MAX_PARTS} parts")
        self._disposition, self._name = b"", None
        self._value.clear()

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == "file":
            if self.form.filename is not None:
                raise InvalidRequestError("the form has two files; one is allowed", param="file")
            name = options.get(b"filename", b"").decode("utf-8", "replace")
            self.form.filename = name[-_MAX_NAME:] or "file"

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == "file":
            self._file_bytes += end - start
            if self._file_bytes > self._max_file_bytes:
                raise too_large(self._max_file_bytes)
            self.pending += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidRequestError(
                f"a field of the form has more than {_MAX_FIELD_BYTES} bytes", param=self._name
            )

    def on_part_end(self) -> None:
        if self._name and self._name != "file":
            text = self._value.decode("utf-8", "replace")
            self.form.fields[self._name] = text
            self.form.repeated.setdefault(self._name, []).append(text)

    def on_end(self) -> None:
        self.ended = True


async def read_form(
    receive: Receive,
    headers: dict[bytes, bytes],
    on_file: Callable[[bytearray, bool], Awaitable[None]],
    *,
    max_file_bytes: int,
    stall_timeout_s: float,
) -> UploadForm:
    """Read a form with a file in the field `file`.

    Args:
        receive: The request's ASGI `receive`.
        headers: The request's headers, by name.
        on_file: Gets the bytes of the file that it has not taken yet, after each message of the
            body, and whether this was the last one. It removes those that it takes.
        max_file_bytes: The largest file.
        stall_timeout_s: The longest wait for the next bytes, in s.

    Raises:
        UnsupportedMediaTypeError: The body is no form.
        InvalidRequestError: The form is not valid, or has no file.
        BodyTooLargeError: The file is too large.
        RequestTimeoutError: The next bytes did not come in time.
        ClientDisconnectedError: The client left.
    """
    boundary = boundary_of(headers, max_file_bytes)
    parts = _Parts(max_file_bytes)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": parts.on_part_begin,
            "on_part_data": parts.on_part_data,
            "on_part_end": parts.on_part_end,
            "on_header_field": parts.on_header_field,
            "on_header_value": parts.on_header_value,
            "on_header_end": parts.on_header_end,
            "on_headers_finished": parts.on_headers_finished,
            "on_end": parts.on_end,
        },
    )
    more, received = True, 0
    while more:
        try:
            async with asyncio.timeout(stall_timeout_s):
                message = await receive()
        except TimeoutError:
            raise RequestTimeoutError(
                f"no further bytes of the upload arrived within {stall_timeout_s:g} s"
            ) from None
        if message["type"] != "http.request":
            raise ClientDisconnectedError
        more = message.get("more_body", False)
        body = message.get("body", b"")
        received += len(body)
        if received > max_file_bytes + _FORM_BYTES:
            raise too_large(max_file_bytes)
        try:
            parser.write(body)
        except FormParserError:
            raise InvalidRequestError("the form can't be understood") from None
        await on_file(parts.pending, not more)
    if not parts.ended:
        raise InvalidRequestError("the form ends before its last boundary")
    if parts.form.filename is None:
        raise InvalidRequestError("the form has no `file`", param="file")
    return parts.form


def boundary_of(headers: dict[bytes, bytes], max_file_bytes: int) -> bytes:
    """The boundary of a form, by the request's headers.

    Raises:
        UnsupportedMediaTypeError: The body is no form.
        BodyTooLargeError: The body declares more bytes than a form with such a file has.
    """
    kind, options = parse_options_header(headers.get(b"content-type", b""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 1 <= len(boundary) <= 128:
        raise UnsupportedMediaTypeError(
            "the body must be a form: send the header Content-Type: multipart/form-data"
        )
    declared = headers.get(b"content-length", b"")
    if declared.isdigit() and int(declared[:18]) > max_file_bytes + _FORM_BYTES:
        raise too_large(max_file_bytes)
    return boundary


def too_large(max_file_bytes: int) -> BodyTooLargeError:
    """The error for a file that is too large."""
    return BodyTooLargeError(f"the file is larger than the {max_file_bytes} bytes allowed")
