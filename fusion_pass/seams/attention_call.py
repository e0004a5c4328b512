"""Attention in a traced graph: which node, on what, and which kernel torch chose for it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dkfuse.kernels.attention_kernels import KERNELS

from .. import compat
from ..compat import statically_known_true
from ..rewriting.calls import bound_arguments
from .key_choice import KeyChoice, choice
from .key_lengths import KeyLengths, Unproved, prove, sure

aten = torch.ops.aten

# what torch chose, by the op that it put in the graph; None: traced on a CPU, where it had no choice
OPS: dict[Any, str | None] = {
    aten._scaled_dot_product_cudnn_attention.default: "cudnn",
    aten._scaled_dot_product_flash_attention.default: "flash",
    aten._scaled_dot_product_efficient_attention.default: "efficient",
    aten._scaled_dot_product_fused_attention_overrideable.default: "overrideable",
    aten._scaled_dot_product_flash_attention_for_cpu.default: None,
}


@dataclass(frozen=True)
class Call:
    """One attention. Tensors are graph nodes; `values` are what the op ``dkfuse::attention`` is called with, fake.

    lengths, choice: what the mask is proved to say, how many of the first keys take part, or which keys; unproved: why
    it is neither, for a mask.
    """

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float | None
    dropout: float
    traced: str | None
    lengths: KeyLengths | None = None
    choice: KeyChoice | None = None
    unproved: Unproved | None = None

    @property
    def counted(self) -> bool:
        """Whether kernels can be given the number of keys that take part instead of the mask."""
        return self.lengths is not None or self.choice is not None

    @property
    def values(self) -> dict[str, Any]:
        tensors = {"q": self.q, "k": self.k, "v": self.v, "mask": None if self.counted else self.mask}
        fakes = {n: node.meta["val"] if node is not None else None for n, node in tensors.items()}
        if self.choice is not None:  # in the memory order of `key_order.in_order`
            fakes.update({n: _dense(fakes[n]) for n in "kv"})
        return {**fakes, "key_lengths": self._lengths(), "sure": self.sure, "causal": self.causal, "scale": self.scale}

    @property
    def sure(self) -> int:
        """Keys that take part in any case, of those that the mask counts or chooses from."""
        if self.choice is not None:
            return self.choice.sure
        return sure(self.lengths) if self.lengths is not None else 0

    @property
    def reordered(self) -> int:
        """Bytes of keys and values that are brought in another order, as in the example inputs."""
        if self.choice is None or self.sizes() is None:
            return 0
        sizes = [compat.hint(s) or 0 for n in (self.k, self.v) for s in n.meta["val"].shape]
        return self.k.meta["val"].element_size() * (math.prod(sizes[:4]) + math.prod(sizes[4:]))

    def _lengths(self) -> torch.Tensor | None:
        if not self.counted:
            return None
        q = self.q.meta["val"]
        with q.fake_mode:
            return torch.empty((q.shape[0],), dtype=torch.int32, device=q.device)

    @property
    def device(self) -> torch.device:
        return self.q.meta["val"].device

    @property
    def results(self) -> list[fx.Node]:
        """The reads of the attention itself."""
        return [u for u in self.node.users if u.target is operator.getitem and u.args[1] == 0]

    @property
    def others(self) -> list[fx.Node]:
        """Readers of anything else: logsumexp, the state of the random numbers."""
        return [u for u in self.node.users if not (u.target is operator.getitem and u.args[1] == 0) and u.users]

    @property
    def grouped(self) -> bool:
        """Whether several heads of q share one of k and v."""
        return not statically_known_true(self.q.meta["val"].shape[1] == self.k.meta["val"].shape[1])

    def sizes(self) -> tuple[int, int, int, int] | None:
        """(head_dim, B*H, queries, keys) as in the example inputs; None where a size has no example."""
        q, k = self.q.meta["val"], self.k.meta["val"]
        batch, heads, queries, head_dim, keys = (compat.hint(s) for s in (*q.shape, k.shape[2]))
        if batch is None or heads is None or queries is None or head_dim is None or keys is None:
            return None
        return head_dim, batch * heads, queries, keys

    def chosen(self, capability: int) -> str:
        """What runs it without us: as traced, or what torch would choose on a GPU of this compute capability.

        On a GPU torch takes the first that can (sdp_utils.cpp): on sm90 and sm100 cuDNN (given one without the errors
        of cuDNN < 9.15.1), FlashAttention 2, memory-efficient attention; elsewhere cuDNN is not asked. cuDNN and
        memory-efficient attention take masks.
        """
        if self.traced is not None:
            return self.traced
        unmasked = {**self.values, "mask": None, "key_lengths": None}
        if capability // 10 in (9, 10) and KERNELS["cudnn"].problem(unmasked, capability) is None:
            return "cudnn"
        if self.mask is None and KERNELS["flash"].problem(self.values, capability) is None:
            return "flash"
        return "efficient" if KERNELS["efficient"].problem(unmasked, capability) is None else "math"


def calls(graph: fx.Graph) -> Iterator[Call]:
    """Every attention in `graph` that torch kept as one op, in order."""
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in OPS:
            continue
        given = bound_arguments(node)
        if not all(isinstance(given[n].meta.get("val"), torch.Tensor) for n in ("query", "key", "value")):
            continue
        mask = given.get("attn_bias", given.get("attn_mask"))
        proved = _proved(mask, given["query"], given["key"], OPS[node.target] == "cudnn")
        yield Call(
            node,
            given["query"],
            given["key"],
            given["value"],
            mask,
            bool(given.get("is_causal", False)),
            given.get("scale"),
            float(given.get("dropout_p", 0.0)),
            OPS[node.target],
            *proved,
        )


def _proved(
    mask: fx.Node | None, q: fx.Node, k: fx.Node, cudnn: bool
) -> tuple[KeyLengths | None, KeyChoice | None, Unproved | None]:
    if mask is None:
        return None, None, None
    batch, _, queries, _ = q.meta["val"].shape
    keys = k.meta["val"].shape[2]
    try:
        lengths = prove(mask, batch, keys, cudnn)
        _check_device(lengths.node, q)
        return lengths, None, None
    except Unproved as why:
        unproved = why
    try:
        found = choice(mask, batch, queries, keys, cudnn)
        _check_device(found.node, q)
        return None, found, None
    except Unproved as why:
        # what keeps a bias from being a choice at all is the more telling of the two
        return None, None, why if why.code in ("mask_input", "mask_values") else unproved


def _check_device(numbers: fx.Node, q: fx.Node) -> None:
    if (place := numbers.meta["val"].device) != q.meta["val"].device:
        raise Unproved(f"the number of keys is on {place}, q on {q.meta['val'].device}")


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like this one, `[B, H, S, d]`, in memory `[B, S, H, d]`."""
    batch, heads, tokens, d = tensor.shape
    with tensor.fake_mode:  # type: ignore[attr-defined]
        return tensor.new_empty((batch, tokens, heads, d)).transpose(1, 2)
