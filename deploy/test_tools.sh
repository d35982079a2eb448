#!/usr/bin/env bash
# Programs that some tests drive, from Debian's packages: `package:program` each.
# As root they are installed; elsewhere what is missing is named, and its tests skip with that reason.
set -euo pipefail
cd "$(dirname "$0")/.."

tools=(redis-server:redis-server chromium:chromium prometheus:prometheus)

deploy/chart_tools.sh

missing=()
for tool in "${tools[@]}"; do
    command -v "${tool#*:}" >/dev/null || missing+=("${tool%%:*}")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    printf 'tests: not installed, their tests will be skipped: %s\n' "${missing[*]}" >&2
    exit 0
fi
printf 'tests: installing %s\n' "${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >/dev/null 2>&1; then
    printf 'tests: could not install %s: their tests will be skipped\n' "${missing[*]}" >&2
fi
