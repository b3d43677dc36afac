"""A model is judged on other images than those of its run, and never on its training images."""

import json

import pyarrow as pa
import pytest
import torch
from helpers import make_images
from hydra import compose, initialize_config_dir
from judged_models import lose_workers, write_best, write_classes, write_noise
from pyarrow import parquet

from evaluate import check_source, measure
from vit.checkpoints.file import read_checkpoint, write_checkpoint
from vit.config.command_line import prepare_arguments
from vit.config.config import CONF, from_composed, register
from vit.config.resume import command_line_changes
from vit.config.settings import check_settings
from vit.data.class_folders import imagenet_wnids, readable_names
from vit.errors import CheckpointError, ConfigError, DataError

CLASSES = ["cat", "dog", "fox"]
WNIDS = list(imagenet_wnids())


@pytest.fixture
def evaluate(tmp_path):
    """`evaluate.py …`: what it writes to evaluation.json, with the line on the screen as "line"."""

    def run(*overrides: str, workers: int = 0) -> dict:
        own = [f"runtime.workers={workers}", "runtime.threads=1", f"out={tmp_path}/out"]
        arguments = [*overrides, *own]
        prepared = prepare_arguments(arguments)
        register()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("evaluate", prepared)
        settings = from_composed(composed)
        changes = command_line_changes(composed, prepared)
        check_settings(settings)
        check_source(settings, changes)
        line = measure(settings, changes)
        return {**json.loads((tmp_path / "out" / "evaluation.json").read_text()), "line": line}

    return run


@pytest.fixture
def run_on_files(tmp_path):
    """checkpoint=… of a run on tmp_path/pets, which holds class folders alone."""
    write_classes(tmp_path / "pets", CLASSES, count=20)
    path = tmp_path / "run" / "checkpoints" / "best.safetensors"
    write_best(path, CLASSES, "data=folder", f"data.root={tmp_path / 'pets'}")
    return f"checkpoint={path}"


def test_numbers_of_another_protocol_are_not_replaced_in_silence(evaluate, run_on_files):
    assert "another protocol" not in evaluate(run_on_files)["line"]
    # The same again loses nothing
    assert "another protocol" not in evaluate(run_on_files)["line"]
    line = evaluate(run_on_files, "views=mirrored")["line"]
    assert "numbers of another protocol were there (one view); out=FOLDER keeps both" in line
    assert "protocol were there (2 views (the image and" in evaluate(run_on_files)["line"]


def test_another_folder_is_taken_whole(tmp_path, evaluate, run_on_files):
    write_classes(tmp_path / "others", ["fox", "cat"], count=5)
    numbers = evaluate(run_on_files, "data=folder", f"data.root={tmp_path / 'others'}")
    assert numbers["n"] == 10
    protocol = numbers["protocol"]
    assert protocol["images"] == "others taken whole"
    assert protocol["classes"] == "all of the model's 3 classes compete"
    assert protocol["classes_without_images"] == ["dog"]
    assert protocol["input"] == "shorter side to 18 px (bicubic), crop 16x16 px"
    for words in (
        "others taken whole",
        "1 of the model's have no image (dog)",
        "one view",
        "18 px",
    ):
        assert words in numbers["line"]
    # The labels are the model's, not the folder's
    whole = write_classes(tmp_path / "both", ["cat"], count=5)
    cats = evaluate(run_on_files, "data=folder", f"data.root={whole}")
    assert cats["protocol"]["classes_without_images"] == ["dog", "fox"]
    limited = evaluate(
        run_on_files, "data=folder", f"data.root={tmp_path / 'others'}", "data.limit=4"
    )
    assert limited["n"] == 4


def test_the_runs_own_folder_gives_the_runs_own_cut(tmp_path, evaluate, run_on_files):
    own = evaluate(run_on_files)
    assert own["n"] == 6
    assert own["protocol"]["images"] == "the run's own cut"
    assert own["data"] == "pets (a part of it), used as test, 6 images"
    again = evaluate(run_on_files, "data=folder", f"data.root={tmp_path / 'pets'}")
    assert same(again, own)
    assert same(evaluate(run_on_files, "data=folder"), own)
    # Where it has moved it is known by the checksum of its training images
    (tmp_path / "pets").rename(tmp_path / "moved")
    moved = evaluate(run_on_files, "data=folder", f"data.root={tmp_path / 'moved'}")
    assert (moved["n"], moved["loss"]) == (own["n"], own["loss"])
    assert moved["protocol"] == own["protocol"]


def same(first, second):
    ignored = ("images_per_second", "line")
    return all(first[key] == second[key] for key in first if key not in ignored)


