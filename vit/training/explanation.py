"""What explain=true prints: the look before the flight.

It reads the data set's list, refuses what training would refuse, makes a few real steps, and tells
the shapes at every stage, the run's length, its costs, its time and its memory by part.
"""

import math
from dataclasses import asdict, dataclass, replace

from vit.checkpoints.model import build_on_meta
from vit.config.config import Config
from vit.data.splits import ImageDataset
from vit.errors import TrainingFailed
from vit.model.cost import stage_shapes
from vit.runs.folder import RunFolder
from vit.runs.screen import Screen
from vit.runs.timing import Cost
from vit.runtime.device import choose_device, product_rate
from vit.runtime.faults import describe_fault
from vit.runtime.machine import Machine, require_gpus, require_several
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.text import format_bytes, format_duration
from vit.training import prepare, start
from vit.training.distillation import Distillation
from vit.training.freezing import describe_parameters
from vit.training.plan import Plan
from vit.training.reporting import describe_teacher, notes_on_data
from vit.training.trial import Trial, try_steps
from vit.weights.description import Weights

# Parts of the memory that every process has for itself
WHOLE = ("teacher", "activations")


@dataclass(frozen=True)
class Share:
    """What one of a run's processes does: it computes `batch_size` images of every step.

    shards: how many processes weights, gradients, moments and averages are spread over.
    """

    processes: int
    batch_size: int
    shards: int


def explanation(config: Config, run: RunFolder, stop: StopSignal, screen: Screen) -> str:
    """Return the page that explain=true prints; nothing is written to the run's folder.

    Raises ConfigError, DataError and CheckpointError where training would, and Stopped on a signal.
    """
    config, weights = prepare.with_pretrained(config, run, Processes(), stop)
    config, taught_by = prepare.with_teacher(config, run, Processes(), stop)
    prepare.check_parts(config, run.overrides)
    share = share_of_process(config)
    machine = single_machine(config, stop)
    screen.doing("reading the data")
    data = prepare.load_dataset(config, run, machine)
    stop.check()
    plan = prepare.make_plan(config, data, machine)
    prepare.require_pairs(config.train.batch_size, share.processes)
    prepare.require_equal_passes(config, config.train.micro_batch_size, share.processes)

    screen.doing("measuring a few steps")
    distillation = start.make_distillation(config, taught_by, data)
    trial, problem = measure(config, data, plan, machine, stop, weights, share, distillation)
    stop.check()
    screen.doing(None)
    cost = prepare.cost_of(config, len(data.classes), distillation)
    sections = [
        shapes_section(config, data, share),
        data_section(config, data, cost),
        length_section(config, plan, data, cost, distillation),
    ]
    if trial is None:
        sections.append([f"not measured: {problem}"])
    else:
        rate = product_rate(machine.device, start.precision_of(config, machine).dtype)
        limit = config.runtime.max_minutes
        sections.append(time_section(plan, trial, cost.nominal_flops, share, rate, limit))
        sections.append(memory_section(trial, share))
    return "\n\n".join("\n".join(lines) for lines in sections)


