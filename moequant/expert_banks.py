"""Expert banks: the experts of one tensor kept as several tensors, one per type.

Owns: the names and keys of the format, and reading it: which tensors are banks, which expert is
where, and every check of the maps. Leaves out: writing, and decoding.

In place of `blk.N.ffn_K_exps.weight` (experts, rows, in), for K in gate_up, gate, up and down:
- `blk.N.ffn_K_exps.bank{b}.weight`, (n_b, rows, in), b = 0, 1, … without a gap, at most 8
- `blk.N.ffn_K_exps.bank_map`, I32 (banks, experts): the expert's index in the bank, or -1

Each expert is in exactly one bank and each matrix of a bank is one expert's; no bank is empty. The
keys `{arch}.expert_bank_version` (1) and `{arch}.expert_bank_count` (the largest number of banks of
any tensor) say that a file has banks.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moequant.errors import GGUFError, UsageError, listing
from moequant.gguf_file import GGUFFile, GGUFTensor

VERSION = 1
MAX_BANKS = 8
VERSION_KEY = "expert_bank_version"  # after `{arch}.`
COUNT_KEY = "expert_bank_count"
KINDS = ("gate_up", "gate", "up", "down")
NO_WEIGHTS = ("I8", "I16", "I32", "I64", "F64")  # types that llama.cpp refuses for a bank
NOT_HERE = -1
_PART = re.compile(
    rf"(blk\.\d+\.ffn_(?:{'|'.join(KINDS)})_exps)\.(?:bank(0|[1-9]\d*)\.weight|(bank_map))"
)
STACK = re.compile(rf"blk\.\d+\.ffn_(?:{'|'.join(KINDS)})_exps\.weight")


def can_have_banks(name: str) -> bool:
    """True for the name of a tensor that banks may stand for."""
    return STACK.fullmatch(name) is not None


def bank_name(name: str, bank: int) -> str:
    """The bank of the stack `name`: blk.0.ffn_up_exps.weight, 1 → blk.0.ffn_up_exps.bank1.weight"""
    return f"{name.removesuffix('.weight')}.bank{bank}.weight"


def map_name(name: str) -> str:
    """The map of the stack `name`: blk.0.ffn_up_exps.weight → blk.0.ffn_up_exps.bank_map"""
    return f"{name.removesuffix('.weight')}.bank_map"


@dataclass(frozen=True)
class ExpertBanks:
    """The banks that stand for the tensor `name` of `shape` (experts, rows, in).

    Expert e is matrix `index[e]` of `banks[bank[e]]`.
    """

    name: str
    shape: tuple[int, ...]
    banks: tuple[GGUFTensor, ...]
    bank: tuple[int, ...]
    index: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all banks, without the map."""
        return sum(bank.nbytes for bank in self.banks)

    def place(self, expert: int) -> tuple[GGUFTensor, int]:
        """The bank of an expert, and the expert's index in it."""
        return self.banks[self.bank[expert]], self.index[expert]

    @property
    def qtypes(self) -> tuple[str, ...]:
        """Each expert's type."""
        return tuple(self.banks[bank].qtype for bank in self.bank)


def is_bank_part(name: str) -> bool:
    """True for the name of a bank or of a map."""
    return _PART.fullmatch(name) is not None


def has_banks(file: GGUFFile) -> bool:
    """Whether it takes a llama.cpp with moequant's patch to run `file`; reads no map.

    Raises:
        GGUFError: an unknown version, or keys and tensors that contradict each other.
    """
    return _has_banks(file, _parts(file))


def stock_error(path: Path, build: Path) -> UsageError:
    """What to raise where `build` (a program, or a folder of libraries) cannot run banks."""
    return UsageError(
        f"{path} keeps experts of one tensor in banks of different types, and {build} is a "
        "llama.cpp without moequant's patch, which cannot run them. `moequant runtime build` makes "
        "one that can; without an option that names another, moequant uses that by itself."
    )


def read_banks(file: GGUFFile) -> dict[str, ExpertBanks]:
    """The banked tensors of `file`, under the names of what they replace; empty without banks.

    Raises:
        GGUFError: an unknown version, keys and tensors that contradict each other, or damaged
            maps, shapes or banks; all tensors at fault are listed.
    """
    parts = _parts(file)
    if not _has_banks(file, parts):
        return {}
    banks: dict[str, ExpertBanks] = {}
    wrong: list[str] = []
    for name, found in parts.items():
        faults = list(_faults_of_shapes(file, name, found))
        if not faults:
            table = _map(file, name)
            faults = list(_faults_of_map(name, found, table))
        if faults:
            wrong += faults
        else:
            banks[name] = _banks(name, found, table)
    if wrong:
        raise GGUFError(f"{file.path}: its expert banks are damaged:{listing(wrong)}")
    _check_count(file, banks)
    return banks


def _parts(file: GGUFFile) -> dict[str, dict[int, GGUFTensor]]:
    """Name of the stack → number of the bank → bank; a map without banks gives an empty dict."""
    parts: dict[str, dict[int, GGUFTensor]] = defaultdict(dict)
    for tensor in file.tensors.values():
        named = _PART.fullmatch(tensor.name)
        if named is not None:
            found = parts[f"{named[1]}.weight"]
            if named[2] is not None:
                found[int(named[2])] = tensor
    return dict(parts)


