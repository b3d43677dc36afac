"""benchmarks/accuracy_per_compute.py: points, table, picture, and the compute of other projects."""

import json
import sys
from itertools import combinations

import pytest
import torch
import yaml
from helpers import ROOT
from matplotlib.transforms import Bbox
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import accuracy_per_compute as script
from benchmarks.label_placement import place_labels
from vit.errors import DataError
from vit.model.cost import count_macs
from vit.model.vision_transformer import VisionTransformer

STORED = yaml.safe_load((script.RESULTS / script.STORED).read_text(encoding="utf-8"))
PASSES = [(entry["name"], one_pass) for entry in STORED for one_pass in entry["passes"]]
TRANSFORMERS = [(name, one) for name, one in PASSES if "hidden_size" in one["model"]]
CONVOLUTIONAL = [(name, one) for name, one in PASSES if "widths" in one["model"]]


def write_result(folder, name, **values):
    (folder / f"{name}.json").write_text(json.dumps({"status": "finished", **values}))


@pytest.fixture
def results(tmp_path):
    """A folder with three seeds of a recipe, and what must not be mixed with them."""
    for seed, top1 in enumerate((0.86, 0.85, 0.90)):
        name = f"cifar10_fast_v2_seed{seed}_2cores_epyc_zen4_2026-12-0{seed + 1}"
        write_result(tmp_path, name, pflops=0.5, test_top1=top1)
    write_result(tmp_path, "cifar10_fast_v2_seed0_h200_2026-12-01", pflops=0.5, test_top1=0.87)
    write_result(tmp_path, "cifar10_2p5pflop_h200_2026-12-01", pflops=2.5, test_top1=0.9)
    write_result(tmp_path, "conv_vit_seed0_h200_2026-12-01", pflops=0.7, test_top1=0.91)
    # Without compute, without a test, of other data
    write_result(tmp_path, "cifar10_fast_2cores_2026-11-20", test_top1=0.81)
    write_result(tmp_path, "cifar10_fast_seed1_2cores_2026-11-20", pflops=1, test_top1=None)
    write_result(tmp_path, "cifar100_fast_seed0_h200_2026-12-01", pflops=1, test_top1=0.6)
    write_result(tmp_path, "digits_seed0_h200_2026-12-01", pflops=0.002, test_top1=0.98)
    stored = {
        "name": "theirs",
        "kind": "convolutional",
        "test_top1": 0.94,
        "passes": [
            {"multiply_adds": 10**9, "images": 10**6},
            {"multiply_adds": 10**9, "images": 10**6, "backward": False},
        ],
        "how": "as published",
        "source": "https://example.org",
    }
    (tmp_path / script.STORED).write_text(yaml.safe_dump([stored]))
    return tmp_path


def test_seeds_of_one_recipe_and_hardware_become_one_point(results):
    points = {(point.name, point.hardware): point for point in script.points_of(results)}
    assert set(points) == {
        ("cifar10_fast", "2cores_epyc_zen4"),
        ("cifar10_fast", "h200"),
        ("cifar10_2p5pflop_h200", None),
        ("conv_vit", "h200"),
        ("theirs", None),
    }
    seeds = points["cifar10_fast", "2cores_epyc_zen4"]
    assert sorted(seeds.top1s) == [0.85, 0.86, 0.90]
    assert seeds.top1 == pytest.approx(0.87)
    assert seeds.pflops == 0.5
    assert len(seeds.sources) == 3
    assert points["cifar10_fast", "h200"].top1s == [0.87]


def test_the_kind_is_told_by_the_recipe(results):
    kinds = {point.name: point.kind for point in script.points_of(results)}
    assert kinds["conv_vit"] == "hybrid"
    assert kinds["cifar10_fast"] == "plain ViT"
    assert kinds["theirs"] == "convolutional"


def test_a_pass_without_gradients_costs_a_third(results):
    (theirs,) = script.stored_points(results / script.STORED)
    assert theirs.pflops == pytest.approx(6 + 2)
    assert "6 x 1000 M x 1 M images + 2 x 1000 M x 1 M images" in theirs.how


def test_the_same_seed_twice_is_refused(results):
    write_result(results, "cifar10_fast_v2_seed0_h200_2026-12-02", pflops=0.5, test_top1=0.88)
    with pytest.raises(DataError, match=r"2026-12-02.*2026-12-01.*same seed"):
        script.points_of(results)


def test_the_command_draws_and_prints(results, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["accuracy_per_compute.py", "--results", str(results)])
    script.main()
    lines = capsys.readouterr().out.splitlines()
    # The cheapest first
    assert [line.split("|")[4].strip() for line in lines[2:]] == ["0.5", "0.5", "0.7", "2.5", "8"]
    assert sum("| 87.00 % (85.00 % to 90.00 %) |" in line for line in lines) == 1
    assert (results / "cifar10_accuracy_per_compute.png").stat().st_size > 10_000


