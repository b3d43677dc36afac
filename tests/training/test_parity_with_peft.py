"""Low-rank changes against peft, on Hugging Face's ViT with the same weights and batches."""

import pytest
import torch
from foreign_models import hf_model, images
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

from vit.model.low_rank import MATRICES, add_low_rank, merge_low_rank
from vit.model.vision_transformer import VisionTransformer
from vit.training.optimizers import build_optimizer

RANK, STEPS = 4, 5
LABELS = torch.tensor([0, 3, 1])


@pytest.fixture
def models(tmp_path):
    """(our model, peft's), in float64: the same weights, the same random A, and B = 0."""
    theirs = hf_model()
    theirs.save_pretrained(tmp_path)
    ours = VisionTransformer.load_from(tmp_path).double().train()
    torch.manual_seed(7)
    add_low_rank(ours, RANK)

    names = their_names(theirs)
    torch.manual_seed(7)
    config = LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=[name for block in names for name in block],
        modules_to_save=["classifier"],
    )
    theirs = get_peft_model(theirs, config).double().train()
    for block, twins in zip(ours.encoder.blocks, names, strict=True):
        for name, twin in zip(MATRICES, twins, strict=True):
            layer = lora_layer(theirs, twin)
            assert not layer.lora_B["default"].weight.any()
            layer.lora_A["default"].weight.data.copy_(
                block.attention.get_submodule(name).down.weight
            )
    return ours, theirs, names


def their_names(model: nn.Module) -> list[list[str]]:
    """The names of query, key, value and projection in each block, in the order of MATRICES."""
    linear = [name for name, item in model.named_modules() if isinstance(item, nn.Linear)]
    width = model.config.hidden_size
    square = [
        name for name in linear if tuple(model.get_submodule(name).weight.shape) == (width, width)
    ]
    assert len(square) == 4 * model.config.num_hidden_layers
    blocks = [square[start : start + 4] for start in range(0, len(square), 4)]
    for block in blocks:
        for name, word in zip(block, ("q", "k", "v", "o"), strict=True):
            assert name.rpartition(".")[2][0] in (word, "d"), name
    return blocks


def lora_layer(model, name):
    return model.get_submodule(f"base_model.model.{name}")


def train(model, optimizer, logits_of):
    """STEPS steps on the same batch; the losses."""
    batch = images().double()
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(logits_of(model(batch)), LABELS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_outputs_losses_and_weights_after_steps_are_pefts(models):
    ours, theirs, names = models
    optimizer = build_optimizer(ours, name="adamw", lr=1e-2, weight_decay=0.0)
    trained = [item for item in theirs.parameters() if item.requires_grad]
    number = sum(item.numel() for item in trained)
    assert number == sum(item.numel() for item in ours.parameters() if item.requires_grad)
    losses = train(ours, optimizer, lambda logits: logits)
    expected = train(
        theirs, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), lambda o: o.logits
    )
    assert losses == pytest.approx(expected, rel=1e-7)
    assert losses[-1] < 0.5 * losses[0]

    for block, twins in zip(ours.encoder.blocks, names, strict=True):
        for name, twin in zip(MATRICES, twins, strict=True):
            layer, peft = block.attention.get_submodule(name), lora_layer(theirs, twin)
            for mine, other in ((layer.down, peft.lora_A), (layer.up, peft.lora_B)):
                torch.testing.assert_close(
                    mine.weight, other["default"].weight, rtol=1e-4, atol=1e-7
                )


def test_merged_weights_are_pefts(models, tmp_path):
    ours, theirs, names = models
    train(ours, build_optimizer(ours, name="sgd", lr=0.1, weight_decay=0.0), lambda logits: logits)
    trained = [item for item in theirs.parameters() if item.requires_grad]
    train(theirs, torch.optim.SGD(trained, lr=0.1), lambda outputs: outputs.logits)
    merged = merge_low_rank(ours.state_dict())
    plain = theirs.merge_and_unload()
    for number, twins in enumerate(names):
        for name, twin in zip(MATRICES, twins, strict=True):
            weight = merged[f"encoder.blocks.{number}.attention.{name}.weight"]
            torch.testing.assert_close(weight, plain.get_submodule(twin).weight)
    with torch.no_grad():
        logits = plain.eval()(images().double()).logits
        torch.testing.assert_close(ours.eval()(images().double()), logits)
