"""Weights from the Hugging Face hub, by its own client and in its own cache.

The client reads the variables that its other users know: HF_HOME, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE. It resumes a connection that is cut and compares sizes; checksums are compared here.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit.errors import CheckpointError
from vit.text import first_line, shorten
from vit.weights.disk import disk_errors, hash_file, require_room
from vit.weights.files import HUB_FILES, is_index, shards_in

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

# What says how to read them
BESIDE = ("config.json", "preprocessor_config.json", "processor_config.json")

COMMIT = re.compile("[0-9a-f]{40}")

# Names of files of a repository, and characters of an error of the client's, in a message
LISTED = 5
REASON = 120


@dataclass(frozen=True)
class Repository:
    """A repository of models. name: as the user gave it; file: the one with the weights, or None.

    revision: a branch, a tag or a commit; None: its main branch.
    """

    name: str
    id: str
    file: str | None = None
    revision: str | None = None

    @property
    def candidates(self) -> tuple[str, ...]:
        """The files that may hold its weights, the best first."""
        return HUB_FILES if self.file is None else (self.file,)


class Unreachable(Exception):
    """The hub does not answer, or must not be asked; str() says why."""


def download_weights(repository: Repository) -> tuple[Path, str]:
    """Return the file of a repository's weights, with its JSON files beside it, and its commit.

    Of a model in several files it is their index. Without a network what the cache holds is used.
    Raises CheckpointError.
    """
    # A commit never changes, so there is nothing to ask
    if repository.revision and COMMIT.fullmatch(repository.revision):
        path = cached_weights(repository)
        if path is not None:
            return path, commit_of(path, repository)
    try:
        with hub_errors(repository):
            path = download_from(repository)
    except Unreachable as error:
        path = cached_weights(repository)
        if path is None:
            raise not_to_be_had(repository, error) from None
    return path, commit_of(path, repository)


def commit_of(path: Path, repository: Repository) -> str:
    """The commit of a file in the cache, snapshots/<commit>/<file>."""
    depth = (repository.file or "").count("/")
    return path.parents[depth].name


def cached_weights(repository: Repository) -> Path | None:
    """The file of the weights in the cache, or None unless all that belongs to it is there."""
    for name in repository.candidates:
        path = cached(repository, name)
        if path is None:
            continue
        if all(cached(repository, shard) for shard in shards_of(path)):
            return path
    return None


def cached(repository: Repository, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository.id, name, revision=repository.revision)
    # It has a third answer, that the repository is known to have no such file
    return Path(path) if isinstance(path, str) else None


def download_from(repository: Repository) -> Path:
    """Download what is missing in the cache; returns as download_weights.

    Raises CheckpointError, and what hub_errors() translates.
    """
    from huggingface_hub import HfApi, constants

    # The client's default may be of another moment than its other constants
    api = HfApi(endpoint=constants.ENDPOINT)
    info = api.model_info(repository.id, revision=repository.revision, files_metadata=True)
    files = {sibling.rfilename: sibling for sibling in info.siblings or []}
    weights = next((name for name in repository.candidates if name in files), None)
    if weights is None:
        raise without_weights(repository, list(files))
    transfer = Transfer(repository, str(info.sha), files)
    beside = [name for name in BESIDE if name in files]

    # The weights are the first file: by it the client notes which commit the branch is at
    if not is_index(Path(weights)):
        return transfer.fetch([weights, *beside])
    index = transfer.fetch([weights])
    missing = [shard for shard in shards_of(index) if shard not in files]
    if missing:
        raise CheckpointError(
            f"{repository.name}: its {weights} lists {missing[0]}, which it lacks"
        )
    transfer.fetch([*shards_of(index), *beside])
    return index


def shards_of(path: Path) -> list[str]:
    """The names of the files that belong to an index; none where the path is of no index."""
    return list(shards_in(path)) if is_index(path) else []


@dataclass(frozen=True)
class Transfer:
    """Downloads files of one commit. files: what the hub says of each file, by its name."""

    repository: Repository
    commit: str
    files: "Mapping[str, RepoSibling]"

    def fetch(self, names: Sequence[str]) -> Path:
        """Download those of the files that the cache lacks; returns the path of the first."""
        from huggingface_hub import constants

        missing = [name for name in names if self.cached(name) is None]
        needed = sum(self.files[name].size or 0 for name in missing)
        require_room(self.repository.name, needed, Path(constants.HF_HUB_CACHE))
        for name in missing:
            self.check(name, self.download(name, self.commit))
        # For its note of the branch's commit, by which the cache is found without a network; the
        # file itself is in the cache by now
        if missing and self.repository.revision != self.commit:
            self.download(names[0], self.repository.revision)
        path = self.cached(names[0])
        assert path is not None, "a file that was downloaded is in the cache"
        return path

    def cached(self, name: str) -> Path | None:
        at_commit = Repository(self.repository.name, self.repository.id, revision=self.commit)
        return cached(at_commit, name)

    def download(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import constants, hf_hub_download

        endpoint = constants.ENDPOINT
        return Path(hf_hub_download(self.repository.id, name, revision=revision, endpoint=endpoint))

    def check(self, name: str, path: Path) -> None:
        """Raise CheckpointError, and remove the file, where its bytes are not the hub's."""
        file = self.files[name]
        if file.lfs is not None:
            expected, actual = file.lfs.sha256, hash_file(path, "sha256")
        elif file.blob_id is not None:
            # As git names it: the content after a header with its length
            header = f"blob {path.stat().st_size}\0".encode()
            expected, actual = file.blob_id, hash_file(path, "sha1", header)
        else:
            return
        if actual == expected:
            return
        # The cache holds a link to the content
        path.resolve().unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{self.repository.name}: {name} arrived damaged (its checksum is {actual[:12]}…, the "
            f"hub's {expected[:12]}…); try again"
        )


