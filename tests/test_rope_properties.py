"""Any norm, in any scope, with any spelling of a rotation, tables of any layout, joined with text or not: one site.

A case is put together from building blocks; the function rotates a query as they say, and its key not at all.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from .harness import BF16, FP16, FP32, check_numerics, counts, run, spell
from .spellings_norms import rms0
from .spellings_rope import rms

FEW = settings(max_examples=70, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

NORMS = {
    "none": lambda x, a, b: x,
    "rms": lambda x, a, b: rms(x, a),
    "rms, rounded before the weight": lambda x, a, b: rms0(x, a),
    "rms, fp32, no weight": lambda x, a, b: rms(x.float()).to(x.dtype),
    "rms, zero-centred": lambda x, a, b: rms(x.float(), a.float() + 1).to(x.dtype),
    "layer": lambda x, a, b: F.layer_norm(x, x.shape[-1:], a, b, 1e-6),
    "layer, no weight": lambda x, a, b: F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype),
}


def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 0::2], x[..., 1::2]


def turned(x: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([-b, a], dim=-1).flatten(-2)


def rotate_half(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)


def slices(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    (a, b), out = pairs(x), torch.empty_like(x)
    out[..., 0::2] = a * c - b * s
    out[..., 1::2] = a * s + b * c
    return out


def components(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = pairs(x)
    return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2)


def components_of_halves(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = x.unflatten(-1, (2, -1)).unbind(-2)
    return torch.cat([a * c - b * s, s * a + c * b], dim=-1)


def product(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, c.dtype), FP32)
    z = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(z * torch.complex(c.to(wide), s.to(wide))).flatten(-2)


def matrices(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    m, p = torch.stack([c, -s, s, c], dim=-1).unflatten(-1, (2, 2)), x.unflatten(-1, (-1, 1, 2))
    return (m[..., 0] * p[..., 0] + m[..., 1] * p[..., 1]).flatten(-2)


# of tables with one column for each column of x, and with one column for each pair
FULL = {
    "turned pairs": lambda x, c, s: x * c + turned(x) * s,
    "turned halves": lambda x, c, s: (x * c) + (rotate_half(x) * s),
}
HALF = {
    "slices": slices,
    "components": components,
    "halves": components_of_halves,
    "complex": product,
    "matrices": matrices,
}
DUPLICATED = {
    "turned pairs": lambda t: t.repeat_interleave(2, dim=-1),
    "turned halves": lambda t: torch.cat([t, t], dim=-1),
}
LAYOUTS = ("N", "1N", "BN", "BHN")  # of tables, before their last dim; N tokens


@dataclass(frozen=True)
class Case:
    norm: str
    across: bool  # the norm is over all heads together
    rotation: str
    duplicated: bool  # full tables are made from half ones in the function
    layout: str  # of the tables
    tables: str  # their dtype: as in `spell`, "" for that of x
    upcast: bool  # x is cast to fp32 before the rotation
    join: str  # "none", "before", "after" (text is not rotated), "both" (each part rotated apart)
    text_first: bool
    bhsd: bool  # heads before tokens when rotated
    partial: bool  # only the first 8 of 16 columns are rotated
    dtype: torch.dtype

    @property
    def inputs(self) -> str:
        half = self.rotation in HALF or self.duplicated
        width = ("4" if half else "R") if self.partial else ("R" if half else "C")
        tokens = {"before": "S"}.get(self.join, "L")
        dims, text = (self.layout.replace("N", n) + width for n in (tokens, "T"))
        dtype = f":{self.tables}" if self.tables else ""
        weight = "I" if self.across else "C"
        n = "L" if self.join == "none" else "S"
        tables = f"c:{dims}{dtype} s:{dims}{dtype} d:{text}{dtype} e:{text}{dtype}"
        return f"q:BLI t:BTI k:B{n}I a:{weight} b:{weight} f:{weight} g:{weight} {tables}"

    @property
    def expected(self) -> dict[str, int]:
        norms = (self.norm != "none") * (1 if self.join == "none" else 2)
        absorbed = norms + (self.join == "both")
        expected = {"norm_rope" if norms else "rope": 1, "absorbed": absorbed}
        return {name: count for name, count in expected.items() if count}

    def __call__(self, q: Tensor, t: Tensor, k: Tensor, *rest: Tensor) -> Tensor:
        a, b, f, g, c, s, d, e = rest
        dim = 2 if self.bhsd else 1
        q, t = self._normed(q, a, b), self._normed(t, f, g)
        if self.join == "before":
            q = self._rotated(torch.cat([t, q] if self.text_first else [q, t], dim), c, s)
        else:
            q = self._rotated(q, c, s)
            t = self._rotated(t, d, e) if self.join == "both" else t
            if self.join != "none":
                q = torch.cat([t, q] if self.text_first else [q, t], dim)
        k = k.unflatten(-1, (4, 16)).transpose(1, 2)
        return F.scaled_dot_product_attention(q if self.bhsd else q.transpose(1, 2), k, k)

    def _normed(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = x if self.across else x.unflatten(-1, (4, 16))
        x = NORMS[self.norm](x, a, b)
        x = x.unflatten(-1, (4, 16)) if self.across else x
        return x.transpose(1, 2) if self.bhsd else x

    def _rotated(self, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        if self.partial:
            return torch.cat([self._whole(x[..., :8], c, s), x[..., 8:]], dim=-1)
        return self._whole(x, c, s)

    def _whole(self, x: Tensor, c: Tensor, s: Tensor) -> Tensor:
        c, s = self._placed(c), self._placed(s)
        if self.rotation in FULL and self.duplicated:
            c, s = DUPLICATED[self.rotation](c), DUPLICATED[self.rotation](s)
        y = x.float() if self.upcast else x
        return {**FULL, **HALF}[self.rotation](y, c, s).to(x.dtype)

    def _placed(self, t: Tensor) -> Tensor:
        """A table as broadcast to x."""
        if self.layout == "BHN":
            return t if self.bhsd else t.transpose(1, 2)
        return t.unsqueeze(-3) if self.bhsd else t.unsqueeze(-2)


def case(seed: int) -> Case:
    """Every choice as likely as any other, which hypothesis' own choices are not in so few examples."""
    pick = random.Random(seed).choice
    flag = (False, True)
    return Case(
        norm=pick(sorted(NORMS)),
        across=pick(flag),
        rotation=pick([*FULL, *HALF]),
        duplicated=pick(flag),
        layout=pick(LAYOUTS),
        tables=pick(["f", "f", "d", ""]),
        upcast=pick(flag),
        join=pick(["none", "before", "after", "both"]),
        text_first=pick(flag),
        bhsd=pick(flag),
        partial=pick(flag),
        dtype=pick([BF16, FP16, FP32]),
    )


@FEW
@given(st.integers(0, 2**32 - 1).map(case))
def test_every_combination_is_one_site(case: Case) -> None:
    inputs = spell(case.inputs, case.dtype)
    results, coverage = run(case, inputs)
    assert counts(coverage) == case.expected, f"{case}\n{coverage}"
    check_numerics(case, inputs, results)
