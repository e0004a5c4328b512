"""Gates, scales and shifts of one frame, applied to tokens that were unflattened into frames for it.

    h = x + (y.unflatten(1, (F, S)) * gate[:, :, None]).flatten(1, 2)         gate [B, F, D], x and y [B, F * S, D]

No view of the gate is as long as the tokens, so the flatten does not move below the product. Seen unflattened, the sum
and the norm of it are like any other: ``x.unflatten(1, (F, S)) + y.unflatten(1, (F, S)) * gate[:, :, None]``.
Rows of frames that were repeated for the tokens are read before they were, in the same shape.
"""

from __future__ import annotations

from collections.abc import Iterable

from .checks import is_row_parameter
from .terms import Term, TermView, bare, same_shape, same_size


def product_in_frames(view: TermView, term: Term) -> Term | None:
    """The product with a row parameter that `term` is a reshape of, where the reshape cannot move below it."""
    seen = bare(term)
    if seen.op != "view" or seen.attrs[0] != "reshape":
        return None
    product = bare(seen.args[0])
    if product.op != "mul" or bare(view.expose(seen)).op == "mul" or not _merges_rows(seen.shape, product.shape):
        return None
    return product if any(is_row_parameter(a, product.shape) for a in product.args) else None


def _merges_rows(flat: tuple, framed: tuple) -> bool:
    return len(flat) >= 2 and len(framed) > len(flat) and same_size(flat[-1], framed[-1])


def shapes(view: TermView) -> dict[tuple, list[tuple]]:
    """``{[B, F * S, D]: [[B, F, S, D]]}``: the frames in which streams are gated and rows are repeated, by shape."""
    found: dict[tuple, list[tuple]] = {}
    for _, term in view.items():
        shape = _repeated(term)
        total = bare(term)
        for part in total.args if total.op == "add" else ():
            product = product_in_frames(view, part)
            if product is not None and same_shape(part.shape, total.shape):
                shape = product.shape
        if shape is not None:
            known = found.setdefault(_key(term.shape), [])
            if not any(same_shape(shape, other) for other in known):
                known.append(shape)
    return found


def _repeated(term: Term) -> tuple | None:
    """The shape in which rows were repeated, of ``rows.repeat_interleave(S, dim)``."""
    if term.op != "view" or term.attrs[0] != "reshape":
        return None
    seen = term.args[0].args[0] if term.args[0].op == "view" and term.args[0].attrs[0] == "clone" else term.args[0]
    spread = seen.op == "view" and seen.attrs[0] == "expand" and len(seen.args[0].shape) == len(seen.shape)
    return seen.shape if spread and _merges_rows(term.shape, seen.shape) else None


def _key(shape: tuple) -> tuple:
    return tuple(str(s) for s in shape)


def unflattened(view: TermView, term: Term, framed: dict[tuple, list[tuple]]) -> list[Term]:
    """`term` seen in each of the frames that its shape is known in, and as it is."""
    return [*(view.view(term, ("reshape",), shape) for shape in framed.get(_key(term.shape), ())), term]


def has_frames(operands: Iterable[Term], shape: tuple) -> bool:
    """One of `operands` of a site seen as `shape` has a row for each frame, and no more."""
    for term in operands:
        between = term.shape[1:-1]
        ones = [same_size(s, 1) for s in between]
        if len(term.shape) == len(shape) and any(ones) and not all(ones):
            return True
    return False
