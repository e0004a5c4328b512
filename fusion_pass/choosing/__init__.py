"""Who computes a site, and how its kernel is launched.

    choose, orders                      the first provider of an op that takes the call
    building, watch                     kernels that cannot be built, or fail at their first launch
    tuning, tuning_clock                launch configurations timed under max-autotune
    example_calls                       a call of an op as models make it, for `dkfuse kernels`

What a provider takes is its own word: the constraints in `dkfuse.kernels`.
"""
