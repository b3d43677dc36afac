"""Training on a GPU: memory, waits, loss scale, checkpointing, resuming to the same bits."""

import json

import pytest
import torch
from helpers import train, train_to_step
from small_training import batch, make_model, make_state, make_step

from vit.checkpoints.file import read_checkpoint
from vit.data.loader import copy_ahead
from vit.runtime.compiling import compile_model
from vit.runtime.device import (
    peak_memory,
    product_rate,
    reset_peak_memory,
    use_deterministic_kernels,
)
from vit.runtime.memory import free_memory
from vit.runtime.precision import Precision
from vit.training.micro_batch import MARGIN, find_micro_batch_size
from vit.training.state import EMA
from vit.training.step import draw_drop_path

LARGE_BATCH = 256  # x 65 tokens x 384
RUN = (
    "experiment=digits",
    "model.num_layers=2",
    "model.hidden_size=64",
    "model.dropout=0.1",
    "model.drop_path=0.1",
    "train.batch_size=128",
    "train.epochs=5",
    "train.ema_decay=0.9",
    "train.log_every=1",
    "runtime.deterministic=true",
    "runtime.compile=false",
)


def on_device(device, number, size=16):
    images, labels = batch(number, size)
    return images.to(device), labels.to(device)


def test_a_stopped_run_is_resumed_to_the_same_bits(device, tmp_path):
    run = [*RUN, f"runtime.device={device.type}"]
    whole = train(tmp_path, *run, "hydra.run.dir=whole")
    assert whole.returncode == 0, whole.stderr

    parts = [*run, "hydra.run.dir=parts"]
    process = train_to_step(12, *parts, cwd=tmp_path, run="parts", from_scratch=True)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == 75
    resumed = train(tmp_path, "resume=parts")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    ours, theirs = (
        read_checkpoint(tmp_path / folder / "checkpoints" / "last.safetensors")[0]
        for folder in ("parts", "whole")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_kernels_repeat_their_bits(device, precision):
    use_deterministic_kernels(True)

    def trained():
        model = make_model(hidden_size=64, dropout=0.1).to(device)
        state = make_state(model, precision=Precision(precision, device))
        step = make_step(state)
        for number in range(5):
            step(*on_device(device, number))
            state.progress.step += 1
        return [item.detach().cpu() for item in state.model.parameters()]

    assert all(map(torch.equal, trained(), trained()))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_activation_checkpointing_leaves_the_result_as_it_is(device, precision):
    """Recomputed in the backward pass, attention is by the same kernel, and dropout the same."""
    use_deterministic_kernels(True)
    rows, gradients = [], []
    for checkpointing in (False, True):
        model = make_model(image_size=32, hidden_size=64, dropout=0.1, attention_dropout=0.1)
        model = model.to(device)
        model.encoder.checkpointing = checkpointing
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
        torch.manual_seed(0)
        with Precision(precision, device).autocast():
            loss = model(images).float().logsumexp(1).sum()
        loss.backward()
        rows.append(loss.detach())
        gradients.append([item.grad for item in model.parameters()])
    assert torch.equal(*rows)
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_saves_memory(gpu):
    peaks = []
    for checkpointing in (False, True):
        model = make_model(image_size=32, hidden_size=256, num_layers=8).to(gpu)
        model.encoder.checkpointing = checkpointing
        reset_peak_memory(gpu)
        model(torch.randn(256, 3, 32, 32, device=gpu)).sum().backward()
        peaks.append(peak_memory(gpu))
        del model
        free_memory(gpu)
    assert peaks[1] < 0.5 * peaks[0]


def test_the_micro_batch_is_found_where_memory_is_short(gpu):
    model = make_model(image_size=64, hidden_size=256, num_layers=8).to(gpu)
    precision = Precision("bf16", gpu)
    free_memory(gpu)
    _, total = torch.cuda.mem_get_info(gpu)
    # Two GB beside the margin that the search leaves alone, however large the GPU is
    torch.cuda.set_per_process_memory_fraction(min(1.0, MARGIN + 2e9 / total))
    try:
        size = find_micro_batch_size(model, (3, 64, 64), 4096, precision)
        assert 1 <= size < 4096
        state = make_state(model, precision=precision)
        step = make_step(state, micro_batch_size=size)
        step.batch_size = 4096
        images = torch.randn(4096, 3, 64, 64, device=gpu)
        labels = torch.zeros(4096, dtype=torch.int64, device=gpu)
        assert torch.isfinite(step(images, labels)).all()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_fp16_lowers_its_scale_until_gradients_are_finite(device):
    state = make_state(make_model().to(device), precision=Precision("fp16", device))
    state.progress.scaler = {
        "scale": 2.0**40,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 0,
    }
    step = make_step(state)
    losses = []
    for number in range(30):
        losses.append(step(*on_device(device, number))[0].item())
        state.progress.step += 1
    assert step.scaler.get_scale() < 2.0**30
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.isfinite(item).all() for item in state.model.parameters())


