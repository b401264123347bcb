"""Whether what was measured is of the GGUF file that a report is about.

Owns: these checks. Leaves out: reading either side. An evaluation names its file, but a file's name
outlives its content: a new export under an old name has other types and other bytes.
"""

from collections.abc import Iterator
from math import isclose
from pathlib import Path

from moequant.errors import UsageError, listing
from moequant.expert_banks import read_banks
from moequant.gguf_file import GGUFFile
from moequant.inspection import Inspection
from moequant.report.evaluation import Evaluation, ModelFidelity
from moequant.report.routing import Routing

SHOWN = 5  # differences that an error lists
ROUTER = "blk.{}.ffn_gate_inp.weight"
Stored = dict[str, tuple[tuple[str, ...], int]]  # name → types of its parts, and their bytes


def check_evaluation(
    path: Path, evaluation: Evaluation, file: GGUFFile, inspection: Inspection
) -> None:
    """UsageError, with the numbers, unless `evaluation` (of JSON `path`) measured this very file.

    Compared are the bytes of all tensors, bits per weight, and each tensor's type and bytes.
    """
    measured = evaluation.models[0]
    different = [*_totals(measured, inspection), *_tensors(measured, _stored(file))]
    if different:
        raise UsageError(
            f"{path} is about another file than {file.path}:{listing(different, SHOWN)}\n"
            f"Evaluate this file: moequant evaluate {file.path} --reference "
            f"{evaluation.reference} --save {path} --force"
        )


def check_routing(path: Path, routing: Routing, file: GGUFFile) -> None:
    """UsageError if a layer of `routing` has another number of experts than its router in `file`.

    A file without experts has no routers, and goes with any routing.
    """
    for layer in routing.layers:
        router = file.tensors.get(ROUTER.format(layer.layer))
        if router is not None and len(layer.share) != router.shape[0]:
            raise UsageError(
                f"{path} is about another model than {file.path}: layer {layer.layer} has "
                f"{len(layer.share)} experts there and {router.shape[0]} in the file."
            )


def _totals(measured: ModelFidelity, inspection: Inspection) -> Iterator[str]:
    if measured.nbytes != inspection.nbytes:
        yield (f"all tensors: {measured.nbytes} bytes there, {inspection.nbytes} bytes in the file")
    if not isclose(measured.bpw, inspection.bpw, rel_tol=1e-6):
        yield f"bits per weight: {measured.bpw:.4f} there, {inspection.bpw:.4f} in the file"


def _tensors(measured: ModelFidelity, stored: Stored) -> Iterator[str]:
    for tensor in measured.tensors:
        qtypes, nbytes = _whole(tensor.name, stored)
        qtype = "+".join(dict.fromkeys(qtypes))
        if not qtypes:
            yield f"{tensor.name}: not in the file"
        elif (tensor.qtype, tensor.nbytes) != (qtype, nbytes):
            yield (f"{tensor.name}: {tensor.qtype}, {tensor.nbytes} bytes there; {qtype}, "
                   f"{nbytes} bytes in the file")  # fmt: skip


def _stored(file: GGUFFile) -> Stored:
    """Every tensor; banks under the name of the tensor that they stand for, without its map."""
    banked = {
        name: (tuple(bank.qtype for bank in banks.banks), banks.nbytes)
        for name, banks in read_banks(file).items()
    }
    return {name: ((t.qtype,), t.nbytes) for name, t in file.tensors.items()} | banked


def _whole(name: str, stored: Stored) -> tuple[tuple[str, ...], int]:
    """The tensor `name`, or its halves where gate and up are apart; no types if neither."""
    if name in stored:
        return stored[name]
    halves = [name.replace("_gate_up_", half) for half in ("_gate_", "_up_")]
    if name in halves or any(half not in stored for half in halves):
        return (), 0
    (gate, gate_bytes), (up, up_bytes) = (stored[half] for half in halves)
    return (*gate, *up), gate_bytes + up_bytes
