"""What is in the cache of llama.cpp: source trees, patches, builds, backends, size on disk.

Owns: reading that. Leaves out: making or removing any of it (`llama_cpp`), and printing.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moequant.runtime.backends import ask_backends
from moequant.runtime.build import CMAKE_OPTIONS, read_record
from moequant.runtime.llama_cpp import MORE_OPTIONS
from moequant.runtime.patches import read_series, series_hash
from moequant.runtime.pin import Pin, read_pin, runtime_directory

_CACHED = re.compile(r"^(\w+):\w+=(.*)$", re.M)
_LIBRARY = re.compile(r"(?:lib)?([\w-]+)\.(?:so|dylib|dll)")


@dataclass(frozen=True)
class BuildInfo:
    """A build folder. `finished` False: it was interrupted or failed, and is built on when asked.

    `options` are those of cmake that moequant sets, by name; `backends` is what the library says
    of itself, `{"version", "backends": [{"name", "devices"}]}`, or why it says nothing.
    """

    folder: Path
    finished: bool
    options: dict[str, str]
    tools: tuple[str, ...]
    libraries: tuple[str, ...]
    backends: dict[str, Any] | str
    nbytes: int


@dataclass(frozen=True)
class TreeInfo:
    """A source tree and its builds; `own` is the user's folder that it was copied from.

    `commit` None: not known. `patches` is (name, purpose) of each, in order. `current`: the pin and
    the series are those of this moequant.
    """

    source: Path
    commit: str | None
    own: Path | None
    patches: tuple[tuple[str, str], ...]
    current: bool
    nbytes: int
    builds: tuple[BuildInfo, ...]


@dataclass(frozen=True)
class RuntimeInfo:
    """The cache's folder, the pin, how many patches moequant brings, and what was made of them."""

    folder: Path
    pin: Pin
    series: int
    series_hash: str | None
    trees: tuple[TreeInfo, ...]


def runtime_info() -> RuntimeInfo:
    """All of the cache; every build's library is loaded in a process of its own and asked."""
    folder, pin, series = runtime_directory(), read_pin(), read_series()
    key = series_hash(series) if series else None
    current = {folder / pin.commit / "source"}
    if key is not None:
        current.add(folder / pin.commit / f"patched-{key}" / "source")
    sources = [*folder.glob("*/source"), *folder.glob("*/patched-*/source")]
    trees = tuple(_tree(path, path in current) for path in sorted(sources) if path.is_dir())
    return RuntimeInfo(folder, pin, len(series), key, trees)


def _tree(source: Path, current: bool) -> TreeInfo:
    made = _made_of(source)
    own = made.get("own")
    patches = tuple((str(p["name"]), str(p["purpose"])) for p in made.get("patches", ()))
    builds = tuple(_build(path) for path in sorted(source.parent.glob("build-*")) if path.is_dir())
    return TreeInfo(source, made.get("commit"), None if own is None else Path(own), patches,
                    current, _size(source), builds)  # fmt: skip


def _made_of(source: Path) -> dict[str, Any]:
    """`source.json`; an earlier moequant kept none beside the pinned source, which is its folder's
    name."""
    try:
        data = json.loads(source.with_name("source.json").read_text("utf-8"))
    except (OSError, ValueError):
        data = None
    return data if isinstance(data, dict) else {"commit": _commit_of(source.parent.name)}


def _commit_of(name: str) -> str | None:
    return name if re.fullmatch(r"[0-9a-f]{7,40}", name) else None


def _build(folder: Path) -> BuildInfo:
    record = read_record(folder.with_suffix(".json"))
    binaries = folder / "bin"
    names = sorted(path.name for path in binaries.glob("*") if path.is_file())
    libraries = sorted({match[1] for match in map(_LIBRARY.fullmatch, names) if match})
    tools = tuple(name.removesuffix(".exe") for name in names if _is_program(binaries / name))
    finished = record.state == "built" if record else bool(tools)
    return BuildInfo(folder, finished, _options(folder), tools, tuple(libraries),
                     _backends(binaries), _size(folder))  # fmt: skip


def _is_program(path: Path) -> bool:
    if os.name == "nt":
        return path.suffix == ".exe"
    return ".so" not in path.name and path.suffix != ".dylib" and os.access(path, os.X_OK)


def _options(folder: Path) -> dict[str, str]:
    """What cmake has for the options that moequant sets; empty before it ran."""
    try:
        found = dict(_CACHED.findall((folder / "CMakeCache.txt").read_text("utf-8", "replace")))
    except OSError:
        return {}
    names = [option[2:].partition("=")[0] for option in (*CMAKE_OPTIONS, *MORE_OPTIONS)]
    names += ["LLAMA_BUILD_COMMIT", "GGML_CUDA"]
    return {name: found[name] for name in dict.fromkeys(names) if name in found}


def _backends(binaries: Path) -> dict[str, Any] | str:
    for name in ("libggml.so", "libggml.dylib", "ggml.dll"):
        if (binaries / name).is_file():
            return ask_backends(binaries / name)
    return "no ggml library was built"


def _size(folder: Path) -> int:
    """Bytes of all files below; links count nothing."""
    return sum(entry.stat(follow_symlinks=False).st_size for entry in _files(folder))


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                yield entry
