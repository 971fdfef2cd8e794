"""The GPU's kernels compiled by NVRTC, which needs no GPU, for all architectures; registers and instructions have ceilings."""

import ctypes
import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from tzip.gpu.devices import THREADS, source_text

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
# What sm_90 has, rounded up: a ceiling that is broken wants a look at docs/GPU.md, where the figures stand.
REGISTERS = {"huffman_1": 80, "huffman_2": 80, "huffman_4": 96, "rans_1": 64, "rans_2": 64, "rans_4": 72, "sum_stripes": 56,
             "merge_groups": 72}  # fmt: skip
MOST_REGISTERS, MOST_STACK, MOST_SHARED = 102, 320, 32 << 10

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="NVRTC's wheels are for Linux here")


def _nvidia(pattern: str) -> Path:
    """A file of the wheels of NVIDIA that the extra `test` brings."""
    roots = [Path(p) / "nvidia" for p in sys.path if p]
    found = sorted(f for root in roots for f in root.glob(pattern))
    assert found, f"there is no {pattern}: pip install 'tensor-tzip[test]' brings NVRTC and its disassembler"
    return found[-1]


@cache
def cubin(architecture: int) -> bytes:
    """The kernels compiled for an architecture."""
    library = ctypes.CDLL(str(_nvidia("*/lib/libnvrtc.so.1?")))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = source_text().encode()
    assert not library.nvrtcCreateProgram(ctypes.byref(program), source, b"tzip.cu", 0, None, None)
    options = [b"-std=c++17", f"-arch=sm_{architecture}".encode()]
    bad = library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert not bad, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    made = ctypes.create_string_buffer(size.value)
    assert not library.nvrtcGetCUBIN(program, made)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return made.raw


def resources(binary: Path) -> dict[str, dict[str, int]]:
    """What each kernel takes: REG, STACK, SHARED …"""
    done = subprocess.run([_nvidia("*/bin/cuobjdump"), "-res-usage", binary], capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\w+):\s+(REG:.*)", done.stdout)
    return {name: {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", uses)} for name, uses in found}


def listing(binary: Path) -> dict[str, list[tuple[str, str]]]:
    """The instructions of each kernel in order: ("", text), and labels: (name, "")."""
    done = subprocess.run([_nvidia("*/bin/nvdisasm"), "-c", binary], capture_output=True, text=True, check=True)
    kernels: dict[str, list[tuple[str, str]]] = {}
    lines: list[tuple[str, str]] = []
    for line in done.stdout.splitlines():
        if found := re.match(r"\.text\.(\w+):", line):
            lines = kernels.setdefault(found[1], [])
        elif found := re.match(r"\s*(\.L_x_\d+):", line):
            lines.append((found[1], ""))
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ +)?(\S.*?) ;", line):
            lines.append(("", found[1]))
    return kernels


def loops(lines: list[tuple[str, str]]) -> list[list[str]]:
    """The bodies of loops: from a label to a branch back to it."""
    found, at, code = [], {}, []
    for label, text in lines:
        if label:
            at[label] = len(code)
            continue
        code.append(text)
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", text)
        if target and target[1] in at:
            found.append(code[at[target[1]] :])
    return found


def count(body: list[str], name: str) -> int:
    """How many instructions of a loop have that name."""
    return sum(text.split(".")[0].split()[0] == name for text in body)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile(architecture, tmp_path):
    (tmp_path / "k.cubin").write_bytes(cubin(architecture))
    used = resources(tmp_path / "k.cubin")
    assert set(used) == set(THREADS)
    for name, what in used.items():
        assert what["REG"] <= MOST_REGISTERS, (name, what)
        assert what["STACK"] <= MOST_STACK, (name, what)
        assert what["LOCAL"] == 0, (name, what)  # a register that was spilled
        assert what["SHARED"] <= MOST_SHARED, (name, what)


def per_element() -> dict[str, float]:
    """Instructions per element of the loops in which bfloat16 weights are decoded, on sm_90. Printed by `python -m`."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "k.cubin"
        binary.write_bytes(cubin(90))
        code = listing(binary)
    # Sixteen symbols of a stream: 16 look-ups in the table, two words of a ring for every two of them.
    decoding = min(len(b) for b in loops(code["huffman_2"]) if count(b, "LDS") == 32 and count(b, "LDG") == 2)
    # Two rows of a lane, 16 elements each, whose rests have 6 bits: three words each.
    merging = min(len(b) for b in loops(code["huffman_2"]) if count(b, "LDS") == 8 and count(b, "LDG") == 6)
    # From the vote of one step of rANS to that of the next: one look-up, one word, one byte put down.
    votes = [i for i, (label, text) in enumerate(code["rans_2"]) if not label and text.startswith("VOTE")]
    spans = [[text for label, text in code["rans_2"][a:b] if not label] for a, b in pairwise(votes)]
    steps = [len(s) for s in spans if (count(s, "LDS"), count(s, "LDG"), count(s, "STS"), count(s, "POPC")) == (1, 1, 1, 2)]
    assert len(steps) >= 15  # unrolled 16 times
    # A stripe: 64 elements a lane, eight loads; the part that fills its end is another loop within this one.
    summing = min(len(b) for b in loops(code["sum_stripes"]) if count(b, "LDG") >= 8)
    return {
        "huffman": decoding / 16,
        "merge": merging / 32,
        "rans": float(sorted(steps)[len(steps) // 4]),  # others are of the last rows, which are not unrolled
        "sum": summing / 64,
    }


def test_instructions_per_element():
    """The prototype, which had no escapes, no joined bits, no bounds and no sums, took 18.2 with Huffman and 27.5 with rANS."""
    found = per_element()
    assert found["huffman"] <= 11, found
    assert found["merge"] <= 9.5, found
    assert found["rans"] <= 21, found
    assert found["sum"] <= 4, found


def test_registers_of_the_kernels_that_take_the_time(tmp_path):
    (tmp_path / "k.cubin").write_bytes(cubin(90))
    used = resources(tmp_path / "k.cubin")
    for name, most in REGISTERS.items():
        assert used[name]["REG"] <= most, (name, used[name])
