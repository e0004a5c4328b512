"""Whether a graph's launches take the CPU longer than the GPU needs for its work, by static facts.

    gpu = sum of max(flops / speed, bytes / memory) over GEMMs, convolutions and attentions
          + (their activations, once more) / memory            what lies between reads or writes each of them
    cpu = 20 us * (2.4 * (GEMMs + convolutions + attentions) + 1 * GEMMs of up to 16 rows, counted here alone)
    a kernel whose calls cost the CPU `extra` more is left out where     cpu + calls * extra > gpu

flops: 2 M N K of a GEMM, 4 B H S Sk d of an attention. The GPU's figures are what an H100 reaches in whole models (a
GEMM at its power limit), the CPU's were measured on its host without CUDA graphs: Inductor's PixArt-Sigma launches 2.4
kernels per GEMM or attention, one each 20 us; a modulation of one vector per sample is a GEMM of few rows, with nothing
of its own to launch besides. Both are rough, and reason only not to take a kernel for its GPU time where that is not
what the forward waits for. Of a graph with work of unknown size (symbols without an example, other libraries' ops)
nothing is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .. import compat
from .attention_call import OPS as ATTENTIONS
from .attention_call import Call

aten = torch.ops.aten
GEMM_SPEED, ATTENTION_SPEED, MEMORY = 600e12, 500e12, 2.5e12  # FLOP/s, FLOP/s, bytes/s
LAUNCH, LAUNCHES = 20e-6, 2.4  # seconds of CPU, and how many for a GEMM or an attention with what belongs to it
FEW_ROWS = 16
KNOWN = ("aten", "prims", "inductor", "dkfuse")  # namespaces whose other ops are small work

# where the factors are among the arguments
GEMMS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten._addmm_activation.default: (1, 2),
    aten._scaled_mm.default: (0, 1),
    aten._int_mm.default: (0, 1),
    aten.convolution.default: (0, 1),
}
FLAT = (aten.mm.default, aten.addmm.default)  # whose rows are the first operand's


@dataclass(frozen=True)
class Load:
    """A graph's estimated GPU work and launches, both in seconds, and how many attentions there are of each kind."""

    gpu: float
    cpu: float
    alike: Counter[Any]

    def too_slow(self, call: Call, extra: float) -> str | None:
        """Why a kernel that costs the CPU `extra` us more in each call like `call` is left out; None where it is not.

        No kernel is where it costs nothing more, nor under CUDA graphs, which are launched at once.
        """
        more = extra * 1e-6 * self.alike[_kind(call)]
        if extra <= 0 or self.cpu + more <= self.gpu or compat.inductor_config("triton.cudagraphs"):
            return None
        return (
            f"bound by the CPU: ~{_ms(self.gpu)} ms of GPU work, ~{_ms(self.cpu)} ms of launches, "
            f"to which it would add {_ms(more)} ms"
        )


def load(graph: fx.Graph, calls: Iterable[Call]) -> Load | None:
    """The load of `graph`, whose attentions are `calls`; None where the size of some work is not known."""
    gpu, launches = 0.0, 0.0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        factors = GEMMS.get(node.target)
        if factors is not None:
            nodes, speed = [node.args[i] for i in factors], GEMM_SPEED
        elif node.target in ATTENTIONS:
            nodes, speed = [node.args[i] for i in range(3)], ATTENTION_SPEED
        elif getattr(node.target, "namespace", "aten") in KNOWN:
            continue
        else:
            return None
        operands, written = [n.meta.get("val") for n in nodes], node.meta.get("val")
        written = written[0] if isinstance(written, (tuple, list)) else written
        if not all(isinstance(t, torch.Tensor) for t in (*operands, written)):
            return None
        read = operands[:1] if factors is not None else operands  # what is not a weight
        flops = _gemm(node, *operands) if factors is not None else _attention(*operands)
        moved, between = _bytes(*operands, written), _bytes(*read, written)
        if flops is None or moved is None or between is None:
            return None
        few = node.target in FLAT and compat.hint(operands[0].shape[0]) in range(FEW_ROWS + 1)
        launches += 1 if few else LAUNCHES
        gpu += max(flops / speed, moved / MEMORY) + between / MEMORY
    return Load(gpu, LAUNCH * launches, Counter(_kind(c) for c in calls))


def _kind(call: Call) -> Any:
    return call.sizes(), not call.counted


def _gemm(node: fx.Node, a: torch.Tensor, b: torch.Tensor) -> int | None:
    if node.target is not aten.convolution.default:
        return _product(2, *a.shape, b.shape[-1])
    transposed = bool(node.args[6]) if len(node.args) > 6 else False
    each = a if transposed else node.meta["val"]  # every element of it meets one filter
    return _product(2, *each.shape, *b.shape[1:])


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int | None:
    return _product(2, *q.shape[:-1], k.shape[-2], q.shape[-1] + v.shape[-1])


def _bytes(*tensors: torch.Tensor) -> int | None:
    sizes = [_product(t.element_size(), *t.shape) for t in tensors]
    return None if None in sizes else sum(s for s in sizes if s is not None)


def _product(*sizes: Any) -> int | None:
    found = 1
    for size in map(compat.hint, sizes):
        if size is None:
            return None
        found *= size
    return found


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2g}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"
