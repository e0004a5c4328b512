"""`dkfuse.pack`: weights of linears that may read one input, side by side in memory.

    model.to_q.weight [N1, K]                       buffer [N1 + N2 + N3, K]
    model.to_k.weight [N2, K]          ->           the same parameters, each a view of its rows
    model.to_v.weight [N3, K]

Then one GEMM can read them all, which the pass makes of projections that read one input (`dkfuse.seams.projections`).
Which do is known from the traced graph only. Here every group of `nn.Linear` children of one module is packed that
have equal in_features, dtype, device and either all or none a bias, in the order of their registration: putting
weights side by side that are not read together changes nothing. Queries, keys and values that follow one another are
put in that order, so that the values of image and text are the same columns of their products and can be written into
one joint tensor (`dkfuse.seams.joint`), also where a model registers ``add_k_proj, add_v_proj, add_q_proj``.

What is kept: the Parameter objects, hence the state dict, optimizers, hooks, `requires_grad` and adapters around the
layers; values, and updates of them in place; saving and loading by torch, safetensors' `save_file` and diffusers
(safetensors' `save_model` refuses tensors that are parts of one storage: give it ``copy.deepcopy(model)``).
What makes parameters lie apart again: `to` another device or dtype, `copy.deepcopy`, ``load_state_dict(assign=True)``
and assignments to ``p.data``. Compiled code notices.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from . import compat
from .errors import DkfuseError
from .memory import ALIGNMENT, follows

ROLES = {"q": 0, "query": 0, "k": 1, "key": 1, "v": 2, "value": 2}  # words of names of projections


class PackError(DkfuseError):
    """A parameter cannot be moved in memory: no memory of its own, shared, quantized or sharded."""


@dataclass
class Packed:
    """What `pack` did. `bytes` are those of all packed parameters; `moved` of the groups were not packed before."""

    groups: int = 0
    linears: int = 0
    bytes: int = 0
    moved: int = 0

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.1f} MiB" if self.bytes < 2**30 else f"{self.bytes / 2**30:.2f} GiB"
        if not self.groups:
            return "no two linears of one module have the same in_features: nothing to pack"
        already = self.groups - self.moved
        before = f", {already} of the groups were packed before" if already else ""
        return f"{self.linears} linears packed in {self.groups} groups, {size}{before}"


@dataclass(frozen=True)
class _Group:
    """Linears of one module, by name; `parameters` are lists of what belongs side by side: weights, and biases."""

    names: list[str]
    linears: list[nn.Linear]

    def in_order(self) -> _Group:
        """Runs of queries, keys and values that are named alike in that order, all others as they are."""
        runs = itertools.groupby(zip(self.names, self.linears, strict=True), key=lambda pair: _role(pair[0])[0])
        pairs = [pair for _, run in runs for pair in sorted(run, key=lambda pair: _role(pair[0])[1])]
        return _Group([name for name, _ in pairs], [linear for _, linear in pairs])

    @property
    def parameters(self) -> list[list[tuple[str, nn.Parameter]]]:
        kinds = ["weight"] if self.linears[0].bias is None else ["weight", "bias"]
        return [[(f"{n}.{k}", getattr(m, k)) for n, m in zip(self.names, self.linears, strict=True)] for k in kinds]


def pack(model: nn.Module) -> Packed:
    """Put the weights of linears that may read one input side by side, in place; before compiling.

        dkfuse.pack(model)
        model = torch.compile(model, backend="dkfuse")

    Needs room for one group at a time, and no more memory after it than before. A second call does nothing. Rows and
    parts start at multiples of 16 bytes, else a group is left as it is.

    Raises PackError, before anything is moved, for parameters without memory (meta or fake), of several layers (tied)
    or inside a bigger buffer, quantized ones and other tensor subclasses, and models wrapped by FSDP.
    """
    groups = [group for group in _groups(model) if _aligned(group)]
    _check(model, groups)
    done = Packed()
    for group in groups:
        lists = [[p for _, p in parameters] for parameters in group.parameters]
        moved = [_move(parameters) for parameters in lists]
        done.groups += 1
        done.moved += any(moved)
        done.linears += len(group.linears)
        done.bytes += sum(p.nbytes for parameters in lists for p in parameters)
    return done


def _role(name: str) -> tuple[str, int]:
    """What is left of a name without the word that says q, k or v, and which of the three; for others it as it is."""
    words = re.split(r"[._]", name)
    roles = [word for word in words if word in ROLES]
    if len(roles) != 1:
        return name, 0
    return "_".join("" if word in ROLES else word for word in words), ROLES[roles[0]]


def _groups(model: nn.Module) -> Iterator[_Group]:
    claimed: set[int] = set()
    for path, parent in model.named_modules():
        if isinstance(parent, nn.Sequential):  # each reads what the one before it wrote
            continue
        found: dict[object, _Group] = {}
        for name, child in parent.named_children():
            linear = getattr(child, "base_layer", child)  # an adapter around it, as peft's
            if not isinstance(linear, nn.Linear) or id(linear) in claimed or linear is parent:
                continue
            weight, bias = linear._parameters.get("weight"), linear._parameters.get("bias")
            if weight is None or weight.dim() != 2 or (bias is None) != (linear.bias is None):
                continue  # parametrized: the weight is computed
            name = f"{path}.{name}" if path else name
            key = (weight.shape[1], weight.dtype, weight.device, bias is None, bias is not None and bias.dtype)
            group = found.setdefault(key, _Group([], []))
            group.names.append(f"{name}.base_layer" if linear is not child else name)
            group.linears.append(linear)
        for group in found.values():
            if len(group.linears) > 1:
                claimed.update(map(id, group.linears))
                yield group.in_order()


def _aligned(group: _Group) -> bool:
    return all(p.nbytes % ALIGNMENT == 0 and p.dtype.is_floating_point for ps in group.parameters for _, p in ps)


def _check(model: nn.Module, groups: list[_Group]) -> None:
    """Raise PackError for the first parameter that cannot be moved."""
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise PackError(f"{name or 'the model'} is sharded by FSDP, which owns its memory: pack it before wrapping")
    owners: dict[int, list[str]] = {}  # names by storage, every name of a tied parameter
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if compat.has_memory(parameter):
            owners.setdefault(parameter.untyped_storage()._cdata, []).append(name)
    for group in groups:
        for parameters in group.parameters:
            own = {name for name, _ in parameters}
            for name, parameter in parameters:
                if (problem := _problem(parameter)) is not None:
                    raise PackError(f"{name} {problem}")
                others = [o for o in owners[parameter.untyped_storage()._cdata] if o not in own]
                if others or sum(p is parameter for _, p in parameters) > 1:
                    with_whom = others[0] if others else "another layer of its module"
                    raise PackError(f"{name} shares its memory with {with_whom}: untie them before packing")


def _problem(parameter: nn.Parameter) -> str | None:
    if parameter.device.type == "meta" or compat.is_fake(parameter):
        return "has no memory (a meta or fake tensor): load the weights before packing"
    if compat.is_sharded(parameter):
        return "is a DTensor, spread over devices: pack the model before it is sharded"
    if not compat.has_memory(parameter):
        kind = type(parameter.data if type(parameter) is nn.Parameter else parameter).__name__
        return f"is a {kind}, whose memory is laid out by its class: pack the model before it is quantized"
    return None


@torch.no_grad()
def _move(parameters: list[nn.Parameter]) -> bool:
    """Give `parameters` one storage, one after the other; False where they lie so already."""
    if all(follows(a, b) for a, b in itertools.pairwise(parameters)):
        return False
    first = parameters[0]
    buffer = torch.empty(
        (sum(p.shape[0] for p in parameters), *first.shape[1:]), dtype=first.dtype, device=first.device
    )
    start = 0
    for parameter in parameters:
        part = buffer[start : start + parameter.shape[0]]
        part.copy_(parameter)
        parameter.data = part
        start += parameter.shape[0]
    return True


__all__ = ["PackError", "Packed", "pack"]
