"""The metrics against scikit-learn and plain loops, the corruptions, and the page of a real run."""

import json
import math
import re
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_images, run
from scipy.optimize import minimize_scalar
from sklearn import metrics as sk
from sklearn.neighbors import KNeighborsClassifier

from evaluate import measure
from vit.checkpoints.file import read_checkpoint
from vit.config.config import Config, EvaluateConfig, Split
from vit.config.data import DataConfig
from vit.config.model import ModelConfig
from vit.config.train import TrainingConfig
from vit.data.preprocessing import Preprocessing
from vit.data.splits import ImageDataset, ImageSplit
from vit.errors import CheckpointError, ConfigError
from vit.evaluation.corruptions import SEVERITIES, corrupt
from vit.evaluation.measurements import (
    HeldOut,
    Measured,
    calibration,
    check_possible,
    measure_neighbours,
    record_outputs,
    small_pictures,
)
from vit.evaluation.metrics import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    confusion_matrix,
    fit_temperature,
    likelihood_slope,
    most_confused,
    nearest_neighbours,
    negative_log_likelihood,
    per_class,
    reliability,
    top_k,
)
from vit.evaluation.restore import RestoredModel
from vit.model.vision_transformer import VisionTransformer
from vit.report.drawings import LIGHT, draw_confusion, filter_components, position_similarity
from vit.report.page import read_rows, write_report
from vit.runtime.precision import Precision

CPU = torch.device("cpu")
SMALL = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_layers": 2, "num_heads": 2}


