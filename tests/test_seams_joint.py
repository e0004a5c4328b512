"""Projections of several streams that their GEMMs write into one joint tensor: what is one, what is not, the op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse
from dkfuse import Status
from dkfuse.packing import _Group
from dkfuse.seams import joint

from .harness import BF16, Double, check_numerics, double, exact, flat, rms, run, tally
from .joint_attention import HEADS, WIDTH, JointAttention

FAMILY = "joint_projection"
IMAGE, TEXT = 24, 8


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of any size counts, and GEMMs cost nothing."""
    monkeypatch.setattr(joint, "LEAST", 0.0)
    monkeypatch.setattr(joint, "EXTRA", 0.0)


def built(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return JointAttention(**config).to(BF16).requires_grad_(False)


def inputs(batch: int = 1, image: int = IMAGE, text: int = TEXT, text_width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, n, w, generator=generator).to(BF16) for n, w in ((image, WIDTH), (text, text_width))]


def seams(coverage: dkfuse.Coverage) -> list[dkfuse.Site]:
    return [site for site in coverage.seams if site.family == FAMILY]


def calls(graph: torch.fx.Graph, op: Any) -> list[torch.fx.Node]:
    return graph.find_nodes(op="call_function", target=op)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("config", [{}, {"dim": 2}, {"text_first": False}, {"bias": False}, {"text_width": 32}])
def test_values_are_written_into_the_joint_tensor(
    config: dict[str, Any], batch: int, packed: bool, fused_graphs: list[torch.fx.Graph]
) -> None:
    module, args = built(**config), inputs(batch, text_width=config.get("text_width", WIDTH))
    reference = exact(module, args)
    eager = module(*args)
    if packed:
        dkfuse.pack(module)
    results, coverage = run(module, args, target="sm90")
    assert tally(seams(coverage)) == {FAMILY: 1}
    assert tally(coverage.sites) == {"qk_norm": 2, "absorbed": 2}
    (graph,) = fused_graphs
    (call,) = calls(graph, torch.ops.dkfuse.joint_linear.default)
    assert len(calls(graph, torch.ops.aten.cat.default)) == 2  # of q and k, which their kernel joins on a GPU
    columns = WIDTH * (3 if packed else 1)
    assert tuple(call.meta["val"].shape) == (batch, IMAGE + TEXT, columns)
    assert rms(results[0] - reference[0]) <= 1.05 * rms(eager - reference[0])


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_without_a_norm_queries_and_keys_are_too(batch: int, packed: bool, fused_graphs: list[torch.fx.Graph]) -> None:
    """SD3-medium's attention: three cats of the same two products, once they are packed."""
    module, args = built(norm=False, dim=2), inputs(batch)
    if packed:
        dkfuse.pack(module)
    results, coverage = run(module, args, target="sm90")
    assert tally(seams(coverage)) == {FAMILY: 1 if packed else 3}
    (graph,) = fused_graphs
    assert not calls(graph, torch.ops.aten.cat.default)
    moved = [(site.bytes_before, site.bytes_after) for site in seams(coverage)]
    assert sum(after for _, after in moved) == 3 * batch * (IMAGE + TEXT) * WIDTH * 2
    check_numerics(built(norm=False, dim=2), args, results)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize("batch", [1, 2])
def test_numbers_of_tokens_may_be_symbols(batch: int) -> None:
    module, args = built(), inputs(batch)
    for arg in args:
        torch._dynamo.mark_dynamic(arg, 1)
    results, coverage = run(module, args, target="sm90", dynamic=None)
    assert tally(seams(coverage)) == {FAMILY: 1}
    assert isinstance(seams(coverage)[0].shapes["x0"][0], str)
    check_numerics(module, args, results)


@pytest.mark.usefixtures("any_size")
def test_three_streams() -> None:
    def function(w: Tensor, *xs: Tensor) -> Tensor:
        return torch.cat([F.linear(x, w).unflatten(2, (HEADS, -1)) for x in xs], 1).sin()

    torch.manual_seed(0)
    args = [torch.randn(WIDTH, WIDTH).to(BF16), *inputs(), *inputs(image=4, text=12)]
    results, coverage = run(function, args, target="sm90")
    assert tally(seams(coverage)) == {FAMILY: 1}
    check_numerics(function, args, results)


