"""`moequant validate`.

Owns: its options. Leaves out: all work.
"""

from math import isnan
from pathlib import Path
from typing import Any

import click

from moequant.commands.shared import json_option, out, print_json, progress_bars, report


def _number(_: click.Context, parameter: click.Parameter, value: float) -> float:
    """`value`; an error for nan, which no range refuses."""
    if isnan(value):
        raise click.BadParameter("nan is no number.", param=parameter)
    return value


@click.command(short_help="Check that llama.cpp's MoE kernels compute what a file says.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--library", type=click.Path(path_type=Path), metavar="DIR",
              help="The folder of a llama.cpp's shared libraries. Default: the pinned build, "
              "patched if FILE has expert banks.",
              )  # fmt: skip
@click.option("--backend", "backends", multiple=True, metavar="NAME",
              help="Only this device, backend or buffer type, e.g. CUDA, CPU or CPU_REPACK. "
              "Repeat for more. Default: all that the library has.")  # fmt: skip
@click.option("--rows", type=click.IntRange(min=0), metavar="N",
              help="Rows of each expert that are compared in MUL_MAT_ID; 0 for all. All are "
              "computed. Default: what keeps it quick.")  # fmt: skip
@click.option("--memory", type=click.FloatRange(min=0, min_open=True, max=4096), default=0.75,
              show_default=True, metavar="GIB", callback=_number,
              help="Weights of a tensor or layer that are used at once; what is larger is cut, "
              "and that is told.")  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1, max=512), metavar="N", help="CPU threads.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True, max=86400), default=60.0,
              show_default=True, metavar="SECONDS", callback=_number,
              help="Time for the kernels of one case.")  # fmt: skip
@click.option("--case", metavar="CASE",
              help="Only this case, by the name that an earlier run gave it.")  # fmt: skip
@json_option
@click.pass_context
def validate(
    ctx: click.Context, /, file: Path, backends: tuple[str, ...], as_json: bool, **arguments: Any
) -> None:
    """Check that the MoE kernels of a llama.cpp compute what FILE says.

    For each type and shape of FILE's expert tensors, the library's own kernels multiply by them,
    alone (MUL_MAT_ID) and in the whole MoE branch, on every backend and buffer type, for 1 to 512
    tokens and several routings, and are held against numpy. A case that aborts or hangs is a
    finding. Exit code 1 if any case fails, none could be checked, or a --backend is not there.
    """
    from moequant.tables.validate import validation_json, validation_tables
    from moequant.validate.run import validate as check

    with progress_bars(quiet=as_json) as progress:
        validation = check(file, backends=backends, progress=progress, report=report, **arguments)
    if as_json:
        print_json(validation_json(validation))
    else:
        for table in validation_tables(validation):
            out.print(table, soft_wrap=not hasattr(table, "columns"))
    if not validation.passed:
        ctx.exit(1)
