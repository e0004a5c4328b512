"""The kernel benchmark's calls: shapes, dtypes and spellings as the models have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BF16 = torch.bfloat16
FP32 = torch.float32
CHECKED_ROWS = 512


@dataclass(frozen=True)
class Launching:
    """A case's launch by its configuration, those that are worth timing, and the tensors by the launch's names."""

    plan: Callable[[Any], Any]
    configs: Callable[[], list[Any]]
    tensors: dict[str, Any]
    results: tuple[Tensor, ...]

    def caller(self, config: Any = None) -> Callable[[], tuple[Tensor, ...]]:
        """A call that launches it, planned once."""
        from dkfuse.kernels.launch import run

        launch = self.plan(config)

        def call() -> tuple[Tensor, ...]:
            run(launch, self.tensors)
            return self.results

        return call


@dataclass(frozen=True)
class Case:
    """One call of `op` on x of `shape`. `parameters` is the dtype of gate, scale and shift, `residual` the stream's.

    branch: the gate takes an RMS norm of x, with a weight (a sandwich norm). alone: no gate, scale and shift, as in
    the norms that libraries offer.
    """

    name: str
    op: str
    shape: tuple[int, int, int]
    norm: str = "layer"
    parameters: torch.dtype = BF16
    residual: torch.dtype = BF16
    per_token: bool = False
    weight: bool = False
    shift: bool = True
    branch: bool = False
    alone: bool = False

    def inputs(self, seed: int, device: str = "cuda") -> dict[str, Tensor | None]:
        """Random operands; gate, scale and shift are slices of one modulation vector, as models chunk them."""
        generator = torch.Generator(device).manual_seed(seed)

        def random(*size: int, dtype: torch.dtype = BF16) -> Tensor:
            return torch.randn(size, device=device, generator=generator).to(dtype)

        batch, length, width = self.shape
        tokens = length if self.per_token else 1
        vectors = (random(batch, tokens, 6 * width, dtype=FP32) * 0.5).to(self.parameters).chunk(6, dim=-1)
        operands: dict[str, Tensor | None] = {"x": random(*self.shape)}
        if self.op in ("residual_norm_modulate", "residual_norm_modulate_dual", "gated_residual"):
            operands.update(residual=random(*self.shape, dtype=self.residual), gate=vectors[0])
        if self.op != "gated_residual":
            operands.update(scale=vectors[1], shift=vectors[2] if self.shift else None)
        if "norm" in self.op:
            operands.update(weight=random(width) if self.weight else None, bias=None)
        if self.branch:
            operands.update(branch_weight=random(width))
        if self.op.endswith("dual"):
            operands.update(scale2=vectors[3], shift2=vectors[4])
        if self.alone:
            operands.update((name, None) for name in ("gate", "scale", "shift") if name in operands)
        return operands

    def values(self) -> dict[str, Any]:
        """The op's keyword arguments."""
        values: dict[str, Any] = {"out_dtype": BF16, "roundings": 0}
        if self.op != "gated_residual":
            values["scale_offset"] = 1.0
        if "norm" in self.op:
            values.update(norm=self.norm, eps=1e-6, weight_offset=0.0)
        if self.op.startswith("residual"):
            values["sum_dtype"] = self.residual
        if self.branch:
            values.update(branch_norm="rms", branch_eps=1e-6, branch_weight_offset=0.0)
        return values

    def eager(self) -> Callable[[dict[str, Tensor | None]], tuple[Tensor, ...]]:
        """The same as the model's own code spells it."""
        return lambda operands: _eager(self, **operands)  # type: ignore[arg-type]

    def traffic(self, operands: dict[str, Tensor | None]) -> int:
        """Bytes that any implementation must move: big operands and outputs once, parameter rows not counted."""
        rows = [t for t in operands.values() if t is not None and t.numel() >= self.shape[1] * self.shape[2]]
        outputs = {"norm_modulate": 1, "gated_residual": 1, "scale_shift": 1}.get(self.op, 2)
        outputs = 3 if self.op == "residual_norm_modulate_dual" else outputs
        size = self.shape[0] * self.shape[1] * self.shape[2]
        total = sum(t.numel() * t.element_size() for t in rows) + outputs * size * 2
        return total + (size * 2 if self.op.startswith("residual") and self.residual == FP32 else 0)

    def calls(
        self, operands: dict[str, Tensor | None]
    ) -> tuple[list[tuple[dict[str, Any], dict[str, Tensor]]], tuple[Tensor, ...]]:
        """(arguments, outputs) of every call of the op, and the results."""
        from dkfuse.kernels import ops

        arguments = {**operands, **self.values()}
        outputs = ops._empty_outputs(self.op, arguments)
        return [(arguments, outputs)], tuple(outputs.values())

    @property
    def size(self) -> tuple[int, int]:
        """Rows that are normed, and their width."""
        return self.shape[0] * self.shape[1], self.shape[2]

    def launch(self, operands: dict[str, Tensor | None]) -> Launching:
        """Our kernel on `operands`."""
        from dkfuse.kernels.launch import candidates, plan

        [(arguments, outputs)], results = self.calls(operands)
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        return Launching(
            lambda config: plan(self.op, arguments, outputs, sm_count=sms, config=config),
            lambda: candidates(self.op, arguments, outputs),
            {**arguments, **outputs},
            results,
        )

    def launcher(self, operands: dict[str, Tensor | None]) -> Callable[[], tuple[Tensor, ...]]:
        """A call that launches our kernel on `operands`, planned once, as a compiled program does it."""
        return self.launch(operands).caller()

    def checked(self, results: Sequence[Tensor]) -> list[Tensor]:
        """The rows whose error is measured."""
        return [result[:, :CHECKED_ROWS] for result in results]

    def reference(self, operands: dict[str, Tensor | None]) -> list[Tensor]:
        """The op's outputs in fp64 on the checked rows."""
        from dkfuse.kernels.ops import reference_outputs
        from dkfuse.kernels.support import OPERANDS

        length = self.shape[1]
        cut = {
            k: v[:, :CHECKED_ROWS] if v is not None and v.dim() == 3 and v.shape[1] == length else v
            for k, v in operands.items()
        }
        outputs = reference_outputs(self.op, {**cut, **self.values()}, compute=torch.float64)
        return [outputs[name] for name in OPERANDS[self.op][2]]


