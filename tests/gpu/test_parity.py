"""Models, optimizers and augmentations on a GPU give what they give on the CPU."""

import pytest
import torch
from composing import configured, files_of
from small_training import CPU, batch, make_model, make_state, make_step

from vit.augment.batch import BatchAugmentation
from vit.augment.policies import POLICIES, build_policies
from vit.checkpoints.model import build_on_meta
from vit.data.splits import ImageDataset, ImageSplit
from vit.runtime.attention_kernels import exclude_faulty_attention
from vit.runtime.machine import Machine
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training.prepare import build_optimizer_of, make_batches

MEAN = {"cls_token": False, "global_pool": "mean"}
# Lengths of 64, 65 and 197 tokens, as the recipes have, and what changes attention
MODELS = {
    "32 px, mean": {"image_size": 32, "patch_size": 4, **MEAN},
    "32 px, class token": {"image_size": 32, "patch_size": 4},
    "224 px": {"image_size": 224, "patch_size": 16},
    "rope": {"image_size": 32, "patch_size": 4, "position": "rope2d", "num_registers": 3},
    "norms": {"qk_norm": True, "layer_scale": 0.1, "representation_size": 24},
    "hybrid": {"image_size": 64, "patch_size": 16, "resnet_stages": [1, 1, 1]},
    "conv stem": {"image_size": 32, "patch_size": 4, "conv_stem": [32, 64], **MEAN},
}
# Relative to the norm of the CPU's float32
TOLERANCES = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 2e-2}


def passes(model, device, precision):
    """Logits and the gradients of all parameters, on the CPU."""
    model = model.to(device).train()
    exclude_faulty_attention(device, model)
    shape = model.embeddings.patch_embedding.image_size
    images = torch.randn(8, 3, *shape, generator=torch.Generator().manual_seed(1)).to(device)
    with Precision(precision, device).autocast():
        logits = model(images)
    logits.float().logsumexp(1).sum().backward()
    gradients = {name: item.grad for name, item in model.named_parameters()}
    return {"logits": logits.detach().float().cpu()} | {
        name: gradient.float().cpu() for name, gradient in gradients.items()
    }


def built(settings):
    model = make_model(
        hidden_size=128, num_heads=2, init="trunc_normal", init_range=0.05, **settings
    )
    torch.nn.init.normal_(model.head.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    return model


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients(device, name, precision):
    ours = passes(built(MODELS[name]), device, precision)
    reference = passes(built(MODELS[name]), CPU, "fp32")
    # Together, since some gradients are zero but for rounding, such as those of the keys' biases
    for keys in (["logits"], [key for key in reference if key != "logits"]):
        difference, scale = (
            torch.cat([tensors(key).flatten() for key in keys]).norm()
            for tensors in (lambda key: ours[key] - reference[key], reference.get)
        )
        assert torch.isfinite(difference)
        assert difference < TOLERANCES[precision] * scale


@pytest.mark.parametrize("precision", TOLERANCES)
def test_losses_of_many_steps(device, precision):
    def losses(device, precision):
        state = make_state(make_model().to(device), precision=Precision(precision, device))
        step = make_step(state, micro_batch_size=5)
        result = []
        for number in range(20):
            images, labels = batch(number)
            result.append(step(images.to(device), labels.to(device))[0].item())
            state.progress.step += 1
        return torch.tensor(result)

    ours, reference = losses(device, precision), losses(CPU, "fp32")
    assert reference[-1] < 0.8 * reference[0]
    tolerance = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.02}[precision]
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", files_of("optimizer"))
def test_every_optimizer(device, name):
    # Muon's products are in bfloat16 where the device has it
    tolerance = 2e-2 if name == "muon" else 1e-5

    def trained(device):
        model = make_model(hidden_size=32).to(device)
        optimizer = build_optimizer_of(configured(f"optimizer={name}"), model)
        generator = torch.Generator().manual_seed(2)
        for _ in range(5):
            for parameter in model.parameters():
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = gradient.to(device)
            optimizer.step()
        return torch.cat([item.detach().flatten().cpu() for item in model.parameters()])

    start = torch.cat([item.detach().flatten() for item in make_model(hidden_size=32).parameters()])
    ours, reference = trained(device), trained(CPU)
    assert (ours - reference).norm() < tolerance * (reference - start).norm()


def noise(count, side=32):
    generator = torch.Generator().manual_seed(3)
    # Smooth, since one more or less in the last bit of a position changes noise altogether
    pixels = torch.rand(count, 3, 5, 5, generator=generator)
    pixels = torch.nn.functional.interpolate(pixels, side, mode="bicubic").clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8)


def nearly_equal(ours, reference):
    """Of uint8 pixels: rounding falls the other way in a few."""
    difference = (ours.cpu().int() - reference.int()).abs()
    assert ours.shape == reference.shape
    # Thresholds, such as those of solarize and posterize, make a jump of a difference of one
    assert (difference > 1).float().mean() < 0.005


@pytest.mark.parametrize("name", ["none", *POLICIES])
def test_every_policy(device, name):
    policies = build_policies(name, None, None, 0.3)
    augmentation = BatchAugmentation(0, (32, 32), 0.125, None, 0.5, policies)
    pixels, indices = noise(64), torch.arange(64)
    ours = augmentation(pixels.to(device), indices, indices)
    nearly_equal(ours, augmentation(pixels, indices, indices))


@pytest.mark.parametrize("name", files_of("augment"))
def test_every_augmentation(device, name):
    config = configured(
        "data=cifar10", "model.image_size=32", "train.batch_size=64", f"augment={name}"
    )
    images = ImageSplit("images", torch.arange(128) % 10, noise(128))
    data = ImageDataset([str(label) for label in range(10)], images, None, images)

    def made(device):
        machine = Machine(device, Processes(), workers=0, sharded=False)
        batches = make_batches(config, data, machine, StopSignal())
        return [tensor.cpu() for made in batches.training(0, 2) for tensor in made]

    for ours, reference in zip(made(device), made(CPU), strict=True):
        # Normalized: an eight-bit step is 0.02
        far = (ours - reference).abs() > 0.03
        assert far.float().mean() < 0.005


def test_models_of_the_configuration_are_those_of_these_tests():
    """The lengths of the sequences above are those of the recipes."""
    lengths = set()
    for name in files_of("model"):
        embeddings = build_on_meta(vars(configured(f"model={name}").model)).embeddings
        lengths.add(embeddings.num_prefix + embeddings.patch_embedding.num_patches)
    assert {65, 197} <= lengths
