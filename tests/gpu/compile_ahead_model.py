"""`compile_ahead_model.py OUT ATTENTION [wait] [broken] [unlinked]`: a model compiled in a process of its own.

Its linears take quack's GEMM; its attention takes the kernel ATTENTION. What came of it is printed as JSON: how many
helpers were started, what they compiled, how many kernels of quack's were called here, how many of all were compiled
here, what this process imported, and whether a helper had the GPU open. The result of the model is saved to OUT.

wait: the helper is waited for before anything is compiled here, as a longer compilation would. broken: it cannot
compile anything. unlinked: no kernel can be kept on disk.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dkfuse
from dkfuse import Status
from dkfuse.kernels import attention_kept, gemm_ahead, gemm_quack, shared_library
from dkfuse.kernels.compile_ahead import POOL
from dkfuse.seams import late

WIDTH, HEADS, TOKENS = 1024, 8, 4128


class Model(nn.Module):
    """Four of quack's kernels, and one attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=i == 3) for i in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.joint = nn.Linear(WIDTH, 4 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(x), approximate="tanh"))
        first, second = self.joint(x).chunk(2, -1)
        return torch.cat([x, F.silu(first) * second], -1)


def wait_first() -> None:
    """Have the end of Inductor's work wait until the helper has done everything."""
    failed = late.failed

    def patient(attempts: Any) -> bool:
        end = time.monotonic() + 120
        while not all(future.done() for future in POOL.jobs.values()) and time.monotonic() < end:
            time.sleep(0.05)
        return failed(attempts)

    late.failed = patient


def opens_a_gpu(pid: int) -> bool:
    """Whether a process has a device file of a GPU open."""
    links = []
    for file in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(os.readlink(file))
        except OSError:
            continue  # closed meanwhile
    return any(link.startswith("/dev/nvidia") and link[len("/dev/nvidia") :].isdigit() for link in links)


def main(out: str, attention: str, *how: str) -> None:
    if "wait" in how:
        wait_first()
    if "broken" in how:
        gemm_ahead.COMPILE = attention_kept.COMPILE = "no_such_module_of_dkfuse:compile_kind"
    if "unlinked" in how:
        shared_library.compiler = lambda: "/no/such/compiler"
    torch.manual_seed(0)
    model = Model().to("cuda", torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    exported: list[Any] = []
    export = shared_library.exported  # of every kernel that is compiled here
    shared_library.exported = lambda kernel: exported.append(kernel) or export(kernel)  # type: ignore[assignment]
    started = time.perf_counter()
    options = {"dkfuse.gemm": "quack", "dkfuse.attention": attention}
    with torch.no_grad(), dkfuse.record() as coverage:
        found = torch.compile(model, backend="dkfuse", dynamic=False, options=options)(x)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    torch.save(found.cpu(), out)
    exact = Model().to("cuda", torch.float64)
    exact.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    right = exact(x.double())
    errors = [((value.double() - right).norm() / right.norm()).item() for value in (found, model(x))]
    finished = POOL.finished()
    result = {
        "seconds": seconds,
        "error": errors[0] / errors[1],
        "fused": sorted(site.family for site in coverage.seams if site.status is Status.FUSED),
        "started": POOL.started,
        "problem": POOL.problem,
        "helped": {" ".join(map(str, job[1:-1])): [d.pid, d.seconds, d.error] for job, d in finished.items()},
        "pid": os.getpid(),
        "gpu": POOL.helper is not None and POOL.helper.process is not None and opens_a_gpu(POOL.helper.process.pid),
        "kernels": gemm_quack.compiled.cache_info().misses,
        "compiled": len(exported),
        "imported": sorted({"quack", "cutlass", "flash_attn"} & {name.partition(".")[0] for name in sys.modules}),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
