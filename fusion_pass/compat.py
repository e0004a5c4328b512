"""Every private torch import of dkfuse, in one file; `tests/test_compat.py` is the canary for torch upgrades."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols as free_unbacked_symbols
from torch.fx.experimental.symbolic_shapes import statically_known_true as _statically_known_true


def statically_known_true(condition: Any) -> bool:
    """True when `condition` holds for every value of the symbols in it; never adds a guard."""
    return condition if isinstance(condition, bool) else _statically_known_true(condition)


def stable_topological_sort(graph: torch.fx.Graph) -> None:
    """Order `graph` so that every node follows its inputs, moving as little as possible."""
    from torch._inductor.pattern_matcher import stable_topological_sort as sort

    sort(graph)
