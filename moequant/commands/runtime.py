"""`moequant runtime build`, `moequant runtime info` and `moequant runtime cuda-check`.

Owns: their options. Leaves out: all work.
"""

from pathlib import Path

import click

from moequant.commands.shared import json_option, out, print_json, progress_bars, report


@click.group(short_help="Build the pinned llama.cpp, patched or stock; see what was built.")
def runtime() -> None:
    """Build the pinned llama.cpp, patched or stock, and see what was built.

    The patched one runs files whose experts have types of their own; all others run on any
    llama.cpp. Everything is kept in the user's cache ($MOEQUANT_CACHE moves it).
    """


@runtime.command(short_help="Fetch, patch and build llama.cpp.")
@click.option("--stock", is_flag=True, help="Apply no patches.")
@click.option("--cuda", is_flag=True, help="Build the CUDA backend, too; needs nvcc.")
@click.option("--source", type=click.Path(path_type=Path), metavar="DIR",
              help="A llama.cpp source tree of your own in place of the pinned one. It is copied, "
              "never written to.")  # fmt: skip
@click.option("--tool", "extra", multiple=True, metavar="NAME",
              help="Also build this program of llama.cpp, e.g. llama-server. Repeat for more.",
              )  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), metavar="N",
              help="Compilers that run at once. Default: Ninja's choice.")  # fmt: skip
def build(
    stock: bool, cuda: bool, source: Path | None, extra: tuple[str, ...], jobs: int | None
) -> None:
    """Fetch, verify, patch and build llama.cpp; at once where that was done before.

    Prints the folder of its programs and libraries.
    """
    from moequant.runtime.llama_cpp import RUNTIME_TOOLS, ensure_built

    with progress_bars(quiet=False) as progress:
        built = ensure_built(
            tuple(dict.fromkeys((*RUNTIME_TOOLS, *extra))), report, patched=not stock, cuda=cuda,
            source=source, jobs=jobs, progress=progress,
        )  # fmt: skip
    click.echo(built.binaries)


@runtime.command(short_help="What was built: patches, options, backends, size.")
@json_option
def info(as_json: bool) -> None:
    """What was built: commit, patches, options, programs, libraries, backends, size on disk."""
    from moequant.runtime.info import runtime_info
    from moequant.tables.runtime import runtime_json, runtime_tables

    found = runtime_info()
    if as_json:
        print_json(runtime_json(found))
        return
    for table in runtime_tables(found):
        out.print(table, soft_wrap=True)


@runtime.command("cuda-check", short_help="Compile the CUDA files that the patches change.")
@click.option("--file", "files", multiple=True, metavar="NAME",
              help="Compile this file of llama.cpp's CUDA backend, e.g. mmq.cu. Repeat for more. "
              "Default: those that the patches change.")  # fmt: skip
@click.option("--architecture", "architectures", multiple=True, metavar="NUMBER",
              help="Compile for this one of llama.cpp's architectures, e.g. 86. Repeat for more. "
              "Default: all of them.")  # fmt: skip
@json_option
def cuda_check(files: tuple[str, ...], architectures: tuple[str, ...], as_json: bool) -> None:
    """Compile the CUDA files that the patches change, for every architecture that llama.cpp
    compiles for by default with this nvcc; no GPU is needed, and nothing is linked or run.

    Takes minutes for each file; what was compiled before is not compiled again.
    """
    from moequant.runtime.cuda_check import check_cuda
    from moequant.tables.runtime import cuda_check_json, cuda_check_tables

    done = check_cuda(report, files=files, architectures=architectures)
    if as_json:
        print_json(cuda_check_json(done))
        return
    for table in cuda_check_tables(done):
        out.print(table, soft_wrap=True)
