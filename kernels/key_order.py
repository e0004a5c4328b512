"""`dkfuse::reorder_keys`: keys and values in another order, one for each sample.

    out_k[b, h, j] = k[b, h, order[b, j]]        out_v[b, h, j] = v[b, h, order[b, j]]

Shapes: k, v `[B, H, S, d]`, order int32 or int64 `[B, N]` of numbers in 0..S-1; results `[B, H, N, d]`, in memory
`[B, N, H, d]`. Any strides and addresses. Dtypes: any, k and v of one.

Attention is a sum over keys, so that those that take part may be brought to the front; kernels that take their number
then need no mask (`attention`).
Errors: ValueError for shapes or dtypes that do not fit. A number out of range reads other memory on a GPU.
On a CPU, and where Triton is missing, it is `torch.gather`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

SCHEMA = "reorder_keys(Tensor k, Tensor v, Tensor order) -> (Tensor, Tensor)"


def _check(k: Tensor, v: Tensor, order: Tensor) -> None:
    shapes = f"k {list(k.shape)}, v {list(v.shape)}, order {list(order.shape)}"
    if k.dim() != 4 or v.dim() != 4 or order.dim() != 2:
        raise ValueError(f"dkfuse::reorder_keys: {shapes}; k and v [B, H, S, d] and order [B, N] are needed.")
    wrong = [a != b for a, b in zip(k.shape[:3], v.shape[:3], strict=True)] + [k.shape[0] != order.shape[0]]
    if any(statically_known_true(w) for w in wrong):
        raise ValueError(f"dkfuse::reorder_keys: {shapes}; they differ in samples, heads or tokens.")
    if order.dtype not in (torch.int32, torch.int64) or k.dtype != v.dtype:
        found = f"order is {order.dtype}, k {k.dtype}, v {v.dtype}"
        raise ValueError(f"dkfuse::reorder_keys: {found}; int32 or int64 and one dtype of k and v are needed.")


def _empty(like: Tensor, order: Tensor) -> Tensor:
    batch, heads, _, d = like.shape
    return like.new_empty((batch, order.shape[1], heads, d)).transpose(1, 2)


def _fake(k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    _check(k, v, order)
    return _empty(k, order), _empty(v, order)


def reference(k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The definition."""
    _check(k, v, order)
    results = []
    for tensor in (k, v):
        index = order.long()[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
        results.append(_empty(tensor, order).copy_(tensor.gather(2, index)))
    return results[0], results[1]


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _cuda(k: Tensor, v: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    if not _has_triton() or k.numel() == 0 or order.numel() == 0:
        return reference(k, v, order)
    _check(k, v, order)
    from .triton_key_order import reorder

    out = _empty(k, order), _empty(v, order)
    index = k.device.index
    with torch.cuda.device(index) if index != torch.cuda.current_device() else contextlib.nullcontext():
        reorder(k, out[0], order)
        reorder(v, out[1], order)
    return out


# flexible_layout: k, v and order are read through their strides, so Inductor need not copy them
_library = torch.library.Library("dkfuse", "FRAGMENT")
_library.define(SCHEMA, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
torch.library.register_fake("dkfuse::reorder_keys", _fake, lib=_library)
_library.impl("reorder_keys", reference, "CompositeExplicitAutograd")
_library.impl("reorder_keys", _cuda, "CUDA")
