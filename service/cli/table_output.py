"""Output of the commands: tables and sizes."""

from __future__ import annotations

import sys
from collections.abc import Sequence

_PIPED_COLUMNS = 400


def size(value: object) -> str:
    """Format bytes for people, such as `512 MiB`."""
    size = float(str(value))
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Print a table without lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in head:
        # As Text, so that brackets are not taken for markup.
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    # A file or a pipe gets long lines unbroken.
    Console(width=None if sys.stdout.isatty() else _PIPED_COLUMNS).print(table)
