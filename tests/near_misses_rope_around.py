"""Near misses of rotations, part 2: complex and matrix products, other readers, writes, joins, odd widths.

See `near_misses_rope` for what `expected` counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import FP32, Spelling, table
from .near_misses_rope import FULL, HALF, ONE, joined, pairs, rope_table
from .spellings_rope import attend, heads, rms, rotate_half, turned

ROWS: list[Spelling] = []
near_miss = rope_table(ROWS)
whole = table(ROWS)
QKV = "q:BLI k:BTI v:BTI a:C"
COMPLEX = "f:L1R:c"


def as_complex(x: T) -> T:
    return torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))


def as_real(z: T) -> T:
    return torch.view_as_real(z).flatten(-2)


# -- complex and matrix products ---------------------------------------------------------------------------------------


@near_miss("", COMPLEX)
def complex_quotient(x: T, f: T) -> T:
    return as_real(as_complex(x) / f)


@near_miss("either", COMPLEX)
def complex_conjugate(x: T, f: T) -> T:
    """The inverse rotation, which is one by the conjugate table."""
    return as_real(as_complex(x) * f.conj())


@near_miss("", COMPLEX)
def conjugate_of_the_query(x: T, f: T) -> T:
    return as_real(as_complex(x).conj() * f)


@near_miss("", COMPLEX)
def complex_sum(x: T, f: T) -> T:
    return as_real(as_complex(x) + f)


@near_miss("", COMPLEX)
def complex_square(x: T, f: T) -> T:
    z = as_complex(x)
    return as_real(z * z * f.abs())


@near_miss("", COMPLEX)
def complex_of_two_halves(x: T, f: T) -> T:
    a, b = x.chunk(2, dim=-1)
    return as_real(torch.complex(a, b) * f)


@near_miss("rope", COMPLEX)
def complex_of_a_transposed_layout(x: T, f: T) -> T:
    """Harmless: a rotation of the copy whose columns are in another order."""
    z = torch.view_as_complex(x.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous())
    return as_real(z * f)


@near_miss("", COMPLEX)
def real_part_only(x: T, f: T) -> T:
    z = as_complex(x) * f
    return torch.cat([z.real, z.abs()], dim=-1)


@near_miss("", COMPLEX)
def real_part_twice(x: T, f: T) -> T:
    out = torch.view_as_real(as_complex(x) * f)
    return torch.stack([out[..., 0], out[..., 0]], dim=-1).flatten(-2)


@near_miss("", COMPLEX)
def components_of_the_product_exchanged(x: T, f: T) -> T:
    return torch.view_as_real(as_complex(x) * f).flip(-1).flatten(-2)


@near_miss("either", COMPLEX)
def rotated_twice(x: T, f: T) -> T:
    return as_real(as_complex(x) * f * f)


@near_miss("", "m:L1R22")
def matrices_of_one_component(x: T, m: T) -> T:
    p = x.unflatten(-1, (-1, 1, 2))
    return (m[..., 0] * p[..., 0] + m[..., 1] * p[..., 0]).flatten(-2)


@near_miss("either", "m:L1R22")
def matrices_transposed(x: T, m: T) -> T:
    p = x.unflatten(-1, (-1, 1, 2))
    return (m[..., 0, :] * p[..., 0] + m[..., 1, :] * p[..., 1]).flatten(-2)


@near_miss("", "m:L1R22")
def matrices_subtracted(x: T, m: T) -> T:
    p = x.unflatten(-1, (-1, 1, 2))
    return (m[..., 0] * p[..., 0] - m[..., 1] * p[..., 1]).flatten(-2)


@near_miss("", "m:L1R22")
def matrices_of_halves(x: T, m: T) -> T:
    a, b = (p.unsqueeze(-1) for p in x.chunk(2, dim=-1))
    return (m[..., 0] * a + m[..., 1] * b).flatten(-2)


# -- other readers -----------------------------------------------------------------------------------------------------


@whole("either", f"{QKV} {FULL}", FP32)
def normed_query_is_read_elsewhere(q: T, k: T, v: T, a: T, c: T, s: T) -> tuple[T, T]:
    q = rms(heads(q), a)
    return attend(q * c + turned(q) * s, heads(k), heads(v)), q @ q.mT


@whole(ONE, f"{QKV} {FULL}", FP32)
def rotated_query_is_read_elsewhere(q: T, k: T, v: T, a: T, c: T, s: T) -> tuple[T, T]:
    """Harmless: the result is stored."""
    q = rms(heads(q), a)
    q = q * c + turned(q) * s
    return attend(q, heads(k), heads(v)), q @ q.mT


@whole("either", f"{QKV} {HALF}", FP32)
def product_is_read_elsewhere(q: T, k: T, v: T, a: T, c: T, s: T) -> tuple[T, T]:
    x, y = pairs(rms(heads(q), a))
    product = x * c
    return attend(joined(product - y * s, y * c + x * s), heads(k), heads(v)), product @ product.mT


@whole("", f"{QKV} {HALF}", FP32)
def component_is_read_elsewhere(q: T, k: T, v: T, a: T, c: T, s: T) -> tuple[T, T]:
    x, y = pairs(rms(heads(q), a))
    first, second = x * c - y * s, y * c + x * s
    return attend(torch.cat([first, first.tanh()], -1), heads(k), heads(v)), second @ second.mT


@near_miss("either", FULL)
def doubled_afterwards(x: T, c: T, s: T) -> T:
    return (x * c + turned(x) * s) * 2


@near_miss("either", FULL)
def turned_part_doubled(x: T, c: T, s: T) -> T:
    return torch.add(x * c, turned(x) * s, alpha=2)


@whole("", f"{QKV} {FULL}", FP32)
def normed_over_heads(q: T, k: T, v: T, a: T, c: T, s: T) -> T:
    """A norm over the heads of each column is none of ours, and its kernel can rotate."""
    q = heads(q)
    q = q * torch.rsqrt(q.pow(2).mean(2, keepdim=True) + 1e-6) * a
    return attend(q * c + turned(q) * s, heads(k), heads(v))


# -- writes ------------------------------------------------------------------------------------------------------------


@whole("", f"{QKV} {FULL}", FP32)
def query_written_afterwards(q: T, k: T, v: T, a: T, c: T, s: T) -> T:
    n = rms(heads(q), a)
    out = attend(n * c + turned(n) * s, heads(k), heads(v))
    q.add_(1)
    return out


@whole("", f"{QKV} {FULL}", FP32)
def table_written_afterwards(q: T, k: T, v: T, a: T, c: T, s: T) -> T:
    n = rms(heads(q), a)
    out = attend(n * c + turned(n) * s, heads(k), heads(v))
    s.zero_()
    return out


@whole("either", "q:BSI k:BTI v:BTI a:C c:LC s:LC", FP32)
def read_before_the_write(q: T, k: T, v: T, a: T, c: T, s: T) -> tuple[T, T]:
    q = rms(heads(q), a)
    before = q @ q.mT
    q[:, 4:] = q[:, 4:] * c[:, None] + turned(q[:, 4:]) * s[:, None]
    return attend(q, heads(k), heads(v)), before


@whole("either", "q:BSI k:BTI v:BTI a:C c:LC s:LC", FP32)
def written_over_other_tokens(q: T, k: T, v: T, a: T, c: T, s: T) -> T:
    q = rms(heads(q), a)
    q[:, :6] = q[:, 4:] * c[:, None] + turned(q[:, 4:]) * s[:, None]
    return attend(q, heads(k), heads(v))


@whole("either", "q:BSI k:BTI v:BTI a:C c:5C s:5C", FP32)
def every_second_token(q: T, k: T, v: T, a: T, c: T, s: T) -> T:
    q = rms(heads(q), a)
    q[:, ::2] = q[:, ::2] * c[:, None] + turned(q[:, ::2]) * s[:, None]
    return attend(q, heads(k), heads(v))


@near_miss("")
def second_slice_from_the_first(x: T, c: T, s: T) -> T:
    """In place, one component after the other: the second reads the first's new value."""
    x = x.clone()
    x[..., 0::2] = x[..., 0::2] * c - x[..., 1::2] * s
    x[..., 1::2] = x[..., 1::2] * c + x[..., 0::2] * s
    return x


