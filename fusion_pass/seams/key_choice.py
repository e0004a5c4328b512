"""Masks that choose keys, the same ones for every query and head: any boolean tensor of samples and keys.

    mask[b, h, i, j] = 0 (True) where taken[b, j], else -inf (False)
                     = the same where also asks[b, i]: a query that asks nobody attends to no key at all

`taken` may be an input, such as a tokenizer's padding mask: unlike a number of keys (`key_lengths`) it need not be
known how it came about, as attention does not depend on the order of keys. `key_order` brings those that take part to
the front, and kernels are given their number. What is proved here is only where the mask differs: along keys and
samples, and in a second factor along queries and samples, as padded text is masked on both sides (HunyuanVideo-1.5).

Keys that take part in any case, because a pad or a cat put True before or behind the others (an image's tokens beside
padded text), are told apart: `before` and `after` count them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..matching.terms import same_size
from ..rewriting.calls import bound_arguments
from .common import is_tensor
from .key_lengths import CUDNN_OUT
from .mask_index import CASTS, Unproved
from .mask_reader import Reader, cast
from .mask_views import Dims, viewed

aten = torch.ops.aten
HEADS, QUERIES, KEYS = 1, 2, 3  # dims of a mask; 0: samples
NOT = (aten.logical_not.default, aten.bitwise_not.default)
AND = (aten.logical_and.default, aten.bitwise_and.Tensor, aten.mul.Tensor)  # of booleans
OR = (aten.logical_or.default, aten.bitwise_or.Tensor)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)


@dataclass(frozen=True)
class Flags:
    """True where `node` is not zero (negated: where it is): one of each place of dim `place` for each of `sample`.

    sample None: the same for every sample. Other dims of `node` have one place. before, after: how many more places
    are true in front of these and behind them.
    """

    node: fx.Node
    sample: int | None
    place: int
    negated: bool = False
    before: int = 0
    after: int = 0


@dataclass(frozen=True)
class KeyChoice:
    """The keys that take part, by all of these flags, and the queries that ask for any; no flags: all do."""

    keys: tuple[Flags, ...]
    queries: tuple[Flags, ...] = ()

    @property
    def node(self) -> fx.Node:
        return self.keys[0].node

    @property
    def before(self) -> int:
        """The first keys, so many of which take part in any case."""
        return min(f.before for f in self.keys)

    @property
    def after(self) -> int:
        """The last keys, so many of which take part in any case."""
        return min(f.after for f in self.keys)

    @property
    def sure(self) -> int:
        return self.before + self.after


def choice(mask: fx.Node, batch: Any, queries: Any, keys: Any, cudnn: bool = False) -> KeyChoice:
    """What `mask`, given to an attention of `batch` samples, chooses; operands as of `key_lengths.prove`.

    Raises Unproved where it is more than a choice of keys and queries.
    """
    value = mask.meta["val"]
    if value.dim() > 4:
        raise Unproved(f"the mask has {value.dim()} dims")
    parts: list[tuple[fx.Node, Dims, bool]] = []
    dims = (*[None] * (4 - value.dim()), *range(value.dim()))
    _factors(mask, dims, False, _outside(value.dtype, cudnn), parts)
    found: dict[int, dict[Flags, None]] = {QUERIES: {}, KEYS: {}}
    sizes = {QUERIES: queries, KEYS: keys}
    for node, where, negated in parts:
        differs = [d for d, at in enumerate(where) if at is not None and not same_size(_size(node, at), 1)]
        if HEADS in differs:
            raise Unproved("the mask differs from head to head")
        along = [d for d in differs if d in (QUERIES, KEYS)]
        if len(along) != 1:
            text = "differs from query to query and from key to key at once" if along else "is the same for every key"
            raise Unproved(f"{node.name}, of which the mask is made, {text}")
        place = where[along[0]]
        assert place is not None
        if not same_size(_size(node, place), sizes[along[0]]):
            raise Unproved(f"{node.name} holds {_size(node, place)} flags for {sizes[along[0]]} places")
        sample = where[0] if 0 in differs else None
        if sample is not None and not same_size(_size(node, sample), batch):
            raise Unproved(f"{node.name} holds flags of {_size(node, sample)} samples, q has {batch}")
        if any(not same_size(s, 1) for d, s in enumerate(node.meta["val"].shape) if d not in (sample, place)):
            raise Unproved(f"{node.name} has more dims than samples and keys")
        found[along[0]][_cut(Flags(node, sample, place, negated))] = None
    if not found[KEYS]:
        raise Unproved("the mask chooses no keys")
    return KeyChoice(tuple(found[KEYS]), tuple(found[QUERIES]))


def _size(node: fx.Node, dim: int) -> Any:
    return node.meta["val"].shape[dim]


def _outside(dtype: torch.dtype, cudnn: bool) -> tuple[float, ...]:
    """What keeps a key out in a bias of this dtype (`key_lengths`); nothing of a boolean mask."""
    if not dtype.is_floating_point:
        return ()
    return (float("-inf"), *([cast(CUDNN_OUT, dtype)] if cudnn else []))


def _factors(
    node: fx.Node, dims: Dims, negated: bool, outside: tuple[float, ...], parts: list[tuple[fx.Node, Dims, bool]]
) -> None:
    """Add the boolean tensors whose conjunction `node` is, each with the dim of it that each dim of the mask is.

    outside: for a bias, what it is where it is not 0; () for a mask.
    """
    base, given, dims = _based(node, dims)
    if outside:
        _factors(*_condition(base, given, dims, outside), (), parts)
        return
    if base.target in NOT and base.args[0].meta["val"].dtype == torch.bool:
        _factors(base.args[0], _operand(base, base.args[0], dims), not negated, (), parts)
        return
    joins = OR if negated else AND
    operands = [o for o in (given.get("self"), given.get("other")) if _is_boolean(o)]
    if base.target in joins and len(operands) == 2:
        for operand in operands:
            if _constant(operand) is not (not negated):  # True of an `and`, False of an `or`, changes nothing
                _factors(operand, _operand(base, operand, dims), negated, (), parts)
        return
    if base.target in CASTS and base.args[0].meta["val"].dtype == base.meta["val"].dtype == torch.bool:
        _factors(base.args[0], dims, negated, (), parts)
        return
    if base.meta["val"].dtype != torch.bool:
        raise Unproved(f"{base.name} is {base.meta['val'].dtype}, a choice of keys is boolean")
    parts.append((base, dims, negated))


def _is_boolean(node: Any) -> bool:
    return is_tensor(node) and node.meta["val"].dtype == torch.bool


def _operand(result: fx.Node, operand: fx.Node, dims: Dims) -> Dims:
    """dims of the result of an elementwise op as dims of its operand, which is broadcast."""
    shape = operand.meta["val"].shape
    more = result.meta["val"].dim() - len(shape)
    return tuple(None if d is None or d < more or same_size(shape[d - more], 1) else d - more for d in dims)


def _condition(
    node: fx.Node, given: dict[str, Any], dims: Dims, outside: tuple[float, ...]
) -> tuple[fx.Node, Dims, bool]:
    """(a boolean tensor, its dims, whether it is true outside) that a bias of 0 and -inf is made of."""
    if node.op in ("placeholder", "get_attr"):
        text = f"the mask is made of {node.name}, an input that is no boolean: what it adds is not known when compiling"
        raise Unproved(text, "mask_input")
    if node.target in CASTS:
        source = given["a" if "a" in given else "self"]
        if source.meta["val"].dtype.is_floating_point:
            return _condition(*_based(source, dims), (*outside, *_before_cast(source, node, outside)))
    if node.target is aten.slice.Tensor and given.get("start") in (None, 0) and given.get("step", 1) == 1:
        padded = given["self"]  # for its alignment, and cut back
        if padded.target is aten.constant_pad_nd.default:
            pad = bound_arguments(padded)
            if all(same_size(p, 0) for p in (pad["pad"][0], *pad["pad"][2:])) and pad["self"].meta["val"].shape == (
                node.meta["val"].shape
            ):
                return _condition(*_based(pad["self"], dims), outside)
    if node.target in WHERE or node.target in FILLS:
        names = ("condition", "self", "other") if node.target in WHERE else ("mask", "value", "self")
        condition, yes, no = (given[n] for n in names)
        values = [_constant(v) for v in (yes, no)]
        for inside, other, negated in ((*values, False), (*reversed(values), True)):
            if inside == 0 and other in outside:
                return condition, _operand(node, condition, dims), negated
        if None not in values:
            raise Unproved(f"the mask adds {values[0]} or {values[1]}: only 0 and -inf choose keys", "mask_values")
    raise Unproved(f"the mask is computed by {node.target}, which says nothing of a choice of keys")


def _based(node: fx.Node, dims: Dims) -> tuple[fx.Node, dict[str, Any], Dims]:
    """(the tensor under the views that end in `node`, its operands by name, dims of `node` as dims of it)."""
    base, axes = viewed(node)
    given = bound_arguments(base) if isinstance(base.target, torch._ops.OpOverload) else {}
    return base, given, tuple(axes[d] if d is not None else None for d in dims)


def _before_cast(source: fx.Node, node: fx.Node, outside: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers that the cast makes one of `outside`: the least fp32 number is -inf in bf16."""
    least = torch.finfo(source.meta["val"].dtype).min
    return (least,) if cast(least, node.meta["val"].dtype) in outside else ()


