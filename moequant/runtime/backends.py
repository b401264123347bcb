"""Asks a ggml library which backends and devices it has; run as a program, for it may abort.

Owns: that question, and the child process that asks it. Leaves out: computing anything. As a
program it prints JSON: `{"version": …, "backends": [{"name": …, "devices": […]}]}`. It imports
nothing of moequant then, so that it starts at once.

Source: `ggml/include/ggml-backend.h`, the functions of the registry.
"""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SECONDS = 60.0  # a GPU's driver may take long to start


def ask_backends(library: Path) -> dict[str, Any] | str:
    """What `library` (libggml) says of itself, or why it says nothing."""
    command = [sys.executable, str(Path(__file__).resolve()), str(library)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS
        )
        # libraries may print on stdout, too; the answer is the last line
        found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"{library.name} gave no answer in {SECONDS:.0f} s"
    except (IndexError, ValueError):
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return f"{library.name} ended with {result.returncode}: {last}"
    return found


def read_registry(library: Path) -> dict[str, Any]:
    """Load the library into this process and list its backends with their devices."""
    if hasattr(os, "add_dll_directory"):
        os.add_dll_directory(str(library.parent))
    ggml = ctypes.CDLL(str(library))
    pointers = ("ggml_backend_reg_get", "ggml_backend_reg_dev_get")
    texts = ("ggml_backend_reg_name", "ggml_backend_dev_name", "ggml_backend_dev_description")
    counts = ("ggml_backend_reg_count", "ggml_backend_reg_dev_count")
    for names, kind in ((pointers, ctypes.c_void_p), (texts, ctypes.c_char_p),
                        (counts, ctypes.c_size_t)):  # fmt: skip
        for name in names:
            getattr(ggml, name).restype = kind
    ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_load_all_from_path(os.fsencode(library.parent))
    backends = []
    for i in range(ggml.ggml_backend_reg_count()):
        backend = ctypes.c_void_p(ggml.ggml_backend_reg_get(ctypes.c_size_t(i)))
        devices = [ctypes.c_void_p(ggml.ggml_backend_reg_dev_get(backend, ctypes.c_size_t(k)))
                   for k in range(ggml.ggml_backend_reg_dev_count(backend))]  # fmt: skip
        backends.append({
            "name": _text(ggml.ggml_backend_reg_name(backend)),
            "devices": [{"name": _text(ggml.ggml_backend_dev_name(device)),
                         "description": _text(ggml.ggml_backend_dev_description(device))}
                        for device in devices],
        })  # fmt: skip
    return {"version": _version(ggml), "backends": backends}


def _version(ggml: ctypes.CDLL) -> str | None:
    """The version that libggml-base gives, where it has that function."""
    version = getattr(ggml, "ggml_version", None)
    if version is None:
        return None
    version.restype = ctypes.c_char_p
    return _text(version())


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", "replace").strip()


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(read_registry(Path(sys.argv[1]))) + "\n")
