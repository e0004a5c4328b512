"""Rows of frames that are repeated for tokens before a model makes shifts, scales and gates of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .harness import BF16, check_numerics, exact, rms, run, tally
from .test_seams_repeated import FAMILY, seams

FRAMES, HEIGHT, WIDTH, D = 3, 2, 4, 64
TOKENS = FRAMES * HEIGHT * WIDTH
aten = torch.ops.aten


class Framed(nn.Module):
    """A block with a gate, a norm and a modulation whose rows are those of the token's frame."""

    def __init__(self) -> None:
        super().__init__()
        self.mod, self.down, self.out = nn.Linear(D // 2, 3 * D), nn.Linear(D, D // 2), nn.Linear(D, D)
        self.table = nn.Parameter(torch.randn(1, 3, D) * 0.1)

    def rows(self, e: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def forward(self, h: Tensor, y: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale, gate = self.rows(e)
        h = h + gate * self.out(y)
        return h, self.out(F.layer_norm(h, (D,)) * (1 + scale) + shift)


class Interleaved(Framed):
    """Split after the repeat."""

    def rows(self, e: Tensor) -> tuple[Tensor, ...]:
        return e.repeat_interleave(HEIGHT * WIDTH, 1).chunk(3, dim=-1)


class WithTable(Framed):
    """AnyFlow: a table is added to what was repeated, in fp32."""

    def rows(self, e: Tensor) -> tuple[Tensor, ...]:
        e = e.repeat_interleave(HEIGHT * WIDTH, 1).unflatten(2, (3, -1))
        return tuple(row.squeeze(2) for row in (self.table + e.float()).to(e.dtype).chunk(3, dim=2))


class Tiled(Framed):
    """SkyReels-V2: `repeat` over height and width; here with what every token has alike."""

    def rows(self, e: Tensor) -> tuple[Tensor, ...]:
        e = e.view(len(e), FRAMES, 1, 1, 3, D).repeat(1, 1, HEIGHT, WIDTH, 1, 1).flatten(1, 3)
        return (e + self.table).unbind(2)


class Projected(Framed):
    """Cosmos: the embedding is repeated, then goes through two linears and is added to another that was repeated."""

    def rows(self, e: Tensor) -> tuple[Tensor, ...]:
        def repeated(rows: Tensor) -> Tensor:
            framed = rows.view(len(rows), FRAMES, 1, 1, -1)
            return framed.expand(-1, -1, HEIGHT, WIDTH, -1).flatten(1, 3)

        return (self.mod(self.down(F.silu(repeated(e[..., :D])))) + repeated(e)).chunk(3, dim=-1)


KINDS = (Interleaved, WithTable, Tiled, Projected)


def inputs(batch: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, TOKENS, D), (batch, TOKENS, D), (batch, FRAMES, 3 * D))
    return [torch.randn(shape, generator=generator).to(BF16) for shape in shapes]


def built(kind: type[Framed]) -> Framed:
    torch.manual_seed(0)
    return kind().to(BF16).requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_read_a_row_for_each_frame(kind: type[Framed], batch: int, fused_graphs: list[fx.Graph]) -> None:
    module, args = built(kind), inputs(batch)
    results, coverage = run(module, args, target="sm90")
    check_numerics(module, args, results)
    assert tally(seams(coverage)) == ({FAMILY: 2} if kind is Projected else {})
    (graph,) = fused_graphs
    (call,) = graph.find_nodes(op="call_function", target=torch.ops.dkfuse.residual_norm_modulate.default)
    sizes = [n.meta["val"].numel() for n in call.all_input_nodes]
    assert sizes.count(batch * TOKENS * D) == 2, "the stream and the branch"
    assert sizes.count(batch * FRAMES * D) >= 3, "shift, scale and gate"
    products = {
        n.meta["val"].shape[0]
        for t in (aten.mm, aten.addmm)
        for n in graph.find_nodes(op="call_function", target=t.default)
    }
    assert products == ({batch * TOKENS, batch * FRAMES} if kind is Projected else {batch * TOKENS})


@pytest.mark.parametrize("kind", KINDS)
def test_any_batch(kind: type[Framed], fused_graphs: list[fx.Graph]) -> None:
    module, args = built(kind), inputs(2)
    for tensor in args:
        torch._dynamo.mark_dynamic(tensor, 0)
    results, _ = run(module, args, target="sm90", dynamic=None)
    check_numerics(module, args, results)
    (graph,) = fused_graphs
    (call,) = graph.find_nodes(op="call_function", target=torch.ops.dkfuse.residual_norm_modulate.default)
    values = [n.meta["val"] for n in call.all_input_nodes]
    assert sum(FRAMES in value.shape and TOKENS not in value.shape for value in values) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_no_rounding_changes(kind: type[Framed]) -> None:
    """Under roundings=eager linears stay, as sums may add up in another order; what is repeated last is the same."""
    module, args = built(kind), inputs(2)
    results, coverage = run(module, args, target="sm90", roundings="eager")
    for found, expected in zip(results, module(*args), strict=True):
        assert torch.equal(found, expected)
    assert not any(site.status.name == "FUSED" for site in seams(coverage))


def test_what_differs_between_tokens_is_not_repeated() -> None:
    class OfTokens(Interleaved):
        def rows(self, e: Tensor) -> tuple[Tensor, ...]:
            position = torch.arange(TOKENS, dtype=e.dtype)[:, None] / TOKENS
            return (e.repeat_interleave(HEIGHT * WIDTH, 1) * position).chunk(3, dim=-1)

    class Turned(Interleaved):
        def rows(self, e: Tensor) -> tuple[Tensor, ...]:
            e = e.repeat_interleave(HEIGHT * WIDTH, 1)
            return (e + e.flip(1)).chunk(3, dim=-1)

    for kind in (OfTokens, Turned):
        module, args = built(kind), inputs(1)
        results, _ = run(module, args, target="sm90")
        check_numerics(module, args, results)


@pytest.mark.parametrize("factor", [1, 2])
def test_keys_repeated_once_are_not_copied(factor: int, fused_graphs: list[fx.Graph]) -> None:
    """Cosmos repeats keys and values for grouped heads, by a factor of one."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.unflatten(-1, (4 // factor, -1)).transpose(1, 2).repeat_interleave(factor, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q.unflatten(-1, (4, -1)).transpose(1, 2), k, v)

    generator = torch.Generator().manual_seed(0)
    args = [torch.randn(2, 6, 64 // (factor if i else 1), generator=generator) for i in range(3)]
    results, _ = run(attention, args, target="sm90")
    torch.testing.assert_close(results[0], attention(*args))
    (graph,) = fused_graphs
    assert len(graph.find_nodes(op="call_function", target=aten.clone.default)) == (0 if factor == 1 else 2)


def test_a_repeat_that_is_returned_is_a_copy() -> None:
    def once(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.repeat_interleave(1, 1), x * 2

    x = torch.randn(2, 3, 4)
    results, _ = run(once, [x], target="sm90")
    assert torch.equal(results[0], x) and results[0].data_ptr() != x.data_ptr()


def test_any_number_of_frames_and_tokens() -> None:
    """Sizes that are symbols, also those that a model computes (a stream of every other row)."""

    def block(video: Tensor, e: Tensor, down: Tensor, up: Tensor, w: Tensor) -> Tensor:
        batch, frames, height, width, _ = video.shape
        h = video[:, :, ::2].flatten(1, 3)
        framed = e.view(batch, frames, 1, 1, D).expand(-1, -1, (height + 1) // 2, width, -1)
        shift, scale, gate = F.linear(F.linear(F.silu(framed.flatten(1, 3)), down), up).chunk(3, dim=-1)
        h = h + gate * (h @ w)
        return (F.layer_norm(h, (D,)) * (1 + scale) + shift) @ w

    generator = torch.Generator().manual_seed(0)
    shapes = ((2, FRAMES, 4, 6, D), (2, FRAMES, D), (D // 2, D), (3 * D, D // 2), (D, D))
    args = [(torch.randn(shape, generator=generator) / 8).to(BF16) for shape in shapes]
    for tensor, dims in ((args[0], 4), (args[1], 2)):
        torch._dynamo.mark_dynamic(tensor, list(range(dims)))
    results, coverage = run(block, args, target="sm90", dynamic=None)
    assert tally(seams(coverage)) == {FAMILY: 2}
    assert tally(coverage.sites) == {"residual_gate_norm_modulate": 1, "absorbed": 1}, str(coverage)
    (reference,) = exact(block, args)
    assert rms(results[0] - reference) <= 1.05 * rms(block(*args) - reference)
