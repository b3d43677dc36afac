"""From the configuration to the parts of a run."""

from dataclasses import replace

import pytest
import torch
from composing import configured
from small_training import CPU, make_state

from vit.checkpoints.run import RunCheckpoints
from vit.data.splits import ImageDataset, ImageSplit
from vit.errors import ConfigError
from vit.runs.folder import RunFolder
from vit.runtime.machine import Machine
from vit.runtime.precision import Precision
from vit.runtime.processes import Processes
from vit.runtime.signals import StopSignal
from vit.training import prepare, start
from vit.training.state import Progress

SMALL = [
    "experiment=digits",
    "model.num_layers=1",
    "model.hidden_size=16",
    "model.num_heads=2",
    "train.batch_size=8",
    "train.precision=fp32",
]


def make_machine(count=1):
    return Machine(CPU, Processes(count=count), workers=0, sharded=False)


def make_data(num_images=40):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (num_images, 1, 8, 8), generator=generator, dtype=torch.uint8)
    split = ImageSplit("made-up", torch.arange(num_images) % 4, pixels)
    return ImageDataset(["a", "b", "c", "d"], split, split, split)


def make_batches(config):
    return prepare.make_batches(config, make_data(), make_machine(), StopSignal())


def make_run_state(config, new=True):
    """The state that a run of this configuration starts from."""
    return start.starting_state(config, make_batches(config), None, new)


def plan_of(*overrides, num_images=40, count=1):
    return prepare.make_plan(
        configured(*SMALL, *overrides), make_data(num_images), make_machine(count)
    )


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.epochs=3"], 15),
        (["train.epochs=0.5"], 2),  # of 2.5
        (["train.epochs=0.01"], 1),
        (["train.epochs=3", "train.steps=7"], 7),
    ],
)
def test_epochs_become_steps_and_steps_win(overrides, steps):
    assert plan_of(*overrides).total_steps == steps


def test_the_plan_has_what_the_configuration_says():
    plan = plan_of(
        "train.epochs=4", "train.log_every=3", "train.save_every=6", "schedule.warmup=0.5"
    )
    assert (plan.steps_per_epoch, plan.batch_size) == (5.0, 8)
    assert (plan.log_every, plan.save_every, plan.eval_every) == (3, 6, 1.0)
    assert (plan.schedule(5), plan.schedule(10)) == (0.5, 1.0)


@pytest.mark.parametrize(("num_images", "count"), [(7, 1), (40, 5)])
def test_a_batch_that_is_too_large_or_too_small_is_refused(num_images, count):
    with pytest.raises(ConfigError, match=r"^train\.batch_size=8 "):
        plan_of(num_images=num_images, count=count)


def test_processes_that_share_a_model_must_make_equally_many_passes():
    """Of eight and of ten images: one pass of eight, and two."""
    sharded = ["train.batch_size=18", "runtime.sharding=fsdp"]
    line = r"^train\.micro_batch_size=8: .* 1 to 2 passes .* 4 divides, or .*micro_batch_size=7$"
    with pytest.raises(ConfigError, match=line):
        plan_of(*sharded, "train.micro_batch_size=8", count=2)
    for others in (["train.micro_batch_size=7"], ["train.micro_batch_size=10"], []):
        assert plan_of(*sharded, *others, count=2).batch_size == 18
    # With DDP gradients are exchanged in the last pass alone
    assert plan_of("train.batch_size=18", "train.micro_batch_size=8", count=2).batch_size == 18


def micro_batch_of_resumed(found, sharded):
    """What two processes compute at once, in whose run a micro-batch was found to fit."""
    config = configured(*SMALL, "train.batch_size=18", f"runtime.sharding={sharded}")
    state = make_run_state(config)
    state.progress.micro_batch_size = found
    machine = Machine(CPU, Processes(count=2), workers=0, sharded=sharded == "fsdp")
    batches = prepare.make_batches(config, make_data(), machine, StopSignal())
    return start.choose_micro_batch_size(config, state, batches, new=False, distillation=None)


def test_a_micro_batch_that_was_found_unsharded_is_lowered_to_keep_processes_in_step():
    assert micro_batch_of_resumed(8, "none") == 8
    assert micro_batch_of_resumed(8, "fsdp") == 7
    with pytest.raises(ConfigError, match=r"^train\.micro_batch_size=1: .* 8 to 10 passes"):
        micro_batch_of_resumed(1, "fsdp")