@contextmanager
def hub_errors(repository: Repository) -> Iterator[None]:
    """Turn what the client raises into CheckpointError, or Unreachable where nobody answers."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import logging

    # Its warnings of every attempt would stand between the user and the one line of the error
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with disk_errors(repository.name, Path(constants.HF_HUB_CACHE)):
            yield
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repository.name}: {first_line(error)}") from None
    except errors.LocalEntryNotFoundError as error:
        raise unreachable(error.__cause__ or error) from None
    except errors.OfflineModeIsEnabled:
        raise Unreachable("HF_HUB_OFFLINE is set") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500:
            raise Unreachable(f"it answers {status}") from None
        raise CheckpointError(f"{repository.name}: {refusal(repository, error, status)}") from None
    # Of the HTTP library below it, whose name differs between versions of the client
    except errors.HTTPError as error:  # pyright: ignore[reportPrivateImportUsage]
        raise unreachable(error) from None
    except json.JSONDecodeError:
        raise Unreachable("it does not answer as a hub does") from None
    except OSError as error:
        # Such as headers that no hub sends, or a file of another size than it said
        if error.errno is not None:
            raise
        raise unreachable(error) from None
    finally:
        logging.set_verbosity(verbosity)


def unreachable(error: BaseException) -> Unreachable:
    return Unreachable(shorten(first_line(error) or type(error).__name__, REASON))


def refusal(repository: Repository, error: Exception, status: int) -> str:
    """Why the hub refuses, and what to do, of an HfHubHTTPError."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{repository.id}"
    token = "give your token as HF_TOKEN=…, or by `hf auth login`"
    if isinstance(error, errors.GatedRepoError):
        return f"accept the terms on {page} with your account, then {token}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{page} has no branch, tag or commit {repository.revision}"
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = ""
        if repository.name.startswith("timm:") and "." not in repository.name:
            hint = (
                "; timm's end in what they were trained on, as in vit_base_patch16_224.augreg_in21k"
            )
        return f"there is no {page}, or it is private: then {token}{hint}"
    if status in (401, 403):
        return f"{page} refuses access ({status}); {token}"
    return f"{page} refuses ({status}: {first_line(error)})"


def without_weights(repository: Repository, names: Sequence[str]) -> CheckpointError:
    """The error for a repository that has none of the files that are looked for."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return CheckpointError(
        f"{repository.name}: has no {' or '.join(repository.candidates)}; it has "
        f"{', '.join(sorted(names)[:LISTED]) or 'no files'}{more}"
    )


def not_to_be_had(repository: Repository, reason: Any) -> CheckpointError:
    """The error for weights that neither the hub nor the cache gives, with the way by hand."""
    from huggingface_hub import constants

    at = f"/tree/{repository.revision}" if repository.revision else "/tree/main"
    return CheckpointError(
        f"{repository.name}: {constants.ENDPOINT} can't be reached ({reason}), and the cache "
        f"{constants.HF_HUB_CACHE} does not hold it; on a machine with a network download "
        f"{repository.candidates[0]} and, where it has them, {', '.join(BESIDE)} from "
        f"{constants.ENDPOINT}/{repository.id}{at} into one folder, and give "
        "pretrained=FOLDER here"
    )
