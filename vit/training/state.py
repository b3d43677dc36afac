"""What training changes and a `last` checkpoint holds.

That is the weights, their average, the optimizer's state and the progress. Random generators are
not among it: all randomness is a function of the seed and the step.
"""

import copy
from collections.abc import Collection, Mapping
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
from vit.model.low_rank import merge_low_rank
from vit.model.vision_transformer import VisionTransformer
from vit.runs.selection import CRITERIA, score
from vit.runtime.precision import Precision
from vit.runtime.processes import gather_to_first, keep_own_shard

# To load whole tensors; not strict, since an optimizer may keep nothing for some of its parameters
TO_LOAD_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)
# Mark of fields that checkpoints of earlier versions do not have
LATER = {"later": True}


@dataclass
class Progress:
    """How far a run has come; stored in the header of every checkpoint.

    step: finished optimizer steps; images: of their batches, whose size a resumed run may change;
    evaluated_step: the step of the last evaluation. seconds: of all sessions that have worked on
    the run. best_…: the validation metrics of the best checkpoint, all that it could be selected
    by, so that a resumed run may select by another. scaler: the state of fp16's loss scale. window:
    the steps since the last log, see StepWindow. micro_batch_size: the largest that was found to
    fit into the GPU's memory, where that was tried.
    """

    step: int = 0
    evaluated_step: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_top1: float | None = None
    best_loss: float | None = None
    scaler: dict | None = None
    window: dict | None = None
    micro_batch_size: int | None = field(default=None, metadata=LATER)
    best_balanced_top1: float | None = field(default=None, metadata=LATER)
    best_macro_f1: float | None = field(default=None, metadata=LATER)
    images: int = field(default=0, metadata=LATER)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> "Progress":
        """Return the progress that to_dict() gave as values.

        Raises CheckpointError where another version of the program wrote them.
        """
        # A field that is missing or unknown would make the resumed run another one, silently
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

    def best(self) -> dict[str, float | None]:
        """Return the validation metrics of the best checkpoint, None for what is not known of it.

        They are those of CRITERIA. None is known where nothing is held out, or before the first
        evaluation; versions that selected by top-1 alone noted nothing else but the loss.
        """
        return {name: getattr(self, f"best_{name}") for name in CRITERIA}

    def best_score(self, select: str) -> float | None:
        """Return what train.select maximizes of the best checkpoint; None where it is not known."""
        value = self.best()[select]
        return None if value is None else score(select, value)

    def improve(self, metrics: Mapping[str, float], select: str = "top1") -> bool:
        """Note the metrics of an evaluation, and return whether it is the best so far.

        The best has the highest score by train.select, and of several the lowest loss. metrics: on
        the validation split, never on the test split.
        """
        best_score = self.best_score(select)
        if best_score is not None and self.best_loss is not None:
            ours = (score(select, metrics[select]), -metrics["loss"])
            if ours <= (best_score, -self.best_loss):
                return False
        self.best_step = self.step
        for name in CRITERIA:
            setattr(self, f"best_{name}", metrics[name])
        return True

    def adopt_best(self, other: "Progress") -> None:
        """Take over which checkpoint is the best, and its metrics, from another progress."""
        self.best_step = other.best_step
        for name, value in other.best().items():
            setattr(self, f"best_{name}", value)

    def forget_best(self) -> None:
        """Let the next evaluation be the best, and make that of this very step once more."""
        self.adopt_best(Progress())
        self.evaluated_step = 0


