"""The `moequant` command: each subcommand parses, calls one function, prints what came back.

Owns: options, tables, progress bars, exit codes. Leaves out: all work. Errors are one message on
stderr, with exit code 2 for bad usage or input and 1 for work that failed; Ctrl-C is 130.
"""

import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import moequant
from moequant.calibration_options import COMPUTE_DTYPES, CalibrationOptions
from moequant.errors import MoequantError

if TYPE_CHECKING:
    from moequant.checkpoint import Checkpoint

F = TypeVar("F", bound=Callable[..., Any])
INTERRUPTED = 130  # what a shell reports for a program that SIGINT stopped

CALIBRATION_ONLY = (
    "texts", "calibration_tokens", "sequence_length", "expert_floor", "seed", "compute_dtype",
)  # fmt: skip
LOG_WIDTH = 120  # columns of a table that goes to a file or a pipe

# No markup: names of files and tensors may hold brackets.
out = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
err = Console(stderr=True, highlight=False, markup=False)


class Commands(click.Group):
    """A group that turns moequant's own errors into a message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MoequantError as error:
            err.print(Text("Error: ", style="bold red"), end="")
            err.print(str(error), soft_wrap=True)
            ctx.exit(error.exit_code)
        except OSError as error:  # none is expected; a file system may still surprise
            err.print(f"Error: {error}", soft_wrap=True)
            ctx.exit(1)
        except (KeyboardInterrupt, click.Abort):
            err.print("\nStopped; nothing half-written was kept.")
            ctx.exit(INTERRUPTED)


def _terminate(*_: Any) -> NoReturn:
    raise KeyboardInterrupt  # these end like Ctrl-C, so that temporary files are removed


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(moequant.__version__, prog_name="moequant")
def main() -> None:
    """Turn a Mixture-of-Experts checkpoint into a calibrated, quantized GGUF file.

    CHECKPOINT is a folder with config.json and safetensors, or a Hugging Face id (org/name, or
    org/name@revision). Memory holds one layer at a time, whatever the model's size.
    """
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no "→" is no error
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub)\b")


def _calibration_options(command: F) -> F:
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


def _chosen_calibration(arguments: dict[str, Any]) -> CalibrationOptions:
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


_output = click.option("-o", "--output", required=True, type=click.Path(path_type=Path))
_force = click.option("--force", is_flag=True, help="Replace files that exist.")
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
_quant = click.option("--quant", "preset", default="Q4_K_M", show_default=True, metavar="PRESET",
                      help="A preset with the meaning it has in llama.cpp; `moequant presets` "
                      "lists them.")  # fmt: skip


@main.command()
@click.argument("checkpoint")
@_output
@_quant
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), metavar="PLAN.JSON",
              help="Use this plan's types instead of a preset's.")  # fmt: skip
@click.option("--imatrix", "imatrix_file", type=click.Path(path_type=Path), metavar="FILE",
              help="Take importance from this imatrix (ours or llama-imatrix's).")  # fmt: skip
@click.option("--no-calibration", is_flag=True, help="Quantize without importance.")
@_calibration_options
@click.option("--save-imatrix", type=click.Path(path_type=Path), metavar="FILE",
              help="Keep the imatrix, for further exports.")  # fmt: skip
@click.option("--save-plan", type=click.Path(path_type=Path), metavar="FILE",
              help="Keep the plan.")  # fmt: skip
@click.option("--perplexity", "text", type=click.Path(path_type=Path), metavar="TEXT",
              help="Then measure perplexity on TEXT, before and after.")  # fmt: skip
@_force
@_json
@click.pass_context
def export(
    ctx: click.Context,
    /,
    checkpoint: str,
    output: Path,
    text: Path | None,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Calibrate, quantize and write a GGUF file in one go."""
    from moequant import pipeline, reports
    from moequant.architectures import describe
    from moequant.evaluate.perplexity import text_windows

    _refuse_idle_options(ctx)
    options = _export_options(arguments)
    opened = _open(checkpoint)
    windows = None if text is None else text_windows(opened.path, text, spec=describe(opened))
    with _progress(quiet=as_json) as progress:
        result = pipeline.export(opened, output, options, progress)
        fidelity = None
        if windows is not None:
            fidelity = pipeline.measure_perplexity(result, windows, options.device, progress)
    if as_json:
        _print_json(reports.export_json(result, fidelity))
        return
    for table in reports.export_tables(result, fidelity):
        out.print(table)


