"""An implementation as a torch op: ``torch.ops.dkfuse_<provider>.<op>``, with the schema of ``dkfuse::<op>``.

That is how compiled programs call what is not Triton. On a device that the implementation does not run on, for calls
that it does not take, and for calls that it failed on once, the op computes its definition. Results are allocated as
the op's own are; out of memory is raised as it is.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from . import failures, ops, registry
from .bounded import kept
from .registry import Implementation

_libraries: dict[str, torch.library.Library] = {}
_defined: set[Implementation] = set()
_calls: dict[tuple[Any, ...], Implementation | None] = {}


def define(implementation: Implementation) -> Any:
    """The op of an implementation, defined when it is first asked for.

    RuntimeError where an op of that name exists with another schema: a call of one would mean another thing.
    """
    op, namespace = implementation.op, f"dkfuse_{implementation.provider}"
    wanted = getattr(torch.ops.dkfuse, op).default._schema
    packet = getattr(getattr(torch.ops, namespace), op, None)
    if packet is None:
        library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
        text = str(wanted)
        library.define(text[text.index("::") + 2 :], tags=_tags())
        torch.library.register_fake(f"{namespace}::{op}", ops._bound(op, ops._fake), lib=library)
        library.impl(op, _caller(implementation.provider, op), "CompositeExplicitAutograd")
        packet = getattr(getattr(torch.ops, namespace), op)
    found = packet.default._schema
    if str(found).split("::")[1] != str(wanted).split("::")[1]:
        raise RuntimeError(f"{namespace}::{op} exists with another schema than dkfuse::{op}: {found}.")
    return packet.default


def define_all() -> None:
    """Define every op, so that a program from Inductor's cache finds the ones that it calls."""
    for implementation in registry.implementations().values():
        if implementation not in _defined:
            define(implementation)
            _defined.add(implementation)


def _tags() -> tuple[torch.Tag, ...]:
    """Checked strides are the strides that arrive: Inductor may not change the layout of an operand."""
    return torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides


def _caller(provider: str, op: str) -> Any:
    """What the op does: binds its arguments by name and calls."""
    arguments = getattr(torch.ops.dkfuse, op).default._schema.arguments
    names = [a.name for a in arguments]
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}

    def call(*args: Any, **kwargs: Any) -> Any:
        return _call(provider, op, {**defaults, **dict(zip(names, args, strict=False)), **kwargs})

    call.__name__ = call.__qualname__ = f"{provider}_{op}"
    return call


def _call(provider: str, op: str, arguments: dict[str, Any]) -> Any:
    key = (provider, *ops._signature(op, arguments))
    implementation = kept(_calls, key, lambda: _server(provider, op, arguments))
    if implementation is None:
        return ops._plain(op, arguments)
    outputs = ops._empty_outputs(op, arguments)
    written = {k: t for k, t in outputs.items() if k != "sum" or arguments["sum_dtype"] is not None}
    x = arguments["x"]
    try:
        with torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext():
            implementation.load()(arguments, written)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _calls[key] = None
        result = ops._plain(op, arguments)  # where that fails too, the error was not the kernel's
        failures.launch_failed(provider, op, arguments, error)
        return result
    return ops._returned(outputs)


def _server(provider: str, op: str, arguments: dict[str, Any]) -> Implementation | None:
    """The implementation that serves such calls; None where plain torch must."""
    ops.check(op, arguments)
    implementation = registry.find(provider, op)
    if implementation is None or not implementation.runs_on(arguments["x"].device.type):
        return None
    if arguments["x"].numel() == 0 or implementation.problem(arguments) is not None:
        return None
    return implementation if failures.known(provider, op, arguments) is None else None


def reset() -> None:
    """Forget which calls are served by what, as after `register` replaced an implementation."""
    _calls.clear()
