"""Frozen parts: fixed features that cost no backward pass, no state and no average."""

import pytest
import torch
from small_training import (
    MadeUpBatches,
    batch,
    make_model,
    make_plan,
    make_state,
    make_step,
    make_trainer,
    same_bits,
)

from vit.checkpoints.model import evaluated_tensors
from vit.errors import CheckpointError
from vit.model.cost import training_flops
from vit.training.freezing import backbone_of, describe_parameters, first_blocks_of, freeze

ADAMW = {"name": "adamw", "lr": 1e-2, "weight_decay": 0.5}
MUON = {"name": "muon", "lr": 0.02, "weight_decay": 0.5, "settings": {"momentum": 0.9}}
# All that is dropped in training
DROPPING = {"dropout": 0.4, "attention_dropout": 0.4, "drop_path": 0.4, "patch_dropout": 0.5}


def frozen_state(count, optimizer=ADAMW, **settings):
    """(a state whose first blocks are frozen, those modules)."""
    model = make_model(num_layers=3, **settings)
    parts = first_blocks_of(model, count)
    freeze(parts)
    return make_state(model, optimizer, ema_decay=0.9), parts


@pytest.mark.parametrize("optimizer", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("count", [0, 2, 3])
def test_frozen_parts_keep_every_bit_and_have_no_state(tmp_path, count, optimizer):
    """In spite of a large weight decay; nor does their average move."""
    state, parts = frozen_state(count, optimizer)
    before = make_model(num_layers=3)
    make_trainer(tmp_path, state=state, frozen=parts).fit()
    frozen = {f"encoder.blocks.{number}" for number in range(count)} | {"embeddings"}
    for part in frozen:
        assert same_bits(state.model.get_submodule(part), before.get_submodule(part))
        assert same_bits(state.ema.model.get_submodule(part), before.get_submodule(part))
    for name, parameter in state.model.named_parameters():
        is_frozen = any(name.startswith(f"{part}.") for part in frozen)
        assert (parameter not in state.optimizer.state) == is_frozen
        assert torch.equal(parameter, before.get_parameter(name)) == is_frozen, name


def test_frozen_weights_are_in_memory_and_in_the_checkpoint_once():
    """Averages of them would be what they are."""
    state, parts = frozen_state(2)
    frozen = {id(item) for part in parts for item in part.parameters()}
    shared = {id(item) for item in state.ema.model.parameters() if id(item) in frozen}
    assert shared == frozen
    pairs = zip(state.ema.model.named_parameters(), state.model.parameters(), strict=True)
    own = {name for (name, average), item in pairs if average is not item}
    tensors = state.tensors()
    assert {name for name in tensors if name.startswith("average/")} == {
        f"average/{name}" for name in own
    }

    other, _ = frozen_state(2, init="xavier")
    header = {"progress": state.progress.to_dict(), "precision": "fp32"}
    other.restore(tensors, header, "test")
    assert same_bits(other.model, state.model)
    assert same_bits(other.ema.model, state.ema.model)
    evaluated = evaluated_tensors(tensors)
    assert all(
        torch.equal(evaluated[name], item) for name, item in state.ema.model.named_parameters()
    )
    without = {name: item for name, item in tensors.items() if "average/" not in name}
    with pytest.raises(CheckpointError, match="no averaged weights"):
        other.restore(without, header, "test")


def test_no_graph_is_kept_of_what_is_frozen():
    state, parts = frozen_state(2)
    seen = []
    for block in state.model.encoder.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(output.requires_grad))
    make_step(state, frozen=parts)(*batch(0))
    assert seen == [False, False, True]
    assert all(parameter.grad is None for part in parts for parameter in part.parameters())


def test_frozen_parts_compute_as_in_evaluation():
    """After an evaluation too; the others drop as before."""
    state, parts = frozen_state(2, **DROPPING)
    outputs = {}
    for number, block in enumerate(state.model.encoder.blocks):
        block.register_forward_hook(
            lambda block, inputs, output, number=number: outputs.setdefault(number, output)
        )
    step = make_step(state, frozen=parts)
    images, labels = batch(0)
    for _ in range(2):
        outputs.clear()
        step(images, labels)
        trained = dict(outputs)
        outputs.clear()
        with torch.no_grad():
            state.model.eval()(images)
        assert torch.equal(trained[1], outputs[1])
        assert trained[1].shape[1] == 5  # no patch is left out
        assert not torch.allclose(trained[2], outputs[2])


def test_activation_checkpointing_leaves_the_result_as_it_is(tmp_path):
    states = []
    for checkpointing in (False, True):
        state, parts = frozen_state(1, dropout=0.2, drop_path=0.2)
        state.model.encoder.checkpointing = checkpointing
        make_trainer(
            tmp_path / str(checkpointing), state=state, frozen=parts, micro_batch_size=5
        ).fit()
        states.append(state)
    assert same_bits(states[0].model, states[1].model)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_multiply_add_without_gradients_counts_two_and_not_six(pool):
    model = make_model(num_layers=3, global_pool=pool)
    D, M, N, classes = 16, 64, 5, 3
    block = 3 * N * D * D + 2 * N * N * D + N * D * D + 2 * N * D * M
    left_out = (N - 1) * (2 * N * D + D * D + 2 * D * M) if pool == "cls" else 0
    embedding = 4 * D * 3 * 4 * 4
    everything = embedding + 3 * block - left_out + classes * D
    assert training_flops(model) == 6 * everything
    for count in range(4):
        freeze(first_blocks_of(model, count))
        fixed = embedding + count * block - (left_out if count == 3 else 0)
        assert training_flops(model, first_blocks_of(model, count)) == 6 * everything - 4 * fixed
    freeze(backbone_of(model))
    assert training_flops(model, backbone_of(model)) == 2 * everything + 4 * classes * D
    assert model.training


def test_patches_that_a_frozen_part_does_not_drop_are_counted():
    dropping, plain = make_model(patch_dropout=0.5), make_model()
    assert training_flops(dropping) < training_flops(plain)
    parts = [first_blocks_of(model, 1) for model in (dropping, plain)]
    for modules in parts:
        freeze(modules)
    assert training_flops(dropping, parts[0]) == training_flops(plain, parts[1])


def test_trained_parameters_are_told():
    model = make_model()
    assert describe_parameters(model) == f"{model.num_parameters():,}"
    freeze(backbone_of(model))
    assert describe_parameters(model).endswith("(51 of them trained)")


def test_a_frozen_run_learns(tmp_path):
    state, parts = frozen_state(1, {"name": "adamw", "lr": 3e-3, "weight_decay": 0.0})
    batches = MadeUpBatches(source=lambda step: batch(0))
    trainer = make_trainer(
        tmp_path, state=state, frozen=parts, batches=batches, plan=make_plan(100)
    )
    trainer.fit()
    images, labels = batch(0)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(state.model.eval()(images), labels)
    assert loss < 0.1
