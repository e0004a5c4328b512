"""The first call of a compiled graph: a kernel may compile and still be refused by the driver when it is launched.

An exception of the first call whose traceback goes through a launch of a kernel of dkfuse's (the line of Inductor's
wrapper names it: ``dkfuse_norm_modulate_0.run(...)``) is answered by compiling again without that kernel, if the call
can be repeated: the device still works, and nothing was written that a second run would write again. From the first
success on, a call is one Python call more.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import fx

from dkfuse.kernels import failures

from ..errors import KernelLaunchError

OURS = re.compile(r"\bdkfuse_[a-z]\w*(\.\w+)?")


def watched(compiled: Callable, recover: Callable[[Exception], Callable | None], once: str | None) -> Callable:
    """`compiled`, whose first call is watched.

    recover: what to run from now on after such an exception; None where the exception is not about kernels of ours.
    once: why a call must not be repeated ("writes into its inputs"): it then raises KernelLaunchError, and the next
    call runs what `recover` made. The result takes its arguments as `compiled` does, boxed or not, and has its
    attributes.
    """
    run: Callable = compiled

    def first(*args: Any) -> Any:
        nonlocal run
        # torch marks functions as boxed that take their arguments one by one; a boxed call empties its list
        boxed = len(args) == 1 and isinstance(args[0], list)
        held = tuple(args[0]) if boxed else args
        try:
            result = compiled(*args)
        except Exception as error:
            other = recover(error) if _repeatable(error) else None
            if other is None:
                raise
            run = (lambda values: other(*values)) if boxed else other
            if once is not None:
                raise KernelLaunchError(
                    f"{_name(error)} failed when it was launched ({failures.cause(error)}) in a graph that {once}, so "
                    "that this call cannot be repeated: call again with inputs as they were, from now on without it"
                ) from error
            return other(*held)
        run = compiled
        return result

    run = first

    def call(*args: Any) -> Any:
        return run(*args)

    call.__dict__.update(getattr(compiled, "__dict__", {}))  # what torch reads of it: _boxed_call, serialize, ...
    return call


def unrepeatable(graph: fx.Graph) -> str | None:
    """What a second run of a functional ATen graph would do twice, "writes into its inputs"; None where nothing."""
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and any(a.op == "placeholder" for a in node.all_input_nodes):
            return "writes into its inputs"
        if getattr(node.target, "namespace", "") in ("_c10d_functional", "_dtensor"):
            return "communicates with other processes"
        if str(node.target) == "with_effects":
            return "has side effects"
    return None


def launch_lines(error: BaseException) -> str:
    """The lines of code that an exception, and those that it came from, went through."""
    return "\n".join(line for cause in _causes(error) for line in _lines(cause.__traceback__))


def _repeatable(error: BaseException) -> bool:
    """Whether the device works as before: not out of memory, no fault of a kernel that ran, no capture cut short."""
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return False
    if not OURS.search(launch_lines(error)):
        return False
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        if torch.cuda.is_current_stream_capturing():
            return False
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # an earlier kernel's illegal access: the context is lost, and so is every later call
            return False
    return True


def _name(error: BaseException) -> str:
    found = OURS.search(launch_lines(error))
    return found[0].removesuffix(".run") if found else "a kernel"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _lines(trace: TracebackType | None) -> Iterator[str]:
    while trace is not None:
        yield linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno, trace.tb_frame.f_globals).strip()
        trace = trace.tb_next


__all__ = ["launch_lines", "unrepeatable", "watched"]
