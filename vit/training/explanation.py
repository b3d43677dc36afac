"""What explain=true prints: the shape at every stage, the costs and the memory of training."""

from dataclasses import asdict

from vit.checkpoints.model import build_on_meta
from vit.config.config import Config
from vit.data.datasets import DATASETS
from vit.model.cost import count_macs, stage_shapes, training_memory
from vit.runtime.device import choose_device
from vit.runtime.precision import choose_precision

UNKNOWN_CLASSES = 1000  # assumed where only reading the data set would tell


def explanation(config: Config) -> str:
    """Return the page that explain=true prints.

    Neither data nor weights are needed: the model has shapes but no numbers.
    """
    device = choose_device(config.runtime.device)
    precision = choose_precision(config.train.precision, device, config.model.hidden_size)

    # The head's size depends on the data set, which is not read here
    published = DATASETS[config.data.name].num_classes
    num_classes = config.data.num_classes or published or UNKNOWN_CLASSES
    model = build_on_meta(asdict(config.model), num_classes)

    # Activations are those of a micro-batch; they are what mostly fills the memory
    batch_size = config.train.micro_batch_size or config.train.batch_size
    bytes_per_activation = 4 if precision.name == "fp32" else 2
    memory = training_memory(
        model, batch_size, bytes_per_activation, averaged=config.train.ema_decay > 0
    )

    patches = model.embeddings.patch_embedding
    height, width = patches.image_size
    shapes = [("images", (batch_size, patches.num_channels, height, width))]
    shapes += stage_shapes(model, batch_size)
    name_width = max(len(name) for name, _ in shapes)

    # Forward and twice that backward, two operations a multiply-add: 6 FLOPs
    macs = count_macs(model)
    step_flops = 6 * macs * config.train.batch_size
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if size)
    total = sum(memory.values()) / 2**30

    lines = [
        f"{config.model.name} on {batch_size} images of "
        f"{patches.num_channels} x {height} x {width}, {num_classes} classes",
        "",
        *(f"{name:{name_width}}  {shape}" for name, shape in shapes),
        "",
        f"parameters  {model.num_parameters():,}",
        f"forward     {macs / 1e9:.4g} GMACs an image ({2 * macs / 1e9:.4g} GFLOPs)",
        f"training    {6 * macs / 1e9:.4g} GFLOPs an image, {step_flops / 1e12:.4g} TFLOPs a step",
        f"memory      about {total:.2f} GiB to train in {precision.name}: {parts}",
    ]
    return "\n".join(lines)
