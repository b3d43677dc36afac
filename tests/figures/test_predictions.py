"""Figures and tables of what a model gets right and wrong."""

import torch
from torch import nn

from vit.figures.predictions import (
    RIGHT,
    WRONG,
    class_names,
    confused_table,
    confusion_figure,
    parameters_by_layer,
    prediction_figure,
)
from vit.model.vision_transformer import VisionTransformer


def test_the_confusion_as_an_image_and_a_table():
    names = [f"Klasse | {number} 鳥" for number in range(30)]
    confusion = torch.zeros(30, 30, dtype=torch.int64).fill_diagonal_(3)
    confusion[0, 1] = 1
    image = confusion_figure(confusion, names)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    table = confused_table(confusion, names).splitlines()
    assert len(table) == 3
    assert table[2] == "| Klasse \\| 0 鳥 | Klasse \\| 1 鳥 | 1 of 4 |"


def test_the_names_of_labels_and_of_mixed_targets():
    classes = ["cat", "dog", "bird"]
    assert class_names(torch.tensor([2, 0]), classes) == ["bird", "cat"]
    mixed = torch.tensor([[0.3, 0.0, 0.7], [0.0, 1.0, 0.0]])
    assert class_names(mixed, classes) == ["cat 0.30 + bird 0.70", "dog 1.00"]


def colors_of(figure: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, figure.flatten(1).T.tolist()))


def test_mistakes_are_red():
    images = torch.zeros(10, 3, 64, 96)
    labels = torch.arange(10) % 4
    probabilities = torch.eye(4)[labels]
    right = prediction_figure(images, probabilities, labels, list("abcd"))
    wrong = prediction_figure(images, probabilities.roll(1, 0), labels, list("abcd"))
    assert right.shape[0] == 3
    assert RIGHT in colors_of(right)
    assert WRONG not in colors_of(right)
    assert WRONG in colors_of(wrong)
    assert RIGHT not in colors_of(wrong)


def test_every_trained_parameter_belongs_to_one_layer():
    model = VisionTransformer(
        image_size=(16, 16), patch_size=8, hidden_size=32, num_layers=2, num_heads=4, num_classes=3
    )
    layers = parameters_by_layer(model)
    assert list(layers) == ["embeddings", "block 00", "block 01", "final norm", "head"]
    parameters = [parameter for layer in layers.values() for parameter in layer]
    assert {id(each) for each in parameters} == {id(each) for each in model.parameters()}
    assert len(parameters) == len(list(model.parameters()))
    model.requires_grad_(False)
    nn.Module.requires_grad_(model.head, True)
    assert list(parameters_by_layer(model)) == ["head"]
