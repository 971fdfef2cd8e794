"""Decoding chunks on a GPU (this folder, gpu/, is the package `tzip.gpu`): the same bytes and errors as on the CPU.

`available()` says whether there is a device, and why not. What loads tensors is `Archive.load`. Nothing here imports CuPy
before it is asked for a device.
"""

from tzip.gpu.availability import Availability, available
from tzip.gpu.devices import Device

__all__ = ["Availability", "Device", "available"]
