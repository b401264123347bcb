"""The tensors of a file that a case needs: which ones, their bytes and their values.

Owns: finding the distinct expert tensors and layers, checking that the file has what they need, and
reading them: for the kernels whole, for the reference matrix by matrix. Leaves out: kernels.

Only what does not fit into memory is cut: a tensor's case then has fewer experts, spread evenly; a
branch's case has all experts with the first columns of their width. Every number is the file's.
"""

import math
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import gguf
import numpy as np
import numpy.typing as npt

from moequant.errors import GGUFError, listing
from moequant.expert_banks import KINDS, ExpertBanks, can_have_banks, read_banks
from moequant.gguf_file import GGUFFile, GGUFTensor

KNOWN_VALUES = 1 << 26  # decoded at once for a branch's reference
STEP = 32  # of a cut width, besides whole blocks
_STACK = rf"blk\.(\d+)\.ffn_(?:{'|'.join(KINDS)})_exps"
EXPERTS = re.compile(rf"{_STACK}(?:\.bank\d+)?\.weight")
BIASES = re.compile(rf"{_STACK}\.bias")
DENSE = ("ffn_gate.weight", "ffn_up.weight", "ffn_down.weight")
ROUTER = "ffn_gate_inp.weight"
SCALE = "ffn_down_exps.scale"  # of each expert; optional
FAMILIES = ("gemma4", "qwen3moe")  # whose branch is known
VECTORS = {
    "gemma4": ("ffn_gate_inp.scale", "pre_ffw_norm_2.weight", "post_ffw_norm_2.weight"),
    "qwen3moe": ("ffn_norm.weight",),
}
DENSE_VECTORS = ("ffn_norm.weight", "post_ffw_norm_1.weight")  # needed where DENSE is there

