"""`moequant routing`: how a model uses its experts, and what they are worth.

Owns: the order of things, the result, and notes on what to make of it.
Leaves out: hooks (`watch`), formulas (`measures`), variants with fewer experts (`ablation`),
printing (`tables.routing`).

One pass over the layers does it all: each is loaded once, run over the texts with a watch on its
router, measured for the cosines between its experts, and run again for every variant of the
ablation. Memory: one layer, the hidden states of all texts, once per variant.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moequant.architectures import ModelSpec
from moequant.calibrate.forward import Batch, Progress, StreamedModel
from moequant.calibrate.near_miss import RouterOutput, router_output
from moequant.calibrate.run import check_output
from moequant.calibrate.text import Document, read_corpus
from moequant.calibrate.windows import (
    check_ids,
    choose_windows,
    cut_windows,
    leading_token,
    load_tokenizer,
    token_stream,
)
from moequant.checkpoint import Checkpoint
from moequant.errors import ArchitectureError, CalibrationError
from moequant.parameters import is_expert
from moequant.routing.ablation import Ablated, Variants
from moequant.routing.measures import (
    LEAST_SEQUENCES,
    Cosine,
    Specialisation,
    cosine_between_experts,
    dead,
    dominant,
    gini,
    normalised_entropy,
    specialisation,
)
from moequant.routing.options import RoutingOptions
from moequant.routing.watch import BranchSize, Confidence, RoutingWatch


@dataclass(frozen=True)
class LayerRouting:
    """Figures of one layer with experts; `measures` and `watch` define them.

    `share`: of the routed tokens, `gate_share`: of the gate mass, both (experts,) float64.
    `branch`: None without a dense branch; `cosine`: None with a single expert.
    """

    layer: int
    share: Tensor
    gate_share: Tensor
    gini: float
    entropy: float
    confidence: Confidence
    dead: list[int]
    dominant: list[int]
    domains: Specialisation
    cosine: Cosine | None
    branch: BranchSize | None


@dataclass(frozen=True)
class RoutingAnalysis:
    """`texts`: tokens by name, in sequences of `sequence_length`. `experts_used`: per token.
    `ablation`: None if it was left out. `notes`: sentences on what the figures cannot tell."""

    checkpoint: str
    texts: dict[str, int]
    sequence_length: int
    experts: int
    experts_used: int
    expert_bytes: int
    total_bytes: int
    layers: list[LayerRouting]
    ablation: list[Ablated] | None
    notes: tuple[str, ...]


def analyse_routing(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: RoutingOptions,
    progress: Progress | None = None,
) -> RoutingAnalysis:
    """Run the texts through `checkpoint`, once for all figures.

    Raises:
        ArchitectureError: a model without experts, or of a family whose router is not known.
        CalibrationError: text that is unusable or shorter than a window, or activations that are
            not finite.
        UsageError: numbers of experts to try that the model cannot choose.
    """
    if not spec.moe_layers:
        raise ArchitectureError(
            f"{checkpoint.name} has no layer with experts ({spec.block_count} dense layers): there "
            "is no routing to analyse."
        )
    row = router_output(spec.config["model_type"])
    variants = None
    if options.ablation:
        tops = options.tops_for(spec.expert_used_count, spec.expert_count)
        off = (0,) if row.branches else ()
        variants = Variants(row, (*off, *tops), spec.expert_used_count)
    cut = text_windows(checkpoint.path, spec, options)
    dtype = None if options.compute_dtype is None else getattr(torch, options.compute_dtype)
    model = StreamedModel(checkpoint, spec, device=options.device, dtype=dtype)
    layers, ablation = _run(model, row, cut, variants, options, progress)
    sizes = dict(_tensor_bytes(checkpoint, spec))
    return RoutingAnalysis(
        checkpoint=checkpoint.name,
        texts={name: windows.numel() for name, windows in cut.items()},
        sequence_length=options.sequence_length,
        experts=spec.expert_count,
        experts_used=spec.expert_used_count,
        expert_bytes=sum(size for name, size in sizes.items() if is_expert(name)),
        total_bytes=sum(sizes.values()),
        layers=layers,
        ablation=ablation,
        notes=tuple(_notes(spec, cut, options)),
    )


def _notes(spec: ModelSpec, cut: dict[str, Tensor], options: RoutingOptions) -> Iterator[str]:
    length = options.sequence_length
    if length > spec.context_length:
        yield (
            f"--sequence-length {length} is more than the model's context of "
            f"{spec.context_length} tokens (max_position_embeddings): what it does beyond it says "
            "little about the model."
        )
    numbers = {name: len(windows) for name, windows in cut.items()}
    few = [f"{name} has {n}" for name, n in numbers.items() if n < LEAST_SEQUENCES]
    if len(cut) > 1 and few:
        yield (
            f"Too few sequences of {length} tokens to tell whether experts prefer a text: "
            f"{', '.join(few)}, and {LEAST_SEQUENCES} of each are needed. Raise --tokens, give "
            "longer texts, or lower --sequence-length."
        )


def text_windows(folder: Path, spec: ModelSpec, options: RoutingOptions) -> dict[str, Tensor]:
    """Windows (n, length) of token ids by text, cut as calibration and llama-perplexity do.

    Raises CalibrationError, TokenizerError.
    """
    tokenizer = load_tokenizer(folder)
    bos, found = leading_token(tokenizer, spec), {}
    streams = {n: token_stream(tokenizer, docs, spec) for n, docs in _documents(options).items()}
    short = [f"{n} has {len(s)}" for n, s in streams.items() if len(s) < options.sequence_length]
    if short:
        raise CalibrationError(
            f"a window needs {options.sequence_length} tokens, and text {', '.join(short)}: give a "
            "longer text, or a smaller --sequence-length."
        )
    for name, stream in streams.items():
        windows = cut_windows(stream, options.sequence_length, bos)
        found[name] = choose_windows(windows, options.tokens, options.seed)
        check_ids(found[name], spec)
    return found


def _documents(options: RoutingOptions) -> dict[str, list[Document]]:
    """The documents of each text; the built-in corpus is one text per file."""
    if options.texts:
        return {name: list(read_corpus([path]).documents) for name, path in options.texts}
    found: dict[str, list[Document]] = {}
    for document in read_corpus([]).documents:
        found.setdefault(Path(document.origin).stem, []).append(document)
    return found


def _run(
    model: StreamedModel,
    row: RouterOutput,
    cut: dict[str, Tensor],
    variants: Variants | None,
    options: RoutingOptions,
    progress: Progress | None,
) -> tuple[list[LayerRouting], list[Ablated] | None]:
    """All texts through all layers; `variants` go with them."""
    spec, layers = model.spec, []
    windows = torch.cat(list(cut.values()))
    batches = model.embed(windows, options.batch_tokens)
    for bid in range(spec.block_count):
        moe = bid in spec.moe_layers
        if variants and bid == spec.moe_layers[0]:
            variants.fork(batches)
        with model.layer(bid) as layer:
            if moe:
                layers.append(_measure(model, layer, bid, row, batches, cut, options))
            else:
                _advance(model, layer, bid, batches)
            check_output(bid, batches)
            if variants:
                variants.run_layer(model, layer, bid, moe=moe)
        if progress:
            progress("routing", bid + 1, spec.block_count)
    if variants is None:
        return layers, None
    lengths = {name: len(part) for name, part in cut.items()}
    return layers, variants.scores(model, batches, windows, lengths)


def _advance(model: StreamedModel, layer: nn.Module, bid: int, batches: list[Batch]) -> None:
    for batch in batches:
        model.run_layer(layer, bid, batch)


def _measure(
    model: StreamedModel,
    layer: nn.Module,
    bid: int,
    row: RouterOutput,
    batches: list[Batch],
    cut: dict[str, Tensor],
    options: RoutingOptions,
) -> LayerRouting:
    """Advance `batches` through a layer with experts, and take its figures."""
    with RoutingWatch(layer, row, options.sequence_length) as watch:
        _advance(model, layer, bid, batches)
    labels = [torch.full((len(part),), n) for n, part in enumerate(cut.values())]
    counts = watch.counts.sum(0)
    share = counts.double() / counts.sum()
    return LayerRouting(
        layer=bid,
        share=share,
        gate_share=watch.gate_mass / watch.gate_mass.sum(),
        gini=gini(share),
        entropy=float(normalised_entropy(share)),
        confidence=watch.confidence,
        dead=dead(counts),
        dominant=dominant(counts, watch.tokens, watch.used),
        domains=specialisation(watch.counts, torch.cat(labels), list(cut), options.seed),
        cosine=cosine_between_experts(_expert_weights(model, layer, bid)),
        branch=watch.branch,
    )


def _expert_weights(model: StreamedModel, layer: nn.Module, bid: int) -> Iterator[Tensor]:
    """The fused weights of the layer's experts, each (experts, rows, columns)."""
    path = f"{model.layers_path}.{bid}."
    names = {
        model.names.parameter(tensor.sources[0]): None
        for tensor in model.spec.tensors
        if tensor.bid == bid and tensor.is_expert
    }
    for name in filter(None, names):
        yield layer.get_parameter(name.removeprefix(path))


def _tensor_bytes(checkpoint: Checkpoint, spec: ModelSpec) -> Iterator[tuple[str, int]]:
    """GGUF name and bytes in the checkpoint of every tensor of the model."""
    for tensor in spec.tensors:
        infos = [checkpoint.tensors[name] for name in tensor.sources]
        yield tensor.name, sum(info.stop - info.start for info in infos)
