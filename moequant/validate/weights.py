"""The tensors of a file that a case needs: which ones, which part of them, their bytes and values.

Owns: finding the distinct expert tensors and layers, and reading slices of them: experts and rows,
and for a branch a slice of the experts' width. Leaves out: kernels.

Slices are real rows of the file. A tensor's case has every expert and as many of its rows as are
asked for, half from the start and half from the end. A branch's case has experts spread evenly,
each with the first columns of its width, and the dense part's first columns likewise: what is left
is a smaller MoE branch whose every number is the file's.
"""

import math
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import gguf
import numpy as np
import numpy.typing as npt

from moequant.expert_banks import ExpertBanks, read_banks
from moequant.gguf_file import GGUFFile, GGUFTensor

TENSOR_VALUES = 1 << 22  # of a tensor's case, unless told otherwise
BRANCH_VALUES = 1 << 23  # of the experts of a branch's case
LEAST_ROWS = 32
ROW_STEP = 32  # what repacking and tiling kernels ask for divides this
BRANCH_WIDTH = 256
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate_up|gate|up|down)_exps(?:\.bank\d+)?\.weight")
KINDS = ("gate_up", "gate", "up", "down")
DENSE = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
VECTORS = ("ffn_norm.weight", "post_ffw_norm_1.weight", "pre_ffw_norm_2.weight",
           "post_ffw_norm_2.weight", "ffn_gate_inp.scale", "ffn_down_exps.scale")  # fmt: skip
ROUTER = "ffn_gate_inp.weight"
FAMILIES = ("gemma4", "qwen3moe")  # whose branch is known


@dataclass(frozen=True)
class Weight:
    """Part of a tensor: `data` is uint8 [(experts,) rows, row bytes]."""

    name: str
    qtype: str
    data: npt.NDArray[np.uint8]
    shape: tuple[int, ...]

    @property
    def type_id(self) -> int:
        return int(gguf.GGMLQuantizationType[self.qtype])

    @cached_property
    def values(self) -> npt.NDArray[np.float64]:
        """By gguf-py's decoder; NotImplementedError for a type that it cannot decode."""
        flat = self.data.reshape(-1, self.data.shape[-1])
        decoded = gguf.quants.dequantize(flat, gguf.GGMLQuantizationType[self.qtype])
        return np.asarray(decoded, np.float64).reshape(self.shape)


@dataclass(frozen=True)
class Stack:
    """The experts of one kind, in one tensor or in banks; `ids[b]` are the experts of bank b."""

    banks: tuple[Weight, ...]
    ids: tuple[tuple[int, ...], ...]

    def values(self, expert: int) -> npt.NDArray[np.float64]:
        for bank, ids in zip(self.banks, self.ids, strict=True):
            if expert in ids:
                return np.asarray(bank.values[ids.index(expert)])
        raise KeyError(expert)

    @property
    def table(self) -> npt.NDArray[np.int32]:
        """The map from experts to matrices, [banks, experts], -1 where not in the bank."""
        table = np.full((len(self.banks), sum(map(len, self.ids))), -1, np.int32)
        for bank, ids in enumerate(self.ids):
            table[bank, list(ids)] = range(len(ids))
        return table


@dataclass(frozen=True)
class Branch:
    """A layer's MoE branch: its stacks by kind, and its other tensors by the name in the layer."""

    family: str
    eps: float
    k: int
    scale: float
    stacks: Mapping[str, Stack]
    others: Mapping[str, Weight]
    all_columns: int  # the experts' width in the file

    @property
    def n_experts(self) -> int:
        return self.others[ROUTER].shape[0]

    @property
    def columns(self) -> int:
        """The experts' width here."""
        return self.stacks["down"].banks[0].shape[-1]

    @property
    def width(self) -> int:
        """Of the model: the length of a token's input."""
        return self.others[ROUTER].shape[1]


def expert_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """All stacks of experts, or banks of them, by name."""
    return {name: tensor for name, tensor in file.tensors.items() if EXPERTS.fullmatch(name)}


def distinct_tensors(file: GGUFFile) -> list[GGUFTensor]:
    """The first expert tensor of each type, shape and use."""
    found: dict[Hashable, GGUFTensor] = {}
    for name, tensor in expert_tensors(file).items():
        found.setdefault((tensor.qtype, tensor.shape, is_down(name)), tensor)
    return list(found.values())


