"""`moequant evaluate`.

Owns: its options. Leaves out: all work.
"""

import json
from pathlib import Path
from typing import Any

import click

from moequant.calibration_options import COMPUTE_DTYPES
from moequant.commands.shared import (
    err,
    force_option,
    json_option,
    out,
    print_json,
    progress_bars,
)
from moequant.evaluation_options import BASELINES, ENGINES, OURS


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.gguf")
@click.option("--reference", required=True, metavar="CHECKPOINT|GGUF",
              help="What to hold the file against: the checkpoint it was made of, or another GGUF "
              "file of the same model.")  # fmt: skip
@click.option("--text", "texts", multiple=True, type=click.Path(path_type=Path), metavar="PATH",
              help="Text to measure on: a text file, a folder of them, or JSONL with `text` or "
              "`messages`. Repeat for more. Default: a built-in text that shares nothing with the "
              "calibration text.")  # fmt: skip
@click.option("--chat", is_flag=True,
              help="Format the text through the chat template: paragraphs become the turns of a "
              "user and an assistant. For instruction-tuned models.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=1), default=32768, show_default=True, metavar="N",
              help="Use at most N tokens: of more text, windows spread evenly over it (by "
              "llama.cpp: its beginning).")  # fmt: skip
@click.option("--context", type=click.IntRange(min=3), default=512, show_default=True, metavar="N",
              help="Tokens per window; the second half of each is scored.")  # fmt: skip
@click.option("--engine", type=click.Choice(ENGINES), default=OURS,
              show_default=True,
              help="llama.cpp: PPL and KLD by the pinned llama-perplexity (a reference checkpoint "
              "is first written as a GGUF file, in the temporary folder).")  # fmt: skip
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Choice(BASELINES),
    help="Also measure bitsandbytes' quantization of the reference checkpoint.",
)
@click.option("--sample-tokens", type=click.IntRange(min=0), default=1024, show_default=True,
              metavar="N",
              help="Tokens on which the error of each tensor alone is measured; 0 to leave that "
              "out.")  # fmt: skip
@click.option(
    "--compute-dtype",
    type=click.Choice(COMPUTE_DTYPES),
    default="float32",
    show_default=True,
    help="Data type of both forward passes.",
)
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]",
              help="Where the forward passes run.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Threads of llama.cpp.")
@click.option("--gpu-layers", type=click.IntRange(min=0), metavar="N",
              help="Layers that llama.cpp puts on the GPU.")  # fmt: skip
@click.option("--save", type=click.Path(path_type=Path), metavar="EVAL.json",
              help="Keep what was measured, for `moequant report`.")  # fmt: skip
@force_option
@json_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    file: Path,
    reference: str,
    save: Path | None,
    force: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure how true a GGUF file is to the model it was made of.

    Both run side by side over the same text, one layer of each in memory: perplexity, KL
    divergence, agreement, and the error of every layer and tensor.
    """
    from moequant.evaluate.run import evaluate as measure
    from moequant.files import check_distinct, check_target, replacing
    from moequant.pipeline import check_device, write_lossless
    from moequant.tables.evaluation import evaluation_json, evaluation_tables

    _refuse_idle_options(ctx)
    options = _options(arguments)
    check_device(options.compare.device)
    if save is not None:
        check_distinct([save], _inputs(file, Path(reference), options.text.texts))
        check_target(save, force=force)
    with progress_bars(quiet=as_json) as progress:
        found = measure(file, reference, options, write_lossless, progress)
    data = evaluation_json(found)
    if save is not None:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
        with replacing(save) as temporary:
            temporary.write_text(text + "\n", "utf-8")
    if as_json:
        for note in found.notes:
            err.print(note, style="yellow", soft_wrap=True)
        print_json(data)
        return
    for table in evaluation_tables(found):
        out.print(table)


def _inputs(file: Path, reference: Path, texts: tuple[Path, ...]) -> list[Path]:
    """Everything that is read; of a split model every file."""
    from moequant.gguf_file import is_gguf, read_model

    shards = [
        shard for path in (file, reference) if is_gguf(path) for shard in read_model(path).shards
    ]
    return [file, reference, *shards, *texts]


def _refuse_idle_options(ctx: click.Context) -> None:
    """UsageError for options that were given and that llama.cpp would not follow."""
    from moequant.errors import UsageError

    if ctx.params["engine"] == OURS:
        return
    ours_only = ("sample_tokens", "compute_dtype", "device")
    typed = click.core.ParameterSource.COMMANDLINE
    names = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    given = [names[name] for name in ours_only if ctx.get_parameter_source(name) == typed]
    if given:
        raise UsageError(f"{', '.join(given)}: only for --engine {OURS}.")


def _options(arguments: dict[str, Any]) -> Any:
    import torch

    from moequant.evaluate.compare import CompareOptions
    from moequant.evaluate.run import EvaluateOptions
    from moequant.evaluate.text import TextOptions

    text = TextOptions(
        texts=tuple(arguments.pop("texts")),
        chat=arguments.pop("chat"),
        length=arguments.pop("context"),
        tokens=arguments.pop("tokens"),
    )
    compare = CompareOptions(
        device=arguments.pop("device"),
        dtype=getattr(torch, arguments.pop("compute_dtype")),
        sample_tokens=arguments.pop("sample_tokens"),
    )
    return EvaluateOptions(text=text, compare=compare, **arguments)
