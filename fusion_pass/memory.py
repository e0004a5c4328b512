"""Which inputs of a graph lie side by side in memory, known at compile time and checked at every call.

torch fakes the inputs of a graph with their storages shared as the real ones are, so ``meta["val"]`` of a placeholder
says where a weight lies relative to others. Two things it does not say are added by `annotate`: which argument of the
compiled function a placeholder is, so that the fact can be checked at each call, and whether that argument stays where
it is. CUDA graphs copy all others to places of their own, one by one.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from . import compat
from .errors import DkfuseWarning

KEY = "dkfuse_input"
ALIGNMENT = 16  # bytes: what Inductor and vector loads assume of a tensor
KNOWN = 4096  # sets of weights whose places are remembered; others are checked in full


class UnpackedWarning(DkfuseWarning):
    """Weights that lay side by side when a graph was compiled no longer do."""


@dataclass(frozen=True)
class Place:
    """Where a dense tensor lies: its storage, the first byte and the byte after the last."""

    storage: int
    start: int
    end: int


def place(tensor: torch.Tensor) -> Place | None:
    """The place of a real or fake tensor; None for one whose elements do not lie densely in row-major order."""
    if not compat.has_memory(tensor) or not all(isinstance(n, int) for n in (*tensor.shape, tensor.storage_offset())):
        return None
    if not tensor.is_contiguous() or tensor.numel() == 0:
        return None
    start = tensor.storage_offset() * tensor.itemsize
    return Place(tensor.untyped_storage()._cdata, start, start + tensor.numel() * tensor.itemsize)


def follows(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether `second` begins where `first` ends, both aligned, in one storage."""
    a, b = place(first), place(second)
    same = a is not None and b is not None and a.storage == b.storage and a.end == b.start
    return same and first.dtype == second.dtype and a.start % ALIGNMENT == b.start % ALIGNMENT == 0  # type: ignore[union-attr]


@dataclass
class Inputs:
    """The tensors that a graph is called with, in its order: parameters that torch lifted, then the arguments."""

    lifted: list[torch.Tensor]
    values: list[Any]
    names: list[str]
    static: list[bool]
    taken: list[tuple[int, ...]] = field(default_factory=list)  # runs of inputs that the compiled code reads as one

    @classmethod
    def of(cls, module: fx.GraphModule, arguments: Sequence[Any]) -> Inputs:
        """Those of Dynamo's graph module. torch < 2.13 may keep parameters inside it; its functional graph does not."""
        own = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}
        given = compat.input_names(module)
        given = given if len(given) == len(arguments) else [("", False)] * len(arguments)
        names = [*own, *(name for name, _ in given)]
        static = [*(True for _ in own), *(stays for _, stays in given)]
        return cls(list(own.values()), [*own.values(), *arguments], names, static)

    def runs(self) -> list[tuple[int, ...]]:
        """The longest runs of parameters that lie side by side, in an order that every process finds."""
        indices = [i for i, v in enumerate(self.values) if self.static[i] and isinstance(v, torch.Tensor)]
        places = {i: p for i in indices if (p := place(self.values[i])) is not None}
        found: list[list[int]] = []
        for i in sorted(places, key=lambda i: (places[i].storage, places[i].start)):
            if found and follows(self.values[found[-1][-1]], self.values[i]):
                found[-1].append(i)
            else:
                found.append([i])
        return sorted(tuple(run) for run in found if len(run) > 1)

    def annotate(self, graph: fx.Graph) -> None:
        """Tell the placeholders of the functional graph which input they are, if they are what Dynamo gave."""
        nodes = [node for node in graph.nodes if node.op == "placeholder"]
        if len(nodes) == len(self.values) and all(map(_agree, nodes, self.values, self.static)):
            for index, node in enumerate(nodes):
                if self.static[index] and not _is_written(node):
                    node.meta[KEY] = (self, index)


def _agree(node: fx.Node, value: Any, static: bool) -> bool:
    fake = node.meta.get("val")
    if not static or not isinstance(value, torch.Tensor):
        return isinstance(fake, torch.Tensor) == isinstance(value, torch.Tensor)
    if not isinstance(fake, torch.Tensor) or fake.dtype != value.dtype:
        return False
    return tuple(fake.shape) == tuple(value.shape) and fake.storage_offset() == value.storage_offset()


def _is_written(node: fx.Node) -> bool:
    return any(
        u.args[0] is node and getattr(u.target, "_schema", None) and u.target._schema.is_mutable for u in node.users
    )


def take(weights: Iterable[fx.Node]) -> None:
    """Note that the graph reads these placeholders, in the order of their memory, as one tensor."""
    known = [node.meta[KEY] for node in weights]
    known[0][0].taken.append(tuple(index for _, index in known))


def guarded(compiled: Callable, inputs: Inputs, runs: Sequence[tuple[int, ...]], otherwise: Callable) -> Callable:
    """`compiled` while the inputs of each of `runs` lie side by side, else what `otherwise()` makes, from then on.

    A call compares one pointer per input of the runs.
    """
    if not runs:
        return compiled
    lifted = inputs.lifted
    order = tuple(dict.fromkeys(index for run in runs for index in run))
    at = {index: position for position, index in enumerate(order)}
    pairs = [
        (at[a], at[b], inputs.values[a].nbytes, f"{inputs.names[a]} and {inputs.names[b]}")
        for run in runs
        for a, b in itertools.pairwise(run)
    ]
    firsts = [(at[run[0]], f"{inputs.names[run[0]]} and its neighbours") for run in runs]
    pick, data_ptr = operator.itemgetter(*order), torch.Tensor.data_ptr
    indices, first = list(order), order[0]
    known: dict[int, list[int]] = {}  # blocks of a model may share this code, each with weights of its own
    other: list[Callable] = []

    def moved(pointers: tuple[int, ...]) -> str | None:
        for first, name in firsts:
            if pointers[first] % ALIGNMENT:
                return name
        return next((name for a, b, nbytes, name in pairs if pointers[a] + nbytes != pointers[b]), None)

    def call(*args: Any) -> Any:
        tensors = [*lifted, *args]
        before = known.get(data_ptr(tensors[first]))
        if before is not None and compat.same_pointers(tensors, before, indices):
            return compiled(*args)
        pointers = tuple(map(data_ptr, pick(tensors)))
        if (name := moved(pointers)) is None:
            if len(known) >= KNOWN:
                known.clear()
            lie = [0] * len(tensors)
            for index, pointer in zip(order, pointers, strict=True):
                lie[index] = pointer
            known[pointers[0]] = lie
            return compiled(*args)
        if not other:
            text = (
                f"dkfuse: {name} no longer lie side by side in memory as they did at compile time, so the graph is "
                "compiled anew with a GEMM for each; call dkfuse.pack(model) again to have one GEMM for all"
            )
            warnings.warn(text, UnpackedWarning, stacklevel=2)
            other.append(otherwise())
        return other[0](*args)

    return call
