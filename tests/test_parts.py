"""Parts of a pointwise result as operands of kernels: Inductor computes each into dense memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import dkfuse
from dkfuse import compat
from dkfuse.fuse import plan
from dkfuse.kernels import registry
from dkfuse.kernels.registry import Implementation
from dkfuse.rewriting.calls import bound_arguments
from dkfuse.rewriting.parts import close_gaps
from dkfuse.rewriting.replace import replace
from dkfuse.settings import Settings

from .harness import check_numerics, counts, spell

pytestmark = pytest.mark.usefixtures("fresh_providers")
INPUTS = "x:BLD a:BLP b:BLP w:DD"
GAPS = (6 * 6 * 36, 6 * 36, 1)


def ln(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def of_a_product(x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    shift, scale, *_ = (a * b).unflatten(2, (6, -1)).split(1, dim=2)
    return (ln(x) * (1 + scale.squeeze(2)) + shift.squeeze(2)) @ w


def of_an_input(x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    shift, scale, *_ = a.unflatten(2, (6, -1)).unbind(2)
    return (ln(x) * (1 + scale) + shift) @ w


def of_a_matmul(x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    shift, scale, *_ = (a @ b[0].mT @ b[0]).unflatten(2, (6, -1)).unbind(2)
    return (ln(x) * (1 + scale) + shift) @ w


def of_one_that_is_returned(x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    product = (a * b).unflatten(2, (6, -1))
    shift, scale, *_ = product.unbind(2)
    return (ln(x) * (1 + scale) + shift) @ w, product


def of_much(x: Tensor, a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    for _ in range(30):
        a = torch.sin(a) * b
    shift, scale, *_ = a.unflatten(2, (6, -1)).split(1, dim=2)
    return (ln(x) * (1 + scale.squeeze(2)) + shift.squeeze(2)) @ w


def strides_of(function: Callable[..., Any]) -> list[tuple[int, ...]]:
    """The strides of scale and shift as the one site's kernel gets them."""
    found: list[tuple[int, ...]] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        def inner(module: fx.GraphModule, _: Any) -> Callable:
            decided = plan(module.graph, Settings(target="sm90"))
            (call,) = replace(module.graph, decided.view, decided.taken)
            close_gaps(module.graph, [call])
            module.graph.lint()
            found.extend(bound_arguments(call)[name].meta["val"].stride() for name in ("scale", "shift"))
            return module.forward

        return compat.lower_with(gm, inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*spell(INPUTS))
    return found


@pytest.mark.parametrize(
    ("function", "strides"),
    [
        (of_a_product, (6 * 36, 36, 1)),
        (of_an_input, GAPS),
        (of_a_matmul, GAPS),
        (of_one_that_is_returned, GAPS),
        (of_much, GAPS),
    ],
)
def test_only_what_inductor_computes_in_parts_is_copied(function: Callable, strides: tuple[int, ...]) -> None:
    assert strides_of(function) == [strides, strides]


def test_inductor_allocates_no_gaps() -> None:
    from torch._inductor.utils import run_and_get_code

    seen: list[tuple[int, ...]] = []

    def run(arguments: Any, outputs: Any) -> None:
        seen.extend(arguments[name].stride() for name in ("scale", "shift"))
        x, scale, shift = (arguments[name].float() for name in ("x", "scale", "shift"))
        outputs["out"].copy_(ln(x) * (arguments["scale_offset"] + scale) + shift)

    registry.register(Implementation("norm_modulate", "mine", (), run, oldest=0, devices=("cpu",)))
    args = spell(INPUTS)
    torch.compiler.reset()
    compiled = torch.compile(of_a_product, backend="dkfuse", dynamic=False, options={"dkfuse.kernels": "mine"})
    with torch.no_grad(), dkfuse.record() as coverage:
        result, code = run_and_get_code(compiled, *args)
    assert counts(coverage) == {"norm_modulate": 1}, str(coverage)
    assert seen == [(6 * 36, 36, 1)] * 2
    assert f"(2, 6, 36), {GAPS}" not in code[0] and "(2, 6, 36), (216, 36, 1)" in code[0]
    check_numerics(of_a_product, args, (result,))
