"""What `ollama` and `export --ollama` print.

Owns: wording. Leaves out: the work (`moequant.ollama`).
"""

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from moequant.tables.common import grid

if TYPE_CHECKING:
    from moequant.ollama import Published


def ollama_tables(published: "Published") -> list[RenderableType]:
    """The Modelfile, whether the model was created and else how to, and notes."""
    made = grid(f"Ollama: {published.name}")
    made.add_row("Modelfile", str(published.path))
    if published.modelfile.template:
        made.add_row("template", "in the Modelfile, as the file's own chat template renders")
    for name, value in published.modelfile.parameters:
        made.add_row(name, repr(value) if isinstance(value, str) else str(value))
    if published.created:
        made.add_row("created", f"ollama run {published.name}")
    tables: list[RenderableType] = [made]
    if not published.created:
        nobody = f"No Ollama server answered at {published.server}"
        tables.append(Text(f"{nobody}. Where one runs:\n  {published.by_hand}"))
    tables += [Text(f"note: {note}", style="yellow") for note in published.notes]
    return tables