def test_training_images_are_never_measured_as_test(tmp_path, evaluate):
    make_images(tmp_path / "pets", {"train": 10, "test": 3}, tuple(CLASSES))
    path = tmp_path / "best.safetensors"
    write_best(path, CLASSES, "data=folder", f"data.root={tmp_path / 'pets'}")
    checkpoint = f"checkpoint={path}"
    with pytest.raises(DataError, match=r"27 of these 30 images are training images of the run"):
        evaluate(checkpoint, "data=folder", f"data.root={tmp_path / 'pets' / 'train'}")
    # By another way to the same files too
    (tmp_path / "link").symlink_to(tmp_path / "pets" / "train")
    with pytest.raises(DataError, match=r"27 of these 30 images"):
        evaluate(checkpoint, "data=folder", f"data.root={tmp_path / 'link'}")
    test = evaluate(checkpoint, "data=folder", f"data.root={tmp_path / 'pets' / 'test'}")
    assert test["n"] == 9
    assert test["loss"] == pytest.approx(evaluate(checkpoint)["loss"], rel=1e-6)
    # Nor where it can't be known any more which images these were
    (tmp_path / "pets" / "test" / "fox").rename(tmp_path / "pets" / "test" / "wolf")
    with pytest.raises(DataError, match=r"may hold training images of the run, .* not as it was"):
        evaluate(checkpoint, "data=folder", f"data.root={tmp_path / 'pets' / 'train'}")


def test_training_images_are_known_behind_tables(tmp_path, evaluate, capsys):
    # As the images of a table may lie anywhere, they are compared with those of any folder
    root = write_classes(tmp_path / "images", CLASSES, count=20)
    table = write_table(tmp_path / "tables" / "pets.csv", root)
    path = tmp_path / "best.safetensors"
    write_best(path, CLASSES, "data=folder", f"data.root={table}")
    checkpoint = (f"checkpoint={path}", "data=folder")
    with pytest.raises(DataError, match="48 of these 60 images are training images of the run"):
        evaluate(*checkpoint, f"data.root={root}")
    others = write_classes(tmp_path / "others", CLASSES, count=5)
    assert evaluate(*checkpoint, f"data.root={others}")["n"] == 15
    assert "warning" not in capsys.readouterr().out

    # Nor are they known any more where the table is not as it was
    (root / "cat" / "0.png").unlink()
    assert evaluate(*checkpoint, f"data.root={others}")["n"] == 15
    assert "warning: training images of the run can't be told" in capsys.readouterr().out
    table.rename(tmp_path / "images" / "pets.csv")
    write_best(path, CLASSES, "data=folder", f"data.root={root / 'pets.csv'}")
    with pytest.raises(DataError, match=r"may hold training images of the run, .* not as it was"):
        evaluate(*checkpoint, f"data.root={root}")


@pytest.mark.parametrize("linked", ["folders", "files"])
def test_training_images_are_known_behind_links(tmp_path, evaluate, linked):
    store = write_classes(tmp_path / "store", CLASSES, count=20)
    for root, classes in (("own", CLASSES), ("others", ["cat", "dog"])):
        for name in classes:
            link(tmp_path / root / name, store / name, linked)
    path = tmp_path / "best.safetensors"
    write_best(path, CLASSES, "data=folder", f"data.root={tmp_path / 'own'}")
    with pytest.raises(DataError, match="32 of these 40 images are training images of the run"):
        evaluate(f"checkpoint={path}", "data=folder", f"data.root={tmp_path / 'others'}")


def link(folder, target, linked):
    """Make a folder a link to the target, or each file in it a link of another name."""
    if linked == "folders":
        folder.parent.mkdir(exist_ok=True)
        folder.symlink_to(target)
        return
    folder.mkdir(parents=True)
    for number, image in enumerate(sorted(target.iterdir())):
        (folder / f"{folder.parent.name}_{number}.png").symlink_to(image)


