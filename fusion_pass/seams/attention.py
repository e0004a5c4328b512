"""The seam to attention: ``aten._scaled_dot_product_*`` becomes the kernel that `attention_choice` names.

A kernel of torch's own becomes its ATen op, which Inductor launches as it launches torch's choice; others become
``dkfuse::attention``. q, k and v stay the views they are; the strides of the result, which depend on the kernel, are
carried on, and a transposing copy behind it goes where the kernel already writes `[B, S, H, d]`.

A mask that is proved to say how many of the first keys take part (`key_lengths`) is not given on: the numbers are, made
int32 once for all attentions that share them. So are those of a mask that chooses keys in any other way
(`key_choice`), where the chosen ones are brought to the front first (`key_order`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

import dkfuse.kernels.attention  # noqa: F401  (registers the op, also for compiled code that comes from a cache)

from ..choosing.choose import resolve_target
from ..matching.rules import Code
from ..reporting.report import Status
from ..rewriting.calls import bound_arguments
from ..rewriting.replace import copy_origin
from ..rewriting.strides import read_by_strides, spread
from ..settings import Settings
from . import cpu_bound
from .attention_call import Call, calls
from .attention_choice import RULE, Decision, decide, reason
from .common import described
from .key_lengths import Numbers, numbers_of_keys
from .key_order import Known, in_order, order_of_keys, zero_where_nobody_asks
from .seam import Seam

aten = torch.ops.aten
OPAQUE = "dkfuse::attention"


def find(graph: fx.Graph, settings: Settings) -> Iterator[Seam]:
    """One seam per attention in `graph`."""
    numbers: Numbers = {}
    orders: Known = {}
    by_strides = read_by_strides(graph)
    found = list(calls(graph))
    load = functools.cache(lambda: cpu_bound.load(graph, found))  # as the graph is before seams change it
    for call in found:
        decision = decide(call, resolve_target(settings.target, call.device), settings, load)
        if decision.kernel is not None and call.node in by_strides:
            text = f"{call.node.name} is read by its strides (as_strided), which other kernels change"
            decision = Decision(reason=reason(Code.LAYOUT, text), forbidden=True)
        lengths = call.lengths.node if call.lengths is not None else None
        chosen = call.choice.node if call.choice is not None else None
        shown = {"q": call.q, "k": call.k, "v": call.v, "mask": call.mask, "key_lengths": lengths, "keys": chosen}
        site = described(RULE, call.node, shown, Status.LEFT_TO_INDUCTOR)
        site.op, site.reason, site.attempts = OPAQUE, decision.reason, decision.attempts
        if decision.kernel is None:
            site.status = Status.REJECTED if decision.forbidden else site.status
            yield Seam(site)
            continue
        site.status, site.kernel = Status.FUSED, decision.kernel
        if (native := _native(call, decision.kernel)) is not None:
            site.op = native[0]._schema.name
        yield Seam(site, _Rewrite(graph, call, decision.kernel, numbers, orders))


class _Rewrite:
    """Puts one kernel in the place of one attention."""

    def __init__(self, graph: fx.Graph, call: Call, kernel: str, numbers: Numbers, orders: Known):
        self.graph, self.call, self.kernel, self.numbers, self.orders = graph, call, kernel, numbers, orders

    def __call__(self) -> None:
        given = bound_arguments(self.call.node)  # which may be the results of seams applied since it was found
        call = self.call = dataclasses.replace(self.call, q=given["query"], k=given["key"], v=given["value"])
        native = _native(call, self.kernel)
        with self.graph.inserting_before(call.node):
            if native is not None:
                target, args, kwargs = native
                made = self._insert(target, (call.q, call.k, call.v, *args), kwargs)
                result = self.graph.call_function(operator.getitem, (made, 0))
                result.meta["val"] = made.meta["val"][0]
                copy_origin(call.node, result)
            else:
                operands, options = self._ours(call)
                attended = self._insert(torch.ops.dkfuse.attention.default, operands, options)
                result = attended
                if call.choice is not None:
                    result = zero_where_nobody_asks(self.graph, call.choice, attended, self.orders)
        for old in call.results:
            old.replace_all_uses_with(result)
            self.graph.erase_node(old)
        for unread in list(call.node.users):
            self.graph.erase_node(unread)
        self.graph.erase_node(call.node)
        spread(result)

    def _ours(self, call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What ``dkfuse::attention`` is called with, without defaults: each costs half a microsecond at each call."""
        options: dict[str, Any] = {"using": self.kernel}
        if call.causal:
            options["causal"] = True
        if call.scale is not None:
            options["scale"] = call.scale
        if call.grouped:
            options["gqa"] = True
        if not call.counted:
            return (call.q, call.k, call.v), options
        if self.kernel == "cudnn":
            options["sure"] = call.sure
        if call.choice is not None:
            order, count = order_of_keys(self.graph, call.choice, call.q, self.orders)
            k, v = (in_order(self.graph, t, order, self.orders) for t in (call.k, call.v))
            return (call.q, k, v, None, count), {**options, "bounded": True}
        assert call.lengths is not None
        keys = call.k.meta["val"].shape[2]
        if isinstance(keys, int):
            options["bounded"] = True
        lengths = numbers_of_keys(self.graph, call.lengths, call.q, keys, self.numbers)
        return (call.q, call.k, call.v, None, lengths), options

    def _insert(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        q = self.call.q.meta["val"]
        with q.fake_mode:
            node.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args), **kwargs)
        copy_origin(self.call.node, node)
        return node


def _native(call: Call, kernel: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """(op, arguments after q, k and v, keyword arguments) of a kernel that is part of torch; None for others, and where
    the graph runs on a CPU while it is planned for a GPU."""
    if call.device.type != "cuda" or call.counted:
        return None
    scale = {"scale": call.scale}
    if kernel == "cudnn":
        return aten._scaled_dot_product_cudnn_attention.default, (None, False, 0.0, call.causal, False), scale
    if kernel == "flash":
        return aten._scaled_dot_product_flash_attention.default, (0.0, call.causal, False), scale
    if kernel == "efficient":
        return aten._scaled_dot_product_efficient_attention.default, (None, False, 0.0, call.causal), scale
    return None
