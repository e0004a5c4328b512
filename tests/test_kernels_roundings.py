"""The dkfuse ops in plain torch with the roundings of a spelling: eager's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dkfuse.kernels import reference
from dkfuse.kernels.rounding import Rounding

from .norm_calls import SHAPE, norm32
from .tensors import random

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def flags(*names: str) -> int:
    return int(sum((Rounding[name] for name in names), Rounding.NONE))


def tail(n: torch.Tensor, roundings: int, w: Any = None, b: Any = None, s: Any = None, t: Any = None) -> torch.Tensor:
    """Everything of norm_modulate behind the reduction, with an output in bf16."""
    return reference.modulate(reference.affine(n, w, b, 0.0, roundings, BF16), s, t, 1.0, roundings, BF16).to(BF16)


def spellings() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Spelling (see the table of spellings) -> (eager in bf16, ours from the same fp32 norm)."""
    x, w, b = random(*SHAPE), random(96, seed=1), random(96, seed=2)
    s, t = random(2, 1, 96, seed=3), random(2, 1, 96, seed=4)
    s32, t32 = s.float() * 1.01, t.float() * 1.01
    ln, rms = norm32(x, "layer"), norm32(x, "rms")
    n1 = (ln * w.float() + b.float()).to(BF16)
    r0 = rms.to(BF16) * w
    r1 = (rms * w.float()).to(BF16)
    modulation = ("ONE_PLUS", "PRODUCT")
    return {
        "A1": (ln.to(BF16) * (1 + s) + t, tail(ln, flags("NORM", *modulation), s=s, t=t)),
        "A1 commuted": ((1 + s) * ln.to(BF16) + t, tail(ln, flags("NORM", *modulation), s=s, t=t)),
        "A1a": (n1 * (1 + s) + t, tail(ln, flags("AFFINE", *modulation), w, b, s, t)),
        "A1r R2": (rms.to(BF16) * (1 + s) + t, tail(rms, flags("NORM", *modulation), s=s, t=t)),
        "A1r R1": (r1 * (1 + s) + t, tail(rms, flags("WEIGHTED", *modulation), w, s=s, t=t)),
        "A2": (r0 * (1.0 + s), tail(rms, flags("NORM", "WEIGHTED", "ONE_PLUS"), w, s=s)),
        "A2L": (ln.to(BF16) * (1 + s), tail(ln, flags("NORM", "ONE_PLUS"), s=s)),
        "A4": ((ln * (1 + s32) + t32).to(BF16), tail(ln, 0, s=s32, t=t32)),
        "A5": ((rms * (1 + s.float())).to(BF16), tail(rms, 0, s=s)),
        "A6": ((r0.float() * (1 + s.float()) + t.float()).to(BF16), tail(rms, flags("NORM", "WEIGHTED"), w, s=s, t=t)),
        "A8": (ln.to(BF16) + t, tail(ln, flags("NORM"), t=t)),
        "N1": (n1, tail(ln, 0, w, b)),
        "R0": (r0, tail(rms, flags("NORM"), w)),
        "R1": (r1, tail(rms, 0, w)),
        "R2": (rms.to(BF16), tail(rms, 0)),
    }


@pytest.mark.parametrize("name", list(spellings()))
def test_roundings_reproduce_eager(name: str) -> None:
    eager, ours = spellings()[name]
    assert eager.dtype == BF16
    assert torch.equal(eager, ours)


def test_residual_roundings_reproduce_eager() -> None:
    y, h, g = random(*SHAPE), random(*SHAPE, seed=1), random(2, 1, 96, seed=2)
    ours = torch.ops.dkfuse.gated_residual
    both = flags("GATE_PRODUCT", "SUM")
    for eager in (h + g * y, y * g + h, h + (g.float() * y.float()).to(BF16)):  # G1 in its operand orders, G5
        assert torch.equal(ours(y, h, g, out_dtype=BF16, roundings=both), eager)
    g32 = g.float() * 1.01
    assert torch.equal(ours(y, h, g32, out_dtype=BF16), (h.float() + y * g32).to(BF16))  # G4
    assert torch.equal(ours(y, h, None, out_dtype=BF16), h + y)  # G7
    assert torch.equal(ours(y, h, g, out_dtype=BF16), torch.addcmul(h.float(), g.float(), y.float()).to(BF16))
    b = random(96, seed=3)
    biased = flags("BRANCH_BIAS", "GATE_PRODUCT", "SUM")
    assert torch.equal(ours(y, h, g, b, out_dtype=BF16, roundings=biased), h + g * (y + b))
    assert torch.equal(ours(y, h, None, b, out_dtype=BF16, roundings=biased), h + (y + b))
    assert not torch.equal(ours(y, h, g, b, out_dtype=BF16, roundings=both), h + g * (y + b))


