"""Loading and launching compiled CUDA kernels through the driver, by ctypes: no package beside torch is needed."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

import torch

_INVALID_CONTEXT = 201
_CAPTURE_RELAXED = 2
_modules: list[Any] = []  # loaded for as long as the process lives


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check(status: int, doing: str) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    raise RuntimeError(f"the CUDA driver failed {doing}: {(text.value or b'unknown error').decode()} ({status}).")


def _bind(device: int) -> None:
    """Make the context that torch uses on `device` current in this thread, which may be new."""
    driver, handle, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    _check(driver.cuDeviceGet(ctypes.byref(handle), device), "finding the device")
    _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "retaining its context")
    _check(driver.cuCtxSetCurrent(context), "making its context current")


class Kernel:
    """A kernel of a binary, on one device, whose only parameter is a ctypes structure."""

    def __init__(self, binary: bytes, name: str, device: int) -> None:
        """Loads the binary. It may be loaded while a stream is captured: the load is no part of the graph."""
        driver, module, self._function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
        torch.cuda.init()
        mode = ctypes.c_int(_CAPTURE_RELAXED)
        with torch.cuda.device(device):
            _bind(device)
            _check(driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "setting the capture mode")
            try:
                _check(driver.cuModuleLoadData(ctypes.byref(module), binary), f"loading {name}")
                _check(
                    driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), f"finding {name}"
                )
            finally:
                driver.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))
        _modules.append(module)
        self.name, self.device = name, device

    def attribute(self, number: int) -> int:
        """`CUfunction_attribute`: 4 registers a thread, 3 local bytes a thread (what spilled)."""
        value = ctypes.c_int()
        _check(_driver().cuFuncGetAttribute(ctypes.byref(value), number, self._function), "reading an attribute")
        return value.value

    def launch(self, blocks: int, threads: int, parameter: ctypes.Structure) -> None:
        """On torch's current stream of the device, which must be the current device."""
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameter))
        grid = (self._function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None)
        status = _driver().cuLaunchKernel(*grid)
        if status == _INVALID_CONTEXT:
            _bind(self.device)
            status = _driver().cuLaunchKernel(*grid)
        _check(status, f"launching {self.name}")
