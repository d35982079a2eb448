#!/usr/bin/env bash
# Checks, before 10 GB are fetched, that this machine can run the CUDA build:
# gpu_setup_preflight.sh PYTHON. Its first finding ends it, in one line.
set -euo pipefail
python=$1
# CUDA 13's first driver, and the oldest GPUs that it and vLLM's kernels know (Turing).
least_driver=580
least_capability=7.5
disk_gib=25

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
below() { [ "$1" != "$2" ] && [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n1)" = "$1" ]; }

[ "$(uname -sm)" = "Linux x86_64" ] || fail "the GPU build is for Linux on x86-64, and this is $(uname -sm)"
command -v nvidia-smi >/dev/null ||
    fail "GPU=1, but nvidia-smi is not there: install NVIDIA's driver, $least_driver or newer, or leave GPU=1 out"
# A driver that hangs keeps its tools for ever.
gpus=$(timeout -k 1 30 nvidia-smi --query-gpu=driver_version,compute_cap,name --format=csv,noheader 2>&1) || {
    [ $? -lt 124 ] || fail "GPU=1, but nvidia-smi does not answer; restart the machine, or reload NVIDIA's driver"
    fail "GPU=1, but nvidia-smi fails: $(printf '%s' "$gpus" | head -n1)"
}
[ -n "$gpus" ] || fail "GPU=1, but nvidia-smi lists no GPU"
while IFS=, read -r driver capability name; do
    capability=${capability# } name=${name# }
    [[ $driver =~ ^[0-9.]+$ && $capability =~ ^[0-9.]+$ ]] ||
        fail "GPU=1, but nvidia-smi tells no driver and compute capability: $(printf '%s' "$driver" | tr -cd '[:print:]')"
    ! below "$driver" $least_driver ||
        fail "the driver is $driver, and the CUDA build needs $least_driver or newer: update NVIDIA's driver"
    ! below "$capability" $least_capability ||
        fail "$name has compute capability $capability, and vLLM needs $least_capability or newer"
done <<<"$gpus"
# Triton compiles its bridge to the driver at the first start, Inductor what runs on the CPU.
for tool in gcc g++; do
    command -v $tool >/dev/null || fail "$tool is not installed (apt-get install $tool)"
done
"$python" -c 'import pathlib, sys, sysconfig; sys.exit(not (pathlib.Path(sysconfig.get_paths()["include"]) / "Python.h").exists())' ||
    fail "Python's headers are not installed (apt-get install python3-dev)"
free=$(df --output=avail -BG . | tail -n1 | tr -dc 0-9)
[ "$free" -ge $disk_gib ] || fail "the CUDA build needs $disk_gib GiB of disk here, and $free GiB are free"
