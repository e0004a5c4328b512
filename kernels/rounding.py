"""Which intermediates of a fused op are rounded to the activation dtype, as eager PyTorch would round them.

Source: torch promotes, computes in fp32 and rounds once per ATen call; a fused kernel rounds once per value that leaves
it. A flag puts one of eager's roundings back, so one kernel serves both numerics modes.
"""

from __future__ import annotations

from enum import IntFlag


class Rounding(IntFlag):
    """Intermediates rounded to `x.dtype`. 0 is the fused mode: fp32 inside, one rounding per output."""

    NONE = 0
    GATE_PRODUCT = 1  # gate * x
    SUM = 2  # residual + gate * x; the norm then reads the rounded sum
    NORM = 4  # the normalised row, before the weight
    WEIGHTED = 8  # n * (weight_offset + weight)
    AFFINE = 16  # n * (weight_offset + weight) + bias
    ONE_PLUS = 32  # scale_offset + scale
    PRODUCT = 64  # a * (scale_offset + scale)
    BRANCH = 128  # the normalised x, before the branch weight
    BRANCH_WEIGHTED = 256  # n_b(x) * (branch_weight_offset + branch_weight)
    ROTATION = 512  # each of the two products of a rotation
    BRANCH_BIAS = 1024  # x + branch_bias, also what the branch norm reads
    ROTATED = 2048  # the rotated row that a norm behind the rotation reads
    GATE_PRODUCT2 = 4096  # gate2 * x2, factor2 * x2
    SUM2 = 8192  # residual + gate * x + gate2 * x2; the norm then reads that rounded


SECOND_BRANCH = 12  # GATE_PRODUCT and SUM so many bits up are those of the second branch
ALL_ROUNDINGS = sum(int(flag) for flag in Rounding)
