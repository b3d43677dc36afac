"""Train a Vision Transformer: compose the configuration, build the parts, fit, report the result.

Usage:
    python train.py model=vit_b16 data=cifar10
    python train.py resume=RUN_FOLDER
    python train.py --help

Exit codes: 0 done, 1 a bug, 2 a mistake in the configuration, the data or a checkpoint, 3 training
failed and the last checkpoint is kept, 75 stopped by a signal or a limit of time, and resumable.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vit.config.command_line import (
    configuration_options,
    prepare_arguments,
    run_main,
    task_errors,
)
from vit.config.config import (
    Config,
    from_composed,
    read_config_file,
    register,
    require_resolvable,
    validate,
)
from vit.config.resume import command_line_changes, overridden_keys, resumed_config
from vit.errors import ConfigError
from vit.runs import sweep
from vit.runs.folder import RunFolder, removed_if_refused
from vit.runs.screen import Screen
from vit.runtime.launch import (
    end_after,
    end_with_agent,
    launch_processes,
    process_count,
    process_rank,
    start_of_command,
    started_by_torchrun,
    tasks_of_slurm,
    wait_for_first,
)
from vit.runtime.signals import StopSignal


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def main(composed: DictConfig) -> float | None:
    """Run one training, or under -m one job of a sweep.

    Returns what a sweeper maximizes, or None where there is none: the number of the validation
    split that train.select names, of the best checkpoint, and of the loss its negative.
    """
    job = HydraConfig.get()
    folder = Path(job.runtime.output_dir)
    # As typed: an interpolation in an override must not be resolved here
    typed: list[str] = OmegaConf.to_container(job.overrides.task)  # pyright: ignore
    with task_errors(), removed_if_refused(folder):
        overrides = [*configuration_options(job), *typed]

    # A job of a sweep runs in a child process: a crash must not take the other jobs with it
    if job.mode == RunMode.MULTIRUN:
        # Ends the sweep where a signal came to it: Hydra would go on with the next job
        with task_errors():
            searching = job.runtime.choices["hydra/sweeper"] != "basic"
            check_sweep(composed, job, searching)
            return sweep.run_job(folder, overrides, composed.jobs_at_once, searching)

    # All processes of a run end in the same errors, so one of them is enough to report them
    is_first = process_rank() == 0
    stop = StopSignal(start_of_command())
    with task_errors(None if is_first else partial(wait_for_first, stop)):
        with removed_if_refused(folder):
            # Before any value is read, which would raise where it refers to a missing key
            require_resolvable(composed)
            count = requested_processes(composed, folder, overrides)
            if count > 1 and not started_by_torchrun() and not composed.explain:
                device = requested_runtime("device", composed, folder, overrides)
                raise SystemExit(run_in_processes(count, device, folder, overrides, stop.started))

        # Before torch is imported, which takes seconds in which a signal may come already
        stop.install()
        end_with_agent()

        # The folder is locked before anything in it is read
        with RunFolder(folder, overrides, writes=is_first).outcome() as run:
            refuse_settings_of_sweeps(composed, job)
            refuse_other_processes(count, overrides)
            config, warnings = read_config(composed, run)
            warnings += about_tasks()
            validate(config)
            if config.explain:
                return explain(config, run, stop)
            return guarded_train(config, run, stop, warnings)


def check_sweep(composed: DictConfig, job: HydraConf, searching: bool) -> None:
    """Raise ConfigError for settings that mean nothing to this kind of sweep.

    searching: a search chooses the next values by the results of jobs.
    """
    if searching and composed.explain:
        raise ConfigError(
            "explain=true trains nothing, and a search needs results to choose the next values by; "
            "leave out search, or explain a single run, without -m"
        )
    if composed.jobs_at_once is not None and job.runtime.choices["hydra/launcher"] == "basic":
        raise ConfigError(
            "jobs_at_once does nothing without a launcher that starts all jobs, such as "
            "hydra/launcher=submitit_local: the basic one runs them one after another"
        )


def refuse_settings_of_sweeps(composed: DictConfig, job: HydraConf) -> None:
    """Raise ConfigError for settings that mean nothing to a single run, or to a sweep's job.

    Those of a sweep stay with the process that drives it.
    """
    if job.runtime.choices.get("search") is not None:
        raise ConfigError("search does nothing without -m, which starts a search")
    if composed.jobs_at_once is not None:
        raise ConfigError("jobs_at_once does nothing without -m, which starts a sweep")


def requested_processes(composed: DictConfig, folder: Path, overrides: list[str]) -> int:
    """Return runtime.processes from the command line, or else from the run that is resumed."""
    count = requested_runtime("processes", composed, folder, overrides)
    # Anything but a number is refused where the configuration is read, with a better message
    return count if isinstance(count, int) else 1


def refuse_other_processes(count: int, overrides: list[str]) -> None:
    """Raise ConfigError where the command line asks for more or fewer than torchrun has started.

    A resumed run's own number may be another one: torchrun may go on with any.
    """
    started = process_count()
    given = "runtime.processes" in overridden_keys(overrides)
    if given and started_by_torchrun() and count != started:
        raise ConfigError(
            f"runtime.processes={count} beside torchrun, which has started {started}; leave it out"
        )


def requested_runtime(name: str, composed: DictConfig, folder: Path, overrides: list[str]) -> Any:
    """Return a key of the group `runtime` before the configuration is read.

    The whole configuration of a resumed run is read later, by each of the processes.
    """
    given = f"runtime.{name}" in overridden_keys(overrides)
    file = folder / "config.yaml"
    if composed.resume is not None and not given and file.exists():
        return read_config_file(file).get("runtime", {}).get(name)
    return composed.runtime[name]


def run_in_processes(
    count: int, device: Any, folder: Path, overrides: list[str], started: float
) -> int:
    """Run the same command in several processes.

    started: when this one was, by time.monotonic(). Returns the exit code of the first process that
    failed, or 0. Raises ConfigError where the device is a GPU and this machine has too few.
    """
    # Late, so that --help and a mistaken command are answered before torch is imported
    from vit.runtime.machine import require_gpus_of

    # Before the processes, which would wait for one another first
    require_gpus_of(device, count)

    # The folder is given since its default holds a time, which each process would take for itself
    arguments = [*overrides, f"runtime.processes={count}", f"hydra.run.dir={folder}"]
    return launch_processes(count, [sys.argv[0], *prepare_arguments(arguments)], started)


def about_tasks() -> list[str]:
    """Return a warning where SLURM has started this command several times."""
    tasks = tasks_of_slurm()
    if tasks == 1:
        return []
    return [
        f"srun has started this command {tasks} times, and each is a run of its own; for one run "
        "on many GPUs give srun one task a machine, and start torchrun in it (docs/scale_up.md)"
    ]


def read_config(composed: DictConfig, run: RunFolder) -> tuple[Config, list[str]]:
    """Return the run's configuration, and warnings for the user.

    The configuration of a new run is the composed one. That of a resumed run comes from its folder,
    with the changes that the command line makes.
    """
    if composed.resume is None:
        run.require_empty()
        return from_composed(composed), []
    if composed.resume == "auto" and not run.has_checkpoint():
        # A run that was killed before its first checkpoint starts over
        return from_composed(composed), []

    run.require_checkpoint()
    file = run.path / "config.yaml"
    changes = command_line_changes(composed, run.overrides)
    allow = composed.resume_changed == "allow"
    return resumed_config(read_config_file(file), changes, allow, str(file))


def explain(config: Config, run: RunFolder, stop: StopSignal) -> None:
    """Print what a run would do and cost, and leave no folder behind."""
    with Screen(stop=stop) as screen:
        screen.doing("importing PyTorch")
        from vit.training.explanation import explanation

        page = explanation(config, run, stop, screen)
    run.remove()
    print(page)


def guarded_train(
    config: Config, run: RunFolder, stop: StopSignal, warnings: list[str]
) -> float | None:
    """Call train(); a fault of the machine, such as a full disk, becomes a one-line message."""
    with Screen(run.writes, stop) as screen:
        # Seconds where it is in the disk's cache, half a minute where it is not
        screen.doing("importing PyTorch")
        from vit.runtime.faults import faults_end_training

        with faults_end_training(None, run.kept_checkpoint, stop):
            return train(config, run, stop, warnings, screen)


def train(
    config: Config, run: RunFolder, stop: StopSignal, warnings: list[str], screen: Screen
) -> float | None:
    """Build the parts of a run, fit and report; returns what a sweeper maximizes, see main()."""
    # Late, so that --help and a mistaken command are answered before torch is imported
    from vit.runtime.faults import faults_end_training
    from vit.training import prepare, reporting, start
    from vit.training.loop import Trainer

    # Where the run is computed: device, processes, threads; none of it changes the result
    machine = prepare.start_machine(config, stop)
    run.follow(machine.processes.broadcast(str(run.path)))
    new = not run.has_checkpoint()

    # Mistakes in the configuration are reported before any data is read, which may take minutes
    screen.doing("reading the configuration and the weights")
    config, weights = prepare.with_pretrained(config, run, machine.processes, stop)
    config, taught_by = prepare.with_teacher(config, run, machine.processes, stop)
    prepare.check_parts(config, run.overrides)

    # What is learned from, and the run's only clock
    screen.doing("reading the data")
    data = prepare.load_dataset(config, run, machine)
    stop.check()
    plan = prepare.make_plan(config, data, machine)
    batches = prepare.make_batches(config, data, machine, stop)

    # What training changes: new, pretrained, or where a stopped run left it
    screen.doing("building the model")
    reporting.start_log(run, screen, warnings)
    distillation = start.make_distillation(config, taught_by, data)
    checkpoints = start.make_checkpoints(config, run, batches, distillation)
    state = start.starting_state(config, batches, weights, new, checkpoints.precision())
    if not new:
        start.resume(config, run, state, plan, checkpoints)
    cost = prepare.cost_of(config, len(data.classes), distillation)
    start.fit_memory(config, state, batches, new, distillation)
    step = start.make_step(config, state, batches, plan, cost.nominal_flops, distillation)
    reporting.announce(config, run, batches, plan, step, cost)

    # From here on the folder and its result.json are this run's
    command = reporting.begin(config, run, state)
    observer = start.make_observer(config, run, state, plan, batches, step, cost, new, screen)
    if new:
        # Before the first step, so that an early kill leaves something to resume
        checkpoints.save_last(state)
        reporting.show_start(config, observer)

    trainer = Trainer(state, step, batches, plan, checkpoints, observer, stop, machine.processes)
    with faults_end_training(step.images_at_once, run.kept_checkpoint, stop):
        trainer.fit()

    # The test set is read this once, for the weights that were selected on the validation split
    screen.doing("evaluating on the test split")
    test = trainer.test_best()
    reporting.finish(config, run, test, observer, step, command)

    # Leaving waits for all, since the others would take an early end of this one for a fault
    machine.processes.leave()
    return state.progress.best_score(config.train.select)


if __name__ == "__main__":
    # Before a launcher starts the jobs of a sweep
    sweep.remember_visible_gpus()
    register()
    end_after(partial(run_main, main, Config))
