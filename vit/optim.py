"""Parameter groups, optimizers, learning-rate schedules (pure functions of the step) and weight averaging."""

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vit.errors import ConfigError

Schedule = Callable[[int], float]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: the weights of linear and convolution layers, decayed, and all else, which is not.

    Frozen parameters are in neither. By role, not by shape: class token, positions, biases and norms are left alone although
    some of them are matrices.
    """
    decayed = {module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p in decayed], "weight_decay": weight_decay, "name": "decay"},
        {"params": [p for p in trained if p not in decayed], "weight_decay": 0.0, "name": "no_decay"},
    ]


def freeze_all_but_head(model: nn.Module) -> None:
    """For a linear probe: only the parameters of model.head get gradients."""
    model.requires_grad_(False)
    model.get_submodule("head").requires_grad_(True)


def build_optimizer(model: nn.Module, *, name: str, lr: float, weight_decay: float, betas: Sequence[float] | None,
                    eps: float | None, momentum: float | None, nesterov: bool | None) -> torch.optim.Optimizer:
    """The optimizer of conf/optimizer/<name>.yaml; lr is that of the schedule's peak. Raises ValueError for another name."""
    groups = parameter_groups(model, weight_decay)
    if name == "adamw":
        beta1, beta2 = betas or (0.9, 0.999)
        return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=1e-8 if eps is None else eps, fused=True)
    if name == "sgd":
        # Not fused: where fp16 skips the first step, torch 2.15's fused SGD leaves its momentum uninitialised.
        return torch.optim.SGD(groups, lr=lr, momentum=momentum or 0.0, nesterov=bool(nesterov))
    raise ValueError(f"optimizer must be adamw or sgd, got {name}")


def build_schedule(*, name: str, warmup: float, final: float | None, total_steps: int) -> Schedule:
    """step → factor on the learning rate, from 0 at step 0 to 1 after the warmup, then down to `final` at total_steps.

    warmup: below 1 a share of total_steps, else steps; final: 0 where None. Raises ValueError for a name that is not
    cosine, linear or constant, and ConfigError for a warmup as long as the run.
    """
    if name not in ("cosine", "linear", "constant"):
        raise ValueError(f"schedule must be cosine, linear or constant, got {name}")
    warmup_steps = round(warmup * total_steps) if warmup < 1 else round(warmup)
    if warmup_steps >= total_steps:
        raise ConfigError(f"schedule.warmup of {warmup_steps} steps leaves nothing of a run of {total_steps}; shorten it")
    lowest = final or 0.0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / (total_steps - warmup_steps)
        if name == "cosine":
            return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0 if name == "constant" else 1 - (1 - lowest) * progress

    return factor


class WeightAverage:
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


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as {"<parameter>/<key>": tensor}."""
    return {f"{name}/{key}": value for name, parameter in model.named_parameters()
            for key, value in optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of optimizer_tensors(), for an optimizer built alike."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state: dict[int, dict[str, Tensor]] = {}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(ordered):
        prefix = names[parameter] + "/"
        state[number] = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    optimizer.load_state_dict({"state": {number: held for number, held in state.items() if held},
                               "param_groups": optimizer.state_dict()["param_groups"]})
