"""What the tables of all commands share: units, lists that are cut, a two-column grid.

Owns: wording of numbers. Leaves out: what is in the tables. Sizes are decimal (1 GB = 10⁹ bytes).
"""

from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

SHOWN_ROWS = 20  # lines of a list that can be as long as the model has experts


def size(nbytes: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB"


def count(parameters: int) -> str:
    """A number of parameters, short."""
    for limit, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= limit:
            return f"{parameters / limit:.1f}{unit}"
    return str(parameters)


def grid(title: str) -> Table:
    heading = Text(title, style="bold")
    table = Table(box=None, show_header=False, title=heading, title_justify="left")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def thin_notes(thin: list[str]) -> list[RenderableType]:
    if not thin:
        return []
    shown = "".join(f"\n  {line}" for line in thin[:SHOWN_ROWS])
    rest = f"\n  … and {len(thin) - SHOWN_ROWS} more" if len(thin) > SHOWN_ROWS else ""
    return [Text(f"{len(thin)} experts stayed thin in calibration:{shown}{rest}", style="yellow")]


def left_out(names: list[str]) -> Text:
    """Checkpoint tensors that are not exported, by the module they belong to."""
    groups: dict[str, int] = {}
    for name in names:
        module = ".".join(name.split(".")[:2])
        groups[module] = groups.get(module, 0) + 1
    listed = ", ".join(f"{module} ({n})" for module, n in groups.items())
    return Text(f"left out: {len(names)} tensors: {listed}", style="yellow")


def parameters_json(parameters: Any) -> dict[str, int]:
    return {"total": parameters.total, "active": parameters.active,
            "dense": parameters.dense, "expert": parameters.expert}  # fmt: skip
