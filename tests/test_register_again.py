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


def by_dims(arguments: Any) -> Any:
    return arguments["x"].dim()


def by_numel(arguments: Any) -> Any:
    return arguments["x"].numel()


def by_sum(arguments: Any, of: int = 2) -> Any:
    return (lambda a: a + 2)(of)


def by_product(arguments: Any, of: int = 2) -> Any:
    return (lambda a: a * 2)(of)


def by_another_sum(arguments: Any, of: int = 3) -> Any:
    return (lambda a: a + 2)(of)


def within(limit: Any) -> Callable[[Any], Any]:
    return lambda arguments: limit


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (by_dims, by_numel),
        (by_sum, by_product),
        (by_sum, by_another_sum),
        (within(4), within(8)),
        (within(lambda a: a < 4), within(lambda a: a > 4)),
    ],
    ids=["names", "inner function", "default", "closure", "function in a closure"],
)
def test_what_differs_is_another_choice(one: Callable[..., Any], other: Callable[..., Any]) -> None:
    identities = set()
    for function in (one, other, one):
        function.__qualname__ = "edited"
        identities.add(Implementation("scale_shift", "mine", (Constraint("c", "text", function),), "a:b").identity)
    assert len(identities) == 2


def test_a_function_that_closes_over_itself_has_an_identity() -> None:
    def again(arguments: Any) -> Any:
        return again

    assert Implementation("scale_shift", "mine", (Constraint("c", "text", again),), "a:b").identity


def test_a_choice_has_one_name() -> None:
    """Sets of strings have another order in each, what is no plain value another address."""
    words = frozenset(("layer", "rms", "none", "batch", "group"))
    assert registry._stated(words) == "{'batch', 'group', 'layer', 'none', 'rms'}"
    values = (object(), torch.zeros(1), lambda: None, torch.float16, {"a": [1]})
    assert "0x" not in registry._stated(values)
