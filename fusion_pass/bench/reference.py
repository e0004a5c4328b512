"""What the results of all sides are compared with: the model in fp32 where it fits, else in eager mode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def tensors(value: Any) -> list[Tensor]:
    """Every floating-point tensor in a model's output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for item in value for t in tensors(item)] if isinstance(value, (list, tuple)) else []


def difference(results: list[Tensor], reference: list[Tensor]) -> float:
    """Largest relative RMS error ||a - b|| / ||b|| over the outputs."""
    pairs = zip(results, reference, strict=True)
    return max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)


def outputs(module: nn.Module, kwargs: dict[str, Any], fp32: bool = True) -> tuple[list[Tensor], str, str | None]:
    """(outputs, "fp32" or "eager", why it is not fp32)."""
    why = "no fp32 reference was asked for"
    if fp32:
        try:
            return _in_fp32(module, kwargs), "fp32", None
        except torch.cuda.OutOfMemoryError:
            why = "the model does not fit in fp32"
        except RuntimeError as error:  # the model casts to a dtype of its own, which does not mix with fp32
            why = f"the model does not run in fp32 ({str(error).splitlines()[0]})"
    return [t.clone() for t in tensors(module(**kwargs))], "eager", why


def _in_fp32(module: nn.Module, kwargs: dict[str, Any]) -> list[Tensor]:
    """The outputs with weights, buffers and inputs widened; narrowing back gives the very same weights."""

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    held = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    dtypes = [t.dtype for t in held]
    try:
        for tensor in held:
            tensor.data = tensor.data.float()
        return [t.float().clone() for t in tensors(module(**tree_map(widen, kwargs)))]
    finally:
        for tensor, dtype in zip(held, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)
