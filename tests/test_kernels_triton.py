"""The Triton kernels against the plain torch ops, on CPU under Triton's interpreter.

The interpreter is chosen when triton is imported, so the tests run in a process of their own with TRITON_INTERPRET=1;
outside it this file holds one test, which starts that process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from .interpreter import INTERPRETED, run_interpreted
from .norm_calls import by_name
from .tensors import random

pytest.importorskip("triton")

if not INTERPRETED:

    def test_under_the_interpreter() -> None:
        run_interpreted(__file__)

else:
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from dkfuse.kernels import ops
    from dkfuse.kernels.configs import Config
    from dkfuse.kernels.launch import plan, run
    from dkfuse.kernels.picks import PICKED
    from dkfuse.kernels.rounding import ALL_ROUNDINGS, Rounding
    from dkfuse.kernels.support import OPERANDS, supports
    from dkfuse.kernels.tables import TABLED, table_of

    DTYPES = (torch.bfloat16, torch.float16, torch.float32)
    TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 3e-6}

    def ours(op: str, arguments: dict[str, Any], config: Config | None = None) -> dict[str, torch.Tensor]:
        """The op's outputs by its Triton kernel, poisoned first."""
        outputs = ops._empty_outputs(op, arguments)
        for tensor in outputs.values():
            tensor.fill_(float("nan"))
        written = {k: v for k, v in outputs.items() if k != "sum" or arguments["sum_dtype"] is not None}
        run(plan(op, arguments, written, sm_count=4, config=config), {**arguments, **written})
        return outputs

    def plain(op: str, arguments: dict[str, Any]) -> dict[str, torch.Tensor]:
        return by_name(op, ops._plain(op, arguments))

    def assert_same(op: str, arguments: dict[str, Any], config: Config | None = None) -> None:
        expected, actual = plain(op, arguments), ours(op, arguments, config)
        for name, value in expected.items():
            assert actual[name].shape == value.shape
            assert actual[name].dtype == value.dtype
            if value.numel() == 0:
                continue
            # A rounding that falls on the other side of a tie moves later values by one step of the rounded dtype; to
            # bf16 the interpreter truncates, and one kernel rounds up to nine times.
            coarsest = arguments["x"].dtype if arguments["roundings"] else value.dtype
            tolerance = (5 if arguments["roundings"] else 3) * max(TOLERANCE[value.dtype], TOLERANCE[coarsest])
            torch.testing.assert_close(actual[name], value, rtol=tolerance, atol=tolerance * 4, equal_nan=True)

    def strided(draw: Any, shape: tuple[int, ...], dtype: torch.dtype, dense_rows: bool) -> torch.Tensor:
        """A tensor of `shape` whose memory layout is drawn: permuted outer dims, padding, an offset, inner stride."""
        seed = draw(st.integers(0, 2**16))
        generator = torch.Generator().manual_seed(seed)
        order = draw(st.permutations(range(len(shape) - 1))) if len(shape) > 1 else []
        pad = draw(st.integers(0, 3))
        inner = 1 if dense_rows else draw(st.sampled_from([1, 1, 2, 6]))
        sizes = [shape[i] for i in order] + [(shape[-1] + pad) * inner]
        storage = torch.randn(sizes, generator=generator).to(dtype)
        view = storage[..., pad * inner :: inner]
        return view.permute([*(list(order).index(i) for i in range(len(order))), len(order)])

    def branches(draw: Any) -> dict[str, Any]:
        return {
            "branch_norm": draw(st.sampled_from(["none", "layer", "rms"])),
            "branch_eps": draw(st.sampled_from([1e-5, 1e-2])),
            "branch_weight_offset": draw(st.sampled_from([0.0, 1.0])),
        }

    def picks(draw: Any, shape: tuple[int, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        """A mask of rows or their numbers, and rows in place of some gates, scales and shifts."""
        kept = shape[draw(st.integers(0, len(shape) - 1)) : -1]
        sizes = [draw(st.sampled_from([1, size])) for size in kept]
        dtype = draw(st.sampled_from([torch.bool, torch.int32, torch.int64]))
        count = 2 if dtype == torch.bool else draw(st.integers(1, 4))
        number = strided(draw, (*sizes, 1), torch.float32, False).abs().mul(7).long() % count
        pairs: dict[str, Any] = {"pick": number.to(dtype)}
        for name in PICKED:
            operand = arguments.get(name)
            if operand is not None and draw(st.booleans()):
                padded = (count, *(1,) * (len(shape) - operand.dim()), *operand.shape)
                pairs[name] = strided(draw, padded, operand.dtype, False)
        return pairs

    def tables(draw: Any, shape: tuple[int, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        """Rows added to some gates, scales and shifts."""
        rows = {}
        for name in TABLED:
            if arguments.get(name) is not None and draw(st.booleans()):
                kept = shape[draw(st.integers(0, len(shape))) :]
                sizes = tuple(size if draw(st.booleans()) else 1 for size in kept)
                dtype = draw(st.sampled_from(DTYPES))
                rows[table_of(name)] = strided(draw, sizes, dtype, False) if sizes else torch.randn(()).to(dtype)
        return rows

    @st.composite
    def calls(draw: Any) -> tuple[str, dict[str, Any], Config | None]:
        op = draw(st.sampled_from(sorted(ops.OPS)))
        rank = draw(st.integers(0, 3))
        outer = tuple(draw(st.sampled_from([1, 2, 3])) for _ in range(rank))
        width = draw(st.sampled_from([1, 2, 7, 8, 24, 33]))
        shape = (*outer, width)
        full, broadcast, _ = OPERANDS[op]
        arguments: dict[str, Any] = {name: strided(draw, shape, draw(st.sampled_from(DTYPES)), True) for name in full}
        for name in broadcast:
            if draw(st.integers(0, 3)) == 0:
                arguments[name] = None
                continue
            kept = draw(st.integers(0, rank + 1))
            sizes = shape[len(shape) - kept :] if kept else ()
            sizes = tuple(1 if draw(st.booleans()) and size != width else size for size in sizes)
            if sizes and draw(st.integers(0, 7)) == 0:
                sizes = (*sizes[:-1], 1)
            dtype = draw(st.sampled_from(DTYPES))
            arguments[name] = strided(draw, sizes, dtype, name == "x2") if sizes else torch.randn(()).to(dtype)
        if arguments.get("x2") is None:
            arguments["gate2"] = None
        if draw(st.integers(0, 3)) == 0:
            arguments.update(tables(draw, shape, arguments))
        if draw(st.integers(0, 3)) == 0:
            arguments.update(picks(draw, shape, arguments))
        if "weight" in broadcast:
            arguments.update(
                norm=draw(st.sampled_from(["layer", "rms"])),
                eps=draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
                weight_offset=draw(st.sampled_from([0.0, 1.0])),
            )
        if "branch_weight" in broadcast:
            arguments.update(branches(draw))
            if arguments["branch_norm"] == "none":
                arguments["branch_weight"] = None
        if "scale" in broadcast:
            arguments["scale_offset"] = draw(st.sampled_from([0.0, 1.0]))
        if "sum" in OPERANDS[op][2]:
            arguments["sum_dtype"] = draw(st.sampled_from([None, *DTYPES]))
        arguments["out_dtype"] = draw(st.sampled_from(DTYPES))
        arguments["roundings"] = draw(st.sampled_from([0, 0, ALL_ROUNDINGS, draw(st.integers(0, ALL_ROUNDINGS))]))
        chunk = draw(st.sampled_from([4, 8, 16]))
        config = Config(chunk=chunk, chunks=-(-width // chunk), num_warps=1)
        return op, arguments, draw(st.sampled_from([None, config]))

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(calls())
    def test_kernel_means_what_the_op_means(call: tuple[str, dict[str, Any], Config | None]) -> None:
        op, arguments, config = call
        if arguments["x"].shape[-1] == 1 and "layer" in (arguments.get("norm"), arguments.get("branch_norm")):
            return  # the variance of one element is rounding noise
        assert supports(op, arguments) is None or supports(op, arguments).code == "outer_dims"
        if supports(op, arguments) is None:
            assert_same(op, arguments, config)

    def norm_call(x: torch.Tensor, **operands: Any) -> dict[str, Any]:
        defaults = {"weight": None, "bias": None, "scale": None, "shift": None, "weight_offset": 0.0}
        values = {"scale_offset": 1.0, "norm": "layer", "eps": 1e-6, "out_dtype": x.dtype, "roundings": 0}
        return {"x": x, **defaults, **values, **operands}

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.data())
    def test_branch_norms_at_real_widths(data: Any) -> None:
        """Odd widths and widths of the models with sandwich norms, in the tuned configuration."""
        draw = data.draw
        width = draw(st.sampled_from([72, 1003, 1536, 2304, 3840]))
        dtype, parameters = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
        seeds = iter(range(draw(st.integers(0, 1000)) * 20, 10**6))
        x, residual = (random(2, 3, width, dtype=dtype, seed=next(seeds)) for _ in range(2))
        vectors = random(2, 1, 5 * width, dtype=parameters, seed=next(seeds)).chunk(5, dim=-1)
        gate, weight, branch_weight, branch_bias = (
            draw(st.sampled_from([None, tensor]))
            for tensor in (vectors[0].tanh(), *(random(width, dtype=parameters, seed=next(seeds)) for _ in range(3)))
        )
        arguments = norm_call(
            x, residual=residual, gate=gate, branch_bias=branch_bias, weight=weight, scale=vectors[1], shift=vectors[2]
        )
        arguments.update(branches(draw), norm=draw(st.sampled_from(["layer", "rms"])), sum_dtype=dtype)
        arguments["branch_weight"] = branch_weight if arguments["branch_norm"] != "none" else None
        arguments["roundings"] = draw(st.sampled_from([0, 128, 384, 1024, ALL_ROUNDINGS]))
        assert_same("residual_norm_modulate", arguments)
        second = {"scale2": vectors[3], "shift2": vectors[4]}
        assert_same("residual_norm_modulate_dual", {**arguments, **second})

    @pytest.mark.parametrize("branch_norm", ["layer", "rms"])
    def test_masked_lanes_do_not_count_in_the_branch(branch_norm: str) -> None:
        x = random(3, 37, dtype=torch.float32) + 100
        more = {
            "residual": x * 2,
            "gate": random(dtype=torch.float32),
            "branch_weight": random(37),
            "sum_dtype": x.dtype,
        }
        for chunk in (8, 16, 32, 64):
            config = Config(chunk=chunk, chunks=-(-37 // chunk), num_warps=1)
            call = norm_call(x, **more, branch_norm=branch_norm, branch_eps=1e-6, branch_weight_offset=1.0)
            assert_same("residual_norm_modulate", call, config)

    @pytest.mark.parametrize("bias", [random(37, dtype=torch.float32), torch.tensor(3.0)])
    @pytest.mark.parametrize("branch_norm", ["none", "layer", "rms"])
    def test_a_bias_does_not_fill_masked_lanes(branch_norm: str, bias: torch.Tensor) -> None:
        """One number is a bias of every lane that is loaded, also of those past the row's end."""
        x = random(3, 37, dtype=torch.float32) + 100
        more = {"residual": x * 2, "branch_bias": bias, "branch_weight": None, "sum_dtype": x.dtype}
        for chunk in (8, 16, 32, 64):
            config = Config(chunk=chunk, chunks=-(-37 // chunk), num_warps=1)
            call = norm_call(x, **more, gate=None, branch_norm=branch_norm, branch_eps=1e-6)
            assert_same("residual_norm_modulate", call, config)

    @pytest.mark.parametrize("x2", [random(3, 37, dtype=torch.float32), torch.tensor(3.0)])
    @pytest.mark.parametrize("branch_norm", ["none", "layer"])
    def test_a_second_branch_does_not_fill_masked_lanes(branch_norm: str, x2: torch.Tensor) -> None:
        x = random(3, 37, dtype=torch.float32) + 100
        more = {"residual": x * 2, "branch_weight": None, "sum_dtype": x.dtype, "x2": x2}
        for gate2 in (None, torch.tensor(2.0), random(37, seed=3)):
            for chunk in (8, 16, 32, 64):
                config = Config(chunk=chunk, chunks=-(-37 // chunk), num_warps=1)
                call = norm_call(x, **more, gate=None, gate2=gate2, branch_norm=branch_norm, branch_eps=1e-6)
                assert_same("residual_norm_modulate", call, config)

    @pytest.mark.parametrize("branch_norm", ["none", "rms"])
    def test_picked_rows(branch_norm: str) -> None:
        """As Qwen-Image-Edit lays them out: two halves of the batch dim, slices of one vector."""
        x, vectors = random(2, 5, 40), random(4, 1, 5 * 40, seed=1).reshape(2, 2, 1, 200).chunk(5, dim=-1)
        mask = random(2, 5, 1, seed=2) > 0
        pairs = dict(zip(("gate", "scale", "shift", "scale2", "shift2"), vectors, strict=True))
        more = {"residual": random(2, 5, 40, seed=3), "pick": mask, "sum_dtype": x.dtype, "branch_weight": None}
        call = norm_call(x, **more, **pairs, branch_norm=branch_norm, branch_eps=1e-6)
        assert_same("residual_norm_modulate_dual", call)
        chosen = {name: torch.where(mask, *pair) for name, pair in pairs.items()}
        same = ours("residual_norm_modulate_dual", {**call, **chosen, "pick": None})
        for name, value in ours("residual_norm_modulate_dual", call).items():
            assert torch.equal(value, same[name])

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_rows_picked_by_number(dtype: torch.dtype) -> None:
        """As MiniMax-H3 lays them out: slices of one vector for each timestep and modality, a number for each token."""
        x, vectors = random(7, 40), random(3, 5 * 40, seed=1).unsqueeze(1).chunk(5, dim=-1)
        numbers = torch.tensor([2, 0, 1, 1, 2, 0, 2], dtype=dtype).unsqueeze(1)
        rows = dict(zip(("gate", "scale", "shift", "scale2", "shift2"), vectors, strict=True))
        call = norm_call(x, residual=random(7, 40, seed=3), pick=numbers, sum_dtype=x.dtype, branch_weight=None, **rows)
        assert_same("residual_norm_modulate_dual", call)
        chosen = {name: row[numbers[:, 0], 0] for name, row in rows.items()}
        same = ours("residual_norm_modulate_dual", {**call, **chosen, "pick": None})
        for name, value in ours("residual_norm_modulate_dual", call).items():
            assert torch.equal(value, same[name])

    def test_branch_roundings_are_separate() -> None:
        """Each flag alone is the reference with that flag: fp16, the interpreter truncates to bf16."""
        half = torch.float16
        x, h = random(2, 3, 40, dtype=half), random(2, 3, 40, dtype=half, seed=1)
        more = {
            "residual": h,
            "gate": random(2, 1, 40, dtype=half, seed=2),
            "branch_weight": random(40, dtype=half, seed=3),
        }
        common = {"branch_norm": "rms", "branch_eps": 1e-6, "branch_weight_offset": 0.0, "sum_dtype": torch.float32}
        sums = {}
        for flag in (0, int(Rounding.BRANCH), int(Rounding.BRANCH_WEIGHTED)):
            call = norm_call(x, **more, **common, norm="rms", roundings=flag)
            sums[flag] = ours("residual_norm_modulate", call)["sum"]
            expected = plain("residual_norm_modulate", call)["sum"]
            close = torch.isclose(sums[flag], expected, rtol=2e-6, atol=2e-6)
            assert close.float().mean() > 0.98  # the rest fell on the other side of a tie
        assert not torch.allclose(sums[0], sums[int(Rounding.BRANCH)], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(sums[int(Rounding.BRANCH)], sums[int(Rounding.BRANCH_WEIGHTED)], rtol=1e-5, atol=1e-5)

    def test_pointwise_roundings_are_eagers() -> None:
        """In fp16: the interpreter truncates to bf16 instead of rounding. bf16 is checked on the GPU."""
        half = torch.float16
        x, h = random(2, 3, 40, dtype=half), random(2, 3, 40, dtype=half, seed=1)
        gate, scale, shift = (random(2, 1, 40, dtype=half, seed=i) for i in (2, 3, 4))
        both = int(Rounding.GATE_PRODUCT | Rounding.SUM)
        call = {"x": x, "residual": h, "gate": gate, "out_dtype": x.dtype, "roundings": both}
        assert torch.equal(ours("gated_residual", call)["out"], h + gate * x)
        bias = random(40, dtype=half, seed=5)
        call.update(branch_bias=bias, roundings=both | int(Rounding.BRANCH_BIAS))
        assert torch.equal(ours("gated_residual", call)["out"], h + gate * (x + bias))
        both = int(Rounding.ONE_PLUS | Rounding.PRODUCT)
        call = {"x": x, "scale": scale, "shift": shift, "scale_offset": 1.0, "out_dtype": x.dtype, "roundings": both}
        assert torch.equal(ours("scale_shift", call)["out"], x * (1 + scale) + shift)

    def test_roundings_of_a_second_branch_are_eagers() -> None:
        """In fp16, for the same reason."""
        half = torch.float16
        x, h, x2 = (random(2, 3, 40, dtype=half, seed=i) for i in range(3))
        gate, gate2 = (random(2, 1, 40, dtype=half, seed=i) for i in (3, 4))
        flags = int(Rounding.GATE_PRODUCT | Rounding.SUM | Rounding.GATE_PRODUCT2 | Rounding.SUM2)
        call = norm_call(x, residual=h, gate=gate, branch_weight=None, x2=x2, gate2=gate2, sum_dtype=half)
        call["roundings"] = flags
        assert torch.equal(ours("residual_norm_modulate", call)["sum"], h + gate * x + gate2 * x2)
        call.update(gate2=None)
        assert torch.equal(ours("residual_norm_modulate", call)["sum"], h + gate * x + x2)
        call.update(factor2=0.7)
        assert torch.equal(ours("residual_norm_modulate", call)["sum"], h + gate * x + 0.7 * x2)
        assert_same("residual_norm_modulate", {**call, "gate2": gate2, "roundings": 0})

    @pytest.mark.parametrize("norm", ["layer", "rms"])
    def test_limits(norm: str) -> None:
        """What fp16 cannot hold becomes the largest that it can; NaN stays."""
        half = torch.float16
        x, h = (random(2, 3, 40, dtype=half, seed=i) for i in range(2))
        x[0, 0, 3], h[0, 0, 3] = 60000, 50000
        x[0, 1, 4], h[0, 1, 4] = -60000, -50000
        x[1, 1, 5] = float("nan")
        more = {"gate": None, "branch_weight": None, "sum_dtype": half, "norm": norm}
        for limit in (1.5, 65504.0):
            call = norm_call(x, residual=h, **more, limit=limit)
            total = ours("residual_norm_modulate", call)["sum"]
            assert torch.equal(total.nan_to_num(7.0), (h + x).clip(-limit, limit).nan_to_num(7.0))
            assert_same("residual_norm_modulate", call)
            assert_same("residual_norm_modulate", {**call, "x2": h, "gate2": random(40, dtype=half), "x": x / 2})

    def test_nan_stays_in_its_row() -> None:
        x = random(2, 3, 40)
        x[1, 2, 5] = float("nan")
        out = ours("norm_modulate", norm_call(x, scale=random(40)))["out"]
        assert out[1, 2].isnan().all()
        assert out.isnan().any(-1).sum() == 1

    @pytest.mark.parametrize("norm", ["layer", "rms"])
    def test_masked_lanes_do_not_count(norm: str) -> None:
        """The last chunk is partly masked: zeros there must not enter the mean or the variance."""
        x = random(3, 37, dtype=torch.float32) + 100
        for chunk in (8, 16, 32, 64):
            config = Config(chunk=chunk, chunks=-(-37 // chunk), num_warps=1)
            assert_same("norm_modulate", norm_call(x, norm=norm), config)

    def test_offsets_beyond_2_31_elements() -> None:
        """Only the touched pages of the storage exist."""
        step = 2**31 + 64
        storage = torch.empty(step + 128, dtype=torch.bfloat16)
        x = storage.as_strided((2, 2, 40), (step, 40, 1))
        x.copy_(random(2, 2, 40))
        assert_same("norm_modulate", norm_call(x, scale=random(2, 1, 40, seed=1)))

    def test_writing_into_a_slice_by_offset() -> None:
        x, shift = random(2, 3, 40), random(2, 1, 40, seed=1)
        call = norm_call(x, shift=shift)
        buffer = torch.zeros(2, 8, 40, dtype=x.dtype)
        slot = buffer[:, :3]
        run(plan("norm_modulate", call, {"out": slot}, sm_count=4, offsets={"out": 5 * 40}), {**call, "out": buffer})
        torch.testing.assert_close(buffer[:, 5:], plain("norm_modulate", call)["out"], rtol=2e-2, atol=2e-2)
        assert not buffer[:, :5].any()
