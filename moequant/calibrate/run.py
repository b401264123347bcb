"""The calibration run: text in, statistics out.

Owns: the order of things. Leaves out: each of them.
"""

import torch

import moequant
from moequant.architectures import ModelSpec
from moequant.calibrate.forward import Batch, Progress, StreamedModel
from moequant.calibrate.imatrix import Imatrix, MatrixStatistics
from moequant.calibrate.observe import LayerObserver, LinearStatistics, check_sums, linear_entry
from moequant.calibrate.text import Corpus, read_corpus
from moequant.calibrate.windows import (
    check_ids,
    choose_windows,
    cut_windows,
    leading_token,
    load_tokenizer,
    token_stream,
)
from moequant.calibration_options import CalibrationOptions
from moequant.checkpoint import Checkpoint
from moequant.errors import CalibrationError


def calibrate(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    options: CalibrationOptions,
    progress: Progress | None = None,
) -> Imatrix:
    """Run the calibration text through the model and take the statistics of every matrix.

    `progress(stage, done, total)` is called after each layer. Writes nothing. Raises
    CalibrationError for unusable text and for activations that are not finite.
    """
    corpus = read_corpus(options.texts)
    tokenizer = load_tokenizer(checkpoint.path)
    stream = token_stream(tokenizer, corpus.documents, spec)
    cut = cut_windows(stream, options.sequence_length, leading_token(tokenizer, spec))
    windows = choose_windows(cut, options.tokens, options.seed)
    check_ids(windows, spec)
    dtype = None if options.compute_dtype is None else getattr(torch, options.compute_dtype)
    model = StreamedModel(checkpoint, spec, device=options.device, dtype=dtype)
    return Imatrix(
        entries=observe_model(model, windows, options, progress),
        datasets=list(corpus.datasets),
        chunk_count=len(windows),
        chunk_size=options.sequence_length,
        metadata=_metadata(checkpoint, corpus, windows, model, options),
    )


def observe_model(
    model: StreamedModel,
    windows: torch.Tensor,
    options: CalibrationOptions,
    progress: Progress | None = None,
) -> dict[str, MatrixStatistics]:
    """Statistics by GGUF tensor name for token ids (sequences, tokens)."""
    spec, entries = model.spec, dict[str, MatrixStatistics]()
    batches = model.embed(windows, options.batch_tokens)
    for bid in range(spec.block_count):
        with model.layer(bid) as layer:
            observer = LayerObserver(
                layer,
                f"{model.layers_path}.{bid}",
                [tensor for tensor in spec.tensors if tensor.bid == bid],
                model.names,
                model_type=spec.config["model_type"],
                floor=options.floor,
            )
            for batch in batches:
                model.run_layer(layer, bid, batch)
            check_output(bid, batches)
            observer.feed_starved()
            observer.close()
            entries |= observer.entries()
        if progress:
            progress("calibrate", bid + 1, spec.block_count)
    if options.process_output:
        entries |= _output_entry(model, batches)
    return entries


def _output_entry(model: StreamedModel, batches: list[Batch]) -> dict[str, MatrixStatistics]:
    """Statistics of the output matrix, under the name of the tensor that serves as one."""
    sums = LinearStatistics(torch.zeros(model.spec.hidden_size, dtype=torch.float64))
    for batch in batches:
        sums.add(model.final_norm(batch.hidden))
    name = "token_embd.weight" if model.spec.tied_embeddings else "output.weight"
    entry = linear_entry(sums)
    check_sums(name, entry)
    return {name: entry}


def check_output(bid: int, batches: list[Batch]) -> None:
    """Raise CalibrationError for hidden states after layer `bid` that are not finite."""
    bad = sum(int((~batch.hidden.isfinite()).any(-1).sum()) for batch in batches)
    if bad:
        tokens = sum(batch.hidden[..., 0].numel() for batch in batches)
        raise CalibrationError(
            f"layer {bid}: the output of {bad} of {tokens} tokens is not finite in "
            f"{batches[0].hidden.dtype}; try --compute-dtype float32, or check the weights"
        )


def _metadata(
    checkpoint: Checkpoint,
    corpus: Corpus,
    windows: torch.Tensor,
    model: StreamedModel,
    options: CalibrationOptions,
) -> dict[str, str | int | float]:
    return {
        "moequant.version": moequant.__version__,
        "moequant.checkpoint.name": checkpoint.name,
        "moequant.checkpoint.digest": checkpoint.digest(),
        **({"moequant.checkpoint.part": checkpoint.part} if checkpoint.part else {}),
        "moequant.calibration.corpus_sha256": corpus.digest(),
        "moequant.calibration.tokens": windows.numel(),
        "moequant.calibration.sequence_length": options.sequence_length,
        "moequant.calibration.seed": options.seed,
        "moequant.calibration.floor": options.floor,
        "moequant.calibration.kappa": float(options.kappa),
        "moequant.calibration.compute_dtype": str(model.dtype).removeprefix("torch."),
    }
