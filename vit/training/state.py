"""What training changes, and a `last` checkpoint holds: weights, their average, the optimizer's
state, progress.
"""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from vit.checkpoints.model import load_weights, strip_prefix
from vit.errors import CheckpointError
from vit.model.vision_transformer import VisionTransformer
from vit.runtime.precision import Precision

# Whole tensors on the CPU; of sharded ones in the first process alone, gathered one after another
WHOLE_ON_CPU = StateDictOptions(full_state_dict=True, cpu_offload=True)
LATER = {"later": True}  # of fields that checkpoints of earlier versions do not have


@dataclass
class Progress:
    """Where a run stands; stored in the header of every checkpoint. `step` counts finished
    optimizer steps.

    seconds: of all processes that have worked on the run. window: the steps since the last log (see
    StepWindow).
    micro_batch_size: the largest that was found to fit into the GPU's memory, where that was tried.
    """

    step: int = 0
    evaluated_step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_top1: float | None = None
    best_loss: float | None = None
    scaler: dict | None = None  # of fp16
    window: dict | None = None
    micro_batch_size: int | None = field(default=None, metadata=LATER)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "Progress":
        """The inverse of to_dict. Raises CheckpointError where another version of the program wrote
        the values.
        """
        known = {item.name for item in fields(cls)}
        required = {item.name for item in fields(cls) if not item.metadata.get("later")}
        if not required <= values.keys() <= known:
            raise CheckpointError(
                f"{source}: another version of this program wrote its progress "
                f"({', '.join(values)})"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def improve(self, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation in. True where it is the best so far: higher top-1, or the same and a
        lower loss.
        """
        if self.best_top1 is not None and self.best_loss is not None:
            best = (self.best_top1, -self.best_loss)
            if (metrics["top1"], -metrics["loss"]) <= best:
                return False
        self.best_step = self.step
        self.best_top1 = metrics["top1"]
        self.best_loss = metrics["loss"]
        return True


class EMA:
    """An exponential moving average of a model's parameters, in float32, to evaluate and save in
    their place.

    After update t (counted from 0) the decay is min(decay, (1 + t) / (10 + t)), so that the average
    spans about the last tenth of the run until `decay` limits it, and forgets the random start at
    once.
    """

    def __init__(self, model: VisionTransformer, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages: list[Tensor] = list(self.model.parameters())
        parameters: list[Tensor] = list(model.parameters())
        # One kernel for all of them; pyright does not know it
        torch._foreach_lerp_(averages, parameters, weight)  # pyright: ignore[reportPrivateImportUsage]


@dataclass
class TrainingState:
    """All that training changes.

    A `last` checkpoint holds the tensors under model/, average/ and optimizer/, and progress and
    precision in its
    header. precision: what train.precision=auto chose when the run began.
    """

    model: VisionTransformer
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    precision: Precision
    progress: Progress

    def selected(self) -> VisionTransformer:
        """The model that is evaluated and saved as best: the averaged one, where there is one."""
        return self.model if self.ema is None else self.ema.model

    def tensors(self) -> dict[str, Tensor]:
        """Everything that restore() needs, by name; where sharded, in the first process alone."""
        parts = {"model": model_tensors(self.model)}
        if self.ema is not None:
            parts["average"] = model_tensors(self.ema.model)
        if (
            self.progress.step > 0
        ):  # asking for the state of an untouched optimizer would make its first step
            parts["optimizer"] = optimizer_tensors(self.model, self.optimizer)
        return {
            f"{part}/{name}": tensor
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def selected_tensors(self) -> dict[str, Tensor]:
        """The weights of selected() by name; where sharded, in the first process alone."""
        return model_tensors(self.selected())

    def restore(self, tensors: dict[str, Tensor], header: Mapping[str, Any], source: str) -> None:
        """The inverse of tensors(), with a checkpoint's header.

        Raises CheckpointError where these are of another model or optimizer.
        """
        self.progress = Progress.from_dict(header["progress"], source)
        self.precision = Precision(header["precision"], self.precision.device)
        optimizer = strip_prefix(tensors, "optimizer/")
        if self.progress.step > 0:
            load_optimizer_tensors(self.model, self.optimizer, optimizer, source)
        elif optimizer:
            raise CheckpointError(f"{source}: unexpected {next(iter(optimizer))} before any step")
        load_weights(self.model, strip_prefix(tensors, "model/"), source)
        if self.ema is not None:
            load_weights(self.ema.model, strip_prefix(tensors, "average/"), source)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights by name, put together where they are sharded."""
    return cast(dict[str, Tensor], get_model_state_dict(model, options=WHOLE_ON_CPU))


OptimizerState = dict[str, dict[str, Any]]  # {parameter: {key: tensor or number}}


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, options: StateDictOptions | None = None
) -> tuple[OptimizerState, Any]:
    """(an optimizer's state by the names of its parameters, its parameter groups).

    Asked for the state of an optimizer that has made no step, torch makes one at learning rate 0.
    With WHOLE_ON_CPU both are empty in all but the first process.
    """
    state = get_optimizer_state_dict(model, optimizer, options=options)
    return cast(OptimizerState, state.get("state", {})), state.get("param_groups", [])


def flat_tensors(state: OptimizerState) -> dict[str, Tensor]:
    """The tensors of an optimizer's state as {"<parameter>/<key>": tensor}."""
    return {
        f"{name}/{key}": value
        for name, values in state.items()
        for key, value in values.items()
        if isinstance(value, Tensor)
    }


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer that has made a step, as {"<parameter>/<key>": tensor}."""
    state, _ = optimizer_state(model, optimizer, WHOLE_ON_CPU)
    return flat_tensors(state)


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: str
) -> None:
    """The inverse of optimizer_tensors, for an untouched optimizer. Load the weights afterwards.

    Raises CheckpointError, naming the source, where a tensor is missing or unexpected.
    """
    # What the optimizer keeps is asked of the optimizer itself, so that none need be known here
    state, groups = optimizer_state(model, optimizer)
    expected = flat_tensors(state)
    difference = sorted(expected.keys() ^ tensors.keys())
    if difference:
        problem = "is missing" if difference[0] in expected else "is unexpected"
        raise CheckpointError(
            f"{source}: its optimizer state is of another optimizer: {difference[0]} {problem}"
        )
    if not expected:  # SGD without momentum keeps nothing
        return
    saved = {name: dict(values) for name, values in state.items()}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        saved[parameter][key] = tensor
    state_dict = cast(Any, {"state": saved, "param_groups": groups})
    set_optimizer_state_dict(model, optimizer, state_dict, options=WHOLE_ON_CPU)
