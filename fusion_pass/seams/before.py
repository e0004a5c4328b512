"""What is begun before there is a graph, where nothing was compiled yet: the helper, and kernels that are likely.

What the first graph takes is read off it (`early`), and Inductor is busy with a large one for as long as its kernels
take. A model of many graphs (mixtures of experts, code that Dynamo breaks at) has its linears in small ones, which come
late and would each wait for kernels of their own, HiDream's for 11 s together. Until then the helper has nothing to do,
and compiles what most diffusion transformers take. Each kernel costs a processor 3 to 4 s, once per cache, where more
are left than Inductor and the helper use (`compile_ahead.Pool.guess`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from dkfuse.kernels import attention_kept, compile_ahead, cute_ahead, gemm_ahead, gemm_kernels

from ..errors import SettingsError
from ..settings import Settings
from . import attention_choice, gemm, swiglu

FA4 = ("auto", "fa4")  # values of dkfuse.attention with which it may be taken
LIKELY: tuple[tuple[str, ModuleType, Any], ...] = (  # the rule that asks for a kernel, who compiles it, its kind
    (gemm.FAMILY, gemm_ahead, gemm_ahead.Kind("bfloat16", "none", True, "128x192")),
    (attention_choice.RULE, attention_kept, attention_kept.Kind("bfloat16", 128, 1, causal=False, lengths=False)),
    (swiglu.FAMILY, gemm_ahead, gemm_ahead.Kind("bfloat16", "silu_first", False, "128x160")),
    (swiglu.FAMILY, gemm_ahead, gemm_ahead.Kind("bfloat16", "silu_first", False, "128x192")),
    (gemm.FAMILY, gemm_ahead, gemm_ahead.Kind("bfloat16", "gelu", True, "128x192")),
)


def start_if_new(settings: Settings) -> None:
    """Start the helper where nothing was compiled yet and such kernels may be used, and give it those."""
    wanted = {
        gemm_ahead: settings.gemm != gemm_kernels.CUBLAS,
        attention_kept: settings.attention in FA4,
    }
    if any(wanted.values()) and cute_ahead.start_if_new():
        for rule, library, kind in LIKELY:
            if wanted[library] and settings.allows(rule) and library.usable() and not library.on_disk(kind):
                compile_ahead.POOL.guess(library.job(kind))


def start_by_environment() -> None:
    """The same before any call, for what the environment asks for; a wrong variable is the first call's error."""
    try:
        settings, *_ = Settings.parse()
    except SettingsError:
        return
    if not settings.disable and settings.remainder != "eager":
        start_if_new(settings)
