"""`moequant bench`.

Owns: its options. Leaves out: all work.
"""

from math import isfinite
from pathlib import Path
from typing import Any

import click

from moequant.commands.shared import json_option, out, print_json, progress_bars, report

GB = 1e9
RUN_ONLY = ("prompt", "generate", "depth", "repetitions", "threads", "gpu_layers", "tool")


def _finite(_: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """`value`; an error for nan, and for what is inf or becomes it in bytes."""
    if value is not None and not isfinite(value * GB):
        raise click.BadParameter(f"{value} is no bandwidth in GB/s.", param=parameter)
    return value


@click.command(short_help="Measure speed, beside the bytes that a token touches.")
@click.argument("files", nargs=-1, required=True, metavar="FILE…", type=click.Path(path_type=Path))
@click.option("--bandwidth", type=click.FloatRange(min=0, min_open=True), metavar="GB/S",
              callback=_finite,
              help="Also print the speed that this memory bandwidth would allow.")  # fmt: skip
@click.option("--prompt", type=click.IntRange(min=0), default=512, show_default=True, metavar="N",
              help="Tokens of the prompt; 0 leaves it out.")  # fmt: skip
@click.option("--generate", type=click.IntRange(min=0), default=128, show_default=True, metavar="N",
              help="Tokens that are generated; 0 leaves it out.")  # fmt: skip
@click.option("--depth", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
              help="Tokens that are in the context before either.")  # fmt: skip
@click.option("--repetitions", type=click.IntRange(min=1), default=5, show_default=True,
              metavar="N", help="Runs of each, of which mean and deviation are taken.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.")
@click.option("--gpu-layers", type=click.IntRange(min=0), metavar="N",
              help="Layers on the GPU. Default: all, where llama.cpp has a GPU.")  # fmt: skip
@click.option("--llama-bench", "tool", type=click.Path(path_type=Path), metavar="PATH",
              help="Run this llama-bench, e.g. one built for your GPU, not the pinned CPU build "
              "(which is patched if a file has expert banks).",
              )  # fmt: skip
@click.option("--no-run", is_flag=True, help="Count bytes only; run nothing.")
@json_option
@click.pass_context
def bench(
    ctx: click.Context,
    /,
    files: tuple[Path, ...],
    bandwidth: float | None,
    tool: Path | None,
    no_run: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Measure speed with llama-bench, beside the bytes that a token touches.

    Several files are measured one after another and compared with the first. Sizes are decimal,
    1 GB = 10⁹ bytes.
    """
    from moequant.bench import bench as measure
    from moequant.runtime.llama_bench import BenchOptions
    from moequant.tables.bench import bench_json, bench_tables

    if no_run:
        _refuse_idle_options(ctx)
    options = None if no_run else BenchOptions(**arguments)

    with progress_bars(quiet=as_json) as progress:
        measured = measure(files, options, tool=tool, progress=progress, report=report)
    per_second = None if bandwidth is None else bandwidth * GB
    if as_json:
        print_json(bench_json(measured, per_second))
        return
    for table in bench_tables(measured, per_second):
        out.print(table)


def _refuse_idle_options(ctx: click.Context) -> None:
    """UsageError for options that say how to run, beside --no-run."""
    from moequant.errors import UsageError

    source = click.core.ParameterSource.COMMANDLINE
    idle = [
        parameter.opts[0]
        for parameter in ctx.command.params
        if parameter.name in RUN_ONLY and ctx.get_parameter_source(parameter.name) == source
    ]
    if idle:
        raise UsageError(f"{', '.join(idle)}: no use beside --no-run.")
