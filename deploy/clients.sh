#!/usr/bin/env bash
# Clients of other projects that the tests drive, in .cache/clients: a Python environment
# and a Node package. What can't be had is named, and its tests skip with that reason.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=.cache/clients
say() { printf 'clients: %s\n' "$*" >&2; }

stamp=$( (cat "$0" deploy/clients/* deploy/locks/tools/clients.txt
    .venv/bin/python -V 2>/dev/null || python3 -V) | sha256sum | cut -d' ' -f1)
[ "$(cat $folder/.ready 2>/dev/null || true)" = "$stamp" ] && exit 0
mkdir -p $folder
python=.venv/bin/python
[ -x $python ] || python=python3

say "installing LiteLLM, LangChain, llm and the Agents SDK into $folder"
ready=1
if ! { $python -m venv $folder/venv &&
    $folder/venv/bin/python -m pip install --quiet --no-deps --require-hashes -r deploy/locks/tools/uv.txt &&
    $folder/venv/bin/uv pip install --quiet --no-config --python $folder/venv/bin/python --no-deps --require-hashes \
        -r deploy/locks/tools/clients.txt; } >$folder/log 2>&1; then
    say "could not install the Python clients (see $folder/log): their tests will be skipped"
    ready=
fi
if command -v npm >/dev/null; then
    cp deploy/clients/package.json $folder/
    if ! npm install --prefix $folder --silent --no-audit --no-fund --ignore-scripts >>$folder/log 2>&1; then
        say "could not install the Node client (see $folder/log): its tests will be skipped"
        ready=
    fi
else
    say "npm is not installed: the Node client's tests will be skipped"
fi
[ -z "$ready" ] || printf '%s' "$stamp" >$folder/.ready