def _constant(node: Any) -> Any:
    """The number that a tensor is filled with; None where it is not known to be."""
    if not isinstance(node, fx.Node):
        return node
    try:
        found = Reader().read(node)
    except Unproved:
        return None
    return found.inside if found.lengths is None else None


# -- places that are true in any case ----------------------------------------------------------------------------------


def _cut(flags: Flags) -> Flags:
    """The same flags, without the places at both ends that a pad or a cat made true."""
    node, given, (place, sample) = _based(flags.node, (flags.place, flags.sample))
    if place is None or (flags.sample is not None and sample is None):
        return flags
    truth = not flags.negated
    inner, before, after = None, 0, 0
    if node.target in CASTS:
        source = given["a" if "a" in given else "self"]
        if _keeps_zero(source.meta["val"].dtype, node.meta["val"].dtype):
            inner = source
    elif node.target is aten.constant_pad_nd.default:
        pad = list(given["pad"]) + [0] * (2 * node.meta["val"].dim() - len(given["pad"]))
        own = 2 * (node.meta["val"].dim() - 1 - place)
        others = [p for i, p in enumerate(pad) if i not in (own, own + 1)]
        number = cast(given.get("value", 0), node.meta["val"].dtype)
        before, after = pad[own], pad[own + 1]
        if bool(number) is truth and all(same_size(p, 0) for p in others) and _counts(before, after):
            inner = given["self"]
    elif node.target is aten.cat.default and given.get("dim", 0) % node.meta["val"].dim() == place:
        inner, before, after = _of_cat(given["tensors"], place, truth)
    if inner is None:
        return flags
    found = _cut(Flags(inner, sample, place, flags.negated))
    before, after = before + flags.before + found.before, after + flags.after + found.after
    return Flags(found.node, found.sample, found.place, found.negated, before, after)


def _of_cat(tensors: list[fx.Node], dim: int, truth: bool) -> tuple[fx.Node | None, int, int]:
    """(the one part of a cat that is not known to be true, places before it, and behind it)."""
    known = [(c := _constant(t)) is not None and bool(c) is truth for t in tensors]
    sizes = [_size(t, dim) for t in tensors]
    if known.count(False) != 1:
        return None, 0, 0
    at = known.index(False)
    before, after = sum(sizes[:at]), sum(sizes[at + 1 :])
    return (tensors[at], before, after) if _counts(before, after) else (None, 0, 0)


def _counts(*numbers: Any) -> bool:
    return all(isinstance(n, int) and n >= 0 for n in numbers)


def _keeps_zero(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether a cast makes nothing zero that is not."""
    if target == torch.bool or source == torch.bool:
        return True
    return not source.is_floating_point and target.itemsize >= source.itemsize
