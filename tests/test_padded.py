"""Products that Inductor padded are read as the model has them, whatever it measured, and padded again if not taken.

Whether it pads is decided by `torch._inductor.config.force_shape_pad` here instead of a clock, and on a CPU too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import fx
from torch._inductor.fx_passes import pad_mm

from dkfuse import fuse
from dkfuse.rewriting import padded
from dkfuse.settings import Settings

from . import spellings_rope, spellings_rope_moved  # noqa: F401  (its rows are in spellings_rope)
from .harness import check_numerics, counts, run, spell
from .test_compat import graph_at_the_hook, targets

aten = torch.ops.aten
PAD, CAT = aten.constant_pad_nd.default, aten.cat.default
SETTINGS = Settings(target="sm90")


@pytest.fixture(autouse=True)
def padding(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> Iterator[None]:
    monkeypatch.setattr(pad_mm, "check_device", lambda a, b: True)
    monkeypatch.setattr(pad_mm, "has_triton", lambda *_: True)
    with torch._inductor.config.patch(force_shape_pad=True):
        yield


def t(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, generator=generator).to(dtype)


PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[torch.Tensor, ...], int]] = {
    "rows": (F.linear, (t(13, 64), t(32, 64), t(32)), 1),
    "rows of samples": (F.linear, (t(2, 13, 64), t(32, 64)), 1),
    "columns": (F.linear, (t(16, 64), t(30, 64)), 1),
    "columns, bias": (F.linear, (t(16, 64), t(30, 64), t(30)), 1),
    "all": (F.linear, (t(13, 63), t(30, 63), t(30)), 2),
    "batched": (torch.bmm, (t(3, 13, 6), t(3, 6, 10)), 2),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_it_is_read_as_the_model_has_it(case: str) -> None:
    function, tensors, pads = PRODUCTS[case]
    graph = graph_at_the_hook(lambda *ts: function(*ts).relu(), *tensors)
    assert targets(graph).count(PAD) == pads, "torch pads otherwise now"
    before = fx.GraphModule(torch.nn.Module(), graph)(*tensors)
    (product,) = padded.without_padding(graph)
    graph.lint()
    assert not {PAD, CAT, aten.slice.Tensor} & set(targets(graph))
    assert product.node.target in padded.PRODUCTS
    found = fx.GraphModule(torch.nn.Module(), graph)(*tensors)
    torch.testing.assert_close(found, before)


def shapes(graph: fx.Graph) -> list[tuple[str, tuple[int, ...]]]:
    """What is computed of which size; the zeros behind a bias, which torch appends, are not told from a pad of it."""
    nodes = [n for n in graph.nodes if n.op == "call_function" and n.target is not aten.full.default]
    return sorted((str(PAD if n.target is CAT else n.target), tuple(n.meta["val"].shape)) for n in nodes)


@pytest.mark.parametrize("case", PRODUCTS)
def test_what_no_rule_takes_is_padded_again(case: str) -> None:
    function, tensors, _ = PRODUCTS[case]
    graph = graph_at_the_hook(lambda *ts: function(*ts).relu(), *tensors)
    before = shapes(graph)
    fuse.run(graph, SETTINGS)
    graph.lint()
    assert shapes(graph) == before
    expected = F.relu(function(*tensors))
    torch.testing.assert_close(fx.GraphModule(torch.nn.Module(), graph)(*tensors)[0], expected)


def test_a_seam_takes_it() -> None:
    x, w, b = t(13, 64), t(256, 64), t(256)
    graph = graph_at_the_hook(lambda x, w, b: F.gelu(F.linear(x, w, b), approximate="tanh"), x, w, b)
    assert PAD in targets(graph)
    record = fuse.run(graph, SETTINGS)
    assert [site.status.value for site in record.seams] == ["fused"] and PAD not in targets(graph)


def test_behind_a_kernel_of_ours_it_is_not_padded_again() -> None:
    def modulated(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return F.linear(F.layer_norm(x, (64,)) * (1 + scale[:, None]) + shift[:, None], w)

    graph = graph_at_the_hook(modulated, t(2, 13, 64), t(2, 64), t(2, 64), t(32, 64))
    assert PAD in targets(graph)
    record = fuse.run(graph, SETTINGS, lowered=False)
    assert sum(site.status.value == "fused" for site in record.sites) == 1
    assert PAD not in targets(graph)


@pytest.mark.parametrize(
    "row", [row for row in spellings_rope.ROWS if row.name.startswith("matrices_by")], ids=lambda row: row.name
)
def test_rotations_by_products_are_found(row: Any) -> None:
    args = spell(row.inputs, row.dtype)
    results, coverage = run(row.function, args)
    assert counts(coverage) == row.expected
    check_numerics(row.function, args, results)


def near(function: Callable[..., Any], *tensors: torch.Tensor) -> list[padded.Product]:
    with torch._inductor.config.patch(shape_padding=False, force_shape_pad=False):
        return padded.without_padding(graph_at_the_hook(function, *tensors))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: F.pad(a, (0, 2)) @ F.pad(b, (0, 0, 0, 2)),  # not cut
        lambda a, b: (F.pad(a, (0, 0, 0, 3)) @ b)[1:14],  # not what was there before
        lambda a, b: (F.pad(a, (0, 0, 2, 1)) @ b)[:13],  # zeros in front
        lambda a, b: (F.pad(a, (0, 0, 0, 3), value=1.0) @ b)[:14],  # one of the rows that were added
        lambda a, b: (F.pad(a, (0, 2), value=1.0) @ F.pad(b, (0, 0, 0, 2), value=1.0))[:, :9],
        lambda a, b: (a @ b)[:12],  # no zeros at all
        lambda a, b: (lambda y: (y[:13], y.sum()))(F.pad(a, (0, 0, 0, 3)) @ b),  # read as a whole too
    ],
)
def test_other_products_are_left(function: Callable[..., Any]) -> None:
    assert near(function, t(13, 6), t(6, 10)) == []
