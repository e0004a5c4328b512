"""Built-in zoo of diffusion transformers."""
