"""Weights by their names, downloaded by the real client from a server on this machine."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from foreign_models import hf_model, own_model, timm_model
from hub_server import COMMIT, Hub, serve, sha256
from huggingface_hub import constants
from safetensors.torch import save

from vit.errors import CheckpointError
from vit.weights import download, sources
from vit.weights.loading import build, read
from vit.weights.sources import find

VIT = "google/vit-tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with one repository of transformers' ViT, and an empty cache."""
    folder = tmp_path / "made"
    hf_model().save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files |= {"preprocessor_config.json": b"{}", "README.md": b"a ViT", "tf_model.h5": b"x"}
    home = tmp_path / "home"
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    with serve(Hub({VIT: files})) as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_URL_HOSTS": frozenset({"127.0.0.1"}),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_TOKEN_PATH": str(home / "token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield hub


def refused(name: str, *parts: str) -> str:
    """Finding ends in one line that begins with the name and holds these parts."""
    with pytest.raises(CheckpointError) as caught:
        find(name)
    message = str(caught.value)
    assert message.startswith(name)
    assert "\n" not in message
    assert all(part in message for part in parts), message
    return message


def test_a_repository(hub):
    source = find(f"hf:{VIT}")
    assert source.name == f"hf:{VIT}@{COMMIT}"
    beside = {path.name for path in source.path.parent.iterdir()}
    # Neither other libraries' weights nor pictures
    assert beside == {"model.safetensors", "config.json", "preprocessor_config.json"}
    assert read(f"hf:{VIT}").tensors.keys() == read(source.path).tensors.keys()
    assert build(f"hf:{VIT}").head.out_features == 5


def test_a_branch_is_asked_for_again_and_a_commit_is_not(hub):
    pinned = find(f"hf:{VIT}").name
    hub.requests.clear()
    assert find(f"hf:{VIT}@main").name == pinned
    # What the branch is at, and no file
    assert len(hub.requests) == 1
    hub.requests.clear()
    assert find(pinned).name == pinned
    assert hub.requests == []


def test_without_a_network_the_cache_is_used(hub, monkeypatch):
    source = find(f"hf:{VIT}")
    hub.status = 503
    assert find(f"hf:{VIT}") == source
    hub.status = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert find(f"hf:{VIT}") == source
    assert hub.requests == []


def test_neither_a_network_nor_the_cache(hub, monkeypatch, tmp_path):
    """The message says what was sought, and how to bring it here by hand."""
    hub.status = 503
    by_hand = ("config.json", f"{hub.url}/{VIT}/tree/main", "pretrained=FOLDER")
    refused(f"hf:{VIT}", "answers 503", str(tmp_path / "home" / "hub"), *by_hand)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(f"hf:{VIT}", "HF_HUB_OFFLINE", *by_hand)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    refused(f"hf:{VIT}", "can't be reached", "refused")


def test_timm_has_its_repositories_on_the_same_hub(hub):
    name = "vit_tiny_patch16_224.augreg"
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5}
    hub.repositories[f"timm/{name}"] = {
        "config.json": json.dumps(config).encode(),
        "pytorch_model.bin": b"never asked for",
        "model.safetensors": save(timm_model().state_dict()),
    }
    source = find(f"timm:{name}")
    assert source.name == f"timm:{name}@{COMMIT}"
    assert source.path.name == "model.safetensors"
    assert not (source.path.parent / "pytorch_model.bin").exists()
    refused("timm:vit_tiny_patch16_224", "there is no", "augreg_in21k")


def test_a_file_of_a_repository(hub):
    hub.repositories[VIT]["more/other.safetensors"] = save(own_model().state_dict())
    source = find(f"hf:{VIT}/more/other.safetensors@main")
    assert source.name == f"hf:{VIT}/more/other.safetensors@{COMMIT}"
    assert "head.weight" in read(source.name).tensors
    refused(f"hf:{VIT}/more/none.bin", "has no more/none.bin", "config.json")


def test_a_cut_connection_is_resumed(hub):
    hub.cuts, hub.cut_after = 1, 200_000
    content = hub.repositories[VIT]["model.safetensors"]
    assert find(f"hf:{VIT}").path.read_bytes() == content
    assert hub.cuts == 0


def test_an_endpoint_that_is_no_hub(hub, monkeypatch):
    hub.files[f"/page/api/models/{VIT}"] = b"<html>"
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.url}/page")
    refused(f"hf:{VIT}", "/page can't be reached")


def test_wrong_names(hub):
    refused("hf:google/other", f"there is no {hub.url}/google/other", "HF_TOKEN")
    refused(f"hf:{VIT}@v2", "no branch, tag or commit v2")
    for name in ("hf:", "hf:vit", "timm:", "hf:a b/c", "hf:google/vit@"):
        refused(name, "expected hf:OWNER/NAME")
    refused("hf:a--b/c..d", "a--b/c..d")
    hub.repositories["some/gpt"] = {"README.md": b""}
    refused("hf:some/gpt", "has no model.safetensors or", "it has README.md")


def test_a_gated_repository(hub, monkeypatch):
    hub.gated.add(VIT)
    terms = f"accept the terms on {hub.url}/{VIT}"
    refused(f"hf:{VIT}", terms, "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", "of somebody else")
    refused(f"hf:{VIT}", terms)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert find(f"hf:{VIT}").path.is_file()
    hub.status = 403
    refused(f"hf:{VIT}", "refuses access (403)")


