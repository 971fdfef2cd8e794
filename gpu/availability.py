"""Whether there is a GPU that can decode, and why not."""

import importlib.util
from dataclasses import dataclass

OLDEST = (7, 5)  # compute capability: the kernels are compiled and counted from Turing on


@dataclass(frozen=True, slots=True)
class Availability:
    """What `available()` found: false with a reason, or true with the name of the device."""

    reason: str = ""
    name: str = ""

    def __bool__(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return self.reason or self.name


def available(device: int = 0) -> Availability:
    """Say whether tensors can be decoded on that GPU; the result is false, and says why, when they cannot.

    Imports CuPy when it is installed. Raises nothing.
    """
    if importlib.util.find_spec("cupy") is None:
        return Availability("CuPy is not installed: pip install 'tensor-tzip[cuda13]' (or [cuda12], as the driver is)")
    try:
        import cupy
    except Exception as e:  # its libraries do not load: an ImportError mostly, and whatever else they raise
        return Availability(f"CuPy cannot be imported: {e}")
    runtime = cupy.cuda.runtime
    try:
        if not runtime.driverGetVersion():
            return Availability("there is no NVIDIA driver")
        count = runtime.getDeviceCount()
        if not 0 <= device < count:
            return Availability(f"there is no GPU {device}: the driver knows {count}")
        found = runtime.getDeviceProperties(device)
    except Exception as e:  # CUDARuntimeError: a driver that is too old for this CuPy, a device that is lost
        return Availability(f"the GPU cannot be used: {e}")
    capability = (int(found["major"]), int(found["minor"]))
    name = found["name"].decode() if isinstance(found["name"], bytes) else str(found["name"])
    if capability < OLDEST:
        shown = ".".join(map(str, capability))
        return Availability(f"{name} is too old: compute capability {shown}, and {'.'.join(map(str, OLDEST))} is needed")
    return Availability(name=name)
