"""The Lua scripts that run inside Redis. Redis runs each of them atomically.

The texts are in `scripts/`, and `prelude.lua` is put before each. Keys, all below `{prefix}:`

- `a:ACCOUNT` hash: `s<start>` spent and `r<start>` reserved in the window (or part of one) that
  starts then (a start in the future: a debt), `h` held by offline quotas, `w` time when a claim was
  refused while there were such quotas
- `own:OWNER` hash: claim → its lines; `sl:OWNER` hash: account → offline quota; `o:OWNER` hash:
  numbers of the last heartbeat and of the last notes; `owners` sorted set: owner → end of its lease
- `heard`: when the last heartbeat or claim of any owner came; `gone:ID`: a claim that was undone
  or settled from an offline quota; `lapsed:ID`, `lapsed-owner:OWNER`: a claim or an owner whose
  lease expired
- `once:GROUP` hash: items of a group of work that were charged; `*` in it: the group is closed
- `n:NAME` hash: usage notes
- `t:TABLE` hash: record → its value; `tv:TABLE`: the table's version, new after every change
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).with_name("scripts")
_PRELUDE = "prelude"
NAMES = (
    "reserve",
    "settle",
    "close_group",
    "undo",
    "heartbeat",
    "leave",
    "restore",
    "balances",
    "replace",
)


def load_scripts() -> dict[str, str]:
    """Return the complete text of every script of the store, by name."""
    return read_scripts(_FOLDER, NAMES)


@cache
def read_scripts(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Return the complete text of the named scripts of a folder, by name."""
    prelude = _read(folder, _PRELUDE)
    return {name: prelude + "\n" + _read(folder, name) for name in names}


def _read(folder: Path, name: str) -> str:
    return (folder / f"{name}.lua").read_text(encoding="utf-8")
