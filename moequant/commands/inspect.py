"""`moequant inspect`.

Owns: its options. Leaves out: all work.
"""

import click

from moequant.commands.shared import err, json_option, out, print_json


@click.command()
@click.argument("path")
@json_option
@click.pass_context
def inspect(ctx: click.Context, path: str, as_json: bool) -> None:
    """Show what a checkpoint, a GGUF file or an imatrix holds. Reads headers only.

    Exit code 1 if a GGUF file's expert banks are damaged.
    """
    from moequant.inspection import inspect as look
    from moequant.tables.inspection import inspection_tables

    found = look(path)
    if as_json:
        print_json(found.to_json())
    else:
        for table in inspection_tables(found):
            out.print(table)
    if found.damage:
        err.print(f"Error: {found.damage}", style="red", markup=False, soft_wrap=True)
        ctx.exit(1)
