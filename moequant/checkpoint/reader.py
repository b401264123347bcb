"""`open_checkpoint` and the lazily read `Checkpoint` it returns.

A tensor is read with `pread` into memory of its own, so that what a process holds is what it asked
for: mapped pages of a shard would count as its memory too. No file stays open between reads.

Owns: turning a source into a checkpoint, and bytes into tensors. Leaves out: the checks
(`folder`, `header`), the download (`hub`), the values (`finite`).
"""

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moequant.checkpoint import hub
from moequant.checkpoint.folder import read_folder
from moequant.checkpoint.header import (
    BadFileError,
    Stamp,
    TensorInfo,
    open_regular,
    os_reason,
    printable,
    stamp,
)
from moequant.errors import CheckpointError, UsageError

_MAX_READ = 1 << 30  # Linux moves at most 2 GiB - 4 KiB in one call


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config, index and headers have passed every check.

    `name` is the folder's name or the Hugging Face id, `revision` the commit of the latter.
    `config` is config.json as it stands. `tensors` is in natural order of the names. `notes` tells
    what was passed over in opening it. `part` says which part of a model it is, in words; empty for
    a whole one.
    """

    path: Path
    name: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    revision: str | None = None
    notes: tuple[str, ...] = ()
    part: str = ""
    _digest: str = field(default="", repr=False)
    _stamps: Mapping[Path, Stamp] = field(default_factory=dict, repr=False)

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in the dtype and shape of `tensors[name]`, on the CPU.

        Raises `CheckpointError` for an unknown name, or a file that changed or cannot be read.
        """
        info = self._info(name)
        return self._read(info, info.start, info.stop, info.shape)

    def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of axis 0, shape (stop - start, ...); only their bytes are read.

        Raises `CheckpointError` as `read` does, and for rows that are not there.
        """
        info = self._info(name)
        if not info.shape or not 0 <= start <= stop <= info.shape[0]:
            raise CheckpointError(
                f"{info.file}: rows {start}:{stop} of {printable(name)} were asked for, "
                f"but its shape is {list(info.shape)}"
            )
        row = info.nbytes // info.shape[0] if info.shape[0] else 0
        first = info.start + start * row
        shape = (stop - start, *info.shape[1:])
        return self._read(info, first, first + (stop - start) * row, shape)

    def digest(self) -> str:
        """Hex sha256 over config.json, then the index or, without one, the shard's header JSON.

        It tells one model's layout from another's. It does not see the weights' values: two
        fine-tunes of one model may share it.
        """
        return self._digest

    def file(self, name: str) -> Path | None:
        """The path of a file beside the weights (`tokenizer.json` …), or None if it is not there.

        Raises `CheckpointError` for a link that leads nowhere.
        """
        path = self.path / name
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{path}: a link to {path.readlink()}, which is not there; "
                "download the checkpoint again"
            )
        return path if path.is_file() else None

    def _read(
        self, info: TensorInfo, start: int, stop: int, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Bytes start:stop of the tensor's file as a tensor of `shape`."""
        data = torch.empty(stop - start, dtype=torch.uint8)
        if stop > start:
            try:
                _fill(info.file, self._stamps.get(info.file), data.numpy().data, start)
            except BadFileError as fault:
                raise CheckpointError(f"{info.file}: {printable(info.name)}: {fault}") from fault
        return data.view(info.dtype).reshape(shape)

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            close = difflib.get_close_matches(name, self.tensors, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise CheckpointError(f"{self.path}: no tensor named {printable(name)}{hint}")
        return self.tensors[name]


def open_checkpoint(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    offline: bool = False,
) -> Checkpoint:
    """Open a local folder, or a Hugging Face id ("org/name", optionally "@revision").

    Config, index and every shard's header are checked; no weight is read. A folder that exists wins
    over an id of the same spelling. An id is downloaded into `cache_dir` (default: Hugging Face's
    cache), or with `offline` only looked up there.

    Raises `CheckpointError` that lists everything wrong, `UsageError` for contradictory arguments.
    """
    if isinstance(source, Path) or hub.looks_like_path(source) or _exists(source):
        if revision is not None:
            raise UsageError(f"{source}: a local folder has no revision {revision}; leave it out")
        folder = _existing_folder(Path(source))
        return _open_folder(folder, name=folder.resolve().name)
    repo, wanted = hub.parse_id(source, revision)
    snapshot = hub.download(repo, wanted, cache_dir, offline)
    return _open_folder(snapshot, name=repo, revision=snapshot.name)


def _exists(source: str) -> bool:
    try:
        return source != "" and Path(source).exists()
    except (OSError, ValueError):  # no permission, too long for a name, a zero byte in it
        return False


def _existing_folder(path: Path) -> Path:
    """`path` if it is a folder; otherwise an error that says what was probably meant."""
    try:
        path = path.expanduser()
        if path.is_dir():
            return path
        path.stat()
    except (OSError, RuntimeError) as error:
        why = os_reason(error) if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: no folder to open: {why}") from error
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"{path}: a GGUF file, which is moequant's output; pass the safetensors model's folder"
        )
    if path.suffix == ".safetensors":
        raise CheckpointError(f"{path}: one file of a checkpoint; pass its folder, {path.parent}")
    raise CheckpointError(f"{path}: a file; pass a folder with config.json and safetensors weights")


def _open_folder(folder: Path, name: str, revision: str | None = None) -> Checkpoint:
    contents = read_folder(folder)
    return Checkpoint(
        path=folder,
        name=name,
        config=contents.config,
        tensors=MappingProxyType(contents.tensors),
        revision=revision,
        notes=contents.notes,
        _stamps=contents.stamps,
        _digest=hashlib.sha256(b"".join(contents.identity)).hexdigest(),
    )


def _fill(path: Path, expected: Stamp | None, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from `offset` of the file, in as many reads as the system makes of it."""
    fd = open_regular(path)
    try:
        if stamp(os.fstat(fd)) != expected:
            raise BadFileError("the file changed after it was opened; start again")
        done = 0
        while done < len(buffer):
            count = os.preadv(fd, [buffer[done : done + _MAX_READ]], offset + done)
            if count == 0:
                raise BadFileError(f"the file was cut off at byte {offset + done}; start again")
            done += count
    except OSError as error:
        raise BadFileError(f"cannot be read: {os_reason(error)}") from error
    finally:
        os.close(fd)