def test_sandwich_roundings_reproduce_eager() -> None:
    """G3, then A2: Z-Image's `x = x + gate.tanh() * norm2(y)`, `norm1(x) * scale`, both norms R0."""
    y, h, g, s = random(*SHAPE), random(*SHAPE, seed=1), random(2, 1, 96, seed=2).tanh(), random(2, 1, 96, seed=3)
    w2, w1 = random(96, seed=4), random(96, seed=5)
    eager = h + g * (norm32(y, "rms").to(BF16) * w2)
    next_norm = (norm32(eager, "rms").to(BF16) * w1) * (1.0 + s)
    names = ("BRANCH", "BRANCH_WEIGHTED", "GATE_PRODUCT", "SUM", "NORM", "WEIGHTED", "ONE_PLUS")
    dtypes = {"sum_dtype": BF16, "out_dtype": BF16}
    both = {"norm": "rms", "eps": 1e-6, "branch_norm": "rms", "branch_eps": 1e-6}
    ours = torch.ops.dkfuse.residual_norm_modulate
    total, out = ours(y, h, g, w2, w1, None, s, None, **both, **dtypes, roundings=flags(*names))
    assert torch.equal(total, eager)
    assert torch.equal(out, next_norm)
    # R1, one rounding behind the weight, and R2, no weight, each differ from R0.
    r1 = h + g * (norm32(y, "rms") * w2.float()).to(BF16)
    total, _ = ours(y, h, g, w2, w1, None, s, None, **both, **dtypes, roundings=flags(*names[1:]))
    assert torch.equal(total, r1)
    assert not torch.equal(r1, eager)
    total, _ = ours(y, h, g, None, w1, None, s, None, **both, **dtypes, roundings=flags(*names))
    assert torch.equal(total, h + g * norm32(y, "rms").to(BF16))
    # the projection's own bias, read rounded by the branch norm
    b = random(96, seed=6)
    total, _ = ours(y, h, g, w2, w1, None, s, None, b, **both, **dtypes, roundings=flags("BRANCH_BIAS", *names))
    assert torch.equal(total, h + g * (norm32(y + b, "rms").to(BF16) * w2))
    # G3m: Mochi's norm and gate share one rounding.
    total, _ = ours(y, h, g, None, w1, None, s, None, **both, **dtypes, roundings=flags("GATE_PRODUCT", "SUM"))
    assert torch.equal(total, h + (norm32(y, "rms") * g.float()).to(BF16))


def test_roundings_of_a_second_branch_reproduce_eager() -> None:
    y, h, y2 = (random(*SHAPE, seed=i) for i in range(3))
    g, g2 = (random(2, 1, 96, seed=i) for i in (3, 4))
    common = {"norm": "layer", "eps": 1e-6, "sum_dtype": BF16, "out_dtype": BF16, "x2": y2}
    ours = torch.ops.dkfuse.residual_norm_modulate
    eager = flags("GATE_PRODUCT", "SUM", "GATE_PRODUCT2", "SUM2")
    for gate, gate2, expected in ((g, g2, h + g * y + g2 * y2), (g, None, h + g * y + y2), (None, None, h + y + y2)):
        arguments = (y, h, gate, None, None, None, None, None)
        total, _ = ours(*arguments, **common, gate2=gate2, roundings=eager)
        assert torch.equal(total, expected)
        total, _ = ours(*arguments, **common, gate2=gate2, roundings=flags("SUM", "SUM2"))
        assert torch.equal(total, expected) == (gate is None and gate2 is None)
        total, _ = ours(*arguments, **common, gate2=gate2)
        assert not torch.equal(total, expected)


def test_the_norm_reads_the_rounded_sum_only_under_sum() -> None:
    y, h = random(*SHAPE), random(*SHAPE, seed=1)
    z = (h + y).float()
    common = {"norm": "layer", "eps": 1e-6, "sum_dtype": BF16, "out_dtype": FP32}
    arguments = (y, h, None, None, None, None, None, None)
    total, out = torch.ops.dkfuse.residual_norm_modulate(*arguments, **common, roundings=flags("SUM"))
    assert torch.equal(total, z.to(BF16))
    torch.testing.assert_close(out, norm32(z, "layer"))
    _, out = torch.ops.dkfuse.residual_norm_modulate(*arguments, **common)
    torch.testing.assert_close(out, norm32(h.float() + y.float(), "layer"))
