"""Parameter groups, optimizers, learning-rate schedules (pure functions of the step) and weight averaging."""

from collections.abc import Sequence

import torch
from torch import nn


def depth(name: str, num_layers: int) -> int:
    """How deep a parameter of a VisionTransformer lies: 0 for the embeddings, n + 1 for block n, num_layers + 1 after them."""
    if name.startswith("encoder.blocks."):
        return int(name.split(".")[2]) + 1
    return 0 if name.startswith("embeddings.") else num_layers + 1


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None, muon: bool = False
) -> list[dict]:
    """Groups of parameters, each with its `name`, role, weight_decay and lr_scale, a factor on the learning rate.

    The weights of linear and convolution layers are decayed, all else is not. By role, not by shape: class token, positions,
    biases and norms are left alone although some of them are matrices. Frozen parameters are in no group.
    layer_decay: each layer learns at this share of the one above it (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT),
    the embeddings the slowest, the head at the full rate. muon: the matrices of attention and MLP, which Muon is for, have
    the role "matrices"; embeddings and head are no maps between hidden states.
    """
    roles = ("matrices", "decay", "no_decay")
    decayed = {
        module.weight for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    num_layers = len(
        {
            name.split(".")[2]
            for name, _ in model.named_parameters()
            if name.startswith("encoder.blocks.")
        }
    )
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_block = muon and name.startswith("encoder.blocks.") and parameter.ndim == 2
            role = "matrices" if in_block else "decay" if parameter in decayed else "no_decay"
            level = depth(name, num_layers) if layer_decay else num_layers + 1
            title = f"{role}_layer_{level}" if layer_decay else role
            group = groups.setdefault(
                title,
                {
                    "params": [],
                    "weight_decay": 0.0 if role == "no_decay" else weight_decay,
                    "lr_scale": (layer_decay or 1.0) ** (num_layers + 1 - level),
                    "name": title,
                    "role": role,
                },
            )
            group["params"].append(parameter)
    return sorted(groups.values(), key=lambda group: roles.index(group["role"]))


def freeze_all_but_head(model: nn.Module) -> None:
    """For a linear probe: only the parameters of model.head get gradients."""
    model.requires_grad_(False)
    model.get_submodule("head").requires_grad_(True)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2): Adam's step of every decayed tensor, decay included, is scaled to
    the length of the tensor itself; tensors that are not decayed take Adam's step, as in NVIDIA's and timm's LAMB."""

    def __init__(self, params: list[dict], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            (beta1, beta2), eps, decay = group["betas"], group["eps"], group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(
                        step=torch.zeros(()),
                        exp_avg=torch.zeros_like(parameter),
                        exp_avg_sq=torch.zeros_like(parameter),
                    )
                state["step"] += 1
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].lerp_(parameter.grad.square(), 1 - beta2)
                step = state["step"].item()
                mean = state["exp_avg"] / (1 - beta1**step)
                update = mean / ((state["exp_avg_sq"] / (1 - beta2**step)).sqrt() + eps)
                if decay:
                    update += decay * parameter
                    length, wanted = update.norm(), parameter.norm()
                    update *= torch.where((length > 0) & (wanted > 0), wanted / length, 1.0)
                parameter.sub_(update, alpha=group["lr"])


class CombinedOptimizer(torch.optim.Optimizer):
    """Several optimizers of different parameters as one: their groups and states stand side by side."""

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = optimizers
        super().__init__(
            [group for optimizer in optimizers for group in optimizer.param_groups], {}
        )
        self.share()

    def share(self) -> None:
        """Let the optimizers work on this one's groups and state, which loading replaces."""
        first = 0
        for optimizer in self.optimizers:
            count = len(optimizer.param_groups)
            optimizer.param_groups, optimizer.state = (
                self.param_groups[first : first + count],
                self.state,
            )
            first += count

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.share()

    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for optimizer in self.optimizers:
            optimizer.step()


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    betas: Sequence[float] | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    adamw_lr: float | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of conf/optimizer/<name>.yaml, every group with its `initial_lr`, that of the schedule's peak.

    muon: torch.optim.Muon (Jordan et al. 2024) at lr for the blocks' matrices, query, key and value each for itself, and AdamW
    at adamw_lr for all else. Raises ValueError for another name.
    """
    groups = parameter_groups(model, weight_decay, layer_decay, muon=name == "muon")
    matrices, rest = (
        [group for group in groups if (group["role"] == "matrices") == wanted]
        for wanted in (True, False)
    )
    for group in groups:
        own = adamw_lr if adamw_lr and group["role"] != "matrices" else lr
        group["initial_lr"] = group["lr"] = own * group["lr_scale"]
    (beta1, beta2), epsilon = betas or (0.9, 0.999), 1e-8 if eps is None else eps
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), eps=epsilon, fused=True)
    if name == "lamb":
        return Lamb(groups, lr, (beta1, beta2), epsilon)
    if name == "sgd":
        # Not fused: where fp16 skips the first step, torch 2.15's fused SGD leaves its momentum uninitialised.
        return torch.optim.SGD(groups, lr=lr, momentum=momentum or 0.0, nesterov=bool(nesterov))
    if name == "muon":
        adamw = torch.optim.AdamW(rest, lr=lr, betas=(beta1, beta2), eps=epsilon, fused=True)
        muon = (
            torch.optim.Muon(matrices, lr=lr, momentum=momentum or 0.0, nesterov=bool(nesterov))
            if matrices
            else None
        )
        return CombinedOptimizer(
            [optimizer for optimizer in (muon, adamw) if optimizer is not None]
        )
    raise ValueError(f"optimizer must be adamw, lamb, sgd or muon, got {name}")
