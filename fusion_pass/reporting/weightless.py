"""A fake tensor mode for models whose weights are never allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves, tree_map

Inputs = TypeVar("Inputs")  # tensors in containers
SMALL = 1 << 20  # elements; larger results of real inputs are not computed


class WeightlessMode(FakeTensorMode):
    """Fake weights and activations beside real masks and indices, so that models decide what to compute as they would.

    Trace with the mode entered: `with mode: compiled(**kwargs)`. An operation on real tensors alone gives a real
    result if that is small (a mask, token ids), else a fake one (a mask of tokens × tokens). Two operations of fake
    tensors that FakeTensorMode refuses are answered, because models use them in plain Python between two graphs:

    index by a real boolean mask   has a known shape (HunyuanVideo 1.5 sorts text tokens so)
    bincount                       counts tokens per expert; all are said to go to the first one, so that tracing goes
                                   on through one expert of each layer (HiDream)

    Any other operation that needs the value of a fake tensor raises, as in every fake mode.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.keeps_real = False  # off while a model is built: weights are fake however small they are

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self.keeps_real and not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return self._real_if_small(func, types, args, kwargs)
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], [part for index in args[1] for part in _positions(index)])
        elif func is torch.ops.aten.bincount.default:
            return torch.tensor([args[0].numel()])
        args, kwargs = tree_map(self._faked, (args, kwargs))
        return super().dispatch(func, types, args, kwargs)

    def _real_if_small(self, func: Any, types: Sequence[type], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if not func._schema.is_mutable:  # what is written into a real tensor is real
            faked_args, faked_kwargs = tree_map(self._faked, (args, kwargs))
            try:
                result = super().dispatch(func, types, faked_args, faked_kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                return func(*args, **kwargs)
            if any(isinstance(leaf, torch.Tensor) and leaf.numel() > SMALL for leaf in tree_leaves(result)):
                return result
        return func(*args, **kwargs)

    def _faked(self, leaf: Any) -> Any:
        """A real tensor as a fake one that is no view: torch 2.13 cannot convert a view of a complex tensor's parts."""
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, FakeTensor):
            return leaf
        meta = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
        return self.fake_tensor_converter.from_meta_and_device(self, meta, leaf.device)


def _positions(index: torch.Tensor | None) -> Sequence[torch.Tensor | None]:
    """A real boolean mask as the integer indices that it stands for, one per dimension; anything else as it is."""
    if index is None or isinstance(index, FakeTensor) or index.dtype is not torch.bool:
        return [index]
    return index.nonzero().unbind(1)


def on_meta(module: Any, inputs: Any) -> bool:
    """Whether weights or inputs of a model are on the meta device, where torch folds all that is computed away."""
    return any(t.device.type == "meta" for t in _tensors(module, inputs))


def without_memory(module: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """A model on the meta device, in place on fake CPU tensors, so that it can be traced; any other as it is.

    Build a model of any size under `with torch.device("meta")`: nothing is allocated. Inputs may be real.
    """
    if not on_meta(module, inputs):
        return module, inputs
    mode = WeightlessMode()
    made: dict[int, torch.Tensor] = {}  # so that tied weights stay tied

    def fake(tensor: Any) -> Any:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "meta":
            return tensor
        if id(tensor) not in made:
            with mode:
                empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_weight = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
        return made[id(tensor)]

    for child in module.modules() if isinstance(module, nn.Module) else ():
        for held in (child._parameters, child._buffers):
            held.update({name: fake(tensor) for name, tensor in held.items()})
    inputs = tree_map(fake, inputs)
    mode.keeps_real = True
    return module, inputs


def _tensors(module: Any, inputs: Any) -> list[torch.Tensor]:
    """Weights of a model, of which a function has none, and inputs."""
    weights = [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []
    return [*weights, *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))]


def mode_of(module: Any, inputs: Any) -> AbstractContextManager[Any]:
    """The fake mode that a model's weights or inputs belong to, to be entered around a trace; none if all is real."""
    for tensor in _tensors(module, inputs):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return nullcontext()
