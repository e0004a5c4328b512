"""sgl-kernel's and FlashInfer's kernels behind our ops: what is refused, and how their contract is met.

The packages need a GPU, so their functions are stood in for by plain torch that holds callers to the contract.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from dkfuse.kernels import peer_norms, provider_flashinfer, provider_sgl
from dkfuse.kernels.ops import reference_outputs
from dkfuse.kernels.registry import Implementation
from dkfuse.kernels.rope_support import with_defaults
from dkfuse.kernels.rounding import Rounding

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
LIMIT = {BF16: 2.4e-3, FP16: 3e-4}
ALL = {(i.provider, i.op): i for i in (*provider_sgl.IMPLEMENTATIONS, *provider_flashinfer.IMPLEMENTATIONS)}
NORMS = [i for (_, op), i in ALL.items() if op == "norm_modulate"]
ADD_NORMS = [i for (_, op), i in ALL.items() if op == "residual_norm_modulate"]
ROTATION = ALL["flashinfer", "norm_rope"]


def random(*size: int, dtype: torch.dtype = BF16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator, dtype=FP64).to(dtype)


def norm_call(x: torch.Tensor, **more: Any) -> dict[str, Any]:
    operands = dict.fromkeys(("bias", "scale", "shift", "pick"))
    values = {"norm": "rms", "eps": 1e-6, "weight_offset": 0.0, "scale_offset": 1.0, "roundings": 0}
    return {"x": x, **operands, **values, "out_dtype": x.dtype, **more}


def add_call(x: torch.Tensor, **more: Any) -> dict[str, Any]:
    branch = {"gate": None, "branch_bias": None, "branch_weight": None, "branch_norm": "none"}
    values = {"branch_eps": 0.0, "branch_weight_offset": 0.0, "sum_dtype": x.dtype}
    return norm_call(x, **{"residual": random(*x.shape, dtype=x.dtype, seed=7), **branch, **values, **more})


X, W = random(2, 5, 64), random(64)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("norm", {"norm": "layer"}),
        ("dtype", {"x": X.float()}),
        ("dtype", {"weight": W.float()}),
        ("dtype", {"out_dtype": FP32}),
        ("rows", {"x": random(2, 5, 128)[..., :64]}),
        ("rows", {"x": random(2, 5, 60), "weight": random(60)}),
        ("rows", {"x": random(1, 16392), "weight": random(16392)}),
        ("weight", {"weight": None}),
        ("weight", {"weight": random(5, 64)}),
        ("weight", {"weight": random(128)[::2]}),
        ("weight", {"weight_offset": 1.0}),
        ("nothing_else", {"bias": W}),
        ("nothing_else", {"scale": W}),
        ("nothing_else", {"shift": W}),
        ("nothing_else", {"pick": torch.ones(2, 5, 1, dtype=torch.bool)}),
        ("nothing_else", {"shift_table": W}),
        ("nothing_else", {"roundings": int(Rounding.NORM)}),
    ],
)
@pytest.mark.parametrize("norm", NORMS, ids=lambda i: i.provider)
def test_norms_refuse(norm: Implementation, code: str, changes: dict[str, Any]) -> None:
    problem = norm.problem(norm_call(**{"x": X, "weight": W, **changes}))
    assert problem is not None
    assert problem.code == code


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("dtype", {"residual": X.float()}),
        ("dtype", {"sum_dtype": FP32}),
        ("rows", {"residual": random(2, 5, 128)[..., ::2]}),
        ("nothing_else", {"gate": W}),
        ("nothing_else", {"branch_bias": W}),
        ("nothing_else", {"x2": X}),
        ("nothing_else", {"limit": 65504.0}),
        ("nothing_else", {"branch_norm": "rms"}),
        ("nothing_else", {"roundings": int(Rounding.SUM)}),
    ],
)
@pytest.mark.parametrize("norm", ADD_NORMS, ids=lambda i: i.provider)
def test_residual_norms_refuse(norm: Implementation, code: str, changes: dict[str, Any]) -> None:
    problem = norm.problem(add_call(**{"x": X, "weight": W, **changes}))
    assert problem is not None
    assert problem.code == code


def test_taken() -> None:
    for norm in NORMS:
        assert norm.problem(norm_call(X, weight=W)) is None
        assert norm.problem({"x": X, "weight": W, "norm": "rms", "eps": 0.0, "out_dtype": BF16}) is None
    for norm in ADD_NORMS:
        assert norm.problem(add_call(X, weight=W)) is None
        assert norm.problem(add_call(X, weight=W, sum_dtype=None)) is None


def held(*tensors: torch.Tensor) -> None:
    """Rows that the kernels take: two dims, dense, on a boundary."""
    for tensor in tensors:
        assert tensor.dim() == 2
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 16 == 0


def rms(z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    assert weight.data_ptr() % 16 == 0
    return z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps) * weight.double()


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    held(x, out)
    out.copy_(rms(x.double(), weight, eps))


def add_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    held(x, residual)
    z = x.double() + residual.double()
    residual.copy_(z)
    x.copy_(rms(z, weight, eps))


def check(op: str, arguments: dict[str, Any], outputs: dict[str, torch.Tensor], run: Any) -> None:
    operands = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    expected = reference_outputs(op, arguments, compute=FP64)
    run(arguments, outputs)
    for name, out in outputs.items():
        assert (out.double() - expected[name]).norm() < LIMIT[out.dtype] * expected[name].norm(), name
    assert all(torch.equal(arguments[name], value) for name, value in operands.items())


def off_boundary(*size: int) -> torch.Tensor:
    """The same as `random`, two bytes behind a 16-byte boundary."""
    flat = torch.empty(int(torch.Size(size).numel()) + 1, dtype=BF16)[1:]
    assert flat.data_ptr() % 16 == 2
    return flat.view(size).copy_(random(*size))


@pytest.mark.parametrize("piece", [peer_norms.PIECE, 3 * 64])
@pytest.mark.parametrize("make", [random, off_boundary])
def test_rows_are_brought_into_the_kernels_form(piece: int, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, from and to any address, into the middle of a bigger tensor, with the operands left alone."""
    monkeypatch.setattr(peer_norms, "PIECE", piece)
    x, weight = make(2, 5, 64), make(64)
    outs = (torch.empty(2, 5, 64, dtype=BF16), torch.empty(2, 9, 64, dtype=BF16)[:, 2:7], off_boundary(2, 5, 64))
    for out in outs:
        arguments = norm_call(x, weight=weight)
        check("norm_modulate", arguments, {"out": out}, lambda a, o: peer_norms.run_norm(norm, a, o, 16))
        arguments, total = add_call(x, weight=weight), torch.empty(2, 6, 64, dtype=BF16)[:, 1:]
        for outputs in ({"out": out, "sum": total}, {"out": out, "sum": torch.empty_like(x)}, {"out": out}):
            run = lambda a, o: peer_norms.run_add_norm(add_norm, a, o, 16)  # noqa: E731
            check("residual_norm_modulate", arguments, outputs, run)


