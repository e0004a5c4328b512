"""Random tensor programs for the matcher's property tests, and the meaning of a term, spelled out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from dkfuse import compat
from dkfuse.matching.terms import Term, TermView
from dkfuse.matching.views import apply

Step = Callable[[list[Tensor]], Tensor]
SHAPES = ((2, 3, 4), (2, 3, 4), (2, 1, 4), (4,), (2, 2, 4), (3, 1))


def program_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) + 0.2 for shape in SHAPES]


def trace(function: Callable[..., Any], inputs: list[Tensor]) -> fx.GraphModule:
    """The ATen graph that the pass would see, on fake tensors."""
    return make_fx(function, decomposition_table=compat.decompositions(), tracing_mode="fake")(*inputs)


# -- programs ----------------------------------------------------------------------------------------------------------


def _norm(kind: str, x: Tensor) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], eps=1e-3)
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], eps=1e-3)
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred**2).mean(-1, keepdim=True).add(1e-3).sqrt()


UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "neg": lambda x: -x,
    "half": lambda x: x * 0.5,
    "one_plus": lambda x: 1 + x,
    "one_minus": lambda x: 1 - x,
    "damped": lambda x: x * torch.rsqrt(x.square() + 1),
    "tanh": torch.tanh,
    "clip": lambda x: x.clip(-2, 2),
    "bf16": lambda x: x.bfloat16().float(),
    "mean": lambda x: x.mean(-1, keepdim=True),
    "mean_and_back": lambda x: x.mean(-1).unsqueeze(-1),
    "variance": lambda x: x.var(-1, keepdim=True, unbiased=False),
    "zeros": lambda x: x + torch.zeros(2, 1, 1),
    "layer_norm": lambda x: _norm("layer", x),
    "rms_norm": lambda x: _norm("rms", x),
    "norm_by_hand": lambda x: _norm("by hand", x),
}
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "modulate": lambda n, s: n * (1 + s),
    "distributed": lambda n, s: n + n * s,
    "addcmul": lambda n, s: torch.addcmul(n, n, s),
}


@st.composite
def view_steps(draw: Any, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """A view that tensors of `shape` have."""
    rank = len(shape)
    dim = draw(st.integers(0, rank - 1)) if rank else 0
    kinds = ["unsqueeze"]
    if rank:
        kinds += ["slice", "select", "expand", "split"] + (["squeeze"] if shape[dim] == 1 else [])
    if rank > 1:
        kinds += ["transpose", "flatten"]
    kind = draw(st.sampled_from(kinds))
    if kind == "unsqueeze" and rank < 4:
        return lambda x: x.unsqueeze(dim)
    if kind == "slice" and shape[dim] > 1:
        start = draw(st.integers(0, shape[dim] - 1))
        stop = draw(st.integers(start + 1, shape[dim]))
        return lambda x: x.narrow(dim, start, stop - start)
    if kind == "split" and shape[dim] > 1:
        return lambda x: torch.cat([x.narrow(dim, 0, 1), x.narrow(dim, 1, shape[dim] - 1)], dim)
    if kind == "select" and rank > 1:
        index = draw(st.integers(-shape[dim], shape[dim] - 1))
        return lambda x: x.select(dim, index)
    if kind == "expand" and shape[dim] == 1:
        sizes = [*shape[:dim], 2, *shape[dim + 1 :]]
        after = draw(st.sampled_from(["", "flatten", "select"]))
        if after and rank > 1:
            return lambda x: x.expand(sizes).flatten(0, 1) if after == "flatten" else x.expand(sizes).select(dim, 1)
        return lambda x: x.expand(sizes)
    if kind == "squeeze":
        return lambda x: x.squeeze(dim)
    if kind == "transpose":
        other = draw(st.integers(0, rank - 1))
        return lambda x: x.transpose(dim, other).contiguous()
    if kind == "flatten" and dim + 1 < rank:
        return lambda x: x.flatten(dim, dim + 1)
    return lambda x: x


@st.composite
def programs(draw: Any, steps: int = 10) -> Callable[..., tuple[Tensor, ...]]:
    """A function of `program_inputs()` that returns some of the values it computes."""
    plan: list[Step] = []
    shapes: list[tuple[int, ...]] = list(SHAPES)

    def add(step: Step) -> None:
        values = [torch.empty(s) for s in shapes]
        try:
            result = step(values)
        except RuntimeError:
            return  # shapes that do not broadcast
        if 0 < result.dim() <= 4 and result.numel() <= 200:
            plan.append(step)
            shapes.append(tuple(result.shape))

    for _ in range(draw(st.integers(3, steps))):
        recent = st.integers(max(0, len(shapes) - 4), len(shapes) - 1)
        a, b = draw(recent), draw(st.integers(0, len(shapes) - 1))
        match draw(st.sampled_from(["unary", "binary", "view", "stream", "adaln"])):
            case "unary":
                one = UNARY[draw(st.sampled_from(sorted(UNARY)))]
                add(lambda v, one=one, a=a: one(v[a]))
            case "binary":
                two = BINARY[draw(st.sampled_from(sorted(BINARY)))]
                add(lambda v, two=two, a=a, b=b: two(v[a], v[b]))
            case "stream":
                add(lambda v, a=a, b=b: v[a] + v[2] * v[b])
            case "adaln":
                norm = draw(st.sampled_from(["layer", "rms", "by hand"]))
                add(lambda v, norm=norm, a=a, b=b: _norm(norm, v[a]) * (1 + v[2]) + v[b])
            case "view":
                one = draw(view_steps(shapes[a]))
                add(lambda v, one=one, a=a: one(v[a]))
    kept = draw(st.sets(st.integers(0, max(len(plan) - 1, 0)), max_size=3)) | {len(plan) - 1}

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        values = list(inputs)
        for step in plan:
            values.append(step(values))
        return tuple(values[len(SHAPES) + i] for i in sorted(kept) if plan) or (inputs[0] + 1,)

    return function


# -- what a term means -------------------------------------------------------------------------------------------------


def evaluate(view: TermView, term: Term, values: dict[fx.Node, Tensor]) -> Tensor:
    """The value of a term in fp64, from the values of its leaves."""
    args = [evaluate(view, a, values) for a in term.args]
    match term.op:
        case "leaf":
            return values[term.attrs[0]].double()
        case "const":
            return torch.tensor(term.value, dtype=torch.float64)
        case "round":
            return args[0].to(term.precision).double()
        case "view":
            return apply(term, args[0])
        case "mean" | "sum":
            return getattr(args[0], term.op)(-1, keepdim=True)
        case "var":
            return args[0].var(-1, keepdim=True, correction=term.attrs[0])
        case "layer_norm":
            return F.layer_norm(args[0], args[0].shape[-1:], eps=term.attrs[0])
        case "rms_norm":
            return args[0] * torch.rsqrt(args[0].square().mean(-1, keepdim=True) + term.attrs[0])
        case "pow":
            return args[0] ** term.attrs[0]
        case "clamp_min":
            return args[0].clamp_min(term.attrs[0])
        case "clamp":
            return args[0].clamp(-term.attrs[0], term.attrs[0])
    return getattr(torch, term.op)(*args)


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]
