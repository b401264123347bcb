"""`moequant report`.

Owns: its options. Leaves out: all work.
"""

from pathlib import Path

import click

from moequant.commands.shared import err, force_option, json_option, out, print_json
from moequant.errors import plain


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--evaluation", type=click.Path(path_type=Path), metavar="EVAL.JSON",
              help="What `moequant evaluate --json` printed for this file.")  # fmt: skip
@click.option("--routing", type=click.Path(path_type=Path), metavar="ROUTING.JSON",
              help="What `moequant routing --json` printed for the checkpoint.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path),
              help="Default: beside the GGUF file, with the suffix .html.")  # fmt: skip
@force_option
@json_option
def report(
    source: Path,
    evaluation: Path | None,
    routing: Path | None,
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write one self-contained HTML page about a GGUF file.

    SOURCE is the file, or the JSON of an evaluation, which names its file.
    """
    from moequant.files import check_distinct, check_target
    from moequant.report import find_file, gather, write_report

    file, evaluation = find_file(source, evaluation)
    output = output or file.with_suffix(".html")
    check_distinct([output], [path for path in (file, evaluation, routing) if path is not None])
    check_target(output, force=force)
    data = gather(file, evaluation, routing)
    for note in data.notes:
        err.print(plain(note), style="yellow", soft_wrap=True)
    write_report(output, data)
    if as_json:
        print_json({"report": str(output), "notes": list(data.notes)})
        return
    out.print(f"{output}", soft_wrap=True)
