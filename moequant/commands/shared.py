"""What the commands share: consoles, options, progress bars, opening a checkpoint.

Owns: these. Leaves out: the commands themselves, and all work.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from moequant.calibration_options import COMPUTE_DTYPES, CalibrationOptions
from moequant.errors import plain

if TYPE_CHECKING:
    from moequant.checkpoint import Checkpoint

F = TypeVar("F", bound=Callable[..., Any])
LOG_WIDTH = 120  # columns of a table that goes to a file or a pipe


class _Console(Console):
    """Prints text as it is: names of files and tensors may hold brackets, colons, escape codes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(plain(text), **options)


out = _Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
err = _Console(stderr=True)

output_option = click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
quant_option = click.option(
    "--quant", "preset", default="Q4_K_M", show_default=True, metavar="PRESET",
    help="A preset with the meaning it has in llama.cpp; `moequant presets` lists them.",
)  # fmt: skip


without_experts_option = click.option(
    "--without-experts", is_flag=True,
    help="Take the dense part of an additive MoE alone, without its experts and routers.",
)  # fmt: skip


def calibration_options(command: F) -> F:
    """The options that say how importance is measured."""
    default = CalibrationOptions()
    options = [
        click.option("--calibration", "texts", multiple=True, metavar="PATH",
                     type=click.Path(path_type=Path),
                     help="Calibration text: a text file, a folder of them, or JSONL with `text` "
                     "or `messages`. Repeat for more. Default: the built-in corpus."),
        click.option("--calibration-tokens", type=click.IntRange(min=1), metavar="N",
                     default=default.tokens, show_default=True,
                     help="Use at most N tokens of the calibration text."),
        click.option("--sequence-length", type=click.IntRange(min=2), metavar="N",
                     default=default.sequence_length, show_default=True,
                     help="Tokens per calibration sequence."),
        click.option("--expert-floor", type=click.IntRange(min=0), metavar="N",
                     default=default.floor, show_default=True,
                     help="An expert that fewer than N tokens reach also takes the tokens nearest "
                     "to being routed to it."),
        click.option("--seed", type=int, default=default.seed, show_default=True,
                     help="Which sequences are taken where there are more than enough."),
        click.option("--compute-dtype", type=click.Choice(COMPUTE_DTYPES),
                     help="Data type of the forward pass. Default: the checkpoint's."),
        click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:N]",
                     help="Where the forward pass and the encoders run."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def chosen_calibration(arguments: dict[str, Any]) -> CalibrationOptions:
    """A CalibrationOptions from the options above, which are taken out of `arguments`."""
    return CalibrationOptions(
        texts=tuple(arguments.pop("texts")),
        tokens=arguments.pop("calibration_tokens"),
        sequence_length=arguments.pop("sequence_length"),
        floor=arguments.pop("expert_floor"),
        seed=arguments.pop("seed"),
        compute_dtype=arguments.pop("compute_dtype"),
        device=arguments["device"],
    )


def open_checkpoint(checkpoint: str, *, dense_part: bool = False) -> "Checkpoint":
    """The checkpoint, or its dense part; what was passed over in opening it goes to stderr."""
    from moequant.checkpoint import open_checkpoint as read_checkpoint
    from moequant.without_experts import without_experts

    opened = read_checkpoint(checkpoint)
    if dense_part:
        opened = without_experts(opened)
    for note in opened.notes:
        err.print(note, style="yellow", soft_wrap=True)
    return opened


def report(line: str) -> None:
    """A line on stderr about what is being done."""
    err.print(line, soft_wrap=True)


def print_json(data: Any) -> None:
    """JSON on stdout; NaN and Inf, which it has no numbers for, become null."""
    click.echo(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(data: Any) -> Any:
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return data


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar per stage on stderr; a line per stage where stderr is no terminal; or nothing."""
    terminal = sys.stderr.isatty()
    bars = Progress(
        TextColumn("{task.description:>17}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(), console=err, disable=quiet or not terminal,
    )  # fmt: skip
    tasks: dict[str, Any] = {}

    def update(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total)
            if not (quiet or terminal):
                err.print(f"{stage} …")
        bars.update(tasks[stage], completed=done, total=total)

    with bars:
        yield update
