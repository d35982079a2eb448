"""Calls of a service's files and batches by the command line."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import quote

from service.cli.http_client import ask, open_reply
from service.errors import CoeError

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
"""The states in which a batch stays."""


class BatchClient:
    """The files and batches of one service, for one key.

    Args:
        url: The service.
        key: The API key; None where the service needs none.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def upload(self, path: Path) -> str:
        """Upload an input file, and return its id.

        Raises:
            CoeError: It is no text, or the service refuses it.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise CoeError(f"{path} is not UTF-8 text: an input file has a JSON a line") from None
        mark = secrets.token_hex(16)
        body = (
            f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="input.jsonl"\r\n'
            f"Content-Type: application/jsonl\r\n\r\n{text}\r\n--{mark}--\r\n"
        )
        kind = {"content-type": f"multipart/form-data; boundary={mark}"}
        made = ask(self._url, "POST", "/v1/files", {**self._headers, **kind}, body)
        return str(made["id"])

    def delete(self, file_id: str) -> None:
        """Delete a file."""
        self._ask("DELETE", f"/v1/files/{quote(file_id)}")

    def plan(
        self, file_id: str, endpoint: str, terms: dict[str, Any], budgets: list[float]
    ) -> dict[str, Any]:
        """Forecast a batch of an uploaded file."""
        given = {"input_file_id": file_id, "endpoint": endpoint, "coe": terms, "budgets": budgets}
        found: dict[str, Any] = self._ask("POST", "/v1/batches/plan", given)
        return found

    def create(self, file_id: str, endpoint: str, terms: dict[str, Any]) -> dict[str, Any]:
        """Create a batch of an uploaded file."""
        given = {
            "input_file_id": file_id,
            "endpoint": endpoint,
            "completion_window": "24h",
            "coe": terms,
        }
        made: dict[str, Any] = self._ask("POST", "/v1/batches", given)
        return made

    def batch(self, batch_id: str) -> dict[str, Any]:
        """Return a batch."""
        found: dict[str, Any] = self._ask("GET", f"/v1/batches/{quote(batch_id)}")
        return found

    def batches(self) -> list[dict[str, Any]]:
        """Return the newest batches."""
        found: list[dict[str, Any]] = self._ask("GET", "/v1/batches")["data"]
        return found

    def cancel(self, batch_id: str) -> dict[str, Any]:
        """Cancel a batch."""
        found: dict[str, Any] = self._ask("POST", f"/v1/batches/{quote(batch_id)}/cancel", {})
        return found

    def content(self, file_id: str) -> Any:
        """A file's content as a context manager to read from."""
        path = f"/v1/files/{quote(file_id)}/content"
        return open_reply(self._url, "GET", path, self._headers)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        text = None if body is None else json.dumps(body)
        return ask(self._url, method, path, self._headers, text)
