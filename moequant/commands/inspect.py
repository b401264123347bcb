"""`moequant inspect`.

Owns: its options. Leaves out: all work.
"""

import click

from moequant.commands.shared import (
    json_option,
    out,
    print_json,
)


@click.command()
@click.argument("path")
@json_option
def inspect(path: str, as_json: bool) -> None:
    """Show what a checkpoint, a GGUF file or an imatrix holds. Reads headers only."""
    from moequant.inspection import inspect as look
    from moequant.tables.inspection import inspection_tables

    found = look(path)
    if as_json:
        print_json(found.to_json())
        return
    for table in inspection_tables(found):
        out.print(table)
