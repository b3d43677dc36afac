"""Knowledge distillation: a loss that also asks what a trained teacher makes of the same images.

Hinton et al. 2015 (arXiv:1503.02531) let a student match the teacher's probabilities; Touvron et
al. 2021 (DeiT, arXiv:2012.12877, section 4) the teacher's most likely class, with a token and a
head of its own for it.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vit.runtime.precision import Precision
from vit.training.losses import Loss, build_loss
from vit.training.teacher import Teacher

# DeiT's, of the hard and of the soft loss (section 4)
WEIGHT = 0.5
TEMPERATURE = 3.0


def soft_loss(temperature: float) -> Loss:
    """Return the function (student's logits, teacher's logits) → the images' losses, summed.

    τ² times the KL divergence of softmax(student / τ) from softmax(teacher / τ): the higher the
    temperature τ, the more the unlikely classes count. The gradients of softened probabilities are
    smaller by about τ², which the factor makes up for (Hinton et al. 2015, section 2).
    """

    def loss(logits: Tensor, taught: Tensor) -> Tensor:
        student = F.log_softmax(logits / temperature, dim=1)
        teacher = F.log_softmax(taught / temperature, dim=1)
        divergence = F.kl_div(student, teacher, log_target=True, reduction="sum")
        return temperature**2 * divergence

    return loss


def hard_loss(of_labels: Loss) -> Loss:
    """Return the function (student's logits, teacher's logits) → the images' losses, summed.

    The loss of labels, with the teacher's most likely class as the label.
    """

    def loss(logits: Tensor, taught: Tensor) -> Tensor:
        return of_labels(logits, taught.argmax(dim=1))

    return loss


def build_teacher_loss(name: str, label_loss: str, temperature: float) -> Loss:
    """Return soft_loss or hard_loss, by name.

    temperature: of the soft one. label_loss: the name of the hard one's loss. Its labels are not
    smoothed, as in DeiT. Raises ValueError for another name.
    """
    if name == "soft":
        return soft_loss(temperature)
    if name == "hard":
        return hard_loss(build_loss(label_loss, label_smoothing=0.0))
    raise ValueError(f"train.distillation must be soft or hard, got {name}")


@dataclass(frozen=True)
class Distillation:
    """A teacher, and what of the loss is its own.

    of_teacher: (student's logits, teacher's logits) → the images' losses, summed; weight: its part
    in the loss, of which the labels' is the rest. kind: for people, such as "hard".
    """

    teacher: Teacher
    kind: str
    of_teacher: Loss
    weight: float

    @torch.no_grad()
    def teach(self, images: Tensor, precision: Precision) -> Tensor:
        """Return the teacher's logits of the student's own images, (B, classes)."""
        with precision.autocast():
            taught = self.teacher(images)
        return taught if taught.dtype == torch.float64 else taught.float()

    def loss(self, of_labels: Loss, logits: Tensor, targets: Tensor, taught: Tensor) -> Tensor:
        """Return the sum of the images' losses.

        logits: (B, classes), or (B, 2, classes) of a class token and of a distillation token, of
        which the first learns from the labels and the second from the teacher. targets: as
        of_labels takes them; taught: see teach().
        """
        by_labels = by_teacher = logits
        if logits.ndim == 3:
            by_labels, by_teacher = logits.unbind(1)
        own = of_labels(by_labels, targets)
        return (1 - self.weight) * own + self.weight * self.of_teacher(by_teacher, taught)

    def describe(self) -> str:
        """Describe the loss in words, for the screen and the card."""
        return f"{self.kind} distillation, {self.weight:.3g} of the loss"
