#!/usr/bin/env bash
# Builds the documents into .cache/site; `build.sh serve` shows them while they are edited.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=.cache/docs
lock=deploy/locks/docs.txt
mermaid_sha256=07e37dfa97b337ccc85365d57eddf99b9706f09db3b59b260d0333b23b343c4b
say() { printf 'docs: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }

stamp=$( (cat $lock "$0" deploy/docs/package.json; python3 -V) | sha256sum | cut -d' ' -f1)
if [ "$(cat $folder/.ready 2>/dev/null || true)" != "$stamp" ]; then
    say "installing mkdocs-material and mermaid into $folder"
    command -v npm >/dev/null || fail "npm is not installed: the diagrams' program comes with it"
    rm -rf $folder && mkdir -p $folder
    python3 -m venv $folder/venv
    $folder/venv/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes --no-deps -r $lock \
        2> >(grep -v '^WARNING' >&2) || fail "installing from $lock failed"
    cp deploy/docs/package.json $folder/
    npm install --prefix $folder --silent --no-audit --no-fund --ignore-scripts --no-package-lock >/dev/null ||
        fail "installing mermaid failed"
    printf '%s  %s\n' $mermaid_sha256 $folder/node_modules/mermaid/dist/mermaid.min.js | sha256sum --check --quiet ||
        fail "mermaid is not the file that was pinned"
    printf '%s' "$stamp" >$folder/.ready
fi
mkdir -p docs/assets
cp $folder/node_modules/mermaid/dist/mermaid.min.js docs/assets/
# mkdocs-material prints an advertisement unless it is told not to.
export NO_MKDOCS_2_WARNING=1
# `python -m`: a script would keep the path of the folder that it was installed in.
if [ "${1:-build}" = serve ]; then
    exec $folder/venv/bin/python -m mkdocs serve --config-file deploy/docs/mkdocs.yml
fi
$folder/venv/bin/python -m mkdocs build --strict --quiet --config-file deploy/docs/mkdocs.yml
outside=$(grep -rlE '<(script|link|img|iframe)[^>]+(src|href)="(https?:)?//' .cache/site --include='*.html' || true)
[ -z "$outside" ] || fail "these pages load something from another host: $outside"
say "built: .cache/site/index.html"
