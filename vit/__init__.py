"""A Vision Transformer trainer.

`vit.load(path)` gives the model of a checkpoint. To read the code, start with
vit/model/vision_transformer.py.
"""

import os
from typing import TYPE_CHECKING, Any

# File locks, signals and forked workers are those of POSIX
if os.name == "nt":
    raise ImportError("vit needs Linux or macOS; on Windows, run it in WSL")

if TYPE_CHECKING:
    from vit.checkpoints.model import load as load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Not imported before it is asked for: `train.py --help` must not wait for torch
    if name == "load":
        from vit.checkpoints.model import load

        return load
    raise AttributeError(f"module 'vit' has no attribute '{name}'")
