"""Train a Vision Transformer: compose the configuration, build the parts, fit, say what came out.

python train.py model=vit_b16 data=cifar10
python train.py --help
"""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vit.config.command_line import AlreadyTold, command_line, ending, prepare_arguments
from vit.config.config import (
    Config,
    flatten,
    from_composed,
    from_dict,
    read_yaml,
    register,
    to_dict,
    validate,
)
from vit.config.data import data_arguments
from vit.config.resume import adopt, explicit_changes, notable, resumed
from vit.errors import CheckpointError, ConfigError, Stopped, TrainingFailed
from vit.model.vision_transformer import VisionTransformer
from vit.runs.folder import RunFolder, log
from vit.runs.sweep import print_tables, run_job
from vit.runtime.launch import launch_processes, process_rank, started_by_torchrun
from vit.runtime.processes import Processes, gather_full, join_processes
from vit.runtime.signals import StopSignal

if TYPE_CHECKING:
    from torch import Tensor


WHITENING_SAMPLE = 2000  # images whose patches' axes train.whiten_patches takes
SHOWN_IMAGES = 16  # whose predictions TensorBoard shows; of the first eight the attention
SLOW_SECONDS = 2 * 3600  # a longer forecast without a GPU names a cheaper command


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(composed: DictConfig) -> float | None:
    """One run; under -m one job of the sweep. Returns the validation top-1, for sweepers to maximise."""
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN:
        return run_job(
            Path(job.runtime.output_dir), list(job.overrides.task), composed.jobs_at_once
        )
    folder, overrides = Path(job.runtime.output_dir), list(job.overrides.task)
    processes = wanted_processes(composed, folder, overrides)
    if processes is not None and processes > 1 and not started_by_torchrun():
        return run_in_processes(processes, folder, overrides)
    stop, first = StopSignal().install(), process_rank() == 0
    with ending(speaks=first), RunFolder(folder, writes=first).outcome() as run:
        config, warnings = read_config(composed, run, overrides)
        validate(config)
        if config.explain:
            from vit.training.explanation import explanation

            run.remove()
            print(explanation(config))
            return None
        try:
            return train(config, run, stop, warnings, overrides)
        except (OSError, RuntimeError) as error:
            from vit.runtime.faults import describe_fault

            told = describe_fault(error, config)
            if told is None:
                raise
            kept = (
                f"; the last checkpoint is kept: go on by resume={run.path}"
                if run.has_checkpoint()
                else ""
            )
            raise TrainingFailed(told + kept) from None
    return None


def wanted_processes(composed: DictConfig, folder: Path, overrides: list[str]) -> int | None:
    """runtime.processes as the command line gives it, or the run that is resumed."""
    if composed.resume is not None and not any(
        "runtime.processes" in override for override in overrides
    ):
        saved = read_yaml(folder / "config.yaml") if (folder / "config.yaml").exists() else {}
        return saved.get("runtime", {}).get("processes")
    return composed.runtime.processes


def run_in_processes(count: int, folder: Path, overrides: list[str]) -> None:
    """The same command in several processes of this machine; it ends as the first of them that failed did."""
    with ending():
        arguments = [*overrides, f"runtime.processes={count}", f"hydra.run.dir={folder}"]
        exit_code = launch_processes(count, [sys.argv[0], *prepare_arguments(arguments)])
        if exit_code:
            raise AlreadyTold(exit_code)


def read_config(
    composed: DictConfig, run: RunFolder, overrides: list[str]
) -> tuple[Config, list[str]]:
    """The run's configuration and warnings: as composed, or where a run is resumed its own with the command line's changes."""
    resuming = composed.resume is not None and (composed.resume != "auto" or run.has_checkpoint())
    if not resuming:
        if (
            composed.resume != "auto"
        ):  # with it a run that was killed before its first checkpoint is begun anew
            run.require_empty()
        return from_composed(composed), []
    run.require_checkpoint()
    saved = read_yaml(run.path / "config.yaml")
    container, warnings = resumed(
        saved, explicit_changes(composed, overrides), composed.resume_changed.name == "allow"
    )
    return from_dict(container, str(run.path / "config.yaml")), warnings


