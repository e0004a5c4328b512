"""What the kernels of `dkfuse::attention` ask of numbers of keys (its operand `key_lengths`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .registry import Constraint

INT32 = 2**31 - 1


def _no_lengths(arguments: Mapping[str, Any]) -> str | None:
    lengths = arguments.get("key_lengths")
    return None if lengths is None else "it takes no number of keys per sample, and no mask that says the same"


def _lengths(arguments: Mapping[str, Any]) -> str | None:
    lengths, batch = arguments.get("key_lengths"), arguments["q"].shape[0]
    if lengths is None:
        return None
    if arguments["causal"]:
        return "numbers of keys and a causal mask do not go together"
    if lengths.dtype not in (torch.int32, torch.int64) or not statically_known_true(lengths.numel() == batch):
        return f"the numbers of keys are {lengths.dtype} {list(lengths.shape)}, int32 or int64 [{batch}] are needed"
    return None


def _packed_lengths(arguments: Mapping[str, Any]) -> str | None:
    """cuDNN through torch: offsets of packed sequences, whose differences are the lengths, in int32 elements."""
    if arguments.get("key_lengths") is None:
        return None
    q, k = arguments["q"], arguments["k"]
    if not statically_known_true(q.shape[0] == 1):
        return f"numbers of keys are taken for one sample only, there are {q.shape[0]}"
    if arguments["capability"] // 10 not in (9, 10):
        return f"numbers of keys are taken from sm90 to sm103, not on sm{arguments['capability']}"
    if not statically_known_true(q.shape[1] == k.shape[1]):
        return f"{q.shape[1]} heads of q share {k.shape[1]} of k and v: not together with numbers of keys"
    for name in "qkv":
        tensor = arguments[name]
        if statically_known_true(tensor.shape[2] * tensor.stride(2) > INT32):
            return f"{name} spans {tensor.shape[2] * tensor.stride(2)} elements, numbers of keys need at most {INT32}"
        if not statically_known_true(tensor.stride(2) >= tensor.shape[1] * tensor.stride(1)):
            return f"{name} has strides {list(tensor.stride())}: with numbers of keys it must be [B, S, H, d] in memory"
    return None


NO_LENGTHS = Constraint("key_lengths", "no number of keys per sample", _no_lengths)
LENGTHS = Constraint("key_lengths", "numbers of keys int32 or int64 [B], not causal", _lengths)
ONE_PACKED = Constraint("key_lengths", "numbers of keys: one sample, [B, S, H, d] in memory", _packed_lengths)
