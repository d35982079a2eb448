"""`coe outcomes export` and `forget`: the outcomes that shadow evaluation recorded from traffic."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from router_models.outcome_reader import OutcomeError
from service.store.outcome_folder import OutcomeFolder, default_folder


def folder_of(path: Path | None, config: Path | None) -> OutcomeFolder:
    """The folder of outcomes: the one named, else the config's, else the default one.

    Raises:
        ConfigError: The config can't be used.
    """
    if path is None and config is not None:
        from service.config import load_config

        given = load_config(config).shadow.folder
        path = Path(given) if given is not None else None
    return OutcomeFolder(path if path is not None else default_folder())


def export(folder: OutcomeFolder, out: Path, tenant: str | None) -> tuple[int, int]:
    """Write the outcomes into one new file, for its owner only.

    Returns:
        How many rows it has, and how many of them have a prompt.

    Raises:
        OutcomeError: There is none.
        OSError: A file can't be read or written, or `out` exists.
    """
    if not folder.path.is_dir():
        raise OutcomeError(f"{folder.path}: no outcomes were recorded there")
    count = prompts = 0
    handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
        for owner, row in folder.rows(tenant):
            file.write(json.dumps({**row, "tenant": owner}, ensure_ascii=False) + "\n")
            count += 1
            prompts += "prompt" in row
    if not count:
        out.unlink()
        whose = "" if tenant is None else f" of tenant {tenant!r}"
        raise OutcomeError(f"{folder.path}: has no outcomes{whose}")
    return count, prompts


def forget(folder: OutcomeFolder, tenant: str | None) -> int:
    """Delete a tenant's outcomes, or everybody's, and return how many there were.

    Raises:
        OSError: A file can't be deleted.
    """
    return folder.forget(time.time(), tenant)
