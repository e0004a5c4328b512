"""Ops of other libraries that do what sites are made of, as the ATen nodes that they stand for.

    comfy_kitchen::apply_rope, apply_rope1, apply_rope_split_half{,1}      rotations of pairs of columns
    comfy_kitchen::rms_rope, rms_rope1, rms_rope_split_half{,1}            with an RMS norm of each row before

ComfyUI calls them in its models where comfy-kitchen is installed. To a compiler an op is a closed box: the norm before
it would be a kernel of its own, and the result be copied to where attention reads it.

    out0 = f[..., 0, 0]*x0 + f[..., 0, 1]*x1        for the pairs (x[2i], x[2i+1]), split_half: (x[i], x[i+D/2])
    out1 = f[..., 1, 0]*x0 + f[..., 1, 1]*x1        f [..., D/2, 2, 2], computed in its dtype, rounded to x's

Written after what comfy-kitchen documents and computes on a CPU (its backends/eager/rope.py, Apache 2.0), of the
versions that are named here; in others the ops stay. Where the fused kernel is not taken Inductor compiles the nodes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from dkfuse.kernels.packages import between, installed

from .. import compat
from .inline import spliced

aten = torch.ops.aten
LIBRARY, DISTRIBUTION, VERSIONS = "comfy_kitchen", "comfy-kitchen", ("0.2.0", "0.2.40")


def expand(graph: fx.Graph) -> None:
    """Replace every such op in `graph` by its definition."""
    calls = [n for n in graph.nodes if n.op == "call_function" and _definition(n.target) is not None]
    if not calls or not between(installed(DISTRIBUTION) or "0", VERSIONS):
        return
    for call in calls:
        _inline(graph, call)
    graph.eliminate_dead_code()


def fingerprint() -> str:
    """What a compiled graph depends on."""
    return f"{DISTRIBUTION}={installed(DISTRIBUTION)}"


def _definition(target: Any) -> Callable[..., Any] | None:
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != LIBRARY:
        return None
    return DEFINITIONS.get(target._schema.name.partition("::")[2])


def _inline(graph: fx.Graph, call: fx.Node) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    definition = _definition(call.target)
    assert definition is not None
    names = [argument.name for argument in call.target._schema.arguments]  # type: ignore[union-attr]
    given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    nodes = {name: value for name, value in given.items() if isinstance(value, fx.Node)}
    constants = {name: value for name, value in given.items() if name not in nodes}

    def traced(*values: Tensor) -> list[Tensor]:
        found = definition(**dict(zip(nodes, values, strict=True)), **constants)
        return list(found) if isinstance(found, tuple) else [found]

    body = make_fx(traced, decomposition_table=compat.decompositions())(*(n.meta["val"] for n in nodes.values())).graph
    known = dict(zip((n for n in body.nodes if n.op == "placeholder"), nodes.values(), strict=True))
    sizes = {n.meta["val"].node.expr: n for n in graph.nodes if n.op == "placeholder" and _is_symbol(n)}
    for node in body.nodes:
        if _is_symbol(node) and node.meta["val"].node.expr in sizes:
            known[node] = sizes[node.meta["val"].node.expr]  # and not the size of q for k, which would read q then
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # as everywhere in graphs at this place: layouts may change
    results = spliced(graph, call, body, known)
    if len(results) == 1:
        call.replace_all_uses_with(results[0])
        return
    for user in list(call.users):
        assert user.target is operator.getitem
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]


def _is_symbol(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


# -- what they compute -------------------------------------------------------------------------------------------------


def _rotated(x: Tensor, table: Tensor, half: bool) -> Tensor:
    if table.dim() > 2 < x.dim() and x.shape[2] != 1 and table.shape[2] > x.shape[2]:
        table = table[:, :, : x.shape[2]]
    wide = x.to(table.dtype)
    x0, x1 = wide.chunk(2, -1) if half else wide.unflatten(-1, (-1, 2)).unbind(-1)
    out0 = table[..., 0, 0] * x0 + table[..., 0, 1] * x1
    out1 = table[..., 1, 0] * x0 + table[..., 1, 1] * x1
    out = torch.cat([out0, out1], -1) if half else torch.stack([out0, out1], -1).flatten(-2)
    return out.to(x.dtype)


def _normed(x: Tensor, table: Tensor, scale: Tensor, epsilon: float, half: bool, columns: int = 0) -> Tensor:
    wide = x.float()  # as F.rms_norm, whose definition adds eps in place
    x = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon) * scale).to(x.dtype)
    if columns in (0, x.shape[-1]):
        return _rotated(x, table, half)
    return torch.cat([_rotated(x[..., :columns], table, half), x[..., columns:]], -1)


def _apply(half: bool) -> Callable[..., Any]:
    def apply_rope(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
        return _rotated(xq, freqs_cis, half), _rotated(xk, freqs_cis, half)

    return apply_rope


def _apply1(half: bool) -> Callable[..., Any]:
    def apply_rope1(x: Tensor, freqs_cis: Tensor) -> Tensor:
        return _rotated(x, freqs_cis, half)

    return apply_rope1


def _rms(half: bool) -> Callable[..., Any]:
    def rms_rope(
        q: Tensor,
        k: Tensor,
        freqs_cis: Tensor,
        q_scale: Tensor,
        k_scale: Tensor | None = None,
        epsilon: float = 1e-6,
        rot_dim: int = 0,
    ) -> tuple[Tensor, Tensor]:
        k_scale = q_scale if k_scale is None else k_scale
        of_q = _normed(q, freqs_cis, q_scale, epsilon, half, rot_dim)
        return of_q, _normed(k, freqs_cis, k_scale, epsilon, half, rot_dim)

    return rms_rope


def _rms1(half: bool) -> Callable[..., Any]:
    def rms_rope1(x: Tensor, freqs_cis: Tensor, scale: Tensor, epsilon: float = 1e-6) -> Tensor:
        return _normed(x, freqs_cis, scale, epsilon, half)

    return rms_rope1


DEFINITIONS: dict[str, Callable[..., Any]] = {
    f"{name}{'_split_half' if half else ''}{one}": make(half)
    for half in (False, True)
    for name, one, make in (
        ("apply_rope", "", _apply), ("apply_rope", "1", _apply1), ("rms_rope", "", _rms), ("rms_rope", "1", _rms1),
    )
}  # fmt: skip