def rope_call(x: torch.Tensor, r: int, rotation: str = "interleaved", **more: Any) -> dict[str, Any]:
    cos, sin = (random(x.shape[-3], 1, r // 2, dtype=FP32, seed=i) for i in (1, 2))
    call = {"x": x, "cos": cos, "sin": sin, "rotation": rotation, "tables": "half", "out_dtype": x.dtype}
    return with_defaults({**call, **more})


Q = random(2, 5, 4, 64)
TABLE = random(5, 1, 64, dtype=FP32)


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("rotation_alone", rope_call(Q, 64, norm="rms")),
        ("rotation_alone", rope_call(Q, 64, weight=W)),
        ("rotation_alone", rope_call(Q, 64, roundings=int(Rounding.ROTATION))),
        ("rotation_alone", with_defaults({"x": Q, "out_dtype": BF16})),
        ("dtype", rope_call(Q.float(), 64)),
        ("dtype", rope_call(Q, 64, out_dtype=FP32)),
        ("heads", rope_call(random(2, 5, 1, 64), 64)),
        ("heads", rope_call(random(2, 5, 4, 96), 96)),
        ("heads", rope_call(random(2, 5, 3, 4, 64)[:, :, 1], 64)),
        ("tables", rope_call(Q, 64, tables="full", cos=TABLE, sin=TABLE)),
        ("tables", rope_call(Q, 48)),
        ("tables", rope_call(Q, 64, cos=TABLE[..., :32].to(BF16), sin=TABLE[..., :32].to(BF16))),
        ("tables", rope_call(Q, 64, cos=TABLE[:1, :, :32], sin=TABLE[:1, :, :32])),
        ("tables", rope_call(Q, 64, cos=random(2, 5, 1, 32, dtype=FP32), sin=random(2, 5, 1, 32, dtype=FP32))),
        ("tables", rope_call(Q, 64, cos=random(5, 4, 32, dtype=FP32), sin=random(5, 4, 32, dtype=FP32))),
        ("call", rope_call(random(2, 5, 64, 4).transpose(2, 3), 64)),
    ],
)
def test_the_rotation_refuses(code: str, arguments: dict[str, Any]) -> None:
    problem = ROTATION.problem(arguments)
    assert problem is not None
    assert problem.code == code


