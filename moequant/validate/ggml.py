"""ggml's C API through ctypes: libraries, devices, buffers, tensors, graphs.

Owns: the calls and their signatures. Leaves out: what is computed (`graphs`) and every judgement.
All objects of ggml are opaque pointers here, so that struct layouts of one version do not matter;
only `ggml_init_params` goes by value. A failed GGML_ASSERT aborts the process.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moequant.errors import LlamaCppError

Pointer = int  # the address of a ggml object
POISON = 0xFF  # as float a NaN, as int32 -1
F32, I32 = 0, 26  # of ggml_type, fixed by the GGUF format
SORT_DESCENDING = 1
USAGE_WEIGHTS = 1
META_DEVICE = 4
P, N, L, F, S = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_char_p)
Z = ctypes.c_size_t
MAX_TENSORS = 1024
SKIP_SETTER = "ggml_mul_mat_id_set_skip"


class InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", Z), ("mem_buffer", P), ("no_alloc", ctypes.c_bool))


SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (P, (InitParams,)),
    "ggml_free": (None, (P,)),
    "ggml_tensor_overhead": (Z, ()),
    "ggml_graph_overhead": (Z, ()),
    "ggml_new_graph": (P, (P,)),
    "ggml_build_forward_expand": (None, (P, P)),
    "ggml_graph_n_nodes": (N, (P,)),
    "ggml_graph_node": (P, (P, N)),
    "ggml_new_tensor_4d": (P, (P, N, L, L, L, L)),
    "ggml_nbytes": (Z, (P,)),
    "ggml_type_name": (S, (N,)),
    "ggml_mul_mat": (P, (P, P, P)),
    "ggml_mul_mat_id": (P, (P, P, P, P)),
    "ggml_add": (P, (P, P, P)),
    "ggml_add_id": (P, (P, P, P, P)),
    "ggml_mul": (P, (P, P, P)),
    "ggml_div": (P, (P, P, P)),
    "ggml_scale": (P, (P, P, F)),
    "ggml_clamp": (P, (P, P, F, F)),
    "ggml_cont": (P, (P, P)),
    "ggml_rms_norm": (P, (P, P, F)),
    "ggml_soft_max": (P, (P, P)),
    "ggml_sum_rows": (P, (P, P)),
    "ggml_argsort": (P, (P, P, N)),
    "ggml_get_rows": (P, (P, P, P)),
    "ggml_repeat_4d": (P, (P, P, L, L, L, L)),
    "ggml_reshape_1d": (P, (P, P, L)),
    "ggml_reshape_2d": (P, (P, P, L, L)),
    "ggml_reshape_3d": (P, (P, P, L, L, L)),
    "ggml_view_2d": (P, (P, P, L, L, Z, Z)),
    "ggml_view_3d": (P, (P, P, L, L, L, Z, Z, Z)),
    "ggml_swiglu_split": (P, (P, P, P)),
    "ggml_geglu_split": (P, (P, P, P)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, (P, P)),
    "ggml_backend_buffer_free": (None, (P,)),
    "ggml_backend_buffer_clear": (None, (P, ctypes.c_uint8)),
    "ggml_backend_buffer_set_usage": (None, (P, N)),
    "ggml_backend_buft_name": (S, (P,)),
    "ggml_backend_dev_count": (Z, ()),
    "ggml_backend_dev_get": (P, (Z,)),
    "ggml_backend_dev_name": (S, (P,)),
    "ggml_backend_dev_description": (S, (P,)),
    "ggml_backend_dev_type": (N, (P,)),
    "ggml_backend_dev_backend_reg": (P, (P,)),
    "ggml_backend_dev_buffer_type": (P, (P,)),
    "ggml_backend_dev_init": (P, (P, S)),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, (P, P)),
    "ggml_backend_reg_name": (S, (P,)),
    "ggml_backend_reg_get_proc_address": (P, (P, S)),
    "ggml_backend_load_all_from_path": (None, (S,)),
    "ggml_backend_graph_compute": (N, (P, P)),
    "ggml_backend_tensor_set": (None, (P, P, Z, Z)),
    "ggml_backend_tensor_get": (None, (P, P, Z, Z)),
}


@dataclass(frozen=True)
class Place:
    """A backend device and one of the buffer types that its weights may lie in."""

    device: str
    buffer: str
    backend: str  # CPU, CUDA, Metal, …
    description: str
    skips: bool  # whether it can be told to skip negative ids

    @property
    def name(self) -> str:
        return f"{self.device}/{self.buffer}"


def library_folder(folder: Path) -> Path:
    """`folder`, or its bin or lib: where libggml-base is.

    Raises:
        LlamaCppError: in none of them.
    """
    for candidate in (folder, folder / "bin", folder / "lib"):
        if _find(candidate, "ggml-base") and _find(candidate, "ggml"):
            return candidate
    raise LlamaCppError(
        f"{folder} holds no shared libraries ggml and ggml-base, nor do its bin and lib: build "
        "llama.cpp with -DBUILD_SHARED_LIBS=ON and give the folder of its binaries."
    )


def _find(folder: Path, name: str) -> Path | None:
    for pattern in (f"lib{name}.so*", f"lib{name}*.dylib", f"{name}.dll"):
        for path in sorted(folder.glob(pattern)):
            if name != "ggml" or not path.name.startswith("libggml-"):
                return path
    return None


class Ggml:
    """ggml, loaded from a folder with all backends that are in it."""

    def __init__(self, folder: Path) -> None:
        self._libraries = [
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml")
            if (path := _find(folder, name)) is not None
        ]
        self._functions = {name: self._function(name) for name in SIGNATURES}
        if self.call("ggml_backend_dev_count") == 0:  # backends are libraries of their own
            self.call("ggml_backend_load_all_from_path", str(folder).encode())
        self._places = dict(self._find_places())
        self._backends: dict[Pointer, Pointer] = {}

    def _symbol(self, name: str) -> Any:
        return next((getattr(lib, name) for lib in self._libraries if hasattr(lib, name)), None)

    def _function(self, name: str) -> Callable[..., Any]:
        function = self._symbol(name)
        if function is None:
            raise LlamaCppError(f"the ggml of this library has no {name}: it is too old or too new")
        function.restype, function.argtypes = SIGNATURES[name]
        return function  # type: ignore[no-any-return]

    def call(self, name: str, *arguments: Any) -> Any:
        return self._functions[name](*arguments)

    @property
    def version(self) -> str:
        function = self._symbol("ggml_version")
        if function is None:
            return "of unknown version"
        function.restype, function.argtypes = S, ()
        return str(function().decode())

    @property
    def places(self) -> list[Place]:
        return list(self._places)

    def device(self, place: Place) -> Pointer:
        return self._places[place][0]

    def buffer_type(self, place: Place) -> Pointer:
        return self._places[place][1]

    def skip(self, place: Place, op: Pointer) -> None:
        """Tells a MUL_MAT_ID of a place that `skips` to skip negative ids."""
        registry = self.call("ggml_backend_dev_backend_reg", self.device(place))
        self._procedure(registry, SKIP_SETTER, None, P)(op)

    def _find_places(self) -> Iterator[tuple[Place, tuple[Pointer, Pointer]]]:
        for index in range(self.call("ggml_backend_dev_count")):
            device = self.call("ggml_backend_dev_get", index)
            if self.call("ggml_backend_dev_type", device) >= META_DEVICE:
                continue
            name = self.call("ggml_backend_dev_name", device).decode()
            text = self.call("ggml_backend_dev_description", device).decode()
            registry = self.call("ggml_backend_dev_backend_reg", device)
            backend = self.call("ggml_backend_reg_name", registry).decode()
            skips = self._procedure(registry, SKIP_SETTER, None, P) is not None
            for buffer_type in self._buffer_types(device, registry):
                buffer = self.call("ggml_backend_buft_name", buffer_type).decode()
                yield Place(name, buffer, backend, text, skips), (device, buffer_type)

    def _buffer_types(self, device: Pointer, registry: Pointer) -> Iterator[Pointer]:
        yield self.call("ggml_backend_dev_buffer_type", device)
        extra = self._procedure(registry, "ggml_backend_dev_get_extra_bufts", ctypes.POINTER(P), P)
        for buffer_type in extra(device) if extra else ():
            if not buffer_type:
                return
            yield buffer_type

    def _procedure(self, registry: Pointer, name: str, result: Any, *arguments: Any) -> Any:
        address = self.call("ggml_backend_reg_get_proc_address", registry, name.encode())
        return ctypes.CFUNCTYPE(result, *arguments)(address) if address else None

    def backend(self, place: Place, threads: int) -> Pointer:
        """The device's backend, started on the first call; set to `threads` where it has any."""
        device = self.device(place)
        if device not in self._backends:
            backend = self.call("ggml_backend_dev_init", device, None)
            if not backend:
                raise LlamaCppError(f"the device {place.device} cannot be started.")
            self._backends[device] = backend
        registry = self.call("ggml_backend_dev_backend_reg", device)
        limit = self._procedure(registry, "ggml_backend_set_n_threads", None, P, N)
        if limit:
            limit(self._backends[device], threads)
        return self._backends[device]

    def knows(self, type_id: int, name: str) -> bool:
        """Whether this ggml has the tensor type under the same number."""
        found = self.call("ggml_type_name", type_id)
        return found is not None and found.decode().lower() == name.lower()