@pytest.mark.parametrize("mode", [True, "blocks", "graphs"])
def test_compiled_steps_are_those_of_the_model_itself(device, mode):
    if mode == "graphs" and device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")

    def rows(mode):
        torch.compiler.reset()
        model = make_model(hidden_size=64, drop_path=0.3).to(device)
        state = make_state(model, precision=Precision("fp32", device))
        step = make_step(state)
        step.forward = compile_model(model, mode, state.precision, 64, 1.0).forward
        # Graphs are recorded by the second step and replayed from the third on, and none of them
        # may overwrite what a step before has returned
        made = []
        for number in range(6):
            made.append(step(*on_device(device, number)))
            state.progress.step += 1
        return torch.stack(made).cpu()

    torch.testing.assert_close(rows(mode), rows(False), rtol=1e-3, atol=1e-3)


def test_compiled_gradients_of_a_large_batch(gpu):
    """The gradients of a LayerNorm are sums over rows and over columns.

    From five million numbers on, torch's compiler computes both in one kernel, which other models
    got wrong gradients from (MixOrderReduction, pytorch/pytorch#193061).
    """
    count = LARGE_BATCH
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(gpu)
    keep = draw_drop_path(0.3, 2, count, seed=0, step=0).to(gpu)

    def gradients(mode):
        torch.compiler.reset()
        model = make_model(image_size=32, hidden_size=384, num_heads=6, layer_scale=0.1)
        # After the seed of make_model; zeros, as it begins with, would pass no gradient on
        torch.nn.init.normal_(model.head.weight, std=0.1)
        model = model.to(gpu).train()
        forward = compile_model(model, mode, Precision("fp32", gpu), 384, 1.0).forward
        forward(images, keep).logsumexp(1).sum().backward()
        return {name: item.grad for name, item in model.named_parameters()}

    ours, reference = gradients(True), gradients(False)
    # Those of the keys' biases are zero but for rounding
    least = 1e-2 * torch.nn.utils.get_total_norm(list(reference.values()))
    for name, gradient in reference.items():
        assert (ours[name] - gradient).norm() < 1e-3 * (gradient.norm() + least), name


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon", "sgd"])
def test_a_step_makes_the_host_wait_nowhere(gpu, optimizer):
    settings = {"name": optimizer, "lr": 1e-3, "weight_decay": 0.1}
    state = make_state(make_model(drop_path=0.1).to(gpu), settings, Precision("bf16", gpu))
    state.ema = EMA(state.model, 0.9)
    step = make_step(state, micro_batch_size=8)
    batches = [on_device(gpu, number) for number in range(4)]
    for number, (images, labels) in enumerate(batches):
        # The first two make moments and choose kernels
        torch.cuda.set_sync_debug_mode("error" if number > 1 else "default")
        try:
            step(images, labels)
            state.ema.update(state.model, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        state.progress.step += 1


def test_batches_that_are_copied_ahead_are_whole(gpu):
    batches = [
        (torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8), torch.arange(64) + number)
        for number in range(20)
    ]
    pinned = ((pixels.pin_memory(), labels.pin_memory()) for pixels, labels in batches)
    sums = []
    busy = torch.randn(2048, 2048, device=gpu)
    for pixels, labels in copy_ahead(pinned, gpu):
        # The device is behind, and memory is reused in the meantime
        busy = (busy @ busy).clamp(-1, 1)
        sums.append((pixels.long().sum(), labels.sum()))
        del pixels, labels
        torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8, device=gpu)
    expected = [(pixels.long().sum().item(), labels.sum().item()) for pixels, labels in batches]
    assert [(a.item(), b.item()) for a, b in sums] == expected


def test_a_whole_run_reports_its_own_memory_and_wait(device, tmp_path):
    done = train(tmp_path, *RUN, f"runtime.device={device.type}", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "timing.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if device.type == "cuda":
        # Three matrices of 8,192 x 8,192 in float32 would be 0.8 GB
        assert all(row["memory_bytes"] < 5e8 for row in rows)
        assert all(row["data_wait"] == 0 for row in rows)
    assert product_rate(device, torch.float32) > 1e8
