"""The plan: which type every tensor of a model gets, and what it weighs.

Owns: the plan's contents, its sums, its checks against itself and against a model, its digest.
Leaves out: how types are chosen (`rules`, `presets`), the file format (`document`), and the report
of fallbacks (`fallbacks`).
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from moequant.errors import PlanError, listing
from moequant.plan import sizes
from moequant.plan.document import format_document, parse_document, read_text, write_text
from moequant.plan.experts import (
    bank_offenders,
    banked_bytes,
    banks_of,
    exceptions,
    list_offenders,
    listed_types,
)
from moequant.plan.model import Model
from moequant.plan.presets import FLOAT_TYPES, PRESETS
from moequant.plan.rules import fallback_type

_TYPES_NOTE = f"A type is one of {', '.join(sizes.QTYPES)}."


@dataclass(frozen=True)
class TensorPlan:
    """One tensor's type. `shape` is in torch order: (rows, in), (experts, rows, in), (n,).

    `wanted` is the type before its rows were looked at, `reason` why it is not the final one.
    `experts`: the type of each expert where they differ, empty where all have `qtype`; `qtype` is
    then the type of those that nobody gave another one.
    """

    name: str
    shape: tuple[int, ...]
    qtype: str
    wanted: str
    reason: str = ""
    experts: tuple[str, ...] = ()

    def with_experts(self, experts: tuple[str, ...]) -> Self:
        """The tensor with a type for each expert; one that they all share becomes its `qtype`."""
        if len(set(experts)) > 1:
            return dataclasses.replace(self, experts=experts)
        qtype = experts[0]
        wanted, reason = (self.wanted, self.reason) if qtype == self.qtype else (qtype, "")
        return dataclasses.replace(self, qtype=qtype, wanted=wanted, reason=reason, experts=())

    @property
    def banks(self) -> dict[str, tuple[int, ...]]:
        """Type → its experts, in the order of the banks; empty where all have one type."""
        return banks_of(self.experts)

    @property
    def bank_summary(self) -> str:
        """`Q5_K × 4, Q4_K × 8, Q3_K × 4`: how many experts have which type."""
        return ", ".join(f"{qtype} × {len(ids)}" for qtype, ids in self.banks.items())

    @property
    def qtypes(self) -> tuple[str, ...]:
        """Every type in the tensor, once: in the order of the banks if there are any."""
        return tuple(self.banks) or (self.qtype,)

    @property
    def bytes_by_type(self) -> dict[str, int]:
        """Bytes of the data in each type, without the map of banks."""
        if not self.experts:
            return {self.qtype: self.size_bytes}
        return {
            qtype: sizes.tensor_bytes(qtype, (len(ids), *self.shape[1:]))
            for qtype, ids in self.banks.items()
        }

    @property
    def own_params(self) -> int:
        """Number of values whose type is `qtype`."""
        if not self.experts:
            return self.n_params
        return self.experts.count(self.qtype) * math.prod(self.shape[1:])

    @property
    def n_params(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data, a map of banks included, without the file's padding."""
        if self.experts:
            return banked_bytes(self.experts, self.shape)
        return sizes.tensor_bytes(self.qtype, self.shape)

    @property
    def wanted_bytes(self) -> float:
        """Bytes that what is in `qtype` would take in the wanted type, were rows whole blocks."""
        return self.own_params * sizes.bpw(self.wanted) / 8

    @property
    def is_fallback(self) -> bool:
        """Whether the final type is not the wanted one, for any value."""
        return self.qtype != self.wanted and self.own_params > 0


