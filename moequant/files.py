"""Writes a file whole or not at all: under a temporary name, synced, renamed.

Owns: that pattern and the errors of the file system. Leaves out: what is written.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moequant.errors import ExportError

REMEDIES = {
    errno.ENOSPC: "free some space or choose another disk",
    errno.EDQUOT: "the quota is used up; choose another disk",
    errno.EFBIG: "the file system or a limit does not allow files of this size",
    errno.EACCES: "choose a folder that can be written to",
    errno.EROFS: "the file system is read-only; choose another",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, renamed to it if the block ends well and removed if not.

    Raises:
        ExportError: the file system refused; an older file under `path` then still stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "nothing new was left under this name")
        raise ExportError(
            f"{path} was not written: {error.strerror or error} ({remedy})."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