class Context:
    """Tensors that are made together and lie in one buffer."""

    def __init__(self, ggml: Ggml) -> None:
        self.ggml = ggml
        size = MAX_TENSORS * ggml.call("ggml_tensor_overhead") + ggml.call("ggml_graph_overhead")
        self.pointer = ggml.call("ggml_init", InitParams(size, None, True))
        self._buffer: Pointer | None = None

    def tensor(self, type_id: int, shape: tuple[int, ...]) -> Pointer:
        """A tensor of `shape` in torch order (last dimension fastest)."""
        ne = (*reversed(shape), 1, 1, 1)[:4]
        return int(self.ggml.call("ggml_new_tensor_4d", self.pointer, type_id, *ne))

    def op(self, name: str, *arguments: Any) -> Pointer:
        """The tensor `ggml_{name}(…)`."""
        return int(self.ggml.call(f"ggml_{name}", self.pointer, *arguments))

    def allocate(self, buffer_type: Pointer, *, weights: bool = False) -> None:
        """Memory for all tensors made so far."""
        allocate = "ggml_backend_alloc_ctx_tensors_from_buft"
        self._buffer = self.ggml.call(allocate, self.pointer, buffer_type)
        if not self._buffer:
            raise LlamaCppError("no memory for the tensors of the case.")
        if weights:
            self.ggml.call("ggml_backend_buffer_set_usage", self._buffer, USAGE_WEIGHTS)

    def poison(self) -> None:
        """Makes all of the memory NaN."""
        self.ggml.call("ggml_backend_buffer_clear", self._buffer, POISON)

    def set(self, tensor: Pointer, data: npt.NDArray[Any]) -> None:
        """The whole tensor at once, as repacking buffers demand."""
        data = np.ascontiguousarray(data)
        size = self.ggml.call("ggml_nbytes", tensor)
        if size != data.nbytes:
            raise LlamaCppError(f"a tensor of {size} bytes was to be given {data.nbytes}.")
        self.ggml.call("ggml_backend_tensor_set", tensor, data.ctypes.data, 0, size)

    def get(self, tensor: Pointer, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """A float32 tensor's values, `shape` in torch order."""
        out = np.empty(shape, np.float32)
        self.ggml.call("ggml_backend_tensor_get", tensor, out.ctypes.data, 0, out.nbytes)
        return out

    def free(self) -> None:
        if self._buffer:
            self.ggml.call("ggml_backend_buffer_free", self._buffer)
        self.ggml.call("ggml_free", self.pointer)
