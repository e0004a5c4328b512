"""The `dkfuse` command: `main` has the commands, `exits` the exit codes, the other files what the commands print."""
