"""Heads: scored, masked, removed; and the command that does it to a checkpoint."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

import vit
import vit.prune
from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.checkpoints.model import build_model
from vit.config.config import from_composed, register, to_dict
from vit.config.data import data_arguments
from vit.data.datasets import load_data
from vit.data.loader import evaluation_batches
from vit.data.preprocessing import Preprocessing
from vit.errors import run_command
from vit.evaluation.restore import restore
from vit.model.cost import count_macs
from vit.model.head_pruning import importance, least_important, removed_heads
from vit.model.vision_transformer import VisionTransformer
from vit.prune import main

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "num_classes": 5,
    "init": "trunc_normal",
    "init_range": 0.3,
}


def build(**changes):
    """With weights large enough that every head matters."""
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **changes}).eval()


def batch(count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 16, 16, generator=generator), torch.arange(count) % 5


# --- removal ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": True},
        {"qkv_bias": False},
        {"position": "rope2d"},
        {"global_pool": "mean", "num_registers": 2},
    ],
    ids=str,
)
def test_masked_and_pruned_logits_agree_also_when_pruned_twice(changes):
    model, images = build(**changes), batch()[0]
    pruned, mask = copy.deepcopy(model), torch.ones(3, 4)
    for heads in ({0: [1, 3], 2: [0]}, {0: [2], 1: [3], 2: [3]}):
        before = pruned(images)
        pruned.prune_heads(heads)
        for layer, numbers in heads.items():
            mask[layer, numbers] = 0
        masked = model.trace(images, mask).logits
        assert (masked - before).abs().max() > 1e-3
        torch.testing.assert_close(pruned(images), masked, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            pruned.trace(images, torch.ones(3, 4)).logits, masked, atol=1e-4, rtol=1e-4
        )
    assert removed_heads(pruned) == {0: [1, 2, 3], 1: [3], 2: [0, 3]}
    rebuilt = build(**changes, pruned_heads={0: [1, 2, 3], 1: [3], 2: [0, 3]})
    assert torch.equal(rebuilt(images), pruned(images))
    # A mask goes by the original numbers, whatever was removed before
    one_more = torch.ones(3, 4)
    one_more[2, 1] = mask[2, 1] = 0
    torch.testing.assert_close(
        pruned.trace(images, one_more).logits,
        model.trace(images, mask).logits,
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_mask_for_each_image():
    model, images = build(), batch(3)[0]
    masks = torch.rand(3, 3, 4)
    alone = torch.cat(
        [model.trace(image[None], mask).logits for image, mask in zip(images, masks, strict=True)]
    )
    torch.testing.assert_close(model.trace(images, masks).logits, alone, atol=1e-5, rtol=1e-5)


def test_what_a_head_costs():
    model = build()
    pruned = copy.deepcopy(model)
    pruned.prune_heads({0: [1, 3], 2: [0]})
    N, D, K = 17, 32, 8
    assert model.num_parameters() - pruned.num_parameters() == 3 * (4 * D * K + 3 * K)
    assert count_macs(model) - count_macs(pruned) == 3 * (4 * N * D * K + 2 * N * N * K)
    with torch.device("meta"):
        assert build(pruned_heads={0: [1, 3], 2: [0]}).num_parameters() == pruned.num_parameters()


def test_frozen_parameters_stay_frozen():
    model = build()
    model.encoder.blocks[0].attention.key.requires_grad_(False)
    model.prune_heads({0: [1]})
    attention = model.encoder.blocks[0].attention
    assert [matrix.weight.requires_grad for matrix in (attention.query, attention.key)] == [
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("heads", "told"),
    [
        ({0: [0], 3: [1]}, "no layer 3 to remove heads from; there are 0 to 2"),
        ({-1: [0]}, "no layer -1"),
        ({0: [0], 1: [4]}, "layer 1 has no head 4 to remove; it has 0, 1, 2, 3"),
        ({1: [-1]}, "layer 1 has no head -1"),
        ({2: [2]}, "head 2 of layer 2 was removed before; it has 0, 1, 3"),
        ({1: [0, 1, 2, 3]}, "layer 1 must keep one head"),
        ({2: [0, 1, 3]}, "layer 2 must keep one head at least; it has 0, 1, 3"),
    ],
)
def test_impossible_removals_are_refused_and_change_nothing(heads, told):
    model = build(pruned_heads={2: [2]})
    with pytest.raises(ValueError, match=told):
        model.prune_heads(heads)
    assert removed_heads(model) == {2: [2]}


def test_a_configuration_may_hold_layers_as_words():
    plain = {**SMALL, "name": "small"}
    del plain["num_classes"]
    model = build_model({**plain, "pruned_heads": {"0": [1, 3], "2": [0]}}, 5)
    assert removed_heads(model) == {0: [1, 3], 2: [0]}
    for wrong in ([0, 1], {"first": [0]}, {0: 1}):
        with pytest.raises(ValueError, match=r"pruned_heads must be \{layer: \[heads\]\}"):
            build_model({**plain, "pruned_heads": wrong}, 5)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_importance_is_the_mean_of_every_samples_own_gradient():
    model, (images, labels) = build(), batch()
    total = torch.zeros(3, 4)
    for image, label in zip(images, labels, strict=True):
        mask = torch.ones(3, 4, requires_grad=True)
        F.cross_entropy(model.trace(image[None], mask).logits, label[None]).backward()
        total += mask.grad.abs()
    expected = total / total.norm(dim=1, keepdim=True)
    scores = importance(model, [(images[:4], labels[:4]), (images[4:], labels[4:])])
    torch.testing.assert_close(scores.float(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.norm(dim=1), torch.ones(3, dtype=torch.float64))


def test_importance_by_finite_differences():
    model, (images, labels) = build().double(), batch()
    images = images.double()
    slopes = torch.zeros(3, 4, dtype=torch.float64)
    for layer in range(3):
        for head in range(4):
            losses = []
            for change in (1e-4, -1e-4):
                mask = torch.ones(3, 4, dtype=torch.float64)
                mask[layer, head] += change
                with torch.no_grad():
                    losses.append(
                        F.cross_entropy(model.trace(images, mask).logits, labels, reduction="none")
                    )
            slopes[layer, head] = ((losses[0] - losses[1]) / 2e-4).abs().mean()
    expected = slopes / slopes.norm(dim=1, keepdim=True)
    torch.testing.assert_close(
        importance(model, [(images, labels)]), expected, atol=1e-5, rtol=1e-5
    )


def test_a_head_that_adds_nothing_has_no_importance():
    model = build()
    value = model.encoder.blocks[1].attention.value
    with torch.no_grad():
        value.weight[16:24], value.bias[16:24] = 0, 0
    scores = importance(model, [batch()])
    assert scores[1, 2] == 0
    assert (scores > 0).sum() == 11
    with torch.no_grad():
        value.weight[:], value.bias[:] = 0, 0
    assert importance(model, [batch()])[1].tolist() == [
        0,
        0,
        0,
        0,
    ]  # not NaN, which is for heads that are gone


def test_removed_heads_have_no_score():
    scores = importance(build(pruned_heads={0: [1, 3], 2: [0]}), [batch()])
    assert scores.isnan().nonzero().tolist() == [[0, 1], [0, 3], [2, 0]]
    assert scores.nan_to_num().norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    with pytest.raises(ValueError, match="no images"):
        importance(build(), [])


def test_the_least_important_heads_but_never_a_whole_layer():
    nan = float("nan")
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.9, nan, 0.25], [nan, nan, nan, 0.01]])
    assert least_important(scores, 0.4) == {0: [0, 1], 1: [3]}  # 3 of 8; layer 2's only head stays
    assert least_important(scores, 0.99) == {0: [0, 1, 2], 1: [0, 3]}
    assert least_important(scores, 0.01) == {}
    for fraction in (0, 1, -0.5, nan):
        with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
            least_important(scores, fraction)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only wait for a second thread, above all where others use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(vit.prune, "SPEED_ROUNDS", 2)


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A checkpoint of a small model that has learnt digits for some seconds."""
    register()
    with initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3"):
        composed = compose(
            "train",
            [
                "experiment=digits",
                "model.num_layers=2",
                "model.hidden_size=64",
                "model.patch_size=8",
            ],
        )
    plain = to_dict(from_composed(composed))
    data = load_data(
        **data_arguments(plain["data"], plain["model"]),
        image_size=(16, 16),
        device=torch.device("cpu"),
    )
    preprocessing = Preprocessing((16, 16), 1, (0.305,), (0.376,), None, "bilinear")
    torch.manual_seed(0)
    model = build_model(plain["model"], 10)
    learn(model, data.train, preprocessing, epochs=6)
    path = tmp_path_factory.mktemp("digits") / "best.safetensors"
    header = {
        "kind": "best",
        "config": plain,
        "classes": data.classes,
        "preprocessing": preprocessing.to_dict(),
        "precision": "fp32",
        "progress": {"step": 54},
    }
    write_checkpoint(path, model.state_dict(), header)
    return path


