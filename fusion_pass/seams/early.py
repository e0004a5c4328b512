"""Helpers that compile quack's kernels, started before AOTAutograd: their imports take as long as its tracing.

Dynamo's graph has the linears, not yet which kernels compute them: those that the table gives to quack as they stand
are looked at, and for each kernel that is not on disk a helper is started. Which there are to be the pass decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx

from dkfuse.kernels import gemm_ahead, gemm_kernels

from .. import compat
from ..matching.rules import Reject
from ..settings import Settings
from . import gemm_choice
from .gemm import FAMILY

Call = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", str]  # x, weight, bias and what follows


def start(gm: fx.GraphModule, settings: Settings) -> None:
    """Start a helper for each kernel that a linear of Dynamo's graph is likely to need and that is not on disk."""
    if settings.gemm == gemm_kernels.CUBLAS or not torch.cuda.is_available() or not gemm_ahead.usable():
        return
    known: set[tuple[object, ...]] = set()
    kinds: set[gemm_ahead.Kind] = set()
    for x, weight, bias, act in _calls(gm.graph):
        key = (x.shape, x.dtype, x.device, weight.shape, bias is not None, act)
        if key in known:
            continue
        known.add(key)
        if (kind := _kind(x, weight, bias, act, settings)) is not None and not gemm_ahead.on_disk(kind):
            kinds.add(kind)
    if kinds:
        gemm_ahead.start(len(kinds))


def _calls(graph: fx.Graph) -> Iterator[Call]:
    """The linears of known sizes on a GPU."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not F.linear:
            continue
        given = dict(zip(("input", "weight", "bias"), node.args, strict=False)) | node.kwargs
        x, weight, bias = (_value(given.get(name)) for name in ("input", "weight", "bias"))
        if x is None or weight is None or (bias is None and given.get("bias") is not None):
            continue
        if x.dim() > 1 and weight.dim() == 2:
            yield x, weight, bias, "gelu" if _is_gelu(node) else "none"


def _value(node: object) -> torch.Tensor | None:
    """The example of an operand, where it is a tensor of known sizes on a GPU."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not compat.is_fake(value) or value.device.type != "cuda":
        return None
    return value if all(isinstance(size, int) for size in (*value.shape, *value.stride())) else None


def _is_gelu(linear: fx.Node) -> bool:
    return any(u.target is F.gelu and u.kwargs.get("approximate") == "tanh" for u in linear.users)


def _kind(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: str, settings: Settings
) -> gemm_ahead.Kind | None:
    values = {"x": x.new_empty((math.prod(x.shape[:-1]), x.shape[-1])), "weight": weight, "bias": bias}
    try:
        tiles = gemm_choice.choose(values, act, FAMILY, settings, build=False, measure=False)
    except Reject:
        return None
    return gemm_ahead.Kind.of(x.dtype, act, bias is not None, tiles)
