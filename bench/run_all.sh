#!/bin/sh
# Measures everything again and puts the tables and the plot into docs/: sh bench/run_all.sh DATA SCRATCH
# DATA keeps the model between runs; SCRATCH needs 20 GB and is left empty. $PYTHON has tzip, the extra [bench] and the rivals:
#   pip install '.[bench]' zipnn==0.5.4 openzl==0.3.0 z4ai==0.2.0
# More files to compare on: $FILES, absolute, separated by spaces. Other things that run meanwhile spoil the figures.
set -eu
mkdir -p "$1" "$2"
data=$(cd "$1" && pwd) scratch=$(cd "$2" && pwd)
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
"$python" bench/data.py minilm "$data"
[ -f "$data/synthetic_bf16.safetensors" ] ||
    "$python" bench/data.py synthetic "$data/synthetic_bf16.safetensors" --mb 45 --dtype bf16
# shellcheck disable=SC2086
"$python" bench/bench.py "$data/minilm_bf16.safetensors" "$data/minilm_fp16.safetensors" "$data/minilm_fp32.safetensors" \
    "$data/synthetic_bf16.safetensors" ${FILES:-} --rounds 2 --repeat 4 \
    --csv docs/frontier.csv --plot docs/frontier.png --doc docs/BENCHMARKS.md
"$python" bench/segments.py "$data/minilm_bf16.safetensors" --csv docs/segments.csv --doc docs/BENCHMARKS.md
"$python" bench/listing.py "$scratch" --csv docs/listing.csv --doc docs/BENCHMARKS.md
"$python" bench/memory.py "$scratch" --csv docs/memory.csv --doc docs/BENCHMARKS.md
"$python" bench/sizes.py