@pytest.mark.parametrize(
    ("overrides", "end"),
    [
        ([], "the result is the same"),
        (["model.drop_path=0.1"], "the result is the same"),
        (["model.patch_dropout=0.25"], "dropout draws other masks"),
        (["model.attention_dropout=0.1"], "dropout draws other masks"),
    ],
)
def test_a_micro_batch_that_memory_asks_for_is_told_with_what_it_changes(
    monkeypatch, log_lines, overrides, end
):
    config = configured(*SMALL, *overrides)
    monkeypatch.setattr(start, "agree_on_micro_batch_size", lambda *arguments: 4)
    batches, state = make_batches(config), make_state()
    assert start.fitting_micro_batch_size(config.model, state, batches, None) == 4
    (line,) = log_lines
    assert "micro-batches of 4" in line
    assert end in line


def test_patience_needs_something_held_out():
    assert plan_of("train.patience=3").patience == 3
    data = replace(make_data(), val=None)
    with pytest.raises(ConfigError, match=r"^train\.patience=3 .*data\.val_fraction"):
        prepare.make_plan(configured(*SMALL, "train.patience=3"), data, make_machine())


def test_images_are_mirrored_where_that_leaves_their_class():
    """A mirrored digit is another sign."""
    for mirror, flip in ((False, 0.0), (True, 0.5)):
        config = configured(*SMALL, "augment.flip=0.5", f"data.mirror={mirror}")
        augmentation = make_batches(config).augmentation
        assert augmentation.batch.flip == flip
        assert augmentation.image.flip == flip


