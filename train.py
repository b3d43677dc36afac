"""Train a Vision Transformer: compose the configuration, build the parts, fit, say what came out.

    python train.py model=vit_b16 data=cifar10
    python train.py --help
"""

import contextlib
import sys
from pathlib import Path
from typing import Any, cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vit import config as conf
from vit import sweep
from vit.config import Config
from vit.errors import ConfigError, GaveUp
from vit.interrupts import StopRequest
from vit.run_folder import RunFolder, log

SLOW_SECONDS = 2 * 3600  # a longer forecast without a GPU names a cheaper command


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(composed: DictConfig) -> float | None:
    """One run; under -m one job of the sweep. Returns the validation top-1, for sweepers to maximise."""
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        return sweep.run_job(Path(job.runtime.output_dir), Path(job.sweep.dir), list(job.overrides.task))
    stop = StopRequest().install()
    with conf.ending(), RunFolder(Path(job.runtime.output_dir)).outcome() as run:
        config, warnings = read_config(composed, run, list(job.overrides.task))
        conf.validate(config)
        return train(config, run, stop, warnings)
    return None


def read_config(composed: DictConfig, run: RunFolder, overrides: list[str]) -> tuple[Config, list[str]]:
    """The run's configuration and warnings: as composed, or where a run is resumed its own with the command line's changes."""
    resuming = composed.resume is not None and (composed.resume != "auto" or run.has_checkpoint())
    if not resuming:
        run.require_empty()
        return conf.from_composed(composed), []
    run.require_checkpoint()
    saved = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.load(run.path / "config.yaml")))
    container, warnings = conf.resumed(saved, conf.explicit_changes(composed, overrides),
                                       composed.resume_changed.name == "allow")
    return conf.from_plain(container, str(run.path / "config.yaml")), warnings


