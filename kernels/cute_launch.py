"""Compiling CuTe DSL kernels once per key, and launching them on the current stream.

A launch passes raw addresses and integers through TVM-FFI: no tensor is wrapped, nothing is allocated, nothing
synchronises, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .cute_key import Seen, layout_signature

MAX_LAUNCHES = 4096
_OLDEST_WITH_FEATURES = 90  # architectures from here on have a name with an "a"

_kernels: dict[Any, Callable[..., None]] = {}
_lock = threading.Lock()


@functools.cache
def architecture(device: int | None) -> str:
    """As the compiler names it; without a GPU CUTE_DSL_ARCH, or Hopper."""
    if device is None or not torch.cuda.is_available():
        return os.environ.get("CUTE_DSL_ARCH", "sm_90a")
    major, minor = torch.cuda.get_device_capability(device)
    number = 10 * major + minor
    return f"sm_{number}a" if number >= _OLDEST_WITH_FEATURES else f"sm_{number}"


def compiled(key: Any, arch: str, build: Callable[[Any, str], Callable[..., None]]) -> Callable[..., None]:
    """The kernel of `key` for `arch`, from build(key, compiler options) when it is first asked for."""
    entry = (key, arch)
    if entry not in _kernels:
        with _lock:
            if entry not in _kernels:
                _kernels[entry] = build(key, f"--enable-tvm-ffi --gpu-arch {arch}")
    return _kernels[entry]


def compiled_keys() -> list[Any]:
    """The keys that were compiled in this process, for any architecture."""
    return [key for key, _ in _kernels]


@dataclass(frozen=True)
class Launch:
    """A kernel with everything but the addresses. names: the tensors whose addresses it takes, in order.

    strides, sizes: integers as TVM-FFI arrays, which a call hands over without converting them again.
    """

    kernel: Callable[..., None]
    names: tuple[str, ...]
    strides: Any
    sizes: Any
    rows: int
    eps: float
    device: int

    def __call__(self, tensors: Mapping[str, Any]) -> None:
        """Run on `tensors` of the layouts that it was made for, on the current stream of their device."""
        if self.device != torch.cuda.current_device():
            with torch.cuda.device(self.device):
                return self(tensors)
        addresses = tuple([tensors[name].data_ptr() for name in self.names])
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        return self.kernel(addresses, self.strides, self.sizes, self.rows, self.eps, stream)


def launch_for(kernel: Callable[..., None], seen: Seen, eps: float, device: int | None) -> Launch:
    """The launch of what `see_norm` or `see_rope` saw; strides and sizes may be symbols where nothing is launched."""
    import tvm_ffi

    strides, sizes = tuple(seen.strides), tuple(seen.sizes)
    if device is not None:
        strides, sizes = tvm_ffi.convert(strides), tvm_ffi.convert(sizes)
    names = tuple(operand.name for operand in seen.key.operands)
    return Launch(kernel, names, strides, sizes, seen.rows, float(eps), -1 if device is None else device)


@dataclass(frozen=True)
class Host:
    """The host side of a kernel: `prepare` and `run` as `registry` asks for them.

    see: the key and integers of a call. build: compiles the kernel of a key, see `compiled`. inputs, outputs: names of
    the tensors that a launch depends on; values: of the other arguments that it does.
    """

    see: Callable[[Mapping[str, Any], Mapping[str, Any]], Seen]
    build: Callable[[Any, str], Callable[..., None]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: tuple[str, ...]
    launches: dict[tuple[Any, ...], Launch] = field(default_factory=dict)

    def prepare(self, arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Compile the kernel of such a call, also for fake tensors and without a GPU."""
        self._launch_of(arguments, outputs)

    def run(self, arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        """Run a call; its launch is made once, and the launches are forgotten when there are MAX_LAUNCHES."""
        x = arguments["x"]
        if x.numel() == 0:
            return
        parts = layout_signature(self.inputs, arguments) + layout_signature(self.outputs, outputs)
        parts += [arguments.get(name) for name in self.values]
        parts.append(x.device)
        signature = tuple(parts)
        launch = self.launches.get(signature)
        if launch is None:
            if len(self.launches) >= MAX_LAUNCHES:
                self.launches.clear()
            launch = self.launches[signature] = self._launch_of(arguments, outputs)
        launch({**arguments, **outputs})

    def _launch_of(self, arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> Launch:
        """The launch of a call, compiled if need be."""
        device = arguments["x"].device
        seen = self.see(arguments, outputs)
        index = device.index if device.type == "cuda" else None
        kernel = compiled(seen.key, architecture(index), self.build)
        return launch_for(kernel, seen, arguments["eps"], index)