def test_the_same_seed_starts_from_the_same_weights():
    models = [make_run_state(configured(*SMALL, f"seed={seed}")).model for seed in (1, 1, 2)]
    first, second, third = (model.encoder.blocks[0].mlp.fc1.weight for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_linear_probe_trains_the_head_alone():
    state = make_run_state(configured(*SMALL, "train.freeze=backbone"))
    trained = {name for name, item in state.model.named_parameters() if item.requires_grad}
    assert trained == {"head.weight", "head.bias"}


def test_the_first_blocks_are_frozen_with_the_embeddings():
    config = configured(*SMALL, "model.num_layers=3", "train.freeze=blocks:2")
    state = make_run_state(config)
    parts = {name.split(".")[0]: item for name, item in state.model.named_children()}
    assert not any(item.requires_grad for item in parts["embeddings"].parameters())
    trained = [
        all(item.requires_grad for item in block.parameters())
        for block in state.model.encoder.blocks
    ]
    assert trained == [False, False, True]
    assert all(item.requires_grad for item in state.model.encoder.norm.parameters())
    batches = make_batches(config)
    step = start.make_step(config, state, batches, plan_of(), 10**6)
    assert [block.training for block in state.model.encoder.blocks] == [False, False, True]
    assert step.frozen_blocks == 2


def test_frozen_parts_cost_less():
    flops = [
        prepare.flops_a_mac(configured(*SMALL, "model.num_layers=3", f"train.freeze={freeze}"), 10)
        for freeze in ("none", "blocks:0", "blocks:2", "blocks:3", "backbone")
    ]
    assert flops[0] == 6
    assert flops == sorted(flops, reverse=True)
    assert 2 < flops[-1] < 2.1


def test_averaging_and_activation_checkpointing_follow_the_configuration():
    state = make_run_state(configured(*SMALL))
    assert state.ema.decay == configured(*SMALL).train.ema_decay
    assert not state.model.encoder.checkpointing
    settings = ["train.ema_decay=0", "runtime.activation_checkpointing=true"]
    state = make_run_state(configured(*SMALL, *settings))
    assert state.ema is None
    assert state.model.encoder.checkpointing


def test_patches_are_whitened_at_the_start_of_a_new_run_alone():
    plain = make_run_state(configured(*SMALL))
    whitened = configured(*SMALL, "train.whiten_patches=true")
    name = "embeddings.patch_embedding.projection.weight"
    weights = [
        state.model.get_parameter(name)
        for state in (plain, make_run_state(whitened), make_run_state(whitened, new=False))
    ]
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_a_run_is_not_resumed_beyond_its_end(tmp_path, log_lines):
    config = configured(*SMALL)
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir()
    header = {"config": {}, "classes": ["a"], "preprocessing": {}, "data": 1}
    checkpoints = RunCheckpoints(run.checkpoints, header, writes=True)
    state = make_state()
    state.progress = Progress(step=0, best_step=0)
    checkpoints.save_last(state)
    start.resume(config, run, state, plan_of("train.steps=7"), checkpoints)
    assert f"resuming {run.path} after step 0" in log_lines
    state.restore = lambda *arguments: setattr(state, "progress", Progress(step=8))
    with pytest.raises(ConfigError, match=rf"resume={run.path}: 8 steps .* 7 .*train\.steps"):
        start.resume(config, run, state, plan_of("train.steps=7"), checkpoints)


def test_a_resumed_run_has_the_precision_it_had_or_is_asked_for(tmp_path):
    """auto chooses once, and a change is not undone by the checkpoint."""
    run = RunFolder(tmp_path / "run")
    run.checkpoints.mkdir()
    header = {"config": {}, "classes": ["a"], "preprocessing": {}, "data": 1}
    checkpoints = RunCheckpoints(run.checkpoints, header, writes=True)
    checkpoints.save_last(make_run_state(configured(*SMALL, "train.precision=fp16")))
    for asked, expected in (("auto", "fp16"), ("fp32", "fp32")):
        config = configured(*SMALL, f"train.precision={asked}")
        batches, saved = make_batches(config), checkpoints.precision()
        resumed = start.starting_state(config, batches, None, False, saved)
        start.resume(config, run, resumed, plan_of(), checkpoints)
        assert resumed.precision == Precision(expected, CPU)


@pytest.mark.parametrize(
    ("asked", "saved", "dtype"),
    [
        ("auto", "bf16", torch.bfloat16),
        ("auto", "fp16", None),
        ("fp32", "bf16", None),
        ("bf16", "fp16", torch.bfloat16),
    ],
)
def test_weights_are_gathered_in_the_precision_of_the_run(monkeypatch, asked, saved, dtype):
    """Also where another machine has begun it."""
    gathered = []
    monkeypatch.setattr(
        Processes, "shard", lambda self, model, device, dtype: gathered.append(dtype)
    )
    config = configured(*SMALL, "runtime.sharding=fsdp", f"train.precision={asked}")
    machine = Machine(CPU, Processes(count=2), workers=0, sharded=True)
    batches = prepare.make_batches(config, make_data(), machine, StopSignal())
    start.starting_state(config, batches, None, False, saved)
    assert set(gathered) == {dtype}


def test_kernels_of_attention_are_settled_with_the_model_before_any_step(monkeypatch):
    settled = []
    monkeypatch.setattr(
        start, "exclude_faulty_attention", lambda device, model: settled.append((device, model))
    )
    state = make_run_state(configured(*SMALL))
    assert settled == [(CPU, state.model)]


def test_a_sharded_model_is_not_compiled_and_that_is_said(log_lines):
    for mode, lines in (("true", 1), ("blocks", 1), ("auto", 0), ("false", 0)):
        config = configured(*SMALL, "runtime.sharding=fsdp", f"runtime.compile={mode}")
        machine = Machine(CPU, Processes(count=2), workers=0, sharded=True)
        batches = prepare.make_batches(config, make_data(), machine, StopSignal())
        step = start.make_step(config, make_run_state(config), batches, plan_of(), 10**15)
        assert not step.compiled
        assert len([line for line in log_lines if "runtime.compile" in line]) == lines
        log_lines.clear()


@pytest.mark.parametrize(
    ("count", "overrides", "key"),
    [
        (2, [], r"runtime\.compile=graphs is for one process"),
        (1, ["train.micro_batch_size=4"], r"micro-batches of 4 .*train\.batch_size"),
        (1, ["train.micro_batch_size=8"], r"on a cpu"),
    ],
)
def test_cuda_graphs_are_for_whole_batches_of_one_process_on_a_gpu(count, overrides, key):
    config = configured(*SMALL, "runtime.compile=graphs", *overrides)
    batches = prepare.make_batches(config, make_data(), make_machine(), StopSignal())
    state = make_run_state(config)
    batches.machine.processes.count = count
    batches.machine.processes.data_parallel = lambda model, device: model
    start.fit_memory(config, state, batches, new=True)
    with pytest.raises(ConfigError, match=key):
        start.make_step(config, state, batches, plan_of(), 10**15)
