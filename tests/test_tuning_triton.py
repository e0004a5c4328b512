"""Every candidate computes what the table's choice does, on CPU under Triton's interpreter, in its own process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .interpreter import INTERPRETED, run_interpreted
from .rope_calls import call_of, tables
from .tensors import random

pytest.importorskip("triton")

if not INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from dkfuse.kernels import launch, ops
    from dkfuse.kernels.rope_launch import Call, candidates, plan_group
    from dkfuse.kernels.support import OPERANDS

    BF16, FP32 = torch.bfloat16, torch.float32
    # one rounding of the result that falls on the other side; sums are in another order
    TOLERANCE = {BF16: 2**-7, FP32: 1e-5}

    def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
        for name, value in expected.items():
            tolerance = TOLERANCE[value.dtype]
            torch.testing.assert_close(found[name], value, rtol=tolerance, atol=4 * tolerance)

    def results(op: str, arguments: dict[str, Any], config: Any) -> dict[str, torch.Tensor]:
        outputs = ops._empty_outputs(op, arguments)
        for tensor in outputs.values():
            tensor.fill_(float("nan"))
        planned = launch.plan(op, arguments, outputs, sm_count=4, config=config)
        launch.run(planned, {**arguments, **outputs})
        return outputs

    def check(op: str, arguments: dict[str, Any]) -> None:
        configs = launch.candidates(op, arguments, ops._empty_outputs(op, arguments))
        expected = results(op, arguments, None)
        assert not any(t.isnan().any() for t in expected.values())
        same(results(op, arguments, configs[0]), expected)
        for config in configs[1:]:
            same(results(op, arguments, config), expected)

    @st.composite
    def rows(draw: Any) -> tuple[str, dict[str, Any]]:
        op = draw(st.sampled_from(sorted(ops.OPS)))
        full, broadcast, outputs = OPERANDS[op]
        width = draw(st.sampled_from([1, 6, 33, 72, 130, 257, 520, 1100]))
        dtype = draw(st.sampled_from([BF16, FP32]))
        arguments: dict[str, Any] = {n: random(2, 2, width, dtype=dtype, seed=i) for i, n in enumerate(full)}
        for i, name in enumerate(broadcast):
            present = draw(st.booleans())
            arguments[name] = random(2, 1, width, dtype=FP32, seed=i + 5) if present else None
        if "weight" in broadcast:
            arguments.update(norm=draw(st.sampled_from(["layer", "rms"])), eps=1e-2, weight_offset=1.0)
        if "branch_weight" in broadcast:
            branch = draw(st.sampled_from(["none", "rms", "layer"]))
            arguments.update(branch_norm=branch, branch_eps=1e-2, branch_weight_offset=0.0)
            arguments["branch_weight"] = arguments["branch_weight"] if branch != "none" else None
            arguments["gate2"] = arguments["gate2"] if arguments["x2"] is not None else None
        if "scale" in broadcast:
            arguments["scale_offset"] = 1.0
        if "sum" in outputs:
            arguments["sum_dtype"] = dtype
        return op, {**arguments, "out_dtype": dtype, "roundings": 0}

    @settings(max_examples=14, deadline=None, derandomize=True)
    @given(rows())
    def test_row_kernels(call: tuple[str, dict[str, Any]]) -> None:
        check(*call)

    def heads(
        draw: Any, tokens: int, count: int, d: int, across: bool, dtype: torch.dtype, seed: int
    ) -> dict[str, Any]:
        rotation = draw(st.sampled_from(["none", "interleaved", "half"]))
        rope = (
            tables(draw(st.sampled_from(["half", "full"])), d, tokens, 1, rotation=rotation)
            if rotation != "none"
            else {}
        )
        return call_of(
            random(1, tokens, count, d, dtype=dtype, seed=seed) + 1,
            norm=draw(st.sampled_from(["rms", "layer"])),
            eps=1e-2,
            weight=random(*((count, d) if across else (d,)), dtype=dtype, seed=3),
            across=2 if across else None,
            **rope,
        )

    @st.composite
    def groups(draw: Any) -> list[dict[str, Any]]:
        d, count = draw(st.sampled_from([6, 40, 64, 88, 128])), draw(st.sampled_from([1, 3, 7, 12]))
        across, dtype = draw(st.booleans()), draw(st.sampled_from([BF16, FP32]))
        return [heads(draw, n, count, d, across, dtype, n) for n in draw(st.sampled_from([[2], [2, 3]]))]

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(groups())
    def test_norm_rope(group: list[dict[str, Any]]) -> None:
        if len(group) == 1:
            check("norm_rope", group[0])

        def written(config: Any) -> dict[str, torch.Tensor]:
            outs = [torch.full_like(a["x"], float("nan")) for a in group]
            tensors = {
                f"{i}.{n}": t
                for i, (a, o) in enumerate(zip(group, outs, strict=True))
                for n, t in {**a, "out": o}.items()
            }
            launch.run(plan_group([Call(a, o) for a, o in zip(group, outs, strict=True)], config=config), tensors)
            return {str(i): out for i, out in enumerate(outs)}

        expected = written(None)
        assert not any(t.isnan().any() for t in expected.values())
        for config in candidates([Call(a, a["x"]) for a in group])[1:]:
            same(written(config), expected)
