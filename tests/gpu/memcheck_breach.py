"""A provider whose results are right, and whose kernel reads one element behind the end of x's buffer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from dkfuse.kernels import provider_native, registry


@triton.jit
def read_one(x, into, element):
    tl.store(into, tl.load(x + element))


def run(arguments: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    x = arguments["x"]
    provider_native.run("scale_shift", arguments, outputs)
    elements = x.untyped_storage().nbytes() // x.element_size()
    read_one[(1,)](x, torch.empty(1, dtype=x.dtype, device=x.device), elements - x.storage_offset())


def offer() -> None:
    registry.register(registry.Implementation("scale_shift", "breach", (), run))
