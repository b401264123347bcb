"""From checkpoint tensors to the parameters of transformers' modules.

Owns: which checkpoint tensors make up which parameter, and loading them for a part of a model.
Leaves out: the modules (`forward`).

Names and shapes differ where transformers fuses what checkpoints keep apart (Qwen3-MoE's
`experts.3.gate_proj.weight` becomes a slice of `experts.gate_up_proj`). transformers' own
conversion table decides (`conversion_mapping.py`, the one `from_pretrained` uses), so that every
family it loads is loaded alike here. Of it we use `get_model_conversion_mapping`,
`rename_source_key` and a converter's `add_tensor` and `convert`: few calls, documented in
transformers as dynamic weight loading, each covered by `tests/calibrate/test_forward.py`.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from moequant.checkpoint import check_finite
from moequant.errors import CalibrationError, listing


class WeightSource(Protocol):
    """Where weights come from: a `Checkpoint`, or whatever serves tensors under its names.

    `tensors` has the names as keys; values that have a `dtype` tell the dtype. A source that also
    has `read_slice(name, start, stop)` gives rows of a tensor without reading all of it.
    """

    @property
    def tensors(self) -> Mapping[str, Any]:
        """The names of all tensors."""

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU."""


def read_rows(source: WeightSource, name: str, start: int, stop: int) -> Tensor:
    """Rows `start:stop` of a tensor, reading only these where the source can."""
    read_slice: Callable[[str, int, int], Tensor] | None = getattr(source, "read_slice", None)
    if read_slice is None:
        return source.read(name)[start:stop]
    return read_slice(name, start, stop)


@dataclass
class _Recipe:
    """The checkpoint tensors of one parameter, and the converter that joins them, if any."""

    converter: Any = None
    parts: list[tuple[str, str]] = field(default_factory=list)  # (checkpoint name, source pattern)


class WeightNames:
    """Which checkpoint tensors the parameters of `model` are made of.

    `prefix` is what stands before "layers." in the checkpoint; names without it are taken as they
    are, and what fits no parameter (vision towers, say) is left out.
    """

    def __init__(self, model: nn.Module, source: WeightSource, prefix: str) -> None:
        """`model` may be on the meta device; no weight is read."""
        self._source = source
        self._recipes: dict[str, _Recipe] = {}
        self._parameter_of: dict[str, str] = {}
        mapping = get_model_conversion_mapping(model)
        renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
        converters = [m for m in mapping if isinstance(m, WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        wanted = dict(model.state_dict())
        base = f"{model.base_model_prefix}."
        for name in sorted(source.tensors, key=dot_natural_key):
            plain = base + name.removeprefix(prefix) if name.startswith(prefix) else name
            parameter, pattern = rename_source_key(plain, renamings, converters)
            if parameter not in wanted:
                continue
            recipe = self._recipes.setdefault(parameter, _Recipe(by_pattern.get(pattern)))
            recipe.parts.append((name, pattern or name))
            self._parameter_of[name] = parameter

    def parameter(self, name: str) -> str | None:
        """The parameter that the checkpoint tensor `name` is, or is a part of."""
        return self._parameter_of.get(name)

    def has(self, parameter: str) -> bool:
        """Whether the checkpoint has what `parameter` is made of."""
        return parameter in self._recipes

    def checkpoint_name(self, parameter: str) -> str | None:
        """The one checkpoint tensor that is `parameter` as it stands, else None."""
        recipe = self._recipes.get(parameter)
        return None if recipe is None or recipe.converter else recipe.parts[0][0]

    def load(self, module: nn.Module, path: str, dtype: torch.dtype, device: torch.device) -> None:
        """Give `module`, which stands at `path` in the model, its parameters and buffers.

        Floating tensors become `dtype`. Only what lies on the meta device is loaded. Raises
        CalibrationError that lists every parameter the source has no tensor for.
        """
        names = [n for n, t in module.state_dict(keep_vars=True).items() if t.is_meta]
        values: dict[str, Tensor] = {}
        for name in names:
            parameter = f"{path}.{name}" if path else name
            if parameter in self._recipes:
                values |= self.assemble(parameter, dtype, device, self._source.read)
        own = {n.removeprefix(f"{path}.") if path else n: t for n, t in values.items()}
        module.load_state_dict(own, strict=False, assign=True)
        missing = [n for n in names if n not in own]
        if missing:
            raise CalibrationError(
                f"{path}: the checkpoint has no tensor for{listing(missing)}\n"
                "it does not match its config.json"
            )

    def parts(self, parameter: str) -> list[str]:
        """The checkpoint tensors that `parameter` is made of; none for an unknown one."""
        recipe = self._recipes.get(parameter)
        return [] if recipe is None else [name for name, _ in recipe.parts]

    def assemble(
        self,
        parameter: str,
        dtype: torch.dtype,
        device: torch.device,
        read: Callable[[str], Tensor],
    ) -> dict[str, Tensor]:
        """`parameter` by name, and whatever else its converter makes with it.

        `read` gives the checkpoint tensors; those that are floating become `dtype`.
        """
        recipe = self._recipes[parameter]

        def taken(name: str) -> Tensor:
            tensor = read(name)
            check_finite(name, tensor, getattr(self._source.tensors[name], "file", None))
            return tensor.to(device, dtype if tensor.is_floating_point() else None)

        if recipe.converter is None:
            return {parameter: taken(recipe.parts[0][0])}
        converter = copy.deepcopy(recipe.converter)
        for name, pattern in recipe.parts:
            converter.add_tensor(parameter, name, pattern, lambda name=name: taken(name))
        made = converter.convert(parameter)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}
