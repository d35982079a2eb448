#!/usr/bin/env bash
# Installs the CPU build of torch into the virtual environment given: torch.sh VENV VERSION.
set -euo pipefail
python=$1/bin/python torch=$2 uv=0.13.9

# Where pip is configured to find the CPU build, it comes from there; else uv
# knows PyTorch's own index.
"$python" -m pip --disable-pip-version-check install --quiet --no-deps "torch==$torch+cpu" 2>/dev/null && exit 0
"$python" -m pip --disable-pip-version-check install --quiet "uv==$uv"
"$1/bin/uv" pip install --quiet --python "$python" --no-deps --torch-backend cpu "torch==$torch" ||
    { printf "can't get the CPU build of torch %s\n" "$torch" >&2; exit 1; }