# -- joins and widths --------------------------------------------------------------------------------------------------


@near_miss("either", "c:L14 s:L14 y:BLHC")
def rest_of_another_tensor(x: T, c: T, s: T, y: T) -> T:
    a, b = pairs(x[..., :8])
    return torch.cat([joined(a * c - b * s, b * c + a * s), y[..., 8:]], dim=-1)


@near_miss("either", "c:L14 s:L14")
def rest_first(x: T, c: T, s: T) -> T:
    a, b = pairs(x[..., :8])
    return torch.cat([x[..., 8:], joined(a * c - b * s, b * c + a * s)], dim=-1)


@whole("either", "q:BSI k:BTI v:BTI a:C c:LC s:LC", FP32)
def joined_parts_overlap(q: T, k: T, v: T, a: T, c: T, s: T) -> T:
    q = rms(heads(q), a)
    rotated = q[:, 4:] * c[:, None] + rotate_half(q[:, 4:]) * s[:, None]
    return attend(torch.cat([q[:, :5], rotated], dim=1), heads(k), heads(v))


@whole("rope", "q:BLD k:BTD v:BTD a:K c:L14 s:L14", FP32)
def odd_head_dim(q: T, k: T, v: T, a: T, c: T, s: T) -> T:
    """Nine columns, of which eight are rotated. Harmless: the eight are a tensor of their own."""
    q = F.rms_norm(heads(q), (9,), a)
    x, y = pairs(q[..., :8])
    return attend(torch.cat([joined(x * c - y * s, y * c + x * s), q[..., 8:]], -1), heads(k), heads(v))
