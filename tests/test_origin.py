"""Where a node comes from: the innermost line of the model's own, wherever its files are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dkfuse.rewriting import origin

FUNCTIONAL = str(Path(torch.nn.functional.__file__))


@pytest.mark.parametrize("model", ["/home/me/model.py", "/home/me/torch/model.py"])
@pytest.mark.parametrize("library", [FUNCTIONAL, "/other/lib/python3.12/site-packages/torch/nn/functional.py"])
def test_the_line_of_the_model(model: str, library: str) -> None:
    node = torch.fx.Graph().placeholder("x")
    assert origin.source(node) is None
    frames = ((model, 3, "forward"), (library, 2900, "layer_norm"))
    node.meta["stack_trace"] = "".join(f'  File "{f}", line {n}, in {name}\n    return x\n' for f, n, name in frames)
    assert origin.source(node) == "model.py:3"
