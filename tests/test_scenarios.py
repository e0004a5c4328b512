"""Ways in which models are served: each fuses what the plain model fuses, with results as near as eager's."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dkfuse
from dkfuse.settings import Settings

from .harness import counts
from .test_zoo_fusions import error, tensors
from .toy_blocks import AdaLNZero, DoubleStream, SingleStream, toy, toy_inputs

OPTIONS = {"dkfuse.remainder": "eager"}

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="dkfuse", options={**OPTIONS, **options})


def fused(coverage: dkfuse.Coverage) -> int:
    return len(coverage.fused())


# -- models of diffusers -----------------------------------------------------------------------------------------------


def flux(prepare: Callable[[nn.Module], Any] | None = None) -> tuple[Any, dict[str, Any]]:
    pytest.importorskip("diffusers")
    from dkfuse import zoo

    model, kwargs = zoo.build("flux", layers=1)
    if prepare is not None:
        prepare(model)
    return model, kwargs


@functools.cache
def sites(target: str) -> int:
    """How many sites of the plain model are fused."""
    model, kwargs = flux()
    with torch.no_grad():
        return fused(dkfuse.coverage(model, settings=Settings(target=target), **kwargs))


def check(prepare: Callable[[nn.Module], Any], target: str = "cpu") -> dkfuse.Coverage:
    """As many sites as of the plain model are fused, and the result is as eager's of the same model."""
    with torch.no_grad():
        model, kwargs = flux(prepare)
        eager = tensors(model(**kwargs))
        with dkfuse.record() as coverage:
            ours = tensors(compiled(model, **{"dkfuse.target": target})(**kwargs))
    assert len(coverage.graphs) == 1 and fused(coverage) == sites(target), str(coverage)
    assert error(ours, [t.double() for t in eager]) <= 0.02
    return coverage


def test_projections_that_diffusers_fuses() -> None:
    check(lambda model: model.fuse_qkv_projections())


def test_an_attention_processor_of_the_users() -> None:
    def prepare(model: Any) -> None:
        processor = type(next(iter(model.attn_processors.values())))
        model.set_attn_processor(type("Own", (processor,), {})())

    check(prepare)


def quantized(name: str) -> Callable[[nn.Module], Any]:
    quantization = pytest.importorskip("torchao.quantization")
    return lambda model: quantization.quantize_(model, getattr(quantization, name)())


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_quantized_weights(name: str) -> None:
    coverage = check(quantized(name), "sm90")
    assert sum(s.family == "gelu_epilogue" and s.status is dkfuse.Status.FUSED for s in coverage.seams) == 3


# -- compiled models as objects ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_a_compiled_model(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, inputs = toy(AdaLNZero), toy_inputs()
    model.compile(backend="dkfuse", options=OPTIONS)
    with torch.no_grad():
        first = model(*inputs)
        other = copied(model)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.count_nonzero(other(*inputs)) == 0
        torch.testing.assert_close(model(*inputs), first, rtol=0, atol=0)


def test_threads() -> None:
    """Compilations and calls at once: each thread gets the result of its own model."""
    models, inputs = [toy(block) for block in (AdaLNZero, SingleStream, DoubleStream)], toy_inputs(1)
    errors: list[float] = [1.0] * len(models)

    def work(index: int) -> None:
        with torch.no_grad():
            ours, eager = compiled(models[index])(*inputs), models[index](*inputs)
            errors[index] = error(tensors(ours), [t.double() for t in tensors(eager)])

    with dkfuse.record() as coverage:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(models))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(errors) <= 0.02 and len(coverage.graphs) == len(models), errors


def test_two_sets_of_options() -> None:
    model, inputs = toy(AdaLNZero), toy_inputs()
    found = []
    with torch.no_grad():
        for options in ({}, {"dkfuse.fuel": 1}, {}):
            with dkfuse.record() as coverage:
                compiled(model, **options)(*inputs)
            found.append(counts(coverage).get("residual_gate_norm_modulate", 0))
    assert found[0] > 1 >= found[1] and found[2] == 0, "the third is compiled already"
