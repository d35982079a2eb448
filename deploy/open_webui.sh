#!/usr/bin/env bash
# Open WebUI in .cache/open_webui, for the test that drives it in a browser; some 3 GB and minutes,
# so only when asked for: open_webui.sh && pytest -m open_webui. A second run does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

version=0.12.4
folder=.cache/open_webui
# It does not run on Python 3.13.
python=${PYTHON:-python3}
stamp=$( (cat "$0" deploy/torch.sh deploy/locks/torch-cpu.txt; "$python" -V) | sha256sum | cut -d' ' -f1)
[ "$(cat $folder/.ready 2>/dev/null || true)" = "$stamp" ] && exit 0

printf 'open_webui: installing Open WebUI %s into %s\n' "$version" "$folder" >&2
rm -rf $folder
mkdir -p $folder
"$python" -m venv $folder/venv
# First the CPU build: what comes after would take the one for GPUs.
deploy/torch.sh $folder/venv
$folder/venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --require-hashes \
    -r deploy/locks/tools/uv.txt 2> >(grep -v '^WARNING' >&2)
$folder/venv/bin/uv pip install --quiet --python $folder/venv/bin/python "open-webui==$version"
printf '%s' "$stamp" >$folder/.ready
