"""Speed of our encoders against ggml_quantize_chunk, one core each, in interleaved pairs.

    python benchmarks/encoders.py [--types Q4_K,Q5_K] [--pairs 7] [--json results.json]

A ratio is the median over pairs of (ggml's time / our time), both in CPU time of this process, so
that other work on the machine changes it little. The project asks for at least 2 in Q4_K and Q5_K
with importance, 0.5 in the trivial legacy types, 1 in the others.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moequant.quants import QUANT_TYPES, quantize
from moequant.runtime.llama_cpp import ensure_built
from tests.oracles.ggml import Ggml

SHAPES = ((64, 5376), (512, 4096))
TRIVIAL = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")


@dataclass(frozen=True)
class Result:
    """Speeds in million parameters per second of CPU time."""

    qtype: str
    shape: tuple[int, int]
    importance: bool
    ours: float
    ggml: float
    ratio: float
    wanted: float


def wanted_ratio(qtype: str, importance: bool) -> float:
    if qtype in TRIVIAL:
        return 0.5
    return 2.0 if qtype in ("Q4_K", "Q5_K") and importance else 1.0


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(ggml: Ggml, qtype: str, shape: tuple[int, int], importance: bool, pairs: int) -> Result:
    draw = torch.Generator().manual_seed(0)
    x = 0.02 * torch.randn(shape, generator=draw)
    row = torch.randn(shape[1], generator=draw).square() + 0.05 if importance else None

    def ours() -> object:
        return quantize(x, qtype, row, threads=1)

    def theirs() -> object:
        return ggml.quantize(x, qtype, row)

    ours(), theirs()
    timed = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    return Result(
        qtype,
        shape,
        importance,
        ours=x.numel() / 1e6 / min(mine for mine, _ in timed),
        ggml=x.numel() / 1e6 / min(other for _, other in timed),
        ratio=statistics.median(other / mine for mine, other in timed),
        wanted=wanted_ratio(qtype, importance),
    )


def table_of(results: list[Result]) -> Table:
    table = Table("type", "shape", "importance", title="Mparam/s on one core")
    for heading in ("ours", "ggml", "ratio", "wanted"):
        table.add_column(heading, justify="right")
    for result in results:
        colour = "green" if result.ratio >= result.wanted else "red"
        table.add_row(
            result.qtype,
            "×".join(map(str, result.shape)),
            "yes" if result.importance else "no",
            f"{result.ours:.1f}",
            f"{result.ggml:.1f}",
            f"[{colour}]{result.ratio:.2f}[/]",
            f"{result.wanted:g}",
        )
    return table


@click.command()
@click.option("--types", default=",".join(QUANT_TYPES), show_default=True)
@click.option("--pairs", default=7, show_default=True, help="Timed pairs per line.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write this file.")
def main(types: str, pairs: int, output: Path | None) -> None:
    """Speed of our encoders against ggml's."""
    torch.set_num_threads(1)
    ggml = Ggml.of(ensure_built())
    results = [
        measure(ggml, qtype, shape, importance, pairs)
        for qtype in types.split(",")
        for shape in SHAPES
        for importance in (False, True)
    ]
    Console().print(table_of(results))
    if output:
        output.write_text(json.dumps([asdict(result) for result in results], indent=2) + "\n")


if __name__ == "__main__":
    main()
