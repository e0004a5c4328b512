"""Kernel nodes are launched by Inductor's static launcher wherever they are compiled, and get no needless views."""

from __future__ import annotations

import gc
import re

import pytest
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.utils import fresh_cache, run_and_get_code

from dkfuse import compat

from ..toy_providers import block, inputs

pytestmark = pytest.mark.gpu


def launchers() -> dict[str, bool]:
    """Of kernels of ours: whether each is launched statically."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    # by type: isinstance asks an object for its class, and a proxy of something that is gone cannot say it
    kernels = [o for o in gc.get_objects() if issubclass(type(o), CachingAutotuner) and o.compile_results]
    named = {str(k.inductor_meta.get("kernel_name")): k.is_statically_launchable() for k in kernels}
    return {name: static for name, static in named.items() if name.startswith("dkfuse_")}


@pytest.mark.parametrize("in_workers", [True, False])
def test_kernels_are_launched_statically(in_workers, monkeypatch):
    if in_workers:
        AsyncCompile.wait_pool_ready()
        if not AsyncCompile.use_process_pool():
            pytest.skip("torch compiles in this process, as TORCHINDUCTOR_COMPILE_THREADS says")
    else:
        monkeypatch.setattr(AsyncCompile, "use_process_pool", classmethod(lambda cls: False))
    compat.forget_compilations()
    gc.collect()
    values = inputs("cuda")
    options = {"dkfuse.kernels": "triton"}
    with torch.no_grad(), fresh_cache():
        program = torch.compile(block, backend="dkfuse", dynamic=False, options=options)
        result, (code, *_) = run_and_get_code(program, *values)
        found = launchers()
        exact, eager = block(*(v.double() for v in values)), block(*values)
    assert found and all(found.values()), found
    assert (result.double() - exact).norm() <= 1.02 * (eager.double() - exact).norm()
    launches = [line for line in code.splitlines() if re.match(r"\s+dkfuse_\w+\.run\(", line)]
    views = re.findall(r"reinterpret_tensor\((\w+), \([^)]*\), \([^)]*\), (\d+)\)", "\n".join(launches))
    assert launches and not [name for name, _ in views if name.startswith("buf")]  # parts of an input have offsets
