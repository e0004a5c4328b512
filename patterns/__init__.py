"""The families of code that dkfuse knows how to fuse, one module per family."""
