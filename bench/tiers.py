"""tzip's three tiers of kernels against zipnn: AVX-512 (this CPU), AVX2 and plain x86-64, one core.

    python bench/tiers.py FILE [--repeat 9] [--levels default,fast] [--csv OUT] [--doc DOCUMENT.md]

A tier is a process for which numba compiles for another CPU (NUMBA_CPU_NAME=haswell or generic, NUMBA_CPU_FEATURES=""),
with zipnn beside it in the same process, turn and turn about, as bench.py does it: zipnn is the same machine code
in all three. "x zipnn" is best over best, "(median)" the median of the ratios within the rounds.
"""

import argparse
from pathlib import Path

import common

from bench import figures, run_tools

TIERS = {"native": "", "AVX2": "haswell", "plain": "generic"}
# What was asked for: decoding at default and fast, encoding at both.
TARGETS = {"AVX2": {"default": 2.2, "fast": 2.3, "encode": 1.5}, "plain": {"default": 0.4, "fast": 2.0, "encode": 1.5}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--levels", default="default,fast")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--doc", type=Path, help="a document whose section `tiers` gets the table")
    a = parser.parse_args()
    rows = []
    buffers, _ = common.load_by_dtype(a.file)
    dtype, size = max(((d, len(raw)) for d, raw in buffers.items()), key=lambda kv: kv[1])
    del buffers
    levels = [o for level in a.levels.split(",") for o in (level, f"{level}+out")]
    tools = [("zipnn", ""), *(("tzip", o) for o in levels)]
    job = {"file": str(a.file), "dtype": dtype, "tools": tools, "threads": 1, "repeat": a.repeat, "patience": 60}
    for tier, cpu in TIERS.items():
        common.say(f"{a.file.name} {dtype} {tier}")
        env = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": ""} if cpu else {}
        found = run_tools(job, env)
        for tool, option in tools:
            row = common.facts() | {"file": a.file.name, "tier": tier, "tool": tool, "option": option}
            row |= figures(size, found[tool, option], found["zipnn", ""])
            goals = TARGETS.get(tier, {}) if tool == "tzip" else {}
            row |= {"decode_target": goals.get(option.partition("+")[0], ""), "encode_target": goals.get("encode", "")}
            rows.append(row)
    fields = ("tier", "tool", "option", "percent", "decode_best", "decode_x", "decode_x_median", "decode_target")
    fields += ("encode_best", "encode_x", "encode_x_median", "encode_target")
    columns = ("tier", "tool", "", ">size %", ">decode GB/s", ">x zipnn", ">(median)", ">target")
    columns += (">encode GB/s", ">x zipnn", ">(median)", ">target")
    text = common.markdown(columns, ([r[f] for f in fields] for r in rows))
    text += "\n" + common.stamp(common.command_line("tiers.py"))
    print(text)
    if a.csv:
        common.write_csv(a.csv, rows)
    if a.doc:
        common.replace_section(a.doc, "tiers", text)


if __name__ == "__main__":
    main()
