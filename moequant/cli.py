"""The `moequant` command: the group of all subcommands, their errors and exit codes.

Owns: what is the same for all of them. Leaves out: the subcommands (`commands`). Errors are one
message on stderr, with exit code 2 for bad usage or input and 1 for work that failed; Ctrl-C is
130.
"""

import io
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import click
from rich.text import Text

import moequant
from moequant.commands.bench import bench
from moequant.commands.evaluate import evaluate
from moequant.commands.export import calibrate, export, plan, presets
from moequant.commands.inspect import inspect
from moequant.commands.ollama import ollama
from moequant.commands.report import report
from moequant.commands.routing import routing
from moequant.commands.runtime import runtime
from moequant.commands.shared import err
from moequant.commands.validate import validate
from moequant.errors import MoequantError

INTERRUPTED = 130  # what a shell reports for a program that SIGINT stopped


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

    Then measure the file against the checkpoint, see how its experts are used and what they cost,
    write a report about it, and hand it on to Ollama.

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


for command in (
    export,
    calibrate,
    plan,
    presets,
    inspect,
    evaluate,
    ollama,
    routing,
    bench,
    validate,
    report,
    runtime,
):
    main.add_command(command)


if __name__ == "__main__":
    main()
