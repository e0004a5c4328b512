"""What is left to Inductor for the sizes of its rows: traced on fake tensors, of the sizes that models have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import dkfuse
from dkfuse import Settings, Status


class Norm(torch.nn.Module):
    def forward(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, 1e-6) @ out


@pytest.mark.parametrize(
    ("shape", "dtype", "code"),
    [
        ((1, 44520 * 24, 128), torch.bfloat16, "short_rows"),
        ((2, 40960, 256), torch.bfloat16, "short_rows"),
        ((1, 65537, 511), torch.bfloat16, "short_rows"),
        ((1, 65536, 128), torch.bfloat16, None),  # not so many
        ((1, 44520, 512), torch.bfloat16, None),
        ((1, 80000, 512), torch.bfloat16, None),  # not so short
        ((1, 80000, 256), torch.float32, None),
    ],
)
def test_many_short_rows_are_left_to_inductor(shape: tuple[int, ...], dtype: torch.dtype, code: str | None) -> None:
    width = shape[-1]
    with FakeTensorMode():
        tensors = [torch.empty(size, dtype=dtype) for size in (shape, (width,), (width, 8))]
        coverage = dkfuse.coverage(Norm(), *tensors, settings=Settings(target="sm90"))
    (site,) = coverage.sites
    if code is None:
        assert (site.status, site.op) == (Status.FUSED, "dkfuse::norm_modulate")
    else:
        assert (site.status, site.reason.code) == (Status.LEFT_TO_INDUCTOR, code)
        rows = shape[0] * shape[1]
        assert site.reason.message.startswith(f"{rows} rows of {width} elements")
