"""The emulated kernels from Python: arrays in, arrays out, the emulation's errors as exceptions.

Owns: the functions of `harness.cpp`. Leaves out: what is right.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

BLOCK_Q8_1_MMQ = 144  # bytes, for 128 values
VECTOR_Q, VECTOR_F, OP = 0, 1, 2
SWIGLU, GEGLU, SWIGLU_OAI, SWIGLU_CLAMP = 2, 1, 3, 6  # ggml_glu_op

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class EmulationError(Exception):
    """What a kernel did that CUDA does not define, in the emulation's words."""


@dataclass(frozen=True)
class Run:
    """One order of threads and blocks, and what memory holds that nobody has written."""

    schedule: int = 0
    poison: int = 0x7F7F7F7F


class _Settings(ctypes.Structure):
    _fields_ = (
        ("schedule", ctypes.c_uint), ("poison", ctypes.c_uint32), ("slack", ctypes.c_uint32),
    )  # fmt: skip


class _MulMatId(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int) for name in (
            "kernel", "type", "cols", "rows", "n_experts", "n_used", "n_tokens", "slots_y",
            "ids_stride", "skip", "glu")),
        ("limit", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in (
            "matrices", "gate", "bias", "gate_bias", "y", "ids", "result")),
    )  # fmt: skip


def _pointer(array: npt.NDArray[Any] | None) -> ctypes.c_void_p:
    assert array is None or array.flags.c_contiguous
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


def type_number(name: str) -> int:
    return int(gguf.GGMLQuantizationType[name])


@dataclass(frozen=True)
class Experts:
    """Matrices of one type, `data` uint8 [n_experts, rows, bytes], with their values in float32."""

    qtype: str
    data: npt.NDArray[np.uint8]
    values: Floats  # [n_experts, rows, cols]


class Kernels:
    """One library that `build.emulated` made.

    slack: bytes behind memory of ggml's pool that the kernels may read.
    """

    def __init__(self, library: Path, slack: int = 0) -> None:
        self._library = ctypes.CDLL(str(library))
        self._slack = slack

    def mm_ids(
        self, run: Run, ids: Ints, n_experts: int, nchannels_y: int, sis1: int,
        write_inverse: bool, stride: int,
    ) -> tuple[Ints, Ints, Ints]:  # fmt: skip
        """ids_src1, ids_dst and expert_bounds of ids [n_tokens, n_used], rows `stride` apart."""
        n_tokens, n_used = ids.shape
        flat = _strided(ids, stride)
        src1, dst = np.empty(ids.size, np.int32), np.empty(ids.size, np.int32)
        bounds = np.empty(n_experts + 1, np.int32)
        self._call("emu_mm_ids", run, _pointer(flat), flat.size, _pointer(src1), _pointer(dst),
                   _pointer(bounds), n_experts, n_tokens, n_used, nchannels_y, stride, sis1,
                   ctypes.c_bool(write_inverse))  # fmt: skip
        return src1, dst, bounds

    def quantize_mmq(
        self, run: Run, qtype: str, x: Floats, ids: Ints, rows: int, *, scatter: bool
    ) -> npt.NDArray[np.uint8]:
        """Blocks [cols/128, rows, 144]; x [n, cols]; ids [rows], or with scatter [n, n_used]."""
        cols = x.shape[1]
        padded = -(-cols // 512) * 512
        y = np.empty((padded // 128, rows, BLOCK_Q8_1_MMQ), np.uint8)
        n_used = ids.shape[1] if scatter else 0
        size = ctypes.c_int64
        self._call("emu_quantize_mmq", run, type_number(qtype), _pointer(x), size(x.size),
                   _pointer(ids), size(ids.size), _pointer(y), size(cols), size(cols), size(padded),
                   size(rows), ctypes.c_bool(scatter), size(len(x)), n_used)  # fmt: skip
        return y

    def mul_mat_id(
        self, run: Run, kernel: int, experts: Experts, y: Floats, ids: Ints, *, skip: bool,
        stride: int | None = None, gate: Experts | None = None, bias: Floats | None = None,
        gate_bias: Floats | None = None, glu: int = SWIGLU, limit: float = 0.0,
    ) -> Floats:  # fmt: skip
        """Rows [n_tokens, n_used, rows]; y [n_tokens, 1 or n_used, cols]."""
        n_tokens, n_used = ids.shape
        n_experts, rows, cols = experts.values.shape
        flat = _strided(ids, n_used if stride is None else stride)
        result = np.empty((n_tokens, n_used, rows), np.float32)
        call = _MulMatId(
            kernel, type_number(experts.qtype), cols, rows, n_experts, n_used, n_tokens,
            y.shape[1], n_used if stride is None else stride, skip, glu, limit,
            _pointer(experts.data), _pointer(None if gate is None else gate.data), _pointer(bias),
            _pointer(gate_bias), _pointer(y), _pointer(flat), _pointer(result),
        )  # fmt: skip
        self._call("emu_mul_mat_id", run, ctypes.byref(call))
        return result

    def fuses(
        self, run: Run, qtype: str, *, skip_up: bool, skip_gate: bool
    ) -> tuple[bool, bool, bool]:
        """Whether products of one token may be fused: two with their GLU; one with what follows,
        by mul_mat_vec_f, by mul_mat_vec_q."""
        answers = np.empty(3, np.int32)
        self._call("emu_fuses", run, type_number(qtype), ctypes.c_bool(skip_up),
                   ctypes.c_bool(skip_gate), _pointer(answers))  # fmt: skip
        pair, vector_f, vector_q = (bool(answer) for answer in answers)
        return pair, vector_f, vector_q

    def fault(self, run: Run, number: int) -> Ints:
        """What the kernel `number` of faults.cu writes: 64 numbers."""
        result = np.empty(64, np.int32)
        self._call("emu_fault", run, number, _pointer(result))
        return result

    def _call(self, name: str, run: Run, *arguments: Any) -> None:
        function = self._library[name]
        function.restype = ctypes.c_char_p
        settings = _Settings(run.schedule, run.poison, self._slack)
        error = function(ctypes.byref(settings), *arguments)
        if error is not None:
            raise EmulationError(error.decode(errors="replace"))


def _strided(ids: Ints, stride: int) -> Ints:
    """ids with rows `stride` apart; what lies between is an id that no expert has."""
    wide = np.full((len(ids), stride), 0x7F7F7F7F, np.int32)
    wide[:, : ids.shape[1]] = ids
    return np.ascontiguousarray(wide.reshape(-1)[: (len(ids) - 1) * stride + ids.shape[1]])
