"""Expert banks of a plan: the tensors that stand for a stack, their maps, and the keys.

Owns: what of a stack goes into which tensor of the file. Leaves out: the format's names and its
reading (`moequant.expert_banks`), and how values become bytes (`model_file`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gguf import GGUFValueType

from moequant.expert_banks import (
    COUNT_KEY,
    NOT_HERE,
    VERSION,
    VERSION_KEY,
    bank_name,
    map_name,
)
from moequant.gguf_export.metadata import MetadataEntry
from moequant.gguf_export.writer import TensorToWrite
from moequant.plan import Plan, TensorPlan
from moequant.plan.sizes import tensor_bytes

MAP_TYPE = "I32"


@dataclass(frozen=True)
class Part:
    """One tensor of the file: all of a planned tensor, some of its experts, or the map of them.

    `matrices`: which matrices of the planned tensor, in this order; None for all of it as it is.
    `data`: the bytes of a map, which come from no checkpoint.
    """

    tensor: TensorToWrite
    planned: TensorPlan
    matrices: tuple[int, ...] | None = None
    data: bytes | None = None


def parts(plan: Plan) -> list[Part]:
    """Every tensor of the file, in order: banks and map in the place of the stack they replace."""
    return [part for planned in plan.tensors for part in _parts(planned)]


def bank_metadata(plan: Plan) -> list[MetadataEntry]:
    """The keys of a file with banks; none for a file without."""
    if not plan.banked:
        return []
    most = max(len(tensor.banks) for tensor in plan.banked)
    return [
        MetadataEntry(f"{plan.architecture}.{key}", value, GGUFValueType.UINT32)
        for key, value in ((VERSION_KEY, VERSION), (COUNT_KEY, most))
    ]


def _parts(planned: TensorPlan) -> Iterator[Part]:
    if not planned.banks:
        name, shape = planned.name, planned.shape
        yield Part(TensorToWrite(name, shape, planned.qtype, planned.size_bytes), planned)
        return
    for bank, (qtype, experts) in enumerate(planned.banks.items()):
        shape = (len(experts), *planned.shape[1:])
        tensor = TensorToWrite(
            bank_name(planned.name, bank), shape, qtype, tensor_bytes(qtype, shape)
        )
        yield Part(tensor, planned, experts)
    yield _map(planned)


def _map(planned: TensorPlan) -> Part:
    table = np.full((len(planned.banks), planned.shape[0]), NOT_HERE, "<i4")
    for bank, experts in enumerate(planned.banks.values()):
        table[bank, list(experts)] = np.arange(len(experts))
    data = table.tobytes()
    tensor = TensorToWrite(map_name(planned.name), table.shape, MAP_TYPE, len(data))
    return Part(tensor, planned, data=data)
