#!/usr/bin/env bash
# Installs the CPU build of torch into the virtual environment given: torch.sh VENV. Only the files
# whose SHA-256 stands in locks/torch-cpu.txt are taken, wherever they come from.
set -euo pipefail
venv=$1 python=$1/bin/python locks=$(dirname "$0")/locks
said=$(mktemp)
trap 'rm -f "$said"' EXIT
fail() { printf 'torch: %s\n' "$*" >&2; exit 1; }

wanted=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$locks/torch-cpu.txt")
is_there() { "$python" -c 'import sys; from importlib.metadata import version; sys.exit(version("torch") != sys.argv[1])' "$wanted" 2>/dev/null; }
is_there && exit 0

# Where pip is configured to find the CPU build, it comes from there.
if "$python" -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes \
    -r "$locks/torch-cpu.txt" 2>"$said"; then
    exit 0
elif grep -q 'DO NOT MATCH THE HASHES' "$said"; then
    fail "the torch $wanted that pip finds is not one of those in $locks/torch-cpu.txt; nothing was installed"
fi
# Else uv knows PyTorch's own index. (Without the project's own settings for uv, which leave torch out.)
"$python" -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes -r "$locks/tools/uv.txt" ||
    fail "can't get uv, which knows where PyTorch has torch $wanted"
"$venv/bin/uv" pip install --quiet --no-config --python "$python" --no-deps --torch-backend cpu --require-hashes \
    -r "$locks/torch-cpu.txt" || fail "can't get the CPU build of torch $wanted"
is_there || fail "torch $wanted is still not there"
