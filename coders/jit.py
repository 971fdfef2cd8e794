"""The one numba decorator of the house, so that its flags are decided once."""

import warnings
from collections.abc import Callable
from functools import cache
from typing import TypeVar, cast

import numba

PORTABLE, AVX512 = "portable", "avx512"
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vbmi2"})

F = TypeVar("F", bound=Callable[..., object])

_told = False


def kernel(function: F) -> F:
    """Compile `function` with numba: cached, GIL released, never fastmath.

    A kernel takes arrays and integers, writes into arrays that it is given and returns an int status. It
    allocates nothing, raises nothing, and calls only kernels of its own file: numba's cache is keyed on one
    file and does not notice edits in others (measured; tests/test_house.py enforces it).
    """
    try:
        compiled = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError as e:  # neither the install nor the home folder can be written
        global _told
        if not _told:
            _told = True
            warnings.warn(f"tzip compiles its kernels anew in every process: {e}", RuntimeWarning, stacklevel=2)
        compiled = numba.njit(nogil=True, error_model="numpy")(function)
    return cast(F, compiled)


@cache
def tier() -> str:
    """Return which kernels to use: AVX512 where numba compiles for a CPU that has them, else PORTABLE.

    What counts is the target that numba was told to compile for (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES), not the CPU: an
    instruction that the target lacks ends the process without an exception. All tiers give the same bytes.
    """
    from numba.core.registry import cpu_target

    try:
        features = cpu_target.target_context.codegen()._get_host_cpu_features()
    except AttributeError:  # no public way to ask; a numba without this one gets the portable kernels
        return PORTABLE
    return AVX512 if {f[1:] for f in str(features).split(",") if f.startswith("+")} >= _AVX512 else PORTABLE