def is_down(name: str) -> bool:
    """Whether each slot has an input of its own, as a down projection's."""
    return "ffn_down" in name


def distinct_layers(file: GGUFFile) -> list[int]:
    """The first MoE layer of each set of types and shapes; empty where the family is not known."""
    if file.metadata.get("general.architecture") not in FAMILIES:
        return []
    layers = sorted({int(m[1]) for name in file.tensors if (m := EXPERTS.fullmatch(name))})
    found: dict[Hashable, int] = {}
    for layer in layers:
        found.setdefault(_layer_key(file, layer), layer)
    return list(found.values())


def _layer_key(file: GGUFFile, layer: int) -> Hashable:
    prefix = f"blk.{layer}."
    own = (t for name, t in file.tensors.items() if name.startswith(f"{prefix}ffn_"))
    return tuple(sorted((t.name.removeprefix(prefix), t.qtype, t.shape) for t in own))


def expert_counts(file: GGUFFile) -> tuple[int, int]:
    """(experts, experts per token) by the file's keys; 0 where it has none."""
    architecture = file.metadata.get("general.architecture")
    counts = [file.metadata.get(f"{architecture}.expert{key}_count") for key in ("", "_used")]
    first, second = (max(c) if isinstance(c, list) else int(c or 0) for c in counts)
    return first, second


