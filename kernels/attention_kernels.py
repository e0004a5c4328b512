"""The kernels that `dkfuse::attention` chooses from: what each takes, where it comes from, what it returns.

    sdpa        what torch chooses
    cudnn       cuDNN's fused attention, through torch
    flash       FlashAttention 2, torch's own copy
    efficient   torch's memory-efficient attention
    fa3, fa4    FlashAttention 3 and 4 (flash-attn-4 is written in CuTe DSL), packages of their own
    sage        SageAttention, int8 products: lossy, by request only

Nothing here imports a package of a kernel.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .attention_limits import LENGTHS, MOSTLY_SURE, NO_LENGTHS
from .packages import between, installed
from .registry import Constraint
from .unsupported import Unsupported

HALF = (torch.float16, torch.bfloat16)
ALIGNMENT = 8  # elements: 16 bytes, what one vector load or TMA descriptor asks of every stride
CUDNN_FIXED = 91501  # cuDNN before 9.15.1 is wrong for lengths that 128 does not divide (pytorch#169849)


@dataclass(frozen=True)
class AttentionKernel:
    """One kernel. Results are `[B, H, S, d]`; in memory ``order`` is "tokens" (`[B, S, H, d]`) or "query" (as q is)."""

    name: str
    constraints: tuple[Constraint, ...]
    order: str = "query"
    oldest: int = 80
    newest: int | None = None
    distributions: tuple[str, ...] = ()  # names that the package is published under; none: part of torch
    module: str = ""  # of the package, looked for where no distribution of these names is installed
    tested: tuple[str, str] | None = None  # oldest and newest version that tests ran on
    install: str = ""
    lossy: bool = False

    def problem(self, arguments: Mapping[str, Any], capability: int) -> Unsupported | None:
        """Why this kernel cannot serve the call on a GPU of this compute capability (80, 90, ...); None where it can.

        arguments: q, k, v `[B, H, S, d]`, mask, key_lengths, causal, as the op takes them; tensors may be fake.
        """
        if capability < self.oldest or (self.newest is not None and capability > self.newest):
            limit = f"from sm{self.oldest}" + (f" to sm{self.newest}" if self.newest is not None else " on")
            return Unsupported("arch", f"{self.name} runs {limit}, not on sm{capability}")
        for constraint in self.constraints:
            if (message := constraint.problem({**arguments, "capability": capability})) is not None:
                return Unsupported(constraint.code, f"{self.name}: {message}")
        return None


# -- constraints -------------------------------------------------------------------------------------------------------


def _dtypes(*allowed: torch.dtype) -> Constraint:
    def problem(arguments: Mapping[str, Any]) -> str | None:
        found = {arguments[n].dtype for n in "qkv"}
        if len(found) == 1 and found <= set(allowed):
            return None
        return f"q, k and v are {', '.join(sorted(str(d) for d in found))}, not all one of {names}"

    names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
    return Constraint("dtype", f"q, k, v of one dtype: {names}", problem)


def _rank(arguments: Mapping[str, Any]) -> str | None:
    ranks = [arguments[n].dim() for n in "qkv"]
    return None if ranks == [4, 4, 4] else f"q, k and v have {ranks} dims, [B, H, S, d] is needed"


def _shape(arguments: Mapping[str, Any]) -> str | None:
    q, k, v = (arguments[n].shape for n in "qkv")
    # torch's own kernels demand equal batches and tokens: symbols that merely may differ do not
    if statically_known_true(q[0] != k[0]) or statically_known_true(k[0] != v[0]):
        return f"q, k and v have batches {q[0]}, {k[0]} and {v[0]}, they must be equal"
    if not statically_known_true(k[1] == v[1]) or not statically_known_true(q[1] % k[1] == 0):
        return f"{q[1]} heads of q do not divide into {k[1]} of k and {v[1]} of v"
    return f"k has {k[2]} tokens and v {v[2]}" if statically_known_true(k[2] != v[2]) else None


def _no_mask(arguments: Mapping[str, Any]) -> str | None:
    mask = arguments.get("mask")
    return None if mask is None else f"it takes no mask, this one is {list(mask.shape)}"


def _no_groups(arguments: Mapping[str, Any]) -> str | None:
    heads, groups = arguments["q"].shape[1], arguments["k"].shape[1]
    return None if statically_known_true(heads == groups) else f"{heads} heads of q share {groups} of k and v"


def _square_if_causal(arguments: Mapping[str, Any]) -> str | None:
    """Torch aligns a causal mask to the first key, the others to the last: the same only for equal lengths."""
    queries, keys = arguments["q"].shape[2], arguments["k"].shape[2]
    if not arguments["causal"] or statically_known_true(queries == keys):
        return None
    return f"causal attention of {queries} queries to {keys} keys means something else to it"


def _strides(arguments: Mapping[str, Any]) -> str | None:
    for name in "qkv":
        tensor = arguments[name]
        *outer, inner = tensor.stride()
        if not statically_known_true(inner == 1):
            return f"{name} has stride {inner} in its last dim, 1 is needed"
        for size, stride in zip(tensor.shape, outer, strict=False):
            if statically_known_true(size == 1):
                continue
            if not statically_known_true(stride % ALIGNMENT == 0) or statically_known_true(stride == 0):
                return f"{name} has strides {list(tensor.stride())}, positive multiples of {ALIGNMENT} are needed"
        if not statically_known_true(tensor.storage_offset() % ALIGNMENT == 0):
            return f"{name} starts at element {tensor.storage_offset()}, a multiple of {ALIGNMENT} is needed"
    return None


def _head_dim(text: str, allowed: Callable[[int, int], bool]) -> Constraint:
    def problem(arguments: Mapping[str, Any]) -> str | None:
        sizes = [arguments[n].shape[3] for n in "qkv"]
        if not all(isinstance(s, int) for s in sizes) or len(set(sizes)) != 1:
            return f"head_dims {sizes} are not one known number"
        return None if allowed(sizes[0], arguments["capability"]) else f"head_dim {sizes[0]}: {text}"

    return Constraint("head_dim", text, problem)


def _upto(limit: int) -> Constraint:
    return _head_dim(f"d % 8 == 0, d <= {limit}", lambda d, _: d % 8 == 0 and 8 <= d <= limit)


def _fa4_head_dim(head_dim: int, capability: int) -> bool:
    return head_dim % 8 == 0 and 8 <= head_dim <= (256 if capability // 10 == 9 else 128)


def _cudnn_state(arguments: Mapping[str, Any]) -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "it is not deterministic, and torch.use_deterministic_algorithms is on"
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "switched off by torch.backends.cuda.enable_cudnn_sdp"
    if arguments["q"].device.type == "cuda" and torch.cuda.is_available():
        version = torch.backends.cudnn.version() or 0
        if version < CUDNN_FIXED:
            return f"cuDNN {version} is older than {CUDNN_FIXED}, which computes every length right"
    return None


def _cudnn_keys(arguments: Mapping[str, Any]) -> str | None:
    keys = arguments["k"].shape[2]
    return None if statically_known_true(keys != 1) else f"{keys} keys, more than one is needed"


_COMMON = (
    Constraint("layout", "q, k, v [B, H, S, d]", _rank),
    Constraint("broadcast", "equal batches; heads of q a multiple of those of k and v", _shape),
    Constraint("mask", "no mask", _no_mask),
    Constraint("causal", "causal only for as many queries as keys", _square_if_causal),
    Constraint("alignment", "inner stride 1, other strides multiples of 16 bytes", _strides),
)
_HALF_COMMON = (_dtypes(*HALF), *_COMMON)

KERNELS: dict[str, AttentionKernel] = {
    kernel.name: kernel
    for kernel in (
        AttentionKernel("sdpa", ()),
        AttentionKernel(
            "cudnn",
            (
                *_HALF_COMMON,
                _upto(128),
                LENGTHS,
                MOSTLY_SURE,
                Constraint("empty", "more than one key", _cudnn_keys),
                Constraint("runtime", "cuDNN 9.15.1 or newer, not switched off, not deterministic", _cudnn_state),
            ),
        ),
        AttentionKernel("flash", (*_HALF_COMMON, _upto(256), LENGTHS)),
        AttentionKernel(
            "efficient",
            (
                _dtypes(*HALF, torch.float32),
                *_COMMON,
                Constraint("groups", "as many heads of k and v as of q", _no_groups),
                _upto(1024),
                NO_LENGTHS,
            ),
            order="tokens",
        ),
        AttentionKernel(
            "fa4",
            (*_HALF_COMMON, _head_dim("d % 8 == 0, d <= 256 on sm90, else d <= 128", _fa4_head_dim), LENGTHS),
            order="tokens",
            distributions=("flash-attn-4", "fa4"),
            tested=("4.0.0b20", "4.0.0b20"),
            install="pip install 'dkfuse[attention]'",
        ),
        AttentionKernel(
            "fa3",
            (*_HALF_COMMON, _upto(256), NO_LENGTHS),
            order="tokens",
            oldest=90,
            newest=90,
            distributions=("flash-attn-3", "flash_attn_3"),
            module="flash_attn_interface",
            install="build it from github.com/Dao-AILab/flash-attention, folder hopper (pip install flash-attn-3)",
        ),
        AttentionKernel(
            "sage",
            (*_HALF_COMMON, _upto(128), NO_LENGTHS),
            order="tokens",
            distributions=("sageattention",),
            module="sageattention",
            install="pip install sageattention",
            lossy=True,
        ),
    )
}


# -- availability ------------------------------------------------------------------------------------------------------


@functools.cache
def version_of(name: str) -> str | None:
    """The installed version of a kernel's package ("?": unknown; torch's for torch's own), or None."""
    kernel = KERNELS[name]
    if not kernel.distributions:
        return torch.__version__
    if (found := installed(*kernel.distributions)) is not None:
        return found
    return "?" if kernel.module and importlib.util.find_spec(kernel.module) is not None else None


def untested(name: str) -> str | None:
    """Why the installed version is not taken unasked, in one sentence; None where it is, or is missing."""
    kernel, version = KERNELS[name], version_of(name)
    if version is None or not kernel.distributions:
        return None
    if kernel.tested is None:
        return f"{name} {version} was never tested with dkfuse: ask for it with dkfuse.attention={name}"
    if not between(version, kernel.tested):
        return (
            f"{name} {version} is outside of what was tested ({' to '.join(dict.fromkeys(kernel.tested))}): "
            f"ask for it with dkfuse.attention={name}"
        )
    return None


def versions() -> str:
    """The kernels' packages as they are installed: part of what a compiled graph depends on."""
    return ",".join(f"{name}={version_of(name)}" for name, kernel in KERNELS.items() if kernel.distributions)
