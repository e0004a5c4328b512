"""The canonical view of an FX graph: hash-consed terms, built without touching the graph.

A *term* says what a value means, not how the model spelled it. The view absorbs four kinds of noise:

* **casts**: a widening cast vanishes; a narrowing cast, explicit or implied by an op that returns bf16/fp16,
  is a ``round`` term. ``bf16 + bf16`` therefore reads ``round[bf16](add(a, b))``.
* **order**: ``add`` and ``mul`` keep their operands sorted; ``sub``, ``div``, ``addcmul`` are written with them.
* **copies of one view**: ``split``, ``chunk``, ``unbind``, ``select`` and ``slice`` become one ``view`` vocabulary.
* **norms**: the pieces of a LayerNorm or RMSNorm over the last dim collapse into one term (`canonical`).

Everything else is a ``leaf``: an FX node whose value is used as it is. Equal terms are the same object, so that
duplicated subexpressions (the graph has not been through CSE) are found equal by identity.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from ..compat import statically_known_true
from ..rewriting.strides import read_by_strides

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)
READABLE = (*FLOATS, torch.float64)  # fp64 occurs in rotations; no kernel takes it as an activation
NORM_REACH = 12  # a term further than this above a norm cannot be part of the norm's site

aten = torch.ops.aten
prims = torch.ops.prims


class Term:
    """One hash-consed value. ``op(*args)`` with static ``attrs``; `shape` may hold SymInts.

    `precision` is the narrowest dtype that holds the value exactly (fp32 for arithmetic that was not rounded).
    `norm_reach` is the distance down to the nearest norm, or None: what the matcher looks at before it tries a rule.
    """

    __slots__ = ("args", "attrs", "norm_reach", "op", "precision", "shape", "uid")
    norm_reach: int | None

    def __init__(self, op: str, args: tuple[Term, ...], attrs: tuple, shape: tuple, precision: torch.dtype, uid: int):
        self.op, self.args, self.attrs, self.shape, self.precision, self.uid = op, args, attrs, shape, precision, uid
        below = [a.norm_reach for a in args if a.norm_reach is not None and op not in ("cat", "clamp")]
        reach = 0 if op in ("layer_norm", "rms_norm") else (min(below) + 1 if below else None)
        self.norm_reach = reach if reach is not None and reach <= NORM_REACH else None

    @property
    def value(self) -> float:
        """The number of a ``const`` term."""
        return self.attrs[0]

    def __repr__(self) -> str:
        return render(self)


def bare(term: Term) -> Term:
    """`term` without its roundings."""
    while term.op == "round":
        term = term.args[0]
    return term


def viewed(term: Term) -> Term:
    """What lies under `term`'s views."""
    while term.op == "view":
        term = term.args[0]
    return term


def render(term: Term, depth: int = 6) -> str:
    """A term as text, cut off below `depth`: what coverage prints for a site that no rule explains."""
    if term.op == "const":
        return f"{term.value:g}"
    if term.op == "leaf":
        return str(term.attrs[0])
    if depth == 0:
        return "…"
    inner = [render(a, depth - 1) for a in term.args]
    if term.op == "round":
        return f"round[{short_dtype(term.precision)}]({inner[0]})"
    if term.op == "view":
        return f"{inner[0]}.{term.attrs[0]}"
    if term.op in ("layer_norm", "rms_norm"):
        inner.append(f"eps={term.attrs[0]:g}")
    elif term.attrs:
        inner += [str(a) for a in term.attrs]
    return f"{term.op}({', '.join(inner)})"


