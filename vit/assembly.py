"""From a configuration to the parts of a run, and from a run to words for people: what train.py needs beside its story."""

import errno

import torch
from torch import Tensor

from vit import config as conf
from vit import runtime
from vit.augment import BatchAugmentation, Mixing
from vit.checkpoint import build_model
from vit.config import Config
from vit.data import CLASS_COUNTS, Augmentation
from vit.errors import ConfigError
from vit.evaluation import interval
from vit.explain import count_macs, stage_shapes, training_memory
from vit.model import VisionTransformer
from vit.policies import build_policies
from vit.run_folder import RunFolder, log
from vit.tracking import clock
from vit.training import Progress
from vit.transforms import Preprocessing, TrainingTransform

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def build_augmentation(config: Config, preprocessing: Preprocessing, num_classes: int) -> Augmentation:
    """All random changes of training that the configuration asks for; what mirrors a class into another is left out."""
    augment, flip = config.augment, config.augment.flip if config.data.mirror else 0.0
    policies = build_policies(augment.policy.name, augment.policy_ops, augment.policy_magnitude, augment.color_jitter)
    return Augmentation(
        TrainingTransform(preprocessing, augment.crop_scale, flip, policies),
        BatchAugmentation(config.seed, preprocessing.image_size, augment.pad, augment.crop_scale, flip, policies),
        augment.erasing,
        Mixing(config.seed, num_classes, augment.mixup, augment.cutmix,
               1.0 if augment.mix_probability is None else augment.mix_probability),
        config.data.unreadable.name == "skip")


def model_on_shapes(settings: dict, num_classes: int = 2) -> VisionTransformer:
    """The model without its numbers; raises ConfigError where it is impossible."""
    try:
        with torch.device("meta"):
            return build_model(settings, num_classes)
    except ValueError as error:
        raise ConfigError(f"model={settings['name']}: {error}") from None


def class_names(targets: Tensor, classes: list[str]) -> list[str]:
    """What the pictures are: labels (B,) by name, and mixed ones (B, classes) by the names and shares of their two."""
    if targets.ndim == 1:
        return [classes[label] for label in targets]
    return [" + ".join(f"{classes[label]} {shares[label]:.2f}" for label in shares.nonzero()[:, 0]) for shares in targets.cpu()]


def explanation(config: Config) -> str:
    """What explain=true prints: the shape at every stage of one batch, the costs, and the memory training would take."""
    device = runtime.choose_device(config.runtime.device.name)
    precision = runtime.choose_precision(config.train.precision.name, device, config.model.hidden_size)
    classes = config.data.num_classes or CLASS_COUNTS.get(config.data.name.name, 1000)
    model = model_on_shapes(conf.plain(config)["model"], classes)
    batch = config.train.micro_batch_size or config.train.batch_size
    macs, shapes = count_macs(model), stage_shapes(model, batch)
    memory = training_memory(model, batch, 4 if precision.name == "fp32" else 2, bool(config.train.ema_decay))
    patches = model.embeddings.patch_embedding
    width = max(len(name) for name, _ in shapes)
    return "\n".join([
        f"{config.model.name} on {batch} images of {patches.num_channels} x {patches.image_size[0]} x {patches.image_size[1]}, "
        f"{classes} classes", "", f"{'images':{width}}  {(batch, patches.num_channels, *patches.image_size)}",
        *(f"{name:{width}}  {shape}" for name, shape in shapes), "",
        f"parameters  {model.num_parameters():,}",
        f"forward     {macs / 1e9:.4g} GMACs an image ({2 * macs / 1e9:.4g} GFLOPs)",
        f"training    {6 * macs / 1e9:.4g} GFLOPs an image, {6 * macs * config.train.batch_size / 1e12:.4g} TFLOPs a step",
        f"memory      about {sum(memory.values()) / 2**30:.2f} GiB to train in {precision.name}: "
        + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items() if size),
    ])


def cheaper_command(macs: int, config: Config) -> str:
    """The command for the largest model that takes less than half the work on the same data."""
    small = config.data.name.name in ("digits", "cifar10", "cifar100")
    sizes = {"vit_s4": 1.4e9, "vit_ti4": 0.35e9} if small else {"vit_s16": 4.6e9, "vit_ti16": 1.26e9}
    command = f"python train.py data={config.data.name.name}"
    model = next((name for name, cost in sizes.items() if cost < macs / 2), None)
    return f"{command} train.epochs={config.train.epochs / 4:g}" if model is None else f"{command} model={model}"


def summarize(run: RunFolder, progress: Progress, test: dict[str, float], val_title: str, test_title: str) -> None:
    """The last lines of a run: what it reached, where it lies and what to do next."""
    low, high = interval(test["top1"], int(test["n"]))
    if progress.best_top1 is not None:
        log.info(f"best validation top-1  {progress.best_top1:.2%}, after step {progress.best_step} ({val_title})")
    log.info(f"test top-1             {test['top1']:.2%}, 95 % interval {low:.2%} to {high:.2%} ({test_title})")
    log.info(f"trained in             {clock(progress.seconds)}; the run lies in {run.path}")
    log.info(f"next\n  python evaluate.py checkpoint={run.path}/checkpoints/best.safetensors\n"
             f"  tensorboard --logdir {'outputs' if run.path.parts[0] == 'outputs' else run.path}\n"
             "  python train.py model=vit_ti4 data=cifar10")


def machine_fault(error: OSError | RuntimeError, config: Config) -> str | None:
    """What to tell a user of a full disk, too little memory or a lost process; None for anything else, which is a bug."""
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f"the disk takes no more ({error.strerror or error}); make room"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported yet
        smaller = max(1, (config.train.micro_batch_size or config.train.batch_size) // 2)
        return (f"out of memory: try train.micro_batch_size={smaller}, which leaves the result as it is "
                f"({conf.first_line(error)})")
    if "gloo/transport" in str(error) or type(error).__name__.startswith("Dist"):
        return f"another process of this run has ended ({conf.first_line(error)})"
    if str(error).startswith("DataLoader worker"):
        return f"a process that decodes pictures died ({conf.first_line(error)}); if memory is short, lower runtime.workers"
    return None
