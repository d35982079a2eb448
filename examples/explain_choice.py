"""Show which expert would answer a prompt, and the utility of every candidate.

python examples/explain_choice.py ["your prompt"]
"""

import json
import os
import sys
import urllib.request

prompt = sys.argv[1] if len(sys.argv) > 1 else "A farmer has 12 cows and buys 7 more. How many?"
url = os.environ.get("COE_URL", "http://127.0.0.1:8000")
body = {"model": "auto", "messages": [{"role": "user", "content": prompt}]}

request = urllib.request.Request(
    f"{url}/v1/route",
    json.dumps(body).encode(),
    {
        "content-type": "application/json",
        "authorization": f"Bearer {os.environ.get('COE_API_KEY', 'unused')}",
    },
)
with urllib.request.urlopen(request) as reply:
    decision = json.load(reply)

print(f"{decision['chosen']}  ({decision['category']}, {decision['confidence']:.0%} sure)\n")
print(f"{'recipe':<28}{'quality':>8}{'wait s':>8}{'answer s':>10}{'utility':>9}")
for candidate in decision["candidates"]:
    times = [candidate["quality"], candidate["wait_s"], candidate["answer_s"], candidate["utility"]]
    shown = ["–" if value is None else f"{value:.3f}" for value in times]
    print(f"{candidate['recipe']:<28}{shown[0]:>8}{shown[1]:>8}{shown[2]:>10}{shown[3]:>9}")
