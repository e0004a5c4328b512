"""How many rotations a model executes, counted without its graph: by the names of the Python functions called.

    executed(module, kwargs)     rotations in one uncompiled forward call
    compiled(module, kwargs)     the sites of rotations in the graphs of the same call, to be compared with

Diffusion transformers rotate in a function of their own, whose name says so; some define it inside of another function,
where it cannot be replaced. So calls are counted with `sys.setprofile`, one per query or key and part of it (text and
image that are rotated apart are two). Helpers inside of such a function are not counted again.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import fx, nn

from dkfuse import Settings, compat, fuse

NAME = re.compile(r"apply_.*(rotary|rope)")
REUSED_GRAPHS = ("mochi", "hidream")  # graph breaks: one compiled graph runs for several blocks
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


def compiled(module: nn.Module, kwargs: dict[str, Any]) -> int:
    """Rotations that dkfuse sees in the graphs of the same call, each graph as often as it runs."""
    runs: list[int] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        def inner(graph_module: fx.GraphModule, _: Any) -> Callable:
            sites = fuse.plan(graph_module.graph, Settings()).record.sites
            count = sum(site.family == "rotation" for site in sites)

            def run(*args: Any) -> Any:
                runs.append(count)
                return graph_module.forward(*args)

            return run

        return compat.lower_with(gm, inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, dynamic=False)(**kwargs)
    torch.compiler.reset()
    return sum(runs)
