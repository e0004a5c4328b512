"""The table of spellings, rotations part 3: the two of a pair change places with other dims; and near misses."""

from __future__ import annotations

import torch
from torch import Tensor as T

from .harness import Spelling
from .near_misses_rope import rope_table
from .spellings_rope import bhsd, bshd

NEAR_MISSES: list[Spelling] = []
near_miss = rope_table(NEAR_MISSES)


def halves_times_matrices(x: T, m: T) -> T:
    pairs = x.reshape(*x.shape[:-1], 2, -1).movedim(-2, -1).unsqueeze(-2).float()
    out = m[..., 0] * pairs[..., 0] + m[..., 1] * pairs[..., 1]
    return out.movedim(-1, -2).reshape(x.shape).type_as(x)


@bshd("m:L1R22:f")
def matrices_of_moved_halves(x: T, m: T) -> T:
    """Cosmos-Predict2."""
    return halves_times_matrices(x, m)


@bhsd("m:LR22:f")
def matrices_of_moved_halves_bhsd(x: T, m: T) -> T:
    return halves_times_matrices(x, m)


@bshd("m:BL1R22:f")
def matrices_of_moved_halves_per_sample(x: T, m: T) -> T:
    return halves_times_matrices(x, m)


@bshd("c:L1R:f s:L1R:f")
def tables_of_moved_halves(x: T, c: T, s: T) -> T:
    a, b = x.unflatten(-1, (2, -1)).transpose(-1, -2).float().unbind(-1)
    return torch.stack([a * c - b * s, a * s + b * c], dim=-1).transpose(-1, -2).flatten(-2).type_as(x)


@bshd("c:L1R:f s:L1R:f")
def pairs_in_front(x: T, c: T, s: T) -> T:
    a, b = x.unflatten(-1, (-1, 2)).movedim(-1, 0).float()
    return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2).type_as(x)


# -- products of matrices ----------------------------------------------------------------------------------------------


@bshd("m:LR22:f")
def matrices_by_einsum(x: T, m: T) -> T:
    pairs = x.float().unflatten(-1, (-1, 2))
    return torch.einsum("lpij,blhpj->blhpi", m, pairs).flatten(-2).type_as(x)


@bhsd("m:LR22:f")
def matrices_by_matmul(x: T, m: T) -> T:
    pairs = x.float().unflatten(-1, (-1, 2))
    return (m @ pairs.unsqueeze(-1)).squeeze(-1).flatten(-2).type_as(x)


@bhsd("m:LR22:f")
def matrices_by_matmul_of_rows(x: T, m: T) -> T:
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (pairs @ m.mT).flatten(-3).type_as(x)


@bhsd("m:LR22:f")
def matrices_by_matmul_transposed(x: T, m: T) -> T:
    """The inverse rotation."""
    return (x.float().unflatten(-1, (-1, 1, 2)) @ m).flatten(-3).type_as(x)


# -- near misses -------------------------------------------------------------------------------------------------------


@near_miss("", "m:L1R22")
def halves_in_pairs_out(x: T, m: T) -> T:
    pairs = x.unflatten(-1, (2, -1)).movedim(-2, -1).unsqueeze(-2)
    return (m[..., 0] * pairs[..., 0] + m[..., 1] * pairs[..., 1]).flatten(-2)


@near_miss("", "m:L1R22")
def pairs_in_halves_out(x: T, m: T) -> T:
    pairs = x.unflatten(-1, (-1, 1, 2))
    return (m[..., 0] * pairs[..., 0] + m[..., 1] * pairs[..., 1]).movedim(-1, -2).flatten(-2)


@near_miss("", "m:L1R22")
def rows_of_the_matrices_exchanged(x: T, m: T) -> T:
    pairs = x.unflatten(-1, (2, -1)).movedim(-2, -1).unsqueeze(-2)
    return (m.flip(-2)[..., 0] * pairs[..., 0] + m[..., 1] * pairs[..., 1]).movedim(-1, -2).flatten(-2)


@near_miss("", "c:14R s:14R")
def heads_and_columns_exchanged(x: T, c: T, s: T) -> T:
    """Where there are as many heads as pairs, the pairs of another dim."""
    a, b = x[..., :8].unflatten(-1, (-1, 2)).transpose(-2, -3).unbind(-1)
    out = torch.stack([a * c[..., :4] - b * s[..., :4], a * s[..., :4] + b * c[..., :4]], dim=-1).flatten(-2)
    return torch.cat([out, x[..., 8:]], dim=-1)


@near_miss("", "m:LR22")
def matmul_of_another_pair(x: T, m: T) -> T:
    """The matrices of the next pair of columns."""
    return (m.roll(1, 1)[:, None] @ x.unflatten(-1, (-1, 2)).flip(-1).unsqueeze(-1)).flatten(-3) + x


@near_miss("", "m:C22")
def matmul_that_mixes_heads(x: T, m: T) -> T:
    """The same column of two heads instead of two columns of one."""
    two = x.unflatten(2, (2, 2)).movedim(3, -1)
    return (m @ two.unsqueeze(-1)).squeeze(-1).movedim(-1, 3).flatten(2, 3)
