"""Low-rank changes of the attention's matrices: the formula, what is trained, and merging."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from composing import check, configured
from small_training import (
    FP32,
    MadeUpBatches,
    batch,
    make_model,
    make_plan,
    make_state,
    make_trainer,
    same_bits,
)
from torch.nn import functional as F

from vit.checkpoints.file import read_checkpoint
from vit.checkpoints.model import evaluated_tensors, load_weights
from vit.checkpoints.run import RunCheckpoints
from vit.errors import ConfigError, Stopped
from vit.model.cost import training_flops
from vit.model.low_rank import (
    MATRICES,
    add_low_rank,
    count_plain_parameters,
    merge_low_rank,
    no_change,
)

RANK = 3
ADAMW = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.5}


def changed_model(first_block=0, learned=True, **settings):
    """The small model with changes as training may leave them."""
    model = make_model(**settings)
    torch.manual_seed(1)
    add_low_rank(model, RANK, first_block)
    if learned:
        for name, parameter in model.named_parameters():
            if name.endswith("up.weight"):
                torch.nn.init.normal_(parameter, std=0.1)
        torch.nn.init.normal_(model.head.weight)
    return model


def plain_model(model, **settings):
    """The model that merging gives."""
    plain = make_model(**settings)
    plain.load_state_dict(merge_low_rank(model.state_dict()))
    return plain.eval()


def test_a_model_begins_as_it_was():
    model, plain = changed_model(learned=False), make_model()
    images, _ = batch(0)
    for training in (True, False):
        assert torch.equal(model.train(training)(images), plain.train(training)(images))


def test_a_starts_as_in_the_authors_code_and_b_at_zero():
    """Kaiming-uniform with a = √5, which is uniform up to 1 / √(inputs)."""
    model = make_model(hidden_size=256, num_heads=4)
    add_low_rank(model, 16)
    for block in model.encoder.blocks:
        for name in MATRICES:
            layer = block.attention.get_submodule(name)
            assert (layer.down.weight.shape, layer.up.weight.shape) == ((16, 256), (256, 16))
            limit = 1 / math.sqrt(256)
            assert 0.95 * limit < layer.down.weight.abs().max() <= limit
            assert layer.down.weight.std().item() == pytest.approx(limit / math.sqrt(3), rel=0.05)
            assert not layer.up.weight.any()


def test_the_same_seed_gives_the_same_numbers():
    assert same_bits(changed_model(learned=False), changed_model(learned=False))


@pytest.mark.parametrize("settings", [{}, {"qkv_bias": False}, {"pruned_heads": {0: [1]}}], ids=str)
def test_training_computes_the_formula(settings):
    """h = W x + B A x for each of the four matrices."""
    model = changed_model(**settings).double()
    attention = model.encoder.blocks[0].attention
    x = torch.randn(2, 5, 16, dtype=torch.float64)

    def formula(name, x):
        layer = attention.get_submodule(name)
        h = x @ layer.weight.T + (x @ layer.down.weight.T) @ layer.up.weight.T
        return h if layer.bias is None else h + layer.bias

    for ours, name in zip(attention.qkv(x, None), MATRICES[:3], strict=True):
        expected = formula(name, x).unflatten(-1, (len(attention.heads), 8)).transpose(1, 2)
        torch.testing.assert_close(ours, expected)
    context = torch.randn(2, 5, 8 * len(attention.heads), dtype=torch.float64)
    torch.testing.assert_close(attention.projection(context), formula("projection", context))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_evaluation_has_the_bits_of_the_merged_model(precision):
    model = changed_model()
    images, _ = batch(0)
    format_ = replace(FP32, name=precision)
    with torch.no_grad(), format_.autocast():
        assert torch.equal(model.eval()(images), plain_model(model)(images))
        trained = model.train()(images)
    tolerance = {"fp32": 1e-5, "bf16": 0.1}[precision]
    torch.testing.assert_close(
        trained.float(), plain_model(model)(images), rtol=tolerance, atol=tolerance
    )


def test_merging_gives_the_tensors_of_a_plain_model():
    model = changed_model(first_block=1)
    merged = merge_low_rank(model.state_dict())
    plain = make_model().state_dict()
    assert {name: value.shape for name, value in merged.items()} == {
        name: value.shape for name, value in plain.items()
    }
    changed = {name for name in plain if not torch.equal(merged[name], plain[name])}
    matrices = {f"encoder.blocks.1.attention.{name}.weight" for name in MATRICES}
    assert changed == matrices | {"head.weight"}
    assert merge_low_rank(plain).keys() == plain.keys()
    assert count_plain_parameters(model) == make_model().num_parameters()


def test_merged_weights_are_taken_back_with_no_change():
    model = changed_model()
    images, _ = batch(0)
    expected = plain_model(model)(images)
    other = changed_model()
    merged = merge_low_rank(model.state_dict())
    load_weights(other, no_change(other.state_dict()) | merged, "test")
    assert torch.equal(other.eval()(images), expected)


def test_the_changes_and_the_head_alone_are_trained_decayed_and_averaged(tmp_path):
    model = changed_model(learned=False)
    state = make_state(model, ADAMW, ema_decay=0.9)
    before = copy.deepcopy(model)
    make_trainer(tmp_path, state=state).fit()
    for name, parameter in model.named_parameters():
        is_trained = name.startswith("head.") or name.endswith((".down.weight", ".up.weight"))
        for trained in (parameter, state.ema.model.get_parameter(name)):
            assert torch.equal(trained, before.get_parameter(name)) != is_trained, name
        assert (parameter in state.optimizer.state) == is_trained
    groups = {group["name"]: len(group["params"]) for group in state.optimizer.param_groups}
    assert groups == {"decay": 2 * 2 * 4 + 1, "no_decay": 1}


def test_frozen_blocks_are_not_changed():
    model = changed_model(first_block=1)
    names = {name.split(".")[2] for name, _ in model.named_parameters() if ".up." in name}
    assert names == {"1"}


def real_checkpoints(folder):
    folder.mkdir(parents=True, exist_ok=True)
    header = {"config": {}, "classes": ["a"], "preprocessing": {}, "data": 1}
    return RunCheckpoints(folder, header, writes=True)


def test_a_stopped_run_resumes_to_the_same_bits_and_saves_merged_weights(tmp_path):
    """By way of real checkpoints, with dropout, stochastic depth and an average."""

    def begin(name, resuming=False):
        model = changed_model(learned=False, dropout=0.2, drop_path=0.2)
        state = make_state(model, ADAMW, ema_decay=0.9)
        checkpoints = real_checkpoints(tmp_path / name)
        if resuming:
            torch.nn.init.normal_(model.head.weight)  # all of it comes from the checkpoint
            checkpoints.resume(state, may_differ=False)
        return make_trainer(
            tmp_path / name, state=state, checkpoints=checkpoints, micro_batch_size=5
        )

    whole = begin("whole")
    whole.fit()
    stopped = begin("parts")
    stopped.batches.source = stopping_source(stopped, 3)
    with pytest.raises(Stopped):
        stopped.fit()
    resumed = begin("parts", resuming=True)
    assert 0 < resumed.state.progress.step < 6
    resumed.fit()
    assert same_bits(whole.state.model, resumed.state.model)
    assert same_bits(whole.state.ema.model, resumed.state.ema.model)

    # What evaluations, predictions and exports read knows nothing of the changes
    best, _ = read_checkpoint(tmp_path / "parts" / "best.safetensors")
    plain = make_model()
    plain.load_state_dict(best)
    images, _ = batch(9)
    assert torch.equal(plain.eval()(images), whole.state.ema.model(images))
    last, _ = read_checkpoint(tmp_path / "parts" / "last.safetensors")
    assert any(name.endswith(".up.weight") for name in last)
    ours = evaluated_tensors(last)
    assert ours.keys() == best.keys()
    assert all(torch.equal(ours[name], best[name]) for name in best)
    loaded = resumed.checkpoints.load_best(resumed.state)
    assert torch.equal(loaded(images), plain(images))


def stopping_source(trainer, number):
    """The usual batches; with the one of this number a signal comes."""

    def source(step):
        if step == number:
            trainer.stop.name = "SIGTERM"
        return batch(step)

    return source


def test_activation_checkpointing_leaves_the_result_as_it_is(tmp_path):
    models = []
    for checkpointing in (False, True):
        state = make_state(changed_model(dropout=0.2), ADAMW)
        state.model.encoder.checkpointing = checkpointing
        make_trainer(tmp_path / str(checkpointing), state=state).fit()
        models.append(state.model)
    assert same_bits(*models)


def test_one_batch_is_learned_by_heart(tmp_path):
    settings = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0}
    trainer = make_trainer(
        tmp_path,
        state=make_state(changed_model(), settings),
        batches=MadeUpBatches(source=lambda step: batch(0)),
        plan=make_plan(100),
    )
    trainer.fit()
    images, labels = batch(0)
    with torch.no_grad():
        assert F.cross_entropy(trainer.state.model.eval()(images), labels) < 0.1


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_frozen_weights_behind_trained_ones_count_four(pool):
    """No gradients of weights; and none at all of the embeddings."""
    model = changed_model(global_pool=pool)
    D, M, N, classes, L = 16, 64, 5, 3, 2
    left_out = N - 1 if pool == "cls" else 0
    inputs, outputs = L * N, L * N - left_out
    embedding = 4 * D * 3 * 4 * 4
    frozen = inputs * 3 * D * D + outputs * (D * D + 2 * D * M)
    changes = RANK * (inputs * 3 * 2 * D + outputs * 2 * D)
    attention = 2 * D * N * outputs
    expected = 2 * embedding + 4 * frozen + 6 * (changes + attention + classes * D)
    assert training_flops(model) == expected


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["pretrained=null"], "pretrained="),
        (["train.freeze=backbone"], "train.freeze=backbone"),
        (["model.num_layers=2", "train.freeze=blocks:2"], "train.freeze=blocks:2"),
        (["train.lora_rank=384"], "model.hidden_size, 384"),
        (["optimizer=muon"], "optimizer=muon"),
        (["train.lora_rank=0"], "must be a positive number"),
    ],
)
def test_changes_that_make_no_sense_are_refused(overrides, part):
    settings = ["model=vit_s4", "pretrained=x", "train.lora_rank=8"]
    check(configured(*settings, "train.freeze=blocks:3"))
    with pytest.raises(ConfigError, match=r"^train\.lora_rank") as error:
        check(configured(*settings, *overrides))
    assert part in str(error.value)


def test_the_step_trains_the_merged_gradient():
    """Each gradient is that of the product in the merged weight: dB = dW Aᵀ, dA = Bᵀ dW."""
    model = changed_model().double()
    images, labels = batch(0)
    F.cross_entropy(model.train()(images.double()), labels).backward()
    plain = make_model(torch.float64)
    plain.load_state_dict(merge_low_rank(model.state_dict()))
    F.cross_entropy(plain(images.double()), labels).backward()
    for block, twin in zip(model.encoder.blocks, plain.encoder.blocks, strict=True):
        for name in MATRICES:
            layer = block.attention.get_submodule(name)
            gradient = twin.attention.get_submodule(name).weight.grad
            up, down = layer.up.weight, layer.down.weight
            torch.testing.assert_close(up.grad, gradient @ down.T, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(down.grad, up.T @ gradient, rtol=1e-9, atol=1e-12)
            assert layer.weight.grad is None
