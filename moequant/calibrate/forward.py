"""transformers' forward pass, one layer in memory at a time.

Owns: building the model without weights, running its embedding stage, then each decoder layer over
all sequences, then its head, each loaded when its turn comes and dropped after it. Leaves out: what
is observed on the way (`observe`), and any arithmetic of the model itself: attention, routing,
norms and masks are transformers' modules.

How: the model is built on the meta device. With its decoder layers replaced by recorders it is run
once per batch of sequences; that yields the first hidden states and the arguments of every layer
(masks, rotary embeddings, per-layer inputs, the dict in which Gemma 4 hands keys and values on to
layers that reuse them). Then layer by layer: load, run every batch, drop.

Memory: one layer, the hidden states (tokens x hidden), per-layer inputs and reused keys and values
where the family has them. Of an embedding table only the rows of tokens that occur are kept; of the
output matrix one slice of the vocabulary at a time.
"""

import contextlib
import copy
import ctypes
import os
import sys
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from moequant.architectures import ModelSpec
from moequant.calibrate.experts import EXPERTS_IMPLEMENTATION
from moequant.calibrate.weights import WeightNames, WeightSource, read_rows
from moequant.errors import ArchitectureError

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total)."""

_VOCABULARY_SLICE = 16384  # rows of the output matrix in memory at once
_POSITIONS = 1024  # positions whose logits are in memory at once, for one such slice
_EMBEDDING_SLICE = 8192  # rows of an embedding table read at once
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
_HEAP_BLOCKS = 1 << 25  # bytes; smaller blocks come from the heap and are used again
_HEAP_KEPT = 1 << 28  # bytes that the heap may keep free while a layer runs
_FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Batch:
    """Sequences of one length on their way through the layers.

    `hidden`: (sequences, tokens, hidden), CPU, compute dtype; `calls`: for each layer still to
    come, the further arguments of its forward, on the CPU.
    """

    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]] | None]


class StreamedModel:
    """A causal language model whose weights are read layer by layer from `source`.

    `dtype`: compute dtype, None = the one of the checkpoint's first layer. Raises
    ArchitectureError for a configuration that transformers has no such model for.
    """

    def __init__(
        self,
        source: WeightSource,
        spec: ModelSpec,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the modules without weights; reads none."""
        _bound_memory()
        self.spec = spec
        self.source = source
        self.device = torch.device(device)
        self.dtype = dtype or _checkpoint_dtype(source, spec)
        self._model = empty_model(spec)
        self._base = getattr(self._model, self._model.base_model_prefix)
        self._layers = list(self._base.layers)
        self.names = WeightNames(self._model, source, spec.prefix)
        self._base.layers = nn.ModuleList()

    @property
    def layers_path(self) -> str:
        """What stands before a layer's number in module names: "model.layers"."""
        return f"{self._model.base_model_prefix}.layers"

    @torch.inference_mode()
    def embed(self, windows: Tensor, batch_tokens: int = 4096) -> list[Batch]:
        """Token ids (sequences, tokens) to batches that stand before the first layer."""
        occurring, compact = torch.unique(windows, return_inverse=True)
        base = copy.deepcopy(self._base)
        self._compute_buffers(base, self._model.base_model_prefix)
        for name, module in base.named_modules():
            if isinstance(module, nn.Embedding):
                path = f"{self._model.base_model_prefix}.{name}.weight"
                module.weight = nn.Parameter(self._rows(path, occurring), requires_grad=False)
                module.padding_idx = None  # an id of the whole table; only gradients use it
        self._load(base, self._model.base_model_prefix)
        shared: dict[tuple[int, str], Any] = {}
        at_once = max(1, batch_tokens // windows.shape[1])
        return [self._record(base, ids, shared) for ids in compact.split(at_once)]

    def _rows(self, parameter: str, rows: Tensor) -> Tensor:
        """The given rows (sorted ids) of an embedding table, in the compute dtype."""
        name = self.names.checkpoint_name(parameter)
        if name is None:
            raise ArchitectureError(f"the checkpoint has no tensor for {parameter}")
        parts = []
        for start in range(0, int(rows[-1]) + 1, _EMBEDDING_SLICE):
            inside = rows[(rows >= start) & (rows < start + _EMBEDDING_SLICE)]
            if len(inside):
                first, last = int(inside[0]), int(inside[-1])
                part = read_rows(self.source, name, first, last + 1)
                parts.append(part[inside - first].to(self.device, self.dtype))
        return torch.cat(parts)

    def _record(self, base: Any, ids: Tensor, shared: dict[tuple[int, str], Any]) -> Batch:
        cpu = torch.device("cpu")
        recorders = [_Recorder(layer) for layer in self._layers]
        base.layers = nn.ModuleList(recorders)
        base(input_ids=ids.to(self.device), use_cache=False)
        first = recorders[0].hidden
        calls = [
            (_moved(tuple(map(_own, r.args)), cpu), _interned(bid, _moved(r.kwargs, cpu), shared))
            for bid, r in enumerate(recorders)
        ]
        return Batch(first.to(cpu), list(calls))

    @contextlib.contextmanager
    def layer(self, bid: int) -> Iterator[nn.Module]:
        """Layer `bid` with its weights, for as long as the context lasts."""
        blank = self._layers[bid]
        layer = copy.deepcopy(blank)
        self._materialize(layer, f"{self.layers_path}.{bid}")
        try:
            yield layer
        finally:
            layer.to("meta")
            _return_free_memory()

    @torch.inference_mode()
    def run_layer(self, layer: nn.Module, bid: int, batch: Batch) -> None:
        """Advance `batch` through layer `bid`; its arguments for that layer are let go."""
        call = self._call(bid, batch)
        batch.calls[bid] = None
        batch.hidden = self._run(layer, batch.hidden, *call)

    @torch.inference_mode()
    def peek(self, layer: nn.Module, bid: int, batch: Batch) -> Tensor:
        """What `layer`, in the place of layer `bid`, would make of `batch`, which stays as it is.

        `layer` may be another model's. Returns (sequences, tokens, hidden) on the CPU.
        """
        return self._run(layer, batch.hidden.clone(), *_forked(self._call(bid, batch), {}))

    def _call(self, bid: int, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = batch.calls[bid]
        if call is None:
            raise ValueError(f"batch has already been through layer {bid}")
        return call

    def _run(
        self, layer: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        given = _moved(args, self.device), _moved(kwargs, self.device)
        made = layer(hidden.to(self.device), *given[0], **given[1])
        after: Tensor = (made[0] if isinstance(made, tuple) else made).to("cpu")
        return after

    def run_layers(self, batches: list[Batch], progress: Progress | None = None) -> None:
        """Advance all batches through all layers."""
        for bid in range(len(self._layers)):
            with self.layer(bid) as layer:
                for batch in batches:
                    self.run_layer(layer, bid, batch)
            if progress:
                progress("layers", bid + 1, len(self._layers))

    @torch.inference_mode()
    def final_norm(self, hidden: Tensor) -> Tensor:
        """The output matrix's input: (..., hidden) after the last norm, on the compute device."""
        norm = copy.deepcopy(self._base.norm)
        self._materialize(norm, f"{self._model.base_model_prefix}.norm")
        normed: Tensor = norm(hidden.to(self.device))
        return normed

    @torch.inference_mode()
    def logits(self, normed: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """Logits in pieces, from what `final_norm` gave, flattened to (positions, hidden).

        Yields (first position, first token id, logits (positions, ids) in float32); each slice of
        the output matrix is read once. The model's own head runs, so that soft-capping and scaling
        are transformers'.
        """
        name = _output_matrix(self.spec)
        head = copy.deepcopy(self._model)
        for start in range(0, self.spec.vocab_size, _VOCABULARY_SLICE):
            stop = min(start + _VOCABULARY_SLICE, self.spec.vocab_size)
            weight = read_rows(self.source, name, start, stop).to(self.device, self.dtype)
            head.lm_head.weight = nn.Parameter(weight, requires_grad=False)
            for first in range(0, len(normed), _POSITIONS):
                some = normed[first : first + _POSITIONS]
                setattr(head, head.base_model_prefix, _Given(some[None].to(self.device)))
                ids = torch.zeros(1, len(some), dtype=torch.int64, device=self.device)
                yield first, start, head(input_ids=ids).logits[0].float()

    def _materialize(self, module: nn.Module, path: str) -> None:
        """Give a module on the meta device its values."""
        self._compute_buffers(module, path)
        self._load(module, path)

    def _load(self, module: nn.Module, path: str) -> None:
        self.names.load(module, path, self.dtype, self.device)
        module.eval()

    def _compute_buffers(self, module: nn.Module, path: str) -> None:
        """Fill buffers that no checkpoint holds: rotary tables, scales.

        This comes before loading: transformers' initialisation fills a module's weights, too,
        which does nothing while they are on the meta device.
        """
        for name, part in module.named_modules():
            inside = f"{path}.{name}." if name else f"{path}."
            own = [n for n, b in part.named_buffers(recurse=False) if b.is_meta]
            computed = [n for n in own if not self.names.has(inside + n)]
            for buffer in computed:
                empty = torch.empty_like(part.get_buffer(buffer), device=self.device)
                setattr(part, buffer, empty)
            if computed:
                self._model._init_weights(part)


def _output_matrix(spec: ModelSpec) -> str:
    """The checkpoint's name of the output matrix: of its own, or else of the embeddings."""
    wanted = "token_embd.weight" if spec.tied_embeddings else "output.weight"
    return next(tensor.sources[0] for tensor in spec.tensors if tensor.name == wanted)


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it is called with, changes nothing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hidden = torch.empty(0)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        object.__setattr__(self, "_layer", layer)  # not a submodule: its weights are not here

    def __getattr__(self, name: str) -> Any:
        """Some models ask a layer for its attention type before they call it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_layer"), name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.args, self.kwargs = hidden_states, args, kwargs
        return hidden_states


class _Given(nn.Module):
    """Stands in for the model below a head: its output is given beforehand."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._output = _Output(last_hidden_state=hidden)

    def forward(self, **_: Any) -> SimpleNamespace:
        return self._output


class _Output(SimpleNamespace):
    """A model output that has None for whatever else a head asks of it."""

    def __getattr__(self, name: str) -> None:
        return None


def _checkpoint_dtype(source: WeightSource, spec: ModelSpec) -> torch.dtype:
    """The dtype of the first floating tensor of the layers, float32 where the source tells none."""
    inside = (
        info for name, info in source.tensors.items() if name.startswith(f"{spec.prefix}layers.")
    )
    dtypes = (getattr(info, "dtype", None) for info in inside)
    return next((dtype for dtype in dtypes if dtype in _FLOATING), torch.float32)


def empty_model(spec: ModelSpec) -> Any:
    """The causal language model of `spec` on the meta device, experts observed by us."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = dict(spec.config.get("text_config") or spec.config)  # of a model for several media
    model_type = fields.pop("model_type", None)
    # Built in float32 whatever the checkpoint has: Gemma 4 rounds the scale of its embeddings to
    # the dtype it is built in, and casts it to the dtype it computes in.
    fields.pop("dtype", None)
    try:
        config = AutoConfig.for_model(model_type, **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            _without_experts(model, spec)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArchitectureError(
            f"transformers builds no model from this {model_type!r} configuration: {error}"
        ) from error
    if spec.moe_layers:
        model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return model


def _without_experts(model: Any, spec: ModelSpec) -> None:
    """Rebuild the layers that have no experts in a model whose config gives experts to all."""
    if not getattr(model.config, "enable_moe_block", False):
        return
    plain = copy.deepcopy(model.config)
    plain.enable_moe_block = False
    layers = model.base_model.layers
    for bid in set(range(len(layers))) - set(spec.moe_layers):
        layers[bid] = type(layers[bid])(plain, bid)


def _bound_memory() -> None:
    """Use memory again within a layer, and keep it from creeping up from layer to layer (glibc).

    Left alone, glibc maps every activation of some MB afresh, and the kernel clears its pages each
    time: calibrating the example model took 4 to 9 times as long. It also raises the size from
    which blocks are mapped apart as it goes; weights then land on the heap and leave holes in it
    (15 MB a layer of 360 MB). Sizes set by hand stay; free pages go back after each layer. In
    bfloat16, oneDNN keeps a compiled kernel for every number of tokens an expert was given, up to
    1024 of them (65 MB); the variable counts if nothing has run through oneDNN yet.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCKS)
        mallopt(_M_TRIM_THRESHOLD, _HEAP_KEPT)


def _return_free_memory() -> None:
    """Give pages that malloc holds free back to the system (glibc)."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def fork(batch: Batch) -> Batch:
    """A batch at the same place that goes its own way.

    Tensors are shared, since no layer writes into them; what layers write into is not: the dict in
    which Gemma 4 hands keys and values on, one object in the calls of many layers.
    """
    own: dict[int, Any] = {}
    return Batch(batch.hidden, [call and _forked(call, own) for call in batch.calls])


def _forked(value: Any, own: dict[int, Any]) -> Any:
    if type(value) is dict:
        return {name: _forked(item, own) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_forked(item, own) for item in value)
    if isinstance(value, MutableMapping):
        return own.setdefault(id(value), copy.copy(value))
    return value


def _own(value: Any) -> Any:
    """A tensor cut from a larger one as a tensor of its own, so that the larger can be freed."""
    return value.clone() if isinstance(value, Tensor) else value


def _interned(bid: int, kwargs: dict[str, Any], seen: dict[tuple[int, str], Any]) -> dict[str, Any]:
    """`kwargs` with values replaced by the first batch's where they are equal to these."""
    return {name: _same(seen.setdefault((bid, name), v), v) for name, v in kwargs.items()}


def _same(first: Any, value: Any) -> Any:
    if isinstance(value, tuple) and isinstance(first, tuple) and len(value) == len(first):
        return tuple(_same(f, v) for f, v in zip(first, value, strict=True))
    both = isinstance(first, Tensor) and isinstance(value, Tensor)
    return first if both and first.shape == value.shape and torch.equal(first, value) else value


def _moved(value: Any, device: torch.device) -> Any:
    """`value` with the tensors in tuples, lists and dicts on `device`; other objects unchanged."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if type(value) is dict:
        return {name: _moved(item, device) for name, item in value.items()}
    return value