def test_a_folder_without_the_stored_points_is_named(tmp_path):
    with pytest.raises(DataError, match=script.STORED):
        script.points_of(tmp_path)


def overlapping(boxes):
    return [pair for pair in combinations(boxes, 2) if Bbox.intersection(*pair)]


def test_labels_of_close_points_do_not_overlap():
    figure, axis = script.plt.subplots()
    axis.set(xlim=(0, 1), ylim=(0, 1))
    # Closer than a line of text is high, and two at the borders
    where = [(0.5, 0.5), (0.51, 0.5), (0.5, 0.52), (0.53, 0.49), (0.99, 0.99), (0.01, 0.01)]
    boxes = [Bbox([place, place]).padded(4) for place in axis.transData.transform(where)]
    placed = place_labels(axis, [("a label of a point", *place) for place in where], boxes)
    assert len(placed) == len(where)
    assert overlapping(placed) == []
    assert not any(Bbox.intersection(label, box) for label in placed for box in boxes)
    assert all(axis.bbox.x0 <= label.x0 and label.x1 <= axis.bbox.x1 for label in placed)
    script.plt.close(figure)


def test_the_page_has_the_table_of_the_results():
    """After new results: run the script, and put what it prints into benchmarks/README.md."""
    page = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert script.table_of(script.points_of(script.RESULTS)) in page


def transformer_macs(model: dict) -> int:
    """Count by hand: the multiply-adds of a ViT whose heads together are as wide as its tokens."""
    D, patches = model["hidden_size"], (model["image_size"] // model["patch_size"]) ** 2
    N = patches + model["cls_token"]
    embedding = patches * 3 * model["patch_size"] ** 2 * D
    # Query, key, value and projection; logits and weighted sums; the MLP
    block = 4 * N * D * D + 2 * N * N * D + 2 * N * D * model["mlp_size"]
    return embedding + model["num_layers"] * block + 10 * D


@pytest.mark.parametrize(("name", "one_pass"), TRANSFORMERS)
def test_stored_multiply_adds_of_transformers(name, one_pass):
    model = dict(one_pass["model"])
    assert one_pass["multiply_adds"] == transformer_macs(model)

    # The same network, as this project builds it
    model["mlp_ratio"] = model.pop("mlp_size") / model["hidden_size"]
    pooling = {"global_pool": "cls" if model["cls_token"] else "mean"}
    with torch.device("meta"):
        built = VisionTransformer(num_classes=10, **model, **pooling)
    assert one_pass["multiply_adds"] == count_macs(built)


def whitened_groups(widths: list[int], convolutions_per_group: int) -> nn.Module:
    """Build the layers of cifar10-airbench that multiply, and its pooling.

    24 whitening filters of 2 x 2 px, then groups of 3 x 3 convolutions, pooled after the first one.
    """
    layers: list[nn.Module] = [nn.Conv2d(3, 24, 2)]
    channels = 24
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(width, width, 3, padding=1)] * (convolutions_per_group - 1)
        channels = width
    return nn.Sequential(*layers, nn.MaxPool2d(3), nn.Flatten(), nn.Linear(channels, 10))


def convolutional_macs(model: dict) -> int:
    """Count by hand: maps of 31, 15, 7 and 3 px."""
    widths, others = model["widths"], model["convolutions_per_group"] - 1
    total, channels, side = 31 * 31 * 24 * 3 * 2 * 2, 24, 31
    for width in widths:
        total += side**2 * 9 * channels * width
        channels, side = width, side // 2
        total += others * side**2 * 9 * width * width
    return total + 10 * channels


@pytest.mark.parametrize(("name", "one_pass"), CONVOLUTIONAL)
def test_stored_multiply_adds_of_convolutions(name, one_pass):
    model = one_pass["model"]
    with torch.device("meta"):
        images, built = torch.empty(1, 3, 32, 32), whitened_groups(**model)
    with FlopCounterMode(display=False) as counter:
        built(images)
    assert one_pass["multiply_adds"] == counter.get_total_flops() // 2 == convolutional_macs(model)


def test_stored_points_agree_with_what_was_published():
    """Published: 0.29 and 3.1 PFLOP. Ours, of before pflops was kept: 3,906 steps of 128 images."""
    points = {point.name: point for point in script.stored_points(script.RESULTS / script.STORED)}
    assert points["cifar10-airbench, 94 %"].pflops == pytest.approx(0.29, abs=0.007)
    assert points["cifar10-airbench, 96 %"].pflops == pytest.approx(3.1, abs=0.05)

    ours = points["cifar10_fast, first version"]
    result = json.loads((ROOT / "benchmarks" / ours.sources[0]).read_text(encoding="utf-8"))
    assert ours.top1s == [result["test_top1"]]
    (one_pass,) = STORED[0]["passes"]
    assert one_pass["images"] == result["steps"] * 128
