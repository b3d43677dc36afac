"""By which bytes weights are known: a run that needs them again must not be given others."""

import hashlib
from pathlib import Path

from vit.errors import CheckpointError
from vit.weights.disk import hash_file
from vit.weights.files import is_index, shards_in
from vit.weights.hub import BESIDE


def sha256_of(path: Path, is_own: bool) -> str:
    """Return the SHA-256 of the files that weights are read from, in hexadecimal digits.

    Of one file it is the file's own, as `sha256sum` prints it; of several that of a list of theirs
    with their names. is_own: a checkpoint of this project, which needs no file beside it. Raises
    CheckpointError where one can't be read.
    """
    try:
        hashes = {file.name: hash_file(file, "sha256") for file in files_of(path, is_own)}
    except OSError as error:
        raise CheckpointError(f"{error.filename}: can't be read ({error.strerror})") from None
    if len(hashes) == 1:
        return hashes[path.name]
    lines = [f"{sha256}  {name}\n" for name, sha256 in sorted(hashes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def files_of(path: Path, is_own: bool) -> list[Path]:
    """The files that weights are read from: shards too, and the JSON files that describe them."""
    files = [path]
    if is_index(path):
        files += [path.with_name(name) for name in shards_in(path)]
    # They state what no tensor shows, such as the number of heads
    if not is_own:
        files += [path.with_name(name) for name in BESIDE if path.with_name(name).is_file()]
    return files
