"""An answer that is held to a JSON schema while it is made.

python examples/json_answer.py
"""

import json
import os

from openai import OpenAI

url = os.environ.get("COE_URL", "http://127.0.0.1:8000")
schema = {
    "type": "object",
    "properties": {
        "animal": {"type": "string", "maxLength": 20},
        "legs": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["animal", "legs"],
    "additionalProperties": False,
}

with OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("COE_API_KEY", "unused")) as client:
    reply = client.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": "Name an animal and how many legs it has."}],
        max_tokens=60,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "animal", "schema": schema},
        },
    )

print(reply.model, json.loads(reply.choices[0].message.content))
