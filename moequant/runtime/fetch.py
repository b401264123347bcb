"""llama.cpp's source: fetched and verified, or a tree of the user's own; patched copies of it.

Owns: source trees in the user's cache. Leaves out: the patches' format (`patches`) and building.

The pinned source comes with pip by package name, so whatever index pip is set up for serves it; its
sha256 is in the pin. A tree appears under its name whole or not at all:

    <commit>/source                  the pinned source, as fetched
    <commit>/patched-<hash>/source   with the series of that hash applied
    own-<hash>/…                     the same for a tree of the user's own, by hash of its contents
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from moequant.errors import LlamaCppError, UsageError
from moequant.runtime.patches import HASH_LENGTH, Patch, apply_series, series_hash
from moequant.runtime.pin import Pin, Report, read_pin, runtime_directory

LOG_TAIL = 15  # lines of a failed fetch or build that the error shows
# of free disk: the archive beside the tree (0.18 GB), and a copy of the tree, with some room
FETCH_BYTES = 400_000_000
COPY_BYTES = 250_000_000
LARGEST_SOURCE = 64_000_000  # bytes of a file; above are models that people keep in the tree
_MISMATCH = "DO NOT MATCH THE HASHES"  # pip's words
_TAMPERED = (
    "the archive was tampered with or the index served another file. Nothing of it was run or kept."
)
_PARTIAL = "partial-"  # names of trees that are being made


@dataclass(frozen=True)
class SourceTree:
    """Where a llama.cpp's source comes from: the pin, or the user's own folder `own`.

    `folder` is where it is kept, with everything made of it; `commit` None where nobody knows.
    """

    folder: Path
    commit: str | None
    own: Path | None = None
    series: tuple[Patch, ...] = ()

    @property
    def source(self) -> Path:
        """The tree that is built."""
        return self.folder / "source"


def pinned_tree(series: Sequence[Patch] = ()) -> SourceTree:
    """The pinned source, with `series` applied; nothing is fetched yet."""
    pin = read_pin()
    return SourceTree(_folder(pin.commit, series), pin.commit, None, tuple(series))


def own_tree(path: Path, series: Sequence[Patch] = ()) -> SourceTree:
    """A llama.cpp source tree of the user's own, with `series` applied; nothing is copied yet.

    Raises:
        UsageError: `path` is no llama.cpp source tree.
    """
    missing = [n for n in ("CMakeLists.txt", "ggml/CMakeLists.txt") if not (path / n).is_file()]
    if missing:
        raise UsageError(f"{path} is no llama.cpp source tree: it has no {' and no '.join(missing)}"
                         ". Name the folder that a checkout of llama.cpp makes.")  # fmt: skip
    path = path.resolve()
    if runtime_directory().resolve().is_relative_to(path):
        raise UsageError(f"{path} holds moequant's cache ({runtime_directory()}), to which it "
                         "would be copied; set MOEQUANT_CACHE to another place.")  # fmt: skip
    key = f"own-{_contents_hash(path)}"
    return SourceTree(_folder(key, series), _git_commit(path), path, tuple(series))


def ensure_tree(tree: SourceTree, report: Report = lambda _: None) -> Path:
    """`tree.source`, made on the first call: fetched, copied and patched as it says.

    Raises:
        LlamaCppError: pip could not fetch the archive, its sha256 is not the pinned one, a patch
            does not apply, or the disk is full.
    """
    if tree.source.is_dir():
        return tree.source
    if tree.own is None and not tree.series:
        return _make(tree, FETCH_BYTES, lambda folder: _fetch(read_pin(), folder, report), report)
    given = tree.own or ensure_tree(pinned_tree(), report)

    def copy(target: Path) -> None:
        report(f"copying {given}")
        shutil.copytree(given, target, symlinks=True, ignore=_no_source)
        apply_series(tree.series, target)

    return _make(tree, COPY_BYTES, copy, report)


def ensure_source(report: Report = lambda _: None) -> Path:
    """The pinned source tree, unpatched, fetched and verified on the first call.

    Raises:
        LlamaCppError: as `ensure_tree`.
    """
    return ensure_tree(pinned_tree(), report)


def check_space(folder: Path, needed: int, what: str) -> None:
    """LlamaCppError unless the disk of `folder`, which exists, has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise LlamaCppError(
            f"{what} needs about {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.2f} GB free: "
            "free some, or set MOEQUANT_CACHE to a folder on another disk."
        )


