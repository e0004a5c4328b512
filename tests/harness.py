"""What the matcher tests share: inputs from a short text, compiled runs with their coverage, an fp64 reference.

spell("x:BLD scale:BD w:DD")     bf16 tensors [2,6,36], [2,36], [36,36]; ":f" after the dims makes one fp32, see DTYPES
run(fn, args)                    the compiled function's results and the coverage of that compilation
fused(fn, args)                  the ATen graph with dkfuse's ops in it
counts(coverage)                 {"norm_modulate": 1, "absorbed": 1, "left:qk_norm": 2}
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dkfuse
from dkfuse import Coverage, Settings, Status, compat, fuse

SIZES = {"B": 2, "L": 6, "F": 3, "D": 36, "E": 72, "H": 4, "K": 9, "P": 216, "T": 4, "S": 10}
SIZES |= {"C": 16, "R": 8, "M": 12, "I": 64, "J": 32, "Q": 192}  # head_dim, its half, 3/4; 4 heads, 2 heads; packed qkv
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"f": FP32, "d": torch.float64, "b": BF16, "c": torch.complex64, "z": torch.complex128, "i": torch.int64}


def tensor(dims: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Seeded values of std 1 and mean 0.3, so that a mean that is not subtracted is noticed. Digits are sizes."""
    shape = [SIZES[c] if c in SIZES else int(c) for c in dims]
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.view_as_complex(torch.randn([*shape, 2], generator=generator, dtype=torch.float64)).to(dtype)
    if dtype == torch.int64:
        return torch.randint(0, 4, shape, generator=generator)
    return (torch.randn(shape, generator=generator) + 0.3).to(dtype)


def spell(text: str, dtype: torch.dtype = BF16) -> list[Tensor]:
    """One tensor per ``name:DIMS`` or ``name:DIMS:f``; ``name:`` is 0-D. Integers are 0 to 3."""
    parts = [part.split(":") for part in text.split()]
    return [tensor(p[1], DTYPES[p[2]] if p[2:] else dtype, seed) for seed, p in enumerate(parts)]


@dataclass(frozen=True)
class Spelling:
    """One way to write a pattern: what computes it, on which inputs, and the exact coverage that it must give."""

    name: str
    function: Callable[..., Any]
    inputs: str
    expected: dict[str, int]
    dtype: torch.dtype = BF16


def parse(expected: str) -> dict[str, int]:
    """``"norm_modulate=2 left:qk_norm=1"`` as a dict; a count of 1 may be left out."""
    pairs = [part.partition("=") for part in expected.split()]
    return {name: int(count or 1) for name, _, count in pairs}


def table(rows: list[Spelling]) -> Callable[..., Callable]:
    """A decorator ``@spelling(expected, inputs)`` that appends what it decorates to `rows`."""

    def spelling(expected: str, inputs: str, dtype: torch.dtype = BF16) -> Callable:
        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            rows.append(Spelling(function.__name__, function, inputs, parse(expected), dtype))
            return function

        return add

    return spelling


# -- running -----------------------------------------------------------------------------------------------------------


def compiled(
    function: Callable[..., Any], dynamic: bool | None = False, remainder: str = "eager", **options: Any
) -> Any:
    """``torch.compile(function, backend="dkfuse")``; `options` are dkfuse's, without their prefix."""
    chosen = {"dkfuse.remainder": remainder, **{f"dkfuse.{k}": v for k, v in options.items()}}
    return torch.compile(function, backend="dkfuse", dynamic=dynamic, options=chosen)


def run(function: Callable[..., Any], args: Sequence[Any], **how: Any) -> tuple[tuple[Tensor, ...], Coverage]:
    """The results of the freshly compiled function, and what was fused."""
    torch.compiler.reset()
    with dkfuse.record() as coverage, torch.no_grad():
        results = flat(compiled(function, **how)(*args))
    return results, coverage


def fused(function: Callable[..., Any], args: Sequence[Any]) -> fx.Graph:
    """The graph of the compiled function after fusing, before anything runs or is made a kernel of."""
    graphs: list[fx.Graph] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        def inner(module: fx.GraphModule, _: Any) -> Callable:
            fuse.run(module.graph, Settings(), lowered=False)
            module.recompile()
            graphs.append(module.graph)
            return module.forward

        return compat.lower_with(gm, inputs, inner, {})

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, dynamic=False)(*args)
    (graph,) = graphs
    return graph


def flat(results: Any) -> tuple[Tensor, ...]:
    return tuple(results) if isinstance(results, (tuple, list)) else (results,)


def counts(coverage: Coverage) -> dict[str, int]:
    """Fused sites by rule ("absorbed" where a wider site does the work), all others by ``status:code``."""
    return tally(coverage.sites)


def tally(sites: Sequence[dkfuse.Site]) -> dict[str, int]:
    """As `counts`, of some sites or seams."""
    found: Counter[str] = Counter()
    for site in sites:
        if site.status is Status.FUSED:
            found["absorbed" if site.with_site else str(site.rule)] += 1
        else:
            status = "left" if site.status is Status.LEFT_TO_INDUCTOR else site.status.value
            found[f"{status}:{site.reason.code if site.reason else None}"] += 1
    return dict(found)


# -- numerics ----------------------------------------------------------------------------------------------------------


class Double(TorchDispatchMode):
    """Runs a function on fp64 inputs in fp64 throughout: casts to other float dtypes are casts to fp64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        dtype = kwargs.get("dtype")
        if isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex):
            kwargs["dtype"] = torch.complex128 if dtype.is_complex else torch.float64
        return func(*args, **kwargs)


def double(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor) and value.is_complex():
        return value.to(torch.complex128)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def exact(function: Callable[..., Any], args: Sequence[Any]) -> tuple[Tensor, ...]:
    """The function evaluated in fp64."""
    with torch.no_grad(), Double():
        return flat(double(function)(*map(double, args)))


def rms(value: Tensor) -> float:
    return value.double().square().mean().sqrt().item()


def check_numerics(function: Callable[..., Any], args: Sequence[Any], results: Sequence[Tensor]) -> None:
    """Every result is as near to fp64 as eager's, near to eager's, and of its dtype and shape."""
    with torch.no_grad():
        eager = flat(function(*args))
    assert len(eager) == len(results)
    dtypes = {a.dtype for a in (*args, *results) if isinstance(a, Tensor)} & set(TOLERANCE)
    tolerance = max(TOLERANCE[dtype] for dtype in dtypes)  # eager rounds to the narrowest dtype on the way
    for ours, theirs, reference in zip(results, eager, exact(function, args), strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        size = rms(reference)
        error, eagers = rms(ours - reference) / size, rms(theirs - reference) / size
        assert error <= 1.05 * eagers + tolerance / 100, f"error {error:.3g} against fp64, eager {eagers:.3g}"
        assert rms(ours.double() - theirs.double()) / size <= tolerance
