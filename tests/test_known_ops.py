"""ComfyUI's ops of comfy-kitchen as what they stand for: every one of them, fused, with any number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dkfuse import Settings
from dkfuse.reporting.store import graph_key
from dkfuse.rewriting import known_ops

from .harness import BF16, counts, run

HEADS, TOKENS, WIDTH = 2, 6, 32
OPS = torch.ops.comfy_kitchen
DEFINE = torch.library.Library("comfy_kitchen", "FRAGMENT")
# as comfy-kitchen 0.2.40 has them, where it is not installed
PAIR = "Tensor xq, Tensor xk, Tensor freqs_cis) -> (Tensor, Tensor)"
ROWS = "Tensor q, Tensor k, Tensor freqs_cis, Tensor q_scale, Tensor? k_scale=None, float epsilon=1e-06"
SCHEMAS = {
    "apply_rope": f"({PAIR}",
    "apply_rope_split_half": f"({PAIR}",
    "apply_rope1": "(Tensor x, Tensor freqs_cis) -> Tensor",
    "apply_rope_split_half1": "(Tensor x, Tensor freqs_cis) -> Tensor",
    "rms_rope": f"({ROWS}) -> (Tensor, Tensor)",
    "rms_rope_split_half": f"({ROWS}, int rot_dim=0) -> (Tensor, Tensor)",
    "rms_rope1": "(Tensor x, Tensor freqs_cis, Tensor scale, float epsilon=1e-06) -> Tensor",
    "rms_rope_split_half1": "(Tensor x, Tensor freqs_cis, Tensor scale, float epsilon=1e-06) -> Tensor",
}


def like(name: str) -> Callable[..., Any]:
    """What the compiler knows of an op: results like the tensors that are rotated."""
    return lambda x, y, *_, **__: (
        torch.empty_like(x) if name.endswith("1") else (torch.empty_like(x), torch.empty_like(y))
    )


def rotated(x: Tensor, table: Tensor, half: bool) -> Tensor:
    """By 2x2 matrices, in fp32 and in loops over pairs."""
    out, width = torch.empty_like(x), x.shape[-1]
    for i in range(width // 2):
        a, b = (i, i + width // 2) if half else (2 * i, 2 * i + 1)
        m = table[..., i, :, :]
        out[..., a] = m[..., 0, 0] * x[..., a] + m[..., 0, 1] * x[..., b]
        out[..., b] = m[..., 1, 0] * x[..., a] + m[..., 1, 1] * x[..., b]
    return out


def eager(name: str) -> Callable[..., Any]:
    """What an op computes, told once more in another way."""
    half = "split_half" in name

    def apply1(x: Tensor, table: Tensor) -> Tensor:
        return rotated(x, table, half)

    def rms1(x: Tensor, table: Tensor, scale: Tensor, epsilon: float = 1e-6, rot_dim: int = 0) -> Tensor:
        x, columns = F.rms_norm(x, x.shape[-1:], scale, epsilon), rot_dim or x.shape[-1]
        return torch.cat([rotated(x[..., :columns], table, half), x[..., columns:]], -1)

    def rms(q: Tensor, k: Tensor, table: Tensor, w: Tensor, v: Tensor | None = None, *more: Any) -> tuple[Tensor, ...]:
        return rms1(q, table, w, *more), rms1(k, table, w if v is None else v, *more)

    if name.startswith("apply"):
        return apply1 if name.endswith("1") else lambda q, k, table: (apply1(q, table), apply1(k, table))
    return rms1 if name.endswith("1") else rms


for name, schema in SCHEMAS.items():
    DEFINE.define(name + schema)
    DEFINE.impl(name, eager(name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"comfy_kitchen::{name}", like(name), lib=DEFINE)


@pytest.fixture(autouse=True)
def version(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    found: list[str | None] = ["0.2.40"]
    monkeypatch.setattr(known_ops, "installed", lambda name: found[0])
    yield found


def inputs(width: int = WIDTH, tokens: int = TOKENS, more: int = 0) -> list[Tensor]:
    """q and k of two samples as heads first, projected in one, a table of 2x2 matrices and the weights of the norms."""
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(1, 1, tokens + more, width // 2, generator=generator)
    c, s = angles.cos(), angles.sin()
    table = torch.stack([c, -s, s, c], -1).unflatten(-1, (2, 2))
    x = torch.randn(2, tokens, 3 * HEADS * WIDTH, generator=generator).to(BF16)
    return [x, table, *(torch.rand(2, WIDTH, generator=generator).to(BF16) + 0.5)]


def attention(name: str, rot_dim: int = 0) -> Callable[..., Tensor]:
    op = getattr(OPS, name)

    def function(x: Tensor, table: Tensor, w: Tensor, v: Tensor) -> Tensor:
        q, k, value = x.unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, 1)
        if name.startswith("rms"):
            more = (1e-5, rot_dim) if rot_dim else ()
            both = (
                [op(y, table, u) for y, u in ((q, w), (k, v))] if name.endswith("1") else op(q, k, table, w, v, *more)
            )
        else:
            q, k = F.rms_norm(q, (WIDTH,), w, 1e-6), F.rms_norm(k, (WIDTH,), v, 1e-6)
            both = [op(y, table) for y in (q, k)] if name.endswith("1") else op(q, k, table)
        return F.scaled_dot_product_attention(*both, value)

    return function


def test_every_op_has_a_definition() -> None:
    assert set(known_ops.DEFINITIONS) == set(SCHEMAS)
    for op in SCHEMAS:
        assert getattr(OPS, op).default._schema.name == f"comfy_kitchen::{op}"


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", SCHEMAS)
def test_norm_and_rotation_are_one_kernel(name: str, dynamic: bool) -> None:
    args = inputs()
    if dynamic:
        torch._dynamo.mark_dynamic(args[0], 1)
        torch._dynamo.mark_dynamic(args[1], 2)
    results, coverage = run(attention(name), args, dynamic=None if dynamic else False)
    assert counts(coverage) == {"norm_rope": 2, "absorbed": 2}, str(coverage)
    torch.testing.assert_close(results[0], attention(name)(*args), atol=0.02, rtol=0.02)


def test_a_longer_table_and_a_part_of_the_columns() -> None:
    name = "apply_rope1"
    args = inputs(more=3)
    results, coverage = run(attention(name), args)
    assert counts(coverage) == {"norm_rope": 2, "absorbed": 2}, str(coverage)
    args[1] = args[1][:, :, :TOKENS]
    torch.testing.assert_close(results[0], attention(name)(*args), atol=0.02, rtol=0.02)
    name, args = "rms_rope_split_half", inputs(width=16)
    results, coverage = run(attention(name, 16), args)
    assert counts(coverage) == {"norm_rope": 2, "absorbed": 2}, str(coverage)
    torch.testing.assert_close(results[0], attention(name, 16)(*args), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("other", [None, "0.1.6", "0.3.0"])
def test_ops_of_other_versions_stay(other: str | None, version: list[str | None]) -> None:
    version[0] = other
    args = inputs()
    results, coverage = run(attention("apply_rope1"), args)
    assert "norm_rope" not in counts(coverage)
    torch.testing.assert_close(results[0], attention("apply_rope1")(*args), atol=0.02, rtol=0.02)


def test_a_kept_graph_depends_on_the_version(version: list[str | None]) -> None:
    module, keys = torch.fx.symbolic_trace(torch.nn.Identity()), set()
    for found in ("0.2.40", "0.3.0", None):
        version[0] = found
        keys.add(graph_key(module, [], Settings()))
    assert len(keys) == 3