def _rms(x: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)).to(BF16)


def _eager(
    case: Case,
    x: Tensor,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    branch_weight: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    scale2: Tensor | None = None,
    shift2: Tensor | None = None,
) -> tuple[Tensor, ...]:
    results: list[Tensor] = []
    if branch_weight is not None:
        x = _rms(x) * branch_weight
    if residual is not None and gate is None:
        x = residual + x
        results.append(x)
    elif residual is not None and gate is not None:
        mixed = gate.dtype != x.dtype
        x = (residual.float() + x * gate).type_as(residual) if mixed else residual + gate * x
        results.append(x)
    if "norm" in case.op:
        wide = x.float() if case.parameters == FP32 else x
        if case.norm == "layer":
            a = F.layer_norm(wide, wide.shape[-1:], eps=1e-6)
        else:
            a = _rms(x)
            a = a * weight if weight is not None else a
    elif case.op == "scale_shift":
        a = x
    else:
        return tuple(results)
    if scale is None:
        return (*results, a)
    for factor, offset in ((scale, shift), (scale2, shift2)):
        if factor is not None:
            value = a * (1 + factor)
            results.append((value + offset if offset is not None else value).to(BF16))
    return tuple(results)


_SHAPES: tuple[tuple[str, tuple[int, int, int], dict[str, Any]], ...] = (
    ("Flux, Qwen-Image", (1, 4096, 3072), {}),
    ("Flux joint", (1, 4608, 3072), {}),
    ("Flux text", (1, 512, 3072), {}),
    ("SD3.5-L", (2, 4096, 2432), {}),
    ("SD3-M / 1536", (1, 4096, 1536), {}),
    ("Wan-14B 480p", (1, 32760, 5120), {"parameters": FP32}),
    ("Wan-1.3B 480p", (1, 32760, 1536), {"parameters": FP32}),
    ("DiT-XL/2", (1, 256, 1152), {}),
    ("Z-Image", (1, 4096, 3840), {"norm": "rms", "weight": True, "shift": False}),
    ("HunyuanVideo", (1, 32760, 3072), {}),
    ("LTX per token", (1, 6144, 2048), {"norm": "rms", "per_token": True}),
)

CASES: tuple[Case, ...] = (
    *(Case(name, "norm_modulate", shape, **more) for name, shape, more in _SHAPES),
    *(Case(name, "residual_norm_modulate", shape, **more) for name, shape, more in _SHAPES),
    Case(
        "Z-Image 4096x3840 sandwich",
        "residual_norm_modulate",
        (1, 4096, 3840),
        norm="rms",
        weight=True,
        shift=False,
        branch=True,
    ),
    *(
        Case(f"{name} RMSNorm", op, shape, norm="rms", weight=True, alone=True)
        for op in ("norm_modulate", "residual_norm_modulate")
        for name, shape in (("Z-Image", (1, 4096, 3840)), ("LTX", (1, 8064, 2048)))
    ),
    Case("Mochi heads, short rows", "norm_modulate", (1, 44520 * 24, 128), norm="rms", weight=True, alone=True),
    Case("SD3.5-L dual", "norm_modulate_dual", (2, 4096, 2432)),
    Case("SD3.5-L dual", "residual_norm_modulate_dual", (2, 4096, 2432)),
    Case("Flux, Qwen-Image", "gated_residual", (1, 4096, 3072)),
    Case("Wan-14B 480p", "gated_residual", (1, 32760, 5120), parameters=FP32),
    Case("LTX per token", "scale_shift", (1, 6144, 2048), per_token=True),
)