def share_of_process(config: Config) -> Share:
    """What each process of the run would do. Raises ConfigError where there are too few GPUs."""
    count = config.runtime.processes or 1
    require_gpus(choose_device(config.runtime.device), count)
    sharded = require_several(config.runtime.sharding, count)
    return Share(count, -(-config.train.batch_size // count), count if sharded else 1)


def single_machine(config: Config, stop: StopSignal) -> Machine:
    """This process alone: a page needs no other, and starting them takes long."""
    runtime = replace(config.runtime, sharding="none", max_minutes=None)
    alone = replace(config, runtime=runtime)
    return prepare.start_machine(alone, stop)


def measure(
    config: Config,
    data: ImageDataset,
    plan: Plan,
    machine: Machine,
    stop: StopSignal,
    weights: Weights | None,
    share: Share,
    distillation: Distillation | None,
) -> tuple[Trial | None, str]:
    """Make a few steps of one process's part; (what they took, or None and why not)."""
    # Compiling would take a minute of the few seconds that a person waits for this page
    runtime = replace(config.runtime, compile=False)
    train = replace(config.train, batch_size=share.batch_size)
    part = replace(config, runtime=runtime, train=train)
    # The run's steps: a plan of the part alone would have more of them in an epoch
    plan = replace(plan, batch_size=share.batch_size)
    batches = prepare.make_batches(part, data, machine, stop)
    images_at_once = config.train.micro_batch_size or share.batch_size
    try:
        state = start.starting_state(part, batches, weights, new=True)
        start.fit_memory(part, state, batches, True, distillation)
        step = start.make_step(part, state, batches, plan, 0, distillation)
        images_at_once = step.images_at_once
        return try_steps(state, step, batches, plan.total_steps), ""
    except (OSError, RuntimeError, MemoryError) as error:
        problem = describe_fault(error, images_at_once)
        if problem is None:
            raise
        return None, problem
    except TrainingFailed as error:
        return None, str(error)


def shapes_section(config: Config, data: ImageDataset, share: Share) -> list[str]:
    """The shape at every stage of one micro-batch."""
    num_classes = len(data.classes)
    model = build_on_meta(asdict(config.model), num_classes)
    images = min(config.train.micro_batch_size or share.batch_size, share.batch_size)
    patches = model.embeddings.patch_embedding
    height, width = patches.image_size
    shapes = [("images", (images, patches.num_channels, height, width))]
    shapes += stage_shapes(model, images)
    name_width = max(len(name) for name, _ in shapes)
    title = (
        f"{config.model.name} on {images} images of {patches.num_channels} x {height} x {width}, "
        f"{num_classes} classes"
    )
    return [title, "", *(f"{name:{name_width}}  {shape}" for name, shape in shapes)]


def data_section(config: Config, data: ImageDataset, cost: Cost) -> list[str]:
    splits = {"train": data.train, "val": data.val, "test": data.test}
    lines = [f"{name:11} {images or 'nothing held out'}" for name, images in splits.items()]
    return [*lines, *notes_on_data(config, data, cost)]


def length_section(
    config: Config,
    plan: Plan,
    data: ImageDataset,
    cost: Cost,
    distillation: Distillation | None,
) -> list[str]:
    """How long the run is, and what it costs on any machine."""
    model = prepare.trained_on_meta(config, len(data.classes))
    epochs = plan.total_steps / plan.steps_per_epoch
    evaluations = plan.evaluations(plan.total_steps)
    patience = ""
    if plan.patience is not None:
        patience = f"; it ends after {plan.patience} in a row without improvement"
    image_flops = prepare.training_flops_of(config, len(data.classes), distillation)
    batch_flops = image_flops * plan.batch_size
    teacher = []
    if distillation is not None:
        teacher = [describe_teacher(distillation, cost)]
    return [
        f"run         {plan.total_steps:,} steps of {plan.batch_size} images "
        f"({epochs:.3g} epochs), {evaluations} evaluations{patience}",
        f"parameters  {describe_parameters(model)}",
        f"forward     {cost.macs / 1e9:.4g} GMACs an image ({2 * cost.macs / 1e9:.4g} GFLOPs)",
        f"training    {image_flops / 1e9:.4g} GFLOPs an image, {batch_flops / 1e12:.4g} TFLOPs a "
        f"step, {batch_flops * plan.total_steps / 1e15:.4g} PFLOPs in all",
        *teacher,
    ]


def time_section(
    plan: Plan,
    trial: Trial,
    nominal_flops: float,
    share: Share,
    product_rate: float,
    max_minutes: float | None,
) -> list[str]:
    """How long a step takes and the whole run would.

    nominal_flops: see Cost; product_rate: FLOP/s of large products; max_minutes: the limit of each
    start.
    """
    images_per_second = share.batch_size / trial.step_seconds
    mfu = min(1.0, nominal_flops * images_per_second / product_rate)
    waiting = trial.data_seconds / trial.step_seconds
    training = plan.total_steps * trial.step_seconds
    # Of the images of an evaluation, too, each process takes its part
    evaluating = plan.evaluations(plan.total_steps) * trial.evaluation_seconds / share.processes
    each = f" of each of {share.processes} processes" if share.processes > 1 else ""
    lines = [
        f"a step{each}  {trial.step_seconds:.3g} s, measured over {trial.steps} steps, uncompiled: "
        f"{images_per_second:.4g} images/s, MFU {mfu:.0%}, {waiting:.0%} of it waiting for data",
        f"the run     about {format_duration(training + evaluating)}, of which "
        f"{format_duration(evaluating)} evaluating",
    ]
    if max_minutes is not None:
        starts = math.ceil((training + evaluating) / (60 * max_minutes))
        lines.append(
            f"            at least {starts} {'start' if starts == 1 else 'starts'} of "
            f"runtime.max_minutes={max_minutes:g}, without starting up"
        )
    if share.processes > 1:
        lines.append("            without what exchanging gradients takes, which was not measured")
    return lines


def memory_section(trial: Trial, share: Share) -> list[str]:
    """What training keeps, by part; FSDP spreads what belongs to the trained model's weights."""
    parts = {
        name: size if name in WHOLE else size // share.shards
        for name, size in trial.memory.items()
        if size
    }
    described = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    lines = [f"memory      {format_bytes(sum(parts.values()))} a process: {described}"]
    if share.shards > 1:
        lines.append(f"            computed for {share.shards} shards, not measured with them")
    else:
        lines.append(f"            peak {format_bytes(trial.peak)}, measured")
    return lines
