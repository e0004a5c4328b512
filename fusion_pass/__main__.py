"""`python -m dkfuse` is the `dkfuse` command."""

from .cli.main import main

if __name__ == "__main__":
    main()