# -- what is no joint projection ---------------------------------------------------------------------------------------


def joined(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.linear(a, w), F.linear(b, w)], 1).unflatten(2, (HEADS, -1))


def read_as_a_matrix(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(a, w)
    return torch.cat([y, F.linear(b, w)], 1), y.reshape(-1, WIDTH).cumsum(0)


def computed_from_each_other(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = F.linear(a, w)
    return torch.cat([y, F.linear(b + y.mean(1, keepdim=True), w)], 1)


def that_wait_for_each_other(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Either cat could be one call, but not both: each would need a part of the other."""
    first, second = F.linear(a, w), F.linear(b, w)
    third, fourth = F.linear(second.tanh(), w), F.linear(first.tanh(), w)
    return torch.cat([first, third], 1), torch.cat([second, fourth], 1)


def around_in_three(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    starts = [F.linear(a + i, w) for i in range(3)]
    ends = [F.linear(starts[(i + 1) % 3].tanh(), w) for i in range(3)]
    return tuple(torch.cat(pair, 1) for pair in zip(starts, ends, strict=True))


def of_wider_products(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.linear(a, wide)[..., :WIDTH], F.linear(b, w)], 1)


def of_other_columns(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.linear(a, wide)[..., :WIDTH], F.linear(b, wide)[..., WIDTH : 2 * WIDTH]], 1)


def joined_twice(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y, z = F.linear(a, w), F.linear(b, w)
    return torch.cat([y, z], 1), torch.cat([z, y], 1)


def of_rows_in_part(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.linear(a, w)[:, 1:], F.linear(b, w)], 1)


def with_an_op_between(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.linear(a, w).sin(), F.linear(b, w)], 1)


def along_columns(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.linear(a, w), F.linear(a, wide)], 2)


def of_one_product(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    first, second = F.linear(a, wide)[..., : 2 * WIDTH].chunk(2, -1)
    return torch.cat([first, second], 1)


def along_samples(w: Tensor, wide: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([F.linear(a, w), F.linear(a + 1, w)], 0)


@pytest.mark.usefixtures("any_size")
@pytest.mark.parametrize(
    ("function", "batch", "options", "expected"),
    [
        (joined, 2, {}, {FAMILY: 1}),
        (read_as_a_matrix, 1, {}, {FAMILY: 1}),
        (read_as_a_matrix, 2, {}, {"left:layout": 1}),
        (computed_from_each_other, 1, {}, {"rejected:cycle": 1}),
        (that_wait_for_each_other, 1, {}, {FAMILY: 1, "rejected:cycle": 1}),
        (around_in_three, 1, {}, {FAMILY: 2, "rejected:cycle": 1}),
        (of_wider_products, 1, {}, {"left:layout": 1}),
        (of_other_columns, 1, {}, {"left:layout": 1}),
        (joined_twice, 1, {}, {FAMILY: 1, "rejected:claimed": 1}),
        (of_rows_in_part, 1, {}, {"left:layout": 1}),
        (with_an_op_between, 1, {}, {}),
        (along_columns, 1, {}, {}),
        (of_one_product, 1, {}, {}),
        (along_samples, 2, {}, {"left:layout": 1}),
        (joined, 1, {"rules": "-joint_projection"}, {"rejected:disabled": 1}),
        (joined, 1, {"fuel": 0}, {"rejected:fuel": 1}),
        (joined, 1, {"target": "cpu"}, {}),
    ],
)
def test_what_is_one(
    function: Callable[..., Any], batch: int, options: dict[str, Any], expected: dict[str, int]
) -> None:
    torch.manual_seed(0)
    args = [torch.randn(n, WIDTH).div(8).to(BF16) for n in (WIDTH, 3 * WIDTH)] + inputs(batch)
    results, coverage = run(function, args, **{"target": "sm90", **options})
    assert tally(seams(coverage)) == expected
    with torch.no_grad():
        references = flat(function(*args))
    with Double(), torch.no_grad():
        exacts = flat(function(*map(double, args)))
    for ours, theirs, reference in zip(results, references, exacts, strict=True):
        assert ours.shape == theirs.shape and rms(ours - reference) <= 1.05 * rms(theirs - reference)


class Joined(nn.Linear):
    def __init__(self, width: int):
        super().__init__(width, width)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([F.linear(a, self.weight, self.bias), F.linear(b, self.weight, self.bias)], 1)


@pytest.mark.parametrize(
    ("batch", "image", "text", "width", "expected"),
    [
        (1, 4096, 512, 3072, {FAMILY: 1}),
        (2, 4096, 333, 2432, {FAMILY: 1}),
        (4, 1024, 333, 1536, {"left:no_gain": 1}),  # measured: 6 us lost
        (1, 256, 77, 1152, {"left:no_gain": 1}),
    ],
)
def test_it_must_be_worth_it(batch: int, image: int, text: int, width: int, expected: dict[str, int]) -> None:
    with torch.device("meta"):
        module = Joined(width).to(BF16).requires_grad_(False)
        kwargs = {name: torch.empty(batch, n, width, dtype=BF16) for name, n in (("a", image), ("b", text))}
    coverage = dkfuse.coverage(module, settings=dkfuse.Settings(target="sm90"), **kwargs)
    assert tally(seams(coverage)) == expected
    (site,) = seams(coverage)
    if site.status is Status.FUSED:
        assert site.bytes_before == 3 * site.bytes_after == 3 * 2 * batch * (image + text) * width
    else:
        assert "the copy takes" in site.reason.message


def test_pack_puts_queries_keys_and_values_in_one_order() -> None:
    def ordered(*names: str) -> list[str]:
        return _Group(list(names), [nn.Linear(1, 1) for _ in names]).in_order().names

    joint = ["a.to_q", "a.to_k", "a.to_v", "a.add_k_proj", "a.add_v_proj", "a.add_q_proj", "a.to_add_out"]
    assert ordered(*joint) == [*joint[:3], "a.add_q_proj", "a.add_k_proj", "a.add_v_proj", "a.to_add_out"]
    assert ordered("v", "key", "query") == ["query", "key", "v"]
    assert ordered("k.base_layer", "q.base_layer") == ["q.base_layer", "k.base_layer"]
    for kept in (["k_proj", "o_proj", "q_proj", "v_proj"], ["gate", "up"], ["w3", "w1"], ["q_k", "q"]):
        assert ordered(*kept) == kept


# -- the op ------------------------------------------------------------------------------------------------------------


def operands(batch: int = 2, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    xs, weights = [draw(batch * 3, 8), draw(batch * 5, 16)], [draw(24, 8), draw(24, 16)]
    return xs, weights, [draw(24) if bias else None, draw(24)], batch, ["", ""]


@pytest.mark.parametrize("bias", [True, False])
def test_the_op_is_what_it_says(bias: bool) -> None:
    xs, weights, biases, batch, tiles = operands(bias=bias)
    got = torch.ops.dkfuse.joint_linear(xs, weights, biases, batch, tiles)
    for i in range(batch):
        rows = [x.chunk(batch)[i] for x in xs]
        expected = torch.cat([F.linear(x, w, b) for x, w, b in zip(rows, weights, biases, strict=True)])
        torch.testing.assert_close(got[i], expected)
    torch.library.opcheck(torch.ops.dkfuse.joint_linear.default, (xs, weights, biases, batch, tiles))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda xs, ws, bs, n, t: (xs[:1], ws, bs, n, t), "one of each is needed"),
        (lambda xs, ws, bs, n, t: (xs, ws, bs, 4, t), "6 rows cannot be those of 4 samples"),
        (lambda xs, ws, bs, n, t: (xs, ws, bs, n, ["", "7x7"]), "no tiles '7x7'"),
        (lambda xs, ws, bs, n, t: (xs, [ws[0], ws[1][:8]], [bs[0], bs[1][:8]], n, t), "differ in dtype or in the col"),
        (lambda xs, ws, bs, n, t: (xs, [ws[1], ws[0]], bs, n, t), "columns together"),
    ],
)
def test_a_call_without_meaning_is_one_sentence(change: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.ops.dkfuse.joint_linear(*change(*operands()))
