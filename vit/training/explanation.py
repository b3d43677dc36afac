"""TODO: say what this file is for."""

from vit.checkpoints.model import model_on_shapes
from vit.config.config import Config, to_dict
from vit.data.datasets import CLASS_COUNTS
from vit.model.cost import count_macs, stage_shapes, training_memory
from vit.runtime.device import choose_device
from vit.runtime.precision import choose_precision


def explanation(config: Config) -> str:
    """What explain=true prints: the shape at every stage of one batch, the costs, and the memory training would take."""
    device = choose_device(config.runtime.device.name)
    precision = choose_precision(config.train.precision.name, device, config.model.hidden_size)
    classes = config.data.num_classes or CLASS_COUNTS.get(config.data.name.name, 1000)
    model = model_on_shapes(to_dict(config)["model"], classes)
    batch = config.train.micro_batch_size or config.train.batch_size
    macs, shapes = count_macs(model), stage_shapes(model, batch)
    memory = training_memory(
        model, batch, 4 if precision.name == "fp32" else 2, bool(config.train.ema_decay)
    )
    patches = model.embeddings.patch_embedding
    width = max(len(name) for name, _ in shapes)
    return "\n".join(
        [
            f"{config.model.name} on {batch} images of {patches.num_channels} x {patches.image_size[0]} x {patches.image_size[1]}, "
            f"{classes} classes",
            "",
            f"{'images':{width}}  {(batch, patches.num_channels, *patches.image_size)}",
            *(f"{name:{width}}  {shape}" for name, shape in shapes),
            "",
            f"parameters  {model.num_parameters():,}",
            f"forward     {macs / 1e9:.4g} GMACs an image ({2 * macs / 1e9:.4g} GFLOPs)",
            f"training    {6 * macs / 1e9:.4g} GFLOPs an image, {6 * macs * config.train.batch_size / 1e12:.4g} TFLOPs a step",
            f"memory      about {sum(memory.values()) / 2**30:.2f} GiB to train in {precision.name}: "
            + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if size),
        ]
    )
