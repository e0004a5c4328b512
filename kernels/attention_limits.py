"""What the kernels of `dkfuse::attention` ask of numbers of keys (its operand `key_lengths`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .registry import Constraint

PART = 8


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


def _mostly_sure(arguments: Mapping[str, Any]) -> str | None:
    """Attention in two parts (`attention_parts`) pays where the part with a mask is short."""
    if arguments.get("key_lengths") is None:
        return None
    keys, sure = arguments["k"].shape[2], arguments.get("sure", 0)
    if isinstance(keys, int) and 0 < keys - sure <= keys // PART:
        return None
    return f"of {keys} keys {sure} are known to take part in any case: all but up to an eighth of them are needed"


NO_LENGTHS = Constraint("key_lengths", "no number of keys per sample", _no_lengths)
LENGTHS = Constraint("key_lengths", "numbers of keys int32 or int64 [B], not causal", _lengths)
MOSTLY_SURE = Constraint("key_lengths", "numbers of keys: all but an eighth of them in any case", _mostly_sure)
