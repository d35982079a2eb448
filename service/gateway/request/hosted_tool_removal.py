"""Removes tools that coding agents list in every request, but that the service does not run.

Besides their own functions, agents list tools that their provider's servers run, such as web
search, and tools for which only that provider's models know the protocol, such as a shell. The
service answers without these tools, and names them in a response header. It refuses a request only
if `tool_choice` requires such a tool. The service fetches and runs nothing.
"""

from __future__ import annotations

import re
from typing import Any

from service.errors import DisallowedFieldError, InvalidRequestError

# The types of tools to remove, by endpoint. Tools that name a server, a file or a sandbox are
# refused instead, because agents do not list them by default.
_OF_OPENAI = re.compile(
    r"(web_search(_preview)?|web_fetch|image_generation|local_shell|shell|apply_patch"
    r"|tool_search)(_\d{4}_\d{2}_\d{2})?"
)
_LEFT_OUT = {
    "/v1/responses": _OF_OPENAI,
    "/v1/responses/input_tokens": _OF_OPENAI,
    "/v1/messages": re.compile(r"[a-z_]{1,64}_\d{8}"),
    "/v1/messages/count_tokens": re.compile(r"[a-z_]{1,64}_\d{8}"),
}


def leave_out_hosted_tools(endpoint: str, data: dict[str, Any]) -> tuple[str, ...]:
    """Remove hosted tools from a request's body.

    Args:
        endpoint: The path of the endpoint.
        data: The body. The function changes it.

    Returns:
        The types of the removed tools, without duplicates, in the order of the request.

    Raises:
        DisallowedFieldError: `tool_choice` requires a removed tool, or any tool where none is left.
    """
    pattern, tools = _LEFT_OUT.get(endpoint), data.get("tools")
    if pattern is None or not isinstance(tools, list):
        return ()
    gone = [tool for tool in tools if _is_hosted(tool, pattern)]
    if not gone:
        return ()
    kinds = tuple(dict.fromkeys(str(tool["type"]) for tool in gone))
    kept = [tool for tool in tools if not _is_hosted(tool, pattern)]
    # A function of the client may have the same name as a removed tool.
    own = [tool.get("name") for tool in kept if isinstance(tool, dict)]
    names = [name for tool in gone if isinstance(name := tool.get("name"), str) and name not in own]
    _choose_among(data, kept, names, kinds)
    data["tools"] = kept
    if not kept:
        del data["tools"]
        data.pop("tool_choice", None)
    return kinds


def _is_hosted(tool: object, pattern: re.Pattern[str]) -> bool:
    kind = tool.get("type") if isinstance(tool, dict) else None
    return isinstance(kind, str) and pattern.fullmatch(kind) is not None


def _choose_among(
    data: dict[str, Any], kept: list[Any], names: list[str], kinds: tuple[str, ...]
) -> None:
    """Remove hosted tools from `tool_choice`.

    Args:
        data: The body. The function changes it.
        kept: The tools that stay.
        names: The names of removed tools.
        kinds: The types of removed tools.

    Raises:
        DisallowedFieldError: `tool_choice` requires a removed tool.
    """

    def is_gone(tool: object) -> bool:
        return isinstance(tool, dict) and (tool.get("type") in kinds or tool.get("name") in names)

    choice = data.get("tool_choice")
    if isinstance(choice, dict):
        if is_gone(choice):
            raise _insisted(kinds)
        if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
            allowed = [tool for tool in choice["tools"] if not is_gone(tool)]
            if not allowed and choice.get("mode") == "required":
                raise _insisted(kinds)
            data["tool_choice"] = {**choice, "tools": allowed} if allowed else "auto"
    mode = choice.get("type") if isinstance(choice, dict) else choice
    if not kept and mode in ("required", "any"):
        raise _insisted(kinds)


def _insisted(kinds: tuple[str, ...]) -> InvalidRequestError:
    return DisallowedFieldError(
        f"`tool_choice` insists on a tool that the service does not run ({', '.join(kinds)}); "
        "tools that the client runs itself can be chosen",
        param="tool_choice",
    )
