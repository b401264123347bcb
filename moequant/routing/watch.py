"""Watching the routing of one layer: whom the router chooses, and what the two branches add.

Owns: hooks on a layer's router and on the norms of its branches, and the sums they take.
Leaves out: running the layer, and the figures made of the sums (`measures`).

Sums over all tokens, the first of each sequence too. A gate g is what an expert's output is
multiplied by, so with Gemma 4's per_expert_scale, which may be negative; gate mass is Σ |g|, since
an expert adds as much with the sign turned. A branch's size is the RMS of its output after its
norm, where it is added to the other:

    RMS = sqrt(Σ h² / (tokens · hidden))    cosine = mean over tokens of cos(h_experts, h_dense)
"""

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from moequant.calibrate.near_miss import Branches, RouterOutput, probabilities
from moequant.routing.measures import normalised_entropy


@dataclass(frozen=True)
class Confidence:
    """Means over tokens, of the router's probabilities: the largest, the sum over the chosen, and
    the entropy over ln E (1 = the router does not care)."""

    top1: float
    chosen_mass: float
    entropy: float


@dataclass(frozen=True)
class BranchSize:
    """RMS of both branches as they are added, and the mean cosine between them."""

    experts_rms: float
    dense_rms: float
    cosine: float

    @property
    def ratio(self) -> float:
        """The experts' RMS over the dense branch's; infinite where that is all zeros."""
        return self.experts_rms / self.dense_rms if self.dense_rms else float("inf")


class RoutingWatch:
    """Watches `layer` within a `with` block.

    `counts` (sequences, experts) int64, in the order they pass, sequences of `length` tokens;
    `gate_mass` (experts,) float64. `used`: experts per token, as the layer runs.
    """

    def __init__(self, layer: nn.Module, row: RouterOutput, length: int) -> None:
        """`row`: where the family shows its routing."""
        self._layer = layer
        self._row = row
        self._length = length
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._counts: list[Tensor] = []
        self._confidence = torch.zeros(3, dtype=torch.float64)
        self._branches = _BranchSums()
        self.gate_mass = torch.zeros(0, dtype=torch.float64)
        self.tokens = 0
        self.used = 0

    def __enter__(self) -> "RoutingWatch":
        self._hook(self._row.module, self._note_routing)
        if self._row.branches is not None:
            self._watch_branches(self._row.branches)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, module: str, note: Any) -> None:
        handle = self._layer.get_submodule(module).register_forward_hook(
            lambda _module, _args, output: note(output)
        )
        self._hooks.append(handle)

    def _watch_branches(self, branches: Branches) -> None:
        self._hook(branches.dense, self._branches.note_dense)
        self._hook(branches.experts, self._branches.note_experts)

    def _note_routing(self, output: tuple[Tensor, ...]) -> None:
        scores = probabilities(output[self._row.output], self._row.kind).double()
        chosen, gates = output[self._row.chosen].cpu(), output[self._row.gates].cpu().double()
        experts, self.used = scores.shape[-1], chosen.shape[-1]
        if not self.tokens:
            self.gate_mass = torch.zeros(experts, dtype=torch.float64)
        sequences = len(chosen) // self._length
        hits = torch.zeros(sequences, experts, dtype=torch.int64)
        flat = chosen.reshape(sequences, -1)
        self._counts.append(hits.scatter_add_(1, flat, torch.ones_like(flat)))
        self.gate_mass.index_add_(0, chosen.flatten(), gates.abs().flatten())
        mass = scores.gather(1, chosen).sum(-1)
        of_tokens = torch.stack([scores.amax(-1), mass, normalised_entropy(scores)])
        self._confidence += of_tokens.sum(-1)
        self.tokens += len(chosen)

    @property
    def counts(self) -> Tensor:
        return torch.cat(self._counts)

    @property
    def confidence(self) -> Confidence:
        return Confidence(*(self._confidence / self.tokens).tolist())

    @property
    def branch(self) -> BranchSize | None:
        """None for a family without a dense branch beside the experts."""
        return None if self._row.branches is None else self._branches.size()


class _BranchSums:
    """Sums of squares and cosines of the two branches; the dense one passes first."""

    def __init__(self) -> None:
        self._dense = torch.empty(0)
        self._squares = torch.zeros(2, dtype=torch.float64)
        self._cosines = 0.0
        self._tokens = 0
        self._values = 0

    def note_dense(self, output: Tensor) -> None:
        self._dense = output

    def note_experts(self, output: Tensor) -> None:
        dense, experts = self._dense.float().flatten(0, -2), output.float().flatten(0, -2)
        self._dense = torch.empty(0)
        for place, values in enumerate((experts, dense)):
            self._squares[place] += values.square().sum(-1).double().sum().cpu()
        cosines = torch.nn.functional.cosine_similarity(experts, dense, dim=-1)
        self._cosines += float(cosines.double().sum())
        self._tokens += len(experts)
        self._values += experts.numel()

    def size(self) -> BranchSize:
        experts, dense = (self._squares / self._values).sqrt().tolist()
        return BranchSize(experts, dense, self._cosines / self._tokens)
