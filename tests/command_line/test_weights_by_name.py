"""Weights by name on the command line: downloaded once, noted in the run, refused in one line."""

import json
import resource

import pytest
import yaml
from foreign_models import hf_model
from helpers import ROOT, error_line, make_images, run, start, train
from hub_server import COMMIT, Hub, serve

VIT = "google/vit-tiny"
SMALL = [
    f"pretrained=hf:{VIT}",
    "data=folder",
    "data.root=images",
    "model=vit_ti16",
    "model.image_size=64",
    "model.num_layers=2",
    "train.steps=2",
    "train.batch_size=4",
    "schedule.warmup=0",
    "runtime.workers=0",
]


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path / "made"
    hf_model(num_labels=2).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    make_images(tmp_path / "images", {"train": 10, "test": 4})
    with serve(Hub({VIT: files})) as hub:
        yield hub


@pytest.fixture
def env(hub, tmp_path):
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}


def test_a_run_says_which_weights_it_started_from(tmp_path, hub, env):
    done = train(tmp_path, *SMALL, "hydra.run.dir=run", env=env)
    assert done.returncode == 0, done.stderr
    # What is drawn on a terminal is not written to a file
    assert done.stderr == ""
    name = f"hf:{VIT}@{COMMIT}"
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert config["pretrained"] == name
    assert config["model"]["layer_norm_eps"] == 1e-12

    # Going on with the same command needs neither the network nor the cache
    hub.requests.clear()
    elsewhere = {**env, "HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"}
    more = [*SMALL, "train.steps=3", "resume=run", "resume_changed=allow"]
    done = train(tmp_path, *more, env=elsewhere)
    assert done.returncode == 0, done.stderr
    assert hub.requests == []
    other = [f"pretrained=hf:{VIT}-other", *more[1:]]
    assert "pretrained does nothing" in error_line(train(tmp_path, *other, env=elsewhere))


def test_evaluated_exported_and_embedded_by_name(tmp_path, hub, env):
    done = run("evaluate.py", *SMALL[:3], "out=.", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["checkpoint"] == f"hf:{VIT}@{COMMIT}"
    options = ("--format", "hf", "--out", str(tmp_path / "hf"))
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    done = run("vit.export", f"hf:{VIT}", *options, cwd=ROOT, env=offline)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hf" / "model.safetensors").is_file()
    files = (str(tmp_path / "images" / "test"), "--out", str(tmp_path / "f.npz"))
    done = run("vit.embed", f"hf:{VIT}", *files, cwd=ROOT, env=offline)
    assert done.returncode == 0, done.stderr
    assert "8 images, 192 features each" in done.stdout


@pytest.mark.slow
def test_of_several_processes_one_downloads(tmp_path, hub, env):
    options = [*SMALL, "runtime.processes=2", "runtime.device=cpu", "hydra.run.dir=run"]
    done = train(tmp_path, *options, env=env)
    assert done.returncode == 0, done.stderr
    weights = [path for path in hub.requested("GET") if path.startswith("/cdn/")]
    assert len(weights) == 1
    assert len(hub.requested("GET /api/models")) == 1


def test_mistakes_end_in_one_line(tmp_path, hub, env):
    wrong = [SMALL[0] + "x", *SMALL[1:], "hydra.run.dir=wrong"]
    assert f"there is no {hub.url}/{VIT}x" in error_line(train(tmp_path, *wrong, env=env))
    hub.gated.add(VIT)
    assert "accept the terms" in error_line(train(tmp_path, *SMALL, "hydra.run.dir=1", env=env))
    hub.gated.clear()
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    line = error_line(train(tmp_path, *SMALL, "hydra.run.dir=2", env=offline))
    assert "HF_HUB_OFFLINE is set" in line
    assert "pretrained=FOLDER" in line
    done = run("vit.export", "hf:vit", "--format", "hf", "--out", "x", cwd=ROOT, env=env)
    assert "expected hf:OWNER/NAME" in error_line(done)


def test_a_disk_that_fills_up_in_the_middle(tmp_path, hub, env):
    process = start("train.py", *SMALL, "hydra.run.dir=run", cwd=tmp_path, env=env)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (500_000, 500_000))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2, errors
    assert len(errors.splitlines()) == 1
    assert f"can't be written to {tmp_path}/home/hub" in errors
    assert not list((tmp_path / "home").rglob("*.incomplete"))
