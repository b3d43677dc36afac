"""Parameter groups and optimizers.

An optimizer is one builder in OPTIMIZERS, whose keyword-only parameters are the keys of
conf/optimizer/*.yaml that it takes. Checkpoints ask the optimizer itself which tensors it keeps, so
nothing else needs to know about a new one.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vit.errors import ConfigError
from vit.model.conv_stem import ConvStem
from vit.training.lamb import LAMB
from vit.training.muon import Muon, choose_newton_schulz

# Of parameters, in the order of their groups
ROLES = ("matrices", "decay", "no_decay")
# Keys of the configuration's group that every optimizer takes
COMMON_KEYS = ("name", "lr", "weight_decay", "layer_decay")


@dataclass(frozen=True)
class Grouping:
    """How parameters are grouped: what is decayed, and how fast each layer learns.

    layer_decay: learning rate of a layer relative to the one above it (Clark et al. 2020, ELECTRA;
    Bao et al. 2022, BEiT), so that the embeddings learn the slowest and the head at the full rate;
    None: all learn alike.
    """

    lr: float
    weight_decay: float
    layer_decay: float | None = None


def parameter_groups(
    model: nn.Module, grouping: Grouping, separate_matrices: bool = False
) -> list[dict[str, Any]]:
    """Return groups of a model's trained parameters, as torch's optimizers take them.

    Each has its name, role, weight_decay, lr and initial_lr, the learning rate at the schedule's
    peak. The weights of linear and convolution layers are decayed, everything else is not.
    separate_matrices: hidden_maps() get the role "matrices".
    """
    # By role, not by shape: the class token, positions and registers are no weights of a layer
    # although some of them are matrices (the common `ndim >= 2` decays them)
    decayed = {
        module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }

    # Muon is for maps from hidden states to hidden states, which embeddings and head are not
    matrices = hidden_maps(model) if separate_matrices else set()

    num_layers = count_layers(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue

        role = "decay" if parameter in decayed else "no_decay"
        if parameter in matrices:
            role = "matrices"

        # Without layer decay all layers learn as the one after the last block does
        depth = num_layers + 1
        if grouping.layer_decay:
            depth = depth_of(name, num_layers)
        title = f"{role}_layer_{depth}" if grouping.layer_decay else role
        if title not in groups:
            groups[title] = new_group(title, role, num_layers + 1 - depth, grouping)
        groups[title]["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: ROLES.index(group["role"]))


def hidden_maps(model: nn.Module) -> set[torch.Tensor]:
    """Return the matrices of attention and MLP, and the kernels of a conv stem but the first.

    The first one maps pixels.
    """
    maps: set[torch.Tensor] = {
        parameter
        for name, parameter in model.named_parameters()
        if name.startswith("encoder.blocks.") and parameter.ndim == 2
    }
    for module in model.modules():
        if isinstance(module, ConvStem):
            maps |= {convolution.weight for convolution in module.convolutions()[1:]}
    return maps


def new_group(title: str, role: str, layers_above: int, grouping: Grouping) -> dict[str, Any]:
    """Return an empty group of a role, `layers_above` layers below the head."""
    # The schedule sets lr to a multiple of initial_lr at every step
    lr_scale = (grouping.layer_decay or 1.0) ** layers_above
    return {
        "params": [],
        "weight_decay": 0.0 if role == "no_decay" else grouping.weight_decay,
        "lr_scale": lr_scale,
        "name": title,
        "role": role,
        "lr": grouping.lr * lr_scale,
        "initial_lr": grouping.lr * lr_scale,
    }


def count_layers(model: nn.Module) -> int:
    """Return the number of a VisionTransformer's blocks."""
    # From the names, so that any module with such blocks will do
    names = [name for name, _ in model.named_parameters() if name.startswith("encoder.blocks.")]
    return len({name.split(".")[2] for name in names})


def depth_of(name: str, num_layers: int) -> int:
    """Return a parameter's depth: 0 in the embeddings, n + 1 in block n, num_layers + 1 above.

    Above the blocks are the last norm, the pooler and the head.
    """
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return 0 if name.startswith("embeddings.") else num_layers + 1


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters as one, with all their groups and states.

    Saving, scaling and the schedule then need not know that there are several.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__(groups, {})
        self.share_state()

    def share_state(self) -> None:
        """Let the optimizers work on the groups and the state of this one."""
        first = 0
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            optimizer.param_groups = self.param_groups[first : first + count]
            optimizer.state = self.state
            first += count

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        # Loading has replaced both
        self.share_state()

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for optimizer in self.optimizers:
            optimizer.step()


