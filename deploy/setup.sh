#!/usr/bin/env bash
# Makes the environment in .venv from a lock: for the CPU, or with GPU=1 for NVIDIA GPUs. A second
# run with the same lock does nothing, and without GPU it keeps to what is there. GPU=0 goes back.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
python=${PYTHON:-python3}

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
say() { printf 'setup: %s\n' "$*" >&2; }

there=$(cat $venv/.kind 2>/dev/null || true)
# An interrupted run may have left it empty, or none.
case $there in cpu | gpu) ;; *) there=cpu ;; esac
case ${GPU-} in
    '') kind=$there ;;
    0) kind=cpu ;;
    1) kind=gpu ;;
    *) fail "GPU is 1 (install for NVIDIA GPUs) or 0 (for the CPU), not ${GPU}" ;;
esac

command -v "$python" >/dev/null || fail "$python is not installed (apt-get install python3 python3-venv)"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
    fail "Python 3.11, 3.12 or 3.13 is needed, and $python is $("$python" -V 2>&1); name another with PYTHON=…"
# The engine's own libraries need it, and minimal systems are without.
"$python" -c 'import ctypes; ctypes.CDLL("libnuma.so.1")' 2>/dev/null ||
    fail "libnuma is not installed (apt-get install libnuma1)"

lock=deploy/locks/$kind.txt
stamp=$( (cat pyproject.toml "$lock" "$0" deploy/torch.sh deploy/locks/torch-cpu.txt; "$python" -V) | sha256sum | cut -d' ' -f1)
[ "$(cat $venv/.ready 2>/dev/null || true)" = "$stamp" ] && exit 0

if [ $kind = gpu ]; then deploy/gpu_setup_preflight.sh "$python"; fi

# From here on it is half made, and an interrupted run must not pass for a finished one.
rm -f $venv/.ready
if [ -x $venv/bin/pip ] && [ "$there" != $kind ]; then
    say "making $venv anew: it was for the $there"
    # Renamed first: half of an environment, left by an interrupted run, would be taken for a whole one.
    rm -rf $venv.old
    mv $venv $venv.old
fi
rm -rf $venv.old
if [ ! -x $venv/bin/pip ]; then
    say "making $venv"
    "$python" -m venv $venv || fail "can't make $venv (apt-get install python3-venv)"
fi
printf '%s' $kind >$venv/.kind
pip() { $venv/bin/python -m pip --disable-pip-version-check "$@"; }

if [ $kind = cpu ]; then
    say "installing torch, CPU build"
    deploy/torch.sh "$venv" || fail "the CPU build of torch is needed"
fi
if [ $kind = cpu ]; then size="one to three minutes"; else size="10 GB, some ten minutes"; fi
say "installing the locked packages ($size the first time)"
pip install --quiet --no-deps --require-hashes --progress-bar off -r "$lock" 2> >(grep -v '^WARNING' >&2) ||
    fail "installing from $lock failed"
pip install --quiet --no-deps --no-build-isolation -e . 2> >(grep -v '^WARNING' >&2) ||
    fail "installing coe itself failed"
printf '%s' "$stamp" >$venv/.ready
say "ready: $venv ($kind)"