def learn(model, images, preprocessing, epochs):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for inputs, labels in evaluation_batches(
            images, 128, preprocessing, 0, torch.device("cpu")
        ):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    model.eval()


def prune(*arguments) -> int:
    return run_command("vit.prune", lambda: main([str(argument) for argument in arguments]))


def test_prune_evaluate_fine_tune_and_prune_again(digits, tmp_path, capsys):
    first, second = tmp_path / "new" / "first.safetensors", tmp_path / "second.safetensors"
    assert prune(digits, "--fraction", "0.375", "--out", first) == 0
    output = capsys.readouterr().out
    model, pruned = vit.load(digits), vit.load(first)
    removed = removed_heads(pruned)
    assert sum(map(len, removed.values())) == 3
    assert pruned.num_parameters() == model.num_parameters() - 3 * (4 * 64 * 16 + 3 * 16)
    assert count_macs(pruned) < count_macs(model)
    assert pruned.state_dict()["encoder.blocks.0.attention.query.weight"].shape == (
        16 * (4 - len(removed.get(0, []))),
        64,
    )

    # The least important by the scores on train, and the numbers that were told
    restored = restore(first, {}, torch.device("cpu"))
    train = evaluation_batches(restored.data.train, 64, model.preprocessing, 0, torch.device("cpu"))
    assert least_important(importance(model, train), 0.375) == removed
    for name, evaluated in (("before", model), ("after", pruned)):
        metrics = restored.measure(evaluated, "val", 0)
        assert metrics["n"] == 287
        assert re.search(
            rf"{name} +top-1 {metrics['top1']:.2%} \(95 % .* loss {metrics['loss']:.4f} \(digits, held out for "
            r"validation, 287 images\)",
            output,
        )
    assert f"{pruned.num_parameters():,} parameters" in output
    assert "times as fast" in output

    # The header is the old one, but for the removed heads
    old, new = read_checkpoint(digits)[1], read_checkpoint(first)[1]
    assert new["config"]["model"].pop("pruned_heads") == {
        str(layer): heads for layer, heads in removed.items()
    }
    assert new.pop("pruning")["from"] == str(digits)
    del old["config"]["model"]["pruned_heads"]
    assert new == old

    # Fine-tuned it is better, and still pruned
    before = restored.measure(restored.model, "val", 0)["loss"]
    learn(restored.model, restored.data.train, model.preprocessing, epochs=2)
    assert restored.measure(restored.model, "val", 0)["loss"] < before
    tuned = tmp_path / "tuned.safetensors"
    write_checkpoint(tuned, restored.model.state_dict(), read_checkpoint(first)[1])

    # Pruned again, on a few images and another split
    assert prune(tuned, "--fraction", "0.4", "--out", second, "--limit", 40, "--split", "test") == 0
    output = capsys.readouterr().out
    assert "used as test, 40 images" in output
    assert "2 of 5" in output
    assert "fewer than asked" not in output
    twice = removed_heads(vit.load(second))
    assert sum(map(len, twice.values())) == 5
    assert all(set(heads) <= set(twice[layer]) for layer, heads in removed.items())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--fraction", "0"], "--fraction must be between 0 and 1, got 0"),
        (["--fraction", "1"], "--fraction must be between 0 and 1, got 1"),
        (["--fraction", "nan"], "--fraction must be between 0 and 1"),
        (["--fraction", "0.01", "--limit", "20"], "--fraction 0.01 removes none of the 8 heads"),
        (["--fraction", "0.3", "--limit", "0"], "--limit must be a positive number, got 0"),
        (["--fraction", "0.3", "--out", "."], "give the name of a new file"),
        (
            ["--fraction", "0.3", "--limit", "20", "--out", "/proc/nowhere/x"],
            "--out /proc/nowhere/x: can't write there",
        ),
    ],
)
def test_a_mistake_is_one_line(digits, tmp_path, capsys, arguments, told):
    out = tmp_path / "out.safetensors"
    assert prune(digits, "--out", out, *arguments) == 2
    errors = capsys.readouterr().err
    assert told in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_other_mistakes(digits, tmp_path, capsys):
    before = digits.read_bytes()
    assert prune(digits, "--fraction", "0.3", "--out", digits) == 2
    assert digits.read_bytes() == before
    assert prune(tmp_path / "nowhere", "--fraction", "0.3", "--out", tmp_path / "x") == 2
    assert "no such checkpoint file" in capsys.readouterr().err
    header = read_checkpoint(digits)[1]
    header["config"]["data"]["val_fraction"] = 0.0
    tensors = read_checkpoint(digits)[0]
    write_checkpoint(tmp_path / "no_val.safetensors", tensors, header)
    assert (
        prune(
            tmp_path / "no_val.safetensors",
            "--fraction",
            "0.3",
            "--limit",
            20,
            "--out",
            tmp_path / "x",
            "--split",
            "val",
        )
        == 2
    )
    assert "nothing was held out" in capsys.readouterr().err
    assert (
        prune(
            tmp_path / "no_val.safetensors",
            "--fraction",
            "0.3",
            "--limit",
            20,
            "--out",
            tmp_path / "x",
        )
        == 0
    )
    assert "used as test, 20 images" in capsys.readouterr().out
    assert prune(digits, "--fraction", "0.9", "--limit", 20, "--out", tmp_path / "x") == 0
    assert "6 of 8 (fewer than asked, as one stays in every layer)" in capsys.readouterr().out
