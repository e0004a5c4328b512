"""Kernels that are built while a program is compiled, and what is done when one cannot be.

A provider that compiles by itself is asked to before its op enters the graph, and what Inductor compiles may fail
there, or when it is launched for the first time (`watch`). Each time the failure is remembered
(`dkfuse.kernels.failures`), the graph is planned again without that kernel, and one warning names the site, the
provider and the cause. An error that comes back without any kernel of dkfuse's is not ours and is raised.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from dkfuse.kernels import failures, registry
from dkfuse.kernels.failures import Failure

from .. import compat
from ..matching.head_site import HeadSite
from ..matching.rules import Candidate, OpCall
from ..rewriting import origin
from ..rewriting.opaque import INSIDE
from . import choose, watch

INSTEAD = "the next provider that takes the site, or the code that it stands for, runs"


@dataclass(frozen=True)
class Launched:
    """A kernel call that a program was compiled with."""

    provider: str
    op: str
    arguments: dict[str, Any]
    where: str


_launched: ContextVar[list[Launched] | None] = ContextVar("dkfuse_launched", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[Launched]]:
    """The kernel calls of the graphs that are fused inside the block."""
    found: list[Launched] = []
    token = _launched.set(found)
    try:
        yield found
    finally:
        _launched.reset(token)


def failed(sites: Sequence[Candidate | HeadSite]) -> bool:
    """Build the kernels of `sites`, as far as their providers build them themselves; True where one failed."""
    found: list[Failure] = []
    launched: list[Launched] = []
    seen: set[failures.Key] = set()
    for site in sites:
        for call in _calls(site):
            used = Launched(site.kernel, call.op, choose.arguments_of(call), _where(site))
            key = (used.provider, used.op, failures.signature(used.op, used.arguments))
            implementation = registry.find(used.provider, used.op)
            if used.provider == "native" or implementation is None or not implementation.runs_on(call.device.type):
                continue
            launched.append(used)
            if used.provider in INSIDE or key in seen:
                continue
            seen.add(key)
            try:
                _build(implementation, used.arguments, site)
            except Exception as error:
                found.append(failures.note(used.provider, used.op, used.arguments, error, "build", used.where))
    failures.warn(found, INSTEAD)
    collector = _launched.get()
    if collector is not None and not found:
        collector.extend(launched)
    return bool(found)


def _build(implementation: registry.Implementation, arguments: dict[str, Any], site: Candidate | HeadSite) -> None:
    """Import the implementation and let it build its kernel for a call. Raises what the provider raises."""
    from dkfuse.kernels import ops
    from dkfuse.kernels.failures import defaults

    implementation.load()
    if (prepare := implementation.builder()) is None:
        return
    full = {**defaults(implementation.op), **arguments}
    if isinstance(site, HeadSite):
        from ..rewriting.replace_heads import result_order

        full["order"] = result_order(site)[1]
    with arguments["x"].fake_mode:
        outputs = ops._empty_outputs(implementation.op, full)
    with compat.real_tensors():
        prepare(full, {k: t for k, t in outputs.items() if k != "sum" or full["sum_dtype"] is not None})


def _calls(site: Candidate | HeadSite) -> Sequence[OpCall]:
    return site.calls if isinstance(site, HeadSite) else [site]


def _where(site: Candidate | HeadSite) -> str:
    """Where the site stands in the model."""
    node = site.output_nodes("out")[0]
    places = origin.source(node), origin.module(node)
    return " ".join(part for part in (places[0], f"({places[1]})" if places[1] else "") if part) or node.name


def blamed(error: BaseException, launched: Sequence[Launched]) -> list[Failure]:
    """Remember the kernels that may be why a program with `launched` did not compile: those named, else all."""
    return _noted(error, _named("\n".join(_chain(error)), launched) or launched, "build")


def refused(error: BaseException, launched: Sequence[Launched]) -> list[Failure]:
    """Remember the kernels that an exception of a program's first call names in the code that it went through."""
    return _noted(error, _named(watch.launch_lines(error), launched), "launch")


def _named(text: str, launched: Sequence[Launched]) -> list[Launched]:
    """Triton's kernels are called after their op, ``dkfuse_norm_modulate_0``; others are ``dkfuse_cute::...``."""

    def names(used: Launched) -> bool:
        prefix = r"(triton\W+)?" if used.provider == "triton" else rf"{used.provider}\W+"
        return re.search(rf"dkfuse_{prefix}{used.op}(?!_dual|[a-z])", text) is not None

    return [used for used in launched if names(used)]


def _noted(error: BaseException, used: Iterable[Launched], stage: str) -> list[Failure]:
    return [failures.note(u.provider, u.op, u.arguments, error, stage, u.where) for u in used]


def _chain(error: BaseException | None) -> Iterator[str]:
    while error is not None:
        yield str(error)
        error = error.__cause__ or error.__context__


__all__ = ["INSTEAD", "Launched", "blamed", "collected", "failed", "refused"]
