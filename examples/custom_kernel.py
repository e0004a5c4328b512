"""A kernel of your own for one of dkfuse's ops, chosen in a compiled model: `python examples/custom_kernel.py`.

The kernel is plain torch, so that it runs on any machine; put your Triton, CUDA or C++ call in the place of its body.
"""

import torch
import torch.nn.functional as F

import dkfuse

calls = 0  # how often the kernel ran


def run(arguments, outputs):
    """dkfuse::norm_modulate of a layer norm: out = layer_norm(x)*(scale_offset + scale) + shift, in fp32."""
    global calls
    calls += 1
    x, scale, shift = (arguments[name].float() for name in ("x", "scale", "shift"))
    normed = F.layer_norm(x, x.shape[-1:], eps=arguments["eps"])
    outputs["out"].copy_(normed * (arguments["scale_offset"] + scale) + shift)


def needs(code, text, holds):
    """A constraint: `holds` says of a call's arguments whether the kernel computes such a call."""
    return dkfuse.Constraint(code, text, lambda arguments: None if holds(arguments) else f"this kernel needs {text}")


CONSTRAINTS = (  # everything that `run` does not do: a call that it would get wrong must never reach it
    needs("norm", "a layer norm", lambda a: a["norm"] == "layer"),
    needs("weight", "a norm without weight and bias", lambda a: a["weight"] is None and a["bias"] is None),
    needs("modulation", "a scale and a shift", lambda a: a["scale"] is not None and a["shift"] is not None),
    needs("pick", "no rows picked per token", lambda a: a["pick"] is None),
    needs("table", "no rows added", lambda a: a["scale_table"] is None and a["shift_table"] is None),
    needs("roundings", "dkfuse.roundings=fused", lambda a: a["roundings"] == 0),
)
dkfuse.register(dkfuse.Implementation("norm_modulate", "mine", CONSTRAINTS, run, oldest=0, devices=("cpu", "cuda")))


def main():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, scale, shift, weight = (torch.randn(s, device=device) for s in ((2, 16, 64), (2, 1, 64), (2, 1, 64), (64, 64)))

    def block(x, scale, shift):
        return (F.layer_norm(x, (64,)) * (1 + scale) + shift) @ weight

    with torch.no_grad(), dkfuse.record() as coverage:
        compiled = torch.compile(block, backend="dkfuse", options={"dkfuse.kernels": "mine"})
        error = (compiled(x, scale, shift) - block(x, scale, shift)).abs().max()
    print(f"{coverage.sites[0].op} by {coverage.sites[0].kernel}; {calls} call, largest difference {error:.1e}")


if __name__ == "__main__":
    main()
