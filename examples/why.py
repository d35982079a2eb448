"""Ask who would answer, and why, without asking anybody: every candidate's utility.

python examples/why.py ["your prompt"]
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
    told = json.load(reply)

print(f"{told['chosen']}  ({told['category']}, {told['confidence']:.0%} sure)\n")
print(f"{'recipe':<28}{'quality':>8}{'wait s':>8}{'answer s':>10}{'utility':>9}")
for one in told["candidates"]:
    times = [one["quality"], one["wait_s"], one["answer_s"], one["utility"]]
    shown = ["–" if value is None else f"{value:.3f}" for value in times]
    print(f"{one['recipe']:<28}{shown[0]:>8}{shown[1]:>8}{shown[2]:>10}{shown[3]:>9}")
