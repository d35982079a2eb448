#!/usr/bin/env bash
# Builds the image: image.sh cpu|gpu [NAME]. With docker, podman or buildah, whichever is there.
# (BUILDER names one.) OPTIONS are passed on to the build (--build-arg BASE=… for a base of your own).
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:-cpu}
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' service/__init__.py)
name=${2:-coe:$version-$target}
read -ra options <<<"${OPTIONS:-}"
case $target in cpu | gpu) ;; *) printf 'image: the targets are cpu and gpu, not %s\n' "$target" >&2; exit 2 ;; esac

tool=${BUILDER:-}
for each in docker buildah podman; do
    # docker's client alone builds nothing.
    [ -n "$tool" ] || ! "$each" info >/dev/null 2>&1 || tool=$each
done
[ -n "$tool" ] || { printf 'image: needs docker (running), podman or buildah\n' >&2; exit 1; }
# Docker's own format has health checks, which OCI's leaves out.
[ "$tool" = docker ] || options+=(--format docker)
export DOCKER_BUILDKIT=1
exec "$tool" build "${options[@]}" --target "$target" --tag "$name" \
    --build-arg VERSION="$version" \
    --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" \
    --build-arg CREATED="$(date -u +%Y-%m-%dT%H:%M:%SZ)" .
