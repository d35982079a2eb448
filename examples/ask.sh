#!/usr/bin/env bash
# One prompt by curl; the headers tell which expert answered, why, and where the time went.
set -euo pipefail
url=${COE_URL:-http://127.0.0.1:8000}

curl -sS -i --fail-with-body "$url/v1/chat/completions" -H 'content-type: application/json' -d '{
  "model": "auto",
  "max_tokens": 48,
  "messages": [{"role": "user", "content": "please freeze my bank account"}]
}'