def sample(
    n: int = 2000, classes: int = 7, scale: float = 2.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels drawn from their softmax: calibrated at temperature 1."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=generator) * scale
    return logits, torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_scikit_learns():
    logits, labels = sample()
    labels[labels == 3] = 4  # a class without samples, which is still predicted
    predicted = logits.argmax(1)
    confusion = confusion_matrix(predicted, labels, 7)
    assert (confusion.numpy() == sk.confusion_matrix(labels, predicted, labels=range(7))).all()
    each = per_class(confusion)
    theirs = sk.precision_recall_fscore_support(labels, predicted, labels=range(7), zero_division=0)
    for ours, values in zip(
        (each.precision, each.recall, each.f1, each.support), theirs, strict=True
    ):
        assert torch.allclose(
            ours.double(), torch.as_tensor(values, dtype=torch.float64), atol=1e-12
        )
    present = [label for label in range(7) if label != 3]
    assert each.macro_f1() == pytest.approx(
        sk.f1_score(labels, predicted, labels=present, average="macro"), abs=1e-12
    )
    for k in (1, 3, 5):
        assert top_k(logits, labels, k) == pytest.approx(
            sk.top_k_accuracy_score(labels, logits, k=k, labels=range(7))
        )
    assert top_k(logits, labels, 50) == 1.0
    assert negative_log_likelihood(logits, labels) == pytest.approx(
        sk.log_loss(labels, logits.double().softmax(1).numpy(), labels=range(7)), rel=1e-12
    )
    assert negative_log_likelihood(logits, labels, 3.0) == pytest.approx(
        sk.log_loss(labels, (logits.double() / 3).softmax(1).numpy(), labels=range(7)), rel=1e-12
    )


def test_most_confused():
    confusion = torch.tensor([[9, 2, 0], [5, 1, 0], [0, 2, 3]])
    assert most_confused(confusion, 10) == [(1, 0, 5), (0, 1, 2), (2, 1, 2)]
    assert most_confused(confusion, 1) == [(1, 0, 5)]


@pytest.mark.parametrize(("n", "scale", "bins"), [(5000, 2.0, 15), (10, 0.1, 15), (777, 30.0, 4)])
def test_ece_is_that_of_a_plain_loop(n, scale, bins):
    logits, labels = sample(n, 5, scale)
    labels[::3] = 0
    total = 0.0
    chances = logits.double().softmax(1)
    for b in range(bins):
        inside = [i for i in range(n) if b / bins < max(chances[i].tolist()) <= (b + 1) / bins]
        if inside:
            right = sum(int(chances[i].argmax()) == int(labels[i]) for i in inside) / len(inside)
            confidence = sum(max(chances[i].tolist()) for i in inside) / len(inside)
            total += len(inside) / n * abs(right - confidence)
    found = reliability(logits, labels, bins)
    assert found.expected_calibration_error() == pytest.approx(total, abs=1e-9)
    assert found.count.sum() == n


@pytest.mark.parametrize("scale", [0.05, 0.5, 1.0, 3.0, 40.0])
def test_the_temperature_is_the_likelihoods_minimum(scale):
    """Calibrated logits times a number need that number as temperature; SciPy finds the same minimum."""
    logits, labels = sample(20000)
    temperature = fit_temperature(logits * scale, labels)
    assert temperature == pytest.approx(scale, rel=0.04)
    slope, _ = likelihood_slope(logits * scale, labels, 1 / temperature)
    assert abs(slope / scale) < 1e-8
    found = minimize_scalar(
        lambda beta: negative_log_likelihood(logits, labels, 1 / beta), (0.5, 1.5)
    )
    assert temperature == pytest.approx(scale / found.x, rel=1e-4)


def test_a_temperature_without_minimum_stays_finite():
    logits = torch.eye(4) * 3
    assert MIN_TEMPERATURE <= fit_temperature(logits, torch.arange(4)) < 0.1
    assert fit_temperature(logits, torch.tensor([1, 2, 3, 0])) == pytest.approx(
        MAX_TEMPERATURE, rel=1e-3
    )
    assert fit_temperature(torch.zeros(4, 4), torch.arange(4)) == 1.0


def test_neighbours_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(500, 6, generator=generator), torch.arange(500) % 4
    features = torch.randn(300, 6, generator=generator)
    theirs = KNeighborsClassifier(
        20, metric="cosine", weights=lambda far: torch.tensor(-far / 0.07).exp().numpy()
    )
    theirs = theirs.fit(bank, labels).predict(features)
    assert (nearest_neighbours(features, bank, labels, 4).numpy() == theirs).all()
    assert nearest_neighbours(features[:1], features[:1], torch.tensor([2]), 4).tolist() == [
        2
    ]  # a bank of one


# --- corruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SEVERITIES)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 20, 12)])
def test_corruptions_rise_and_repeat(kind, shape):
    generator = torch.Generator().manual_seed(0)
    smooth = torch.nn.functional.interpolate(
        torch.rand(300, shape[0], 5, 5, generator=generator), shape[1:], mode="bicubic"
    )
    pixels = (smooth.clamp(0, 1) * 200 + 20).to(torch.uint8)
    worse = [corrupt(pixels, kind, severity) for severity in range(1, 6)]
    errors = [(each.float() - pixels.float()).square().mean().sqrt().item() for each in worse]
    assert all(each.shape == pixels.shape and each.dtype == torch.uint8 for each in worse)
    assert errors[0] < errors[-1]
    assert shape[1] < 32 or all(after > 0.95 * before for before, after in pairwise(errors))
    assert torch.equal(corrupt(pixels, kind, 3), worse[2])
    assert torch.equal(corrupt(pixels[:256], kind, 3), worse[2][:256])


def test_blurs_keep_a_flat_picture():
    flat = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    for kind in ("gaussian blur", "defocus blur", "motion blur", "pixelate"):
        assert torch.equal(corrupt(flat, kind, 5), flat)


# --- the page --------------------------------------------------------------------------------------------------------


def restored(classes: list[str], count: int, **changes) -> RestoredModel:
    """An untrained model on noise, count images a split."""
    torch.manual_seed(0)
    model = VisionTransformer(num_classes=len(classes), **{**SMALL, **changes}).eval()
    patches = model.embeddings.patch_embedding
    model.preprocessing = Preprocessing(
        patches.image_size, patches.num_channels, (0.5,), (0.25,), None, "bilinear"
    )
    splits = [
        ImageSplit(
            f"noise {name}",
            torch.arange(count) % len(classes),
            torch.randint(
                0, 256, (count, patches.num_channels, *patches.image_size), dtype=torch.uint8
            ),
        )
        for name in ("train", "val", "test")
    ]
    config = Config(
        model=ModelConfig(name="tiny"), data=DataConfig(), train=TrainingConfig(batch_size=64)
    )
    return RestoredModel(
        model, {"classes": classes}, config, ImageDataset(classes, *splits), Precision("fp32", CPU)
    )


def write(
    folder: Path,
    held: RestoredModel,
    logits: torch.Tensor,
    held_out: bool = True,
    run: Path | None = None,
) -> str:
    images = held.data.test
    fitted = HeldOut(logits.flip(0), images.labels.flip(0), images, False) if held_out else None
    found = {
        "split": "test",
        "images_per_second": 1.0,
        "top1": top_k(logits, images.labels, 1),
        "top5": top_k(logits, images.labels, 5),
        **calibration(logits, images.labels, fitted, Path("x")),
    }
    folder.mkdir()
    page = write_report(
        folder, Measured(Path("x.safetensors"), run, held, images, logits, fitted, found)
    )
    return page.read_text()


def check_self_contained(text: str) -> None:
    """No reference leaves the page: every address is data, no script, no link, no import, and all tags are closed."""
    assert not re.search(
        r"https?:|//[a-z]|<script|<link|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    )
    addresses = re.findall(r"(?:src|srcset|href)\s*=\s*['\"]?([^'\" >]{0,40})", text)
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    for tag in ("div", "table", "figure", "picture", "details", "p"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_a_thousand_classes_take_seconds(tmp_path):
    held = restored([f"class & <{label}>" for label in range(1000)], 2000)
    logits = torch.randn(2000, 1000) + 6 * torch.nn.functional.one_hot(held.data.test.labels, 1000)
    began = time.process_time()
    text = write(tmp_path / "report", held, logits)
    assert time.process_time() - began < 15
    check_self_contained(text)
    assert "class &amp; &lt;999&gt;" in text
    assert "<999>" not in text
    assert len(text) < 8e6


@pytest.mark.parametrize(("classes", "cells"), [(3, 3), (250, 250), (601, 201)])
def test_no_sample_is_lost_where_classes_share_a_cell(classes, cells):
    confusion = torch.eye(classes, dtype=torch.long) * 3
    confusion[-1, 0] = 1
    drawn = (
        draw_confusion(LIGHT, confusion, [str(label) for label in range(classes)])
        .axes[0]
        .images[0]
        .get_array()
    )
    assert drawn.shape == (cells, cells)
    assert drawn[-1, 0] == pytest.approx(0.25)
    assert drawn.sum() == pytest.approx(cells)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"global_pool": "mean", "cls_token": False, "position": "rope2d", "num_channels": 1},
            "positions of this model are not",
        ),
        ({"num_registers": 2, "image_size": [8, 16], "patch_size": [4, 8]}, "place, from"),
        (
            {"image_size": 32, "patch_size": 16, "resnet_stages": [1, 1], "position": "none"},
            "this is a hybrid",
        ),
    ],
    ids=["mean_rope_grey", "registers_rectangle", "hybrid"],
)
def test_pages_of_other_models(tmp_path, changes, said):
    held = restored(["a$b$", "猫"], 20, **changes)
    with record_outputs(held.model, logits=True, features=False) as record:
        held.measure(held.model, "test", 0)
    assert not record.feature_batches
    text = write(tmp_path / "report", held, record.logits, held_out=False)
    check_self_contained(text)
    assert said in text
    assert "No temperature was fitted" in text
    assert "猫" in text


