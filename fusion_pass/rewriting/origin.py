"""Where a node comes from: the model's own source line and module path, from what Dynamo left in ``node.meta``."""

from __future__ import annotations

import os
import re
from typing import Any

import torch
from torch import fx

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')
_TORCH = (
    os.path.dirname(torch.__file__) + os.sep,  # and not any folder of that name, such as a user's
    f"-packages{os.sep}torch{os.sep}",  # of the machine where an exported program was made
    f"{os.sep}dkfuse{os.sep}kernels{os.sep}",
)


def source(node: fx.Node) -> str | None:
    """``file.py:123`` of the innermost frame outside torch, or None."""
    trace = node.meta.get("stack_trace")
    if not trace:
        return None
    frames = [(m["file"], m["line"]) for m in _FRAME.finditer(trace)]
    own = [f for f in frames if not any(part in f[0] for part in _TORCH)]
    if not (own or frames):
        return None
    file, line = (own or frames)[-1]
    return f"{os.path.basename(file)}:{line}"


def module(node: fx.Node) -> str | None:
    """``transformer_blocks.0.norm1``, or None when the graph does not say."""
    stack: dict[str, Any] | None = node.meta.get("nn_module_stack")
    if not stack:
        return None
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['self'\]\.?|^self\.?", "", path)
    path = re.sub(r"\._modules\['([^']+)'\]|\['([^']+)'\]", lambda m: "." + (m[1] or m[2]), path)
    path = re.sub(r"\._modules\b", "", path)
    return path.strip(".").removeprefix("__dict__.") or None