def _refuse_idle_options(ctx: click.Context) -> None:
    """UsageError for options that were given and would have no effect."""
    from moequant.errors import UsageError

    def given(name: str) -> bool:
        return ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE

    if given("plan_file") and given("preset"):
        raise UsageError("--quant has no use beside --plan, which has a type for every tensor.")
    without = [name for name in ("imatrix_file", "no_calibration") if given(name)]
    options = {parameter.name: parameter.opts[0] for parameter in ctx.command.params}
    idle = [options[name] for name in CALIBRATION_ONLY if given(name)]
    if without and idle:
        raise UsageError(f"{', '.join(idle)}: no use beside {options[without[0]]}.")


def _export_options(arguments: dict[str, Any]) -> Any:
    from moequant.errors import UsageError
    from moequant.pipeline import ExportOptions

    calibration = _chosen_calibration(arguments)
    no_calibration = arguments.pop("no_calibration")
    if no_calibration and arguments["imatrix_file"] is not None:
        raise UsageError("--no-calibration and --imatrix exclude each other.")
    return ExportOptions(calibration=None if no_calibration else calibration, **arguments)


@main.command()
@click.argument("checkpoint")
@_output
@_calibration_options
@_force
@_json
def calibrate(checkpoint: str, output: Path, force: bool, as_json: bool, **arguments: Any) -> None:
    """Measure importance per column and expert; write it as an imatrix that llama.cpp reads too."""
    from moequant import reports
    from moequant.architectures import describe
    from moequant.calibrate import calibrate as measure
    from moequant.files import check_distinct, check_target
    from moequant.pipeline import check_device

    options = _chosen_calibration(arguments)
    check_device(options.device)
    opened = _open(checkpoint)
    check_distinct([output], [opened.path, *options.texts])
    check_target(output, force=force)
    model = describe(opened)
    with _progress(quiet=as_json) as progress:
        imatrix = measure(opened, model, options, progress)
    imatrix.write(output)
    if as_json:
        _print_json(reports.imatrix_json(output, imatrix))
        return
    for table in reports.imatrix_tables(output, imatrix):
        out.print(table)


@main.command()
@click.argument("checkpoint")
@_output
@_quant
@click.option("--no-imatrix", is_flag=True, help="Plan for an export without importance.")
@_force
@_json
def plan(
    checkpoint: str, output: Path, preset: str, no_imatrix: bool, force: bool, as_json: bool
) -> None:
    """Write the type of every tensor to a JSON file; edit it and give it to `export --plan`."""
    from moequant import reports
    from moequant.architectures import describe
    from moequant.files import check_distinct, check_target
    from moequant.pipeline import base_type
    from moequant.plan import preset_plan

    opened = _open(checkpoint)
    check_distinct([output], [opened.path])
    check_target(output, force=force)
    model = describe(opened)
    base = base_type(opened, model)
    made = preset_plan(preset, model, has_imatrix=not no_imatrix, base=base)
    made.write(output)
    if as_json:
        _print_json(reports.plan_json(made))
        return
    for table in reports.plan_tables(made):
        out.print(table)


@main.command()
@_json
def presets(as_json: bool) -> None:
    """List the presets: name, default type, what it is."""
    from moequant import reports
    from moequant.plan import PRESETS

    if as_json:
        _print_json(reports.presets_json(PRESETS))
        return
    out.print(reports.presets_table(PRESETS))


@main.command()
@click.argument("path")
@_json
def inspect(path: str, as_json: bool) -> None:
    """Show what a checkpoint, a GGUF file or an imatrix holds. Reads headers only."""
    from moequant import reports
    from moequant.inspection import inspect as look

    found = look(path)
    if as_json:
        _print_json(found.to_json())
        return
    for table in reports.inspection_tables(found):
        out.print(table)


def _open(checkpoint: str) -> "Checkpoint":
    """The checkpoint, opened; what was passed over in opening it goes to stderr."""
    from moequant.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    for note in opened.notes:
        err.print(note, style="yellow", soft_wrap=True)
    return opened


def _print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


@contextmanager
def _progress(*, quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
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


if __name__ == "__main__":
    main()