def test_mistakes_end_in_one_line(tmp_path, evaluate, run_on_files):
    write_classes(tmp_path / "others", ["cat", "wolf"])
    folder = ("data=folder", f"data.root={tmp_path / 'others'}")
    with pytest.raises(DataError, match="1 of its 2 classes are not among the model's 3: wolf"):
        evaluate(run_on_files, *folder)
    (tmp_path / "others" / "wolf").rename(tmp_path / "others" / "dog")
    with pytest.raises(ConfigError, match=r"data\.test_fraction does nothing here"):
        evaluate(run_on_files, *folder, "data.test_fraction=0.5")
    with pytest.raises(ConfigError, match=r"data\.mean=… does nothing beside checkpoint"):
        evaluate(run_on_files, *folder, "data.mean=[0.1]")
    with pytest.raises(DataError, match="split=train: others is for tests alone; use split=test"):
        evaluate(run_on_files, *folder, "split=train")
    with pytest.raises(ConfigError, match="brings no training images"):
        evaluate(run_on_files, *folder, "knn=true")
    with pytest.raises(DataError, match="nowhere: no such folder"):
        evaluate(run_on_files, "data=folder", f"data.root={tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match=r"data=digits: .*10 classes are not among the model's 3"):
        evaluate(run_on_files, "data=digits")
    with pytest.raises(DataError, match="data=imagenet_a is for models of ImageNet's"):
        evaluate(run_on_files, "data=imagenet_a", f"data.root={tmp_path / 'others'}")


def test_a_lost_worker_ends_in_one_line(evaluate, run_on_files, monkeypatch):
    lose_workers(monkeypatch)
    with pytest.raises(ConfigError, match=r"runtime\.workers: a process that decodes images died"):
        evaluate(run_on_files, workers=1)


def test_a_report_of_a_subset(tmp_path, evaluate, run_on_files):
    write_classes(tmp_path / "others", ["fox", "cat"], count=5)
    folder = ("data=folder", f"data.root={tmp_path / 'others'}")
    numbers = evaluate(run_on_files, *folder, "report=true", "views=mirrored")
    assert numbers["temperature"] is None
    assert 0 <= numbers["macro_f1"] <= 1
    page = (tmp_path / "out" / "report" / "index.html").read_text()
    assert "others taken whole" in page
    assert "2 views" in page


def test_no_mirrored_views_of_what_mirroring_changes(tmp_path, evaluate, run_on_files):
    others = write_classes(tmp_path / "others", CLASSES)
    folder = ("data=folder", f"data.root={others}", "views=mirrored")
    evaluate(run_on_files, *folder)
    # The group's file says otherwise than the run did
    path = tmp_path / "glyphs.safetensors"
    write_best(path, CLASSES, "data=folder", f"data.root={tmp_path / 'pets'}", "data.mirror=false")
    with pytest.raises(ConfigError, match=r"views=mirrored does not go with data\.mirror=false"):
        evaluate(f"checkpoint={path}", *folder)
    # And the other way round
    path = tmp_path / "ten.safetensors"
    write_best(path, [str(digit) for digit in range(10)], "data=imagenet")
    with pytest.raises(ConfigError, match=r"views=mirrored does not go with data\.mirror=false"):
        evaluate(f"checkpoint={path}", "data=digits", "views=mirrored")


def test_a_model_of_imagenet(tmp_path, evaluate):
    path = tmp_path / "best.safetensors"
    model = write_best(path, readable_names(WNIDS), "data=imagenet")
    checkpoint = f"checkpoint={path}"
    names = [WNIDS[900], WNIDS[3], WNIDS[77]]
    root = write_classes(tmp_path / "imagenet-a", names, count=4)
    folder = evaluate(checkpoint, "data=folder", f"data.root={root}")
    restricted = evaluate(checkpoint, "data=imagenet_a", f"data.root={root}")
    assert folder["n"] == restricted["n"] == 12
    assert restricted["protocol"]["classes"] == "3 of the model's 1,000 classes compete"
    assert folder["protocol"]["classes"] == "all of the model's 1,000 classes compete"

    # By hand: the best of the three classes alone
    indices = torch.tensor([3, 77, 900])
    paths = [root / WNIDS[index] / f"{number}.png" for index in indices for number in range(4)]
    with torch.no_grad():
        logits = model(torch.stack([model.preprocessing(path) for path in paths]))
    labels = torch.arange(3).repeat_interleave(4)
    loss = torch.nn.functional.cross_entropy(logits[:, indices], labels)
    assert restricted["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert restricted["top1"] == (logits[:, indices].argmax(1) == labels).double().mean().item()
    assert restricted["top1"] > folder["top1"]


def test_another_resolution(tmp_path, evaluate, run_on_files):
    write_classes(tmp_path / "others", CLASSES)
    folder = ("data=folder", f"data.root={tmp_path / 'others'}")
    large = evaluate(run_on_files, *folder, "model.image_size=24", "data.eval_crop=1.0")
    assert large["protocol"]["input"] == "shorter side to 24 px (bicubic), crop 24x24 px"
    assert large["loss"] != evaluate(run_on_files, *folder)["loss"]
    # Of the run's own images too
    own = evaluate(run_on_files, "model.image_size=24")
    assert own["protocol"]["input"] == "shorter side to 27 px (bicubic), crop 24x24 px"
    with pytest.raises(ConfigError, match=r"model\.image_size=18: patch_size 4x4 does not divide"):
        evaluate(run_on_files, "model.image_size=18")
    with pytest.raises(ConfigError, match=r"model\.image_size=big: image_size must be"):
        evaluate(run_on_files, "model.image_size=big")


def test_named_classes_of_weights_are_never_matched_by_position(tmp_path, evaluate):
    make_images(tmp_path / "pets", {"train": 4})
    make_images(tmp_path / "pets" / "test", {"cat": 1, "dog": 4}, ("",))
    path = tmp_path / "best.safetensors"
    write_best(path, ["dog", "cat"], "data=imagenet")
    always_predict(path, 0)
    weights = f"pretrained={path}"
    # Four of five are dogs, the second folder and the first output
    folder = evaluate(weights, "data=folder", f"data.root={tmp_path / 'pets'}")
    assert (folder["n"], folder["top1"]) == (5, 0.8)

    lines = ["path,label,split"]
    for image in sorted((tmp_path / "pets").glob("*/*/*.jpg")):
        lines.append(f"{image},{image.parent.name},{image.parent.parent.name}")
    (tmp_path / "pets.csv").write_text("\n".join(lines))
    table = evaluate(weights, "data=folder", f"data.root={tmp_path / 'pets.csv'}")
    assert (table["n"], table["top1"]) == (5, 0.8)


def always_predict(path, output):
    """Make the model of a checkpoint predict this output for every image."""
    tensors, header = read_checkpoint(path)
    tensors["head.weight"] = torch.zeros_like(tensors["head.weight"])
    tensors["head.bias"] = torch.arange(len(tensors["head.bias"])).eq(output).float()
    write_checkpoint(path, tensors, header)


def test_the_splits_of_parquet_files(tmp_path, evaluate):
    root = tmp_path / "hub"
    write_parquet(root / "data" / "train-00000-of-00001.parquet", ["cat", "dog"] * 10)
    write_parquet(root / "data" / "test-00000-of-00001.parquet", ["dog", "dog", "cat", "dog"])
    path = tmp_path / "best.safetensors"
    write_best(path, ["dog", "cat"], "data=imagenet")
    always_predict(path, 0)
    folder = ("data=folder", f"data.root={root}")
    numbers = evaluate(f"pretrained={path}", *folder)
    assert (numbers["n"], numbers["top1"]) == (4, 0.75)
    with pytest.raises(DataError, match=r"not the run's own data set, .* no table and no parquet"):
        evaluate(f"checkpoint={path}", *folder)


def write_parquet(path, labels):
    """Write a parquet file of one image for each label."""
    write_noise(path.with_name("image.png"), 0)
    image = path.with_name("image.png").read_bytes()
    path.with_name("image.png").unlink()
    parquet.write_table(pa.table({"image": [image] * len(labels), "label": labels}), path)


def test_the_runs_column_of_labels_means_nothing_to_other_folders(tmp_path, evaluate):
    root = write_classes(tmp_path / "images", CLASSES, count=20)
    table = write_table(tmp_path / "pets.csv", root, column="breed")
    path = tmp_path / "best.safetensors"
    write_best(path, CLASSES, "data=folder", f"data.root={table}", "data.label_column=breed")
    others = write_classes(tmp_path / "others", CLASSES, count=5)
    numbers = evaluate(f"checkpoint={path}", "data=folder", f"data.root={others}")
    assert numbers["n"] == 15
    other_table = write_table(tmp_path / "others.csv", others)
    with pytest.raises(DataError, match=r"not the run's own data set, .* no table and no parquet"):
        evaluate(f"checkpoint={path}", "data=folder", f"data.root={other_table}")


def write_table(path, root, column="label"):
    """Write a CSV of the images in root/<class>/, all of train, with such a column of classes."""
    rows = [f"{image},{image.parent.name}" for image in sorted(root.glob("*/*.*"))]
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([f"path,{column}", *rows]))
    return path


def test_weights_that_name_no_classes_are_measured_on_a_whole_folder(tmp_path, evaluate):
    from foreign_models import timm_model
    from safetensors.torch import save_file

    theirs = timm_model(img_size=16, patch_size=8, num_classes=3)
    save_file(theirs.state_dict(), tmp_path / "timm.safetensors")
    weights = f"pretrained={tmp_path / 'timm.safetensors'}"
    root = write_classes(tmp_path / "pets", CLASSES, count=10)
    numbers = evaluate(weights, "data=folder", f"data.root={root}")
    assert numbers["n"] == 30
    assert numbers["protocol"]["images"] == "pets taken whole"
    cut = evaluate(weights, "data=folder", f"data.root={root}", "data.test_fraction=0.2")
    assert cut["n"] == 6
    write_classes(tmp_path / "pets", ["wolf"])
    with pytest.raises(CheckpointError, match=r"head has 3 classes, data=folder has 4"):
        evaluate(weights, "data=folder", f"data.root={root}")
