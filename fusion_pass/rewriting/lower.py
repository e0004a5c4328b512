"""From ops to what runs them.

`triton`: the kernel-wrapper node that Inductor launches, caches and exports like its own kernels (an opaque op costs
tens of us of Python a call). `native`: the op's definition as ATen nodes, which Inductor compiles like any others, and
so is every op on a device that its provider does not run on. Others: an op of their own (`opaque`).
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import fx

from .. import compat, compat_triton
from ..choosing import tuning
from . import joins
from .calls import bound_arguments, op_name, replace_results, result_names
from .groups import grouped, in_place
from .inline import inline
from .opaque import is_opaque, lower_opaque
from .parts import close_gaps
from .replace import copy_origin, fake_arguments
from .strides import RESHAPES
from .symbols import arguments as with_symbols

aten = torch.ops.aten

WHOLE_VIEWS = {
    *RESHAPES, aten.permute.default, aten.transpose.int, aten.t.default, aten.unsqueeze.default, aten.alias.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip


def lower(graph: fx.Graph, calls: list[fx.Node]) -> None:
    """Turn each op call into its implementation, by the device that it is on."""
    if not calls:
        return
    close_gaps(graph, [c for c in calls if is_opaque(c) or _by_triton(c)])
    calls = lower_opaque(graph, calls)
    order = {node: i for i, node in enumerate(graph.nodes)}
    calls = sorted(calls, key=lambda call: order[call])  # parts of a joint tensor are written in graph order
    kernels = [c for c in calls if _by_triton(c)]
    parts = joins.find(graph, kernels)
    groups = {group[-1]: group for group in grouped(graph, [c for c in kernels if op_name(c) == "norm_rope"])}
    together = {call for group in groups.values() for call in group}
    for call in calls:
        if call in groups:
            lower_group(graph, groups[call], parts)
        elif call in together:
            continue
        elif call in kernels:
            lower_to_triton(graph, call, parts)
        else:
            inline(graph, call)
    compat.stable_topological_sort(graph)
    graph.eliminate_dead_code()
    graph.lint()


def _by_triton(call: fx.Node) -> bool:
    return call.meta["dkfuse_kernel"] == "triton" and _device(call).type != "cpu"


def _device(call: fx.Node) -> torch.device:
    return call.args[0].meta["val"].device  # type: ignore[union-attr]


def lower_to_triton(graph: fx.Graph, call: fx.Node, parts: dict[tuple[fx.Node, str], joins.Part]) -> None:
    """The op as a Triton kernel node: outputs allocated, then written by one launch."""
    from dkfuse.kernels.launch import candidates, plan

    nodes = bound_arguments(call)
    fakes = {k: v.meta["val"] if isinstance(v, fx.Node) else v for k, v in nodes.items()}
    names = result_names(call)
    values = call.meta["val"] if len(names) > 1 else (call.meta["val"],)
    outputs = {n: v for n, v in zip(names, values, strict=True) if n in _used_outputs(call, names)}
    places = {n: parts[call, n] for n in outputs if (call, n) in parts}
    written = {**outputs, **{n: p.value for n, p in places.items()}}
    offsets = {n: p.offset for n, p in places.items()}
    memory = {n: places[n].join.cat.meta["val"] if n in places else v for n, v in outputs.items()}

    def planned(config: Any) -> Any:
        sms = _sm_count(fakes["x"].device)
        return plan(op_name(call), fakes, written, sm_count=sms, offsets=offsets, config=config)

    best = tuning.tuned(planned, lambda: candidates(op_name(call), fakes, written), {**fakes, **memory})
    launch = best.launch
    _note([call], best)
    inputs = {k: v for k, v in nodes.items() if isinstance(v, fx.Node)}
    with graph.inserting_before(call):
        buffers = {n: _buffer(graph, v, places.get(n), list(inputs.values())) for n, v in outputs.items()}
        items = _launch(graph, launch, inputs, buffers, call)
    for name, place in places.items():
        _advance(place.join, items[name])
    replace_results(graph, call, names, items)


def lower_group(graph: fx.Graph, calls: list[fx.Node], parts: dict[tuple[fx.Node, str], joins.Part]) -> None:
    """Several norm_rope calls as one launch; parts of one joint tensor are written through one pointer."""
    from dkfuse.kernels.rope_launch import Call, candidates, plan_group

    inputs: dict[str, fx.Node] = {}
    planned, alias, owners = [], {}, {}
    joint: dict[int, str] = {}
    for i, call in enumerate(calls):
        nodes = bound_arguments(call)
        for name, node in nodes.items():
            if isinstance(node, fx.Node):
                label = next((known for known, other in inputs.items() if other is node), None)
                if label is not None:
                    alias[f"{i}.{name}"] = label
                else:
                    inputs[f"{i}.{name}"] = node
        fakes = {k: v.meta["val"] if isinstance(v, fx.Node) else v for k, v in nodes.items()}
        place = parts.get((call, "out"))
        if place is None and in_place(call):
            planned.append(Call(fakes, nodes["x"].meta["val"]))
            alias[f"{i}.out"] = f"{i}.x"
            continue
        if place is None:
            planned.append(Call(fakes, call.meta["val"]))
            owners[f"{i}.out"] = call.meta["val"]
            continue
        planned.append(Call(fakes, place.value, place.offset))
        first = joint.setdefault(id(place.join), f"{i}.out")
        if first != f"{i}.out":
            alias[f"{i}.out"] = first
        owners.setdefault(first, call.meta["val"])
    places = {label: parts.get((calls[int(label.split(".")[0])], "out")) for label in owners}
    memory = {n: p.join.cat.meta["val"] if (p := places[n]) is not None else v for n, v in owners.items()}
    best = tuning.tuned(
        lambda config: plan_group(planned, alias=alias, config=config),
        lambda: candidates(planned),
        {**{label: node.meta["val"] for label, node in inputs.items()}, **memory},
    )
    launch = best.launch
    _note(calls, best)
    with graph.inserting_before(calls[-1]):
        tensors = list(inputs.values())
        buffers = {label: _buffer(graph, value, places[label], tensors) for label, value in owners.items()}
        buffers.update((label, inputs[label]) for label in alias.values() if label.endswith(".x"))
        items = _launch(graph, launch, inputs, buffers, calls[-1])
    for i, call in enumerate(calls):
        result = items[alias.get(f"{i}.out", f"{i}.out")]
        if (place := parts.get((call, "out"))) is not None:
            _advance(place.join, result)
        call.replace_all_uses_with(result)
        graph.erase_node(call)


def _note(calls: list[fx.Node], best: tuning.Tuned) -> None:
    """Tell the sites that the calls are of how they are launched."""
    for call in calls:
        if (site := call.meta.get("dkfuse_site")) is not None:
            site.launched.append(best)


def _launch(
    graph: fx.Graph, launch: Any, inputs: dict[str, fx.Node], buffers: dict[str, fx.Node], origin: fx.Node
) -> dict[str, fx.Node]:
    """The kernel node of `launch`, whose tensors are named as in `inputs` and `buffers`; the results by those names."""
    tensors = list(inputs.values())
    scalars = {k: v for k, v in launch.scalars.items() if isinstance(v, torch.SymInt)}
    constants = {**launch.constants, **{k: v for k, v in launch.scalars.items() if k not in scalars}}
    written = [p for p, n in launch.tensors.items() if n in buffers]
    kernel_idx, constants_idx = compat_triton.register_triton_kernel(
        _configured(launch.kernel, launch.num_warps, launch.num_stages), constants, written
    )
    pointers = {p: buffers.get(n) or memory_of(inputs[n]) for p, n in launch.tensors.items()}
    kwargs = {
        "kernel_idx": kernel_idx,
        "constant_args_idx": constants_idx,
        "grid": [with_symbols(graph, tuple(launch.grid), tensors)],
        "tma_descriptor_metadata": {},
        "kwargs": {**pointers, **{k: with_symbols(graph, v, tensors) for k, v in scalars.items()}},
        "tensors_to_clone": written,
    }
    node = graph.call_function(compat_triton.triton_call_target(), (), kwargs)
    parameter = {n: p for p, n in launch.tensors.items()}
    node.meta["val"] = {parameter[n]: _like(b.meta["val"]) for n, b in buffers.items()}
    node.meta["eager_input_vals"] = fake_arguments(node)
    copy_origin(origin, node)
    items = {}
    for name in buffers:
        items[name] = graph.call_function(operator.getitem, (node, parameter[name]))
        items[name].meta["val"] = node.meta["val"][parameter[name]]
    return items


def memory_of(node: fx.Node) -> fx.Node:
    """What `node` is another view of, all of it: a kernel takes an address, and Inductor makes a tensor for a view.

    Such a tensor costs 1 us of CPU at each call. Views of a part stay, as a kernel must not make torch write the whole.
    """
    while node.target in WHOLE_VIEWS and isinstance(node.args[0], fx.Node):
        base, value = node.args[0].meta.get("val"), node.meta["val"]
        if not isinstance(base, torch.Tensor) or not _is_view_of(value, base, node.target in RESHAPES):
            break
        node = node.args[0]
    return node


def _is_view_of(value: torch.Tensor, base: torch.Tensor, reshaped: bool) -> bool:
    """Whether a reshape copies nothing; symbolic sizes, which must not be guarded on, count as if it did."""
    if not all(isinstance(size, int) for size in (*base.shape, *base.stride(), *value.shape, *value.stride())):
        return False
    if not reshaped:
        return True
    try:
        return base.view(value.shape).stride() == value.stride()
    except (RuntimeError, ValueError):  # fake tensors raise the latter
        return False


def _buffer(graph: fx.Graph, value: torch.Tensor, place: joins.Part | None, tensors: list[fx.Node]) -> fx.Node:
    """Where a result is written: memory of its own, or the joint tensor as the kernels before left it."""
    if place is None:
        return _allocate(graph, value, tensors)
    join = place.join
    if join.buffer is None:
        join.buffer = _allocate(graph, join.cat.meta["val"], tensors)
    return join.buffer


def _advance(join: joins.Join, written: fx.Node) -> None:
    """`written` is the joint tensor with one more part; with the last one it takes the cat's place."""
    join.buffer, join.missing = written, join.missing - 1
    if not join.missing:
        join.cat.replace_all_uses_with(written)


def _used_outputs(call: fx.Node, names: list[str]) -> set[str]:
    if len(names) == 1:
        return set(names)
    return {names[user.args[1]] for user in call.users} | {"out"}  # type: ignore[index]


def _allocate(graph: fx.Graph, value: torch.Tensor, tensors: list[fx.Node]) -> fx.Node:
    size, stride = list(value.shape), list(value.stride())
    node = graph.call_function(
        aten.empty_strided.default,
        (with_symbols(graph, size, tensors), with_symbols(graph, stride, tensors)),
        {"dtype": value.dtype, "device": value.device},
    )
    node.meta["val"] = _like(value)
    return node


def _like(value: torch.Tensor) -> torch.Tensor:
    """A fake tensor of its own: torch clones a buffer before a kernel writes to it if others seem to share storage."""
    return value.new_empty_strided(value.shape, value.stride())


@functools.cache
def _configured(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """`kernel` with its launch configuration, in the form that Inductor reads it from."""
    import triton

    config = triton.Config({}, num_warps=num_warps, num_stages=num_stages)
    return triton.autotune(configs=[config], key=[])(kernel)


@functools.cache
def _sm_count(device: torch.device) -> int:
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132
