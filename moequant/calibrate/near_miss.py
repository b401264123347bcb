"""Near misses: tokens lent to experts that calibration starved.

Owns: which tokens a starved expert gets, and the gate each would have had. Leaves out: running
them (`observe`), and what is made of the sums (`imatrix`).

An expert routed fewer than `floor` tokens gets those with the highest router probability for it
among the tokens that were not routed to it, as many as it lacks. The gate: had token t been routed
to expert e, e would have displaced the weakest of its chosen experts, so with p the probabilities
and C the chosen,

    g(t, e) = c_e · p_e / (Σ_{j in C} p_j - min_{j in C} p_j + p_e)

c_e is what the family multiplies a normalised gate by (Gemma 4's per_expert_scale; 1 for most):
the mean of g·Σ_C p / p_e over tokens really routed to e, 1 for an expert without any, where it
scales all of the expert's sums alike and so changes no importance.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moequant.errors import ArchitectureError


@dataclass(frozen=True)
class Branches:
    """Modules of a decoder layer whose outputs (..., hidden) are added: a dense MLP's and the
    experts', both after their norms."""

    dense: str
    experts: str


@dataclass(frozen=True)
class RouterOutput:
    """Where a family's layers show router scores over all experts, and what is beside it.

    `module`: path of the router in a decoder layer; `output`: which of its outputs has the scores
    (tokens, experts); `kind`: what they are; `gates`, `chosen`: which of its outputs have the gates
    and the experts chosen, both (tokens, k); `top_k`: the attribute, seen from the router, that
    says how many it chooses; `branches`: None where experts stand in the place of a dense MLP.
    """

    module: str
    output: int
    kind: Literal["probabilities", "logits"]
    gates: int
    chosen: int
    top_k: str
    branches: Branches | None = None


ROUTERS = {
    "gemma4_text": RouterOutput(
        module="router",
        output=0,
        kind="probabilities",
        gates=1,
        chosen=2,
        top_k="config.top_k_experts",
        branches=Branches("post_feedforward_layernorm_1", "post_feedforward_layernorm_2"),
    ),
    "qwen3_moe": RouterOutput(
        module="mlp.gate", output=0, kind="logits", gates=1, chosen=2, top_k="top_k"
    ),
}
"""By transformers' `model_type`."""


def router_output(model_type: str) -> RouterOutput:
    """The row of a family; raises ArchitectureError where there is none."""
    if model_type not in ROUTERS:
        raise ArchitectureError(
            f"moequant does not know where {model_type!r} layers show router probabilities; "
            f"it does for {', '.join(ROUTERS)}"
        )
    return ROUTERS[model_type]


def probabilities(scores: Tensor, kind: str) -> Tensor:
    """Router scores (tokens, experts) as float32 probabilities on the CPU."""
    scores = scores.detach().float().cpu()
    return scores if kind == "probabilities" else scores.softmax(-1)


@dataclass(frozen=True)
class Routing:
    """How a layer's tokens were routed: `probabilities` (tokens, experts) float32, `chosen` int64
    and `gates`, both (tokens, k)."""

    probabilities: Tensor
    chosen: Tensor
    gates: Tensor


def near_misses(
    routing: Routing, counts: Tensor, floor: int
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For every expert with `counts` below `floor`: its number, token ids (n,), gates (n,).

    n is what it lacks, or fewer when there are no more tokens.
    """
    starved = (counts < floor).nonzero().flatten().tolist()
    if not starved:
        return
    of_chosen = routing.probabilities.gather(1, routing.chosen)
    mass, weakest = of_chosen.sum(1), of_chosen.amin(1)
    for expert in starved:
        routed = routing.chosen == expert
        p = routing.probabilities[:, expert]
        outside = p.masked_fill(routed.any(1), -1.0)
        lacking = min(floor - int(counts[expert]), int((outside >= 0).sum()))
        tokens = outside.topk(lacking).indices
        scale = _gate_scale(routing.gates[routed], (mass / p)[routed.any(1)])
        gates = scale * p[tokens] / (mass - weakest + p)[tokens]
        yield expert, tokens, torch.nan_to_num(gates)


def _gate_scale(gates: Tensor, inverse_shares: Tensor) -> float:
    """c_e above: the mean of gate over normalised probability, 1 without tokens."""
    ratios = (gates.float() * inverse_shares).double()
    ratios = ratios[ratios.isfinite()]
    return float(ratios.mean()) if len(ratios) else 1.0
