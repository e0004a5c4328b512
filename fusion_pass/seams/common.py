"""What the seams share: who may be rewritten at all, the records, and results put in the place of old ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import fx

import dkfuse.kernels.linear_ops  # noqa: F401  (registers the ops, also for compiled code that comes from a cache)

from .. import memory
from ..choosing.choose import resolve_target
from ..compat import statically_known_true
from ..matching.rules import Code, Reject, Stage
from ..matching.terms import NARROW, same_shape, short_dtype
from ..reporting.records import shape_of
from ..reporting.report import Site, Status
from ..rewriting import origin
from ..rewriting.symbols import arguments as with_symbols
from ..settings import Settings
from .linear import KEEP_ROWS, Linear

aten = torch.ops.aten
TILE = 128, 256  # rows and columns of a result that one SM computes at a time
SMS = {"sm80": 108, "sm89": 128, "sm90": 132, "sm100": 148}


def sms(target: str) -> int:
    """Multiprocessors of a target; of an unknown one as many as an H100 has."""
    return SMS.get(target, SMS["sm90"])


def tiles(rows: int, columns: int) -> int:
    """Tiles of a result ``[rows, columns]``."""
    return -(-rows // TILE[0]) * -(-columns // TILE[1])


def check_allowed(rule: str, linear: Linear, settings: Settings) -> None:
    """Raise Reject where a seam of `linear` must not be touched, whatever it looks like."""
    target = resolve_target(settings.target, linear.device)
    if not target.startswith("sm"):
        text = f"target is {target}: the rewrite is for cuBLAS on NVIDIA GPUs"
        raise Reject(Code.NO_KERNEL, text, Stage.KERNEL, left=True)
    if not settings.allows(rule):
        raise Reject(Code.DISABLED, f"rule {rule} is switched off by dkfuse.rules", Stage.KERNEL)
    if linear.dtype not in NARROW:
        text = f"dtype is {short_dtype(linear.dtype)}: only bf16 and fp16 are rewritten"
        raise Reject(Code.DTYPE, text, Stage.KERNEL, left=True)


def check_sizes(linear: Linear, *columns: Any) -> None:
    """Raise Reject unless N and the given column counts are multiples of 8: rows of 16 bytes, as tensor cores ask."""
    check_widths(linear.features[1], *columns)


def check_widths(*sizes: Any) -> None:
    """Raise Reject unless rows of so many elements are rows of whole 16 bytes."""
    for size in sizes:
        if not isinstance(size, int):
            raise Reject(Code.SYMBOLIC, f"the width {size} is a symbol: it must be known", Stage.KERNEL, left=True)
        if size % 8:
            text = f"a row of {size} elements is no multiple of 16 bytes"
            raise Reject(Code.LAYOUT, text, Stage.KERNEL, left=True)


def described(family: str, node: fx.Node, shown: Mapping[str, fx.Node | None], status: Status) -> Site:
    """The site of a seam that starts at `node`, with the shapes of what it reads; its dtype is that of the first."""
    values = {name: n.meta["val"] for name, n in shown.items() if n is not None}
    return Site(
        id="",  # given by `seams.run`
        family=family,
        status=status,
        rule=family,
        source=origin.source(node),
        module=origin.module(node),
        dtype=short_dtype(next(iter(values.values())).dtype),
        shapes={name: shape_of(value) for name, value in values.items()},
    )


def record(
    family: str, op: str, kernel: str, node: fx.Node, linear: Linear, traffic: tuple, reject: Reject | None
) -> Site:
    """The site of a seam of a linear that starts at `node`: fused where `reject` is None."""
    shown = {"x": linear.x, "weight": linear.weight, "bias": linear.bias}
    site = described(family, node, shown, Status.FUSED)
    site.op = op
    if reject is None:
        site.kernel = kernel
        if all(isinstance(t, int) for t in traffic):
            site.bytes_before, site.bytes_after = traffic
        return site
    site.status = Status.LEFT_TO_INDUCTOR if reject.left else Status.REJECTED
    site.reason = reject.reason(family)
    site.attempts = [site.reason]
    return site


def reshaped(graph: fx.Graph, result: fx.Node, linear: Linear, old: fx.Node, between: set[fx.Node]) -> fx.Node:
    """`result` [rows, N] in the shape of `old`, whose views between the product and `old` are in `between`."""
    if linear.batched:
        shape = with_symbols(graph, list(linear.product.meta["val"].shape), [linear.x])
        result = view(graph, result, shape, linear.product.meta["val"].shape)
    wanted = old.meta["val"].shape
    if same_shape(result.meta["val"].shape, wanted):
        return result
    views = [n for n in (*linear.views, *between) if n.target in KEEP_ROWS]
    last = next(v for v in views if same_shape(v.meta["val"].shape, wanted) and len(v.args) > 1)
    return view(graph, result, last.args[1], wanted)


def why_apart(weights: Sequence[fx.Node], what: str) -> tuple[str, str]:
    """The code and text of linears, described by `what`, whose weights do not lie side by side."""
    if all(node.op == "get_attr" for node in weights):
        return "frozen", f"{what}: their weights are constants of a frozen graph, which may not stay where they are"
    if all(node.op == "placeholder" and memory.KEY not in node.meta for node in weights):
        return "unguarded", f"{what}: their weights are not parameters of the compiled module, so they may move"
    if not all(node.op == "placeholder" for node in weights):
        text = f"{what}: their weights are computed in the graph (a cast, a LoRA that is merged on the fly)"
        return "computed", text
    return "not_packed", f"{what}: dkfuse.pack(model), called before compiling, would make them one GEMM"


def view(graph: fx.Graph, node: fx.Node, shape: Any, sizes: Any) -> fx.Node:
    """`node` reshaped to `shape`, whose symbols are nodes; sizes: the same as values."""
    found = graph.call_function(aten.reshape.default, (node, list(shape)))
    found.meta["val"] = node.meta["val"].reshape(list(sizes))
    return found


def as_one(graph: fx.Graph, first: fx.Node, size: int) -> fx.Node:
    """The memory of `first` and of what follows it, as a tensor of `size` rows or elements."""
    value = first.meta["val"]
    shape, strides = [size, *value.shape[1:]], list(value.stride())
    node = graph.call_function(aten.as_strided.default, (first, shape, strides))
    node.meta["val"] = value.as_strided(shape, strides)
    return node


def is_tensor(node: Any) -> TypeGuard[fx.Node]:
    """Whether an argument is a node of a tensor: it may be a number, also a node of one, which is a symbolic size."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def read_sizes_elsewhere(graph: fx.Graph, old: Iterable[fx.Node], live: list[fx.Node]) -> None:
    """Let whoever reads a symbolic size of a node in `old` read it from `live`, so that `old` can go."""
    for node in old:
        for user in [u for u in node.users if u.target is aten.sym_size.int]:
            size = user.meta["val"]
            with graph.inserting_before(user):
                same = with_symbols(graph, size, live) if isinstance(size, torch.SymInt) else size
            if same is not user:
                user.replace_all_uses_with(same)


def rows(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """`node` [..., K] as [rows, K]."""
    value = node.meta["val"]
    if value.dim() == 2:
        return node
    return view(graph, node, [-1, value.shape[-1]], [-1, value.shape[-1]])


def mergeable(value: torch.Tensor) -> bool:
    """Whether the rows of [..., K] lie evenly, so that [rows, K] is a view."""
    if not statically_known_true(value.stride(-1) == 1):
        return False
    dims = [d for d in range(value.dim() - 1) if not statically_known_true(value.shape[d] == 1)]
    return all(
        statically_known_true(value.stride(a) == value.stride(b) * value.shape[b]) for a, b in itertools.pairwise(dims)
    )
