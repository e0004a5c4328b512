"""The table of spellings, part 5: rotations as complex products, slice writes and matrices, and on a part of x.

Rows are written as in `spellings_rope`; those that the decorators there do not fit are whole functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor as T

from .harness import Spelling, table
from .spellings_rope import BOTH, attend, bhsd, bshd, heads, rms, rotate_half, turned

ROWS: list[Spelling] = []
spelling = table(ROWS)


# -- Q3: complex products ----------------------------------------------------------------------------------------------


@bshd("f:LR:c")
def q3_complex64(x: T, f: T) -> T:
    """Qwen-Image."""
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * f.unsqueeze(1)).flatten(3).type_as(x)


@bshd("f:BLR:c")
def q3_table_per_sample(x: T, f: T) -> T:
    """Z-Image."""
    with torch.amp.autocast("cpu", enabled=False):
        z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(z * f.unsqueeze(2)).flatten(3).type_as(x)


@bshd("angles:LR:f")
def q3_polar(x: T, angles: T) -> T:
    f = torch.polar(torch.ones_like(angles), angles)
    z = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(f[:, None] * z).flatten(-2).to(x.dtype)


@bhsd("c:LR:f s:LR:f")
def q3_complex_made_here(x: T, c: T, s: T) -> T:
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * torch.complex(c, s)).flatten(-2).type_as(x)


@bshd("f:1L1R:z")
def q3d_complex128(x: T, f: T) -> T:
    """AnyFlow."""
    z = torch.view_as_complex(x.to(torch.float64).unflatten(3, (-1, 2)))
    return torch.view_as_real(z * f).flatten(3, 4).type_as(x)


@bshd("f:BLR:z")
def q3d_complex64_times_complex128(x: T, f: T) -> T:
    """Lumina 2: the product is complex128."""
    z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(z * f.unsqueeze(2)).flatten(3).type_as(x)


def by_samples(x: T, f: T) -> T:
    """Wan's own repository: a Python loop over samples, padded behind their tokens, in complex128, fp32 out."""
    out, tokens = [], f.shape[0]
    for sample in x:
        z = torch.view_as_complex(sample[:tokens].to(torch.float64).reshape(tokens, sample.shape[1], -1, 2))
        out.append(torch.cat([torch.view_as_real(z * f).flatten(2), sample[tokens:]]))
    return torch.stack(out).float()


@bshd("f:L1R:z", batch="1")
def q3d_sample_by_sample(x: T, f: T) -> T:
    return by_samples(x, f)


@spelling(BOTH, "q:1LI k:1LI v:1LI a:I f:L1R:z")
def q3d_sample_by_sample_of_a_norm_over_all_heads(q: T, k: T, v: T, a: T, f: T) -> T:
    q, k = (by_samples(heads(rms(x, a)), f) for x in (q, k))
    return attend(q.to(v.dtype), k.to(v.dtype), heads(v))


@spelling(BOTH, "q:1LI k:1LI v:1LI a:I f:L1R:z")
def q3d_sample_by_sample_kept_in_fp32(q: T, k: T, v: T, a: T, f: T) -> T:
    q, k = (by_samples(heads(rms(x, a)), f) for x in (q, k))
    return attend(q, k, heads(v).float()).to(v.dtype)


@spelling(BOTH, "q:1LI k:1LI v:1LI a:I f:L1R:z")
def q3d_sample_by_sample_and_padding(q: T, k: T, v: T, a: T, f: T) -> T:
    q, k = (by_samples(heads(rms(x, a)), f[:4]) for x in (q, k))
    return attend(q.to(v.dtype), k.to(v.dtype), heads(v))


# -- Q4: slice writes --------------------------------------------------------------------------------------------------