def read_tensor(file: GGUFFile, name: str, rows: int | None, experts: int | None) -> Weight:
    """A stack, with all experts and as many rows as TENSOR_VALUES allow unless told; 0 is all."""
    n_experts, n_rows, cols = file.tensors[name].shape
    kept = _spread(n_experts, experts or n_experts)
    if rows is None:
        fit = max(LEAST_ROWS, TENSOR_VALUES // (len(kept) * cols))
        rows = n_rows if fit >= n_rows else fit // ROW_STEP * ROW_STEP
    return _read(file, name, kept, _both_ends(n_rows, rows or n_rows))


def read_branch(file: GGUFFile, layer: int, experts: int | None, width: int | None) -> Branch:
    """The layer's branch, with as many experts as BRANCH_VALUES allow unless told; 0 is all."""
    family = str(file.metadata["general.architecture"])
    prefix = f"blk.{layer}."
    n_experts, n_embd = file.tensors[prefix + ROUTER].shape
    k = expert_counts(file)[1]
    banks = read_banks(file)
    down = (
        banks.get(f"{prefix}ffn_down_exps.weight") or file.tensors[f"{prefix}ffn_down_exps.weight"]
    )
    n_ff = down.shape[-1]
    columns = _columns(n_ff, width, _types(down))
    if experts is None:
        experts = max(2 * k, BRANCH_VALUES // (3 * n_embd * columns))
    kept = _spread(n_experts, max(k, experts or n_experts))
    stacks = {}
    for kind in KINDS:
        name = f"{prefix}ffn_{kind}_exps.weight"
        if name in file.tensors or name in banks:
            stacks[kind] = _read_stack(file, banks.get(name), name, kept, n_ff, columns)
    others = {
        name: _whole(file, prefix + name) for name in VECTORS if prefix + name in file.tensors
    }
    others[ROUTER] = _read_router(file, prefix + ROUTER, kept)
    if "ffn_down_exps.scale" in others:
        others["ffn_down_exps.scale"] = _take(others["ffn_down_exps.scale"], kept)
    others |= _read_dense(file, prefix, width)
    eps = float(file.metadata[f"{family}.attention.layer_norm_rms_epsilon"])
    scale = float(file.metadata.get(f"{family}.expert_weights_scale") or 1.0)
    return Branch(family, eps, k, 1.0 if family == "gemma4" else scale, stacks, others, n_ff)


def _types(stack: ExpertBanks | GGUFTensor) -> tuple[str, ...]:
    return stack.qtypes if isinstance(stack, ExpertBanks) else (stack.qtype,)


def _columns(full: int, asked: int | None, qtypes: tuple[str, ...]) -> int:
    """How many of `full` columns: whole blocks of all types; all of them where asked is 0."""
    wanted = BRANCH_WIDTH if asked is None else asked or full
    sizes = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]][0] for qtype in qtypes]
    step = math.lcm(*sizes, ROW_STEP)
    fit = -(-wanted // step) * step
    return full if fit >= full else fit


def _spread(full: int, wanted: int) -> npt.NDArray[np.intp]:
    return np.linspace(0, full - 1, min(full, wanted)).round().astype(np.intp)


def _both_ends(full: int, wanted: int) -> npt.NDArray[np.intp]:
    head = min(wanted, full) - min(wanted, full) // 2
    return np.asarray(np.r_[0:head, full - min(wanted, full) // 2 : full], np.intp)


def _read(
    file: GGUFFile, name: str, experts: npt.NDArray[np.intp], rows: npt.NDArray[np.intp]
) -> Weight:
    tensor = file.tensors[name]
    _, n_rows, cols = tensor.shape
    row_bytes = tensor.nbytes // (tensor.shape[0] * n_rows)
    per_expert = n_rows * row_bytes
    data = np.stack([
        file.read(name, e * per_expert, (e + 1) * per_expert).reshape(n_rows, row_bytes)[rows]
        for e in map(int, experts)
    ])  # fmt: skip
    return Weight(name, tensor.qtype, data, (len(experts), len(rows), cols))


def _read_stack(
    file: GGUFFile,
    banks: ExpertBanks | None,
    name: str,
    kept: npt.NDArray[np.intp],
    n_ff: int,
    columns: int,
) -> Stack:
    rows = np.arange(file.tensors[name].shape[1] if banks is None else banks.shape[1])
    if name.endswith("gate_up_exps.weight"):
        rows = np.r_[0:columns, n_ff : n_ff + columns]
    elif not is_down(name):
        rows = rows[:columns]
    members: dict[str, list[tuple[int, int]]] = {}  # tensor → (position in kept, index in it)
    for position, expert in enumerate(map(int, kept)):
        tensor, index = (name, expert) if banks is None else _place(banks, expert)
        members.setdefault(tensor, []).append((position, index))
    weights = [_read(file, tensor, np.array([i for _, i in own]), rows)
               for tensor, own in members.items()]  # fmt: skip
    if is_down(name):
        weights = [_cut(weight, columns) for weight in weights]
    ids = tuple(tuple(position for position, _ in own) for own in members.values())
    return Stack(tuple(weights), ids)


def _place(banks: ExpertBanks, expert: int) -> tuple[str, int]:
    tensor, index = banks.place(expert)
    return tensor.name, index


def _cut(weight: Weight, columns: int) -> Weight:
    """The first columns, whole blocks of them."""
    nbytes = weight.data.shape[-1] * columns // weight.shape[-1]
    shape = (*weight.shape[:-1], columns)
    return Weight(weight.name, weight.qtype, np.ascontiguousarray(weight.data[..., :nbytes]), shape)


def _take(weight: Weight, kept: npt.NDArray[np.intp]) -> Weight:
    """Values `kept` of a vector of float32."""
    values = weight.data.view(np.float32)[kept]
    return Weight(weight.name, weight.qtype, values.view(np.uint8), (len(kept),))


def _whole(file: GGUFFile, name: str) -> Weight:
    tensor = file.tensors[name]
    rows = math.prod(tensor.shape[:-1])
    data = file.read(name)
    return Weight(name, tensor.qtype, data.reshape(rows, -1) if rows > 1 else data, tensor.shape)


def _read_router(file: GGUFFile, name: str, kept: npt.NDArray[np.intp]) -> Weight:
    whole = _whole(file, name)
    return Weight(name, whole.qtype, whole.data[kept], (len(kept), whole.shape[1]))


def _read_dense(file: GGUFFile, prefix: str, width: int | None) -> dict[str, Weight]:
    """The dense branch beside the experts, where there is one."""
    gate, up, down = (prefix + name for name in DENSE)
    if down not in file.tensors:
        return {}
    columns = _columns(file.tensors[down].shape[1], width, (file.tensors[down].qtype,))
    cut = {DENSE[2]: _cut(_whole(file, down), columns)}
    for short, name in zip(DENSE, (gate, up), strict=False):
        whole = _whole(file, name)
        cut[short] = Weight(name, whole.qtype, whole.data[:columns], (columns, whole.shape[1]))
    return cut
