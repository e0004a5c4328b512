"""Kernels that failed in this process: built or launched, an exception came instead of a result.

A failure is about one call signature of one implementation. It is warned about once for each implementation and is
remembered: the choice then passes this implementation over, and calls in programs that were compiled before skip it.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

Key = tuple[str, str, tuple[Any, ...]]  # provider, op, signature


@dataclass(frozen=True)
class Failure:
    """`cause`: the exception's type and first line. `where`: the site, as far as it is known."""

    provider: str
    op: str
    signature: tuple[Any, ...]
    cause: str
    stage: str  # "build" or "launch"
    where: str = field(default="", compare=False)

    @property
    def shape(self) -> tuple[Any, ...]:
        """Of x."""
        x = self.signature[0]
        return x[: x.index("strides")]

    @property
    def message(self) -> str:
        """One sentence for reports."""
        done = "could not be built" if self.stage == "build" else "failed when it was launched"
        return f"{self.provider}'s kernel for {self.op} {done}: {self.cause}"


_known: dict[Key, Failure] = {}
_warned: set[tuple[str, str, str]] = set()
_lock = threading.Lock()
listeners: list[Callable[[Failure], None]] = []  # told about failures at launch


@functools.cache
def defaults(op: str) -> Mapping[str, Any]:
    """The op's arguments with their defaults, None where there is none."""
    from . import ops  # noqa: F401  (registers torch.ops.dkfuse)

    arguments = getattr(torch.ops.dkfuse, op).default._schema.arguments
    return MappingProxyType({a.name: a.default_value for a in arguments})


def signature(op: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """Layouts, dtypes and values of a call, defaults filled in; the same for real and fake tensors of static sizes.

    Without `order`, the result's place in memory, which is decided last.
    """
    items = defaults(op).items()
    return tuple(_described(arguments.get(name, default)) for name, default in items if name != "order")


def _described(value: Any) -> Any:
    if hasattr(value, "stride") and hasattr(value, "shape"):
        sizes = (*value.shape, "strides", *value.stride())
        return (*(s if isinstance(s, (int, str)) else str(s) for s in sizes), value.dtype, value.device)
    return tuple(value) if isinstance(value, list) else value


def cause(error: BaseException) -> str:
    """An exception in one line."""
    from dkfuse.errors import first_line

    text = first_line(error)
    name = type(error).__name__
    return text[:300] if text.startswith(name) else f"{name}: {text[:300]}"


def note(
    provider: str, op: str, arguments: Mapping[str, Any], error: BaseException, stage: str, where: str = ""
) -> Failure:
    """Remember a failure, without a word."""
    failure = Failure(provider, op, signature(op, arguments), cause(error), stage, where)
    with _lock:
        _known[provider, op, failure.signature] = failure
    return failure


def warn(failures: Iterable[Failure], instead: str) -> None:
    """One warning for each implementation among `failures`. instead: what runs now, "plain torch"."""
    from dkfuse.errors import KernelFailedWarning

    by_kernel: dict[tuple[str, str, str], list[Failure]] = {}
    for failure in failures:
        by_kernel.setdefault((failure.provider, failure.op, failure.stage), []).append(failure)
    for key, together in by_kernel.items():
        with _lock:
            known = key in _warned
            _warned.add(key)
        if known:
            continue
        places = list(dict.fromkeys(failure.where for failure in together if failure.where))
        where = f" at {places[0]}" + (f" and {len(places) - 1} more" if len(places) > 1 else "") if places else ""
        warnings.warn(f"dkfuse{where}: {together[0].message}; {instead} instead", KernelFailedWarning, stacklevel=2)


def launch_failed(provider: str, op: str, arguments: Mapping[str, Any], error: BaseException) -> None:
    """Remember and warn, and tell the listeners."""
    failure = note(provider, op, arguments, error, "launch", f"x of shape {tuple(arguments['x'].shape)}")
    warn([failure], "plain torch computes it")
    for listener in list(listeners):
        listener(failure)


def known(provider: str, op: str, arguments: Mapping[str, Any]) -> Failure | None:
    """The failure of this implementation for such a call."""
    if not _known:
        return None
    return _known.get((provider, op, signature(op, arguments)))


def forget(failures: Iterable[Failure] | None = None) -> None:
    """Take failures back, by default all, warnings included."""
    with _lock:
        if failures is None:
            _warned.clear()
            _known.clear()
        else:
            for failure in failures:
                _known.pop((failure.provider, failure.op, failure.signature), None)


def forget_kernel(provider: str, op: str) -> None:
    """Take back what is known of one kernel, which is another one from now on."""
    with _lock:
        for key in [key for key in _known if key[:2] == (provider, op)]:
            del _known[key]
        _warned.difference_update([key for key in _warned if key[:2] == (provider, op)])


def fingerprint() -> str:
    """What a cached choice depends on."""
    return str(sorted((f.provider, f.op, str(f.signature)) for f in _known.values()))
