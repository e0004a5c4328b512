"""`dkfuse.coverage` of what is no module: functions, also of tensors without memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dkfuse

pytestmark = pytest.mark.usefixtures("fresh_compiler")
SETTINGS = dkfuse.Settings(target="sm90")


def block(x: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_function(device: str) -> None:
    given = [torch.ones(shape, device=device, dtype=torch.bfloat16) for shape in ((2, 64, 128), (2, 1, 128))]
    found = dkfuse.coverage(block, *given, settings=SETTINGS)
    found.assert_fused("norm_modulate", exactly=1)
    assert (found.model, found.target) == ("block", "sm90")
