"""dkfuse: `torch.compile(model, backend="dkfuse")` for diffusion transformers.

    dkfuse.coverage(module, *args, **kwargs) -> Coverage     what would be fused, without running the model
    with dkfuse.record() as coverage: ...                    what was fused in the compilations inside the block
    dkfuse.pack(model) -> Packed                             projections of one input side by side, before compiling
    dkfuse.dkfuse                                            the backend itself, as a function
    dkfuse.register(Implementation(...))                     a kernel of your own for one of the ops

Everything is loaded on first use: importing this package imports neither torch nor any kernel library.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from dkfuse.kernels.registry import Constraint, Implementation, register

    from .backend import dkfuse
    from .packing import Packed, PackError, pack
    from .reporting.recording import coverage, record
    from .reporting.report import Coverage, Graph, Reason, Site, Status
    from .settings import Settings

_HERE = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_HERE, "kernels")):
    # A checkout (editable or bare) keeps dkfuse.patterns and dkfuse.kernels beside this folder, a wheel inside it.
    __path__.append(os.path.dirname(_HERE))

_LAZY = {
    "dkfuse": "backend",
    "coverage": "reporting.recording",
    "pack": "packing",
    "Packed": "packing",
    "PackError": "packing",
    "record": "reporting.recording",
    "Coverage": "reporting.report",
    "Graph": "reporting.report",
    "Reason": "reporting.report",
    "Site": "reporting.report",
    "Status": "reporting.report",
    "Settings": "settings",
    "Constraint": "kernels.registry",
    "Implementation": "kernels.registry",
    "register": "kernels.registry",
}

__all__ = [
    "Constraint",
    "Coverage",
    "Graph",
    "Implementation",
    "PackError",
    "Packed",
    "Reason",
    "Settings",
    "Site",
    "Status",
    "__version__",
    "coverage",
    "dkfuse",
    "pack",
    "record",
    "register",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module 'dkfuse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
