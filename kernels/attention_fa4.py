"""FlashAttention 4 without the price of its Python: later calls of a kind go straight to the compiled kernel.

`flash_attn.cute` checks, derives and looks up the same things in each call, which costs the CPU more than ten times the
launch. They depend on nothing but the sizes, strides and dtypes of the operands, `causal` and `scale`. So

    first call of such a key    their function; what it gives to the compiled kernel is watched
    later calls of the key      the same compiled kernel with the same arguments, but these q, k, v, out and lengths
    later processes             the same, without their function (`attention_fa4_kept`)

The stream is what it was: the compiled kernel itself asks torch for its current one. Nothing is read by the host, and
no logsumexp is allocated. A direct call is made only where

* the version is one of `cute_ahead.FA4_VERSIONS`, whose calls were read, and
* there was one launch, given q, k, v, out (and the lengths) as they are and else nothing but numbers and None, and
* the compiled kernel, called directly for a few tokens of the first call, gave bit for bit what their function gives;

otherwise their function is called each time. While a CUDA graph is captured nothing is learned, only used.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from . import attention_fa4_kept, attention_kept, attention_lengths, attention_run, cute_ahead
from .attention_fa4_read import Direct, read, watched

log = logging.getLogger("dkfuse")
FEW = 256  # tokens that a compiled kernel is compared on
MOST = 4096  # keys that are remembered

_direct: dict[Hashable, Direct | None] = {}  # None: their function, each time
_named: dict[tuple[str, int], Direct] = {}  # by what a compiled graph knows of its call, and the device
_compared: dict[int, tuple[Any, bool]] = {}  # by id of the compiled kernel, which is kept so that the id stays its own


def again(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float | None,
    bounded: bool = False,
) -> Tensor | None:
    """The attention by a direct call; None where the key is new, is not called directly, or this call may not be.

    Operands as of `dkfuse::attention`; lengths: its key_lengths.
    """
    direct = _direct.get(_key(q, k, v, lengths, causal, scale))
    if direct is None or not _plain(q, k, v) or q.device.index != torch.cuda.current_device():
        return None
    if lengths is not None:
        lengths = attention_lengths.within(lengths, k.shape[2], bounded)
    return direct(q, k, v, lengths)


def first(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float | None,
    bounded: bool = False,
) -> Tensor:
    """The attention by a call from disk, or by FlashAttention's function; from it on, `again` may know the key.

    On the current device.
    """
    key = _key(q, k, v, lengths, causal, scale)
    if lengths is not None:
        lengths = attention_lengths.within(lengths, k.shape[2], bounded)
    if key not in _direct and _plain(q, k, v):
        kept = attention_fa4_kept.find(q, k, v, lengths, causal, scale)
        if kept is not None:
            _remember(key, kept)
            return kept(q, k, v, lengths)
    interface = _interface()
    learns = interface is not None and key not in _direct and _plain(q, k, v) and not _capturing()
    if not learns or any(attention_run.readable(t) is not t for t in (q, k, v)):
        return _theirs(q, k, v, lengths, causal, scale)
    with watched(interface) as calls:
        out = _theirs(q, k, v, lengths, causal, scale)
    direct = read(calls, q, k, v, out, lengths)
    if direct is not None and not _agrees(direct, interface, q, k, v, lengths, causal, scale):
        direct = None
    if direct is not None:
        attention_fa4_kept.keep(direct, q, k, lengths, causal, scale)
    _remember(key, direct)
    return out


def _remember(key: Hashable, direct: Direct | None) -> None:
    if len(_direct) >= MOST:
        _direct.clear()
        _named.clear()
    _direct[key] = direct


def into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float | None,
    bounded: bool,
    key: str | None,
    out: Tensor,
) -> None:
    """The attention of `[B, S, H, d]` tensors, written to `out`, which is contiguous. On the current device.

    key: a text of all but the addresses, which spares later calls from asking for it; None where that may change.
    """
    direct = _named.get((key, q.device.index)) if key is not None else None
    if direct is None:
        direct = _direct.get(_key(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lengths, causal, scale))
        if direct is not None and key is not None:
            _named[key, q.device.index] = direct
    if direct is None or not _plain(q, k, v):
        heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        found = first(*heads, lengths, causal, scale, bounded)
        out.copy_(found.transpose(1, 2))
        return
    if lengths is not None:
        lengths = attention_lengths.within(lengths, k.shape[1], bounded)
    direct.into(out, q, k, v, lengths)


def _key(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float | None) -> Hashable:
    counted = None if lengths is None else (lengths.dtype, lengths.shape)
    return (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(),
        q.dtype, k.dtype, v.dtype, q.device, counted, causal, scale,
    )  # fmt: skip


def _plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether addresses are whole vectors and no gradient is asked for, for which their function makes logsumexp."""
    aligned = not (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
    return aligned and not (q.requires_grad or k.requires_grad or v.requires_grad)


def _theirs(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    if lengths is None:
        return attention_run.fa4(q, k, v, causal, scale)
    return attention_lengths.fa4(q, k, v, lengths, scale)


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _interface() -> Any:
    """The function of theirs that calls compiled kernels out of its `compile_cache`; None in versions not read."""
    if not cute_ahead.fa4_is_known():
        return None
    attention_kept.install()  # before its cache is watched
    try:
        from flash_attn.cute import interface
    except ImportError as error:
        log.info("dkfuse: FlashAttention 4 is called by its own function: %s", error)
        return None
    function = getattr(interface, "_flash_attn_fwd", None)
    return function if hasattr(function, "compile_cache") else None


def _agrees(
    direct: Direct,
    interface: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    causal: bool,
    scale: float | None,
) -> bool:
    """Whether this compiled kernel, called directly, gives what their function gives; compared once per kernel."""
    if id(direct.kernel) not in _compared:
        q, k, v = (t[:1, :, :FEW] for t in (q, k, v))
        lengths = lengths[:1].clamp(max=k.shape[2]) if lengths is not None else None
        with watched(interface) as calls:
            expected = _theirs(q, k, v, lengths, causal, scale)
        few = read(calls, q, k, v, expected, lengths)
        if few is None or few.kernel is not direct.kernel or (few.before, few.after) != (direct.before, direct.after):
            return False
        expected = expected.transpose(1, 2)
        out = torch.full_like(expected, float("nan"))
        direct.into(out, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lengths)
        same = torch.equal(out.view(torch.int16), expected.view(torch.int16))
        _compared[id(direct.kernel)] = direct.kernel, same
        if not same:
            log.warning("dkfuse: FlashAttention 4 called directly gave another result; its own function is called")
    return _compared[id(direct.kernel)][1]
