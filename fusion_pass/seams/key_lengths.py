"""Masks that only say how many of the first keys take part, proved from the graph that builds them.

    mask[b, h, i, j] = 0 (True) where j < n[b], else -inf (False)        n[b] = max(node[b], low) + add

Only the graph is trusted. What the values of an input happen to be, such as a padding mask that a tokenizer made, is
not known when compiling: such a mask stays. Each node is read as a function of the key's index j and of the sample b,
through views, `where`, `masked_fill`, comparisons of an `arange` with an integer tensor, negations, `and`/`or`, casts,
and cats or pads that put keys which all take part before it. Anything else is refused with its name.

Only -inf keeps a key out: a finite bias, even the most negative number of its dtype, leaves every key in where a sample
has no key to attend to, and is refused. One is torch's own: up to 2.11 it gives cuDNN -65504 (`CUDNN_OUT`) for False,
which leaves a weight of exp(-65504 + ...), zero unless a score is larger than another by 65400. A sample with no key
(n <= 0) is NaN, zero, or attends to all keys in eager, by kernel; `dkfuse::attention` lets its first key take part. The
mask itself stays in the graph for whoever else reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..matching.terms import same_size
from ..rewriting.replace import copy_origin
from ..rewriting.symbols import arguments as with_symbols
from .mask_index import INDICES, KEY, NARROW, KeyLengths, Unproved, varying
from .mask_reader import Reader, cast

aten, prims = torch.ops.aten, torch.ops.prims


CUDNN_OUT = -65504.0


def prove(mask: fx.Node, batch: Any, keys: Any, cudnn: bool = False) -> KeyLengths:
    """The numbers of keys that `mask`, given to an attention of `batch` samples to `keys` keys, stands for.

    cudnn: the attention is cuDNN's, which torch gives `CUDNN_OUT` in the mask's dtype for -inf.
    Raises Unproved where that is not proved.
    """
    value = mask.meta["val"]
    if value.dim() > 4:
        raise Unproved(f"the mask has {value.dim()} dims")
    found = Reader().read(mask)
    heads, queries, last = ((None,) * 4 + found.axes)[-3:]
    if found.lengths is None:
        raise Unproved(f"the mask is {found.inside} for every key")
    if queries is not None or heads is not None:
        raise Unproved(f"the mask differs from {'query to query' if queries is not None else 'head to head'}")
    if last != KEY or not same_size(value.shape[-1], keys):
        raise Unproved(f"the mask {list(value.shape)} does not count the {keys} keys in its last dim")
    if any(not same_size(found.lengths.node.meta["val"].shape[d], batch) for d in varying(found.lengths.node)):
        raise Unproved(f"the numbers of keys are {list(found.lengths.node.meta['val'].shape)}, q has {batch} samples")
    if value.dtype == torch.bool:
        chosen = (found.inside, found.outside) == (True, False)
    else:
        out = [float("-inf"), *([cast(CUDNN_OUT, value.dtype)] if cudnn else [])]
        chosen = found.inside == 0 and found.outside in out
    if not chosen:
        texts = f"adds {found.inside} to the first keys and {found.outside} to the others"
        raise Unproved(f"the mask {texts}: only 0 and -inf are a choice of keys", "mask_values")
    return found.lengths


def sure(lengths: KeyLengths) -> int:
    """How many keys take part in any case: n = max(node, low) + add, and a sum that is counted (`_SUMS`) of a padding
    mask is not negative: n >= C + add for sum + C. Sums and additions are taken not to overflow int32 and int64.
    """
    node, more = lengths.node, 0
    while node.meta["val"].dtype in INDICES:  # narrower integers overflow for as few as 128 keys
        addends = _with_number(node)
        if node.target in _SAME_NUMBER:
            node = node.args[0]  # type: ignore[assignment]
        elif addends is not None:
            node, more = addends[0], more + addends[1]
        else:
            break
    counted = node.target in _SUMS and node.meta["val"].dtype not in NARROW
    return max((max(lengths.low, more) if counted else lengths.low) + lengths.add, 0)


def _with_number(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(x, C) of x + C in the dtype of x, or None."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    nodes, numbers = [a for a in node.args if isinstance(a, fx.Node)], [a for a in node.args if type(a) is int]
    if len(nodes) != 1 or len(numbers) != 1 or nodes[0].meta["val"].dtype != node.meta["val"].dtype:
        return None
    return nodes[0], numbers[0]


_SUMS = (aten.sum.dim_IntList, aten.sum.default, aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
_SAME_NUMBER = (prims.convert_element_type.default, aten._to_copy.default, aten.reshape.default, aten.view.default)

Numbers = dict[tuple[KeyLengths, Any, int], fx.Node]


def numbers_of_keys(graph: fx.Graph, lengths: KeyLengths, q: fx.Node, keys: Any, known: Numbers) -> fx.Node:
    """An int32 node `[B]` of min(max(1, n), keys) for the samples of q `[B, H, S, d]`, made once per `known`.

    keys: how many there are, an int or a symbol, which bounds nothing. `known` is updated.

    It is made at the insertion point of the first call: later ones must come after it.
    """
    batch = q.meta["val"].shape[0]
    most = keys if isinstance(keys, int) else 2**31 - 1
    key = lengths, batch if isinstance(batch, int) else batch.node.expr, most
    if key not in known:
        add, node = lengths.add, lengths.node
        node = call(graph, prims.convert_element_type.default, node, torch.int64)
        node = call(graph, aten.clamp_min.default, node, max(lengths.low, 1 - add))
        node = call(graph, aten.clamp_max.default, node, most - add)
        node = call(graph, aten.add.Tensor, node, add) if add else node
        node = call(graph, prims.convert_element_type.default, node, torch.int32)
        node = call(graph, aten.reshape.default, node, [-1])
        if not same_size(node.meta["val"].shape[0], batch):
            sizes = with_symbols(graph, [batch], [q])
            node = call(graph, aten.expand.default, node, sizes)
        known[key] = node
    return known[key]


def call(graph: fx.Graph, target: Any, first: Any, *args: Any, operands: bool = True, **kwargs: Any) -> fx.Node:
    """`target` of `first` and the rest; without operands it is made on the device (and, if floating, of the dtype) of
    `first`, which only says so."""
    like = first[0] if isinstance(first, list) else first
    if operands:
        args = (first, *args)
    else:
        value = like.meta["val"]
        kwargs = {"dtype": value.dtype, **kwargs, "device": value.device}
    node = graph.call_function(target, args, kwargs)
    values = fx.map_arg(args, lambda n: n.meta["val"])
    with like.meta["val"].fake_mode:
        node.meta["val"] = target(*values, **kwargs)
    copy_origin(like, node)
    return node


__all__ = ["KeyLengths", "Numbers", "Unproved", "call", "numbers_of_keys", "prove", "sure"]