def adamw(
    model: nn.Module,
    grouping: Grouping,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    groups = parameter_groups(model, grouping)
    return torch.optim.AdamW(groups, lr=grouping.lr, betas=as_pair(betas), eps=eps, fused=True)


def lamb(
    model: nn.Module,
    grouping: Grouping,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Build LAMB, see there."""
    return LAMB(parameter_groups(model, grouping), grouping.lr, as_pair(betas), eps)


def sgd(
    model: nn.Module, grouping: Grouping, *, momentum: float = 0.0, nesterov: bool = False
) -> torch.optim.Optimizer:
    """Build SGD with momentum."""
    # Not fused: torch 2.15's fused SGD leaves its momentum uninitialized where fp16's loss scale
    # makes it skip the first step
    require_momentum(momentum, nesterov)
    groups = parameter_groups(model, grouping)
    return torch.optim.SGD(groups, lr=grouping.lr, momentum=momentum, nesterov=nesterov)


def muon(
    model: nn.Module,
    grouping: Grouping,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    adamw_lr: float | None = None,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Build Muon (Jordan et al. 2024) for the hidden maps, AdamW for the rest.

    Muon learns at lr, AdamW at adamw_lr, or lr where that is None. Query, key and value are
    orthogonalized each by itself, since they are matrices of their own in the model.
    """
    require_momentum(momentum, nesterov)

    groups = parameter_groups(model, grouping, separate_matrices=True)
    matrices = [group for group in groups if group["role"] == "matrices"]
    rest = [group for group in groups if group["role"] != "matrices"]
    for group in rest:
        group["lr"] = group["initial_lr"] = (adamw_lr or grouping.lr) * group["lr_scale"]

    optimizers: list[torch.optim.Optimizer] = []
    # None where all blocks are frozen
    if matrices:
        number_format = choose_newton_schulz(matrices[0]["params"][0].device)
        optimizers.append(
            Muon(matrices, grouping.lr, momentum, nesterov, newton_schulz=number_format)
        )
    optimizers.append(
        torch.optim.AdamW(rest, lr=grouping.lr, betas=as_pair(betas), eps=eps, fused=True)
    )
    return CombinedOptimizer(optimizers)


Builder = Callable[..., torch.optim.Optimizer]
OPTIMIZERS: dict[str, Builder] = {"adamw": adamw, "lamb": lamb, "muon": muon, "sgd": sgd}
# Those that update each element by itself, so that FSDP may spread a tensor over processes. Muon
# orthogonalizes a matrix, and LAMB takes the norm of a tensor
ELEMENTWISE = {"adamw", "sgd"}


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """Build the optimizer of a name in OPTIMIZERS for a model's trained parameters.

    Every group has its `initial_lr`, the learning rate at the schedule's peak. settings: the keys
    that only some optimizers take; None is "not given". Raises ConfigError as check_optimizer does.
    """
    check_optimizer(name, settings or {})
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    return OPTIMIZERS[name](model, Grouping(lr, weight_decay, layer_decay), **given)


def check_optimizer(name: str, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError, naming the key, for an unknown name or a setting it does not take."""
    if name not in OPTIMIZERS:
        raise ConfigError(f"optimizer.name must be one of {', '.join(OPTIMIZERS)}, got {name}")
    for key, value in settings.items():
        if value is not None and key not in keys_of(OPTIMIZERS[name]):
            takers = [other for other in OPTIMIZERS if key in keys_of(OPTIMIZERS[other])]
            raise ConfigError(
                f"optimizer.{key} does nothing with optimizer={name}; "
                f"it belongs to {', '.join(takers) or 'no optimizer'}"
            )


def require_elementwise(name: str) -> None:
    """Raise ConfigError for an optimizer that needs whole tensors, beside runtime.sharding=fsdp."""
    if name in OPTIMIZERS and name not in ELEMENTWISE:
        raise ConfigError(
            f"runtime.sharding=fsdp works with optimizer={' and '.join(sorted(ELEMENTWISE))}; "
            f"{name} needs whole tensors"
        )


def keys_of(builder: Builder) -> list[str]:
    """Return the keys of the configuration that a builder takes."""
    parameters = inspect.signature(builder).parameters.values()
    return [item.name for item in parameters if item.kind is inspect.Parameter.KEYWORD_ONLY]


def require_momentum(momentum: float, nesterov: bool) -> None:
    if nesterov and not momentum:
        raise ConfigError("optimizer.nesterov=true needs optimizer.momentum above 0")


def as_pair(betas: Sequence[float]) -> tuple[float, float]:
    return betas[0], betas[1]