def train(
    config: Config, run: RunFolder, stop: StopSignal, warnings: list[str], overrides: list[str]
) -> float | None:
    """Build the parts, fit, say what came out; the best validation top-1, or None where nothing is held out."""
    # Imported here so that --help and a mistaken command answer at once.
    import torch

    from vit.checkpoints.file import read_checkpoint, require_header_keys, write_checkpoint
    from vit.checkpoints.model import build_model, load, load_weights, model_on_shapes
    from vit.checkpoints.run import BEST, LAST, PREVIOUS, check_classes, read_last
    from vit.data.datasets import load_data
    from vit.data.loader import evaluation_batches
    from vit.data.preprocessing import Preprocessing
    from vit.data.sample_order import SampleOrder
    from vit.data.splits import ImageSplit, sample_evenly
    from vit.evaluation.accuracy import evaluate
    from vit.figures.attention import attention_figure
    from vit.figures.predictions import Figures, class_names
    from vit.model.cost import count_macs
    from vit.model.initialization import whiten_patches
    from vit.randomness import random_seed
    from vit.runs.card import command_line, write_card
    from vit.runs.metrics_log import Tracker, screen
    from vit.runs.summary import cheaper_command, summarize
    from vit.runs.timing import bottleneck
    from vit.runtime.compiling import compile_model, worth_compiling
    from vit.runtime.device import (
        choose_device,
        describe_device,
        loader_workers,
        product_rate,
        usable_cores,
        use_deterministic_kernels,
        use_threads,
    )
    from vit.runtime.precision import Precision, choose_precision
    from vit.text import format_duration
    from vit.training.batches import training_batches
    from vit.training.loop import Trainer
    from vit.training.losses import build_loss
    from vit.training.optimizers import build_optimizer, freeze_all_but_head
    from vit.training.plan import build_schedule, every_interval
    from vit.training.start import build_augmentation
    from vit.training.state import EMA, Progress, TrainingState
    from vit.training.step import find_micro_batch_size
    from vit.weights.loading import load_into
    from vit.weights.loading import read as read_weights

    stop.check()  # importing takes its seconds
    # The parts that need no data, so that a mistake in them is told before any is read
    resuming, weights = run.has_checkpoint(), None
    if config.pretrained is not None and not resuming:
        weights = read_weights(config.pretrained)
        told = weights.preprocessing and weights.preprocessing.to_dict()
        config = from_dict(
            adopt(to_dict(config), weights.model, told, overrides), config.pretrained
        )
    plain = to_dict(config)
    device = choose_device(plain["runtime"]["device"])
    stop.at_once = started_by_torchrun()  # until all are there
    group = join_processes(device.type)
    stop.at_once = False
    if device.type == "cuda":
        device = torch.device("cuda", group.local_rank)
        torch.cuda.set_device(device)
    run.follow(group.from_first(str(run.path)))
    use_threads(config.runtime.threads)
    use_deterministic_kernels(config.runtime.deterministic)
    image_size = model_on_shapes(plain["model"]).embeddings.patch_embedding.image_size
    build_schedule(**plain["schedule"], total_steps=config.train.steps or 10**9, steps_per_epoch=1)

    # Data
    data = group.in_turn(
        lambda: load_data(
            **data_arguments(plain["data"], plain["model"]), image_size=image_size, device=device
        )
    )
    stop.check()
    preprocessing = Preprocessing(
        image_size,
        config.model.num_channels,
        tuple(config.data.mean),
        tuple(config.data.std),
        config.data.eval_crop,
        config.data.interpolation.name,
    )
    batch_size = config.train.batch_size
    if batch_size > len(data.train):
        raise ConfigError(
            f"train.batch_size={batch_size} is more than the {len(data.train)} training images; lower it"
        )
    if batch_size < 2 * group.count:
        raise ConfigError(
            f"train.batch_size={batch_size} is for all {group.count} processes together: it must be at least "
            f"{2 * group.count}"
        )
    steps_per_epoch = len(data.train) / batch_size
    total_steps = config.train.steps or max(1, round(config.train.epochs * steps_per_epoch))
    schedule = build_schedule(
        **plain["schedule"], total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    augmentation = build_augmentation(config, preprocessing, len(data.classes))
    order, train_images = (
        SampleOrder(len(data.train), batch_size, config.seed, config.augment.repeats),
        data.train.to(device),
    )
    workers = loader_workers(config.runtime.workers, group.local_count)

    def batches(first_step: int, last_step: int):
        return training_batches(
            train_images,
            order,
            first_step,
            last_step,
            preprocessing,
            augmentation,
            workers,
            device,
            group.part(batch_size),
        )

    def evaluate_split(
        model: torch.nn.Module, images: ImageSplit, confusion: "Tensor | None" = None
    ) -> dict[str, float]:
        with contextlib.closing(
            evaluation_batches(
                images,
                -(-batch_size // group.count),
                preprocessing,
                workers,
                device,
                group.rank,
                group.count,
            )
        ) as held:
            return evaluate(
                model, until_stopped(held, stop, group), precision, confusion, group.sum
            )

    # Model, optimizer, and where a run is resumed their state
    run.start_log(screen)
    for warning in warnings:
        log.info(f"warning: {warning}")
    fingerprint = data.train.fingerprint()
    torch.manual_seed(random_seed(config.seed, "initial weights"))
    sharded = config.runtime.sharding.name == "fsdp"
    if sharded and group.count == 1:
        raise ConfigError(
            "runtime.sharding=fsdp needs several processes: runtime.processes=N, or torchrun"
        )
    model = build_model(plain["model"], len(data.classes)).to("cpu" if sharded else device)
    precision = choose_precision(plain["train"]["precision"], device, config.model.hidden_size)
    if weights is not None:
        log.info(
            f"start  {load_into(model, weights, data.classes, config.pretrained_positions.name)}"
        )
        if weights.preprocessing is None:
            log.info(
                "  the file tells no preprocessing: data.mean, data.std and data.eval_crop are taken as configured"
            )
    if config.train.whiten_patches and not resuming:
        sample = data.train.subset(sample_evenly(data.train.labels, WHITENING_SAMPLE))
        inputs, _ = next(
            evaluation_batches(sample, WHITENING_SAMPLE, preprocessing, workers, device)
        )
        whiten_patches(model, inputs.to(model.head.weight.device))
    if config.train.freeze.name == "backbone":
        freeze_all_but_head(model)
    average = EMA(model, config.train.ema_decay) if config.train.ema_decay else None
    macs = count_macs(model)
    if sharded:
        for spread in filter(None, (model, average and average.model)):
            group.shard(spread, device.type, torch.bfloat16 if precision.name == "bf16" else None)
    state = TrainingState(model, average, build_optimizer(model, **plain["optimizer"]), Progress())
    if resuming:
        tensors, header, warning = read_last(run.checkpoints)
        require_header_keys(header, run.checkpoints, "classes", "config", "precision", "progress")
        check_classes(header["classes"], data.classes, run.checkpoints)
        if header.get("data", fingerprint) != fingerprint and config.resume_changed.name != "allow":
            raise CheckpointError(
                f"resume={run.path}: the training images are not those of the run ({data.train}; their "
                "checksum differs); bring them back, or add resume_changed=allow"
            )
        if (
            device.type == "cpu"
            and header.get("threads", torch.get_num_threads()) != torch.get_num_threads()
        ):
            log.info(
                f"warning: {torch.get_num_threads()} threads where the run had {header['threads']}: last bits may differ "
                f"(runtime.threads={header['threads']} would keep them)"
            )
        state.restore(tensors, header["progress"], str(run.checkpoints))
        if state.progress.step > total_steps:
            raise ConfigError(
                f"resume={run.path}: {state.progress.step} steps are done already, more than the {total_steps} "
                "that train.steps or train.epochs asks for"
            )
        precision = Precision(header["precision"], device)
        log.info(
            (f"warning: {warning}; " if warning else "")
            + f"resuming {run.path} after step {state.progress.step}"
        )
    model.encoder.checkpointing = config.runtime.activation_checkpointing
    if (
        device.type == "cuda"
        and config.train.micro_batch_size is None
        and not resuming
        and not sharded
    ):
        own = len(range(batch_size)[group.part(batch_size)])
        fitting = group.from_first(
            find_micro_batch_size(model, (config.model.num_channels, *image_size), own, precision)
        )
        if fitting < own:  # recorded, so that a resumed run splits its batches alike
            config.train.micro_batch_size = plain["train"]["micro_batch_size"] = fitting
            log.info(
                f"memory holds {fitting} images at once: train.micro_batch_size={fitting}; the result is the same"
            )
    shared = model if sharded else group.wrap(model, device)
    forward, warning = compile_model(
        shared,
        False if sharded else config.runtime.compile,
        device,
        config.model.hidden_size,
        6 * macs * batch_size * total_steps,
    )
    if warning:
        log.info(warning)

    def header_of(kind: str) -> dict:
        return {
            "kind": kind,
            "config": plain,
            "classes": data.classes,
            "preprocessing": preprocessing.to_dict(),
            "precision": precision.name,
            "progress": vars(state.progress),
            "versions": {"torch": torch.__version__},
            "data": fingerprint,
            "threads": torch.get_num_threads(),
        }

    def save(kind: str, path: Path, tensors: "dict[str, Tensor]", keep: Path | None = None) -> None:
        if group.rank == 0:
            write_checkpoint(path, tensors, header_of(kind), keep)

    def save_last() -> None:
        save("last", run.checkpoints / LAST, state.tensors(), run.checkpoints / PREVIOUS)

    def save_best() -> None:
        tensors = {
            name: gather_full(tensor) for name, tensor in state.selected().state_dict().items()
        }
        save("best", run.checkpoints / BEST, tensors)

    def forecast(seconds: float) -> None:
        log.info(f"about {format_duration(seconds)} to go")
        if seconds > SLOW_SECONDS and device.type == "cpu":
            log.info(f"  that is long without a GPU; cheaper: {cheaper_command(macs, config)}")

    draws, shown = (
        group.rank == 0 and not sharded,
        data.val or data.train,
    )  # pictures need all weights in one place
    shown = shown.subset(sample_evenly(shown.labels, SHOWN_IMAGES)).to(device)
    shown_inputs, shown_labels = next(
        evaluation_batches(shown, SHOWN_IMAGES, preprocessing, 0, device)
    )

    def draw_attention(model: "VisionTransformer", step: int) -> None:
        if draws:
            tracker.attention(attention_figure(model, preprocessing, shown_inputs[:8]), step)

    def evaluate_and_draw(model: torch.nn.Module) -> dict[str, float]:
        assert data.val is not None
        confusion = torch.zeros(
            len(data.classes), len(data.classes), dtype=torch.int64, device=device
        )
        metrics = evaluate_split(model, data.val, confusion)
        confusion = group.sum(confusion)
        if draws:
            figures.evaluated(model, confusion, state.progress.step)
        return metrics

    # What is about to happen
    log.info(
        f"model  {config.model.name}: {model.num_parameters():,} parameters, {2 * macs / 1e9:.3g} GFLOPs an image"
    )
    for name, images in {"train": data.train, "val": data.val, "test": data.test}.items():
        log.info(f"{name:6} {images or 'nothing held out: the last weights are taken'}")
    computed = (
        f"{precision.name} on {f'{group.count} processes, each ' if group.count > 1 else ''}"
        f"{describe_device(device)}{', compiled' if forward is not shared else ''}"
    )
    log.info(
        f"run    {total_steps:,} steps of {batch_size} images ({total_steps / steps_per_epoch:.3g} epochs), {computed}; "
        f"{'averaged' if average else 'raw'} weights are evaluated and saved"
    )
    log.info(f"folder {run.path}")
    if forward is not shared:
        log.info("the first step compiles the model, which takes a minute or so")
    if train_images.pixels is not None and image_size[0] >= 4 * train_images.pixels.shape[-1]:
        log.info(
            f"note   images of {train_images.pixels.shape[-1]} px are enlarged to {image_size[0]}; from scratch a "
            f"model of their own size learns faster and costs less: {cheaper_command(macs, config)}"
        )

    # Fit
    run.so_far = lambda: {
        "steps": state.progress.step,
        "val_top1": state.progress.best_top1,
        "best_step": state.progress.best_step,
        "seconds": round(state.progress.seconds, 2),
    }
    run.begun = True
    if run.writes:
        run.checkpoints.mkdir(exist_ok=True)
    tracker = Tracker(
        run.path,
        state.progress.step,
        total_steps,
        steps_per_epoch,
        batch_size,
        resuming,
        run.writes,
    )
    command = command_line(run.path / "config.yaml", overrides, config.seed)
    run.write_config(f"# {command}\n{OmegaConf.to_yaml(plain)}")
    if not resuming:
        save_last()
        tracker.text("configuration", f"```yaml\n{OmegaConf.to_yaml(plain)}```")
        if run.writes:
            pictures, labels = next(batches(0, 1))
            tracker.pictures(
                preprocessing.denormalize(pictures[:64]), class_names(labels[:64], data.classes), 0
            )
    figures = Figures(tracker, data.classes, preprocessing, precision, shown_inputs, shown_labels)
    if draws:
        figures.watch_gradients(
            model, state.optimizer, lambda: state.progress.step + 1, 10 * config.train.log_every
        )
    attention_every, product_rate = (
        config.train.attention_every,
        group.count * product_rate(precision),
    )

    def step_share(images_per_second: float) -> float:
        nonlocal product_rate
        product_rate = max(
            product_rate, 6 * macs * images_per_second
        )  # it was measured too low where the machine was busy
        return 6 * macs * images_per_second / product_rate

    trainer = Trainer(
        state=state,
        forward=forward,
        shared=shared,
        batches=batches(state.progress.step, total_steps),
        total_steps=total_steps,
        batch_size=batch_size,
        group=group,
        schedule=schedule,
        precision=precision,
        micro_batch_size=config.train.micro_batch_size,
        loss=build_loss(plain["train"]["loss"], config.train.label_smoothing),
        clip_norm=config.train.clip_norm,
        drop_path_schedule=plain["train"]["drop_path_schedule"],
        seed=config.seed,
        tracker=tracker,
        stop=stop,
        evaluate=None if data.val is None else evaluate_and_draw,
        evaluation_due=every_interval(config.train.eval_every * steps_per_epoch, total_steps),
        save_last=save_last,
        save_best=save_best,
        forecast=forecast,
        draw_attention=draw_attention,
        drawing_due=every_interval(
            attention_every and attention_every * steps_per_epoch, total_steps
        ),
        log_every=config.train.log_every,
        save_every=config.train.save_every,
        step_share=step_share,
    )
    with contextlib.closing(trainer.batches):  # ends the processes that decode pictures
        trainer.fit()

    # What came out
    progress = state.progress
    group.any(True)  # the first process has written the best checkpoint
    if sharded:
        best, tensors = state.selected(), read_checkpoint(run.checkpoints / BEST)[0]
        load_weights(best, tensors, str(run.checkpoints))
    else:
        best = load(run.checkpoints / BEST).to(device)
    test = evaluate_split(best, data.test)
    tracker.evaluation(total_steps, "test", test)
    tracker.hyperparameters(
        notable(flatten(plain), overrides),
        {"result/val_top1": progress.best_top1, "result/test_top1": test["top1"]},
    )
    tracker.close()
    run.write_result(
        status="finished",
        reason="all steps done",
        **run.so_far(),
        test_top1=test["top1"],
        test_loss=test["loss"],
        params=model.num_parameters(),
        images_per_second=round(total_steps * batch_size / progress.seconds, 2),
    )
    if run.writes:
        write_card(
            run.path,
            plain,
            command,
            {
                "classes": len(data.classes),
                "train": data.train,
                "validation": data.val or "nothing held out",
                "test": data.test,
            },
            macs,
            computed,
        )
    summarize(run, progress, test, str(data.val), str(data.test))
    spent, done = trainer.clock.spent, total_steps - trainer.clock.first_step
    width = config.model.hidden_size
    log.info(
        bottleneck(
            spent,
            step_share((done - 1) * batch_size / max(spent.steps, 1e-9)),
            device=device.type,
            precision=precision.name,
            compiled=forward is not shared,
            could_compile=worth_compiling(device, width, float("inf")),
            could_bf16=choose_precision("auto", device, width).name == "bf16",
            from_files=data.train.pixels is None,
            workers=workers,
            cores=usable_cores(),
        )
    )
    group.leave()
    return progress.best_top1


def until_stopped(batches: Iterator[Any], stop: StopSignal, group: Processes) -> Iterator[Any]:
    """The batches of an evaluation; raises Stopped between two where a signal has come, to any of the processes."""
    for batch in batches:
        if group.any(stop.signal is not None)[0]:
            raise Stopped(
                f"stopped by {stop.signal or 'a signal to another process'} in an evaluation"
            )
        yield batch


if __name__ == "__main__":
    register()
    try:
        code = command_line(main, Config)
    finally:
        print_tables()
    sys.exit(code)