def apply_rope(*, q: Any, k: Any, q_rope: Any, k_rope: Any, cos_sin_cache: Any, pos_ids: Any, interleave: bool) -> None:
    """FlashInfer's meaning. Its vectors may touch 16 bytes behind a row, so there must be a row behind the last one."""
    assert cos_sin_cache.is_contiguous()
    assert cos_sin_cache.dtype == FP32
    assert cos_sin_cache.shape[0] > pos_ids.max()
    assert pos_ids.shape == q.shape[:1] == k.shape[:1]
    cos, sin = cos_sin_cache[pos_ids].double().unsqueeze(1).chunk(2, -1)
    r = cos_sin_cache.shape[1]
    for x, out in ((q, q_rope), (k, k_rope)):
        assert x.shape[1] > 0
        z = x.double()
        a0, a1 = (z[..., 0:r:2], z[..., 1:r:2]) if interleave else (z[..., : r // 2], z[..., r // 2 : r])
        pair = (cos * a0 - sin * a1, cos * a1 + sin * a0)
        turned = torch.stack(pair, -1).flatten(-2) if interleave else torch.cat(pair, -1)
        out.copy_(torch.cat((turned, z[..., r:]), -1))


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The adapter on a FlashInfer of plain torch."""
    modules = {name: ModuleType(name) for name in ("flashinfer", "flashinfer.norm", "flashinfer.rope")}
    modules["flashinfer.norm"].__dict__.update(rmsnorm=norm, fused_add_rmsnorm=add_norm)
    modules["flashinfer.rope"].__dict__["_apply_rope_pos_ids_cos_sin_cache"] = apply_rope
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "dkfuse.kernels.peer_flashinfer", raising=False)
    yield importlib.import_module("dkfuse.kernels.peer_flashinfer")
    sys.modules.pop("dkfuse.kernels.peer_flashinfer", None)


@pytest.mark.parametrize("rotation", ["interleaved", "half"])
@pytest.mark.parametrize("heads", [2, 3, 4])
def test_the_rotation_of_all_heads_of_all_tokens(flashinfer: Any, rotation: str, heads: int) -> None:
    for r, x in ((64, random(2, 5, heads, 64)), (32, random(5, heads, 64, dtype=FP16))):
        arguments = rope_call(x, r, rotation)
        assert ROTATION.problem(arguments) is None
        wide = torch.empty(*x.shape[:-3], 7, *x.shape[-2:], dtype=x.dtype)[..., 1:-1, :, :]
        for out in (torch.empty_like(x), wide):
            check("norm_rope", arguments, {"out": out}, ROTATION.load())


def test_flashinfers_norms(flashinfer: Any) -> None:
    check("norm_modulate", norm_call(X, weight=W), {"out": torch.empty_like(X)}, flashinfer.norm)
    outputs = {"sum": torch.empty_like(X), "out": torch.empty_like(X)}
    check("residual_norm_modulate", add_call(X, weight=W), outputs, flashinfer.add_norm)


def test_another_flashinfer_is_an_import_error(flashinfer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    del sys.modules["flashinfer.rope"].__dict__["_apply_rope_pos_ids_cos_sin_cache"]
    monkeypatch.delitem(sys.modules, "dkfuse.kernels.peer_flashinfer")
    with pytest.raises(ImportError, match="_apply_rope_pos_ids_cos_sin_cache"):
        ROTATION.load()