Index = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Weight:
    """A tensor of the file, or of a stack some matrices, some rows of each and the first columns.

    `shape` is that of what is used.
    """

    file: GGUFFile
    name: str
    shape: tuple[int, ...]
    matrices: Index
    rows: Index
    _decoded: dict[int, npt.NDArray[np.float32]] = field(default_factory=dict, compare=False)

    @property
    def qtype(self) -> str:
        return self.file.tensors[self.name].qtype

    @property
    def type_id(self) -> int:
        return int(gguf.GGMLQuantizationType[self.qtype])

    def data(self) -> npt.NDArray[np.uint8]:
        """All that is used, [matrices, rows, row bytes]."""
        if self.shape == self.file.tensors[self.name].shape:
            return self.file.read(self.name)
        return np.stack([self._matrix(matrix) for matrix in range(len(self.matrices))])

    def values(self, matrix: int = 0) -> npt.NDArray[np.float32]:
        """A matrix, decoded once and kept; NotImplementedError if gguf-py cannot decode it."""
        if matrix not in self._decoded:
            self._decoded[matrix] = self.decode(matrix)
        return self._decoded[matrix]

    def vector(self) -> npt.NDArray[np.float32]:
        """The values of a tensor of one row."""
        return np.asarray(self.values()[0])

    def decode(self, matrix: int, rows: Index | None = None) -> npt.NDArray[np.float32]:
        """`rows` of what is used of a matrix, by gguf-py's decoder."""
        data = self._matrix(matrix)
        data = np.ascontiguousarray(data if rows is None else data[rows])
        return np.asarray(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[self.qtype]))

    def _matrix(self, matrix: int) -> npt.NDArray[np.uint8]:
        tensor = self.file.tensors[self.name]
        count, rows, columns = _dimensions(tensor)
        size = tensor.nbytes // count
        start = int(self.matrices[matrix]) * size
        data = self.file.read(self.name, start, start + size).reshape(rows, -1)
        return data[self.rows, : size // rows * self.shape[-1] // columns]


def _dimensions(tensor: GGUFTensor) -> tuple[int, int, int]:
    """(matrices, rows, columns)"""
    matrices, rows, columns = (1, 1, *tensor.shape)[-3:]
    return matrices, rows, columns


def _whole(file: GGUFFile, name: str) -> Weight:
    tensor = file.tensors[name]
    matrices, rows, _ = _dimensions(tensor)
    return Weight(file, name, tensor.shape, np.arange(matrices), np.arange(rows))


@dataclass(frozen=True)
class Stack:
    """The experts of one kind, in one tensor or in banks; `table[b, e]` is e's matrix, or -1."""

    banks: tuple[Weight, ...]
    table: npt.NDArray[np.int32]

    def values(self, expert: int) -> npt.NDArray[np.float32]:
        bank = int((self.table[:, expert] >= 0).argmax())
        return self.banks[bank].values(int(self.table[bank, expert]))


@dataclass(frozen=True)
class Tensor:
    """A stack of experts or one of its banks, or their biases, of which each is a row.

    `table[e]` is the matrix, or the row, of the layer's expert e.
    """

    weight: Weight
    table: npt.NDArray[np.int32]

    @property
    def part(self) -> str:
        full, used = self.weight.file.tensors[self.weight.name].shape[0], self.weight.shape[0]
        return "whole" if used == full else f"{used} of {full} experts: `--memory`"


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
    def weights(self) -> list[Weight]:
        return [*(bank for stack in self.stacks.values() for bank in stack.banks),
                *self.others.values()]  # fmt: skip

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

    @property
    def known(self) -> Index:
        """The experts that the reference decodes: all, or as many as KNOWN_VALUES allow."""
        count = max(self.k, KNOWN_VALUES // (3 * self.width * self.columns))
        return _spread(self.n_experts, count)

    @property
    def part(self) -> str:
        if self.columns == self.all_columns:
            return "whole"
        return f"{self.columns} of {self.all_columns} columns of the experts' width: `--memory`"


def expert_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """All stacks of experts, or banks of them, by name."""
    return {name: tensor for name, tensor in file.tensors.items() if EXPERTS.fullmatch(name)}


def distinct_tensors(file: GGUFFile) -> list[GGUFTensor]:
    """The first expert tensor of each type, shape and use."""
    found: dict[Hashable, GGUFTensor] = {}
    for name, tensor in expert_tensors(file).items():
        found.setdefault((tensor.qtype, tensor.shape, is_down(name)), tensor)
    return list(found.values())


def bias_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """All biases of experts, by name."""
    return {name: tensor for name, tensor in file.tensors.items() if is_bias(name)}


def distinct_biases(file: GGUFFile) -> list[GGUFTensor]:
    """The first of each shape."""
    found: dict[Hashable, GGUFTensor] = {}
    for tensor in bias_tensors(file).values():
        found.setdefault(tensor.shape, tensor)
    return list(found.values())


def is_bias(name: str) -> bool:
    return BIASES.fullmatch(name) is not None


def is_down(name: str) -> bool:
    """Whether each slot has an input of its own, as a down projection's."""
    return "ffn_down" in name


def moe_layers(file: GGUFFile) -> list[int]:
    """The layers whose branch can be built; none where the family is not known."""
    if file.metadata.get("general.architecture") not in FAMILIES:
        return []
    return sorted({int(m[1]) for name in file.tensors if (m := EXPERTS.fullmatch(name))})


def distinct_layers(file: GGUFFile) -> list[int]:
    """The first MoE layer of each set of types and shapes."""
    found: dict[Hashable, int] = {}
    for layer in moe_layers(file):
        found.setdefault(_layer_key(file, layer), layer)
    return list(found.values())


def _layer_key(file: GGUFFile, layer: int) -> Hashable:
    prefix = f"blk.{layer}."
    own = (t for name, t in file.tensors.items() if name.startswith(f"{prefix}ffn_"))
    return tuple(sorted((t.name.removeprefix(prefix), t.qtype, t.shape) for t in own))


def experts_used(file: GGUFFile) -> int:
    """Experts per token by the file's key, the most where each layer has its own; `check` first."""
    count = file.metadata[f"{file.metadata['general.architecture']}.expert_used_count"]
    return max(count) if isinstance(count, list) else int(count)


def check(file: GGUFFile) -> None:
    """Whether the file has all that its cases need.

    Raises:
        GGUFError: no experts; damaged expert banks; keys or tensors that are missing or do not fit.
    """
    if not expert_tensors(file):
        raise GGUFError(f"{file.path} has no expert tensors: there is nothing to validate.")
    banks = read_banks(file)
    wrong = [*_faults_of_keys(file), *_faults_of_stacks(file, banks)]
    wrong += _faults_of_biases(file, banks)
    for layer in () if wrong else moe_layers(file):
        wrong += _faults_of_branch(file, banks, layer)
    if wrong:
        raise GGUFError(f"{file.path} cannot be validated:{listing(wrong)}")


def _faults_of_keys(file: GGUFFile) -> Iterator[str]:
    family = file.metadata.get("general.architecture")
    key = f"{family}.expert_used_count"
    used = file.metadata.get(key)
    counts = used if isinstance(used, list) and used else [used]
    if any(type(count) is not int or count < 1 for count in counts):
        yield f"{key} is {used!r:.80}, not a count of experts" if key in file.metadata else (
            f"no key {key}")  # fmt: skip
    if family not in FAMILIES:
        return
    numbers = {f"{family}.attention.layer_norm_rms_epsilon": None,
               f"{family}.expert_weights_scale": 1.0}  # fmt: skip
    for key, default in numbers.items():
        value = file.metadata.get(key, default)
        if value is None:
            yield f"no key {key}"
        elif type(value) not in (int, float) or not 0 <= value < math.inf:
            yield f"{key} is {value!r:.80}, not a number of 0 or more"


def _faults_of_stacks(file: GGUFFile, banks: Mapping[str, ExpertBanks]) -> Iterator[str]:
    stacks: dict[str, ExpertBanks | GGUFTensor] = {**banks}
    stacks |= {n: t for n, t in expert_tensors(file).items() if can_have_banks(n)}
    try:
        k = experts_used(file)
    except (KeyError, TypeError, ValueError):
        k = 0  # told by _faults_of_keys
    for name, stack in stacks.items():
        if len(stack.shape) != 3 or 0 in stack.shape:
            yield f"{name}: shape {list(stack.shape)}, expected [experts, rows, in]"
        elif stack.shape[0] < k:
            yield f"{name}: {stack.shape[0]} experts, but expert_used_count is {k}"


def _faults_of_biases(file: GGUFFile, banks: Mapping[str, ExpertBanks]) -> Iterator[str]:
    for name, bias in bias_tensors(file).items():
        stack = _stack(file, banks, name.removesuffix("bias") + "weight")
        if stack is None:
            yield f"{name}: biases of experts that are not there"
        elif bias.qtype != "F32" or bias.shape != stack.shape[:2]:
            yield (f"{name}: {bias.qtype} {list(bias.shape)}, expected F32 "
                   f"{list(stack.shape[:2])}")  # fmt: skip


def _faults_of_branch(
    file: GGUFFile, banks: Mapping[str, ExpertBanks], layer: int
) -> Iterator[str]:
    """What the branch of a layer needs and is not there, or of another shape."""
    prefix, family = f"blk.{layer}.", str(file.metadata["general.architecture"])
    down = _stack(file, banks, f"{prefix}ffn_down_exps.weight")
    router = file.tensors.get(prefix + ROUTER)
    if down is None or router is None:
        missing = ROUTER if router is None else "ffn_down_exps.weight"
        yield f"{prefix}{missing}: missing"
        return
    experts, width, columns = down.shape
    fused = _stack(file, banks, f"{prefix}ffn_gate_up_exps.weight") is not None
    rows = {"gate_up": 2 * columns} if fused else {"gate": columns, "up": columns}
    wanted: dict[str, tuple[int, ...]]
    wanted = {f"ffn_{kind}_exps.weight": (experts, count, width) for kind, count in rows.items()}
    wanted |= {ROUTER: (experts, width)} | dict.fromkeys(VECTORS[family], (width,))
    if prefix + SCALE in file.tensors:
        wanted[SCALE] = (experts,)
    dense = file.tensors.get(prefix + DENSE[2]) if family == "gemma4" else None
    if dense is not None:
        inner = dense.shape[-1]
        wanted |= dict.fromkeys(DENSE_VECTORS, (width,))
        wanted |= {DENSE[0]: (inner, width), DENSE[1]: (inner, width), DENSE[2]: (width, inner)}
    for name, shape in wanted.items():
        found = _stack(file, banks, prefix + name)
        if found is None:
            yield f"{prefix}{name}: missing"
        elif found.shape != shape:
            yield f"{prefix}{name}: shape {list(found.shape)}, expected {list(shape)}"


def _stack(
    file: GGUFFile, banks: Mapping[str, ExpertBanks], name: str
) -> ExpertBanks | GGUFTensor | None:
    return banks.get(name) or file.tensors.get(name)


def read_tensor(file: GGUFFile, name: str, memory: int) -> Tensor:
    """A stack or a bank, all of it if that is no more than `memory` bytes."""
    tensor = file.tensors[name]
    count, rows, columns = tensor.shape
    fit = max(experts_used(file), memory * count // tensor.nbytes)
    matrices = _spread(count, fit)
    weight = Weight(file, name, (len(matrices), rows, columns), matrices, np.arange(rows))
    table = np.full(count, -1, np.int32)
    table[matrices] = np.arange(len(matrices))
    for banks in read_banks(file).values():
        for bank, found in enumerate(banks.banks):
            if found.name == name:
                return Tensor(weight, _table(banks, bank, table))
    return Tensor(weight, table[matrices])


def read_biases(file: GGUFFile, name: str) -> Tensor:
    """All of them."""
    weight = _whole(file, name)
    return Tensor(weight, np.arange(weight.shape[0], dtype=np.int32))


def _table(banks: ExpertBanks, bank: int, table: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Which of the used matrices of a bank each expert of the layer is, or -1."""
    pairs = zip(banks.bank, banks.index, strict=True)
    return np.array([table[index] if its == bank else -1 for its, index in pairs], np.int32)


def read_branch(file: GGUFFile, layer: int, memory: int) -> Branch:
    """The layer's branch, its experts' whole width if they are no more than `memory` bytes."""
    family = str(file.metadata["general.architecture"])
    prefix = f"blk.{layer}."
    banks = read_banks(file)
    found = {kind: stack for kind in KINDS
             if (stack := _stack(file, banks, f"{prefix}ffn_{kind}_exps.weight"))}  # fmt: skip
    columns = _columns(found, memory)
    stacks = {kind: _read_stack(file, stack, kind, columns) for kind, stack in found.items()}
    names = [ROUTER, *VECTORS[family], *([SCALE] if prefix + SCALE in file.tensors else [])]
    if family == "gemma4" and prefix + DENSE[2] in file.tensors:
        names += [*DENSE_VECTORS, *DENSE]
    others = {name: _whole(file, prefix + name) for name in names}
    eps = float(file.metadata[f"{family}.attention.layer_norm_rms_epsilon"])
    scale = float(file.metadata.get(f"{family}.expert_weights_scale") or 1.0)
    return Branch(family, eps, experts_used(file), 1.0 if family == "gemma4" else scale, stacks,
                  others, found["down"].shape[-1])  # fmt: skip


def _columns(found: Mapping[str, ExpertBanks | GGUFTensor], memory: int) -> int:
    """How many of the experts' width fit: whole blocks of all types of `down`."""
    down = found["down"]
    full, nbytes = down.shape[-1], sum(stack.nbytes for stack in found.values())
    if nbytes <= memory:
        return full
    qtypes = down.qtypes if isinstance(down, ExpertBanks) else (down.qtype,)
    sizes = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]][0] for qtype in qtypes]
    step = math.lcm(*sizes, STEP)
    return min(full, max(step, full * memory // nbytes // step * step))


def _spread(full: int, wanted: int) -> Index:
    return np.linspace(0, full - 1, min(full, wanted)).round().astype(np.intp)


def _read_stack(file: GGUFFile, stack: ExpertBanks | GGUFTensor, kind: str, columns: int) -> Stack:
    """`columns` of the experts' width: rows of gate and up, columns of down."""
    experts, rows, width = stack.shape
    if kind == "gate_up":
        kept = np.r_[0:columns, rows // 2 : rows // 2 + columns]
    else:
        kept = np.arange(rows if kind == "down" else columns)
    width = columns if kind == "down" else width
    banks = stack.banks if isinstance(stack, ExpertBanks) else (stack,)
    weights = tuple(
        Weight(file, bank.name, (bank.shape[0], len(kept), width), np.arange(bank.shape[0]), kept)
        for bank in banks
    )
    if not isinstance(stack, ExpertBanks):
        return Stack(weights, np.arange(experts, dtype=np.int32)[None])
    tables = [_table(stack, bank, np.arange(tensor.shape[0], dtype=np.int32))
              for bank, tensor in enumerate(banks)]  # fmt: skip
    return Stack(weights, np.stack(tables))
