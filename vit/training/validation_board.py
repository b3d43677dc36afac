"""What a model gets right and wrong, in TensorBoard.

It is drawn so seldom that training does not become slower by it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vit.data.preprocessing import Preprocessing
from vit.figures.attention import attention_figure, displayable_images
from vit.figures.predictions import (
    confused_table,
    confusion_figure,
    parameters_by_layer,
    prediction_figure,
)
from vit.model.vision_transformer import VisionTransformer
from vit.runs.tensorboard import TensorBoard
from vit.runtime.precision import Precision
from vit.training.state import Progress

# Figures of each kind; TensorBoard keeps no more
IMAGES_A_RUN = 10
# More classes get one histogram instead of a curve each
MANY_CLASSES = 20
# Pixels of a shown image
IMAGE_SIDE = 112
ATTENTION_IMAGES = 8


@dataclass
class ValidationBoard:
    """Draws on a TensorBoard.

    images: fixed validation images, normalized, (B, C, height, width), on the device; labels: int64
    (B,). drawn_tenth: the tenth of the run in which figures were drawn last.
    """

    board: TensorBoard
    classes: list[str]
    preprocessing: Preprocessing
    images: Tensor
    labels: Tensor
    total_steps: int
    drawn_tenth: int = -1

    @torch.no_grad()
    def evaluated(
        self, model: VisionTransformer, precision: Precision, confusion: Tensor, step: int
    ) -> None:
        """Draw after an evaluation: the accuracy of every class, and seldom the figures.

        model: in evaluation mode; confusion: what vit.evaluation.accuracy.evaluate counted.
        """
        confusion = confusion.cpu()
        self.class_accuracies(confusion, step)

        # Once in each tenth of the run and at its end
        tenth = step * IMAGES_A_RUN // self.total_steps
        if tenth == self.drawn_tenth or not self.board.active:
            return
        self.drawn_tenth = tenth

        figure = confusion_figure(confusion, self.classes)
        self.board.image("pictures/confusion of the classes", figure, step)
        table = confused_table(confusion, self.classes)
        self.board.text("pictures/most often confused", table, step)

        with precision.autocast():
            logits = model(self.images)
        images = displayable_images(self.images, self.preprocessing, IMAGE_SIDE)
        probabilities = logits.float().softmax(1)
        figure = prediction_figure(images, probabilities, self.labels, self.classes)
        self.board.image("pictures/predictions on validation images", figure, step)

    def class_accuracies(self, confusion: Tensor, step: int) -> None:
        """Draw a curve for each class that has images, or one histogram where they are many."""
        counts = confusion.sum(1)
        known = (counts > 0).nonzero()[:, 0]
        accuracy = confusion.diagonal()[known] / counts[known]
        if len(self.classes) > MANY_CLASSES:
            self.board.histogram("classes/validation accuracy of the classes", accuracy, step)
            return
        for label, value in zip(known.tolist(), accuracy.tolist(), strict=True):
            # A slash would make a section of its own
            name = self.classes[label].replace("/", "_")
            self.board.scalar(f"classes/{label:02} {name}", value, step)

    def attention(self, model: VisionTransformer, step: int) -> None:
        """Draw the attention maps of the first of the images."""
        figure = attention_figure(model, self.preprocessing, self.images[:ATTENTION_IMAGES])
        self.board.image("pictures/attention on validation images", figure, step)


def watch_gradients(
    board: TensorBoard,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    interval: int,
) -> None:
    """Write the norm of every layer's gradient from now on, after clipping.

    They are written at step 1 and each multiple of the interval. A hook of the optimizer, since
    the gradients exist only until its step.
    """
    # Frozen layers have none
    layers = {
        name: [item for item in parameters if item.requires_grad]
        for name, parameters in parameters_by_layer(model).items()
    }
    layers = {name: parameters for name, parameters in layers.items() if parameters}

    def write(*_: object) -> None:
        # The step that is about to be made
        step = progress.step + 1
        if not board.active or not (step == 1 or step % interval == 0):
            return

        # They stay on the device, and are read together, which waits for it once
        norms = []
        for parameters in layers.values():
            gradients = [item.grad for item in parameters if item.grad is not None]
            norms.append(nn.utils.get_total_norm(gradients))
        for name, norm in zip(layers, torch.stack(norms).tolist(), strict=True):
            board.scalar(f"gradients/{name}", norm, step)

    optimizer.register_step_pre_hook(write)
