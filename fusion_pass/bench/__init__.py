"""Measurements: `dkfuse bench model` and `dkfuse bench kernels`."""
