"""The tools that are compared, behind one face: bytes of one element type in, bytes out, and back.

`make(tool, option, dtype, threads)` returns (encode, decode). `encode` takes a bytearray of its own, because zipnn 0.5.4
changes its input; `decode` returns a bytes-like object. Each tool gets what its documentation names for weights.
"""

from collections.abc import Callable
from typing import Any

Encode = Callable[[bytearray], Any]
Decode = Callable[[Any], Any]

_NUMPY = {"F64": "float64", "F32": "float32", "F16": "float16", "I64": "int64", "I32": "int32", "I8": "int8", "U8": "uint8"}
_Z4AI = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64", "I64": "int64", "I32": "int32", "I8": "int8"}
_ZIPNN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
PACKAGE_OF = {"tzip": "tensor-tzip", "zipnn": "zipnn", "openzl": "openzl", "zstd": "zstandard", "z4ai": "z4ai"}


class NotSupportedError(Exception):
    """The tool has no way to say what it gets."""


def parse(text: str) -> tuple[str, str]:
    """Return (tool, option) of a name such as zstd-3, openzl-fse or zipnn."""
    tool, _, option = text.partition("-")
    if tool not in PACKAGE_OF:
        raise SystemExit(f"there is no tool {tool!r}; there are {', '.join(PACKAGE_OF)}")
    return tool, option or {"zstd": "3", "openzl": "fse", "tzip": "default"}.get(tool, "")


def make(tool: str, option: str, dtype: str, threads: int) -> tuple[Encode, Decode]:
    """Return the calls of a tool for elements of a safetensors dtype."""
    return _MAKERS[tool](option, dtype, threads)


def _tzip(option: str, dtype: str, threads: int) -> tuple[Encode, Decode]:
    """LEVEL, LEVEL+out (both ways into memory that exists) or LEVEL+proved (each chunk decoded and compared)."""
    import numpy as np

    import tzip

    level, *extras = option.split("+")
    into = "out" in extras
    if dtype == "BF16":
        import ml_dtypes

        element = np.dtype(ml_dtypes.bfloat16)
    else:
        element = np.dtype(_NUMPY[dtype])
    out: dict[int, Any] = {}  # by size: pages that exist
    room: dict[int, Any] = {}

    def encode(raw: bytearray) -> Any:
        n = len(raw)
        more: dict[str, Any] = {}
        if into:
            if n not in room:
                out[n], room[n] = np.ones(n // element.itemsize, element), np.ones(n + n // 1000 + 8192, np.uint8)
            more["out"] = room[n]
        return tzip.encode(np.frombuffer(raw, element), level=level, threads=threads, prove="proved" in extras, **more)

    def decode(packed: Any) -> Any:
        array = out[next(reversed(out))] if into else None
        return tzip.decode(packed, array, threads=threads).view(np.uint8)

    return encode, decode


def _zipnn(option: str, dtype: str, threads: int) -> tuple[Encode, Decode]:
    import zipnn

    if dtype not in _ZIPNN:
        raise NotSupportedError(f"zipnn has no {dtype}")

    def codec() -> Any:
        return zipnn.ZipNN(input_format="byte", bytearray_dtype=_ZIPNN[dtype], threads=threads)

    return lambda raw: codec().compress(raw), lambda packed: codec().decompress(packed)


def _openzl(option: str, dtype: str, threads: int) -> tuple[Encode, Decode]:
    """OpenZL's float graphs: exponents through FSE or Huffman; the other bytes stored (bf16) or through its own choice."""
    import numpy as np
    import openzl.ext as zl

    c = zl.Compressor()
    exponents = {"fse": zl.graphs.Fse, "huffman": zl.graphs.Huffman}[option]()
    if dtype == "BF16":
        graph = zl.nodes.BFloat16Deconstruct()(c, zl.graphs.Store()(c), exponents(c))
    elif dtype in ("F16", "F32"):
        node = zl.nodes.Float16Deconstruct() if dtype == "F16" else zl.nodes.Float32Deconstruct()
        graph = node(c, zl.nodes.TransposeSplit()(c, zl.graphs.Entropy()(c)), exponents(c))
    else:
        graph = zl.graphs.Compress()(c)
    c.select_starting_graph(graph)
    word = {"F64": np.uint64, "I64": np.uint64, "F32": np.uint32, "I32": np.uint32, "I8": np.uint8, "U8": np.uint8}

    def encode(raw: bytearray) -> bytes:
        context = zl.CCtx()
        context.ref_compressor(c)
        context.set_parameter(zl.CParam.FormatVersion, zl.MAX_FORMAT_VERSION)
        return context.compress([zl.Input(zl.Type.Numeric, np.frombuffer(raw, word.get(dtype, np.uint16)))])

    return encode, lambda packed: zl.DCtx().decompress(packed)[0].content.as_nparray().view(np.uint8)


def _zstd(option: str, dtype: str, threads: int) -> tuple[Encode, Decode]:
    import zstandard

    packer = zstandard.ZstdCompressor(level=int(option), threads=0 if threads == 1 else threads)
    return packer.compress, zstandard.ZstdDecompressor().decompress


def _z4ai(option: str, dtype: str, threads: int) -> tuple[Encode, Decode]:
    import z4ai

    if dtype not in _Z4AI:
        raise NotSupportedError(f"z4ai has no {dtype}")
    return lambda raw: z4ai.compress(raw, dtype=_Z4AI[dtype], threads=threads), z4ai.decompress


_MAKERS = {"tzip": _tzip, "zipnn": _zipnn, "openzl": _openzl, "zstd": _zstd, "z4ai": _z4ai}
