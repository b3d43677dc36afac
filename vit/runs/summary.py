"""From a configuration to the parts of a run, and from a run to words for people: what train.py needs beside its story."""

from vit.config.config import Config
from vit.evaluation.accuracy import wilson_interval
from vit.runs.folder import RunFolder, log
from vit.text import format_duration
from vit.training.state import Progress


def cheaper_command(macs: int, config: Config) -> str:
    """The command for the largest model that takes less than half the work on the same data."""
    small = config.data.name.name in ("digits", "cifar10", "cifar100")
    sizes = (
        {"vit_s4": 1.4e9, "vit_ti4": 0.35e9} if small else {"vit_s16": 4.6e9, "vit_ti16": 1.26e9}
    )
    command = f"python train.py data={config.data.name.name}"
    model = next((name for name, cost in sizes.items() if cost < macs / 2), None)
    return (
        f"{command} train.epochs={config.train.epochs / 4:g}"
        if model is None
        else f"{command} model={model}"
    )


def summarize(
    run: RunFolder, progress: Progress, test: dict[str, float], val_title: str, test_title: str
) -> None:
    """The last lines of a run: what it reached, where it lies and what to do next."""
    low, high = wilson_interval(test["top1"], int(test["n"]))
    if progress.best_top1 is not None:
        log.info(
            f"best validation top-1  {progress.best_top1:.2%}, after step {progress.best_step} ({val_title})"
        )
    log.info(
        f"test top-1             {test['top1']:.2%}, 95 % interval {low:.2%} to {high:.2%} ({test_title})"
    )
    log.info(
        f"trained in             {format_duration(progress.seconds)}; the run lies in {run.path}"
    )
    log.info(
        f"next\n  python evaluate.py checkpoint={run.path}/checkpoints/best.safetensors\n"
        f"  tensorboard --logdir {'outputs' if run.path.parts[0] == 'outputs' else run.path}\n"
        "  python train.py model=vit_ti4 data=cifar10"
    )
