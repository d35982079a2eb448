"""Many prompts at once: each goes to its own expert, and one engine runs them in one batch.

python examples/many_at_once.py
"""

import asyncio
import os
from collections import Counter

from openai import AsyncOpenAI

PROMPTS = [
    "Tell me a joke",
    "A farmer has 12 cows and buys 7 more. How many cows?",
    "please freeze my bank account",
    "Write a Python function that adds two numbers",
    "what is my account balance",
    "Tom reads 4 pages a day. How many pages does he read in a week?",
]


async def main() -> None:
    """Ask all of them, and count who answered."""
    url = os.environ.get("COE_URL", "http://127.0.0.1:8000")
    key = os.environ.get("COE_API_KEY", "unused")
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client:

        async def ask(prompt: str) -> tuple[str, str]:
            reply = await client.chat.completions.create(
                model="auto", messages=[{"role": "user", "content": prompt}], max_tokens=24
            )
            return reply.model, prompt

        answered = await asyncio.gather(*map(ask, PROMPTS))
    for expert, prompt in answered:
        print(f"{expert:<10}{prompt}")
    print(dict(Counter(expert for expert, _ in answered)))


asyncio.run(main())
