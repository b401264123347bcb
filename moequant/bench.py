"""What a file costs to run: its bytes, those that one token touches, and the speed it reaches.

Owns: counting bytes, and the bound that memory bandwidth sets. Leaves out: running llama-bench
(`runtime.llama_bench`) and printing.

A generated token needs every weight once, but for two things. Of E experts it reads k: k/E of a
layer's experts, which for banks of different types is the mean over evenly used experts. And of an
embedding table it reads one row, unless the table is the output matrix too (no `output.weight`).
Keys and values, activations and what a backend copies are not counted. Where memory is the limit,
as in generating one token at a time, bandwidth / bytes per token is the most that can be had.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moequant.errors import GGUFError, LlamaCppError, UsageError
from moequant.expert_banks import STACK, has_banks, stock_error
from moequant.gguf_file import GGUFFile, GGUFTensor, read_model
from moequant.parameters import is_expert
from moequant.plan.model import block_of
from moequant.runtime.llama_bench import BenchOptions, BenchRun, Speed, run_llama_bench
from moequant.runtime.llama_cpp import ensure_built, read_pin

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"
ROW_TABLES = frozenset({"per_layer_token_embd.weight", "position_embd.weight"})

Progress = Callable[[str, int, int], None]
Report = Callable[[str], None]


@dataclass(frozen=True)
class Footprint:
    """A model file's bytes. `file`: with headers, over all shards; `weights`: all tensors.

    `experts` are the bytes of `weights` in expert stacks. `token_dense` and `token_experts` are
    those that one generated token reads. `expert_count` and `expert_used_count` are 0 without
    experts, and the largest where layers differ.
    """

    path: Path
    architecture: str
    file: int
    weights: int
    experts: int
    token_dense: int
    token_experts: int
    expert_count: int
    expert_used_count: int
    context_length: int | None = None  # tokens the model was made for, where the file tells
    banked: bool = False  # experts in banks, which only a patched llama.cpp runs

    @property
    def token(self) -> int:
        """Bytes of weights that one generated token reads."""
        return self.token_dense + self.token_experts

    def bound(self, bandwidth: float) -> float:
        """The most tokens per second that `bandwidth` bytes per second allow."""
        return bandwidth / self.token


@dataclass(frozen=True)
class FileBench:
    """One file: its bytes and, if it was run, its speed."""

    footprint: Footprint
    run: BenchRun | None

    @property
    def prompt(self) -> Speed | None:
        """Of reading a prompt; None if that was not measured."""
        return None if self.run is None else self.run.prompt

    @property
    def generation(self) -> Speed | None:
        """Of generating; None if that was not measured."""
        return None if self.run is None else self.run.generation

    @property
    def bandwidth(self) -> float | None:
        """Bytes of weights read per second of generating; None if that was not measured."""
        speed = self.generation
        return None if speed is None else self.footprint.token * speed.mean


@dataclass(frozen=True)
class Bench:
    """Files side by side, in the order they were given; `build` says whose llama-bench ran."""

    files: tuple[FileBench, ...]
    options: BenchOptions | None
    build: str


def bench(
    paths: Sequence[Path],
    options: BenchOptions | None,
    *,
    tool: Path | None = None,
    progress: Progress = lambda *_: None,
    report: Report = lambda _: None,
) -> Bench:
    """Count the bytes of each file, then measure them one after another.

    `options` None: bytes only, nothing is run. `tool`: a llama-bench of another build than the
    pinned one, which is patched if any file has expert banks: all are measured by the same. All
    files are checked before the first is run.

    Raises:
        GGUFError: a file that is damaged, or no model.
        LlamaCppError: llama.cpp cannot be built, or llama-bench failed.
        UsageError: no file, options that leave nothing to measure, more tokens than a model was
            made for, or expert banks and a stock `tool`.
    """
    if not paths:
        raise UsageError("no file to measure.")
    footprints = [read_footprint(path) for path in paths]
    if options is None:
        return Bench(tuple(FileBench(one, None) for one in footprints), None, "")
    if options.runs == 0:
        raise UsageError("--prompt 0 and --generate 0 leave nothing to measure.")
    for one in footprints:
        _check_context(one, options)
    # a name without a folder would be looked for in $PATH; one that stands here is meant
    patched = any(one.banked for one in footprints)
    chosen = (tool.absolute() if tool.exists() else tool) if tool else _pinned(
        patched, report, progress)  # fmt: skip
    files = []
    for number, one in enumerate(footprints, 1):
        run = _run(chosen, one, options, _numbered(progress, number, len(paths)))
        files.append(FileBench(one, run))
    return Bench(tuple(files), options, _build(tool, files[0].run, patched))


def _run(tool: Path, one: Footprint, options: BenchOptions, progress: Progress) -> BenchRun:
    """`run_llama_bench`; a UsageError for a stock llama.cpp that misses what is in banks."""
    try:
        return run_llama_bench(tool, one.path, options, progress)
    except LlamaCppError as error:
        if one.banked and re.search(rf"'{STACK.pattern}' not found", str(error)):
            raise stock_error(one.path, tool) from error
        raise


def _check_context(footprint: Footprint, options: BenchOptions) -> None:
    longest = footprint.context_length
    if longest is not None and options.context > longest:
        raise UsageError(
            f"{footprint.path} was made for {longest} tokens at most; --depth {options.depth} with "
            f"--prompt {options.prompt} and --generate {options.generate} (each behind the depth) "
            f"needs {options.context}. Choose smaller numbers."
        )


def read_footprint(path: Path) -> Footprint:
    """Bytes of the model in `path`, or in it and its further shards; reads headers only.

    Raises:
        GGUFError: as `read_model`; not a model; or experts whose number no key tells.
    """
    file = read_model(path)
    kind = file.metadata.get("general.type", "model")
    architecture = file.metadata.get("general.architecture")
    if kind != "model" or not isinstance(architecture, str) or not file.tensors:
        what = f"is of type {kind!r}" if kind != "model" else "has no architecture or no tensors"
        raise GGUFError(f"{path} {what}, so it is no model to run; name a model's GGUF file.")
    tensors = list(file.tensors.values())
    experts = [tensor for tensor in tensors if is_expert(tensor.name)]
    dense = [tensor for tensor in tensors if not is_expert(tensor.name)]
    counts = {_experts_of(file, architecture, block_of(tensor.name)) for tensor in experts}
    return Footprint(
        path=path,
        architecture=architecture,
        file=file.nbytes,
        weights=sum(tensor.nbytes for tensor in tensors),
        experts=sum(tensor.nbytes for tensor in experts),
        token_dense=sum(_read_per_token(file, tensor) for tensor in dense),
        token_experts=_routed_bytes(file, architecture, experts),
        expert_count=max((total for total, _ in counts), default=0),
        expert_used_count=max((used for _, used in counts), default=0),
        context_length=_of_layer(file.metadata.get(f"{architecture}.context_length"), None),
        banked=has_banks(file),
    )


def _read_per_token(file: GGUFFile, tensor: GGUFTensor) -> int:
    """Bytes of a dense tensor that one token reads: all, or one row of a table it looks up in."""
    looked_up = tensor.name in ROW_TABLES or (tensor.name == EMBEDDING and OUTPUT in file.tensors)
    return tensor.nbytes // tensor.shape[0] if looked_up else tensor.nbytes


def _routed_bytes(file: GGUFFile, architecture: str, experts: list[GGUFTensor]) -> int:
    """Bytes of the experts that one token is routed to, over all layers."""
    by_layer: dict[int | None, int] = {}
    for tensor in experts:
        bid = block_of(tensor.name)
        by_layer[bid] = by_layer.get(bid, 0) + tensor.nbytes
    routed = 0
    for bid, nbytes in by_layer.items():
        total, used = _experts_of(file, architecture, bid)
        routed += nbytes * used // total
    return routed


def _experts_of(file: GGUFFile, architecture: str, bid: int | None) -> tuple[int, int]:
    """(experts, experts per token) of layer `bid`."""
    total, used = (
        _of_layer(file.metadata.get(f"{architecture}.{key}"), bid)
        for key in ("expert_count", "expert_used_count")
    )
    if total is None or used is None or not 1 <= used <= total:
        raise GGUFError(
            f"{file.path}: layer {bid} has experts, but {architecture}.expert_count is {total} "
            f"and {architecture}.expert_used_count {used}."
        )
    return total, used


def _of_layer(value: Any, bid: int | None) -> int | None:
    """The number `value`, or that of layer `bid` where each layer has its own."""
    if isinstance(value, list):
        value = value[bid] if bid is not None and bid < len(value) else None
    return value if type(value) is int else None


def _pinned(patched: bool, report: Report, progress: Progress) -> Path:
    """The pinned llama-bench, built on first use."""
    try:
        built = ensure_built(("llama-bench",), report, patched=patched, progress=progress)
        return built.tool("llama-bench")
    except LlamaCppError as error:
        raise LlamaCppError(
            f"{error}\nWithout it: --llama-bench PATH takes one of your own, and --no-run prints "
            "the bytes alone."
        ) from error


def _build(tool: Path | None, run: BenchRun | None, patched: bool) -> str:
    """Which llama.cpp it was, in words."""
    if tool is None:
        return f"llama.cpp {read_pin().commit} ({'pinned, patched' if patched else 'pinned'})"
    known = run is not None and run.build_commit != "unknown"
    commit = f" {run.build_commit} ({run.build_number})" if known and run is not None else ""
    return f"llama.cpp{commit}, {tool}"


def _numbered(progress: Progress, number: int, total: int) -> Progress:
    """`progress` with the file's number after the stage's name where there are several."""
    suffix = f" {number}/{total}" if total > 1 else ""
    return lambda stage, done, all_: progress(stage + suffix, done, all_)
