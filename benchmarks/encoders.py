"""Speed of our encoders against ggml_quantize_chunk, one core each, in interleaved pairs.

    python benchmarks/encoders.py [--types Q4_K,Q5_K] [--pairs 3] [--torch] [--json results.json]

A ratio is the median over pairs of (ggml's time / our time), both in CPU time of this process, so
that other work on the machine changes it little. The project asks for at least 2 in Q4_K and Q5_K
with importance, 0.5 in the trivial legacy types, 1 in the others. F32, F16 and BF16 are marked
`copy`: they are copied or rounded value by value, ggml's F32 in the oracle with torch's own copy,
so that theirs are figures of memory and not of an encoder. `scaling` is the speed in wall
time on two threads over that on one, and means something on an idle machine only.
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

SHAPES = ((64, 5376), (256, 4096))
SCALING_SHAPE = (1024, 4096)
COPIES = ("F32", "F16", "BF16")
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
    kind: str


@dataclass(frozen=True)
class Scaling:
    """Wall time of one thread over that of two."""

    qtype: str
    scaling: float


def wanted_ratio(qtype: str, importance: bool) -> float:
    if qtype in TRIVIAL:
        return 0.5
    return 2.0 if qtype in ("Q4_K", "Q5_K") and importance else 1.0


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def drawn(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and an importance row."""
    draw = torch.Generator().manual_seed(0)
    x = 0.02 * torch.randn(shape, generator=draw)
    return x, torch.randn(shape[1], generator=draw).square() + 0.05


def measure(
    ggml: Ggml, qtype: str, shape: tuple[int, int], importance: bool, pairs: int, compiled: bool
) -> Result:
    x, row = drawn(shape)
    weights = row if importance else None

    def ours() -> object:
        return quantize(x, qtype, weights, threads=1, compiled=None if compiled else False)

    def theirs() -> object:
        return ggml.quantize(x, qtype, weights)

    ours(), ggml.quantize(x[:1], qtype, weights)
    timed = [(seconds(ours), seconds(theirs)) for _ in range(pairs)]
    return Result(
        qtype,
        shape,
        importance,
        ours=x.numel() / 1e6 / min(mine for mine, _ in timed),
        ggml=x.numel() / 1e6 / min(other for _, other in timed),
        ratio=statistics.median(other / mine for mine, other in timed),
        wanted=wanted_ratio(qtype, importance),
        kind="copy" if qtype in COPIES else "encoder",
    )


def measure_scaling(qtype: str) -> Scaling:
    x, row = drawn(SCALING_SHAPE)

    def wall(threads: int) -> float:
        start = time.perf_counter()
        quantize(x, qtype, row, threads=threads)
        return time.perf_counter() - start

    wall(2)
    return Scaling(qtype, min(wall(1) for _ in range(3)) / min(wall(2) for _ in range(3)))


def table_of(results: list[Result]) -> Table:
    table = Table("type", "kind", "shape", "importance", title="Mparam/s on one core")
    for heading in ("ours", "ggml", "ratio", "wanted"):
        table.add_column(heading, justify="right")
    for result in results:
        colour = "green" if result.ratio >= result.wanted else "red"
        table.add_row(
            result.qtype,
            result.kind,
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
@click.option("--pairs", default=3, show_default=True, help="Timed pairs per line.")
@click.option("--torch", "in_torch", is_flag=True, help="The torch encoders, as on CUDA.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write this file.")
def main(types: str, pairs: int, in_torch: bool, output: Path | None) -> None:
    """Speed of our encoders against ggml's."""
    torch.set_num_threads(1)
    ggml = Ggml.of(ensure_built())
    names = types.split(",")
    results = [
        measure(ggml, qtype, shape, importance, pairs, compiled=not in_torch)
        for qtype in names
        for shape in SHAPES
        for importance in (False, True)
    ]
    Console().print(table_of(results))
    scaling = [measure_scaling("Q4_K")] if "Q4_K" in names and not in_torch else []
    for line in scaling:
        Console().print(f"{line.qtype}: two threads are {line.scaling:.2f} times as fast as one")
    if output:
        rows = [asdict(result) for result in (*results, *scaling)]
        output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
