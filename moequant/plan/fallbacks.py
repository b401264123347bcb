"""What fell back to another type, and what it cost: rows to print, one per kind of tensor.

Owns: grouping and sums. Leaves out: printing, and the choice of the fallback (`rules`).
"""

from dataclasses import dataclass

from moequant.plan import sizes
from moequant.plan.model import role_of
from moequant.plan.plan import Plan, TensorPlan


@dataclass(frozen=True)
class FallbackRow:
    """Tensors of one role that wanted one type and got another, for one reason.

    `size_bytes` is what they take, `wanted_bytes` what they would take in the wanted type if
    their rows were whole blocks. Experts with a type of their own are in none of the sums.
    """

    role: str
    wanted: str
    qtype: str
    reason: str
    tensors: tuple[str, ...]
    n_params: int
    size_bytes: int
    wanted_bytes: float

    @property
    def extra_bytes(self) -> float:
        """Bytes that the fallback costs (less than 0 where it is the smaller type)."""
        return self.size_bytes - self.wanted_bytes

    @property
    def extra_bpw(self) -> float:
        """Bits per weight that the fallback costs, for these tensors' weights."""
        return sizes.bpw(self.qtype) - sizes.bpw(self.wanted)


def fallback_rows(plan: Plan) -> list[FallbackRow]:
    """One row per (role, wanted, final type, reason), in file order of the first tensor of each."""
    groups: dict[tuple[str, str, str, str], list[TensorPlan]] = {}
    for tensor in plan.fallbacks:
        key = (role_of(tensor.name), tensor.wanted, tensor.qtype, tensor.reason)
        groups.setdefault(key, []).append(tensor)
    return [_row(key, tensors) for key, tensors in groups.items()]


def fallback_bpw(plan: Plan) -> float:
    """Bits per weight that all fallbacks cost, over all weights of the model; 0 without any."""
    extra = sum(row.extra_bytes for row in fallback_rows(plan))
    return 8 * extra / plan.n_params if plan.tensors else 0.0


def _row(key: tuple[str, str, str, str], tensors: list[TensorPlan]) -> FallbackRow:
    return FallbackRow(
        *key,
        tensors=tuple(tensor.name for tensor in tensors),
        n_params=sum(tensor.own_params for tensor in tensors),
        size_bytes=sum(tensor.bytes_by_type[tensor.qtype] for tensor in tensors),
        wanted_bytes=sum(tensor.wanted_bytes for tensor in tensors),
    )
