"""Which implementation runs an op: the target, the providers at hand, and their own word on what they take.

    triton    one Triton kernel, launched by Inductor as one of its own; targets sm80 and newer, ROCm, XPU
    native    the op's definition, inlined as ATen: what Inductor makes of fp32 arithmetic with one rounding;
              where Triton is not offered, elsewhere by request (``dkfuse.kernels=native``)
    others    see `dkfuse.kernels.providers`; called through an op of their own

Without a request the order is: what was measured to be faster than Triton at this size (`dkfuse.kernels.crossovers`),
the fastest first, then Triton. `current` is the device the site is on. Another target may be named to plan for a GPU on
a machine without one: kernels are then chosen, and real runs still use what runs here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dkfuse.kernels import crossovers, failures, providers, registry
from dkfuse.kernels.registry import Implementation

from ..errors import SettingsError
from ..matching.operands import fake
from ..matching.rules import Code, OpCall, Reject, Stage
from ..reporting.report import Reason
from ..settings import Settings

GPUS = ("cuda", "rocm", "xpu")
Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """The provider that takes a call, and why those before it, and those not measured, were passed over."""

    provider: str
    passed_over: tuple[Reason, ...] = ()


def resolve_target(target: str, device: torch.device) -> str:
    """`target`, or for ``current`` that of the device: cpu, sm90, rocm, xpu, ... (meta counts as cpu)."""
    if target != "current":
        return target
    if device.type != "cuda":
        return "cpu" if device.type == "meta" else device.type
    if torch.version.hip is not None:
        return "rocm"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def arguments_of(call: OpCall) -> dict[str, Any]:
    """All arguments of an op call: fake tensors and values."""
    return {
        **failures.defaults(call.op),
        **{n: fake(call.view, t) for n, t in call.operands.items()},
        **call.attributes,
    }


def choose(calls: Sequence[OpCall], settings: Settings) -> Choice:
    """The provider that takes all `calls`, of one op; Reject with the first provider's reason when none does."""
    device = calls[0].device
    target = resolve_target(settings.target, device)
    planned = settings.target != "current" and device.type not in GPUS
    return decide(calls[0].op, [arguments_of(c) for c in calls], target, settings.providers(calls[0].op), planned)


def decide(
    op: str, calls: Sequence[Arguments], target: str, asked: Sequence[str] | None, planned: bool = False
) -> Choice:
    """`choose` for arguments. asked: providers by name, best first; planned: for a machine that is not this one."""
    losers: list[Reason] = []
    for name in asked if asked is not None else automatic(op, calls, target):
        reason = refusal(name, op, calls, target, asked is not None, planned)
        if reason is None:
            return Choice(name, (*losers, *_unmeasured(op, calls, target, asked, planned, {r.rule for r in losers})))
        losers.append(reason)
    first = next((r for r in losers if r.code != Code.NOT_INSTALLED.value), losers[0] if losers else None)
    if first is None:
        raise Reject(Code.NO_KERNEL, f"no kernel for target {target}", Stage.KERNEL)
    raise Reject(first.code, first.message, Stage.KERNEL)


def automatic(op: str, calls: Sequence[Arguments], target: str) -> list[str]:
    """The providers that are tried without being asked for, best first."""
    measured = {name: crossovers.ratio(name, op, target, calls) for name in providers.BUILT_IN}
    faster = {name: ratio for name, ratio in measured.items() if ratio is not None and ratio >= crossovers.MARGIN}
    order = [name for name in sorted(faster, key=lambda name: -faster[name]) if name not in ("triton", "native")]
    if target.startswith("sm") or target in GPUS:
        triton = registry.find("triton", op)
        return [*order, "triton"] if triton is not None and triton.serves(target) else order
    return [*order, "native"]


def refusal(
    name: str, op: str, calls: Sequence[Arguments], target: str, by_name: bool = True, planned: bool = False
) -> Reason | None:
    """Why `name` cannot run all `calls` on `target`; None when it can. `rule` of the reason is the provider."""
    provider, implementation = providers.PROVIDERS[name], registry.find(name, op)
    if implementation is None:
        return _reason(name, Code.NO_KERNEL, f"{name} has no kernel for {op}")
    if not implementation.serves(target):
        return _reason(name, Code.NO_KERNEL, f"{name} does not run on target {target}")
    if not (planned and (by_name or provider.bundled)) and (missing := provider.problem()) is not None:
        return _reason(name, missing.code, missing.message)
    for arguments in calls:
        if (failed := failures.known(name, op, arguments)) is not None:
            return _reason(name, Code.KERNEL_FAILED, failed.message)
        if (broken := _problem(implementation, arguments)) is not None:
            return _reason(name, broken[0], broken[1])
    return None


def _unmeasured(
    op: str,
    calls: Sequence[Arguments],
    target: str,
    asked: Sequence[str] | None,
    planned: bool,
    known: set[str | None],
) -> list[Reason]:
    """Why the providers that were not asked for and not tried would not have been better."""
    if asked is not None or not target.startswith("sm"):
        return []
    reasons = []
    for implementation in registry.of(op):
        name = implementation.provider
        if name in known or name in ("triton", "native") or name not in providers.BUILT_IN:
            continue
        reason = refusal(name, op, calls, target, False, planned)
        if reason is None:
            ratio = crossovers.ratio(name, op, target, calls)
            text = "not measured at this size" if ratio is None else f"{ratio:.2f} of Triton's speed at this size"
            reason = _reason(name, Code.NOT_FASTER, f"{name}: {text}; dkfuse.kernels={name} uses it all the same")
        reasons.append(reason)
    return reasons


def _reason(name: str, code: Code | str, message: str) -> Reason:
    return Reason(Stage.KERNEL.value, str(getattr(code, "value", code)), message, name)


_problems: dict[tuple[Any, ...], tuple[str, str] | None] = {}


def _problem(implementation: Implementation, arguments: Arguments) -> tuple[str, str] | None:
    """The first constraint that a call breaks. Blocks of one model ask the same again and again."""
    tensors = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    static = all(isinstance(n, int) for t in tensors for n in (*t.shape, *t.stride(), t.storage_offset()))
    key = (implementation, *failures.signature(implementation.op, arguments)) if static else ()
    key += tuple(t.storage_offset() for t in tensors) if static else ()
    if static and key in _problems:
        return _problems[key]
    reason = implementation.problem(arguments)
    found = None if reason is None else (reason.code, reason.message)
    if static:
        _problems[key] = found
    return found


def check_installed(settings: Settings) -> None:
    """Raise SettingsError, with the pip command, for a provider that was asked for and cannot be used here."""
    for name in settings.provider_names():
        if not providers.PROVIDERS[name].bundled and (reason := providers.PROVIDERS[name].problem()) is not None:
            raise SettingsError(f"dkfuse.kernels asks for {name!r}: {reason.message}")
