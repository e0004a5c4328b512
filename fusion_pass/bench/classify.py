"""What kind of work a GPU kernel does, by its name in the profile.

    gemm        matrix products and convolutions: cuBLAS(Lt), nvjet, CUTLASS, quack, split-K, Inductor's templates
    attention   cuDNN, FlashAttention, memory-efficient attention, flex attention
    dkfuse      dkfuse's kernels, those of the libraries it calls for a fused op included
    inductor    kernels that Inductor generated
    copy        copies, fills of memory, concatenation, layout conversions
    other       everything else, mostly kernels of ATen

Inductor names a kernel after the ops around it, attention and products included, so that its prefix decides first.
"""

from __future__ import annotations

import re

GEMM, ATTENTION, DKFUSE, INDUCTOR, COPY, OTHER = "gemm", "attention", "dkfuse", "inductor", "copy", "other"
KINDS = (GEMM, ATTENTION, DKFUSE, INDUCTOR, COPY, OTHER)
GLUE = (DKFUSE, INDUCTOR, COPY, OTHER)  # all that is neither GEMM nor attention

_PRODUCTS = r"(?:^|_)(?:mm|addmm|bmm|baddbmm|linear|convolution|scaled_mm|int_mm|grouped_mm)(?:_|\d|$)"

RULES: tuple[tuple[str, re.Pattern[str]], ...] = (  # the first that is found decides
    (GEMM, re.compile(rf"^triton_tem_.*{_PRODUCTS}")),
    (ATTENTION, re.compile(r"^triton_tem_.*flex_(?:attention|decoding)")),
    (GEMM, re.compile(r"^triton_tem_")),
    (INDUCTOR, re.compile(r"^triton_")),
    (GEMM, re.compile(r"quack\w*gemm", re.IGNORECASE)),
    (DKFUSE, re.compile(r"dkfuse")),
    (DKFUSE, re.compile(r"flashinfer.*(?:norm|rotary|rope)|sgl_?kernel|sgl_(?:fused|rms)", re.IGNORECASE)),
    (ATTENTION, re.compile(r"flash|fmha|attention|sdpa|(?:^|\W|_)mha_|qk_int\d*_sv", re.IGNORECASE)),
    (COPY, re.compile(r"nchwToNhwc|nhwcToNchw", re.IGNORECASE)),
    (GEMM, re.compile(r"gemm|nvjet|cutlass|xmma|splitk|cublas|gemv|conv(?!ert)|winograd", re.IGNORECASE)),
    (COPY, re.compile(r"memcpy|memset|copy|CatArray", re.IGNORECASE)),
)


def kind(name: str) -> str:
    """One of KINDS."""
    return next((label for label, pattern in RULES if pattern.search(name)), OTHER)


def op_of(name: str, ops: tuple[str, ...]) -> str | None:
    """The op that a kernel of dkfuse computes: the longest of `ops` that its name contains."""
    return max((op for op in ops if op in name), key=len, default=None)