def test_a_faultless_model_and_one_image(tmp_path):
    held = restored(["a", "b", "c"], 1)
    text = write(tmp_path / "report", held, torch.tensor([[5.0, 0.0, 0.0]]))
    assert "None." in text  # no mistakes
    check_self_contained(text)


def test_logits_that_are_not_finite_are_told():
    with pytest.raises(CheckpointError, match="not finite"):
        calibration(
            torch.tensor([[math.nan, 0.0]]), torch.tensor([0]), None, Path("best.safetensors")
        )


def test_the_record_is_the_models_outputs_in_order():
    held = restored(["a", "b"], 150)
    with record_outputs(held.model, logits=True, features=True) as record:
        measured = held.measure(held.model, "test", 0)
    inputs = held.model.preprocessing.to_input(held.data.test.pixels)
    with torch.no_grad():
        trace = held.model.trace(inputs)
    assert torch.allclose(record.logits, trace.logits, atol=1e-5)
    assert torch.allclose(record.features, trace.pooled, atol=1e-5)
    assert top_k(record.logits, held.data.test.labels, 1) == measured["top1"]
    assert not held.model._forward_hooks
    assert not held.model.head._forward_pre_hooks
    same = restored(["a", "b"], 150)
    with record_outputs(same.model, logits=False, features=True) as bank:
        same.measure(same.model, "train", 0)
    assert (
        measure_neighbours(same, bank.features, same.data.train.labels, 0)["knn_top1"] > 0.6
    )  # each finds itself


def test_filters_and_positions():
    weight = torch.zeros(6, 3, 4, 4)
    weight[:3, 0, 1, 2], weight[3:, 0, 1, 2] = 2.0, -2.0  # one direction alone
    first = filter_components(weight, 5)[0]
    assert first[0, 1, 2] == pytest.approx(1.0)
    assert first[1, 0, 0] == pytest.approx(0.5)
    similarity = position_similarity(torch.eye(6), (2, 3))
    assert similarity.shape == (2, 3, 2, 3)
    assert similarity[1, 2, 1, 2] == 1
    assert similarity.sum() == 6


