"""Functions that look like a rotation and are not one. Part 1: the formula. Part 2: `near_misses_rope_around`.

Each rotates, or seems to, a query [B,L,H,C] after its norm. `expected` counts the sites of rules `norm_rope` and `rope`
only: "" where none may be fused, "either" where a fusion may be right and the values decide. Inputs are fp32, so that a
wrong fusion shows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor as T

from .harness import FP32, Spelling, parse
from .spellings_rope import attend, heads, rms, rotate_half, turned

ROWS: list[Spelling] = []
ONE = "norm_rope"
HALF, FULL = "c:L1R s:L1R", "c:L1C s:L1C"
Rotation = Callable[..., T]


def rope_table(rows: list[Spelling]) -> Callable[..., Callable[[Rotation], Rotation]]:
    """A decorator ``@near_miss(expected, tables)`` for functions ``rotate(x, *tables)`` that a query goes through."""

    def near_miss(expected: str = "", tables: str = HALF, q: str = "BLI") -> Callable[[Rotation], Rotation]:
        def add(rotate: Rotation) -> Rotation:
            def function(q: T, k: T, v: T, a: T, *tables: T) -> T:
                return attend(rotate(rms(heads(q), a), *tables), heads(k), heads(v))

            inputs = f"q:{q} k:BTI v:BTI a:C {tables}"
            rows.append(Spelling(rotate.__name__, function, inputs, parse(expected), FP32))
            return rotate

        return add

    return near_miss


near_miss = rope_table(ROWS)


def pairs(x: T) -> tuple[T, T]:
    return x[..., 0::2], x[..., 1::2]


def joined(a: T, b: T) -> T:
    return torch.stack([a, b], dim=-1).flatten(-2)


# -- signs -------------------------------------------------------------------------------------------------------------


@near_miss()
def sine_and_cosine_swapped_in_one_component(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    return joined(a * s - b * c, b * c + a * s)


@near_miss(ONE)
def sine_and_cosine_swapped_in_both(x: T, c: T, s: T) -> T:
    """Harmless: a rotation whose tables are named otherwise."""
    a, b = pairs(x)
    return joined(a * s - b * c, b * s + a * c)


@near_miss()
def two_pluses(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    return joined(a * c + b * s, b * c + a * s)


@near_miss()
def two_minuses(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    return joined(a * c - b * s, b * c - a * s)


@near_miss()
def inverse_rotation(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    return joined(a * c + b * s, b * c - a * s)


@near_miss(tables=FULL)
def other_half_negated(x: T, c: T, s: T) -> T:
    a, b = x.chunk(2, dim=-1)
    return x * c + torch.cat((b, -a), dim=-1) * s


@near_miss(tables=FULL)
def both_halves_negated(x: T, c: T, s: T) -> T:
    a, b = x.chunk(2, dim=-1)
    return x * c + torch.cat((-b, -a), dim=-1) * s


@near_miss(tables=FULL)
def halves_not_exchanged(x: T, c: T, s: T) -> T:
    a, b = x.chunk(2, dim=-1)
    return x * c + torch.cat((-a, b), dim=-1) * s


@near_miss(tables=FULL)
def turned_part_subtracted(x: T, c: T, s: T) -> T:
    return x * c - turned(x) * s


# -- which components --------------------------------------------------------------------------------------------------


@near_miss(tables=FULL + " y:BLHC")
def pairs_of_two_tensors(x: T, c: T, s: T, y: T) -> T:
    return x * c + turned(y) * s


@near_miss(tables=HALF + " y:BLHC")
def second_component_of_another_tensor(x: T, c: T, s: T, y: T) -> T:
    a, b = x[..., 0::2], y[..., 1::2]
    return joined(a * c - b * s, b * c + a * s)


@near_miss()
def halves_joined_as_pairs(x: T, c: T, s: T) -> T:
    a, b = x.chunk(2, dim=-1)
    return joined(a * c - b * s, b * c + a * s)


@near_miss()
def pairs_joined_as_halves(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    return torch.cat([a * c - b * s, b * c + a * s], dim=-1)


@near_miss()
def components_exchanged(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    return joined(b * c + a * s, a * c - b * s)


@near_miss()
def first_component_only(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    return joined(a * c - b * s, b)


@near_miss()
def second_from_the_rotated_first(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    a = a * c - b * s
    return joined(a, b * c + a * s)


@near_miss(tables="c:LC s:LC")
def over_tokens(x: T, c: T, s: T) -> T:
    a, b = x.chunk(2, dim=1)
    return x * c[:, None] + torch.cat([-b, a], dim=1) * s[:, None]


@near_miss(tables="c:HC s:HC")
def over_heads(x: T, c: T, s: T) -> T:
    a, b = x.unflatten(2, (2, 2)).unbind(3)
    return x * c + torch.stack([-b, a], dim=3).flatten(2, 3) * s


@near_miss(tables="c:L14 s:L14")
def three_components(x: T, c: T, s: T) -> T:
    a, b, d = x[..., :4], x[..., 4:8], x[..., 8:12]
    return torch.cat([a * c - b * s, b * c + d * s, d * c + a * s, x[..., 12:]], dim=-1)


@near_miss(tables=FULL)
def overlapping_halves(x: T, c: T, s: T) -> T:
    return x * c + torch.cat([-x[..., 4:12], x[..., :8]], dim=-1) * s


@near_miss(tables=FULL)
def neighbours_instead_of_pairs(x: T, c: T, s: T) -> T:
    return x * c + turned(x.roll(1, dims=-1)) * s


@near_miss(tables=FULL)
def components_shifted_by_a_row(x: T, c: T, s: T) -> T:
    return x * c + rotate_half(x.flip(1)) * s


@near_miss()
def rectified_component(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    return joined(a * c - b.relu() * s, b * c + a * s)


# -- which tables ------------------------------------------------------------------------------------------------------


@near_miss(tables=HALF + " d:L1R")
def cosine_of_its_own_for_each_component(x: T, c: T, s: T, d: T) -> T:
    a, b = pairs(x)
    return joined(a * c - b * s, b * d + a * s)


@near_miss(tables=FULL)
def tables_of_the_other_component(x: T, c: T, s: T) -> T:
    """A table of full width, read one column off."""
    a, b = pairs(x)
    return joined(a * c[..., 1::2] - b * s[..., 1::2], b * c[..., 0::2] + a * s[..., 0::2])


@near_miss(ONE)
def tables_joined_for_pairs(x: T, c: T, s: T) -> T:
    """Harmless: each column has a value of its own, and none may be read in place of its neighbour."""
    c, s = torch.cat([c, c], dim=-1), torch.cat([s, s], dim=-1)
    return x * c + turned(x) * s


@near_miss(ONE)
def tables_repeated_for_halves(x: T, c: T, s: T) -> T:
    """Harmless, as above."""
    return x * c.repeat_interleave(2, -1) + rotate_half(x) * s.repeat_interleave(2, -1)


@near_miss(ONE, "c:91C s:91C")
def tables_cut_at_different_rows(x: T, c: T, s: T) -> T:
    """Harmless."""
    return x * c[1:7] + turned(x) * s[:6]


@near_miss("", "c:BL1R s:BL1R", q="1LI")
def tables_enlarge_the_result(x: T, c: T, s: T) -> T:
    a, b = pairs(x)
    return joined(a * c - b * s, b * c + a * s)


@near_miss("either")
def tables_from_the_query(x: T, c: T, s: T) -> T:
    m = x.mean(-1, keepdim=True)
    a, b = pairs(x)
    return joined(a * m.cos() - b * m.sin(), b * m.cos() + a * m.sin())


@near_miss("", "c:LR s:LR", q="BHI")
def tables_of_other_tokens(x: T, c: T, s: T) -> T:
    """Right shapes after a transpose, and tokens that are not the tables' own: 4 tokens, 6 rows."""
    return torch.cat([x[..., :8] * c[0] - x[..., 8:] * s[1], x[..., 8:] * c[2] + x[..., :8] * s[3]], dim=-1)
