"""Gates, scales and shifts of one frame, applied to tokens that were unflattened into frames for it.

    h = x + (y.unflatten(1, (F, S)) * gate[:, :, None]).flatten(1, 2)         gate [B, F, D], x and y [B, F * S, D]

No view of the gate is as long as the tokens, so the flatten does not move below the product. Seen unflattened, the sum
and the norm of it are like any other: ``x.unflatten(1, (F, S)) + y.unflatten(1, (F, S)) * gate[:, :, None]``.
"""

from __future__ import annotations

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
    """``{[B, F * S, D]: [[B, F, S, D]]}``: the shapes in which the streams of a graph are gated, by their own."""
    found: dict[tuple, list[tuple]] = {}
    for _, term in view.items():
        total = bare(term)
        if total.op != "add":
            continue
        for part in total.args:
            product = product_in_frames(view, part)
            if product is not None and same_shape(part.shape, total.shape):
                known = found.setdefault(_key(total.shape), [])
                if not any(same_shape(product.shape, shape) for shape in known):
                    known.append(product.shape)
    return found


def _key(shape: tuple) -> tuple:
    return tuple(str(s) for s in shape)


def unflattened(view: TermView, term: Term, framed: dict[tuple, list[tuple]]) -> list[Term]:
    """`term` as it is, and seen in each of the shapes that streams of its shape are gated in."""
    return [term, *(view.view(term, ("reshape",), shape) for shape in framed.get(_key(term.shape), ()))]
