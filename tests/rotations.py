"""How many rotations a model executes, counted without its graph: by the names of the Python functions called.

    executed(module, kwargs)     rotations in one uncompiled forward call

Diffusion transformers rotate in a function of their own, whose name says so; some define it inside of another function,
where it cannot be replaced. So calls are counted with `sys.setprofile`, one per query or key and part of it (text and
image that are rotated apart are two). Helpers inside of such a function are not counted again.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch
from torch import nn

NAME = re.compile(r"apply_.*(rotary|rope)")
TENSORS = {"apply_rope": ("xq", "xk")}  # HiDream rotates a query and a key in one call


def executed(module: nn.Module, kwargs: dict[str, Any]) -> int:
    """Rotations of queries and keys in ``module(**kwargs)``."""
    return sum(calls(module, kwargs).values())


def calls(module: nn.Module, kwargs: dict[str, Any]) -> Counter[str]:
    """The same by "file:function"."""
    found: Counter[str] = Counter()
    inside: list[FrameType] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and not inside and NAME.match(frame.f_code.co_name):
            inside.append(frame)
            file = frame.f_code.co_filename.rsplit("/", 1)[-1]
            names = TENSORS.get(frame.f_code.co_name, ())
            count = sum(isinstance(frame.f_locals.get(name), torch.Tensor) for name in names) if names else 1
            found[f"{file}:{frame.f_code.co_name}"] += count
        elif event == "return" and inside and inside[-1] is frame:
            inside.pop()

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        with torch.no_grad():
            module(**kwargs)
    finally:
        sys.setprofile(before)
    return found