def test_half_a_line_of_metrics_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": 2.0}\n[1]\n{"step": 2, "spl'
    )
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
    (tmp_path / "result.json").write_text("[")
    held = restored(["a", "b"], 4)
    assert "learning curves" in write(tmp_path / "report", held, torch.randn(4, 2), run=tmp_path)


# --- the command -----------------------------------------------------------------------------------------------------


def told(done) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_a_real_run(digits_run, tmp_path):
    folder, _ = digits_run
    checkpoint = f"checkpoint={folder}/checkpoints/best.safetensors"
    done = run(
        "evaluate.py",
        checkpoint,
        "report=true",
        "knn=true",
        "corruptions=true",
        "out=out",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    result = json.loads((folder / "result.json").read_text())
    assert (found["top1"], found["loss"]) == (
        result["test_top1"],
        result["test_loss"],
    )  # as without these options
    assert found["nll"] == pytest.approx(found["loss"], rel=1e-6)
    assert 0 < found["ece"] < 1
    assert found["nll_at_temperature"] < found["nll"] + 0.05
    assert found["knn_top1"] > 0.8
    assert set(found["corruptions"]) == set(SEVERITIES)
    assert 0.1 < found["corruptions_top1"] < found["top1"] + 0.02
    text = (tmp_path / "out" / "report" / "index.html").read_text()
    check_self_contained(text)
    for part in (
        "Confusion",
        "Calibration",
        "Corruptions",
        "Most confident mistakes",
        "Least confident hits",
        "Attention",
        "Patch filters",
        "place, from",
        "learning curves",
        "training speed",
        "optimizer.lr",
        "20-NN",
    ):
        assert part in text
    names = {path.name for path in (tmp_path / "out" / "report").iterdir()}
    assert {
        "confusion.png",
        "confusion_dark.png",
        "calibration.png",
        "curves.png",
        "filters.png",
        "positions.png",
    } <= names
    assert f"report: {Path('out') / 'report' / 'index.html'}" in done.stdout


def test_weights_without_a_run_and_the_validation_split(digits_run, tmp_path):
    path = digits_run[0] / "checkpoints" / "best.safetensors"
    data = read_checkpoint(path)[1]["config"]["data"] | {"limit": 20}
    told = measure(
        EvaluateConfig(
            pretrained=str(path), data=data, split=Split.val, report=True, out=str(tmp_path)
        ),
        [],
    )
    assert "report_val" in told
    text = (tmp_path / "report_val" / "index.html").read_text()
    for part in ("came without one", "no metrics.jsonl", "these figures flatter"):
        assert part in text


def test_a_folder_that_cannot_be_written_is_told_before_the_work(digits_run, tmp_path):
    (tmp_path / "file").write_text("")
    checkpoint = str(digits_run[0] / "checkpoints" / "best.safetensors")
    with pytest.raises(
        ConfigError,
        match=r"file/report: can't write there \(Not a directory\); choose .* out=FOLDER$",
    ):
        measure(EvaluateConfig(checkpoint=checkpoint, report=True, out=str(tmp_path / "file")), [])


def test_what_cannot_be_measured_is_told():
    held = restored(["a", "b"], 4)
    check_possible(held, held.data.test, "test", knn=True, corruptions=True)
    with pytest.raises(ConfigError, match="would find itself"):
        check_possible(held, held.data.train, "train", knn=True, corruptions=False)
    held = restored(["a", "b"], 4, image_size=72, patch_size=24)
    with pytest.raises(ConfigError, match=r"at most 64 px.* 72 x 72 px"):
        check_possible(held, held.data.test, "test", knn=False, corruptions=True)
    files = ImageSplit("files", torch.arange(2), paths=np.array([b"a.jpg", b"b.jpg"]))
    with pytest.raises(ConfigError, match="72 x 72 px"):
        check_possible(held, files, "test", knn=False, corruptions=True)


def test_pictures_from_files_are_corrupted_as_the_model_sees_them(tmp_path):
    make_images(tmp_path, {"test": 2})
    held = restored(["cat", "dog"], 4, image_size=16)
    paths = sorted((tmp_path / "test").rglob("*.jpg"))
    files = ImageSplit(
        "files", torch.tensor([0, 0, 1, 1]), paths=np.array([str(path).encode() for path in paths])
    )
    small = small_pictures(held, files, 0)
    assert small.pixels.shape == (4, 3, 16, 16)
    inputs = torch.stack([held.model.preprocessing(path) for path in paths])
    assert torch.allclose(held.model.preprocessing.to_input(small.pixels), inputs, atol=1e-6)
