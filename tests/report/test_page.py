"""The page about a model: complete, self-contained and escaped, whatever the model."""

import re
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from noise_models import measured_model, restored_model

from vit.data.splits import ImageDataset
from vit.evaluation.measurements import MeasuredModel, measure_calibration, record_outputs
from vit.evaluation.restore import RestoredModel
from vit.report.page import write_report
from vit.report.sections import read_metrics


def write_page(
    folder: Path, restored: RestoredModel, logits: torch.Tensor, run: Path | None = None
) -> str:
    """The page's text for a model that computes these logits."""
    model = measured_model(restored)
    model.outputs.logit_batches.append(logits)
    correct = logits.argmax(dim=1) == restored.data.test.labels
    numbers, _ = measure_calibration(model)
    numbers |= {
        "split": "test",
        "images_per_second": 1.0,
        "top1": correct.double().mean().item(),
        "top5": 1.0,
        "balanced_top1": 0.5,
        "macro_f1": 0.4,
    }
    folder.mkdir()
    return write_report(folder, model, numbers, run).read_text()


def check_self_contained(text: str) -> None:
    """No reference leaves the page, and all tags are closed.

    Every address is data; there is no script, link or import.
    """
    without_data = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(", without_data)
    addresses = re.findall(r"(?:src|srcset|href)\s*=\s*['\"]?([^'\" >]{0,40})", text)
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    for tag in ("div", "table", "tbody", "tr", "td", "figure", "picture", "details", "p"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>"), tag


def test_a_thousand_classes_take_seconds(tmp_path):
    names = [f"class & <{label}>" for label in range(1000)]
    restored = restored_model(names, 2000)
    logits = torch.randn(2000, 1000) + 6 * F.one_hot(restored.data.test.labels, 1000)
    start = time.process_time()
    text = write_page(tmp_path / "report", restored, logits)
    assert time.process_time() - start < 15
    check_self_contained(text)
    assert "class &amp; &lt;999&gt;" in text
    assert "<999>" not in text
    assert len(text) < 8e6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"global_pool": "mean", "cls_token": False, "position": "rope2d", "num_channels": 1},
            "positions of this model are not",
        ),
        ({"num_registers": 2, "image_size": [8, 16], "patch_size": [4, 8]}, "place, from"),
        ({"conv_stem": [16, 16], "patch_size": 4}, "first convolution's filters"),
        ({"global_pool": "cls_mean"}, "the class token looks"),
        (
            {"image_size": 32, "patch_size": 16, "resnet_stages": [1, 1], "position": "none"},
            "this is a hybrid",
        ),
    ],
    ids=["mean_rope_gray", "registers_rectangle", "conv_stem", "cls_mean", "hybrid"],
)
def test_pages_of_other_models(tmp_path, changes, sentence):
    restored = restored_model(["a$b$", "猫"], 20, **changes)
    data = restored.data
    object.__setattr__(restored, "data", ImageDataset(data.classes, data.train, None, data.test))
    with record_outputs(restored.model, logits=True) as record:
        restored.measure(restored.model, "test", workers=0, counted=record.keep)
    text = write_page(tmp_path / "report", restored, record.logits)
    check_self_contained(text)
    assert sentence in text
    assert "No temperature was fitted" in text
    assert "猫" in text


def test_a_faultless_model_and_one_image(tmp_path):
    restored = restored_model(["a", "b", "c"], 1)
    text = write_page(tmp_path / "report", restored, torch.tensor([[5.0, 0.0, 0.0]]))
    assert "None." in text  # no mistakes
    check_self_contained(text)


def test_only_what_was_measured_is_shown(tmp_path):
    restored = restored_model(["a", "b"], 8)
    text = write_page(tmp_path / "report", restored, torch.randn(8, 2))
    assert "<h2>Calibration</h2>" in text
    assert "<h2>Corruptions</h2>" not in text
    assert "-NN top-1" not in text


def test_half_a_line_of_metrics_is_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": 2.0}\n[1]\n{"split": "val"}\n{"step": 2, "spl'
    )
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    (tmp_path / "result.json").write_text("[")
    restored = restored_model(["a", "b"], 4)
    text = write_page(tmp_path / "report", restored, torch.randn(4, 2), run=tmp_path)
    assert 'alt="learning curves"' in text


def test_the_page_is_about_the_split_that_was_measured(tmp_path):
    restored = restored_model(["a", "b"], 8)
    model = MeasuredModel(Path("x.safetensors"), restored, "val", workers=0)
    model.outputs.logit_batches.append(torch.randn(8, 2))
    numbers, _ = measure_calibration(model)
    numbers |= {"top1": 0.5, "balanced_top1": 0.5, "macro_f1": 0.4, "images_per_second": 1.0}
    text = write_report(tmp_path, model, numbers, None).read_text()
    assert "Measured on noise val, 8 images" in text
    assert "these figures flatter" in text
