"""What FlashAttention 4's own function gives to a compiled kernel, and the direct call that this amounts to.

    with watched(function) as calls:            what it calls is noted
        out = theirs(q, k, v)
    read(calls, q, k, v, out, lengths)          the same call of other tensors, if there is nothing more to it

There is where it launched once, and gave the kernel q, k, v, out and the lengths as they are, else numbers and None.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

OUT, LENGTHS = 3, 9  # where the compiled kernel takes them; q, k and v come first

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


class Watch:
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
def watched(function: Any) -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """Inside, what this thread calls of `function`'s compiled kernels is noted, with its arguments."""
    with _lock:
        cache = function.compile_cache
        watch = function.compile_cache = Watch(cache)
        try:
            yield watch.calls
        finally:
            function.compile_cache = cache


def read(
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
