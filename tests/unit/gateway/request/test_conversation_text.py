"""The text of conversations, and what recipes add to their last message."""

from __future__ import annotations

from typing import Any

import pytest

from service.gateway.request.conversation_text import (
    conversation_text,
    media_parts,
    with_last_message,
)

IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([user("hi")], "hi"),
        ([user([{"type": "text", "text": "a"}, IMAGE, {"type": "text", "text": "b"}])], "a\nb"),
        ([{"role": "system", "content": "s"}, user("u")], "system: s\n\nuser: u"),
        ([user(None)], ""),
    ],
)
def test_conversation_text_is_that_of_all_messages(
    messages: list[dict[str, Any]], text: str
) -> None:
    assert conversation_text({"messages": messages}) == text


def test_media_parts_are_those_of_every_message() -> None:
    messages = [user([IMAGE, {"type": "text", "text": "x"}]), user("y"), user([IMAGE])]
    assert media_parts({"messages": messages}) == [IMAGE, IMAGE]


@pytest.mark.parametrize(
    ("messages", "last"),
    [
        ([user("hi")], user("hi\n\nmore")),
        ([user("")], user("more")),
        ([user([IMAGE])], user([IMAGE, {"type": "text", "text": "more"}])),
        ([user("hi"), {"role": "assistant", "content": "so"}], user("more")),
    ],
)
def test_with_last_message_leaves_the_given_messages_alone(
    messages: list[dict[str, Any]], last: dict[str, Any]
) -> None:
    before = [dict(message) for message in messages]
    made = with_last_message({"messages": messages}, "more")
    assert messages == before
    assert made[-1] == last
    assert len(made) - len(messages) == (messages[-1]["role"] != "user")
