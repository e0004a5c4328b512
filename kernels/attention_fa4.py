"""FlashAttention 4 without the price of its Python: later calls of a kind go straight to the compiled kernel.

`flash_attn.cute` checks, derives and looks up the same things in each call, which costs the CPU more than ten times the
launch. They depend on nothing but the sizes, strides and dtypes of the operands, `causal` and `scale`. So

    first call of such a key    their function; what it gives to the compiled kernel is watched
    later calls of the key      the same compiled kernel with the same arguments, but these q, k, v, out and lengths

The stream is what it was: the compiled kernel itself asks torch for its current one. Nothing is read by the host, and
no logsumexp is allocated. A direct call is made only where

* the version is one of `VERSIONS`, whose calls were read, and
* there was one launch, given q, k, v, out (and the lengths) as they are and else nothing but numbers and None, and
* the compiled kernel, called directly for a few tokens of the first call, gave bit for bit what their function gives;

otherwise their function is called each time. While a CUDA graph is captured nothing is learned, only used.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import attention_kept, attention_kernels, attention_lengths, attention_run
from .attention_kept import VERSIONS

log = logging.getLogger("dkfuse")
FEW = 256  # tokens that a compiled kernel is compared on
MOST = 4096  # keys that are remembered
OUT, LENGTHS = 3, 9  # where the compiled kernel takes them; q, k and v come first

_direct: dict[Hashable, Direct | None] = {}  # None: their function, each time
_named: dict[tuple[str, int], Direct] = {}  # by what a compiled graph knows of its call, and the device
_compared: dict[int, tuple[Any, bool]] = {}  # by id of the compiled kernel, which is kept so that the id stays its own
_lock = threading.Lock()


@dataclass(frozen=True)
class Direct:
    """A compiled kernel with what it takes besides the tensors, in two halves around the lengths."""

    kernel: Callable[..., Any]
    before: tuple[Any, ...]
    after: tuple[Any, ...]
    shape: tuple[int, ...]  # of out, `[B, S, H, d]`

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        out = q.new_empty(self.shape)
        self.into(out, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), lengths)
        return out.transpose(1, 2)

    def into(self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> None:
        """The same of `[B, S, H, d]` tensors, written to `out`."""
        self.kernel(q, k, v, out, *self.before, lengths, *self.after)


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
    """The attention by FlashAttention's function; from it on, `again` may know the key. On the current device."""
    key = _key(q, k, v, lengths, causal, scale)
    if lengths is not None:
        lengths = attention_lengths.within(lengths, k.shape[2], bounded)
    interface = _interface()
    learns = interface is not None and key not in _direct and _plain(q, k, v) and not _capturing()
    if not learns or any(attention_run.readable(t) is not t for t in (q, k, v)):
        return _theirs(q, k, v, lengths, causal, scale)
    with _watched(interface) as calls:
        out = _theirs(q, k, v, lengths, causal, scale)
    direct = _read(calls, q, k, v, out, lengths)
    if direct is not None and not _agrees(direct, interface, q, k, v, lengths, causal, scale):
        direct = None
    if len(_direct) >= MOST:
        _direct.clear()
        _named.clear()
    _direct[key] = direct
    return out


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


def known() -> bool:
    """Whether the installed version's compiled kernels are called directly."""
    return attention_kernels.version_of("fa4") in VERSIONS


def _interface() -> Any:
    """The function of theirs that calls compiled kernels out of its `compile_cache`; None in versions not read."""
    if not known():
        return None
    attention_kept.install()  # before its cache is watched
    try:
        from flash_attn.cute import interface
    except ImportError as error:
        log.info("dkfuse: FlashAttention 4 is called by its own function: %s", error)
        return None
    function = getattr(interface, "_flash_attn_fwd", None)
    return function if hasattr(function, "compile_cache") else None


# -- what their function does ------------------------------------------------------------------------------------------


class _Watch:
    """Their cache of compiled kernels, which notes what this thread calls out of it."""

    def __init__(self, cache: Any):
        self.cache, self.thread = cache, threading.get_ident()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __contains__(self, key: Hashable) -> bool:
        return key in self.cache

    def __setitem__(self, key: Hashable, kernel: Any) -> None:
        self.cache[key] = kernel

    def __getitem__(self, key: Hashable) -> Any:
        kernel = self.cache[key]
        if threading.get_ident() != self.thread:
            return kernel

        def noted(*args: Any) -> Any:
            self.calls.append((kernel, args))
            return kernel(*args)

        return noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


@contextmanager
def _watched(function: Any) -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    with _lock:
        cache = function.compile_cache
        watch = function.compile_cache = _Watch(cache)
        try:
            yield watch.calls
        finally:
            function.compile_cache = cache


def _read(
    calls: list[tuple[Any, tuple[Any, ...]]], q: Tensor, k: Tensor, v: Tensor, out: Tensor, lengths: Tensor | None
) -> Direct | None:
    """The direct call that these calls amount to; None where they are not what is expected."""
    if len(calls) != 1:
        return None
    ((kernel, args),) = calls
    operands = {i: t.transpose(1, 2) for i, t in enumerate((q, k, v, out))}
    if lengths is not None:
        operands[LENGTHS] = lengths
    if len(args) <= LENGTHS or not operands[OUT].is_contiguous() or out.dtype != q.dtype:
        return None
    given = [_same(args[i], operands[i]) if i in operands else _constant(args[i]) for i in range(len(args))]
    if not all(given):
        return None
    return Direct(kernel, args[OUT + 1 : LENGTHS], args[LENGTHS + 1 :], tuple(operands[OUT].shape))


def _same(given: Any, tensor: Tensor) -> bool:
    return isinstance(given, Tensor) and _place(given) == _place(tensor)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _constant(given: Any) -> bool:
    """None and numbers, also in tuples: nothing that could be of this call alone."""
    if isinstance(given, tuple):
        return all(map(_constant, given))
    return given is None or isinstance(given, (int, float))


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
        with _watched(interface) as calls:
            expected = _theirs(q, k, v, lengths, causal, scale)
        few = _read(calls, q, k, v, expected, lengths)
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
