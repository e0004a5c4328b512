"""Gated residuals and modulations without a norm as sites of coverage, found without asking the rules."""

from __future__ import annotations

from torch import fx

from .checks import is_cut, is_repeated, is_row_parameter
from .frames import product_in_frames
from .terms import Term, TermView, bare, same_shape, same_size


def find(view: TermView, node: fx.Node) -> tuple[str, Term] | None:
    """The kind of the site at `node` and the sum that it is, if it is one."""
    term = view.term(node)
    if term is None:
        return None
    total = term.args[0] if term.op == "round" else term
    shape = tuple(node.meta["val"].shape)
    if total.op != "add" or len(shape) < 2 or view.nodes(term)[0] is not node:
        return None
    for stream, product in (total.args, total.args[::-1]):
        framed = product_in_frames(view, product)
        gated = framed is not None and same_shape(stream.shape, shape) and stream.op != "const"
        if not is_repeated(stream) and (gated or is_gated_residual(view.expose(stream), product, shape)):
            return "gated_residual", total
        if is_modulation(stream, product, shape):
            return "scale_shift", total
    return None


def is_gated_residual(stream: Term, product: Term, shape: tuple) -> bool:
    """``stream + gate * branch``, and not the two products of a rotation."""
    p, s = bare(product), bare(stream)
    if p.op != "mul" or p.args[0].op == "const" or stream.op == "const" or not same_shape(stream.shape, shape):
        return False
    if s.op == "mul" and any(is_row_parameter(a, shape) or is_cut(a, shape) for a in s.args):
        return False
    if s.op == "neg" or p.args[0] is p.args[1]:
        return False
    for gate, branch in (p.args, p.args[::-1]):
        if same_shape(branch.shape, shape) and (is_row_parameter(gate, shape) or is_cut(gate, shape)):
            return not is_factor_of_norm(gate)
    return False


def is_factor_of_norm(term: Term) -> bool:
    return bool(term.shape) and same_size(term.shape[-1], 1)


def is_modulation(shift: Term, product: Term, shape: tuple) -> bool:
    """``x * (1 + scale) + shift`` without a norm below."""
    p = bare(product)
    if p.op != "mul" or product.norm_reach is not None or not is_row_parameter(shift, shape):
        return False
    for factor, x in (p.args, p.args[::-1]):
        f = bare(factor)
        while f.op == "view":
            f = bare(f.args[0])
        one_plus = f.op == "add" and f.args[0].op == "const" and f.args[0].value == 1.0
        if one_plus and is_row_parameter(factor, shape) and same_shape(x.shape, shape):
            return True
    return False