def test_a_file_that_arrives_damaged_is_not_kept(hub):
    hub.damage = True
    refused(f"hf:{VIT}", "model.safetensors arrived damaged")
    hub.damage = False
    assert read(f"hf:{VIT}").model["num_heads"] == 3


def test_a_full_disk(hub, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(f"hf:{VIT}", "needs", "1 KiB are free", "HF_HOME")
    hub.files["/b16.npz"] = bytes(5000)
    refused(f"{hub.url}/b16.npz", "needs 5 KiB", "1 KiB are free")
    assert hub.requested("GET /cdn") == []


def test_an_index_lists_the_files_of_a_model(hub):
    files = hub.repositories[VIT]
    tensors = read_tensors(files.pop("model.safetensors"))
    names = sorted(tensors)
    shards = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    table = {name: shard for shard, inside in shards.items() for name in inside}
    for shard, inside in shards.items():
        files[shard] = save({name: tensors[name] for name in inside})
    index = "model.safetensors.index.json"
    files[index] = json.dumps({"weight_map": table}).encode()
    source = find(f"hf:{VIT}")
    assert source.path.name == index
    assert all((source.path.parent / name).is_file() for name in (*shards, "config.json"))
    assert find(source.name) == source

    for content in (b"{", b"[]", b"{}", b'{"weight_map": {"a": "../b"}}', b'{"weight_map": []}'):
        files[index] = content
        shutil.rmtree(Path(constants.HF_HUB_CACHE))
        with pytest.raises(CheckpointError, match="no index of a model in several files"):
            find(f"hf:{VIT}")
    files[index] = b'{"weight_map": {"a": "c.safetensors"}}'
    shutil.rmtree(Path(constants.HF_HUB_CACHE))
    refused(f"hf:{VIT}", "lists c.safetensors, which it lacks")


def read_tensors(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    return load(content)


def test_an_address(hub):
    content = save(own_model().state_dict())
    hub.files["/some/own.safetensors"] = content
    url = f"{hub.url}/some/own.safetensors"
    source = find(url)
    assert source.name == f"{url}#sha256={sha256(content)}"
    assert source.path.name == "own.safetensors"
    assert "head.weight" in read(url).tensors
    # Once
    assert find(source.name) == source
    assert hub.requests == ["GET /some/own.safetensors"]
    refused(f"{url}#sha256=12", "64 digits")
    with pytest.raises(CheckpointError, match="another file than expected: its SHA-256 is"):
        find(f"{url}#sha256={'0' * 64}")
    refused(f"{hub.url}/none.npz", "404", "pretrained=FILE")
    refused(f"{hub.url}/", "no address of a file")


def test_an_address_without_a_network(hub, monkeypatch):
    hub.files["/x.npz"] = b"12"
    source = find(f"{hub.url}/x.npz")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find(f"{hub.url}/x.npz") == source
    refused(f"{hub.url}/y.npz", "HF_HUB_OFFLINE", "pretrained=FILE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refused("http://127.0.0.1:1/x.npz", "refused")


def test_a_cut_download_of_an_address_is_resumed(hub):
    hub.files["/x.npz"] = bytes(range(256)) * 40
    # One attempt after another brings something
    hub.cuts, hub.cut_after = 8, 1100
    assert find(f"{hub.url}/x.npz").path.read_bytes() == hub.files["/x.npz"]
    assert hub.cuts == 0

    # Nothing at all comes, then the program ends; the next one goes on
    hub.files["/y.npz"] = bytes(5000)
    hub.cuts, hub.cut_after = 1, 3000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        refused(f"{hub.url}/y.npz", "cut after 3000 of 5000 bytes")
    # A version of the same file that is as long as what is there already
    hub.cut_after = 2001
    assert find(f"{hub.url}/y.npz").path.read_bytes() == hub.files["/y.npz"]


def test_another_version_of_a_file_is_not_appended(hub):
    hub.files["/x.npz"] = bytes(5000)
    hub.cuts, hub.cut_after = 1, 3000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        refused(f"{hub.url}/x.npz", "cut after")
    hub.files["/x.npz"] = b"1" * 5000
    assert find(f"{hub.url}/x.npz").path.read_bytes() == b"1" * 5000


def test_a_checksum_of_the_server(hub):
    hub.files["/x.npz"] = b"hello"
    # The MD5 of hello
    hub.headers = {"x-goog-hash": "crc32c=mnG7TA==,md5=XUFAKrxLKna5cZ2REBfFkg=="}
    hub.damage = True
    refused(f"{hub.url}/x.npz", "damaged")
    hub.damage = False
    assert find(f"{hub.url}/x.npz").path.read_bytes() == b"hello"


def test_the_bucket_of_google(hub, monkeypatch):
    monkeypatch.setattr(sources, "GOOGLE", f"{hub.url}/vit_models/")
    hub.files["/vit_models/imagenet21k+imagenet2012/ViT-B_16.npz"] = b"123"
    name = "google:imagenet21k+imagenet2012/ViT-B_16"
    source = find(name)
    assert source.name == f"{name}#sha256={sha256(b'123')}"
    assert source.path.name == "ViT-B_16.npz"
    assert find(f"{name}.npz").path == source.path
    refused("google:sam/ViT-B_17", "404", "sam/ViT-B_17.npz")


def test_paths_stay_paths(hub, tmp_path):
    (tmp_path / "hf").mkdir()
    path = tmp_path / "hf" / "x"
    path.write_bytes(save(own_model().state_dict()))
    assert find(path).name == str(path)
    refused("google/vit-base", "hf:google/vit-base")
    assert hub.requests == []