@bshd("c:1L1C:f s:1L1C:f")
def q4_wan(x: T, c: T, s: T) -> T:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = c[..., 0::2], s[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = a * sin + b * cos
    return out.type_as(x)


@bshd("f:BLJ:f")
def q4_helios(x: T, f: T) -> T:
    """Both tables in one tensor."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = f.unsqueeze(-2).chunk(2, dim=-1)
    out = torch.empty_like(x)
    out[..., 0::2] = a * cos[..., 0::2] - b * sin[..., 1::2]
    out[..., 1::2] = a * sin[..., 1::2] + b * cos[..., 0::2]
    return out.type_as(x)


@bhsd("c:LR:d s:LR:d")
def q4_halves_fp64(x: T, c: T, s: T) -> T:
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    out = torch.empty_like(x)
    out[..., :half] = a * c - b * s
    out[..., half:] = b * c + a * s
    return out


# -- Q5: 2x2 matrices --------------------------------------------------------------------------------------------------


def matrix_product(x: T, m: T) -> T:
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    out = m[..., 0] * pairs[..., 0] + m[..., 1] * pairs[..., 1]
    return out.reshape(x.shape).type_as(x)


@bhsd("m:B1LR22:f")
def q5_matrices(x: T, m: T) -> T:
    """Black Forest Labs, PRX."""
    return matrix_product(x, m)


@bshd("m:BL1R22:f")
def q5_matrices_bshd(x: T, m: T) -> T:
    """HiDream."""
    return matrix_product(x, m)


@bhsd("angles:BLR:d")
def q5_matrices_made_here(x: T, angles: T) -> T:
    """Black Forest Labs' ``rope``: angles in fp64, matrices in fp32."""
    c, s = angles.cos(), angles.sin()
    m = torch.stack([c, -s, s, c], dim=-1).unflatten(-1, (2, 2)).float()
    return matrix_product(x, m.unsqueeze(1))


@bshd("m:L1R22:f")
def q5_kandinsky(x: T, m: T) -> T:
    pairs = x.reshape(*x.shape[:-1], -1, 1, 2).to(torch.float32)
    return (m * pairs).sum(dim=-1).reshape(x.shape).to(torch.bfloat16)


# -- on a part of the columns ------------------------------------------------------------------------------------------


@bshd("c:LM:f s:LM:f")
def partial_rotary(x: T, c: T, s: T) -> T:
    """MiniMax H3: 96 of 128 columns."""
    rotary, rest = x[..., : c.shape[-1]], x[..., c.shape[-1] :]
    c, s = c.to(x.dtype)[None, :, None, :], s.to(x.dtype)[None, :, None, :]
    return torch.cat((rotary * c + rotate_half(rotary) * s, rest), dim=-1).contiguous()


@bshd("angles:LR:f")
def partial_rotary_fp32(x: T, angles: T) -> T:
    """StableAudio 3."""
    rotary, rest = x[..., :8].float(), x[..., 8:]
    angles = angles.unsqueeze(1)
    rotary = rotary * angles.cos() + rotate_half(rotary) * angles.sin()
    return torch.cat((rotary.to(x.dtype), rest), dim=-1)


@bshd("m:L1422:f")
def partial_rotary_half_of_the_head(x: T, m: T) -> T:
    """HiDream with a table of half the head's width."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([matrix_product(first, m), second], dim=-1)


@bshd("c:L14:f s:L14:f")
def partial_rotary_in_one_cat(x: T, c: T, s: T) -> T:
    """Both halves of the first 8 columns and the others."""
    a, b, rest = x[..., :4], x[..., 4:8], x[..., 8:]
    return torch.cat([(a * c - b * s).to(x.dtype), (a * s + b * c).to(x.dtype), rest], dim=-1)


@bshd("c:L14:f s:L14:f")
def partial_rotary_in_one_cat_of_a_split(x: T, c: T, s: T) -> T:
    a, b, rest = x.split([4, 4, 8], dim=-1)
    return torch.cat([(a * c - b * s).to(x.dtype), (a * s + b * c).to(x.dtype), rest], dim=-1)


@spelling("rope=6", "q:BLE k:BLE v:BLE t:4M:f u:4M:f y:4M:f i:L:i j:L:i l:L:i")
def q10_allegro(q: T, k: T, v: T, t: T, u: T, y: T, *positions: T) -> T:
    """Two heads of 36 columns: three thirds rotated apart, by tables picked by position."""

    def rotate(x: T) -> T:
        thirds = []
        for part, angles, position in zip(x.chunk(3, dim=-1), (t, u, y), positions, strict=True):
            cos, sin = (F.embedding(position, table)[None, None] for table in (angles.cos(), angles.sin()))
            a, b = part[..., : part.shape[-1] // 2], part[..., part.shape[-1] // 2 :]
            thirds.append((part.float() * cos + torch.cat((-b, a), dim=-1).float() * sin).to(part.dtype))
        return torch.cat(thirds, dim=-1)

    q, k, v = (heads(x, 2).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(rotate(q), rotate(k), v)


# -- Q9: the image tokens, in place ------------------------------------------------------------------------------------


@spelling(BOTH, "q:BSI k:BSI v:BSI a:C b:C c:LC:f s:LC:f")
def q9_cogvideox(q: T, k: T, v: T, a: T, b: T, c: T, s: T) -> T:
    """Text first: the tokens after it are rotated and written back."""
    q, k, v = (heads(x).transpose(1, 2) for x in (q, k, v))
    q, k = (F.layer_norm(x, (16,), a, b, 1e-6) for x in (q, k))
    c, s = c[None, None], s[None, None]
    for x in (q, k):
        image = x[:, :, 4:]
        x[:, :, 4:] = (image.float() * c + turned(image).float() * s).to(image.dtype)
    return F.scaled_dot_product_attention(q, k, v)


@spelling(BOTH, "q:BSI k:BSI v:BSI c:LC:f s:LC:f")
def q9_cogview4(q: T, k: T, v: T, c: T, s: T) -> T:
    q, k, v = (heads(x).transpose(1, 2) for x in (q, k, v))
    q, k = (F.layer_norm(x, (16,), eps=1e-5).to(v.dtype) for x in (q, k))
    for x in (q, k):
        image = x[:, :, 4:, :]
        x[:, :, 4:, :] = (image.float() * c[None, None] + rotate_half(image).float() * s[None, None]).to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v)


@spelling("rope=2", "x:BSI w:IQ c:LC:f s:LC:f")
def q9_without_norm(x: T, w: T, c: T, s: T) -> T:
    """Text last; q and k are slices of one projection."""
    q, k, v = heads(x @ w, 12).chunk(3, dim=2)
    q, k = q.clone(), k.clone()
    for y in (q, k):
        y[:, :6] = (y[:, :6].float() * c[:, None] + turned(y[:, :6]).float() * s[:, None]).to(y.dtype)
    return attend(q, k, v)


@spelling(BOTH, "q:BSI k:BSI v:BSI a:C f:LR:c")
def q9_complex(q: T, k: T, v: T, a: T, f: T) -> T:
    q, k = (rms(heads(x), a) for x in (q, k))
    for x in (q, k):
        z = torch.view_as_complex(x[:, 4:].float().reshape(2, 6, 4, 8, 2))
        x[:, 4:] = torch.view_as_real(z * f[:, None]).flatten(3).type_as(x)
    return attend(q, k, heads(v))