@dataclass(frozen=True)
class Plan:
    """The types of all tensors of a model, in file order.

    `base` is the float type of what is not quantized; `has_imatrix` whether importance data was
    counted on when types were chosen.
    """

    preset: str
    architecture: str
    tensors: tuple[TensorPlan, ...]
    base: str = "BF16"
    has_imatrix: bool = False

    @cached_property
    def types(self) -> dict[str, str]:
        """Final type by tensor name; see `TensorPlan.experts` where experts have their own."""
        return {tensor.name: tensor.qtype for tensor in self.tensors}

    @property
    def banked(self) -> tuple[TensorPlan, ...]:
        """Tensors whose experts differ in type, so that only a patched llama.cpp reads the file."""
        return tuple(tensor for tensor in self.tensors if tensor.experts)

    @property
    def n_params(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.n_params for tensor in self.tensors)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors' data: the file without its metadata and padding."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors; 0 for an empty plan."""
        return 8 * self.size_bytes / self.n_params if self.tensors else 0.0

    @property
    def fallbacks(self) -> tuple[TensorPlan, ...]:
        """Tensors that did not get the type the preset wants for them."""
        return tuple(tensor for tensor in self.tensors if tensor.is_fallback)

    def edited(self, against: "Plan") -> tuple[str, ...]:
        """Names of the tensors whose type is another one in `against`, or that it does not have."""
        others = {t.name: (t.qtypes, t.banks) for t in against.tensors}
        return tuple(t.name for t in self.tensors if others.get(t.name) != (t.qtypes, t.banks))

    def check(self, model: Model) -> None:
        """PlanError that lists every tensor that the model has not, or cannot have in its type."""
        shapes = {tensor.name: tensor.shape for tensor in model.tensors}
        known = [tensor for tensor in self.tensors if shapes.get(tensor.name) == tensor.shape]
        offenders = [*_model_offenders(self, model), *_row_offenders(known)]
        if offenders:
            raise PlanError(
                f"the plan does not fit the model, {len(offenders)} offenders:{listing(offenders)}"
                f"\n{_TYPES_NOTE}"
            )

    def digest(self) -> str:
        """sha256 of the plan as JSON with sorted keys: equal if and only if plans are equal."""
        header, tensors = _as_document(self)
        canonical = json.dumps([header, list(tensors.items())], sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_json(self) -> str:
        """The plan as text; `moequant.plan.document` describes it."""
        return format_document(*_as_document(self))

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Self:
        """The plan in a text; PlanError, beginning with `source`, lists everything wrong in it.

        Types are read in any case. Whether rows and types go together is for `check` to say, which
        knows the model's shapes; those of the text may have been edited.
        """
        header, entries = parse_document(text, source)
        wrong = [offender for item in entries.items() for offender in _expert_offenders(*item)]
        if wrong:
            raise PlanError(f"{source}: {len(wrong)} wrong in the plan:{listing(wrong)}")
        plan = cls(
            _known(header["preset"], PRESETS),
            header["architecture"],
            tuple(_tensor_of(name, entry) for name, entry in entries.items()),
            _known(header["base"], FLOAT_TYPES),
            header["imatrix"],
        )
        offenders = [*_header_offenders(plan), *_type_offenders(plan.tensors)]
        if offenders:
            raise PlanError(
                f"{source}: {len(offenders)} wrong in the plan:{listing(offenders)}\n{_TYPES_NOTE}"
            )
        return plan

    def write(self, path: str | Path) -> None:
        """Write `plan.json` in one step: readers see the old file or the new. ExportError."""
        write_text(Path(path), self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a plan that may have been edited; PlanError lists everything wrong in it."""
        return cls.from_json(read_text(Path(path)), str(path))


def _as_document(plan: Plan) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    header = {
        "preset": plan.preset,
        "architecture": plan.architecture,
        "base": plan.base,
        "imatrix": plan.has_imatrix,
    }
    return header, {tensor.name: _entry_of(tensor) for tensor in plan.tensors}


def _entry_of(tensor: TensorPlan) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": tensor.qtype, "shape": list(tensor.shape)}
    if tensor.is_fallback:
        entry["wanted"] = tensor.wanted
    if tensor.reason:
        entry["reason"] = tensor.reason
    if tensor.experts:
        entry["experts"] = exceptions(tensor.experts, tensor.qtype)
    return entry


def _tensor_of(name: str, entry: dict[str, Any]) -> TensorPlan:
    """The tensor; a `wanted` that does not explain an edited type any more is dropped."""
    shape, qtype = tuple(entry["shape"]), _known(entry["type"], sizes.QTYPES)
    wanted, reason = _known(entry.get("wanted", qtype), sizes.QTYPES), entry.get("reason", "")
    is_edited = wanted in sizes.QTYPES and qtype != fallback_type(wanted, shape[-1])
    if is_edited or qtype == wanted:
        wanted, reason = qtype, ""
    tensor = TensorPlan(name, shape, qtype, wanted, reason)
    listed = {_known(own, sizes.QTYPES): ids for own, ids in entry.get("experts", {}).items()}
    return tensor.with_experts(listed_types(listed, qtype, shape[0])) if listed else tensor


def _expert_offenders(name: str, entry: dict[str, Any]) -> Iterator[str]:
    """Experts of their own that cannot be read: on no stack, unknown, twice, or a type twice."""
    listed = entry.get("experts", {})
    if not listed:
        return
    yield from list_offenders(name, listed, entry["shape"])
    names = [_known(qtype, sizes.QTYPES) for qtype in listed]
    for qtype in sorted({qtype for qtype in names if names.count(qtype) > 1}):
        yield f"{name}: experts: {qtype} is there twice"


def _known(name: str, names: Collection[str]) -> str:
    """The one of `names`, which are in capitals, that is meant; `name` itself if there is none."""
    return name.upper() if name.upper() in names else name


def _header_offenders(plan: Plan) -> Iterator[str]:
    if plan.preset not in PRESETS:
        yield f"preset: unknown {plan.preset!r}; known: {', '.join(PRESETS)}"
    if plan.base not in FLOAT_TYPES:
        yield f"base: {plan.base!r} is not one of {', '.join(FLOAT_TYPES)}"


def _type_offenders(tensors: Iterable[TensorPlan]) -> Iterator[str]:
    """Types that do not exist."""
    for tensor in tensors:
        if tensor.is_fallback and tensor.wanted not in sizes.QTYPES:
            yield f"{tensor.name}: wanted: unknown type {tensor.wanted!r}"
        for qtype in dict.fromkeys((tensor.qtype, *tensor.qtypes)):
            if qtype not in sizes.QTYPES:
                yield f"{tensor.name}: unknown type {qtype!r}"


def _row_offenders(tensors: Iterable[TensorPlan]) -> Iterator[str]:
    """Types that do not exist, cannot hold the rows, or that llama.cpp cannot compute with."""
    for tensor in tensors:
        yield from bank_offenders(tensor.name, tensor.qtypes)
        for qtype in tensor.qtypes:
            yield from _misfit(tensor, qtype)


def _misfit(tensor: TensorPlan, qtype: str) -> Iterator[str]:
    cols = tensor.shape[-1]
    if qtype not in sizes.QTYPES:
        yield f"{tensor.name}: unknown type {qtype!r}"
    elif _must_be_f32(tensor) and qtype != "F32":
        yield f"{tensor.name}: {qtype}: vectors, norms and scales must be F32"
    elif not sizes.fits(qtype, cols):
        yield (
            f"{tensor.name}: {qtype} holds blocks of {sizes.block_size(qtype)}, "
            f"the rows have {cols} values; use {fallback_type(qtype, cols)}"
        )


def _must_be_f32(tensor: TensorPlan) -> bool:
    """Vectors, norms, scales and biases: llama.cpp's kernels for them read F32 alone."""
    name = tensor.name
    return len(tensor.shape) <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight")


def _model_offenders(plan: Plan, model: Model) -> Iterator[str]:
    if plan.architecture != model.architecture:
        yield f"architecture: {plan.architecture} in the plan, {model.architecture} in the model"
    shapes = {tensor.name: tensor.shape for tensor in model.tensors}
    for tensor in plan.tensors:
        if tensor.name not in shapes:
            yield f"{tensor.name}: not in the model; remove the line"
        elif tensor.shape != shapes[tensor.name]:
            yield (
                f"{tensor.name}: shape {list(tensor.shape)} in the plan, "
                f"{list(shapes[tensor.name])} in the model; make the plan anew"
            )
    for name in [name for name in shapes if name not in plan.types]:
        yield f"{name}: in the model, not in the plan; add it or make the plan anew"
