"""Where weights come from: a path on this machine, or a name that stands for files on the network.

hf:OWNER/NAME[/FILE][@REVISION]   a repository of the Hugging Face hub, or one file of it
timm:NAME[@REVISION]              the repository timm/NAME of the same hub
google:PATH                       an .npz of the ViT authors' public bucket, such as sam/ViT-B_16
https://… (or http://…)           one file

The last two may end in #sha256=…, which the file must then have. Everything is downloaded once,
into Hugging Face's cache (HF_HOME).
"""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from vit.errors import CheckpointError
from vit.weights.download import download
from vit.weights.files import find_file
from vit.weights.hub import Repository, download_weights

# Released by the authors of ViT, AugReg, MLP-Mixer and SAM; github.com/google-research/
# vision_transformer lists what is in it
GOOGLE = "https://storage.googleapis.com/vit_models/"

SCHEMES = ("hf:", "timm:", "google:", "https://", "http://")

# OWNER/NAME, a file in it, a branch, tag or commit
IN_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:/([^@]+))?(?:@(.+))?")
# Where a user forgets hf:
LIKE_A_REPOSITORY = re.compile(r"[\w-]+/[\w.-]+")

PIN = "#sha256="


@dataclass(frozen=True)
class Source:
    """Weights on this machine.

    path: the file of weights, with the JSON files of its repository beside it. name: what
    `pretrained=` takes to get the very same bytes again: with the commit or the SHA-256 of what was
    downloaded; a local path as it was given.
    """

    path: Path
    name: str


def find(source: Path | str) -> Source:
    """Find weights by their path, or by their name, and download them where they are not here yet.

    Raises CheckpointError where there are none, and where they can't be had: no such name, no
    network, no access, no room on the disk.
    """
    name = str(source)
    if not name.startswith(SCHEMES):
        require_there(Path(source))
        return Source(find_file(Path(source)), name)
    scheme, _, rest = name.partition(":")
    if scheme in ("hf", "timm"):
        return find_in_hub(name, rest if scheme == "hf" else f"timm/{rest}")
    return find_at_address(name)


def require_there(path: Path) -> None:
    """Raise CheckpointError for a path that is not there but looks like a repository's name."""
    text = str(path)
    if not path.exists() and LIKE_A_REPOSITORY.fullmatch(text) and not path.suffix:
        raise CheckpointError(
            f"{text}: no such file or folder; of the Hugging Face hub it would be hf:{text}"
        )


def find_in_hub(name: str, address: str) -> Source:
    """Find a repository's weights; address: OWNER/NAME[/FILE][@REVISION]."""
    match = IN_HUB.fullmatch(address)
    if match is None:
        raise CheckpointError(
            f"{name}: expected hf:OWNER/NAME, timm:NAME, or either with @REVISION at its end"
        )
    repository = Repository(name, *match.groups())
    path, commit = download_weights(repository)
    unpinned = name.removesuffix(f"@{repository.revision}")
    return Source(path, f"{unpinned}@{commit}")


def find_at_address(name: str) -> Source:
    """Find the file of an address, or of a name in Google's bucket."""
    unpinned, pin, sha256 = name.partition(PIN)
    if pin and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise CheckpointError(f"{name}: sha256 must be 64 digits of 0-9 and a-f")
    url = unpinned
    if unpinned.startswith("google:"):
        # + and spaces mean something else in an address than in the bucket's names
        url = GOOGLE + quote(unpinned.removeprefix("google:").removesuffix(".npz") + ".npz")
    path, sha256 = download(unpinned, url, sha256 or None)
    return Source(path, unpinned + PIN + sha256)
