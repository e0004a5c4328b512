"""What compilers make of the norm kernels: Inductor's analysis, and Triton's PTX, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dkfuse.kernels.launch import plan

from .front_end import ptx_of, written
from .norm_plans import branch_call, meta, norm_call, planned

pytest.importorskip("triton")

BF16 = torch.bfloat16
OP = "residual_norm_modulate"


@pytest.mark.parametrize("branch_norm", ["none", "layer", "rms"])
def test_inductor_sees_that_only_outputs_are_written(sm90: Any, branch_norm: str) -> None:
    """A kernel that its analysis does not understand counts as writing every operand, which costs a copy of each."""
    x, row = torch.empty(2, 8, 96, dtype=BF16), torch.empty(2, 1, 96, dtype=BF16)
    arguments = norm_call(x, residual=x, gate=row, scale=row, shift=row, weight=row, bias=row, sum_dtype=BF16)
    arguments.update(branch_norm=branch_norm, branch_weight=row if branch_norm != "none" else None)
    arguments.update(branch_bias=row[0, 0], scale=torch.stack([row, row]), pick=row[..., :1] > 0)
    launch = planned(arguments, "residual_norm_modulate")
    assert written(launch, {**arguments, "out": x, "sum": x}) == {"sum", "out"}
    arguments.update(gate_table=row, scale_table=row, shift_table=row[0, 0], pick=torch.ones(2, 8, 1).long())
    arguments.update(x2=x, gate2=row, limit=65504.0)
    launch = planned(arguments, "residual_norm_modulate")
    assert written(launch, {**arguments, "out": x, "sum": x}) == {"sum", "out"}


@pytest.mark.parametrize("roundings", [0, 511])
@pytest.mark.parametrize("width", [2304, 3072, 3840])
def test_branch_norms_read_every_row_once(sm90: Any, width: int, roundings: int) -> None:
    launch = planned(branch_call(meta(1, 4096, width), roundings=roundings), "residual_norm_modulate")
    ptx = ptx_of(launch, sm90)
    chunks = launch.constants["CHUNKS"]
    assert sum("ld.global" in line and ".v4." in line for line in ptx.splitlines()) == 6 * chunks
    assert ptx.count("st.global") == 2 * chunks
    assert ".local" not in ptx
    assert "fma.rn.bf16" not in ptx


@pytest.mark.parametrize(("rows", "dtype"), [(2, torch.bool), (6, torch.int64), (6, torch.int32)])
def test_a_picked_row_costs_one_load_more(sm90: Any, rows: int, dtype: torch.dtype) -> None:
    pairs = {name: meta(rows, 1, 1, 3072) for name in ("scale", "shift")}
    launch = planned(norm_call(meta(1, 4096, 3072), **pairs, pick=meta(1, 4096, 1, dtype=dtype)))
    pointer = {torch.bool: "*i1", torch.int64: "*i64", torch.int32: "*i32"}[dtype]
    ptx = ptx_of(launch, sm90, {"pick": pointer})
    chunks = launch.constants["CHUNKS"]
    assert sum("ld.global" in line and ".v4." in line for line in ptx.splitlines()) == 3 * chunks
    assert ptx.count("ld.global") == 3 * chunks + 1
    assert ".local" not in ptx


def test_a_second_branch_is_read_with_wide_accesses(sm90: Any) -> None:
    """FLUX.3's attention and MLP; rows of conditioning that were repeated for all tokens are rows."""
    x, rows = meta(1, 4096, 3072), [meta(1, 1, 3072).expand(1, 4096, 3072) for _ in range(3)]
    arguments = norm_call(x, residual=x, branch_bias=x, sum_dtype=BF16)
    arguments.update(zip(("gate", "scale", "shift"), rows, strict=True))
    launch = planned(arguments, OP)
    assert "gate_s0" not in launch.scalars and launch.constants.get("gate_s0", 0) == 0
    ptx = ptx_of(launch, sm90)
    chunks = launch.constants["CHUNKS"]
    assert sum("ld.global" in line and ".v4." in line for line in ptx.splitlines()) == 6 * chunks
    assert ptx.count("st.global") == 2 * chunks
    assert ".local" not in ptx