def train(config: Config, run: RunFolder, stop: StopRequest, warnings: list[str]) -> float | None:
    # Imported here so that --help and a mistaken command answer at once.
    import torch

    from vit import checkpoint, runtime
    from vit.augment import BatchAugmentation
    from vit.data import SampleOrder, evaluation_batches, load_data, training_batches
    from vit.evaluation import evaluate, interval
    from vit.model import VisionTransformer
    from vit.optim import WeightAverage, build_optimizer, build_schedule, load_optimizer_tensors, optimizer_tensors
    from vit.randomness import random_seed
    from vit.tracking import Tracker, clock, screen
    from vit.training import Progress, Trainer, every
    from vit.transforms import Preprocessing, TrainingTransform

    # The parts that need no data, so that a mistake in them is told before any is read
    plain = conf.plain(config)
    device = runtime.choose_device(plain["runtime"]["device"])
    runtime.use_threads(config.runtime.threads)
    runtime.use_deterministic_kernels(config.runtime.deterministic)
    torch.manual_seed(random_seed(config.seed, "initial weights"))
    try:
        with torch.device("meta"):
            image_size = checkpoint.build_model(plain["model"], num_classes=2).embeddings.patch_embedding.image_size
        build_schedule(**plain["schedule"], total_steps=config.train.steps or 10**9)
    except ValueError as error:
        raise ConfigError(f"model={config.model.name}: {error}") from None

    # Data
    data = load_data(**conf.data_arguments(plain["data"], plain["model"]), image_size=image_size, device=device)
    preprocessing = Preprocessing(image_size, config.model.num_channels, tuple(config.data.mean), tuple(config.data.std),
                                  config.data.eval_crop, config.data.interpolation.name)
    batch_size, flip = config.train.batch_size, config.augment.flip if config.data.mirror else 0.0
    if batch_size > len(data.train):
        raise ConfigError(f"train.batch_size={batch_size} is more than the {len(data.train)} training images; lower it")
    steps_per_epoch = len(data.train) / batch_size
    total_steps = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    randaugment = (config.augment.randaugment_ops, config.augment.randaugment_magnitude)
    workers = runtime.loader_workers(config.runtime.workers)

    run.start_log(screen)
    for warning in warnings:
        log.info(f"warning: {warning}")

    # Model, optimizer, and where a run is resumed their state
    model = checkpoint.build_model(plain["model"], len(data.classes)).to(device)
    precision = runtime.choose_precision(plain["train"]["precision"], device, config.model.hidden_size)
    average = WeightAverage(model, config.train.ema_decay) if config.train.ema_decay else None
    optimizer = build_optimizer(model, **plain["optimizer"])
    schedule = build_schedule(**plain["schedule"], total_steps=total_steps)
    progress = Progress()
    if run.has_checkpoint():
        tensors, header, warning = checkpoint.read_last(run.checkpoints)
        checkpoint.check_classes(header["classes"], data.classes, run.checkpoints)
        progress = Progress(**header["progress"])
        checkpoint.load_weights(model, checkpoint.select(tensors, "model/"), str(run.checkpoints))
        load_optimizer_tensors(model, optimizer, checkpoint.select(tensors, "optimizer/"))
        if average is not None:
            checkpoint.load_weights(average.model, checkpoint.select(tensors, "average/"), str(run.checkpoints))
        precision = runtime.Precision(header["precision"], device)
        log.info((f"warning: {warning}; " if warning else "") + f"resuming {run.path} after step {progress.step}")
    for group in optimizer.param_groups:
        group["initial_lr"] = config.optimizer.lr
    run_flops = 6 * model.macs() * batch_size * total_steps
    forward, warning = runtime.compile_model(model, config.runtime.compile, device, run_flops)
    if warning:
        log.info(warning)

    def save_last() -> None:
        tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors(model, optimizer).items()}
        if average is not None:
            tensors |= {f"average/{name}": tensor for name, tensor in average.model.state_dict().items()}
        checkpoint.write_checkpoint(run.checkpoints / checkpoint.LAST, tensors, header_of("last"),
                                    keep=run.checkpoints / checkpoint.PREVIOUS)

    def save_best() -> None:
        checkpoint.write_checkpoint(run.checkpoints / checkpoint.BEST, trainer.selected().state_dict(), header_of("best"))

    def header_of(kind: str) -> dict:
        return {"kind": kind, "config": plain, "classes": data.classes, "preprocessing": preprocessing.plain(),
                "precision": precision.name, "progress": vars(progress), "versions": {"torch": torch.__version__}}

    def evaluate_split(evaluated: torch.nn.Module, images) -> dict[str, float]:
        return evaluate(evaluated, evaluation_batches(images, batch_size, preprocessing, workers, device), precision)

    def forecast(seconds: float) -> None:
        log.info(f"about {clock(seconds)} to go")
        if seconds > SLOW_SECONDS and device.type == "cpu":
            log.info(f"  that is long without a GPU; cheaper: {cheaper_command(model.macs(), config)}")

    # What is about to happen
    parts = {"train": data.train, "val": data.val, "test": data.test}
    log.info(f"model  {config.model.name}: {model.num_parameters():,} parameters, {2 * model.macs() / 1e9:.3g} GFLOPs an image")
    for name, images in parts.items():
        log.info(f"{name:6} {images or 'nothing held out: the last weights are taken'}")
    log.info(f"run    {total_steps:,} steps of {batch_size} images ({total_steps / steps_per_epoch:.3g} epochs), "
             f"{precision.name} on {runtime.describe_device(device)}{', compiled' if forward is not model else ''}; "
             f"{'averaged' if average else 'raw'} weights are evaluated and saved")
    log.info(f"folder {run.path}")
    if data.train.pixels is not None and image_size[0] >= 4 * data.train.pixels.shape[-1]:
        native = data.train.pixels.shape[-1]
        log.info(f"note   images of {native} px are enlarged to {image_size[0]}; from scratch a model of their own size learns "
                 f"faster and costs less: {cheaper_command(model.macs(), config)}")

    # Fit
    run.checkpoints.mkdir(exist_ok=True)
    if progress.step == 0:
        run.write_config(OmegaConf.to_yaml(plain))
    tracker = Tracker(run.path, progress.step, total_steps, steps_per_epoch, batch_size)
    order = SampleOrder(len(data.train), batch_size, config.seed)
    train_images = data.train.to(device)

    def batches(first: int, last: int):
        return training_batches(train_images, order, first, last, preprocessing,
                                BatchAugmentation(config.seed, config.augment.pad, flip, *randaugment),
                                TrainingTransform(preprocessing, config.augment.crop_scale, flip, *randaugment),
                                workers, device)

    trainer = Trainer(
        model=model, forward=forward, optimizer=optimizer, schedule=schedule, average=average, precision=precision,
        batches=batches(progress.step, total_steps), total_steps=total_steps,
        micro_batch_size=config.train.micro_batch_size, label_smoothing=config.train.label_smoothing,
        clip_norm=config.train.clip_norm, seed=config.seed, progress=progress, tracker=tracker, stop=stop,
        evaluate=None if data.val is None else lambda evaluated: evaluate_split(evaluated, data.val),
        evaluation_due=every(config.train.eval_every * steps_per_epoch, total_steps),
        save_last=save_last, save_best=save_best, forecast=forecast,
        log_every=config.train.log_every, save_every=config.train.save_every,
    )
    if not run.has_checkpoint():
        save_last()
        tracker.text("configuration", f"```yaml\n{OmegaConf.to_yaml(plain)}```")
        pictures, labels = next(batches(0, 1))
        tracker.pictures(preprocessing.to_picture(pictures[:64]), [data.classes[label] for label in labels[:64]], 0)
    try:
        with contextlib.closing(trainer.batches):  # ends the processes that decode pictures
            trainer.fit()
    except torch.OutOfMemoryError as error:
        smaller = max(1, (config.train.micro_batch_size or batch_size) // 2)
        raise GaveUp(f"out of memory: try train.micro_batch_size={smaller}, which leaves the result as it is "
                     f"({error})") from None

    # What came out
    best: VisionTransformer = checkpoint.load(run.checkpoints / checkpoint.BEST).to(device)
    test = evaluate_split(best, data.test)
    tracker.evaluation(total_steps, "test", test)
    val_top1 = progress.best_top1
    tracker.hyperparameters(conf.flatten(plain), {"hparam/test_top1": test["top1"],
                                                  **({} if val_top1 is None else {"hparam/val_top1": val_top1})})
    tracker.close()
    run.write_result(status="finished", reason="all steps done", val_top1=val_top1, test_top1=test["top1"],
                     test_loss=test["loss"], best_step=progress.best_step, steps=total_steps, params=model.num_parameters(),
                     seconds=round(progress.seconds, 2),
                     images_per_second=round(total_steps * batch_size / progress.seconds, 2))
    low, high = interval(test["top1"], int(test["n"]))
    if data.val is not None and val_top1 is not None:
        log.info(f"best validation top-1  {val_top1:.2%}, after step {progress.best_step} ({data.val})")
    log.info(f"test top-1             {test['top1']:.2%}, 95 % interval {low:.2%} to {high:.2%} ({data.test})")
    log.info(f"trained in             {clock(progress.seconds)}; the run lies in {run.path}")
    log.info(f"next\n  python evaluate.py checkpoint={run.checkpoints / checkpoint.BEST}\n"
             f"  tensorboard --logdir {'outputs' if run.path.parts[0] == 'outputs' else run.path}\n"
             "  python train.py model=vit_ti4 data=cifar10")
    return val_top1


def cheaper_command(macs: int, config: Config) -> str:
    """The command for the largest model that takes less than half the work on the same data."""
    small = config.data.name.name in ("digits", "cifar10", "cifar100")
    sizes = {"vit_s4": 1.4e9, "vit_ti4": 0.35e9} if small else {"vit_s16": 4.6e9, "vit_ti16": 1.26e9}
    command = f"python train.py data={config.data.name.name}"
    model = next((name for name, cost in sizes.items() if cost < macs / 2), None)
    return f"{command} train.epochs={config.train.epochs / 4:g}" if model is None else f"{command} model={model}"


if __name__ == "__main__":
    conf.register()
    try:
        code = conf.command_line(main, Config)
    finally:
        sweep.print_tables()
    sys.exit(code)
