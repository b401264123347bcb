"""A Hugging Face id turned into a snapshot folder in the local cache.

The small files come first and are checked; only then, and only if the repository has safetensors
weights, the shards that the index names. Nothing else is fetched: no pickle, no second copy of the
weights in another layout (`consolidated.safetensors`, `original/`), no code.

Owns: recognising an id, what to fetch in which order, and one sentence for each way it can fail.
Leaves out: the transfer itself, its progress bars, its retries with a Range header when a
connection breaks, the cache and the token, all of which are huggingface_hub's. A file that was
complete is never fetched twice; huggingface_hub 2 discards one that was cut off by the end of the
process.
"""

import errno
import glob
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from moequant.checkpoint.folder import (
    CONFIG,
    INDEX,
    SINGLE,
    file_names,
    read_config,
    read_index,
    refuse,
)
from moequant.errors import CheckpointError, UsageError

SMALL_FILES = (
    CONFIG,
    INDEX,
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tekken.json",
    "*.jinja",
    "*.model",
    "README.md",
)
"""Patterns of what is fetched beside the weights; README.md for the licence and base model."""

_FILE_SUFFIXES = (".safetensors", ".gguf", ".bin", ".json")


def looks_like_path(source: str) -> bool:
    """Whether `source`, which does not exist, can only have been meant as a path."""
    if source.startswith((".", "/", "~")) or source.endswith(("/", *_FILE_SUFFIXES)):
        return True
    return "\\" in source or source.partition("@")[0].count("/") > 1


def parse_id(source: str, revision: str | None) -> tuple[str, str | None]:
    """ "org/name" or "org/name@revision" -> (repo, revision). Raises `CheckpointError` if neither.

    Raises `UsageError` if the source and the argument name different revisions.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    repo, _, suffix = source.partition("@")
    try:
        if repo.count("/") != 1:
            raise HFValidationError("one slash is needed")
        validate_repo_id(repo)
    except HFValidationError:
        raise CheckpointError(
            f"{source!r}: no such folder, and not a Hugging Face id, "
            "which looks like org/name or org/name@revision"
        ) from None
    if suffix and revision and suffix != revision:
        raise UsageError(f"{source}: names revision {suffix}, but {revision} was asked for as well")
    return repo, suffix or revision


def download(repo: str, revision: str | None, cache_dir: Path | None, offline: bool) -> Path:
    """The snapshot folder of `repo`, named by its commit, with all its shards in place.

    With `offline`, HF_HUB_OFFLINE=1 or no connection, whatever the cache has.
    Raises `CheckpointError`.
    """
    from huggingface_hub import constants, snapshot_download

    offline = offline or constants.HF_HUB_OFFLINE
    shown = f"{repo}@{revision}" if revision else repo
    fetch = partial(snapshot_download, repo, cache_dir=cache_dir, local_files_only=offline)
    folder = Path(
        _explained(shown, offline, fetch, revision=revision, allow_patterns=list(SMALL_FILES))
    )
    names = None if offline else _remote_names(repo, folder.name)
    if names is None:
        names = file_names(folder)
        if CONFIG not in names or not {SINGLE, INDEX} & names:
            raise CheckpointError(_not_cached(shown, offline))
    shards = _wanted_shards(shown, folder, names)
    patterns = [glob.escape(shard) for shard in shards]
    _explained(shown, offline, fetch, revision=folder.name, allow_patterns=patterns)
    return folder


def _remote_names(repo: str, commit: str) -> set[str] | None:
    """All files of the repository; None if the Hub cannot be reached now, though it was cached."""
    from huggingface_hub import HfApi

    try:
        # Not list_repo_files: without a connection that one retries for half a minute.
        info = HfApi(library_name="moequant").model_info(repo, revision=commit)
    except Exception:  # the first fetch came from the cache too; the second decides
        return None
    return {sibling.rfilename for sibling in info.siblings or ()}


def _wanted_shards(shown: str, folder: Path, names: Collection[str]) -> list[str]:
    """The files with weights, after config and index have passed their checks."""
    problems: list[str] = []
    read_config(folder, names, problems)
    index = read_index(folder, names, problems)
    refuse(shown, problems)
    return index.shards if index else [SINGLE]


def _explained(shown: str, offline: bool, call: Callable[..., Any], **options: Any) -> Any:
    """`call(**options)`; whatever it raises becomes one `CheckpointError`.

    All exceptions are caught: huggingface_hub lets those of its HTTP and Xet libraries through,
    which have no base class in common and change with its version.
    """
    try:
        return call(**options)
    except Exception as error:
        raise CheckpointError(_reason(shown, offline, error)) from error


def _reason(shown: str, offline: bool, error: Exception) -> str:
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return (
            f"{shown}: access is restricted; accept its terms on the model's page, then log in "
            "with `hf auth login` or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{shown}: the repository has no such revision; look up its branches and tags"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"{shown}: no such folder here, and no such model on Hugging Face; check the spelling, "
            "or if it is private log in with `hf auth login`"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        return _not_cached(shown, offline)
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"{shown}: the disk is full; free some space or choose another cache folder"
    text = " ".join(str(error).split())[:300]
    return f"{shown}: the download failed ({type(error).__name__}: {text}); run it again to resume"


def _not_cached(shown: str, offline: bool) -> str:
    if offline:
        why = "the network is switched off (offline, or HF_HUB_OFFLINE=1)"
        remedy = "switch it on for one run"
    else:
        why = "Hugging Face cannot be reached"
        remedy = "check the connection and run it again"
    return f"{shown}: not complete in the local cache, and {why}; {remedy}, or pass a local folder"
