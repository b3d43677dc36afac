"""Train a Vision Transformer: compose the configuration, build the parts, fit, say what came out.

python train.py model=vit_b16 data=cifar10
python train.py --help
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from vit.config.command_line import prepare_arguments, run_main, task_errors
from vit.config.config import (
    Config,
    from_composed,
    read_config_file,
    register,
    validate,
)
from vit.config.resume import command_line_changes, resumed_config
from vit.runs import sweep
from vit.runs.folder import RunFolder
from vit.runtime.launch import launch_processes, process_rank, started_by_torchrun
from vit.runtime.signals import StopSignal


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(composed: DictConfig) -> float | None:
    """One run; under -m one job of the sweep. Returns the validation top-1, for sweepers to
    maximize.
    """
    job = HydraConfig.get()
    folder, overrides = Path(job.runtime.output_dir), list(job.overrides.task)
    if job.mode == RunMode.MULTIRUN:
        return sweep.run_job(folder, overrides, composed.jobs_at_once)
    is_first = process_rank() == 0
    with task_errors(speaks=is_first):
        count = requested_processes(composed, folder, overrides)
        if count > 1 and not started_by_torchrun():
            raise SystemExit(run_in_processes(count, folder, overrides))
        stop = StopSignal().install()
        with RunFolder(folder, overrides, writes=is_first).outcome() as run:
            config, warnings = read_config(composed, run)
            validate(config)
            if config.explain:
                return explain(config, run)
            return guarded_train(config, run, stop, warnings)


def requested_processes(composed: DictConfig, folder: Path, overrides: list[str]) -> int:
    """runtime.processes as the command line gives it, or as the run that is resumed has it."""
    given = any("runtime.processes" in override for override in overrides)
    file = folder / "config.yaml"
    count = composed.runtime.processes
    if composed.resume is not None and not given and file.exists():
        count = read_config_file(file).get("runtime", {}).get("processes")
    return count if isinstance(count, int) else 1


def run_in_processes(count: int, folder: Path, overrides: list[str]) -> int:
    """Run the same command in several processes of this machine; the exit code of the first that
    failed.
    """
    arguments = [*overrides, f"runtime.processes={count}", f"hydra.run.dir={folder}"]
    return launch_processes(count, [sys.argv[0], *prepare_arguments(arguments)])


def read_config(composed: DictConfig, run: RunFolder) -> tuple[Config, list[str]]:
    """The run's configuration and warnings: as composed, or a resumed run's own with the command
    line's changes.
    """
    if composed.resume is None:
        run.require_empty()
        return from_composed(composed), []
    if composed.resume == "auto" and not run.has_checkpoint():
        # A run that was killed before its first checkpoint begins anew
        return from_composed(composed), []
    run.require_checkpoint()
    file = run.path / "config.yaml"
    changes = command_line_changes(composed, run.overrides)
    allow = composed.resume_changed == "allow"
    return resumed_config(read_config_file(file), changes, allow, str(file))


def explain(config: Config, run: RunFolder) -> None:
    from vit.training.explanation import explanation  # imports torch

    run.remove()
    print(explanation(config))


def guarded_train(
    config: Config, run: RunFolder, stop: StopSignal, warnings: list[str]
) -> float | None:
    """train(), with what the machine does to it, such as a full disk, told in one line."""
    from vit.runtime.faults import faults_end_training  # imports torch

    images_at_once = config.train.micro_batch_size or config.train.batch_size
    with faults_end_training(images_at_once, run.kept_checkpoint):
        return train(config, run, stop, warnings)


def train(config: Config, run: RunFolder, stop: StopSignal, warnings: list[str]) -> float | None:
    """Build the parts, fit, say what came out; the best validation top-1, or None where nothing is
    held out.
    """
    # Late, so that --help and a mistaken command are answered before torch is imported
    from vit.training import reporting, start
    from vit.training.loop import Trainer

    # Where it is computed; mistakes are told before any data is read
    stop.check()
    machine = start.start_machine(config, stop)
    run.follow(machine.processes.broadcast(str(run.path)))
    new = not run.has_checkpoint()
    config, weights = start.with_pretrained(config, run)
    start.check_parts(config)

    # What is learned from, and the run's only clock
    data = start.load_dataset(config, machine)
    stop.check()
    plan = start.make_plan(config, data, machine)
    batches = start.make_batches(config, data, machine, stop)

    # What training changes: new, pretrained, or where a stopped run left it
    reporting.start_log(run, warnings)
    state = start.starting_state(config, batches, weights, machine, new)
    checkpoints = start.make_checkpoints(config, run, batches)
    if not new:
        start.resume(config, run, state, plan, checkpoints)
    macs = start.macs_of(config, len(data.classes))
    step = start.make_step(config, state, batches, plan, macs, new)
    reporting.announce(config, run, batches, plan, step, macs)

    # From here on the folder is this run's
    command = reporting.begin(config, run, state)
    observer = start.make_observer(config, run, state, plan, batches, macs, new)
    if new:
        checkpoints.save_last(state)
        reporting.show_start(config, observer)

    Trainer(state, step, batches, plan, checkpoints, observer, stop, machine.processes).fit()

    # What came out; the test set is read once
    machine.processes.barrier()  # the first process has written the best checkpoint
    best = checkpoints.load_best(state)
    test = batches.evaluate(best, data.test, state.precision)
    reporting.finish(config, run, test, observer, step, command)
    machine.processes.leave()
    return state.progress.best_top1


if __name__ == "__main__":
    register()
    sys.exit(run_main(main, Config))
