"""A kernel that is registered in the place of another one: it runs from then on, and is a cached choice of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dkfuse
from dkfuse.errors import KernelFailedWarning
from dkfuse.kernels import failures, registry
from dkfuse.kernels.registry import Constraint, Implementation

pytestmark = pytest.mark.usefixtures("fresh_providers")
X = torch.zeros(2, 8)


def register(run: Callable[..., Any], *constraints: Constraint) -> Implementation:
    return dkfuse.register(Implementation("scale_shift", "mine", constraints, run, devices=("cpu",)))


def fills(number: float) -> Callable[..., Any]:
    return lambda arguments, outputs: outputs["out"].fill_(number)


def called() -> float:
    """The op as compiled programs call it: its definition gives 0."""
    return torch.ops.dkfuse_mine.scale_shift(X, None, None, out_dtype=torch.float32)[0, 0].item()


def test_the_last_one_runs_also_for_calls_that_were_made_before() -> None:
    found = []
    for number in (1.0, 2.0):
        register(fills(number))
        found.append(called())
    registry.unregister("mine")
    assert [*found, called()] == [1.0, 2.0, 0.0]


def test_what_the_one_before_failed_at_is_tried_again() -> None:
    def broken(arguments: Any, outputs: Any) -> None:
        raise RuntimeError("a bug")

    for _ in range(2):  # and each is warned about
        register(broken)
        with pytest.warns(KernelFailedWarning, match="a bug"):
            assert called() == 0.0
    register(fills(3.0))
    assert called() == 3.0 and failures.known("mine", "scale_shift", {"x": X, "out_dtype": torch.float32}) is None
