"""Maps of a GGUF file for a report: bits per weight by layer and tensor, and by layer and expert.

Owns: these maps. Leaves out: sums over the file (`moequant.inspection`) and drawing.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from math import prod

import numpy as np
import numpy.typing as npt

from moequant.expert_banks import read_banks
from moequant.gguf_file import GGUFFile, GGUFTensor
from moequant.plan import role_of

_LAYER = re.compile(r"blk\.([0-9]{1,6})\.")
INTEGERS = ("I8", "I16", "I32", "I64")
_BANK = re.compile(r"(?<=_exps)\.bank[0-9]{1,3}(?=\.weight$|$)")


@dataclass(frozen=True)
class Grid:
    """A number for each (row, column) pair; NaN where there is nothing.

    `values`: float64 (rows, columns). `rows` and `columns` are their names.
    """

    rows: list[str]
    columns: list[str]
    values: npt.NDArray[np.float64]


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name, None for a tensor outside the layers."""
    found = _LAYER.match(name)
    return None if found is None else int(found[1])


def without_bank(role: str) -> str:
    """The role of a whole expert tensor, from that of one of its banks."""
    return _BANK.sub("", role)


def bits_by_tensor(file: GGUFFile) -> Grid | None:
    """Bits per weight, rows: what a tensor is, columns: layers. Only tensors that hold matrices.

    The banks of one expert tensor count as one. None for a file without layers.
    """
    sums: dict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    nbytes: dict[str, int] = defaultdict(int)
    for tensor in file.tensors.values():
        layer = layer_of(tensor.name)
        if layer is not None and _is_matrix(tensor):
            role = without_bank(role_of(tensor.name))
            sums[role, layer][0] += 8 * tensor.nbytes
            sums[role, layer][1] += prod(tensor.shape)
            nbytes[role] += tensor.nbytes
    if not sums:
        return None
    roles = sorted(nbytes, key=lambda role: -nbytes[role])
    layers = sorted({layer for _, layer in sums})
    values = np.full((len(roles), len(layers)), np.nan)
    place = {layer: column for column, layer in enumerate(layers)}
    row = {role: number for number, role in enumerate(roles)}
    for (role, layer), (bits, size) in sums.items():
        values[row[role], place[layer]] = bits / size
    return Grid(roles, [str(layer) for layer in layers], values)


def bits_by_expert(file: GGUFFile) -> dict[str, Grid]:
    """Bits per weight, rows: layers, columns: experts; one grid for each tensor stored in banks.

    Empty for a file whose experts share a type in every layer. Raises GGUFError for damaged banks.
    """
    banked: dict[str, dict[int, list[float]]] = defaultdict(dict)
    for name, banks in read_banks(file).items():
        layer = layer_of(name)
        if layer is not None:
            places = (banks.place(expert)[0] for expert in range(banks.shape[0]))
            banked[role_of(name)][layer] = [_bpw(bank) for bank in places]
    for tensor in file.tensors.values():  # layers of the same tensor that need no banks
        layer, role = layer_of(tensor.name), role_of(tensor.name)
        if layer is not None and role in banked:
            banked[role][layer] = [_bpw(tensor)] * tensor.shape[0]
    return {role: _expert_grid(layers) for role, layers in banked.items()}


def _expert_grid(layers: dict[int, list[float]]) -> Grid:
    experts = max(len(bits) for bits in layers.values())
    values = np.full((len(layers), experts), np.nan)
    for row, (_, bits) in enumerate(sorted(layers.items())):
        values[row, : len(bits)] = bits
    columns = [str(expert) for expert in range(experts)]
    return Grid([str(layer) for layer in sorted(layers)], columns, values)


def _bpw(tensor: GGUFTensor) -> float:
    return 8 * tensor.nbytes / prod(tensor.shape)


def _is_matrix(tensor: GGUFTensor) -> bool:
    """True for two dimensions or more; norms, scales, biases and bank maps are no matrices."""
    return sum(size > 1 for size in tensor.shape) > 1 and tensor.qtype not in INTEGERS
