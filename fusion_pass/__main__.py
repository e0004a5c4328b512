"""`python -m dkfuse` is the `dkfuse` command."""

from .cli import main

if __name__ == "__main__":
    main()