@pytest.mark.parametrize("limit", [0.0, 65504.0])
@pytest.mark.parametrize("branch_norm", ["none", "rms"])
def test_a_branch_behind_the_gate_is_read_with_wide_accesses(sm90: Any, branch_norm: str, limit: float) -> None:
    """With a gate of its own and without; only conditioning, which all rows read, is asked to stay in the cache."""
    x = meta(1, 4096, 3072)
    arguments = norm_call(x, residual=x, x2=x, gate=meta(1, 1, 3072), scale=meta(1, 1, 3072), sum_dtype=BF16)
    arguments.update(branch_norm=branch_norm, branch_eps=1e-5, branch_weight=None, limit=limit)
    for more in ({}, {"gate2": meta(1, 1, 3072)}):
        launch = planned({**arguments, **more, "factor2": 0.7}, OP)
        lines = [line for line in ptx_of(launch, sm90).splitlines() if "ld.global" in line or "st.global" in line]
        chunks = launch.constants["CHUNKS"]
        loads = [line for line in lines if "ld.global" in line]
        assert sum(".v4." in line for line in loads) == len(loads) == (5 + len(more)) * chunks
        assert sum("evict_last" in line for line in loads) == (2 + len(more)) * chunks
        assert len(lines) - len(loads) == 2 * chunks
        assert ".local" not in ptx_of(launch, sm90)


def test_roundings_of_a_branch_behind_the_gate_survive_the_compiler(sm90: Any) -> None:
    x, row = meta(1, 64, 256), meta(1, 1, 256)
    arguments = norm_call(x, residual=x, gate=row, x2=x, gate2=row, sum_dtype=BF16, roundings=1 | 2 | 4096 | 8192)
    ptx = ptx_of(planned(arguments, OP), sm90)
    assert "fma.rn.bf16" not in ptx
    plain = ptx_of(planned({**arguments, "roundings": 0}, OP), sm90)
    assert ptx.count("cvt.rn.bf16") > plain.count("cvt.rn.bf16")


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_a_table_is_read_with_wide_accesses_and_without_spills(sm90: Any, dtype: torch.dtype) -> None:
    """Wan2.2-5B: every token has its gate, scale and shift in bf16."""
    x, table = meta(1, 4096, 3072), torch.empty(6, 3072, dtype=dtype, device="meta")
    parts = dict(zip(("gate", "scale", "shift"), meta(1, 4096, 6, 3072).unbind(2), strict=False))
    rows = {f"{name}_table": table[i] for i, name in enumerate(parts)}
    launch = planned(norm_call(x, residual=x, sum_dtype=BF16, branch_weight=None, **parts, **rows), OP)
    ptx = ptx_of(launch, sm90, dict.fromkeys(rows, "*bf16" if dtype == BF16 else "*fp32"))
    wide = sum("ld.global" in line and ".v4." in line for line in ptx.splitlines())
    assert wide == launch.constants["CHUNKS"] * (5 + 3 * dtype.itemsize // 2)
    assert ptx.count("ld.global") == wide and ".local" not in ptx


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_to_wide_accesses_without_spills(sm90: Any, capability: int) -> None:
    from triton.backends.compiler import GPUTarget

    launch = planned(norm_call(meta(1, 4096, 2432), scale=meta(1, 1, 2432), shift=meta(1, 1, 2432)))
    ptx = ptx_of(launch, GPUTarget("cuda", capability, 32))
    chunks = launch.constants["CHUNKS"]
    assert ptx.count("ld.global") == 3 * chunks
    assert sum("ld.global" in line and ".v4." in line for line in ptx.splitlines()) == 3 * chunks
    assert ptx.count("st.global") == chunks
    assert ".local" not in ptx


@pytest.mark.parametrize(("roundings", "bias"), [(3, None), (1027, meta(256))])
def test_roundings_survive_the_compiler(sm90: Any, roundings: int, bias: torch.Tensor | None) -> None:
    """LLVM would contract the rounded product and the next add to one half-precision FMA."""
    x = meta(1, 64, 256)
    arguments = {"x": x, "residual": x, "gate": meta(1, 1, 256), "branch_bias": bias, "out_dtype": BF16}
    arguments["roundings"] = roundings
    launch = plan("gated_residual", arguments, {"out": x}, sm_count=132)
    assert "fma.rn.bf16" not in ptx_of(launch, sm90)
