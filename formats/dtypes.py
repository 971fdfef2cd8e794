"""The closed table of element types (FORMAT.md, section 3)."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Dtype:
    """One element type: wire id, safetensors name, bits, and how numpy (or ml_dtypes) names it, None where it cannot."""

    wire_id: int
    name: str
    bits: int
    numpy_name: str | None
    coding: str  # which split suits it, see archiver/plan.py
    width: int  # bytes of the elements that are coded: those of one part for complex types, 1 for sub-byte types

    def nbytes(self, elements: int) -> int:
        """Return the bytes of that many elements."""
        return -(-elements * self.bits // 8)

    def numpy(self) -> "np.dtype[Any] | None":
        """Return the numpy dtype, or None."""
        if self.numpy_name is None:
            return None
        try:
            return np.dtype(self.numpy_name)
        except TypeError:
            import ml_dtypes  # registers its names with numpy

            found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.numpy_name))
            return found


OPAQUE = Dtype(0, "opaque", 8, None, "opaque", 1)
DTYPES = {
    d.wire_id: d
    for d in (
        OPAQUE,
        Dtype(1, "BOOL", 8, "bool", "planes", 1),
        Dtype(2, "U8", 8, "uint8", "planes", 1),
        Dtype(3, "I8", 8, "int8", "planes", 1),
        Dtype(4, "F4", 4, "float4_e2m1fn", "planes", 1),
        Dtype(5, "F6_E2M3", 6, None, "planes", 1),
        Dtype(6, "F6_E3M2", 6, None, "planes", 1),
        Dtype(7, "F8_E5M2", 8, "float8_e5m2", "planes", 1),
        Dtype(8, "F8_E4M3", 8, "float8_e4m3fn", "planes", 1),
        Dtype(9, "F8_E8M0", 8, "float8_e8m0fnu", "planes", 1),
        Dtype(10, "F8_E4M3FNUZ", 8, "float8_e4m3fnuz", "planes", 1),
        Dtype(12, "F8_E5M2FNUZ", 8, "float8_e5m2fnuz", "planes", 1),
        Dtype(13, "I16", 16, "int16", "planes", 2),
        Dtype(14, "U16", 16, "uint16", "planes", 2),
        Dtype(15, "F16", 16, "float16", "f16", 2),
        Dtype(16, "BF16", 16, "bfloat16", "bf16", 2),
        Dtype(17, "I32", 32, "int32", "planes", 4),
        Dtype(18, "U32", 32, "uint32", "planes", 4),
        Dtype(19, "F32", 32, "float32", "f32", 4),
        Dtype(20, "C64", 64, "complex64", "f32", 4),
        Dtype(21, "F64", 64, "float64", "f64", 8),
        Dtype(22, "I64", 64, "int64", "planes", 8),
        Dtype(23, "U64", 64, "uint64", "planes", 8),
        Dtype(24, "C128", 128, "complex128", "f64", 8),
    )
}
BY_NAME = {d.name: d for d in DTYPES.values()}


def from_numpy(dtype: "np.dtype[Any]") -> Dtype | None:
    """Return the element type of a native little-endian numpy dtype, or None when the format has none."""
    return next((d for d in DTYPES.values() if d.numpy_name == dtype.name and dtype.isnative), None)
