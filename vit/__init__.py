"""A Vision Transformer trainer. `vit.load(path)` gives the model of a checkpoint; vit/model.py is the place to start
reading."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit.checkpoints.model import load as load


__all__ = ["load"]


def __getattr__(name: str) -> Any:
    if (
        name == "load"
    ):  # not imported before it is asked for: `train.py --help` shall not wait for torch
        from vit.checkpoints.model import load

        return load
    raise AttributeError(f"module 'vit' has no attribute '{name}'")
