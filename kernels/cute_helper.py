"""What makes the helper faster at kernels written in CuTe DSL: imported there before the packages, and nowhere else.

Importing quack loads all of Dynamo for ``@torch.compiler.disable`` of its autotuner: half of the time of the imports.
Nothing is traced in the helper, so that the decorator may do nothing.

The DSL asks for the line of source behind each of thousands of operations, and looks at a file for each: a sixth of the
time of a kernel. It is for the words of an error, which the process that asks makes again where there is one.

JAX is not loaded for `cutlass` (`cutlass_import`).

None of it changes a byte of what is compiled.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from .cutlass_import import import_cutlass


def _as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """``torch.compiler.disable``, with and without arguments."""
    return function if function is not None else _as_it_is


with contextlib.suppress(Exception):  # whatever it raises, it raises again where it is needed
    import_cutlass()
torch.compiler.disable = _as_it_is
inspect.getframeinfo = functools.partial(inspect.getframeinfo, context=0)  # type: ignore[assignment]
