"""The forward of a layer's experts, observed.

Owns: the function that runs experts under transformers' interface for it, and the statistics of
what they were given. Leaves out: which tokens a starved expert gets in addition (`near_miss`).

transformers lets the forward of fused experts be replaced by name (`integrations/moe.py`); the
module keeps its weights, activation and gating (`_apply_gate`), the caller its routing. Ours loops
over the experts that were hit, as transformers' own eager forward does, and sums in float32: one
expert after the other, each adding at most once to a token, so in one order on every device.

For expert e, over its routed tokens t with gate g (what the router multiplies the output by):
    counts = Σ 1    in_sum2 = Σ x²    gate_counts = Σ g²    gate_in_sum2 = Σ g²·x²
once for the input of gate and up ("input"), once for that of down ("inner"), per column. A routed
token's error reaches the layer's output times g, hence g².
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_IMPLEMENTATION = "moequant"

Side = Literal["input", "inner"]
"""Before gate and up, or before down."""

_LARGEST = 2.0**100  # of a lent token: float32, which ends at 2^128, has room for 2^28 of them


class ExpertStatistics:
    """Sums of one layer, by expert; float64.

    `counts`, `gate_counts`: (experts,). `in_sum2[side]`, `gate_in_sum2[side]`: (experts, columns).
    The `near_miss_*` of the same shapes: the same sums over tokens that were not routed there,
    always weighted by g², with their number in `near_miss_counts`.
    """

    def __init__(self, experts: int) -> None:
        """All zero; widths come with the first tokens."""
        self.counts = torch.zeros(experts, dtype=torch.float64)
        self.gate_counts = torch.zeros_like(self.counts)
        self.near_miss_counts = torch.zeros_like(self.counts)
        self.near_miss_gate_counts = torch.zeros_like(self.counts)
        self.in_sum2: dict[Side, Tensor] = {}
        self.gate_in_sum2: dict[Side, Tensor] = {}
        self.near_miss_in_sum2: dict[Side, Tensor] = {}

    def add_routed(self, expert: int, sides: dict[Side, Tensor], gates: Tensor) -> None:
        """Tokens routed to `expert`: the inputs of each side (tokens, columns), gates (tokens,)."""
        weight = gates.double().square()
        self.counts[expert] += len(gates)
        self.gate_counts[expert] += weight.sum().cpu()
        for side, values in sides.items():
            squares = values.float().square()
            self._row(self.in_sum2, side, expert, squares.sum(0))
            self._row(self.gate_in_sum2, side, expert, weight.float() @ squares)

    def add_near_miss(self, expert: int, sides: dict[Side, Tensor], gates: Tensor) -> None:
        """Tokens lent to `expert`, as `add_routed`; gates are what they would have been.

        Tokens that overflow in the expert, which the model never runs them through, are left out.
        """
        weight = gates.double().square()
        squares = {side: values.float().square().double() for side, values in sides.items()}
        largest = torch.stack([values.amax(-1) for values in squares.values()]).amax(0)
        sound = (largest <= _LARGEST) & (weight <= _LARGEST) & (weight * largest <= _LARGEST)
        weight = weight[sound]
        self.near_miss_counts[expert] += len(weight)
        self.near_miss_gate_counts[expert] += weight.sum().cpu()
        for side, values in squares.items():
            self._row(self.near_miss_in_sum2, side, expert, weight @ values[sound])

    def _row(self, sums: dict[Side, Tensor], side: Side, expert: int, row: Tensor) -> None:
        if side not in sums:
            sums[side] = torch.zeros(len(self.counts), len(row), dtype=torch.float64)
        sums[side][expert] += row.double().cpu()


class ExpertObserver:
    """Takes the statistics of a layer's experts and, if asked, keeps what near misses need.

    Kept, on the CPU: the inputs, in the compute dtype (`rows`), `chosen` and `gates` (tokens, k).
    """

    def __init__(self, experts: int, *, keep: bool) -> None:
        """`keep`: whether to keep the tokens' inputs and routing."""
        self.statistics = ExpertStatistics(experts)
        self._keep = keep
        self._inputs: list[Tensor] = []
        self._chosen: list[Tensor] = []
        self._gates: list[Tensor] = []

    def note_tokens(self, hidden: Tensor, chosen: Tensor, gates: Tensor) -> None:
        """What the experts are about to be run on, all tokens of a batch."""
        if self._keep:
            self._inputs.append(hidden.cpu())
            self._chosen.append(chosen.cpu())
            self._gates.append(gates.cpu())

    def forget(self) -> None:
        """Let go of what was kept; the statistics stay."""
        self._inputs, self._chosen, self._gates = [], [], []

    def rows(self, tokens: Tensor) -> Tensor:
        """Inputs of the experts for `tokens` (n,): (n, hidden), without joining all batches."""
        found = self._inputs[0].new_empty(len(tokens), self._inputs[0].shape[-1])
        start = 0
        for part in self._inputs:
            inside = (tokens >= start) & (tokens < start + len(part))
            found[inside] = part[tokens[inside] - start]
            start += len(part)
        return found

    @property
    def chosen(self) -> Tensor:
        """Experts chosen, int64 (tokens, k)."""
        return torch.cat(self._chosen)

    @property
    def gates(self) -> Tensor:
        """Their gates, (tokens, k)."""
        return torch.cat(self._gates)


def observe_experts(module: nn.Module, observer: ExpertObserver | None) -> None:
    """From now on `observer` sees what the experts `module` is run on; None ends it."""
    object.__setattr__(module, "moequant_observer", observer)


def inner_activation(module: Any, expert: int, hidden: Tensor) -> Tensor:
    """What the down projection of `expert` is given for `hidden` (tokens, columns)."""
    name = "gate_up_proj" if module.has_gate else "up_proj"
    projected = _project(module, name, expert, hidden)
    made: Tensor = module._apply_gate(projected) if module.has_gate else module.act_fn(projected)
    return made


def _project(module: Any, name: str, expert: int, values: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    bias = getattr(module, f"{name}_bias")[expert] if module.has_bias else None
    return nn.functional.linear(values, weight.T if module.is_transposed else weight, bias)


def _hits(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For every expert that was chosen: its number, its tokens, and their places in the top k."""
    k = chosen.shape[-1]
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    ends = flat.bincount(minlength=experts).cumsum(0).tolist()
    for expert, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if end > start:
            places = order[start:end]
            yield expert, places // k, places % k


def _experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts' output (tokens, hidden) for their input, ids and gates (tokens, k)."""
    observer: ExpertObserver | None = getattr(module, "moequant_observer", None)
    if observer:
        observer.note_tokens(hidden_states, top_k_index, top_k_weights)
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    for expert, tokens, places in _hits(top_k_index, module.num_experts):
        entering = hidden_states[tokens]
        inner = inner_activation(module, expert, entering)
        gates = top_k_weights[tokens, places]
        if observer:
            observer.statistics.add_routed(expert, {"input": entering, "inner": inner}, gates)
        leaving = _project(module, "down_proj", expert, inner)
        if module.has_post_expert_norm:
            leaving = module.post_expert_norm(leaving)
        output.index_add_(0, tokens, (leaving * gates[:, None]).float())
    return output.to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _experts_forward)
