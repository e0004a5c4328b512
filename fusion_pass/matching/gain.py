"""Is a fused kernel worth having here? Static facts about what Inductor would do with the same nodes.

Inductor joins pointwise ops with the reductions around them, which an opaque kernel prevents. A site is left to it when

* it has no reduction and removes no copy (``pointwise``);
* every reader of its result is pointwise, or reduces the same rows, as a quantization to int8 or fp8 with a scale for
  each row: Inductor would finish them in the same kernel (``feeds_pointwise``);
* a full-size operand is a pointwise result that exists only for this site and would have to be written to memory
  (``pointwise_producer``), for instance the stream of a wider rule that did not match;
* there are very many short rows (``short_rows``): a program per row starts more slowly than memory delivers its row,
  while Inductor gives several rows to one program.

Measured reasons: a modulate-only kernel ran 2x slower than Inductor's own fusion (vllm-omni#3186); of Mochi's kernels
on an H100, RMS norms of 1.07 million rows of 128 took 0.6 ms each and Inductor's 0.18, measured with
`dkfuse bench model mochi --layers 2` before such norms were left.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from dkfuse.kernels.tables import table_of

from .operands import base_node, fake
from .rules import Candidate, Code, Reject, Replaceable, Stage
from .terms import getitem_source, same_shape, same_size

aten = torch.ops.aten
prims = torch.ops.prims

CASTS = (prims.convert_element_type.default, aten._to_copy.default)

ROW_REDUCTIONS = (aten.amax.default, aten.amin.default, aten.sum.dim_IntList, aten.mean.dim)
PICKING = (  # rows by their numbers: Inductor reads them where they are used
    aten.index_select.default,
    aten.index.Tensor,
    aten.gather.default,
    aten.embedding.default,
)


@functools.lru_cache(maxsize=4096)
def _is_pointwise(target: Any) -> bool:
    return target in CASTS or torch.Tag.pointwise in getattr(target, "tags", ())


ROW_BYTES = 2048  # what memory delivers (3.3 TB/s) while the next program starts (0.6 ns)
MANY_ROWS = 1 << 16  # fewer are done in less than the 40 us that nobody notices


def is_elementwise(node: fx.Node) -> bool:
    """A pointwise op that Inductor generates code for."""
    return node.op == "call_function" and _is_pointwise(node.target)


def is_view(node: fx.Node) -> bool:
    """An op whose result shares its input's memory."""
    from .views import VIEW_READERS

    return node.op == "call_function" and node.target in VIEW_READERS and node.target is not aten.clone.default


def check(site: Candidate, claimed: Collection[fx.Node] = ()) -> None:
    """Raise Reject(left=True) where Inductor is expected to do at least as well.

    `claimed` are the nodes of sites already taken: what they read must be in memory anyway.
    """
    if not site.rule.has_norm:
        text = (
            "no reduction and no removed copy: Inductor joins this with its neighbours (dkfuse.pointwise=True fuses it)"
        )
        raise _left(Code.POINTWISE, text)
    users = [u for n in site.roots for u in readers(n)]
    if users and all((is_elementwise(u) or _reduces_rows(u)) and u not in claimed for u in users):
        names = ", ".join(sorted({str(u.target) for u in users})[:3])
        text = (
            f"every reader of the result is pointwise, or of its rows ({names}): Inductor finishes them in one kernel"
        )
        raise _left(Code.FEEDS_POINTWISE, text)
    _check_rows(site)
    inside = site.interior | {n for name in site.outputs for n in site.output_nodes(name)}
    for apart in site.sums.values():
        inside |= _of_this_site(base_node(site.view, apart), inside)
    if (total := site.binding.terms.get("sum")) is not None:
        inside |= set(site.view.nodes(total))  # no part of the interior, also where nobody else reads it
    for name, term in site.operands.items():
        if not same_shape(_without_ones(term.shape), _without_ones(site.shape)):  # [L, D] beside [1, L, D]
            continue
        node = through_views(base_node(site.view, term))
        produced = site.view.term(node)
        if produced is not None and produced.norm_reach is not None:
            continue  # likely the result of another site, which writes it to memory
        computed = is_elementwise(node) or (node.target in PICKING and name not in ("x", "residual"))
        if computed and node.target is not aten.clone.default and only_read_in(node, inside):
            text = f"{name} is the result of {node.target}, which Inductor computes inside the norm's kernel"
            raise _left(Code.POINTWISE_PRODUCER, text + " and which would have to be written to memory here")


