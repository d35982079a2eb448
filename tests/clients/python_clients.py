"""Drives one client of another project and prints what it got, as JSON.

Runs in the environment of deploy/clients.sh: `python python_clients.py CLIENT URL`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

HELLO = [{"role": "user", "content": "Say hello."}]
PLACE = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}},
    "required": ["city"],
    "additionalProperties": False,
}


def with_litellm(url: str) -> dict[str, Any]:
    """Its completion function, whole and streamed, and its typed errors."""
    import litellm

    given: dict[str, Any] = {"api_base": url + "/v1", "api_key": "none", "max_tokens": 8}
    whole = litellm.completion("openai/auto", HELLO, **given)
    stream = litellm.completion("openai/general", HELLO, stream=True, **given)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    try:
        litellm.completion("openai/nobody", HELLO, num_retries=0, **given)
    except litellm.NotFoundError as error:
        fault = type(error).__name__
    return {"whole": whole.choices[0].message.content, "stream": text, "fault": fault}


def with_langchain(url: str) -> dict[str, Any]:
    """A chat model: whole, streamed, with a schema, and its typed errors."""
    import openai
    from langchain_openai import ChatOpenAI

    def model(name: str, most: int) -> Any:
        return ChatOpenAI(
            model=name, base_url=url + "/v1", api_key="none", max_tokens=most, temperature=0
        )

    whole = model("auto", 8).invoke("Say hello.")
    stream = "".join(chunk.content for chunk in model("general", 8).stream("Say hello."))
    schema = {**PLACE, "title": "place", "description": "a place"}
    place = model("math", 120).with_structured_output(schema, method="json_schema")
    try:
        model("nobody", 8).invoke("Say hello.")
    except openai.NotFoundError as error:
        # A subclass of its own; the code is ours.
        fault = str(error.code)
    return {
        "whole": whole.content,
        "expert": whole.response_metadata["model_name"],
        "stream": stream,
        "place": place.invoke("Say hello."),
        "fault": fault,
    }


CLIENTS = {"litellm": with_litellm, "langchain": with_langchain}

if __name__ == "__main__":
    print("\n" + json.dumps(CLIENTS[sys.argv[1]](sys.argv[2])))
