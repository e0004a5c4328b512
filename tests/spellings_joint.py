"""The table of spellings, part 7: what surrounds the norms and rotations of queries and keys.

Text and image joined before the rotation, after it, without one; packed projections in several orders; fewer heads of
keys; layouts. A joint tensor is one site per query or key: its rotation (without one, its norm), the others absorbed.
T = 4 text tokens and L = 6 image tokens make S = 10.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import Spelling, table
from .spellings_norms import rms0
from .spellings_qk import rope
from .spellings_rope import BOTH, attend, heads, rms, rotate_half
from .spellings_rope_forms import matrix_product

ROWS: list[Spelling] = []
spelling = table(ROWS)

STREAMS = "x:BLI y:BTI u:IQ w:IQ a:C b:C d:C e:C"  # image, text, their projections, weights of q, k, text's q and k
JOINT, IMAGE = "c:SC:f s:SC:f", "c:LC:f s:LC:f"


def projected(x: T, w: T) -> tuple[T, ...]:
    """q, k and v in [B,L,H,C]."""
    return tuple(heads(part) for part in (x @ w).chunk(3, dim=-1))


# -- text and image ----------------------------------------------------------------------------------------------------


@spelling("norm_rope=2 absorbed=4", f"{STREAMS} {JOINT}")
def flux(x: T, y: T, u: T, w: T, a: T, b: T, d: T, e: T, c: T, s: T) -> T:
    """Text first, joined before the rotation."""
    q, k, v = projected(x, u)
    tq, tk, tv = projected(y, w)
    q, k, tq, tk = rms(q, a), rms(k, b), rms(tq, d), rms(tk, e)
    q, k, v = (torch.cat(pair, dim=1) for pair in ((tq, q), (tk, k), (tv, v)))
    return attend(rope(q, c, s), rope(k, c, s), v)


@spelling("norm_rope=2 absorbed=4", f"{STREAMS} m:11SR22:f")
def flux_original(x: T, y: T, u: T, w: T, a: T, b: T, d: T, e: T, m: T) -> T:
    """``rearrange("B L (K H D) -> K B H L D")``, joined as [B,H,L,D], 2x2 matrices."""
    q, k, v = (x @ u).view(2, -1, 3, 4, 16).permute(2, 0, 3, 1, 4)
    tq, tk, tv = (y @ w).view(2, -1, 3, 4, 16).permute(2, 0, 3, 1, 4)
    q, k, tq, tk = (rms0(z, weight).to(v) for z, weight in ((q, a), (k, b), (tq, d), (tk, e)))
    q, k, v = (torch.cat(pair, dim=2) for pair in ((tq, q), (tk, k), (tv, v)))
    out = F.scaled_dot_product_attention(matrix_product(q, m), matrix_product(k, m), v)
    return out.transpose(1, 2).flatten(2)


@spelling("norm_rope=2 absorbed=6", f"{STREAMS} f:LR:c g:TR:c")
def qwen(x: T, y: T, u: T, w: T, a: T, b: T, d: T, e: T, f: T, g: T) -> T:
    """Each part rotated by tables of its own, then joined."""

    def rotate(z: T, table: T) -> T:
        rotated = torch.view_as_complex(z.float().reshape(*z.shape[:-1], -1, 2)) * table.unsqueeze(1)
        return torch.view_as_real(rotated).flatten(3).type_as(z)

    q, k, v = projected(x, u)
    tq, tk, tv = projected(y, w)
    q, k, tq, tk = rms0(q, a), rms0(k, b), rms0(tq, d), rms0(tk, e)
    q, k, tq, tk = rotate(q, f), rotate(k, f), rotate(tq, g), rotate(tk, g)
    return attend(torch.cat([tq, q], dim=1), torch.cat([tk, k], dim=1), torch.cat([tv, v], dim=1))


@spelling("norm_rope=2 absorbed=4", f"{STREAMS} {IMAGE}")
def hunyuan_double(x: T, y: T, u: T, w: T, a: T, b: T, d: T, e: T, c: T, s: T) -> T:
    """Text last and not rotated."""
    q, k, v = projected(x, u)
    q, k = rope(rms0(q, a), c, s), rope(rms0(k, b), c, s)
    tq, tk, tv = projected(y, w)
    tq, tk = rms0(tq, d), rms0(tk, e)
    return attend(torch.cat([q, tq], dim=1), torch.cat([k, tk], dim=1), torch.cat([v, tv], dim=1))


@spelling(BOTH, f"x:BLI y:BTI w:IQ a:C b:C {IMAGE}")
def hunyuan_single(x: T, y: T, w: T, a: T, b: T, c: T, s: T) -> T:
    """One norm of both; the image tokens are cut out, rotated and joined again."""
    q, k, v = projected(torch.cat([x, y], dim=1), w)
    q, k = rms0(q, a), rms0(k, b)
    q = torch.cat([rope(q[:, : -y.shape[1]], c, s), q[:, -y.shape[1] :]], dim=1)
    k = torch.cat([rope(k[:, : -y.shape[1]], c, s), k[:, -y.shape[1] :]], dim=1)
    return attend(q, k, v)


@spelling("norm_rope=2 absorbed=2", f"x:BLI y:BTI u:IQ w:IQ a:C b:C {JOINT}")
def text_without_norm(x: T, y: T, u: T, w: T, a: T, b: T, c: T, s: T) -> T:
    q, k, v = projected(x, u)
    tq, tk, tv = projected(y, w)
    q, k, v = torch.cat([tq, rms(q, a)], dim=1), torch.cat([tk, rms(k, b)], dim=1), torch.cat([tv, v], dim=1)
    return attend(rope(q, c, s), rope(k, c, s), v)


@spelling("rope=2", f"x:BLI y:BTI u:IQ w:IQ {IMAGE}")
def text_copied(x: T, y: T, u: T, w: T, c: T, s: T) -> T:
    """No norm at all, and only the image is rotated."""
    q, k, v = projected(x, u)
    tq, tk, tv = projected(y, w)
    q, k, v = torch.cat([tq, rope(q, c, s)], dim=1), torch.cat([tk, rope(k, c, s)], dim=1), torch.cat([tv, v], dim=1)
    return attend(q, k, v)


@spelling("qk_norm=2 absorbed=2", STREAMS)
def sd3(x: T, y: T, u: T, w: T, a: T, b: T, d: T, e: T) -> T:
    """Image first, joined as [B,H,L,D], nothing rotated."""
    q, k, v = (z.transpose(1, 2) for z in projected(x, u))
    tq, tk, tv = (z.transpose(1, 2) for z in projected(y, w))
    q, k = torch.cat([rms0(q, a), rms0(tq, d)], dim=2), torch.cat([rms0(k, b), rms0(tk, e)], dim=2)
    return F.scaled_dot_product_attention(q, k, torch.cat([v, tv], dim=2)).transpose(1, 2).flatten(2)


@spelling("qk_norm=2 absorbed=2", "x:BLI y:BTI u:IQ w:IQ")
def auraflow(x: T, y: T, u: T, w: T) -> T:
    """Text first, LayerNorm without weight."""
    q, k, v = projected(x, u)
    tq, tk, tv = projected(y, w)
    q, k, tq, tk = (F.layer_norm(z.float(), (16,), eps=1e-5).to(z.dtype) for z in (q, k, tq, tk))
    return attend(torch.cat([tq, q], dim=1), torch.cat([tk, k], dim=1), torch.cat([tv, v], dim=1))


@spelling("norm_rope=2 absorbed=4", f"{STREAMS} c:LHR:f s:LHR:f")
def mochi(x: T, y: T, u: T, w: T, a: T, b: T, d: T, e: T, c: T, s: T) -> T:
    """Tables per head for the image alone, joined after the transpose."""

    def rotate(z: T) -> T:
        even, odd = z[..., 0::2].float(), z[..., 1::2].float()
        pair = (even * c - odd * s).to(z.dtype), (even * s + odd * c).to(z.dtype)
        return torch.stack(pair, dim=-1).flatten(-2)

    q, k, v = projected(x, u)
    tq, tk, tv = projected(y, w)
    q, k, tq, tk = rotate(rms(q, a)), rotate(rms(k, b)), rms(tq, d), rms(tk, e)
    q, k, v = (torch.cat([i.transpose(1, 2), t.transpose(1, 2)], dim=2) for i, t in ((q, tq), (k, tk), (v, tv)))
    return F.scaled_dot_product_attention(q, k, v)


@spelling("norm_rope=2 absorbed=4", "x:BLI y:BTI u:IQ w:IQ a:I b:I d:I e:I m:BS1R22:f")
def hidream(x: T, y: T, u: T, w: T, a: T, b: T, d: T, e: T, m: T) -> T:
    """Normed across heads, image first, joined before the rotation."""
    q, k, v = (x @ u).chunk(3, dim=-1)
    tq, tk, tv = (y @ w).chunk(3, dim=-1)
    q, k, tq, tk = rms(q, a).to(v.dtype), rms(k, b).to(v.dtype), rms(tq, d), rms(tk, e)
    q, k, v = (torch.cat([heads(i), heads(t)], dim=1) for i, t in ((q, tq), (k, tk), (v, tv)))
    return attend(matrix_product(q, m), matrix_product(k, m), v)


# -- packed projections, fewer heads of keys ---------------------------------------------------------------------------


@spelling(BOTH, f"x:BLI w:IQ a:C b:C {IMAGE}")
def packed_by_head(x: T, w: T, a: T, b: T, c: T, s: T) -> T:
    """(H K D): q, k and v of each head side by side."""
    q, k, v = (x @ w).view(2, 6, 4, 48).chunk(3, dim=-1)
    return attend(rope(rms(q, a), c, s), rope(rms(k, b), c, s), v)


@spelling(BOTH, f"x:BLI w:IP a:C b:C {IMAGE}")
def packed_with_the_mlp(x: T, w: T, a: T, b: T, c: T, s: T) -> T:
    """Flux 2 single block: the MLP behind q, k and v."""
    qkv, mlp = torch.split(x @ w, [192, 24], dim=-1)
    q, k, v = (heads(part) for part in qkv.chunk(3, dim=-1))
    return torch.cat([attend(rope(rms(q, a), c, s), rope(rms(k, b), c, s), v), F.gelu(mlp)], dim=2)


GROUPED = f"q:BLI k:BLJ v:BLJ a:C b:C {IMAGE}"


@spelling(BOTH, GROUPED)
def grouped_by_attention(q: T, k: T, v: T, a: T, b: T, c: T, s: T) -> T:
    q, k = rope(rms(heads(q), a), c, s), rope(rms(heads(k, 2), b), c, s)
    return attend(q, k, heads(v, 2), enable_gqa=True)


@spelling(BOTH, GROUPED)
def grouped_repeat_interleave(q: T, k: T, v: T, a: T, b: T, c: T, s: T) -> T:
    q, k = rope(rms(heads(q), a), c, s), rope(rms(heads(k, 2), b), c, s)
    return attend(q, k.repeat_interleave(2, dim=2), heads(v, 2).repeat_interleave(2, dim=2))


@spelling(BOTH, GROUPED)
def grouped_repeat(q: T, k: T, v: T, a: T, b: T, c: T, s: T) -> T:
    """Lumina 2."""
    q, k = rope(rms0(heads(q), a), c, s), rope(rms0(heads(k, 2), b), c, s)
    k, v = (x.unsqueeze(3).repeat(1, 1, 1, 2, 1).flatten(2, 3) for x in (k, heads(v, 2)))
    return attend(q, k, v)


# -- layouts and tables ------------------------------------------------------------------------------------------------


@spelling(BOTH, f"q:BLI k:BLI v:BLI a:C {IMAGE}")
def contiguous_for_attention(q: T, k: T, v: T, a: T, c: T, s: T) -> T:
    q, k = (rope(rms(heads(x), a), c, s).transpose(1, 2).contiguous() for x in (q, k))
    return F.scaled_dot_product_attention(q, k, heads(v).transpose(1, 2).contiguous())


@spelling(BOTH, "q:BLI k:BTI v:BTI a:I b:I c:1LI:f s:1LI:f d:1TI:f e:1TI:f")
def tables_of_their_own(q: T, k: T, v: T, a: T, b: T, c: T, s: T, d: T, e: T) -> T:
    """LTX-2 between video and audio: q and k of different lengths, each with its tables."""

    def rotate(x: T, cos: T, sin: T) -> T:
        real, imag = x.unflatten(2, (-1, 2)).unbind(-1)
        return (x.float() * cos + torch.stack([-imag, real], dim=-1).flatten(2).float() * sin).to(x.dtype)

    q, k = rotate(rms(q, a), c, s), rotate(rms(k, b), d, e)
    return attend(heads(q), heads(k), heads(v))


@spelling(BOTH, "q:BLI k:BLI v:BLI a:C c:9C:f s:9C:f")
def tables_cut_to_length(q: T, k: T, v: T, a: T, c: T, s: T) -> T:
    """Tables longer than the sequence, as caches of them are."""
    c, s = c[: q.shape[1]], s[: q.shape[1]]
    return attend(rope(rms(heads(q), a), c, s), rope(rms(heads(k), a), c, s), heads(v))


@spelling(BOTH, "q:BLI k:BLI v:BLI a:C c:9C:f s:9C:f p:L:i")
def tables_picked_by_position(q: T, k: T, v: T, a: T, c: T, s: T, p: T) -> T:
    c, s = c[p][:, None], s[p][:, None]
    q, k = ((x * c + rotate_half(x) * s).to(v.dtype) for x in (rms(heads(q), a), rms(heads(k), a)))
    return attend(q, k, heads(v))
