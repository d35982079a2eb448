"""Pages of OpenAI's lists: `limit`, `after` and `order`, and the list's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from service.errors import InvalidRequestError
from service.store.list_page import Page


@dataclass(frozen=True, slots=True)
class ListPage(Page):
    """The part of a list that a client asks for."""

    def one_more(self) -> Page:
        """The same part and one more entry, which tells whether the list goes on."""
        return Page(self.limit + 1, self.after, self.ascending)


def page_of(query: Mapping[str, str], *, most: int, usual: int) -> ListPage:
    """Parse the parameters of a list.

    Args:
        query: The query's parameters.
        most: The greatest `limit`.
        usual: The `limit` of a query without one.

    Raises:
        InvalidRequestError: A parameter is not valid.
    """
    given = query.get("limit", str(usual))
    if not given.isdecimal() or len(given) > 6 or not 1 <= int(given) <= most:
        raise InvalidRequestError(f"`limit` must be an integer from 1 to {most}", param="limit")
    order = query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError("`order` must be asc or desc", param="order")
    return ListPage(int(given), query.get("after"), order == "asc")


def to_list(entries: Sequence[Mapping[str, Any]], page: ListPage) -> dict[str, Any]:
    """OpenAI's object `list`.

    Args:
        entries: The entries of `page.one_more()`, as clients get them.
        page: The part that the client asked for.
    """
    shown = entries[: page.limit]
    return {
        "object": "list",
        "data": [*shown],
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(entries) > page.limit,
    }