def _key(file: GGUFFile, key: str) -> tuple[str, object]:
    name = f"{file.metadata.get('general.architecture')}.{key}"
    return name, file.metadata.get(name)


def _has_banks(file: GGUFFile, parts: Mapping[str, object]) -> bool:
    """Whether there are banks; GGUFError where key and tensors contradict each other."""
    key, version = _key(file, VERSION_KEY)
    if version is None and parts:
        raise GGUFError(f"{file.path} has expert banks ({min(parts)}), but no key {key}.")
    if version is not None and (type(version) is not int or version != VERSION):
        raise GGUFError(
            f"{file.path}: {key} is {version!r:.80}; version {VERSION} is read. Use a newer "
            "moequant."
        )
    if version is not None and not parts:
        raise GGUFError(f"{file.path}: {key} is {version}, but no tensor is an expert bank.")
    return version is not None


def _check_count(file: GGUFFile, banks: Mapping[str, ExpertBanks]) -> None:
    key, count = _key(file, COUNT_KEY)
    most = max(len(stack.banks) for stack in banks.values())
    if type(count) is not int or count != most:
        raise GGUFError(f"{file.path}: {key} is {count!r:.80}, but the most banks are {most}.")


def _faults_of_shapes(file: GGUFFile, name: str, found: Mapping[int, GGUFTensor]) -> Iterator[str]:
    """What can be seen without reading the map."""
    table = file.tensors.get(map_name(name))
    if name in file.tensors:
        yield f"{name}: there as a whole and in banks"
    if table is None:
        yield f"{map_name(name)}: missing"
        return
    if table.qtype != "I32" or len(table.shape) != 2:
        yield f"{table.name}: {table.qtype} {list(table.shape)}, expected I32 [banks, experts]"
        return
    n_banks, n_experts = table.shape
    if not 1 <= n_banks <= MAX_BANKS:
        yield f"{table.name}: {n_banks} banks; it can be 1 to {MAX_BANKS}"
        return
    for bank in sorted(set(range(n_banks)) - set(found)):
        yield f"{bank_name(name, bank)}: missing; the map has {n_banks} banks"
    for bank in sorted(set(found) - set(range(n_banks))):
        yield f"{bank_name(name, bank)}: the map has {n_banks} banks"
    yield from _faults_of_banks(list(found.values()), n_experts)


def _faults_of_banks(banks: list[GGUFTensor], n_experts: int) -> Iterator[str]:
    flat = [bank for bank in banks if len(bank.shape) != 3 or 0 in bank.shape]
    for bank in flat:
        yield f"{bank.name}: shape {list(bank.shape)}, expected [experts, rows, in], none 0"
    for bank in banks:
        if bank.qtype in NO_WEIGHTS:
            yield f"{bank.name}: {bank.qtype}, expected a float of at most 32 bits or quantized"
    if flat or not banks:
        return
    for bank in banks[1:]:
        if bank.shape[1:] != banks[0].shape[1:]:
            yield (
                f"{bank.name}: matrices of {list(bank.shape[1:])}, "
                f"{list(banks[0].shape[1:])} in {banks[0].name}"
            )
    total = sum(bank.shape[0] for bank in banks)
    if total != n_experts:
        yield f"{banks[0].name}: all banks hold {total} experts, the map {n_experts}"


def _map(file: GGUFFile, name: str) -> npt.NDArray[np.int32]:
    table = file.tensors[map_name(name)]
    return file.read(table.name).view("<i4").reshape(table.shape).astype(np.int32)


def _faults_of_map(
    name: str, found: Mapping[int, GGUFTensor], table: npt.NDArray[np.int32]
) -> Iterator[str]:
    """Ids out of range, experts in no bank or several, matrices of no expert or several."""
    for bank, row in enumerate(table):
        size = found[bank].shape[0]
        bad = [(e, int(i)) for e, i in enumerate(row) if not NOT_HERE <= i < size]
        for expert, index in bad:
            yield (
                f"{map_name(name)}: expert {expert} is matrix {index} of bank {bank}, "
                f"which has {size}"
            )
        used, times = np.unique(row[row >= 0], return_counts=True)
        for index in used[times > 1]:
            yield f"{map_name(name)}: several experts are matrix {index} of bank {bank}"
    for expert, times_ in enumerate((table != NOT_HERE).sum(axis=0)):
        if times_ != 1:
            yield f"{map_name(name)}: expert {expert} is in {times_} banks, expected 1"


def _banks(name: str, found: Mapping[int, GGUFTensor], table: npt.NDArray[np.int32]) -> ExpertBanks:
    banks = tuple(found[bank] for bank in range(len(found)))
    bank = (table >= 0).argmax(axis=0)
    index = table[bank, np.arange(table.shape[1])]
    shape = (table.shape[1], *banks[0].shape[1:])
    return ExpertBanks(name, shape, banks, tuple(bank.tolist()), tuple(index.tolist()))
