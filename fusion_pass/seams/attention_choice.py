"""Which kernel computes an attention: forced, measured here, or by the table; or why it stays as torch chose it.

    asked for          the kernel of ``dkfuse.attention=...``, or a rejection that says what it does not take
    max-autotune       the fastest of the installed kernels, timed now
    otherwise          the fastest of the installed kernels in the table, at the nearest measured shape
    =torch             the same, of the kernels that are part of torch

A kernel that loses accuracy is taken on demand only. Attention that a kernel computes faster than the CPU calls it
(`LAUNCH_BOUND`) stays with torch: the GPU would wait for the calls, and no timing of calls tells kernels apart there. A
kernel whose calls cost more is no candidate where the whole graph is bound by the CPU (`cpu_bound`).

Where the mask is proved to say how many of the first keys take part, kernels that take those numbers compete with
torch's choice given the mask (`DENSE`), which may be the same kernel. So they do where it chooses keys in another way,
and pay for bringing these to the front (`key_order`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dkfuse.kernels.attention_kernels import KERNELS, AttentionKernel, untested, version_of

from .. import compat
from ..matching.rules import Code, Stage
from ..reporting.report import Reason
from ..settings import Settings
from . import attention_measure, attention_table
from .attention_call import Call
from .attention_table import DENSE
from .cpu_bound import LAUNCH, Load

MARGIN = 1.03  # a smaller gain is noise between runs
# Microseconds of CPU that a call costs, measured on a host with an H100 (torch 2.11, flash-attn-4 4.0.0b20): flash 54,
# efficient 39, cudnn 34, fa4 26 (`attention_fa4`; its own function 80), each through dkfuse::attention, against 19 of
# torch's own op. More than the most of these, for every kernel: what is timed below it is the call. cuDNN in two parts
# costs 261, but is in the table for sizes that take milliseconds only.
LAUNCH_BOUND = 60.0
MEASURED_ON = 9  # the compute capability that `cpu_bound` has figures of
RULE = "attention"
USEFUL = ("failed", "not_installed", "launch_bound", "cpu_bound")  # why the fastest is not taken


@dataclass
class Decision:
    """`kernel` is None where the attention stays as it is, for `reason`; `forbidden` says that it must."""

    kernel: str | None = None
    reason: Reason | None = None
    forbidden: bool = False
    attempts: list[Reason] = field(default_factory=list)


def reason(code: Code | str, message: str, stage: Stage = Stage.KERNEL) -> Reason:
    return Reason(stage.value, str(getattr(code, "value", code)), message, RULE)


def decide(call: Call, target: str, settings: Settings, load: Callable[[], Load | None] = lambda: None) -> Decision:
    """What to do with `call` on `target` ("sm90", "cpu", ...); load: what the graph that it is in asks of the CPU."""
    if (wrong := _semantics(call)) is not None:
        return Decision(reason=wrong, forbidden=True)
    if settings.attention == "sdpa" or not settings.allows(RULE):
        option = "dkfuse.attention=sdpa" if settings.attention == "sdpa" else "dkfuse.rules"
        return Decision(reason=reason(Code.DISABLED, f"left to torch by {option}"))
    if not target.startswith("sm"):
        return Decision(reason=reason(Code.NO_KERNEL, f"attention on target {target} is left to torch"))
    capability = int(target[2:])
    chosen = call.chosen(capability)
    if settings.attention not in ("auto", "torch"):
        return _why_masked(call, _forced(call, KERNELS[settings.attention], chosen, capability))
    able, attempts = _able(call, chosen, capability, settings)
    slow = functools.partial(_slow, call, load if capability // 10 == MEASURED_ON else lambda: None)
    if _measures(call):
        return _by_measurement(call, chosen, able, attempts, settings, slow)
    return _why_masked(call, _by_table(call, chosen, able, attempts, capability, slow))


def _why_masked(call: Call, decision: Decision) -> Decision:
    """Say why the mask is not just a number of keys, where it stood in the way."""
    if call.unproved is not None and decision.kernel is None:
        decision.attempts.append(reason(call.unproved.code, call.unproved.message, Stage.SEMANTICS))
    return decision


def _semantics(call: Call) -> Reason | None:
    if call.others:
        message = f"{call.others[0].name} is read too: only the attention itself is computed by other kernels"
        return reason(Code.ESCAPES, message, Stage.SEMANTICS)
    if call.dropout:
        return reason("dropout", f"dropout {call.dropout}: other kernels have none", Stage.SEMANTICS)
    return None


def _forced(call: Call, kernel: AttentionKernel, chosen: str, capability: int) -> Decision:
    if kernel.name == chosen and not call.counted:
        return Decision(reason=reason("chosen", f"torch chose {chosen} as well"))
    if (problem := kernel.problem(call.values, capability)) is not None:
        return Decision(reason=reason(problem.code, problem.message), forbidden=True)
    if (failed := _failure(call, kernel.name)) is not None:
        return Decision(reason=failed, forbidden=True)
    return Decision(kernel.name)


def _failure(call: Call, name: str) -> Reason | None:
    """Why a kernel that takes the call cannot be used all the same: its package is broken, it cannot be built."""
    message = attention_measure.failure(name, call.values["q"], call.values["k"], call.causal, call.counted)
    return reason("failed", f"{name} failed when it was tried: {message}") if message is not None else None


def _able(call: Call, chosen: str, capability: int, settings: Settings) -> tuple[list[str], list[Reason]]:
    """The kernels that could compute it unasked, installed or not, and why others could not."""
    able, attempts = [], []
    for kernel in KERNELS.values():
        if kernel.lossy or kernel.name == "sdpa" or (kernel.name == chosen and not call.counted):
            continue
        if settings.attention == "torch" and kernel.distributions:
            continue
        if kernel.name == "cudnn" and call.counted and settings.roundings == "eager":
            text = "cudnn by numbers of keys is two attentions, each rounded before they are merged"
            attempts.append(reason(Code.ROUNDING, text))
            continue
        if (problem := kernel.problem(call.values, capability)) is not None:
            attempts.append(reason(problem.code, problem.message))
        elif (message := untested(kernel.name)) is not None:
            attempts.append(reason("version", message))
        else:
            able.append(kernel.name)
    return able, attempts


def _slow(call: Call, load: Callable[[], Load | None], name: str) -> Reason | None:
    """Why the CPU would not call kernel `name` as fast as the GPU works."""
    extra = attention_table.extra(name, bool(KERNELS[name].distributions), call.counted)
    extra += 2 * LAUNCH * 1e6 if call.choice is not None else 0  # of keys and of values
    found = load() if extra > 0 else None
    message = found.too_slow(call, extra) if found is not None else None
    return reason("cpu_bound", f"{name}: {message}") if message is not None else None


def _measures(call: Call) -> bool:
    """Whether kernels are timed now: asked for, on a GPU, without a mask or with numbers of keys, for known sizes."""
    sizes = [s for n in ("q", "k", "v") for t in (call.values[n],) for s in (*t.shape, *t.stride())]
    return (
        bool(compat.inductor_config("max_autotune"))
        and call.device.type == "cuda"
        and torch.cuda.is_available()
        and (call.mask is None or call.counted)
        and all(isinstance(s, int) for s in sizes)
        and call.traced in KERNELS
    )


def _by_measurement(
    call: Call,
    chosen: str,
    able: list[str],
    attempts: list[Reason],
    settings: Settings,
    slow: Callable[[str], Reason | None],
) -> Decision:
    rival = chosen if not call.counted else DENSE
    names = [rival]
    for name in able:
        if version_of(name) is not None and (why := slow(name)) is not None:
            attempts.append(why)
        elif version_of(name) is not None:
            names.append(name)
    tensors = [call.values[n] for n in "qkv"]
    reorders = call.choice is not None
    found = attention_measure.times(tensors, call.causal, names, settings.cache_dir, call.counted, call.sure, reorders)
    best = min(names, key=lambda name: found[name])
    for name in names:
        if found[name] == float("inf"):
            attempts.append(reason("failed", f"{name} failed when it was timed; the log says how"))
        elif name != best:
            attempts.append(reason("slower", f"{name} took {found[name]:.0f} us, {best} {found[best]:.0f} us"))
    if best == rival or found[best] * MARGIN > found[rival]:
        return Decision(reason=reason("fastest", f"{_torchs(call, chosen)}, was the fastest timed"), attempts=attempts)
    if found[best] < LAUNCH_BOUND:
        return Decision(reason=_short(_torchs(call, chosen), best, found[best]), attempts=attempts)
    return Decision(best, attempts=attempts)


def _by_table(
    call: Call,
    chosen: str,
    able: list[str],
    attempts: list[Reason],
    capability: int,
    slow: Callable[[str], Reason | None],
) -> Decision:
    speeds, sizes = _speeds(call, chosen, capability)
    if isinstance(speeds, Reason):
        return Decision(reason=speeds, attempts=attempts)
    assert sizes is not None
    rival, torchs = (chosen if not call.counted else DENSE), _torchs(call, chosen)
    ranked = sorted((n for n in able if speeds.get(n, 0) >= MARGIN * speeds[rival]), key=lambda n: -speeds[n])
    for name in ranked:
        gain = f"{speeds[name] / speeds[rival]:.2f}x {torchs}"
        if (taken := attention_table.microseconds(*sizes, speeds[name])) < LAUNCH_BOUND:
            attempts.append(_short(torchs, name, taken))
        elif (why := slow(name)) is not None:
            attempts.append(why)
        elif version_of(name) is None:
            message = f"{name} was measured at {gain}, near this shape: {KERNELS[name].install}"
            attempts.append(reason("not_installed", message))
        elif (failed := _failure(call, name)) is not None:
            attempts.append(failed)
        else:
            return Decision(name, attempts=attempts)
    useful = next((a for a in attempts if a.code in USEFUL), None)
    best = reason("fastest", f"{torchs}, is the fastest measured near this shape")
    return Decision(reason=useful or best, attempts=[a for a in attempts if a is not useful])


def _speeds(
    call: Call, chosen: str, capability: int
) -> tuple[dict[str, float] | Reason, tuple[int, int, int, int] | None]:
    """What the table says of the call's shape, or why it says nothing."""
    sizes = call.sizes()
    if sizes is None:
        return reason(Code.SYMBOLIC, f"sizes {list(call.values['q'].shape)} have no example to look up"), None
    odd = [
        text
        for text, present in (
            ("a mask", call.mask is not None and not call.counted),
            ("a causal mask", call.causal),
            ("grouped heads", call.grouped),
            (f"{call.values['q'].dtype}", call.values["q"].dtype not in (torch.float16, torch.bfloat16)),
        )
        if present
    ]
    speeds = attention_table.nearest(capability, *sizes, call.counted)
    if odd or speeds is None or (DENSE if call.counted else chosen) not in speeds:
        where = "with " + " and ".join(odd) if odd else f"near head_dim {sizes[0]}, {sizes[2]} x {sizes[3]} tokens"
        kind = " by numbers of keys" if call.counted else ""
        message = f"no kernels were measured{kind} {where} on sm{capability}: {_torchs(call, chosen)}, stays"
        return reason("unmeasured", message), sizes
    if call.reordered:
        ordered = functools.partial(attention_table.reordered, *sizes, moved=call.reordered)
        speeds = {n: speed if n == DENSE else ordered(speed) for n, speed in speeds.items()}
    return speeds, sizes


def _torchs(call: Call, chosen: str) -> str:
    return f"{chosen}, torch's choice" if not call.counted else f"{chosen} with a dense mask, torch's choice"


def _short(torchs: str, name: str, microseconds: float) -> Reason:
    limit = f"a call may cost the CPU up to {LAUNCH_BOUND:.0f} us, so {torchs}, stays"
    return reason("launch_bound", f"{name} takes {microseconds:.0f} us here: {limit}")


__all__: list[Any] = ["Decision", "decide"]
