"""Keeping eager's roundings where they are amplified: the arguments of sine and cosine.

Models compute ``timestep.to(bf16) * 1000`` and take sines of it. Eager rounds the product to bf16 (3.5 becomes 3504);
Inductor keeps it in fp32 (3500), and the sine is another number: up to 30 % difference in a tiny Flux with random
weights. A model was trained and validated with eager's value. Those products hold a handful of numbers, so each is
sent through the integer of its bits and back, which no compiler can skip.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from ..matching.gain import is_elementwise, is_view
from ..matching.terms import NARROW, getitem_source

aten = torch.ops.aten
prims = torch.ops.prims

WAVES = (aten.sin.default, aten.cos.default)
CASTS = (prims.convert_element_type.default, aten._to_copy.default)
SMALL = 1 << 16  # elements


def keep_roundings(graph: fx.Graph) -> int:
    """Pin every rounding of a small tensor that feeds a sine or cosine; returns how many."""
    pending = [a for node in graph.nodes if node.target in WAVES for a in node.all_input_nodes]
    seen: set[fx.Node] = set()
    pinned = 0
    while pending:
        node = pending.pop()
        carries = node.op == "call_function" and (is_elementwise(node) or is_view(node) or getitem_source(node))
        if node in seen or not carries or not _is_small(node):
            continue
        seen.add(node)
        if is_elementwise(node) and node.meta["val"].dtype in NARROW and node.target not in CASTS:
            _pin(graph, node)
            pinned += 1
        pending += node.all_input_nodes
    return pinned


def _is_small(node: fx.Node) -> bool:
    """Few elements, symbolic dims (a batch) not counted."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and math.prod(s for s in val.shape if isinstance(s, int)) <= SMALL


def _pin(graph: fx.Graph, node: fx.Node) -> None:
    readers = list(node.users)
    value = node.meta["val"]
    with graph.inserting_after(node):
        bits = graph.call_function(aten.view.dtype, (node, torch.int16))
    bits.meta["val"] = value.view(torch.int16)
    with graph.inserting_after(bits):
        back = graph.call_function(aten.view.dtype, (bits, value.dtype))
    back.meta["val"] = value
    for reader in readers:
        reader.replace_input_with(node, back)
