"""`moequant ollama`.

Owns: its options. Leaves out: all work.
"""

from pathlib import Path
from typing import Any

import click

from moequant.commands.shared import force_option, json_option, out, print_json, progress_bars


@click.command(short_help="Write a Modelfile; create the model if Ollama answers.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("name")
@click.option("-o", "--output", type=click.Path(path_type=Path), metavar="MODELFILE",
              help="Where to write. Default: FILE with the ending .Modelfile.")  # fmt: skip
@click.option("--context", type=click.IntRange(min=1), metavar="N",
              help="Context in tokens (num_ctx). Default: the model's own, 8192 at most, since "
              "memory grows with it.")  # fmt: skip
@click.option("--system", metavar="TEXT", help="The system message.")
@click.option("--host", metavar="HOST:PORT",
              help="The Ollama server. Default: $OLLAMA_HOST, else 127.0.0.1:11434.")  # fmt: skip
@force_option
@json_option
def ollama(file: Path, name: str, as_json: bool, **arguments: Any) -> None:
    """Write FILE's Modelfile and create it as NAME in Ollama, if a server answers."""
    from moequant.ollama import publish
    from moequant.tables.ollama import ollama_tables

    with progress_bars(quiet=as_json) as progress:
        published = publish(file, name, progress=progress, **arguments)
    if as_json:
        print_json(published.to_json())
        return
    for table in ollama_tables(published):
        out.print(table, soft_wrap=True)
