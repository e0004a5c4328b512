"""Which implementation runs an op: the target, the providers at hand, and their own word on what they take.

    triton    one Triton kernel, launched by Inductor as one of its own; targets sm80 and newer
    native    the op's definition, inlined as ATen: what Inductor makes of fp32 arithmetic with one rounding;
              target cpu, elsewhere by request (``dkfuse.kernels=native``)

`current` is the device the site is on. Another target may be named to plan for a GPU on a machine without one: kernels
are then chosen, and real runs still use what runs here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .checks import fake
from .rules import Code, OpCall, Reject, Stage
from .settings import Settings

GPU_TARGETS = ("sm80", "sm89", "sm90", "sm100")


@dataclass(frozen=True)
class Provider:
    """An implementation of every op. `supports` returns None, or (code, message) why it cannot take a call."""

    name: str
    targets: tuple[str, ...]
    supports: Callable[[str, dict[str, Any]], tuple[str, str] | None]


def _triton(op: str, arguments: dict[str, Any]) -> tuple[str, str] | None:
    from dkfuse.kernels.support import supports

    reason = supports(op, arguments)
    return None if reason is None else (reason.code, reason.message)


PROVIDERS = {
    "triton": Provider("triton", GPU_TARGETS, _triton),
    "native": Provider("native", ("cpu",), lambda op, arguments: None),
}


def resolve_target(target: str, device: torch.device) -> str:
    """`target`, or for ``current`` that of the device: cpu, sm90, ... (other devices count as cpu)."""
    if target != "current":
        return target
    if device.type != "cuda" or torch.version.hip is not None:
        return "cpu" if device.type != "cuda" else "rocm"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def _serves(provider: Provider, target: str) -> bool:
    if target in provider.targets:
        return True
    # any NVIDIA architecture from Ampere on, and ROCm, compile Triton
    return provider.name == "triton" and (target == "rocm" or (target.startswith("sm") and int(target[2:]) >= 80))


def choose(site: OpCall, settings: Settings) -> str:
    """The name of the provider that takes `site`; Reject with the first provider's reason when none does."""
    target = resolve_target(settings.target, site.device)
    arguments = {**{n: fake(site.view, t) for n, t in site.operands.items()}, **site.attributes}
    first: tuple[str, str] | None = None
    for name in settings.kernels or tuple(PROVIDERS):
        provider = PROVIDERS[name]
        asked = settings.kernels is not None
        if not _serves(provider, target) and not (asked and name == "native"):
            if asked:
                first = first or (Code.NO_KERNEL.value, f"{name} does not run on target {target}")
            continue
        reason = provider.supports(site.op, arguments)
        if reason is None:
            return name
        first = first or reason
    code, message = first or (Code.NO_KERNEL.value, f"no kernel for target {target}")
    raise Reject(code, message, Stage.KERNEL)
