"""Tables and data of `bench`.

Owns: wording, order. Leaves out: measuring anything. The first file is what the others are
compared with.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moequant.bench import Bench, FileBench
from moequant.runtime.llama_bench import Speed
from moequant.tables.common import size

Cell = Callable[[FileBench], str]
Number = Callable[[FileBench], float | None]


def bench_tables(bench: Bench, bandwidth: float | None) -> list[RenderableType]:
    """A column for each file; `bandwidth` in bytes per second adds the speed it would allow."""
    files = bench.files
    table = Table(box=None, header_style="bold")
    table.add_column("", style="cyan", no_wrap=True)
    for name in _short_names([file.footprint.path for file in files]):
        table.add_column(Text(name), overflow="fold")

    def add(label: str, value: Number, show: Callable[[float], str]) -> None:
        if any(value(file) is not None for file in files):
            table.add_row(label, *_compared(files, value, show))

    add("file", lambda f: f.footprint.file, size)
    add("weights", lambda f: f.footprint.weights, size)
    table.add_row("  experts", *map(_experts, files))
    add("bytes per token", lambda f: f.footprint.token, size)
    table.add_row("  dense", *(size(file.footprint.token_dense) for file in files))
    table.add_row("  experts", *map(_routed, files))
    if bench.options is not None:
        _add_speed(table, f"pp{bench.options.prompt}", [file.prompt for file in files])
        _add_speed(table, f"tg{bench.options.generate}", [file.generation for file in files])
    add("effective bandwidth", lambda f: f.bandwidth, _per_second)
    if bandwidth is not None:
        label = f"at {bandwidth / 1e9:g} GB/s"
        add(label, lambda f: f.footprint.bound(bandwidth), lambda n: f"≤ {_rate(n)}")
        if any(file.bandwidth is not None for file in files):
            table.add_row("  of it reached", *(_share(file, bandwidth) for file in files))
    return [table, *map(Text, _remarks(bench))]


def bench_json(bench: Bench, bandwidth: float | None) -> dict[str, Any]:
    """What `bench --json` prints; rates in tokens per second, bandwidths in bytes per second."""
    options, run = bench.options, bench.files[0].run
    return {
        "files": [_file_json(file, bandwidth) for file in bench.files],
        "bandwidth": bandwidth,
        "options": None if options is None else vars(options),
        "llama_cpp": None if run is None else {
            "build": bench.build, "build_commit": run.build_commit,
            "build_number": run.build_number, "backends": run.backends, "cpu": run.cpu,
            "gpu": run.gpu, "threads": run.threads, "gpu_layers": run.gpu_layers,
        },
    }  # fmt: skip


def _file_json(file: FileBench, bandwidth: float | None) -> dict[str, Any]:
    footprint = file.footprint
    return {
        "file": str(footprint.path),
        "architecture": footprint.architecture,
        "file_bytes": footprint.file,
        "weight_bytes": footprint.weights,
        "expert_bytes": footprint.experts,
        "expert_count": footprint.expert_count,
        "expert_used_count": footprint.expert_used_count,
        "bytes_per_token": {"total": footprint.token, "dense": footprint.token_dense,
                            "experts": footprint.token_experts},
        "prompt": _speed_json(file.prompt),
        "generation": _speed_json(file.generation),
        "effective_bandwidth": file.bandwidth,
        "bound": None if bandwidth is None else footprint.bound(bandwidth),
    }  # fmt: skip


def _speed_json(speed: Speed | None) -> dict[str, Any] | None:
    return None if speed is None else {"mean": speed.mean, "stddev": speed.stddev,
                                       "samples": list(speed.samples)}  # fmt: skip


def _short_names(paths: Sequence[Path]) -> list[str]:
    """File names, or where two are the same the paths below the folder that all have in common."""
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    whole = [path.absolute() for path in paths]
    common = os.path.commonpath([path.parent for path in whole])
    return [str(path.relative_to(common)) for path in whole]


def _compared(files: Sequence[FileBench], value: Number, show: Callable[[float], str]) -> list[str]:
    """Each file's value and, with more than one file, how it relates to the first's."""
    values = [value(file) for file in files]
    return [_with_ratio(show(n), n, values) if n is not None else "" for n in values]


def _with_ratio(shown: str, number: float, values: Sequence[float | None]) -> str:
    first = values[0]
    return f"{shown} ({number / first:.2f}×)" if len(values) > 1 and first else shown


def _add_speed(table: Table, label: str, speeds: Sequence[Speed | None]) -> None:
    measured = [speed for speed in speeds if speed is not None]  # of all files, or of none
    means = [speed.mean for speed in measured]
    shown = [f"{_rate(speed.mean)} ± {_digits(speed.stddev)}" for speed in measured]
    if measured:
        table.add_row(label, *map(_with_ratio, shown, means, [means] * len(means)))


def _experts(file: FileBench) -> str:
    return size(file.footprint.experts) if file.footprint.experts else "none"


def _routed(file: FileBench) -> str:
    one = file.footprint
    if not one.expert_count:
        return "none"
    return f"{size(one.token_experts)}, {one.expert_used_count} of {one.expert_count}"


def _share(file: FileBench, bandwidth: float) -> str:
    return "" if file.bandwidth is None else f"{100 * file.bandwidth / bandwidth:.0f}%"


def _rate(per_second: float) -> str:
    return f"{_digits(per_second)} t/s"


def _digits(number: float) -> str:
    """Three digits or more: 4.37, 43.7, 437, 4370."""
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def _per_second(nbytes: float) -> str:
    return f"{size(nbytes)}/s"


def _remarks(bench: Bench) -> list[str]:
    """Where it was measured, and what the figures leave out."""
    run = bench.files[0].run
    counted = "bytes: weights only, without keys and values; k of E experts, evenly used"
    if run is None or bench.options is None:
        return [counted]
    where = ", ".join(filter(None, [run.backends, run.cpu, run.gpu, f"{run.threads} threads"]))
    depth = f", behind {bench.options.depth} tokens" if bench.options.depth else ""
    order = "; the files ran one after another" if len(bench.files) > 1 else ""
    return [
        f"{bench.build}; {where}; mean ± deviation of {bench.options.repetitions} runs"
        f"{depth}{order}",
        counted,
    ]
