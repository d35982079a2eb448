"""Requests of a recipe's later steps, and the most that they add to a prompt."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.broker.peer_review import MAX_CORRECTION_CHARS, Ballot, review_prompt, revise_prompt
from service.broker.prompt_fences import filled, shown, shown_bytes
from service.config.recipes import RecipeConfig
from service.gateway.dispatch.step_requests import (
    review_request,
    revised_request,
    shown_bytes_of,
)
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.routing.prefix_affinity import PrefixAffinity, prefix_of
from service.types import Recipe

COUNCIL = RecipeConfig.model_validate({"kind": "deliberate", "members": list("abc")}).recipe()
PANEL = RecipeConfig.model_validate(
    {"kind": "recruit", "recruit": {"k": 2, "among": list("abc")}}
).recipe()


def request(**more: object) -> InferenceRequest:
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, **more}
    return parse_request("/v1/chat/completions", json.dumps(body).encode(), {}, 1000)


@pytest.mark.parametrize("greedy", [True, False])
def test_review_request_has_nothing_of_the_client_s_body(greedy: bool) -> None:
    given_request = request(stop=["x"], response_format={"type": "json_object"}, temperature=0.7)
    made = review_request(given_request, "judge", 64, greedy=greedy)
    expected = {"model", "messages", "max_tokens"} | ({"temperature"} if greedy else set())
    assert made.data.keys() == expected
    assert made.data.get("temperature", 0.0) == 0.0
    assert made.needs == {"chat"}
    assert made.most_tokens == 64
    assert made.most_prompt_tokens >= len("judge")


def test_review_request_is_no_turn_that_a_prefix_cache_has() -> None:
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "?"},
    ]
    asked = request(messages=turns)
    affinity = PrefixAffinity()
    affinity.record_answer(request(messages=turns[:1]), "e", "boot")
    assert affinity.hint(asked) is not None
    made = review_request(asked, "judge", 64, greedy=True)
    assert affinity.hint(made) is None
    assert prefix_of(asked)
    assert not prefix_of(made)


def test_review_request_keeps_images() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    asked = request(messages=[{"role": "user", "content": [{"type": "text", "text": "?"}, image]}])
    [message] = review_request(asked, "judge", 64, greedy=True).data["messages"]
    assert message["content"] == [{"type": "text", "text": "judge"}, image]


def test_revised_request_keeps_the_client_s_settings_and_counts_the_prompt() -> None:
    asked = request(stop=["x"], response_format={"type": "json_object"})
    made = revised_request(asked, "more" * 100)
    assert made.data["stop"] == ["x"]
    assert made.most_prompt_tokens >= asked.most_prompt_tokens + 400
    assert asked.data["messages"][0]["content"] == "hi"


@pytest.mark.parametrize("recipe", [COUNCIL, PANEL])
@given(st.text(min_size=1), st.sampled_from([1, 16, 512, None]), st.text())
def test_shown_bytes_of_bound_what_calls_add(
    recipe: Recipe, answer: str, most_tokens: int | None, correction: str
) -> None:
    text = shown(answer * 200, shown_bytes(most_tokens))
    numbers = itertools.count()

    def mark() -> str:
        return f"{next(numbers):024d}"

    said = correction[:MAX_CORRECTION_CHARS]
    if recipe.deliberation is not None:
        settings = recipe.deliberation
        review = review_prompt(
            settings.review,
            "",
            dict.fromkeys((1, 2), text),
            Ballot(0, (1, 2)),
            mark,
        )
        revised = revise_prompt(settings.revise, text, [said, said], mark)
        made = [review, revised]
    else:
        assert recipe.recruitment is not None
        parts = [("Answer 1", text), ("Answer 2", text)]
        made = [filled(recipe.recruitment.prompt, {"answers": parts}, mark)]
    most = shown_bytes_of(recipe, most_tokens)
    assert all(len(prompt.encode("utf-8", "replace")) <= most for prompt in made)


def test_shown_bytes_of_other_recipes_are_none() -> None:
    assert shown_bytes_of(Recipe("vote", ("a", "b", "c")), 10) == 0


@pytest.mark.parametrize(("given_budget", "told"), [(8, 8), (32, 32), (4000, 32)])
def test_review_request_leaves_room_after_the_client_s_budget_of_thinking(
    given_budget: int, told: int
) -> None:
    asked = request(max_tokens=8000, thinking_token_budget=given_budget)
    made = review_request(asked, "judge", 64, greedy=True)
    assert made.thinking.budget_tokens == told
    assert asked.thinking.budget_tokens == given_budget
