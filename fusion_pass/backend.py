"""The backend of ``torch.compile(model, backend="dkfuse")``.

Dynamo's graph goes to Inductor with dkfuse's pass in the hook where the graph is functional ATen; tracing, code
generation, CUDA graphs, autotuning and caching stay Inductor's. A graph that dkfuse cannot help is compiled by Inductor
alone and recorded with the reason.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dkfuse import patterns
from dkfuse.kernels import disk_cache, failures, registry
from dkfuse.kernels.failures import Failure
from dkfuse.kernels.provider_ops import define_all
from dkfuse.kernels.providers import PROVIDERS
from dkfuse.kernels.support import OPERANDS

from . import compat, compat_direct, compat_triton, epsilons, fuse, memory, seams
from .choosing import building, watch
from .choosing.choose import check_installed, resolve_target
from .errors import PassedThroughWarning
from .reporting.recording import publish, withdraw
from .reporting.report import Graph
from .reporting.store import Record, graph_key
from .rewriting import direct_calls
from .rewriting.drift import keep_roundings
from .seams import before, early, late
from .settings import Settings
from .versions import check_torch

log = logging.getLogger("dkfuse")
HOOK = "post_grad_custom_pre_pass"


def dkfuse(gm: fx.GraphModule, example_inputs: Any, *, mode: str | None = None, options: dict | None = None) -> Any:
    """Compile `gm` for `example_inputs`; what torch.compile calls with ``backend="dkfuse"``.

    mode: one of Inductor's modes. options: Inductor's options and dkfuse's own (prefix ``dkfuse.``, see
    `dkfuse.settings`), and ``mode`` too, since torch.compile takes `mode` or `options` but not both.
    Raises SettingsError for an unknown option and UnsupportedTorchError on torch < 2.11.
    """
    check_torch(torch.__version__)
    settings, mode, own = Settings.parse(mode, options)
    _check(settings)
    check_installed(settings)
    define_all()
    disk_cache.use(settings.cache_dir)
    _set_log_level(settings)
    inductor_options = {**compat.mode_options(mode), **own}
    if settings.disable:
        return _plain(gm, example_inputs, inductor_options, settings, "disabled by dkfuse.disable or DKFUSE_DISABLE")
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs):
        note = "training: inputs require grad, and the fused ops have no backward (use torch.no_grad())"
        warnings.warn(f"dkfuse: a graph is left to Inductor unchanged: {note}", PassedThroughWarning, stacklevel=2)
        return _plain(gm, example_inputs, inductor_options, settings, note)
    epsilons.make_constants(gm)
    if settings.remainder == "eager":
        return _eager(gm, example_inputs, settings)
    before.start_if_new(settings)
    return _compile(gm, example_inputs, _Way(inductor_options, settings))


def _check(settings: Settings) -> None:
    registry.implementations()
    settings.check_names((*patterns.NAMES, *seams.NAMES), PROVIDERS, OPERANDS)


@dataclass(frozen=True)
class _Way:
    """How a graph is compiled.

    packed: weights that lie side by side may be read as one. refused: kernels that failed when they were launched.
    """

    options: dict[str, Any]
    settings: Settings
    packed: bool = True
    refused: frozenset[tuple[str, str]] = frozenset()  # provider, op


class _Context:
    """One compilation: the graphs that the pass saw, the inputs that it may read as one, and the error it died of."""

    def __init__(self, settings: Settings, inputs: memory.Inputs | None):
        self.settings, self.inputs = settings, inputs
        self.graphs: list[Graph] = []
        self.once: str | None = None
        self.error: Exception | None = None

    def run(self, graph: fx.Graph) -> None:
        try:
            if self.inputs is not None:
                self.inputs.annotate(graph)
            self.graphs.append(fuse.run(graph, self.settings))
            keep_roundings(graph)
            self.once = self.once or watch.unrepeatable(graph)
            compat_direct.begin(direct_calls.OPS)
        except Exception as error:
            self.error = error
            raise


def _compile(gm: fx.GraphModule, inputs: Any, way: _Way) -> Any:
    options, settings = way.options, way.settings
    known = memory.Inputs.of(gm, inputs) if way.packed else None
    runs = known.runs() if known is not None else []
    context = _Context(settings, known)
    record = Record(graph_key(gm, inputs, settings, (runs, compat.modes(options))), settings.cache_dir)
    if record.stored is None:
        early.start(gm, settings)
    users = options.get(HOOK, compat.inductor_config(HOOK))
    users = [p for p in (users if isinstance(users, (list, tuple)) else [users]) if p is not None]

    def passes(graph: fx.Graph) -> None:
        for user_pass in users:
            user_pass(graph)
        context.run(graph)

    identities = [record.uuid, *map(compat.pass_uuid, users)]
    uuid = None if None in identities else "/".join(map(str, identities))
    try:
        with building.collected() as launched, late.deferred() as attempts:
            compiled = compat.inductor(
                gm, inputs, {**compat_triton.launch_options(), **options, HOOK: compat.graph_pass(passes, uuid)}
            )
    except Exception as failure:
        if os.environ.get("DKFUSE_DEBUG") == "1" or (context.error is None and not launched):
            raise
        if context.error is None:
            return _without(building.blamed(failure, launched), gm, inputs, way)
        error = context.error
        log.warning("dkfuse: internal error, the graph is left to Inductor: %s: %s", type(error).__name__, error)
        note = f"internal error: {type(error).__name__}: {error} (DKFUSE_DEBUG=1 raises it)"
        return _plain(gm, inputs, options, settings, note)
    if late.failed(attempts):
        record.forget()
        return _compile(gm, inputs, way)
    if context.graphs:
        record.save(context.graphs, context.once)
    graphs = context.graphs or [_from_cache(g) for g in record.stored or ()]
    publish(graphs, _target(settings, inputs), settings)
    if launched or any(graph.from_cache for graph in graphs):

        def recover(error: Exception) -> Callable | None:
            if os.environ.get("DKFUSE_DEBUG") == "1":
                return None
            failed = building.refused(error, launched)
            if launched and not failed:
                return None
            record.forget()
            withdraw(graphs)
            return _relaunched(failed, gm, way)

        compiled = watch.watched(compiled, recover, record.once)
    if known is None:
        return compiled
    # what a cached graph reads as one is not known, but it is among the runs
    again = _anew(gm, lambda g, i: _compile(g, i, replace(way, packed=False)))
    return memory.guarded(compiled, known, known.taken if context.graphs else runs, again)


def _anew(gm: fx.GraphModule, backend: Callable) -> Callable:
    """A function that gives `gm` to torch.compile once more: for weights that do not lie where they lay."""

    def make() -> Callable:
        gm.recompile()  # Dynamo runs the forward that it gave to its backend without looking, in eager mode
        return torch.compile(gm, backend=backend)

    return make


def _relaunched(failed: list[Failure], gm: fx.GraphModule, way: _Way) -> Callable:
    """`gm`, compiled when it is called, without the kernels that failed in its first call, and not as a CUDA graph.

    Of a graph from the cache they are not known: it is compiled anew, and its first call will name them. torch's pool
    of CUDA graphs keeps the half-finished warm-up of the call that failed and refuses the next graph.
    """
    failures.warn(failed, building.INSTEAD)
    way = replace(way, options={**way.options, "triton.cudagraphs": False})
    keys = {(failure.provider, failure.op) for failure in failed}
    if keys & way.refused:  # of symbolic sizes, which are other symbols in every trace
        again = f"{failed[0].message}; so did it after another compilation"
        return _anew(gm, lambda g, i: _plain(g, i, way.options, way.settings, again))()
    return _anew(gm, lambda g, i: _compile(g, i, replace(way, refused=way.refused | keys)))()


def _without(failed: list[Failure], gm: fx.GraphModule, inputs: Any, way: _Way) -> Any:
    """Compile again without the kernels that may be why it failed; where it fails all the same they are not."""
    try:
        compiled = _compile(gm, inputs, way)
    except Exception:
        failures.forget(failed)
        raise
    failures.warn(failed, building.INSTEAD)
    return compiled


def _from_cache(graph: Graph) -> Graph:
    graph.from_cache = True
    return graph


def _plain(gm: fx.GraphModule, inputs: Any, options: dict[str, Any], settings: Settings, note: str) -> Any:
    log.info("dkfuse: graph passed through: %s", note)
    nodes = len(gm.graph.nodes)
    publish([Graph(index=0, nodes=nodes, seconds=0.0, note=note)], _target(settings, inputs), settings)
    return compat.plain_inductor(gm, inputs, options)


def _eager(gm: fx.GraphModule, inputs: Any, settings: Settings, packed: bool = True) -> Any:
    """Fused ops where rules found sites, ATen in eager mode for the rest."""
    known = memory.Inputs.of(gm, inputs) if packed else None

    def inner(graph_module: fx.GraphModule, _: Any) -> Callable:
        if known is not None:
            known.annotate(graph_module.graph)
        record = fuse.run(graph_module.graph, settings, lowered=False)
        graph_module.recompile()
        publish([record], _target(settings, inputs), settings)
        return graph_module.forward

    compiled = compat.lower_with(gm, inputs, inner, {})
    if known is None:
        return compiled
    again = _anew(gm, lambda g, i: _eager(g, i, settings, packed=False))
    return memory.guarded(compiled, known, known.taken, again)


def planning_backend(settings: Settings) -> Callable:
    """A backend that plans and records, and runs every graph in eager mode unchanged."""
    _check(settings)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        known = memory.Inputs.of(gm, inputs)

        def inner(graph_module: fx.GraphModule, _: Any) -> Callable:
            known.annotate(graph_module.graph)
            publish([fuse.decided(graph_module.graph, settings).record], _target(settings, inputs), settings)
            return graph_module.forward

        return compat.lower_with(gm, inputs, inner, {})

    return backend


def _target(settings: Settings, inputs: Any) -> str:
    devices = [t.device for t in inputs if isinstance(t, torch.Tensor)]
    device = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
    return resolve_target(settings.target, device)


def _set_log_level(settings: Settings) -> None:
    if settings.log is not None:
        log.setLevel(settings.log.upper())
        if not log.hasHandlers():  # the root's would print each line once more
            log.addHandler(logging.StreamHandler())


# torch.compile(backend="dkfuse") imports this module, and Dynamo traces for seconds before it calls the backend
before.start_by_environment()

__all__ = ["dkfuse", "planning_backend"]
