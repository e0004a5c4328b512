"""Biases that are added behind a product and views; weights that are widened for each call, and their scales."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dkfuse.matching.gain import is_elementwise
from dkfuse.seams import biases, widened
from dkfuse.seams.linear import TRANSPOSES, linears
from dkfuse.settings import Settings

from .harness import FP32, exact, rms, run, spell, tally


def of_fp8(x: Tensor, w: Tensor) -> Tensor:
    """A product of weights that are widened for each call."""
    return x @ (w.to(torch.float8_e4m3fn).to(x.dtype) * 0.5).t()


def of_transposed_fp8(x: Tensor, w: Tensor) -> Tensor:
    """As torchao's float8 weights are: transposed, then widened with a scale for each of them."""
    scales = torch.full((1, len(w)), 0.5, dtype=torch.float32)
    return x @ (w.to(torch.float8_e4m3fn).t().float() * scales).to(x.dtype)


def queries(x: Tensor, w: Tensor, b: Tensor, g: Tensor, product: Any = of_fp8) -> Tensor:
    q = (product(x, w) + b).unflatten(-1, (4, -1)).transpose(1, 2)
    q = F.rms_norm(q, (q.shape[-1],), g, 1e-6)
    return F.scaled_dot_product_attention(q, q, q)


def read_twice(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
    y = of_fp8(x, w)
    return (y + b) * y.sigmoid()


def of_a_row_for_each_sample(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return of_fp8(x, w) + b.expand(x.shape[0], 1, -1) * 1.0


def args(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return spell("x:BLD w:DD b:D g:K", dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("product", [of_fp8, of_transposed_fp8])
def test_a_norm_behind_a_bias_reads_a_product(product: Any, dynamic: bool) -> None:
    function, given = partial(queries, product=product), args()
    if dynamic:
        torch._dynamo.mark_dynamic(given[0], 1)
    results, coverage = run(function, given, target="sm90", dynamic=None if dynamic else False)
    assert tally(coverage.sites) == {"qk_norm": 1}, str(coverage)
    torch.testing.assert_close(results[0], function(*given), rtol=0.02, atol=0.02)


def sums(function: Any, settings: Settings, dtype: torch.dtype = torch.bfloat16) -> int:
    """How many products with a bias there are once they are put in."""
    found = []

    def noted(graph: torch.fx.Graph, _: Settings) -> None:
        before(graph, settings)
        found.append(len(graph.find_nodes(op="call_function", target=torch.ops.aten.addmm.default)))

    before = biases.into_products
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(biases, "into_products", noted)
        given = args(dtype)
        results, _ = run(function, given, target="sm90", roundings=settings.roundings)
    (reference,) = exact(function, given)
    assert rms(results[0] - reference) <= 1.02 * rms(function(*given) - reference)
    (count,) = found
    return count


def plain(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return of_fp8(x, w) + b


def transposed_first(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return of_transposed_fp8(x, w) + b


def test_which_sums_are_products() -> None:
    assert sums(plain, Settings()) == sums(transposed_first, Settings()) == 1
    assert sums(plain, Settings(roundings="eager")) == 0
    assert sums(plain, Settings(), FP32) == 0
    assert sums(read_twice, Settings()) == 0
    assert sums(of_a_row_for_each_sample, Settings()) == 0


def test_a_bias_that_is_a_sum_itself() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
        own = (of_fp8(x[0, :1], w)).view(-1) + b
        return of_fp8(x, w) + own

    assert sums(function, Settings()) == 2


# -- widened weights ---------------------------------------------------------------------------------------------------


def of_int8(x: Tensor, w: Tensor, s: Tensor) -> Tensor:
    """As torchao's int8 weights: widened, and multiplied with a scale for each column of the product."""
    return (x.flatten(0, 1) @ w.to(x.dtype).t() * s).view(*x.shape[:2], -1)


def queries_of_int8(x: Tensor, w: Tensor, s: Tensor, b: Tensor, g: Tensor) -> Tensor:
    q = (of_int8(x, w, s) + b).unflatten(-1, (4, -1)).transpose(1, 2)
    q = F.rms_norm(q, (q.shape[-1],), g, 1e-6)
    return F.scaled_dot_product_attention(q, q, q)


def quantized(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    x, w, b, g = args(dtype)
    scale = w.float().abs().amax(1) / 127
    return [x, (w / scale[:, None]).round().to(torch.int8), scale.to(dtype), b, g]


def multiples(function: Any, given: list[Tensor], **settings: Any) -> int:
    """How many products the pass leaves that are multiplied with a scale."""
    found = []

    def noted(graph: torch.fx.Graph, _: Settings) -> None:
        before(graph, _)
        products = [n.args[0] for n in graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)]
        found.append(sum(getattr(p, "target", None) is torch.ops.aten.mm.default for p in products))

    before = widened.bring_into_form
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened, "bring_into_form", noted)
        results, _ = run(function, given, target="sm90", **settings)
    (reference,) = exact(function, given)
    assert rms(results[0] - reference) <= 1.02 * rms(function(*given) - reference)
    return found[0]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_norm_behind_a_scale_reads_a_product(dynamic: bool) -> None:
    given = quantized()
    if dynamic:
        torch._dynamo.mark_dynamic(given[0], 1)
    results, coverage = run(queries_of_int8, given, target="sm90", dynamic=None if dynamic else False)
    assert tally(coverage.sites) == {"qk_norm": 1}, str(coverage)
    (reference,) = exact(queries_of_int8, given)
    assert rms(results[0] - reference) <= 1.02 * rms(queries_of_int8(*given) - reference)


def test_which_scales_are_the_weights() -> None:
    def plain(x: Tensor, w: Tensor, s: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return of_int8(x, w, s)

    def read_twice(x: Tensor, w: Tensor, s: Tensor, b: Tensor, g: Tensor) -> Tensor:
        rows, widened = x.flatten(0, 1), w.to(x.dtype).t()  # one pass for both, with a scale each
        return rows @ widened * s + rows.flip(0) @ widened * b

    def gated(x: Tensor, w: Tensor, s: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return of_int8(x, b.outer(b), s)  # another pass over the weights

    given = quantized()
    assert multiples(plain, given) == 0
    assert multiples(plain, given, roundings="eager") == 1
    assert multiples(plain, quantized(FP32)) == 1
    assert multiples(read_twice, given) == 2
    assert multiples(gated, given) == 1
    assert (
        multiples(plain, [given[0], given[1].to(torch.int16), *given[2:]]) == 1
    )  # bfloat16 does not hold all of int16


def test_linears_are_read_of_weights_that_were_transposed_first() -> None:
    def of_activations(x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return x[0] @ (x[1] * 2).view(x.shape[2], -1)  # dense, not the transpose of dense rows

    found = []

    def noted(graph: torch.fx.Graph, settings: Settings) -> None:
        before(graph, settings)
        found.append([linear.weight.meta["val"].stride() for linear in linears(graph)])

    before = widened.bring_into_form
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened, "bring_into_form", noted)
        for function in (transposed_first, of_activations):
            given = args()
            results, _ = run(function, given, target="sm90")
            torch.testing.assert_close(results[0], function(*given), rtol=0.02, atol=0.02)
    width = args()[1].shape[1]
    assert found == [[(width, 1)], []]


def test_weights_are_widened_as_they_lie() -> None:
    """Not column by column, which is what Inductor makes of weights that are transposed first: it writes rows."""

    def read_by_two(x: Tensor, w: Tensor, s: Tensor, b: Tensor, g: Tensor) -> Tensor:
        rows, columns = x.flatten(0, 1), w.t().to(x.dtype) * s
        return rows @ columns + torch.addmm(b, rows.flip(0), columns)

    def with_a_zero(x: Tensor, w: Tensor, s: Tensor, b: Tensor, g: Tensor) -> Tensor:
        zeros, least = b[None].float().round(), torch.tensor(0.25, dtype=torch.float32)
        return x.flatten(0, 1) @ ((w.t().float() - zeros) * (s.float() + least)).to(x.dtype)

    def read_elsewhere(x: Tensor, w: Tensor, s: Tensor, b: Tensor, g: Tensor) -> Tensor:
        columns = w.t().to(x.dtype) * s
        return x.flatten(0, 1) @ columns + columns.sum(0)

    found = []

    def noted(graph: torch.fx.Graph, settings: Settings) -> None:
        before(graph, settings)
        graph.eliminate_dead_code()
        transposed = [n for n in graph.nodes if n.target in TRANSPOSES and min(n.meta["val"].shape) > 1]
        found.append(sum(is_elementwise(reader) for n in transposed for reader in n.users))

    before = widened.bring_into_form
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened, "bring_into_form", noted)
        for function in (int8_transposed_first, read_by_two, with_a_zero, read_elsewhere):
            given = quantized()
            results, _ = run(function, given, target="sm90")
            (reference,) = exact(function, given)
            assert rms(results[0] - reference) <= 1.02 * rms(function(*given) - reference), function.__name__
    assert found == [0, 0, 0, 1]


def int8_transposed_first(x: Tensor, w: Tensor, s: Tensor, b: Tensor, g: Tensor) -> Tensor:
    """As torchao's int8 weights."""
    return x.flatten(0, 1) @ w.t().to(x.dtype) * s + b
