"""NVIDIA's management library, as far as energy goes: by ctypes, since it comes with the driver and nothing else."""

from __future__ import annotations

import ctypes
from typing import Any

_OK = 0


class NvmlError(RuntimeError):
    """The library is not there, or does not answer."""


class NvmlCard:
    """One card.

    Args:
        uuid: as torch has it, with or without ``GPU-``.

    Raises:
        NvmlError: the card's energy cannot be read.
    """

    def __init__(self, uuid: str) -> None:
        try:
            self._library: Any = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError as error:
            raise NvmlError(str(error)) from error
        self._call("nvmlInit_v2")
        name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByUUID", name.encode(), ctypes.byref(self._handle))
        self.has_counter = self._counts()
        if not self.has_counter:
            self.watts()

    def _counts(self) -> bool:
        try:
            self.joules()
        except NvmlError:
            return False
        return True

    def joules(self) -> float:
        """Energy since the driver was loaded (Volta and later)."""
        millijoules = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    def watts(self) -> float:
        """Power now."""
        milliwatts = ctypes.c_uint()
        self._call("nvmlDeviceGetPowerUsage", self._handle, ctypes.byref(milliwatts))
        return milliwatts.value / 1e3

    def _call(self, name: str, *arguments: Any) -> None:
        function = getattr(self._library, name, None)
        code = None if function is None else function(*arguments)
        if code != _OK:
            raise NvmlError(f"{name}: {'not there' if code is None else f'error {code}'}")
