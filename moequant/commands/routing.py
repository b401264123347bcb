"""`moequant routing`.

Owns: its options. Leaves out: all work.
"""

from pathlib import Path
from typing import Any

import click

from moequant.calibration_options import COMPUTE_DTYPES
from moequant.commands.shared import json_option, open_checkpoint, out, print_json, progress_bars
from moequant.routing.options import RoutingOptions

DEFAULT = RoutingOptions()


@click.command()
@click.argument("checkpoint")
@click.option("--text", "texts", multiple=True, metavar="NAME=FILE",
              help="A text of one domain, under a name of its own: a text file, a folder of them, "
              "or JSONL. Repeat for more. Default: the built-in texts.")  # fmt: skip
@click.option("--tokens", type=click.IntRange(min=1), metavar="N",
              default=DEFAULT.tokens, show_default=True,
              help="Use at most N tokens of each text.")  # fmt: skip
@click.option("--sequence-length", type=click.IntRange(min=3), metavar="N",
              default=DEFAULT.sequence_length, show_default=True,
              help="Tokens per sequence, whose second half counts for perplexity.")  # fmt: skip
@click.option("--top", metavar="J,…",
              help="Measure perplexity with J experts per token. Default: every number up to the "
              "model's own, or the powers of two below it where that is more than 8.")  # fmt: skip
@click.option("--no-ablation", is_flag=True, help="Measure no perplexities: one pass, not k + 1.")
@click.option("--seed", type=int, default=DEFAULT.seed, show_default=True,
              help="Which sequences are taken where there are more than enough.")  # fmt: skip
@click.option("--compute-dtype", type=click.Choice(COMPUTE_DTYPES),
              help="Data type of the forward pass. Default: the checkpoint's.")  # fmt: skip
@click.option("--device", default=DEFAULT.device, show_default=True, metavar="cpu|cuda[:N]",
              help="Where the forward pass runs.")  # fmt: skip
@json_option
def routing(
    checkpoint: str,
    texts: tuple[str, ...],
    top: str | None,
    no_ablation: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Show how a model uses its experts, and what they are worth."""
    options = RoutingOptions(
        texts=tuple(map(_named_text, texts)),
        tops=None if top is None else _numbers(top),
        ablation=not no_ablation,
        **arguments,
    )
    from moequant.architectures import describe
    from moequant.pipeline import check_device
    from moequant.routing.analysis import analyse_routing
    from moequant.tables import routing as tables

    check_device(options.device)
    opened = open_checkpoint(checkpoint)
    with progress_bars(quiet=as_json) as progress:
        analysis = analyse_routing(opened, describe(opened), options, progress)
    if as_json:
        print_json(tables.routing_json(analysis))
        return
    for table in tables.routing_tables(analysis):
        out.print(table)


def _named_text(value: str) -> tuple[str, Path]:
    """NAME=FILE as its parts; UsageError where one is missing."""
    from moequant.errors import UsageError

    name, _, file = value.partition("=")
    if not name.strip() or not file:
        raise UsageError(f"--text {value}: give a name and a file, as in --text code=main.py.")
    return name.strip(), Path(file)


def _numbers(value: str) -> tuple[int, ...]:
    """J,… as numbers; UsageError for anything else."""
    from moequant.errors import UsageError

    parts = value.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--top {value}: give numbers of experts, as in --top 1,2,4.")
    return tuple(int(part) for part in parts)
