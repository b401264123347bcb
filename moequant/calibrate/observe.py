"""Watching one layer: which inputs its matrices see.

Owns: hooks on the modules of a layer, from them the sums for each GGUF tensor made of that layer,
and lending tokens to starved experts. Leaves out: running the layer (`forward`), sums by expert
(`experts`), which tokens are lent (`near_miss`).

For a matrix outside the experts: in_sum2 = Σ x² over all tokens, counts = their number. Which
module a GGUF tensor belongs to follows from the checkpoint tensors it is made of (`TensorSpec`).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from moequant.architectures import TensorSpec
from moequant.calibrate.experts import (
    ExpertObserver,
    ExpertStatistics,
    Side,
    inner_activation,
    observe_experts,
)
from moequant.calibrate.imatrix import MatrixStatistics
from moequant.calibrate.near_miss import Routing, near_misses, probabilities, router_output
from moequant.calibrate.weights import WeightNames
from moequant.errors import CalibrationError


@dataclass
class LinearStatistics:
    """Sums of one matrix: `in_sum2` (columns,) float64 and the number of tokens."""

    in_sum2: Tensor
    count: int = 0

    def add(self, values: Tensor) -> None:
        """Inputs (..., columns)."""
        rows = values.reshape(-1, values.shape[-1])
        self.in_sum2 += rows.float().square().sum(0).double().cpu()
        self.count += len(rows)


def observable(tensor: TensorSpec) -> bool:
    """Whether a GGUF tensor is a matrix in a layer, so one that calibration has sums for."""
    return tensor.bid is not None and len(tensor.shape) >= 2 and len(tensor.sources) > 0


class LayerObserver:
    """Watches `layer` until `close`.

    `tensors` are the layer's; `path` is what stands before module names in the model, up to and
    with the layer's number. `floor` 0 keeps nothing for near misses.
    """

    def __init__(
        self,
        layer: nn.Module,
        path: str,
        tensors: Iterable[TensorSpec],
        names: WeightNames,
        *,
        model_type: str,
        floor: int,
    ) -> None:
        """Put the hooks in place."""
        self._floor = floor
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._linears: dict[str, LinearStatistics] = {}
        self._module_of: dict[str, str] = {}
        self._expert_tensors: list[TensorSpec] = []
        self._experts: nn.Module | None = None
        self._scores: list[Tensor] = []
        for tensor in filter(observable, tensors):
            module = (names.parameter(tensor.sources[0]) or "").removeprefix(f"{path}.")
            if tensor.is_expert:
                self._expert_tensors.append(tensor)
                self._experts = layer.get_submodule(module.rpartition(".")[0])
            elif module:  # a matrix no module uses (Gemma 4's reused keys) is never multiplied
                self._watch(layer, tensor, module.removesuffix(".weight"))
        if self._experts is not None:
            self._observer = ExpertObserver(self._expert_tensors[0].n_matrices, keep=floor > 0)
            observe_experts(self._experts, self._observer)
            if floor:
                self._watch_router(layer, model_type)

    def _watch(self, layer: nn.Module, tensor: TensorSpec, module: str) -> None:
        self._module_of[tensor.name] = module
        if module not in self._linears:
            sums = LinearStatistics(torch.zeros(tensor.shape[-1], dtype=torch.float64))
            self._linears[module] = sums
            hook = layer.get_submodule(module).register_forward_pre_hook(
                lambda _, args: sums.add(args[0])
            )
            self._hooks.append(hook)

    def _watch_router(self, layer: nn.Module, model_type: str) -> None:
        row = router_output(model_type)
        hook = layer.get_submodule(row.module).register_forward_hook(
            lambda _module, _args, output: self._scores.append(
                probabilities(output[row.output], row.kind)
            )
        )
        self._hooks.append(hook)

    @torch.inference_mode()
    def feed_starved(self) -> None:
        """Lend tokens to experts below the floor; to be called after the last batch."""
        if self._experts is None:
            return
        sums, device = self._observer.statistics, next(self._experts.parameters()).device
        if not bool((sums.counts < self._floor).any()):
            return
        routing = Routing(torch.cat(self._scores), self._observer.chosen, self._observer.gates)
        for expert, tokens, gates in near_misses(routing, sums.counts, self._floor):
            entering = self._observer.rows(tokens).to(device)
            inner = inner_activation(self._experts, expert, entering)
            sides: dict[Side, Tensor] = {"input": entering, "inner": inner}
            sums.add_near_miss(expert, sides, gates.to(device))

    def close(self) -> None:
        """Take the hooks away; what was kept for near misses is let go."""
        for hook in self._hooks:
            hook.remove()
        self._scores.clear()
        if self._experts is not None:
            observe_experts(self._experts, None)
            self._observer.forget()

    def entries(self) -> dict[str, MatrixStatistics]:
        """The sums by GGUF tensor name; raises CalibrationError where they are not finite."""
        made = {n: linear_entry(self._linears[module]) for n, module in self._module_of.items()}
        for tensor in self._expert_tensors:
            side: Side = "inner" if "_down_" in tensor.role else "input"
            made[tensor.name] = _expert(self._observer.statistics, side, self._floor > 0)
        for name, entry in made.items():
            check_sums(name, entry)
        return made


def check_sums(name: str, entry: MatrixStatistics) -> None:
    """Raise CalibrationError, naming tensor and expert, for sums that float32 does not hold."""
    sound = np.full(len(entry.counts), True)
    for part in vars(entry).values():
        if part is not None:
            sound &= np.isfinite(part).reshape(len(part), -1).all(1)
    if sound.all():
        return
    bad = np.flatnonzero(~sound).tolist()
    of = f", expert {', '.join(map(str, bad))}" if len(sound) > 1 else ""
    raise CalibrationError(
        f"{name}{of}: the sums of squared inputs are not finite; "
        "try --compute-dtype float32, or check the weights"
    )


def linear_entry(sums: LinearStatistics) -> MatrixStatistics:
    """The sums as they go into the file."""
    return MatrixStatistics(
        in_sum2=sums.in_sum2[None].float().numpy(),
        counts=torch.tensor([sums.count]).float().numpy(),
    )


def _expert(sums: ExpertStatistics, side: Side, lent: bool) -> MatrixStatistics:
    in_sum2 = sums.in_sum2[side]
    near_miss = sums.near_miss_in_sum2.get(side, torch.zeros_like(in_sum2))
    return MatrixStatistics(
        in_sum2=in_sum2.float().numpy(),
        counts=sums.counts.float().numpy(),
        gate_in_sum2=sums.gate_in_sum2[side].float().numpy(),
        gate_counts=sums.gate_counts.float().numpy(),
        near_miss_in_sum2=near_miss.float().numpy() if lent else None,
        near_miss_counts=sums.near_miss_counts.float().numpy() if lent else None,
        near_miss_gate_counts=sums.near_miss_gate_counts.float().numpy() if lent else None,
    )
