"""Stream an answer with the official client, then show who gave it and what it cost.

python examples/stream.py ["your prompt"]
"""

import os
import sys

from openai import OpenAI

prompt = sys.argv[1] if len(sys.argv) > 1 else "Write a Python function that reverses a string"
url = os.environ.get("COE_URL", "http://127.0.0.1:8000")

with OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("COE_API_KEY", "unused")) as client:
    stream = client.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": prompt}],
        max_tokens=120,
        stream=True,
        stream_options={"include_usage": True},
    )
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)

# `usage.coe` is ours: the route, the cost, and milliseconds by stage.
route = (usage.model_extra or {}).get("coe", {}) if usage else {}
print("\n--")
for name in (
    "expert",
    "recipe",
    "cost",
    "route_ms",
    "queue_ms",
    "swap_ms",
    "prefill_ms",
    "decode_ms",
):
    print(f"{name:>10}  {route.get(name)}")
