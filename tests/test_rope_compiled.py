"""What compilers make of the kernel of norm_rope: Inductor's analysis, and Triton's PTX, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dkfuse.kernels.rope_launch import Call, plan_group

from .front_end import ptx_of, written
from .rope_plans import meta, planned, rope_call

pytest.importorskip("triton")

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
FP32_TABLES = {"cos": "*fp32", "sin": "*fp32"}


@pytest.mark.parametrize("rotation", ["none", "interleaved", "half"])
@pytest.mark.parametrize("count", [1, 4])
def test_inductor_sees_that_only_outputs_are_written(sm90: Any, rotation: str, count: int) -> None:
    """A kernel that its analysis does not understand counts as writing every operand, which costs a copy of each."""
    x, table = torch.empty(2, 8, 4, 64, dtype=BF16), torch.empty(8, 1, 48) if rotation != "none" else None
    arguments = {
        "x": x,
        "weight": torch.empty(64),
        "bias": torch.empty(64),
        "cos": table,
        "sin": table,
        "norm": "layer",
    }
    arguments.update(rotation=rotation, tables="full", eps=1e-6, out_dtype=BF16)
    launch = plan_group([Call({**arguments, "across": 2 if i % 2 else None}, x) for i in range(count)])
    tensors = {f"{i}.{k}": v for i in range(count) for k, v in {**arguments, "out": x}.items()}
    assert written(launch, tensors) == {f"out_{i}" for i in range(count)}


@pytest.mark.parametrize("kind", ["half", "full", "complex"])
@pytest.mark.parametrize("heads", [24, 40])
@pytest.mark.parametrize("last", [False, True])
def test_interleaved_pairs_stay_in_registers(sm90: Any, kind: str, heads: int, last: bool) -> None:
    """16 bytes per access, nothing through shared memory, nothing spilled."""
    arguments = rope_call(meta(1, 4096, heads, 128), 4096, 1, tables=kind, norm_last=last)
    if kind != "half":
        arguments.update(cos=meta(4096, 1, 128, dtype=FP32), sin=meta(4096, 1, 128, dtype=FP32))
        arguments.update({"sin": None} if kind == "complex" else {})
    ptx = ptx_of(planned(arguments), sm90, FP32_TABLES)
    loads, stores = ([line for line in ptx.splitlines() if f"{op}.global" in line] for op in ("ld", "st"))
    assert all(".v4." in line for line in (*loads, *stores))
    assert not any(word in ptx for word in (".local", "bar.sync", "st.shared"))


@pytest.mark.parametrize("rotation", ["interleaved", "half"])
@pytest.mark.parametrize("d", [40, 72, 88, 96, 112, 1024])
def test_compiles_for_every_head_dim(sm90: Any, rotation: str, d: int) -> None:
    ptx = ptx_of(planned(rope_call(meta(1, 64, 12, d), 64, 1, rotation=rotation)), sm90, FP32_TABLES)
    assert ".local" not in ptx


def test_a_norm_across_heads_crosses_warps_once(sm90: Any) -> None:
    arguments = rope_call(meta(1, 32760, 40, 128), 1, 32760, 1, across=2, weight=meta(40, 128))
    ptx = ptx_of(planned(arguments), sm90, FP32_TABLES)
    assert ptx.count("st.shared") <= 2  # the warps' sums, and with Triton 3.6 what the first warp makes of them
    assert ".local" not in ptx


def test_fp64_tables_multiply_in_fp64(sm90: Any) -> None:
    tables = {"cos": meta(64, 1, 64, dtype=FP64), "sin": meta(64, 1, 64, dtype=FP64)}
    ptx = ptx_of(planned(rope_call(meta(1, 64, 24, 128), 64, 1, **tables)), sm90, {"cos": "*fp64", "sin": "*fp64"})
    assert ".f64" in ptx
    plain = ptx_of(planned(rope_call(meta(1, 64, 24, 128), 64, 1)), sm90, FP32_TABLES)
    assert ".f64" not in plain


def test_the_roundings_of_a_rotation_survive_the_compiler(sm90: Any) -> None:
    """LLVM would contract a rounded product and the next sum to one half-precision FMA."""
    tables = {"cos": meta(64, 1, 128), "sin": meta(64, 1, 128), "tables": "full", "rotation": "half"}
    ptx = ptx_of(planned(rope_call(meta(1, 64, 24, 128), 64, 1, **tables, roundings=512)), sm90)
    assert "fma.rn.bf16" not in ptx
