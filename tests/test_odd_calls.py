"""The calls that memcheck watches: every kernel has some, they are right, and a wrong result or a breach of an output's
bounds does not go unnoticed."""

from __future__ import annotations

import pytest
import torch

from dkfuse.kernels import provider_native, registry
from dkfuse.kernels.providers import BUILT_IN
from dkfuse.kernels.registry import Implementation
from dkfuse.kernels.support import OPERANDS

from . import odd_calls
from .gpu import memcheck_calls


@pytest.fixture(autouse=True)
def forget():
    yield
    registry.unregister("mine")


@pytest.mark.parametrize("provider", BUILT_IN)
def test_every_kernel_has_calls(provider):
    ops = {op for name, op in registry.implementations() if name == provider}
    assert ops and ops == {call.op for call in odd_calls.calls(provider)}


def test_every_op_has_calls_with_views_and_with_a_larger_buffer_around():
    assert {call.op for call in odd_calls.CALLS} == set(OPERANDS)
    views, joints = set(), set()
    for call in odd_calls.CALLS:
        arguments, outputs = call.build()
        x = arguments["x"]
        views |= {call.op} if x.untyped_storage().nbytes() > x.numel() * x.element_size() else set()
        buffers = [(o.untyped_storage().nbytes(), o.numel() * o.element_size()) for o in outputs.values()]
        joints |= {call.op} if any(whole > own for whole, own in buffers) else set()
    assert views == set(OPERANDS)
    assert {"norm_modulate", "residual_norm_modulate", "residual_norm_modulate_dual", "norm_rope"} <= joints


def test_the_definition_passes(capsys):
    assert memcheck_calls.main(["native", "--device", "cpu"]) == 0
    assert f"{len(odd_calls.CALLS)} calls, 0 wrong" in capsys.readouterr().out


def offer(change):
    def run(arguments, outputs):
        provider_native.run("norm_modulate", arguments, outputs)
        change(arguments["x"], outputs["out"])

    registry.register(Implementation("norm_modulate", "mine", (), run, devices=("cpu",)))


def one_element(x, out):
    out.view(-1)[-1:].mul_(1.02) if out.is_contiguous() else out[..., -1, -1].mul_(1.02)


def not_written(x, out):
    out[..., :1] = float("nan")


def an_operand(x, out):
    x[..., :1] += 1


def around(x, out):
    whole = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
    whole[: out.storage_offset()].zero_()


@pytest.mark.parametrize(
    ("change", "calls", "message"),
    [
        (one_element, 8, "elements are wrong"),
        (not_written, 8, "is nan"),
        (an_operand, 8, "x: an operand has changed"),
        (around, 1, "the buffer around the output has changed"),
    ],
)
def test_what_is_wrong_is_said(change, calls, message, capsys):
    offer(change)
    assert memcheck_calls.main(["mine", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"8 calls, {calls} wrong"
    assert sum(message in line for line in lines) == calls


def test_a_provider_without_calls_is_not_clean():
    registry.register(Implementation("norm_modulate", "mine", (), offer, newest=80, oldest=80))
    assert memcheck_calls.main(["nobody", "--device", "cpu"]) == 2
