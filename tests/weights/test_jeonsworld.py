"""Fine-tuned files of ViT-pytorch."""

import pytest
import torch
from foreign_models import difference, own_model

from vit.errors import CheckpointError
from vit.weights.loading import build, read

BEGINNINGS = [
    ("embeddings.patch_embedding.projection.", "transformer.embeddings.patch_embeddings."),
    ("embeddings.position_embedding", "transformer.embeddings.position_embeddings"),
    ("embeddings.cls_token", "transformer.embeddings.cls_token"),
    ("encoder.norm.", "transformer.encoder.encoder_norm."),
    ("encoder.blocks.", "transformer.encoder.layer."),
]
PARTS = [
    (".attention.projection", ".attn.out"),
    (".attention.", ".attn."),
    (".norm1.", ".attention_norm."),
    (".norm2.", ".ffn_norm."),
    (".mlp.", ".ffn."),
]


def their_name(name: str) -> str:
    for ours, theirs in BEGINNINGS:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    for ours, theirs in PARTS:
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_same_logits(tmp_path, legacy):
    ours, path = own_model(), tmp_path / "cifar10.bin"
    theirs = {their_name(name): tensor for name, tensor in ours.state_dict().items()}
    assert "transformer.encoder.layer.1.attn.out.bias" in theirs
    torch.save(theirs, path, _use_new_zipfile_serialization=not legacy)
    assert difference(build(path), ours, 32) == 0


def test_a_hybrid_is_refused(tmp_path):
    path = tmp_path / "hybrid.bin"
    theirs = {their_name(name): tensor for name, tensor in own_model().state_dict().items()}
    theirs["transformer.embeddings.hybrid_model.root.conv.weight"] = torch.zeros(1)
    torch.save(theirs, path)
    with pytest.raises(CheckpointError, match=r"hybrid\.bin: a hybrid of ViT-pytorch"):
        read(path)
