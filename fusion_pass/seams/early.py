"""What kernels written in CuTe DSL need, begun before AOTAutograd: imports take as long as its tracing.

Dynamo's graph has the linears and attentions, not yet which kernels compute them: those that the tables give to quack
and to FlashAttention 4 as they stand are looked at. Where a kernel of one is not on disk the helper is started that can
compile it, and told to, if nothing that the pass may do changes the call: a kernel takes as long as all that Inductor
does for a few blocks. Which kernels there are to be the pass decides. A graph that comes from the cache finds its
kernels on disk, which need no import (`kernels.shared_library`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx

from dkfuse.kernels import attention_kept, compile_ahead, cute_ahead, gemm_ahead, gemm_kernels

from .. import compat
from ..choosing.choose import resolve_target
from ..matching.rules import Reject
from ..settings import Settings
from . import attention_choice, attention_table, gemm_choice
from .before import FA4
from .gemm import FAMILY


@dataclass(frozen=True)
class Call:
    """A linear of Dynamo's graph: the node that it reads, examples of its operands, and `act` of what follows."""

    read: fx.Node
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    act: str


def start(gm: fx.GraphModule, settings: Settings) -> None:
    """Begin what the kernels of Dynamo's graph need. Without a GPU there is nothing to begin."""
    if not torch.cuda.is_available() or not compile_ahead.allowed():
        return
    attentions, linears = _attentions(gm.graph, settings), _linears(gm.graph, settings)
    if attentions or linears:
        cute_ahead.start()
    for attention in (kind for kind, sure in attentions.items() if sure):
        attention_kept.submit(attention, gemm_kernels.CAPABILITY)
    for linear in (kind for kind, sure in linears.items() if sure):
        gemm_ahead.submit(linear)


# -- linears -----------------------------------------------------------------------------------------------------------


def _linears(graph: fx.Graph, settings: Settings) -> dict[gemm_ahead.Kind, bool]:
    """The kernels of quack's that linears are likely to take and that are not on disk.

    Whether that is all but sure: a linear of what no other reads is not packed with others.
    """
    if settings.gemm == gemm_kernels.CUBLAS or not gemm_ahead.usable():
        return {}
    calls = list(_calls(graph))
    readers = Counter(call.read for call in calls)
    found: dict[gemm_ahead.Kind, bool] = {}
    known: dict[tuple[object, ...], gemm_ahead.Kind | None] = {}
    for call in calls:
        x, weight = call.x, call.weight
        key = (x.shape, x.dtype, x.device, weight.shape, call.bias is not None, call.act)
        if key not in known:
            kind = _kind(call, settings)
            known[key] = kind if kind is not None and not gemm_ahead.on_disk(kind) else None
        if (kind := known[key]) is not None:
            found[kind] = found.get(kind, False) or readers[call.read] == 1
    return found


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
            yield Call(given["input"], x, weight, bias, "gelu" if _is_gelu(node) else "none")


def _value(node: object) -> torch.Tensor | None:
    """The example of an operand, where it is a tensor of known sizes on a GPU."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not compat.is_fake(value) or value.device.type != "cuda":
        return None
    return value if all(isinstance(size, int) for size in (*value.shape, *value.stride())) else None


def _is_gelu(linear: fx.Node) -> bool:
    return any(u.target is F.gelu and u.kwargs.get("approximate") == "tanh" for u in linear.users)


def _kind(call: Call, settings: Settings) -> gemm_ahead.Kind | None:
    x = call.x
    values = {"x": x.new_empty((math.prod(x.shape[:-1]), x.shape[-1])), "weight": call.weight, "bias": call.bias}
    try:
        tiles = gemm_choice.choose(values, call.act, FAMILY, settings, build=False, measure=False)
    except Reject:
        return None
    return gemm_ahead.Kind.of(x.dtype, call.act, call.bias is not None, tiles)


# -- attention ---------------------------------------------------------------------------------------------------------


def _attentions(graph: fx.Graph, settings: Settings) -> dict[attention_kept.Kind, bool]:
    """The kernels of FlashAttention 4's that attentions are likely to take and that are not on disk.

    Whether that is all but sure: where there is no mask, or a boolean one, which mostly says how many keys take part.
    """
    found: dict[attention_kept.Kind, bool] = {}
    if settings.attention not in FA4 or not settings.allows(attention_choice.RULE):
        return found
    if not cute_ahead.fa4_is_known():
        return found
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, node.args, strict=False)) | node.kwargs
            q, k, mask = (_value(given.get(name)) for name in ("query", "key", "attn_mask"))
            masked, causal = given.get("attn_mask") is not None, bool(given.get("is_causal"))
            if q is None or k is None:
                continue
            if (kind := _fa4s(q, k, masked, causal, settings)) is not None and not attention_kept.on_disk(kind):
                sure = not masked or (mask is not None and mask.dtype == torch.bool)
                found[kind] = found.get(kind, False) or sure
    return found


def _fa4s(
    q: torch.Tensor, k: torch.Tensor, masked: bool, causal: bool, settings: Settings
) -> attention_kept.Kind | None:
    if resolve_target(settings.target, q.device) != f"sm{gemm_kernels.CAPABILITY}" or q.dim() != 4 or k.dim() != 4:
        return None
    batch, heads, queries, width = q.shape
    speeds = attention_table.nearest(gemm_kernels.CAPABILITY, width, batch * heads, queries, k.shape[2], masked)
    if settings.attention == "auto":
        rival = attention_table.DENSE if masked else "cudnn"
        if speeds is None or causal or speeds.get("fa4", 0.0) < attention_choice.MARGIN * speeds[rival]:
            return None
        taken = attention_table.microseconds(width, batch * heads, queries, k.shape[2], speeds["fa4"])
        if taken < attention_choice.LAUNCH_BOUND:
            return None
    groups = heads // (k.shape[1] or 1)
    return attention_kept.Kind.of(q.dtype, width, groups, causal, masked)
