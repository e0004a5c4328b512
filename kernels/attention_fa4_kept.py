"""FlashAttention 4's direct calls from one process to the next, so that a later one need not import the package.

    keep(direct, q, k, lengths, causal, scale)    what a call that was read and compared amounts to, with its kernel
    find(q, k, v, lengths, causal, scale)         the direct call of these operands from disk, or None

On GPUs of `gemm_ahead.CAPABILITY` one kernel of a kind (`attention_kept.Kind`) serves all sizes, and a call has nothing
but tensors, the scale and None (`_flash_attn_fwd` of `cute_ahead.FA4_VERSIONS`, without splits of the keys); another
call than that is not kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import attention_kept, attention_run, cute_ahead, gemm_ahead
from .attention_fa4_read import Direct
from .attention_kept import Kind
from .shared_library import Form, Function

SCALE = "scale"  # where the scale stands in a form

_known: dict[Kind, tuple[Function, Form] | None] = {}


def keep(direct: Direct, q: Tensor, k: Tensor, lengths: Tensor | None, causal: bool, scale: float | None) -> None:
    """Leave a direct call on disk, for all calls of its kind."""
    kind, scale = _kind(q, k, lengths, causal), _scale(q, scale)
    if not _serves(q) or _known.get(kind) is not None or attention_kept.on_disk(kind):
        return
    numbers = [number for number in _flat((direct.before, direct.after)) if number is not None]
    if numbers == [scale]:
        form = {"before": _marked(direct.before), "after": _marked(direct.after)}
        attention_kept.keep_call(kind, direct.kernel, form)


def find(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float | None) -> Direct | None:
    """The direct call of `[B, H, S, d]` operands that the kernel reads in place, if its kind is on disk."""
    same = k.shape == v.shape and q.shape[3] == k.shape[3] and q.dtype == k.dtype == v.dtype
    readable = all(attention_run.readable(t) is t for t in (q, k, v))
    if not same or not readable or not (q.numel() and k.numel()) or not _serves(q) or not cute_ahead.fa4_is_known():
        return None
    kind = _kind(q, k, lengths, causal)
    if kind not in _known:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        _known[kind] = attention_kept.call(kind)
    found = _known[kind]
    if found is None:
        return None
    function, form = found
    before, after = (_filled(form[part], _scale(q, scale)) for part in ("before", "after"))
    batch, heads, tokens, width = q.shape
    return Direct(function, before, after, (batch, tokens, heads, width))


def _serves(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.get_device_capability(q.device) == divmod(gemm_ahead.CAPABILITY, 10)


def _kind(q: Tensor, k: Tensor, lengths: Tensor | None, causal: bool) -> Kind:
    return Kind.of(q.dtype, q.shape[3], q.shape[1] // (k.shape[1] or 1), causal, lengths is not None)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[3]) if scale is None else scale


def _flat(value: Any) -> list[Any]:
    return [leaf for part in value for leaf in _flat(part)] if isinstance(value, tuple) else [value]


def _marked(value: Any) -> Any:
    """Constants of a call as JSON, with `SCALE` for the only number."""
    if isinstance(value, tuple):
        return [_marked(part) for part in value]
    return None if value is None else SCALE


def _filled(value: Any, scale: float) -> Any:
    """The constants of a call with this scale."""
    if isinstance(value, list):
        return tuple(_filled(part, scale) for part in value)
    return scale if value == SCALE else value
