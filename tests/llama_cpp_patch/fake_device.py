"""A second device for tests: `device/fake_device.cpp`, compiled against a built llama.cpp, cached.

Owns: compiling it, and ggml-base again with parts of patch 0002 switched off, so that a test can
show what they are there for; the environment that loads them; the device's log. Leaves out: what
the device does, which its source says, and what should come out.

llama.cpp loads the device by `GGML_BACKEND_PATH` when `--device Fake0` names it. The other
ggml-base is preloaded: it has the same soname, so everything else takes it for the one it needs.
"""

import hashlib
import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from moequant.runtime.llama_cpp import LlamaCpp, cache_directory, read_pin

DEVICE = Path(__file__).parent / "device" / "fake_device.cpp"
SWITCH = "WITHOUT"
WITHOUT = f"""
#include <stdlib.h>
static bool has(const char * part) {{
    const char * without = getenv("{SWITCH}");
    return !without || strcmp(without, part) != 0;
}}
"""
# what is there exactly once in ggml-backend.cpp, what replaces it
CHANGES = (
    ("bool ggml_backend_dev_supports_op(", WITHOUT + "bool ggml_backend_dev_supports_op("),
    ("if (ggml_mul_mat_id_skips(op) &&\n", 'if (has("gate") && ggml_mul_mat_id_skips(op) &&\n'),
    ("if (id < 0 && ggml_mul_mat_id_skips(node)) {",
     'if (has("ids") && id < 0 && ggml_mul_mat_id_skips(node)) {'),
    ("while (id < n_expert && !ggml_bitset_get(used_ids.data(), id)) {",
     'while ((!has("empty") || id < n_expert) && !ggml_bitset_get(used_ids.data(), id)) {'),
)  # fmt: skip

SERVER = """
import ctypes, sys
address, ggml, rpc, device = (argument.encode() for argument in sys.argv[1:])
library = ctypes.CDLL(ggml.decode())
library.ggml_backend_load.restype = library.ggml_backend_dev_by_name.restype = ctypes.c_void_p
assert library.ggml_backend_load(rpc) and library.ggml_backend_load(device)
devices = (ctypes.c_void_p * 1)(library.ggml_backend_dev_by_name(b"Fake0"))
ctypes.CDLL(rpc.decode()).ggml_backend_rpc_start_server(
    address, None, ctypes.c_size_t(1), ctypes.c_size_t(1), devices)
"""


def fake_device(llama_cpp: LlamaCpp) -> Path:
    """The device's library."""
    ggml = llama_cpp.source / "ggml"
    compile_it = [
        "c++", "-std=c++17", "-O1", "-Wall", "-Wno-unused-function", "-fPIC", "-shared",
        f"-I{ggml / 'include'}", f"-I{ggml / 'src'}", "-x", "c++", "-", "-o", "libfake-device.so",
        f"-L{llama_cpp.binaries}", "-lggml", "-lggml-base",
    ]  # fmt: skip
    return _cached("libfake-device.so", DEVICE.read_text("utf-8"), compile_it)


def base_with_switches(llama_cpp: LlamaCpp) -> Path:
    """ggml-base with `CHANGES`; the variable `WITHOUT` names the part that is off."""
    build = llama_cpp.binaries.parent
    found = [entry for entry in json.loads((build / "compile_commands.json").read_text("utf-8"))
             if entry["file"].endswith("/ggml/src/ggml-backend.cpp")]  # fmt: skip
    assert len(found) == 1, found
    text = Path(found[0]["file"]).read_text("utf-8")
    for old, new in CHANGES:
        assert text.count(old) == 1, (old, text.count(old))
        text = text.replace(old, new)
    words = shlex.split(found[0]["command"])
    out = words.index("-o")
    unchanged = build / words[out + 1]
    objects = sorted(str(path) for path in unchanged.parent.glob("*.o") if path != unchanged)
    compile_it = [*words[:out], "-x", "c++", "-", "-c", "-o", "changed.o"]
    link = ["c++", "-shared", "-fopenmp", "-Wl,-soname,libggml-base.so.0", *objects, "changed.o",
            "-o", "libggml-base.so"]  # fmt: skip
    return _cached("libggml-base.so", text, compile_it, link)


def rpc_backend(llama_cpp: LlamaCpp) -> Path:
    """llama.cpp's own RPC backend, client and server, which the usual build leaves out."""
    ggml = llama_cpp.source / "ggml"
    folder = ggml / "src" / "ggml-rpc"
    compile_it = [
        "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-DGGML_BACKEND_DL", "-DGGML_BACKEND_BUILD",
        "-DGGML_BACKEND_SHARED", f"-I{ggml / 'include'}", f"-I{ggml / 'src'}",
        str(folder / "ggml-rpc.cpp"), str(folder / "transport.cpp"), "-o", "libggml-rpc.so",
        f"-L{llama_cpp.binaries}", "-lggml", "-lggml-base",
    ]  # fmt: skip
    return _cached("libggml-rpc.so", "", compile_it)


@contextmanager
def rpc_server(llama_cpp: LlamaCpp) -> Iterator[str]:
    """A server that computes on the device, in a process of its own; gives host:port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    libraries = (llama_cpp.library("ggml"), rpc_backend(llama_cpp), fake_device(llama_cpp))
    command = [sys.executable, "-c", SERVER, address, *map(str, libraries)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            _wait_for(address, server)
            yield address
        finally:
            server.kill()


def _wait_for(address: str, server: "subprocess.Popen[bytes]") -> None:
    host, port = address.split(":")
    for _ in range(300):
        assert server.poll() is None, "the RPC server ended"
        with suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.1)
    raise AssertionError(f"no RPC server at {address}")


def _cached(name: str, source: str, *commands: list[str]) -> Path:
    """The library `name`, made once by `commands`, which find `source` on their standard input."""
    key = hashlib.sha256(repr((name, source, commands)).encode()).hexdigest()[:16]
    root = cache_directory() / "llama.cpp" / read_pin().commit / "fake-device"
    root.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(root / f"{key}.lock"):
        if not (root / key).is_dir():
            made = Path(tempfile.mkdtemp(dir=root))
            for words in commands:
                run = subprocess.run(
                    words, input=source, capture_output=True, text=True, cwd=made, check=False
                )
                assert run.returncode == 0, run.stderr[-3000:]
            made.rename(root / key)
    return root / key / name


@dataclass(frozen=True)
class MatMul:
    """A MUL_MAT_ID that ran on the device.

    `device` ran it. `weight` is the tensor's name without what the scheduler put around it. `copy`:
    the weight lives elsewhere, and the experts `copied` came over for this op alone. `used`: the
    experts that the ids name. `skipped`: how many ids are negative.
    """

    device: str
    weight: str
    copy: bool
    tokens: int
    skips: bool
    skipped: int
    used: tuple[int, ...]
    copied: tuple[int, ...]


def read_log(path: Path) -> list[MatMul]:
    """What the device computed; nothing if it was never asked to."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [_mat_mul(**json.loads(line)) for line in lines]


def _mat_mul(weight: str, used: list[int], copied: list[int], **rest: Any) -> MatMul:
    name = re.sub(r"^Fake\d#(.*)#\d$", r"\1", weight)
    return MatMul(weight=name, used=tuple(used), copied=tuple(copied), **rest)