def short_dtype(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(dtype, str(dtype).split(".")[-1])


def same_size(a: Any, b: Any) -> bool:
    """True when two sizes are equal without adding a guard."""
    return a is b or statically_known_true(a == b)


def same_shape(a: Iterable, b: Iterable) -> bool:
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(same_size(x, y) for x, y in zip(a, b, strict=True))


def differ(a: Iterable, b: Iterable) -> bool:
    """True when two shapes are known to be different."""
    a, b = tuple(a), tuple(b)
    return len(a) != len(b) or any(x is not y and statically_known_true(x != y) for x, y in zip(a, b, strict=True))


def broadcast_shape(shapes: list[tuple]) -> tuple:
    rank = max((len(s) for s in shapes), default=0)
    out: list[Any] = [1] * rank
    for shape in shapes:
        for i, size in enumerate(reversed(shape)):
            if same_size(out[rank - 1 - i], 1):
                out[rank - 1 - i] = size
    return tuple(out)


class TermView:
    """Terms for every node of an `fx.Graph` whose ``meta["val"]`` is set, in one linear pass.

    ``view.term(node)`` is the node's term, ``view.nodes(term)`` the nodes that compute it, earliest first.
    """

    def __init__(self, graph: fx.Graph):
        from .canonical import ALGEBRA

        self.graph = graph
        self.order: dict[fx.Node, int] = {}
        self._algebra: dict[str, list[Callable]] = ALGEBRA
        self._interned: dict[tuple, Term] = {}
        self._term: dict[fx.Node, Term] = {}
        self._nodes: dict[Term, list[fx.Node]] = {}
        self._exposed: dict[Term, Term] = {}
        self.reductions: dict[Term, Term] = {}  # norm term -> the reduction it was recognised by
        self.statistics_dtype: dict[Term, torch.dtype] = {}  # norm term -> dtype of its statistics, where narrow
        self.inexact: set[Term] = set()  # terms that were simplified across roundings which nobody records
        self.masks: dict[Any, fx.Node] | None = None  # see `picks.masks`
        self.written_inputs: dict[fx.Node, fx.Node] = {}  # placeholders that are written to -> the first that does
        for i, node in enumerate(graph.nodes):
            self.order[node] = i
            self._note_writes(node)
            if isinstance(node.meta.get("val"), torch.Tensor):
                term = self._read(node)
                self._term[node] = term
                self._nodes.setdefault(term, []).append(node)

    @functools.cached_property
    def read_by_strides(self) -> set[fx.Node]:
        """Nodes whose strides an `as_strided` may depend on, see `strides.read_by_strides`."""
        return read_by_strides(self.graph)

    def term(self, node: fx.Node) -> Term | None:
        return self._term.get(node)

    def nodes(self, term: Term) -> list[fx.Node]:
        return self._nodes.get(term, [])

    def items(self) -> Iterator[tuple[fx.Node, Term]]:
        return iter(self._term.items())

    # -- construction ------------------------------------------------------------------------------------------

    def intern(self, op: str, args: tuple[Term, ...], attrs: tuple, shape: tuple, precision: torch.dtype) -> Term:
        key = (op, tuple(id(a) for a in args), *(id(a) if isinstance(a, fx.Node) else _hashable(a) for a in attrs))
        term = self._interned.get(key)
        if term is None:
            term = self._interned[key] = Term(op, args, attrs, shape, precision, len(self._interned))
        return term

    def leaf(self, node: fx.Node) -> Term:
        val = node.meta["val"]
        return self.intern("leaf", (), (node,), tuple(val.shape), val.dtype)

    def const(self, value: float) -> Term:
        return self.intern("const", (), (float(value),), (), torch.float32)

    def make(self, op: str, *args: Term, attrs: tuple = (), shape: tuple | None = None) -> Term:
        """The canonical term for ``op(*args)``: the algebra's rules first, then interning."""
        if op in ("add", "mul"):
            args = tuple(sorted(args, key=lambda t: (t.op != "const", t.uid)))
        for rule in self._algebra.get(op, ()):
            if (result := rule(self, args, attrs)) is not None:
                return result
        if shape is None:
            shape = broadcast_shape([a.shape for a in args])
        exact = op in ("neg", "cat") and len({a.precision for a in args}) == 1  # moves values, computes none
        return self.intern(op, args, attrs, shape, args[0].precision if exact else torch.float32)

    def round(self, term: Term, dtype: torch.dtype) -> Term:
        """`term` rounded to `dtype`; nothing where the value already fits."""
        if dtype not in NARROW or term.precision == dtype or term.op == "const":
            return term
        return self.intern("round", (term,), (dtype,), term.shape, dtype)

    def view(self, base: Term, attrs: tuple, shape: tuple) -> Term:
        """`base` seen through one view, in its simplest form: views that change nothing vanish."""
        from .simplify import simplify

        if (simpler := simplify(self, base, attrs, shape)) is not None:
            return simpler
        if attrs[0] in ("expand", "reshape"):
            attrs = (attrs[0], *map(str, shape))
        return self.intern("view", (base,), attrs, shape, base.precision)

    def _note_writes(self, node: fx.Node) -> None:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            for argument, value in zip(schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
                    self.written_inputs.setdefault(value, node)

    def _read(self, node: fx.Node) -> Term:
        from .readers import READERS

        val = node.meta["val"]
        reader = READERS.get(node.target) if node.op == "call_function" else None
        if reader is None or val.dtype not in READABLE:
            return self.leaf(node)
        term = reader(self, node)
        if term is None or (term.op != "const" and differ(term.shape, val.shape)):
            return self.leaf(node)  # also ``h + zeros(2, 1, 1)``, which is h, enlarged by a constant
        return self.round(term, val.dtype)

    def operand(self, arg: Any) -> Term | None:
        """The term of an argument of an elementwise op: a node, a number, or None when it is neither."""
        if isinstance(arg, fx.Node):
            term = self._term.get(arg)
            return term if term is not None and arg.meta["val"].dtype in READABLE else None
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return self.const(arg)
        return None

    # -- views over arithmetic -----------------------------------------------------------------------------------

    def expose(self, term: Term) -> Term:
        """Move the outermost views of `term` below its arithmetic, as far as broadcasting allows.

        ``unsqueeze(add(1, s), 1)`` becomes ``add(1, unsqueeze(s, 1))``; a norm is crossed only when its last dim
        survives. Returns `term` itself when nothing can move.
        """
        if term.op != "view":
            return term
        known = self._exposed.get(term)
        if known is None:
            from .push import push

            inner = term.args[0]
            base = self.expose(inner)
            if not same_shape(base.shape, inner.shape):
                base = inner  # an expand vanished into broadcasting, which the views above it rely on
            moved = push(self, term.attrs, base, term.shape)
            known = self._exposed[term] = term if moved is None else self.expose(moved)
        return known

    def realizable(self, term: Term) -> bool:
        """True when some node computes `term`, or views of such a node do."""
        while not self._nodes.get(term):
            if term.op != "view":
                return False
            term = term.args[0]
        return True


def _hashable(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, fx.Node):
        return id(value)
    if isinstance(value, torch.SymInt):
        return ("sym", str(value))
    return value


def getitem_source(node: fx.Node) -> tuple[fx.Node, int] | None:
    """``(producer, index)`` of a `getitem` node."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        return node.args[0], node.args[1]
    return None
