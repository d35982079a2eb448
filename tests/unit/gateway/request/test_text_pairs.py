"""Pairs of texts for rerank and score are checked, named alike, and counted as they are read."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequestError
from service.gateway.request.parsing import InferenceRequest, parse_request
from service.gateway.request.text_pairs import repeated_bytes

RERANK, SCORE, CLASSIFY = "/v1/rerank", "/v1/score", "/v1/classify"


def parsed(path: str, **data: Any) -> InferenceRequest:
    return parse_request(path, orjson.dumps(data), {}, 1000)


@pytest.mark.parametrize(
    ("path", "data", "param"),
    [
        (RERANK, {"documents": ["a"]}, "query"),
        (RERANK, {"query": "q"}, "documents"),
        (RERANK, {"query": ["q"], "documents": ["a"]}, "query"),
        (RERANK, {"query": "q", "documents": "a"}, "documents"),
        (RERANK, {"query": "q", "documents": []}, "documents"),
        (RERANK, {"query": "q", "documents": ["a", {"text": "b"}]}, "documents[1]"),
        (RERANK, {"query": "q", "documents": ["a", None]}, "documents[1]"),
        *(
            (RERANK, {"query": "q", "documents": ["a"], "top_n": top_n}, "top_n")
            for top_n in (-1, 1.5, "1", True)
        ),
        (SCORE, {"text_1": "a"}, "text_2"),
        (SCORE, {"text_2": "a"}, "text_1"),
        (SCORE, {"queries": "a"}, "queries"),
        (SCORE, {}, "text_2"),
        (SCORE, {"text_1": [], "text_2": "a"}, "text_1"),
        (SCORE, {"text_1": "a", "text_2": []}, "text_2"),
        (SCORE, {"text_1": ["a", "b"], "text_2": ["c"]}, "text_1"),
        (SCORE, {"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_1"),
        (SCORE, {"text_1": "a", "text_2": [1]}, "text_2[0]"),
        (CLASSIFY, {"input": []}, "input"),
        (CLASSIFY, {}, "input"),
    ],
)
def test_parse_texts_that_form_no_pairs_are_refused_by_the_field(
    path: str, data: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parsed(path, **data)
    assert caught.value.param == param
    assert f"`{param}`" in caught.value.message


@pytest.mark.parametrize(
    "names",
    [("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2")],
)
def test_parse_all_names_of_score_become_one(names: tuple[str, str]) -> None:
    request = parsed(SCORE, model="e", **dict(zip(names, ("a", ["b", "c"]), strict=True)))
    sent = orjson.loads(request.body_for("e"))
    assert sent == {"model": "e", "text_1": "a", "text_2": ["b", "c"]}
    assert request.prompts == request.sequences == 2


NAMES = ("text_1", "text_2", "queries", "documents", "items", "data_1", "data_2")
PAIRS = [{"text_1", "text_2"}, {"queries", "documents"}, {"queries", "items"}, {"data_1", "data_2"}]


@given(st.sets(st.sampled_from(NAMES), min_size=1))
def test_parse_names_of_several_pairs_are_refused(names: set[str]) -> None:
    # An engine that got several pairs would not read the one that limits and guard have seen.
    data = dict.fromkeys(names, "a")
    if names in PAIRS:
        sent = orjson.loads(parsed(SCORE, model="e", **data).body_for("e"))
        assert sent == {"model": "e", "text_1": "a", "text_2": "a"}
    else:
        with pytest.raises(InvalidRequestError):
            parsed(SCORE, model="e", **data)


@pytest.mark.parametrize(("top_n", "sent"), [(0, None), (1, 1), (7, 7), (None, None)])
def test_parse_top_n_of_all_documents_is_left_out(top_n: int | None, sent: int | None) -> None:
    request = parsed(RERANK, model="e", query="q", documents=["a", "b"], top_n=top_n)
    assert orjson.loads(request.body_for("e")).get("top_n") == sent


@pytest.mark.parametrize(
    ("path", "data", "repeated"),
    [
        (RERANK, {"query": "four", "documents": ["a", "b", "c"]}, 8),
        (RERANK, {"query": "four", "documents": ["a"]}, 0),
        (SCORE, {"text_1": "ä", "text_2": ["b"] * 5}, 8),
        (SCORE, {"text_1": ["four"], "text_2": ["b"] * 2}, 4),
        (SCORE, {"text_1": ["four"] * 2, "text_2": ["b"] * 2}, 0),
        (CLASSIFY, {"input": ["four"] * 9}, 0),
    ],
)
def test_repeated_bytes_are_those_of_the_query_for_each_further_document(
    path: str, data: dict[str, Any], repeated: int
) -> None:
    assert repeated_bytes(path, data) == repeated
    request = parsed(path, **data)
    assert request.most_prompt_tokens == len(orjson.dumps(data)) + repeated
