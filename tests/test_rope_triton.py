"""The Triton kernel of norm_rope against plain torch, on CPU under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import itertools
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

    from dkfuse.kernels import ops
    from dkfuse.kernels.launch import plan, run
    from dkfuse.kernels.rope_configs import RopeConfig
    from dkfuse.kernels.rope_launch import Call, plan_group
    from dkfuse.kernels.rope_support import TABLES, supports_rope, with_defaults
    from dkfuse.kernels.rounding import Rounding

    BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
    TOLERANCE = {BF16: 2**-7, FP16: 2**-9, FP32: 3e-6}
    B, S, H = 2, 3, 5

    def assert_close(actual: torch.Tensor, expected: torch.Tensor, coarsest: torch.dtype) -> None:
        tolerance = 3 * max(TOLERANCE[expected.dtype], TOLERANCE[coarsest])
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 4, equal_nan=True)

    def check(arguments: dict[str, Any], config: RopeConfig | None = None) -> torch.Tensor:
        """The kernel writes what the op means, into poisoned memory."""
        reason = supports_rope(arguments)
        assert reason is None, reason
        out = ops._empty_outputs("norm_rope", arguments)["out"]
        out.fill_(float("nan"))
        run(plan("norm_rope", arguments, {"out": out}, sm_count=4, config=config), {**arguments, "out": out})
        coarsest = arguments["x"].dtype if arguments["roundings"] else out.dtype
        assert_close(out, ops._plain("norm_rope", arguments), coarsest)
        return out

    @pytest.mark.parametrize("norm", ["none", "rms", "layer"])
    @pytest.mark.parametrize("rotation", ["interleaved", "half"])
    def test_every_combination(norm: str, rotation: str) -> None:
        x = random(2, 2, 3, 16)
        space = itertools.product(TABLES, [16, 12], [None, 2] if norm != "none" else [None], [None, [0, 2, 1, 3]])
        for kind, r, across, order in space:
            if order is not None and kind != "half":
                continue
            more = {"weight": random(*((3, 16) if across else (16,)), seed=5), "weight_offset": 1.0}
            more["bias"] = random(16, dtype=FP32, seed=6) if norm == "layer" else None
            rope = tables(kind, r, 2, 1, rotation=rotation)
            arguments = call_of(x, norm=norm, eps=1e-5, across=across, order=order, **more, **rope)
            check(arguments)
            check({**arguments, "norm_last": True})

    @pytest.mark.parametrize("d", [2, 16, 40, 72, 88, 96, 112, 128])
    @pytest.mark.parametrize("rotation", ["none", "interleaved", "half"])
    def test_head_dims(d: int, rotation: str) -> None:
        x = random(1, 2, 3, d, dtype=FP32) + 3
        rope = tables("half", d, 2, 1, rotation=rotation) if rotation != "none" else {}
        check(call_of(x, norm="layer", weight=random(d), **rope))
        check(call_of(x, norm="rms", across=2, weight=random(3, d), **rope))

    @pytest.mark.parametrize("shape", [(3, 1, 16), (3, 16), (2, 1, 1, 16)])
    @pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
    def test_weights_of_other_dims_than_the_last_two(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
        """A weight per head where heads come before tokens, and one per sample."""
        x = random(*(tuple((2, 3, 3, 16)[d] for d in order))).permute(order)
        weight = random(*shape, seed=5)
        check(call_of(x, norm="rms", eps=1e-5, weight=weight, **tables("half", 16, 3, rotation="interleaved")))

    @pytest.mark.parametrize("heads", [1, 7, 12, 20, 24, 30, 38, 40])
    @pytest.mark.parametrize("across", [None, 2])
    def test_head_counts(heads: int, across: int | None) -> None:
        x = random(1, 2, heads, 64, dtype=FP32) + 1
        check(call_of(x, norm="layer", across=across, weight=random(heads, 64), **tables("half", 64, 2, 1)))
        if across is None:
            check(call_of(x, **tables("half", 64, 2, 1, rotation="half")), RopeConfig(8, 2, 1, repeat=False))

    @pytest.mark.parametrize("rows", [1, 4, 16])
    @pytest.mark.parametrize("blocks", [1, 3])
    @pytest.mark.parametrize("repeat", [True, False])
    def test_tiles_that_do_not_fit(rows: int, blocks: int, repeat: bool) -> None:
        """Masked rows and columns count in no statistic, whatever the tile."""
        config = RopeConfig(rows, blocks, 1, repeat=repeat)
        x = random(1, 2, 7, 24, dtype=FP32) + 10
        rope = tables("full", 24, 2, 1)
        for rotation, norm in itertools.product(("interleaved", "half"), ("rms", "layer")):
            more = {"weight": random(24), "norm": norm, **rope, "rotation": rotation}
            for last in (False, True):
                check(call_of(x, norm_last=last, **more), config)
                if rows * blocks >= 7:
                    check(call_of(x, norm_last=last, across=2, **more), config)
        check(call_of(x, norm="layer"), config)

    def test_layouts() -> None:
        """Packed projections, heads before tokens, padded rows and permuted batches are read in place."""
        rope = tables("half", 16, S, 1)
        packed = random(B, S, 3, H, 16)
        check(call_of(packed[:, :, 1], norm="rms", **rope))
        check(call_of(packed.unbind(2)[2], norm="rms", across=2, **rope))
        heads_first = random(B, S, H, 16).transpose(1, 2)  # BSHD in memory
        table = tables("half", 16, S)
        check(call_of(heads_first, norm="rms", **table))
        check(call_of(heads_first, norm="rms", order=[0, 2, 1, 3], **table))
        check(call_of(heads_first, norm="rms", across=1, weight=random(H, 1, 16), **table))
        check(call_of(random(B, H, S, 16), norm="rms", **table))  # BHSD in memory
        check(call_of(random(B, H, S, 16), norm="layer", across=1, **table))
        check(call_of(random(B, S, H, 24)[..., 8:], norm="rms", **rope))
        check(call_of(random(S, B, H, 16).transpose(0, 1), norm="rms", **rope))
        check(call_of(random(S, H, 16), norm="rms", **rope))
        check(call_of(random(16), norm="rms"))
        check(call_of(random(2, 2, S, H, 16), norm="rms", **rope))
        check(call_of(random(B, S, 1, 16).expand(B, S, H, 16), norm="rms", across=2, **rope))

    @pytest.mark.parametrize("outer", [(), (S, 1), (1, S, 1), (B, S, 1), (S, H), (1, 1, H), (B, S, H), (B, 1, 1)])
    @pytest.mark.parametrize("kind", list(TABLES))
    def test_tables(outer: tuple[int, ...], kind: str) -> None:
        x = random(B, S, H, 16, dtype=FP32)
        for rotation, dtype in itertools.product(("interleaved", "half"), (FP32, BF16)):
            check(call_of(x, **tables(kind, 16, *outer, rotation=rotation, dtype=dtype)))

    def test_per_head_tables_before_tokens() -> None:
        rope = tables("half", 16, B, H, S)
        check(call_of(random(B, H, S, 16), norm="rms", **rope))
        check(call_of(random(B, S, H, 16).transpose(1, 2), norm="rms", **rope, order=[0, 2, 1, 3]))

    def test_strided_tables() -> None:
        """Every second column of a table, one side of an unbound pair, parts of a joint table."""
        x = random(B, S, H, 16)
        wide = random(S, 1, 32, dtype=FP32)
        rope = {"rotation": "interleaved", "tables": "half"}
        check(call_of(x, cos=wide[..., :16:2], sin=wide[..., 17::2], **rope))
        cos, sin = random(2, S, 1, 8, dtype=FP32).unbind(0)
        check(call_of(x, cos=cos, sin=sin[:1].expand(S, 1, 8), **rope))
        check(call_of(x, cos=random(S, 1, 1, dtype=FP32).expand(S, 1, 8), sin=sin, **rope))
        check(call_of(x, cos=cos, sin=random(S, H, 8), **rope, weight=random(H, 1), norm="rms"))

    def test_fp64_tables() -> None:
        """Exact to the last bit of fp32, which fp32 arithmetic would not be."""
        x = random(B, S, H, 16, dtype=FP32)
        for kind, rotation in itertools.product(TABLES, ("interleaved", "half")):
            arguments = call_of(x, **tables(kind, 12, S, 1, dtype=FP64, rotation=rotation))
            assert torch.equal(check(arguments), ops._plain("norm_rope", arguments))
            check({**arguments, "norm": "layer", "eps": 1e-5, "norm_last": True})
        check(call_of(x.to(BF16), norm="rms", **tables("complex", 16, S, 1, dtype=FP64)))

    @pytest.mark.parametrize("d", [1280, 2048])
    @pytest.mark.parametrize("rotation", ["none", "interleaved", "half"])
    def test_flat_rows(d: int, rotation: str) -> None:
        """Rows without heads; those beyond 1024 columns are cut, tables and weights with them."""
        for kind in TABLES if d == 1280 else ("full",):
            rope = tables(kind, d, 1, S, rotation=rotation) if rotation != "none" else {}
            x = random(2, S, d, dtype=FP32) + 1
            check(call_of(x, norm="rms", weight=random(d), **rope))
            check(call_of(x, norm="rms", weight=random(d), norm_last=True, **rope))
        check(call_of(x, norm="layer", weight=random(1), bias=random(d), **rope))
        check(call_of(x, norm="layer", weight=random(1), bias=random(d), norm_last=True, **rope))
        check(call_of(x, **{**tables("half", d - 2, S), "rotation": "interleaved"}))
        check(call_of(x, **rope))

    def test_dtypes() -> None:
        for a, b, d in itertools.product((BF16, FP16, FP32), repeat=3):
            c = BF16 if a == FP32 else FP32
            rope = tables("half", 16, S, 1, dtype=b)
            check(call_of(random(1, S, H, 16, dtype=a), norm="rms", weight=random(16, dtype=c), **rope, out_dtype=d))

    def test_roundings() -> None:
        """In fp16: the interpreter truncates to bf16 instead of rounding. The rotation alone is eager's bits."""
        x, cos, sin = (random(*size, dtype=FP16, seed=9) for size in ((B, S, H, 16), (S, 1, 16), (S, 1, 16)))
        rope = {"cos": cos, "sin": sin, "rotation": "half", "tables": "full"}
        first, second = x.chunk(2, -1)
        eager = x * cos + torch.cat((-second, first), -1) * sin
        assert torch.equal(check(call_of(x, **rope, roundings=int(Rounding.ROTATION))), eager)
        weights = {"weight": random(16, dtype=FP16), "bias": random(16, dtype=FP16, seed=1)}
        for flags in (4, 8, 16, 28, 540):
            check(call_of(x, norm="layer", **weights, **rope, roundings=flags))
        ours = check(call_of(x, norm="rms", **rope, norm_last=True, out_dtype=FP32, roundings=512 + 2048))
        expected = eager.float() * torch.rsqrt(eager.float().square().mean(-1, keepdim=True))
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)

    def test_nan_and_infinity() -> None:
        x = random(1, S, H, 16)
        x[0, 1, 2, 4] = float("nan")
        for rotation in ("interleaved", "half"):
            rope = tables("half", 12, S, 1, rotation=rotation)
            assert check(call_of(x, **rope)).isnan().sum() == 2
            assert check(call_of(x, norm="rms", **rope)).isnan().sum() == 16
            assert check(call_of(x, norm="layer", across=2, **rope)).isnan().sum() == 16 * H
            assert check(call_of(x, norm="rms", norm_last=True, **rope)).isnan().sum() == 16
        x[..., 12:] = float("inf")
        assert not check(call_of(x[:, :1], **tables("half", 12, 1, 1))).isnan().any()
        rope = tables("half", 16, 1, 1)
        rope["cos"][..., 3] = float("inf")
        check(call_of(random(1, S, H, 16), norm="rms", across=2, norm_last=True, **rope))

    def test_a_copy() -> None:
        x = random(B, H, S, 16)
        assert torch.equal(check(call_of(x, order=[0, 2, 1, 3])), x)

    def test_offsets_beyond_2_31_elements() -> None:
        """Only the touched pages of the storage exist."""
        step = 2**31 + 64
        x = torch.empty(step + 512, dtype=BF16).as_strided((2, 2, 4, 16), (step, 64, 16, 1))
        x.copy_(random(2, 2, 4, 16))
        check(call_of(x, norm="rms", **tables("half", 16, 2, 1)))

    def test_writing_into_a_slice_by_offset() -> None:
        arguments = call_of(random(B, S, H, 16), norm="rms", **tables("half", 16, S, 1))
        buffer = torch.zeros(B, 8, H, 16, dtype=BF16)
        launch = plan("norm_rope", arguments, {"out": buffer[:, :S]}, sm_count=4, offsets={"out": 5 * H * 16})
        run(launch, {**arguments, "out": buffer})
        assert_close(buffer[:, 5:], ops._plain("norm_rope", arguments), BF16)
        assert not buffer[:, :5].any()

    @pytest.mark.parametrize("order", [None, [0, 2, 1, 3]])
    def test_a_group_writes_two_joint_tensors(order: list[int] | None) -> None:
        """Queries and keys of text and image: norms and weights of their own, one table, one launch."""
        text, image, d = 2, 3, 16
        joint = random(text + image, 1, d // 2, dtype=FP32), random(text + image, 1, d // 2, dtype=FP32, seed=1)
        heads = {"q": 6, "k": 2}
        buffers = {n: torch.full((B, text + image, h, d), float("nan"), dtype=BF16) for n, h in heads.items()}
        calls, tensors, expected = [], {}, []
        for start, length in ((0, text), (text, image)):
            for i, (name, count) in enumerate(heads.items()):
                arguments = call_of(random(B, length, count, d, seed=i + length), norm="rms", eps=1e-6)
                arguments.update(weight=random(d, seed=7 * i + length), rotation="interleaved")
                arguments.update(cos=joint[0][start : start + length], sin=joint[1][start : start + length])
                if name == "k" and start:
                    arguments.update(with_defaults({"norm": "layer", "rotation": "none"}), x=arguments["x"])
                offset = start * count * d
                calls.append(Call(arguments, buffers[name][:, start : start + length], offset))
                tensors.update({f"{len(calls) - 1}.{k}": v for k, v in arguments.items()})
                tensors[f"{len(calls) - 1}.out"] = buffers[name]
                expected.append((name, start, length, ops._plain("norm_rope", arguments)))
        alias = {"1.cos": "0.cos", "1.sin": "0.sin", "2.out": "0.out", "3.out": "1.out"}
        launch = plan_group(calls, alias=alias)
        assert not set(alias) & set(launch.tensors.values())
        run(launch, tensors)
        for name, start, length, value in expected:
            assert_close(buffers[name][:, start : start + length], value, BF16)

    @st.composite
    def calls(draw: Any) -> tuple[dict[str, Any], RopeConfig | None]:
        d = draw(st.sampled_from([2, 6, 16, 24, 40]))
        rank = draw(st.integers(1, 4))
        outer = tuple(draw(st.sampled_from([1, 2, 3, 5])) for _ in range(rank - 1))

        def tensor(sizes: tuple[int, ...], dtypes: list[torch.dtype], dense: bool = False) -> torch.Tensor:
            """Broadcast dims, permuted memory, padding and an inner stride are drawn."""
            sizes = sizes if dense else tuple(1 if draw(st.integers(0, 2)) == 0 else s for s in sizes[:-1]) + sizes[-1:]
            sizes = sizes if dense else sizes[draw(st.integers(0, len(sizes) - 1)) :]
            order = [*draw(st.permutations(range(len(sizes) - 1))), len(sizes) - 1]
            inner, pad = 1 if dense else draw(st.sampled_from([1, 1, 2])), draw(st.integers(0, 2))
            storage = random(*[sizes[i] for i in order[:-1]], (sizes[-1] + pad) * inner, seed=draw(st.integers(0, 999)))
            view = storage.to(draw(st.sampled_from(dtypes)))[..., pad * inner :: inner]
            return view.permute([order.index(i) for i in range(len(order))])

        floats = [BF16, FP16, FP32]
        arguments = call_of(tensor((*outer, d), floats, dense=True))
        arguments["norm"] = draw(st.sampled_from(["none", "rms", "layer"]))
        arguments["eps"] = draw(st.sampled_from([1e-6, 1e-2]))
        arguments["weight_offset"] = draw(st.sampled_from([0.0, 1.0]))
        for name in ("weight", "bias"):
            if draw(st.booleans()):
                arguments[name] = tensor((*outer, d), floats)
        if arguments["norm"] != "none" and rank > 1 and draw(st.booleans()):
            arguments["across"] = draw(st.integers(0, rank - 2))
        kind = draw(st.sampled_from([None, *TABLES]))
        if kind is not None:
            r = d if draw(st.booleans()) else 2 * draw(st.integers(1, d // 2))
            width = r * TABLES[kind][0] // TABLES[kind][1]
            precise = [*floats, FP64]
            arguments.update(rotation=draw(st.sampled_from(["interleaved", "half"])), tables=kind)
            arguments["cos"] = tensor((*outer, width), precise)
            arguments["sin"] = tensor((*outer, width), precise) if kind in ("half", "full") else None
        arguments["norm_last"] = draw(st.booleans())
        arguments["order"] = [*draw(st.permutations(range(rank - 1))), rank - 1]
        arguments["out_dtype"] = draw(st.sampled_from(floats))
        rows = draw(st.sampled_from([1, 2, 8]))
        config = RopeConfig(rows, -(-5 // rows), 1, repeat=draw(st.booleans()))
        return arguments, draw(st.sampled_from([None, config]))

    @settings(max_examples=100, deadline=None, derandomize=True)
    @given(calls())
    def test_kernel_means_what_the_op_means(call: tuple[dict[str, Any], RopeConfig | None]) -> None:
        arguments, config = call
        if arguments["norm"] == "layer" and arguments["x"].shape[-1] == 2:
            return  # two elements may be almost equal, and their difference rounding noise
        reason = supports_rope(arguments)
        assert reason is None or reason.code == "outer_dims"
        if reason is None:
            check(arguments, config)
