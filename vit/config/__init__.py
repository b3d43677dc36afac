"""The configuration: a dataclass for each group, what its keys may hold, and the command line.

Nothing here imports torch, so that `--help` and a mistyped key are answered at once.
"""