@contextmanager
def locked(path: Path, report: Report) -> Iterator[None]:
    """Hold the lock `path`; say so if another process has it."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report(f"waiting for another moequant that works in {path.parent}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _folder(key: str, series: Sequence[Patch]) -> Path:
    folder = runtime_directory() / key
    return folder / f"patched-{series_hash(series)}" if series else folder


def _make(tree: SourceTree, needed: int, fill: Callable[[Path], None], report: Report) -> Path:
    """`tree.source` from what `fill` writes into a folder that is then renamed to it."""
    try:
        tree.folder.mkdir(parents=True, exist_ok=True)
        with locked(tree.folder / "source.lock", report):
            if not tree.source.is_dir():
                for left in tree.folder.glob(f"{_PARTIAL}*"):  # of a process that was killed
                    shutil.rmtree(left, ignore_errors=True)
                check_space(tree.folder, needed, "llama.cpp's source")
                with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=tree.folder) as temporary:
                    fill(Path(temporary) / "source")
                    (tree.folder / "source.json").write_text(json.dumps(_described(tree)), "utf-8")
                    (Path(temporary) / "source").rename(tree.source)
    except (OSError, shutil.Error) as error:
        raise LlamaCppError(f"{tree.source} could not be made: {error}") from error
    return tree.source


def _described(tree: SourceTree) -> dict[str, Any]:
    return {
        "commit": tree.commit,
        "own": None if tree.own is None else str(tree.own),
        "patches": [{"name": patch.name, "purpose": patch.purpose} for patch in tree.series],
    }


def _fetch(pin: Pin, target: Path, report: Report) -> None:
    report(f"fetching {pin.package}=={pin.version} for its llama.cpp {pin.commit}")
    kind = ["--no-binary", pin.package]
    archive = pip_download(pin.package, pin.version, pin.sha256, target.parent, kind)
    _extract(archive, pin.tree, target)


def pip_download(
    package: str, version: str, sha256: str, folder: Path, kind: Sequence[str]
) -> Path:
    """The package's one archive that pip's options `kind` choose, in `folder`; none of it is run.

    Raises:
        LlamaCppError: pip could not fetch it, or its sha256 is another.
    """
    requirement = f"{package}=={version}"
    wanted = folder / "requirements.txt"  # pip takes hashes from a file only
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n", "utf-8")
    # with the hash, since pip runs what is in an archive to learn its metadata
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
               *kind, "--dest", str(folder), "-r", str(wanted)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [*folder.glob("*.tar.gz"), *folder.glob("*.whl")]
    if result.returncode != 0 or len(archives) != 1:
        if _MISMATCH in result.stderr:
            raise LlamaCppError(
                f"{requirement} has another sha256 than the pinned {sha256}: {_TAMPERED}"
            )
        tail = "\n".join(result.stderr.splitlines()[-LOG_TAIL:])
        raise LlamaCppError(
            f"pip could not fetch {requirement} (exit {result.returncode}):\n{tail}"
        )
    _verify(archives[0], sha256)
    return archives[0]


def _verify(archive: Path, sha256: str) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise LlamaCppError(
            f"{archive.name} has sha256 {found}, but {sha256} is pinned: {_TAMPERED}"
        )


def _extract(archive: Path, tree: str, target: Path) -> None:
    """Unpack only `<top folder>/<tree>/…` of the archive into `target`."""
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, inside = member.name.partition("/")
            if inside.startswith(tree + "/"):
                member.name = inside.removeprefix(tree + "/")
                tar.extract(member, target, filter="data")
    if not (target / "CMakeLists.txt").is_file():
        raise LlamaCppError(f"{archive.name} holds no {tree}/CMakeLists.txt.")


def _no_source(folder: str | Path, names: Sequence[str]) -> set[str]:
    """Those of a folder's `names` that are no source: git's own data, builds, models."""
    return {name for name in names if name == ".git" or _is_build_or_model(Path(folder, name))}


def _is_build_or_model(path: Path) -> bool:
    if path.is_symlink():
        return False
    return (path / "CMakeCache.txt").is_file() or (
        path.is_file() and path.stat().st_size > LARGEST_SOURCE
    )


def _contents_hash(path: Path) -> str:
    """sha256 over names and contents of the tree's files, the first `HASH_LENGTH` digits."""
    digest = hashlib.sha256()
    for at, folders, files in os.walk(path):
        folder = Path(at)
        skipped = _no_source(folder, [*folders, *files])
        folders[:] = sorted(set(folders) - skipped)
        links = [name for name in folders if (folder / name).is_symlink()]
        for name in sorted(set(files) - skipped) + links:
            file = folder / name
            content = (str(file.readlink()).encode() if file.is_symlink()
                       else hashlib.sha256(file.read_bytes()).digest())  # fmt: skip
            digest.update(f"{file.relative_to(path)}\0".encode() + content + b"\0")
    return digest.hexdigest()[:HASH_LENGTH]


def _git_commit(path: Path) -> str | None:
    """The commit of a git checkout, `-dirty` if its files were changed; None without git."""
    git = shutil.which("git")
    if git is None or not (path / ".git").exists():
        return None
    command = [git, "-C", str(path), "describe", "--always", "--dirty", "--abbrev=9",
               "--exclude=*"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
