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


def with_agents(url: str) -> dict[str, Any]:
    """OpenAI's Agents SDK: turns by `previous_response_id`, a session, and a conversation."""
    import asyncio

    import agents
    import openai

    async def run() -> dict[str, Any]:
        agents.set_tracing_disabled(True)
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="none")
        agents.set_default_openai_client(client, use_for_tracing=False)
        agent = agents.Agent(name="helper", instructions="Be brief.", model="general")
        ask = agents.Runner.run
        first = await ask(agent, "Say hello.")
        second = await ask(agent, "Again.", previous_response_id=first.last_response_id)
        session = agents.OpenAIConversationsSession(openai_client=client)
        for text in ("Say hello.", "Again."):
            await ask(agent, text, session=session)
        items = await session.get_items()
        await session.clear_session()
        conversation = await client.conversations.create()
        await ask(agent, "Say hello.", conversation_id=conversation.id)
        streamed = agents.Runner.run_streamed(agent, "Again.", conversation_id=conversation.id)
        async for _ in streamed.stream_events():
            pass
        kept = await client.conversations.items.list(conversation.id)
        shown = await client.responses.input_items.list(str(second.last_response_id))
        return {
            "second": second.final_output,
            "shown": len(shown.data),
            "roles": [item.get("role") for item in items],
            "streamed": streamed.final_output,
            "kept": len(kept.data),
        }

    return asyncio.run(run())


CLIENTS = {"litellm": with_litellm, "langchain": with_langchain, "agents": with_agents}

if __name__ == "__main__":
    print("\n" + json.dumps(CLIENTS[sys.argv[1]](sys.argv[2])))
