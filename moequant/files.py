"""Writes a file whole or not at all: under a temporary name, synced, renamed.

Owns: that pattern, what can be checked of a target before the work, and the file system's errors.
Leaves out: what is written.
"""

import errno
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moequant.errors import ExportError, UsageError

REMEDIES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "the quota is used up; choose another disk",
    errno.EFBIG: "the file system or a limit does not allow files of this size",
    errno.EACCES: "choose a folder that can be written to",
    errno.EROFS: "the file system is read-only; choose another",
}


def check_target(path: Path, *, force: bool, needed: int = 0) -> None:
    """Everything about the output's place that can be known before the work starts.

    Raises:
        UsageError: the file exists and `force` is off, it is no regular file, or its folder is
            missing or unwritable.
        ExportError: the disk has less than `needed` bytes free.
    """
    try:
        _check_name(path, force=force)
        folder = path.resolve().parent
        if not folder.is_dir():
            raise UsageError(f"{folder} does not exist; create it first.")
        if not os.access(folder, os.W_OK):
            raise UsageError(f"{folder} cannot be written to; choose another place.")
        status = os.statvfs(folder)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from error
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise ExportError(
            f"{path} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free."
        )


def check_distinct(outputs: Iterable[Path], inputs: Iterable[Path]) -> None:
    """UsageError if two outputs are one file, or an output is an input or a file below one.

    Links are followed, of the outputs and inside the folders that are read. A new file in a folder
    that is read is no input.
    """
    seen: set[Path] = set()
    read = [path.resolve() for path in inputs]
    for path in outputs:
        resolved = path.resolve()
        if resolved in seen:
            raise UsageError(f"{path} is named as the place of two outputs; name two files.")
        seen.add(resolved)
        if any(_holds(source, path) for source in read):
            raise UsageError(f"{path} belongs to what is read; choose another name.")


def _holds(source: Path, path: Path) -> bool:
    """Whether `path` is `source`, or exists below it: in itself, as a link, or behind a link."""
    target = path.resolve()
    if target == source:
        return True
    if not source.is_dir() or not os.path.lexists(path):
        return False
    named = path.parent.resolve() / path.name
    links = (link.resolve() for link in source.rglob("*") if link.is_symlink())
    return (
        target.is_relative_to(source)
        or named.is_relative_to(source)
        or any(target.is_relative_to(linked) for linked in links)
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it if the block ends well and removed if not.

    A link is followed: what it points to is replaced, the link stays.

    Raises:
        ExportError: the file system refused; an older file under `path` then still stands.
    """
    target = path.resolve()
    temporary = target.with_name(f".moequant-{uuid.uuid4().hex}.part")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "nothing new was left under this name")
        raise ExportError(
            f"{path} was not written: {error.strerror or error} ({remedy})."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _check_name(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file, e.g. {path / 'model.gguf'}.")
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is no regular file; choose another name.")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{path} exists. Choose another name, or --force to replace it.")


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