class EMA:
    """An exponential moving average of a model's parameters, evaluated and saved in their place.

    At update t (counted from 0) the decay is min(decay, (1 + t) / (10 + t)), so that the average
    forgets the random start at once, and spans about the last tenth of the run until `decay` limits
    it.
    """

    def __init__(self, model: VisionTransformer, decay: float):
        # In float32 like the parameters: 16 bits would lose steps as small as 1 - decay. Frozen
        # parameters are shared, since their average is what they are
        shared = {id(item): item for item in model.parameters() if not item.requires_grad}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        self.decay = decay
        # (model, averages, parameters) of the last update
        self.lists: tuple[nn.Module, list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the weights after optimizer step `step`, counted from 0."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        # An evaluation comes between two updates
        keep_own_shard(self.model)
        # Made once, and not before the first update, since sharding replaces parameters
        if self.lists is None or self.lists[0] is not model:
            # Trained parameters alone: frozen ones and the model's buffers never change
            pairs = zip(self.model.parameters(), model.parameters(), strict=True)
            trained = [pair for pair in pairs if pair[1].requires_grad]
            averages, parameters = (list(items) for items in zip(*trained, strict=True))
            self.lists = (model, averages, parameters)
        _, averages, parameters = self.lists
        # One kernel for all of them; pyright does not know it
        torch._foreach_lerp_(averages, parameters, weight)  # pyright: ignore[reportPrivateImportUsage]


@dataclass
class TrainingState:
    """All that training changes.

    A `last` checkpoint holds the tensors under model/, average/ (of what is trained) and
    optimizer/, and progress and precision in its header. precision: what train.precision=auto chose
    when the run started. select: what the best checkpoint is best in, see vit.runs.selection.
    """

    model: VisionTransformer
    ema: EMA | None
    optimizer: torch.optim.Optimizer
    precision: Precision
    progress: Progress
    select: str = "top1"

    def selected(self) -> VisionTransformer:
        """Return the model that is evaluated and saved as best: the average, where there is one."""
        return self.model if self.ema is None else self.ema.model

    @property
    def newton_schulz(self) -> str | None:
        """The number format of Muon's products; None with other optimizers."""
        formats = [group.get("newton_schulz") for group in self.optimizer.param_groups]
        return next((name for name in formats if name is not None), None)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that restore() needs, by name, on the CPU.

        A collective where the model is sharded; the tensors are then in the first process alone.
        """
        parts = {"model": model_tensors(self.model)}
        if self.ema is not None:
            named = self.model.named_parameters()
            frozen = {name for name, item in named if not item.requires_grad}
            parts["average"] = model_tensors(self.ema.model, without=frozen)
        # Asked for the state of an untouched optimizer, torch makes a first step with it
        if self.progress.step > 0:
            parts["optimizer"] = optimizer_tensors(self.model, self.optimizer)
        # Flat names, since safetensors has no folders
        return {
            f"{part}/{name}": tensor
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }

    def selected_tensors(self) -> dict[str, Tensor]:
        """Return the weights of selected() by name, low-rank changes merged.

        See tensors() where the model is sharded.
        """
        weights = cast(dict[str, Tensor], get_model_state_dict(self.selected()))
        # On the device, where evaluations merge them too: the bits are then the same
        with torch.no_grad():
            return gather_to_first(merge_low_rank(weights))

    def restore(self, tensors: dict[str, Tensor], header: Mapping[str, Any], source: str) -> None:
        """Take over what tensors() gave, and the progress of a checkpoint's header.

        source: the path, for messages. Raises CheckpointError where these belong to another model
        or optimizer.
        """
        self.progress = Progress.from_dict(header["progress"], source)
        for group in self.optimizer.param_groups:
            if "newton_schulz" in group:
                # Earlier versions multiplied in bfloat16 alone, and their checkpoints have no key
                group["newton_schulz"] = header.get("newton_schulz", "bf16")

        # Before the weights: loading makes a step with the optimizer, see optimizer_state()
        optimizer = strip_prefix(tensors, "optimizer/")
        if self.progress.step > 0:
            load_optimizer_tensors(self.model, self.optimizer, optimizer, source)
        elif optimizer:
            raise CheckpointError(f"{source}: unexpected {next(iter(optimizer))} before any step")

        weights = strip_prefix(tensors, "model/")
        load_weights(self.model, weights, source)
        if self.ema is not None:
            average = strip_prefix(tensors, "average/")
            if not average:
                raise CheckpointError(
                    f"{source}: holds no averaged weights to go on with; leave train.ema_decay=0"
                )
            # Of frozen weights there is none
            load_weights(self.ema.model, weights | average, source)

    def adopt_best(self, progress: Mapping[str, Any], source: str) -> None:
        """Take over what a best checkpoint's progress says of it, where it is ahead of the state.

        source: the path, for messages. Raises CheckpointError where another version of the program
        wrote it.
        """
        newest = Progress.from_dict(progress, source)
        if newest.step > self.progress.step:
            self.progress.adopt_best(newest)


def model_tensors(model: nn.Module, without: Collection[str] = ()) -> dict[str, Tensor]:
    """Return a model's weights by name, put together where they are sharded.

    without: names to leave out.
    """
    weights = cast(dict[str, Tensor], get_model_state_dict(model))
    return gather_to_first({name: item for name, item in weights.items() if name not in without})


OptimizerState = dict[str, dict[str, Any]]  # {parameter: {key: tensor or None}}


def optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[OptimizerState, Any]:
    """Return (an optimizer's state by the names of its parameters, its parameter groups).

    Asked for the state of an optimizer that has made no step, torch makes one at learning rate 0.
    Of sharded tensors each process gets its shards.
    """
    state = get_optimizer_state_dict(model, optimizer)
    return cast(OptimizerState, state.get("state", {})), state.get("param_groups", [])


def flat_tensors(state: OptimizerState) -> dict[str, Tensor]:
    """Return an optimizer's state as {"<parameter>/<key>": tensor}.

    None is left out, such as the momentum of SGD without momentum.
    """
    flat = {}
    for name, values in state.items():
        for key, value in values.items():
            # A file holds tensors alone: a resumed run would silently begin to count again
            assert value is None or isinstance(value, Tensor), f"{name}/{key} must be a tensor"
            if value is not None:
                flat[f"{name}/{key}"] = value
    return flat


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer that has made a step, as flat_tensors() does.

    Put together where it is sharded.
    """
    state, _ = optimizer_state(model, optimizer)
    return gather_to_first(flat_tensors(state))


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: str
) -> None:
    """Load what optimizer_tensors() gave into an untouched optimizer; load the weights afterwards.

    Raises CheckpointError, naming the source, where a tensor is missing or unexpected.
    """
    # The optimizer is asked what it keeps, so that no optimizer need be known here
    state, groups = optimizer_state(model, optimizer)
    expected = flat_tensors(state)
    difference = sorted(expected.keys() ^ tensors.keys())
    if difference:
        problem = "is missing" if difference[0] in expected else "is unexpected"
        raise CheckpointError(
            f"{source}: its optimizer state is of another optimizer, or of other weights than are "
            f"trained now: {difference[0]} {problem}; leave optimizer, train.freeze and "
            "train.lora_rank as they were"
        )
    # SGD without momentum keeps nothing
    if not expected:
        return

    saved = {name: dict(values) for name, values in state.items()}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        saved[parameter][key] = tensor
    state_dict = cast(Any, {"state": saved, "param_groups": groups})
    set_optimizer_state_dict(model, optimizer, state_dict, options=TO_LOAD_WHOLE)
