"""Types of single experts in a plan: their form in the document, their banks, their bytes.

Owns: `{"Q6_K": [0, 5]}` ↔ one type per expert, which experts share a bank, and the checks of both.
Leaves out: who gets which type (`per_expert`), the names in a GGUF file (`moequant.expert_banks`).
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from moequant.expert_banks import MAX_BANKS, can_have_banks
from moequant.plan import sizes

MAX_EXPERTS = 1 << 16  # in a document; llama.cpp takes 512
MAP_ENTRY_BYTES = 4  # I32, for each bank and expert


def banks_of(experts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Type → its experts, in ascending order; types from the most bits to the fewest.

    Bank 0 is then the one with the most bits in every layer, for who places banks by name.
    """
    return {
        qtype: tuple(expert for expert, own in enumerate(experts) if own == qtype)
        for qtype in sorted(set(experts), key=_bits_first)
    }


def _bits_first(qtype: str) -> tuple[float, str]:
    return (-sizes.bpw(qtype) if qtype in sizes.QTYPES else 0.0, qtype)


def banked_bytes(experts: Sequence[str], shape: tuple[int, ...]) -> int:
    """Bytes of a stack of `shape` (experts, rows, in) in banks, the map included."""
    one = (1, *shape[1:])
    matrices = sum(sizes.tensor_bytes(qtype, one) for qtype in experts)
    return matrices + MAP_ENTRY_BYTES * len(set(experts)) * len(experts)


def exceptions(experts: Sequence[str], qtype: str) -> dict[str, list[int]]:
    """The document's form: the experts whose type is not `qtype`, by type."""
    return {own: list(ids) for own, ids in banks_of(experts).items() if own != qtype}


def listed_types(listed: Mapping[str, Sequence[int]], qtype: str, count: int) -> tuple[str, ...]:
    """One type for each of `count` experts: `qtype` but for those listed under another one."""
    own = {expert: listed_type for listed_type, ids in listed.items() for expert in ids}
    return tuple(own.get(expert, qtype) for expert in range(count))


def form_offenders(name: str, listed: Any) -> Iterator[str]:
    """What in an `experts` field is not types with lists of experts."""
    if not isinstance(listed, dict):
        yield f'{name}: experts: expected {{"Q6_K": [0, 1]}}, found {listed!r}'
        return
    for qtype, ids in listed.items():
        if not isinstance(ids, list) or any(type(expert) is not int for expert in ids):
            yield f"{name}: experts: {qtype}: expected a list of expert numbers, found {ids!r}"


def list_offenders(
    name: str, listed: Mapping[str, Sequence[int]], shape: Sequence[int]
) -> Iterator[str]:
    """Experts that the tensor has not, or that are listed twice; `shape` is the document's."""
    if not can_have_banks(name) or len(shape) != 3 or shape[0] > MAX_EXPERTS:
        yield f"{name}: experts: only a stack of experts (ffn_K_exps.weight) has them"
        return
    times = Counter(expert for ids in listed.values() for expert in ids)
    unknown = sorted(expert for expert in times if not 0 <= expert < shape[0])
    twice = sorted(expert for expert, n in times.items() if n > 1)
    if unknown:
        yield f"{name}: experts: {unknown} of {shape[0]} (from 0) do not exist"
    if twice:
        yield f"{name}: experts: {twice} listed more than once"


def bank_offenders(name: str, qtypes: Collection[str]) -> Iterator[str]:
    """More types in one tensor than there may be banks."""
    if len(qtypes) > MAX_BANKS:
        yield (
            f"{name}: experts of {len(qtypes)} types ({', '.join(qtypes)}); "
            f"a tensor has at most {MAX_BANKS} banks"
        )
