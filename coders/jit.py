"""The one numba decorator of the house, so that its flags are decided once."""

import warnings
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from types import ModuleType
from typing import Any, TypeVar, cast

import numba

PORTABLE, AVX2, AVX512 = "portable", "avx2", "avx512"
_AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vbmi", "avx512vbmi2"})

F = TypeVar("F", bound=Callable[..., object])

_told = False


def kernel(function: F) -> F:
    """Compile `function` with numba: cached, GIL released, never fastmath.

    A kernel takes arrays and integers, writes into arrays that it is given and returns an int status. It
    allocates nothing, raises nothing, and calls only kernels of its own file, or of those whose `stamp` it closes over:
    numba's cache is keyed on one file and does not notice edits in others (measured; tests/test_house.py enforces it).
    """
    return _compiled(function, nogil=True)


def quick_kernel(function: F) -> F:
    """Compile a kernel that takes a few microseconds: it keeps the GIL.

    Giving it up and getting it back takes longer, as soon as another thread wants it.
    """
    return _compiled(function, nogil=False)


def stamp(*modules: ModuleType) -> int:
    """Return a number that changes whenever the source of one of these modules does.

    numba's cache knows of the file of a kernel and of what the kernel closes over, and of nothing else. A kernel that
    calls kernels of other files closes over the stamp of these (tests/test_house.py enforces it).
    """
    found = 0
    for module in modules:
        # Where there are no sources, as in a zip file, numba caches nothing.
        with suppress(OSError), open(str(module.__file__), "rb") as file:
            found = zlib.crc32(file.read(), found)
    return found


def _compiled(function: F, *, nogil: bool) -> F:
    try:
        compiled = numba.njit(nogil=nogil, cache=True, error_model="numpy")(function)
    except RuntimeError as e:  # neither the install nor the home folder can be written
        global _told
        if not _told:
            _told = True
            warnings.warn(f"tzip compiles its kernels anew in every process: {e}", RuntimeWarning, stacklevel=3)
        compiled = numba.njit(nogil=nogil, error_model="numpy")(function)
    return cast(F, compiled)


_SLOW_START = 1 << 30  # bytes
_ready: set[int] = set()
_worked: dict[int, int] = {}
_eager = False


def ready(function: Any, arguments: tuple[object, ...], nbytes: int) -> bool:
    """Say whether to call a kernel that takes seconds to compile, for work of `nbytes` that can be done otherwise.

    Yes when it is compiled, in this process or in numba's cache, or when this process has done so much of that work that a
    few seconds once for all are nothing: the first `pack` of a small file is not to wait for them (90 MB: 8 seconds, else 15).
    """
    key = id(function)
    if key in _ready:
        return True
    if key not in _worked:
        _worked[key] = _SLOW_START if _eager or _is_cached(function, arguments) else 0
    _worked[key] += nbytes
    if _worked[key] < _SLOW_START:
        return False
    _ready.add(key)
    return True


def _is_cached(function: Any, arguments: tuple[object, ...]) -> bool:
    type_of: Any = numba.typeof
    try:
        found = function._cache
        key = found._index_key(tuple(map(type_of, arguments)), function.targetctx.codegen())
        return key in found._cache_file._load_index()
    except (AttributeError, OSError, ValueError):  # no public way to ask; a numba without these compiles when it is worth it
        return False


def compile_eagerly() -> None:
    """Let every kernel be compiled when it is first of use, in this process."""
    global _eager
    _eager = True


@cache
def tier() -> str:
    """Return which kernels to use: AVX512 or AVX2 where numba compiles for a CPU that has them, else PORTABLE.

    What counts is the target that numba was told to compile for (NUMBA_CPU_NAME, NUMBA_CPU_FEATURES), not the CPU: an
    instruction that the target lacks ends the process without an exception. All tiers give the same bytes.
    """
    from numba.core.registry import cpu_target

    try:
        codegen = cpu_target.target_context.codegen()
        name, features = str(codegen._get_host_cpu_name()), str(codegen._get_host_cpu_features())
    except AttributeError:  # no public way to ask; a numba without these gets the portable kernels
        return PORTABLE
    told = set(features.split(","))
    if {f[1:] for f in told if f.startswith("+")} >= _AVX512:
        return AVX512
    if "+avx2" in told or ("-avx2" not in told and _adds_in_ymm(name, features)):
        return AVX2
    return PORTABLE


def _adds_in_ymm(name: str, features: str) -> bool:
    """Return whether code for the CPU `name` adds eight integers at once: it may imply what `features` leave out."""
    from llvmlite import binding

    eight = "<8 x i32>"
    source = f"define {eight} @add({eight} %a, {eight} %b) {{\n%c = add {eight} %a, %b\nret {eight} %c\n}}"
    target = binding.Target.from_triple(binding.get_process_triple())
    machine = target.create_target_machine(cpu=name, features=features)
    code = machine.emit_assembly(binding.parse_assembly(source))
    return any("vpaddd" in line and "ymm" in line for line in code.splitlines())
