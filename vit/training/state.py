"""TODO: say what this file is for."""

import copy
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from vit.checkpoints.model import load_weights, strip_prefix
from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.processes import gather_full, shard_like
from vit.training.optimizers import CombinedOptimizer


class EMA:
    """An exponential moving average of a model's parameters, in float32, to evaluate and save in place of them.

    After update t (counted from 0) the decay is min(decay, (1 + t) / (10 + t)), so that the average spans about the last
    tenth of the run until `decay` limits it, and forgets the random start at once.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), weight)  # pyright: ignore[reportPrivateImportUsage]


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint beside the tensors. `step` counts finished optimizer steps."""

    step: int = 0
    evaluated_step: int = 0
    seconds: float = 0.0  # of all processes that worked on the run
    best_step: int | None = None
    best_top1: float | None = None
    best_loss: float | None = None
    scaler: dict | None = None  # of fp16
    window: dict | None = (
        None  # the steps since the last log: {"rows": [[loss, correct, gradient norm], …], "images": n}
    )

    def improve(self, metrics: dict[str, float]) -> bool:
        """Take an evaluation in; true where it is the best so far: higher top-1, or the same and a lower loss."""
        key = (metrics["top1"], -metrics["loss"])
        better = (
            self.best_top1 is None
            or self.best_loss is None
            or key > (self.best_top1, -self.best_loss)
        )
        if better:
            self.best_step, self.best_top1, self.best_loss = (
                self.step,
                metrics["top1"],
                metrics["loss"],
            )
        return better


@dataclass
class TrainingState:
    """All that training changes: what a `last` checkpoint holds, under model/, average/ and optimizer/, and its header's
    progress."""

    model: VisionTransformer
    average: EMA | None
    optimizer: torch.optim.Optimizer
    progress: Progress

    def selected(self) -> nn.Module:
        """The weights that are evaluated and saved as best: the averaged ones, where there are any."""
        return self.model if self.average is None else self.average.model

    def tensors(self) -> dict[str, Tensor]:
        parts = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.model, self.optimizer),
            "average": {} if self.average is None else self.average.model.state_dict(),
        }
        return {
            f"{part}/{name}": gather_full(tensor)
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def restore(self, tensors: dict[str, Tensor], progress: dict, source: str) -> None:
        """The inverse of tensors(). Raises CheckpointError where these are of another model or optimizer."""
        if progress.keys() != {field.name for field in fields(Progress)}:
            raise CheckpointError(
                f"{source}: another version of this program wrote its progress ({', '.join(progress)})"
            )
        self.progress = Progress(**progress)
        load_weights(self.model, strip_prefix(tensors, "model/"), source)
        load_optimizer_tensors(
            self.model,
            self.optimizer,
            strip_prefix(tensors, "optimizer/"),
            source,
            self.progress.step > 0,
        )
        if self.average is not None:
            load_weights(self.average.model, strip_prefix(tensors, "average/"), source)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as {"<parameter>/<key>": tensor}."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def state_keys(optimizer: torch.optim.Optimizer, parameter: Tensor) -> tuple[str, ...]:
    """The names of what this optimizer keeps for a parameter once it has made a step."""
    if isinstance(optimizer, CombinedOptimizer):
        optimizer = next(
            own
            for own in optimizer.optimizers
            if any(parameter is other for group in own.param_groups for other in group["params"])
        )
    if isinstance(optimizer, torch.optim.SGD):
        return ("momentum_buffer",) if optimizer.param_groups[0]["momentum"] else ()
    return (
        ("momentum_buffer",)
        if isinstance(optimizer, torch.optim.Muon)
        else ("step", "exp_avg", "exp_avg_sq")
    )


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    source: str,
    begun: bool = True,
) -> None:
    """The inverse of optimizer_tensors(), for an optimizer built alike; begun: it had made a step.

    Raises CheckpointError, naming the source and the first, where a tensor that a step leaves is missing or is none of its.
    """
    expected = {
        f"{name}/{key}"
        for name, parameter in model.named_parameters()
        if begun and parameter.requires_grad
        for key in state_keys(optimizer, parameter)
    }
    if tensors.keys() != expected:
        wrong = sorted(tensors.keys() ^ expected)
        raise CheckpointError(
            f"{source}: the optimizer's state is of another one: {wrong[0]} "
            + ("is missing" if wrong[0] in expected else "belongs to none of its parameters")
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(ordered):
        prefix = names[parameter] + "/"
        state[number] = {
            key.removeprefix(prefix): shard_like(value, parameter)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
    optimizer.load_state_dict(
        {
            "state": {number: held for number, held in state.items() if held},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