def _reduces_rows(node: fx.Node) -> bool:
    """The largest, smallest, sum or mean of each row."""
    if node.target not in ROW_REDUCTIONS or not isinstance(node.args[0], fx.Node):
        return False
    last = node.args[0].meta["val"].dim() - 1
    dims = node.args[1] if len(node.args) > 1 else ()
    return [d % (last + 1) for d in (dims if isinstance(dims, (list, tuple)) else ())] == [last]  # type: ignore[operator]


def _without_ones(shape: tuple) -> tuple:
    """`shape` from its first size on that is not 1."""
    first = next((i for i, size in enumerate(shape) if not same_size(size, 1)), len(shape))
    return shape[first:]


def _of_this_site(node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """A sum that the op computes itself, and the casts above it, where nobody else reads them."""
    found: set[fx.Node] = set()
    node = through_views(node)
    while only_read_in(node, inside | found):
        found.add(node)
        if node.target not in CASTS:
            break
        node = through_views(node.args[0])  # type: ignore[arg-type]
    return found


def _check_rows(site: Candidate) -> None:
    if not all(isinstance(n, int) for n in site.shape):
        return
    *outer, width = site.shape
    rows = math.prod(outer)
    if rows > MANY_ROWS and (moved := traffic(site)[1]) is not None and moved < ROW_BYTES * rows:
        text = f"{rows} rows of {width} elements: Inductor gives several such rows to one program"
        raise _left(Code.SHORT_ROWS, text)


def _left(code: Code, text: str) -> Reject:
    return Reject(code, text, Stage.KERNEL, left=True)


def readers(node: fx.Node) -> list[fx.Node]:
    """Users of `node`, seen through views and widening casts."""
    found: list[fx.Node] = []
    for user in node.users:
        found.extend(readers(user) if is_view(user) or widens(user) else [user])
    return found


def widens(node: fx.Node) -> bool:
    """A cast that loses nothing: the reader behind it decides."""
    if node.target not in CASTS or not isinstance(node.args[0], fx.Node):
        return False
    return node.meta["val"].dtype.itemsize >= node.args[0].meta["val"].dtype.itemsize


def through_views(node: fx.Node) -> fx.Node:
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    source = getitem_source(node)
    return node if source is None else source[0]


def only_read_in(node: fx.Node, inside: set[fx.Node]) -> bool:
    return all(
        user in inside or ((is_view(user) or widens(user)) and only_read_in(user, inside)) for user in node.users
    )


# -- memory traffic --------------------------------------------------------------------------------------------------


def footprint(value: torch.Tensor) -> int | None:
    """Bytes of memory that a tensor covers: broadcast dims (stride 0) count once. None for symbolic sizes."""
    count = 1
    for size, stride in zip(value.shape, value.stride(), strict=True):
        if not isinstance(size, int):
            return None
        if not (isinstance(stride, int) and stride == 0):
            count *= size
    return count * value.element_size()


def traffic(site: Replaceable) -> tuple[int | None, int | None]:
    """Bytes moved by the site op by op, as eager does, and by the fused op."""
    outputs = {n for name in site.outputs for n in site.output_nodes(name)[:1]}
    before: int | None = 0
    for node in site.interior | outputs:
        if is_view(node) or getitem_source(node) is not None:
            continue
        values = [n.meta.get("val") for n in (*node.all_input_nodes, node)]
        flat = [v for value in values for v in (value if isinstance(value, (tuple, list)) else (value,))]
        before = total_bytes(before, *(footprint(v) for v in flat if isinstance(v, torch.Tensor)))
    for name, apart in site.sums.items() if isinstance(site, Candidate) else ():
        addends = (site.operands[name], site.operands[table_of(name)])
        before = total_bytes(before, *(footprint(fake(site.view, t)) for t in (apart, *addends)))
    after = total_bytes(0, *(footprint(fake(site.view, t)) for t in site.operands.values()))
    after = total_bytes(after, *(footprint(site.output_nodes(name)[0].meta["val"]) for name in site.outputs))
    return before, after


def total_bytes(*parts: int | None) -> int | None:
    """The sum of byte counts; None where one is not known."""
    return None if any(p is None for p in parts) else sum(p for p in parts if p is not None)
