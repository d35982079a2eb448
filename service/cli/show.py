"""What the commands print with: tables and sizes."""

from __future__ import annotations

from collections.abc import Sequence


def size(value: object) -> str:
    """Bytes for people: `512 MiB`."""
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

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in head:
        table.add_column(name)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
