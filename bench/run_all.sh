#!/bin/sh
# Measures everything again and puts the tables and the plot into docs/: sh bench/run_all.sh DATA SCRATCH
# DATA keeps the model between runs; SCRATCH needs 20 GB and is left empty. $PYTHON has tzip, the extra [bench], torch and the rivals:
#   pip install '.[bench]' torch zipnn==0.5.4 openzl==0.3.0 z4ai==0.2.0
# $MB: size of the synthetic input of bench.py (1000 needs 20 GB of memory: each tool has a process). $RAM: a folder in a
# memory file system with 3 GB. $RUN: checkpoints of one training run, the newest first, for deltas.py. More files to compare on: $FILES, absolute, separated by spaces. Other things that run
# meanwhile spoil the figures. $FAMILY: a folder that `bench/hub.py make` has filled. All of it takes about 20 minutes.
set -eu
mkdir -p "$1" "$2"
data=$(cd "$1" && pwd) scratch=$(cd "$2" && pwd)
python=${PYTHON:-python3}
mb=${MB:-256}
doc=docs/BENCHMARKS.md
cd "$(dirname "$0")/.."
"$python" bench/data.py minilm "$data"
mkdir -p "$data/$mb"
synthetic=$data/$mb/synthetic_bf16.safetensors
[ -f "$synthetic" ] || "$python" bench/data.py synthetic "$synthetic" --mb "$mb" --dtype bf16
bf16=$data/minilm_bf16.safetensors fp32=$data/minilm_fp32.safetensors
"$python" bench/sizes.py
# shellcheck disable=SC2086
"$python" bench/bench.py "$bf16" "$data/minilm_fp16.safetensors" "$fp32" ${FILES:-} "$synthetic" \
    --csv docs/frontier.csv --plot docs/frontier.png --targets docs/targets.csv --doc $doc
"$python" bench/tiers.py "$bf16" --csv docs/tiers.csv --doc $doc
"$python" bench/threads.py "${RAM:-/dev/shm}" --csv docs/threads.csv --doc $doc
"$python" bench/cold.py "$fp32" "$scratch" --csv docs/cold.csv --doc $doc
"$python" bench/structured.py "$data" --csv docs/structured.csv --doc $doc
"$python" bench/segments.py "$bf16" --csv docs/segments.csv --doc $doc
"$python" bench/listing.py "$scratch" --csv docs/listing.csv --doc $doc
# shellcheck disable=SC2086
[ -z "${RUN:-}" ] || "$python" bench/deltas.py $RUN --csv docs/deltas.csv --doc $doc
if [ -n "${FAMILY:-}" ]; then
    "$python" bench/hub.py family "$FAMILY" --csv docs/family.csv --doc $doc
    "$python" bench/hub.py record "$FAMILY" "$scratch/times.json"
    "$python" bench/hub.py simulate "$scratch/times.json" --csv docs/hub.csv --doc $doc
    rm "$scratch/times.json"
fi
"$python" bench/loading.py "$scratch" --csv docs/loading.csv --doc $doc
"$python" bench/memory.py "$scratch" --csv docs/memory.csv --doc $doc
