"""Tables and data of `runtime info` and `runtime cuda-check`.

Owns: wording, order. Leaves out: looking anything up.
"""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moequant.runtime.cuda_check import Compiled
from moequant.runtime.info import BuildInfo, RuntimeInfo, TreeInfo
from moequant.tables.common import size


def runtime_tables(info: RuntimeInfo) -> list[RenderableType]:
    """One table per source tree, the builds of it below."""
    series = f"{info.series} patches ({info.series_hash})" if info.series else "no patches"
    head = Text(f"{info.folder}\npinned: llama.cpp {info.pin.commit} (ggml {info.pin.ggml}, from "
                f"{info.pin.package} {info.pin.version}), {series}")  # fmt: skip
    if not info.trees:
        return [head, Text("nothing was built yet: `moequant runtime build`")]
    return [head, *(_tree(tree) for tree in info.trees)]


def runtime_json(info: RuntimeInfo) -> dict[str, Any]:
    """What `runtime info --json` prints; sizes in bytes."""
    return {
        "folder": str(info.folder),
        "pin": vars(info.pin),
        "patches": info.series,
        "patch_hash": info.series_hash,
        "trees": [_tree_json(tree) for tree in info.trees],
    }


def cuda_check_tables(done: Sequence[Compiled]) -> list[RenderableType]:
    """Seconds that each file took, by architecture; what nvcc printed below it."""
    architectures = list(dict.fromkeys(one.architecture for one in done))
    seconds = {(one.file, one.architecture): f"{one.seconds:.1f}" for one in done}
    table = Table(title="seconds to compile (the first architecture's are with the host's side)")
    table.add_column("file")
    for architecture in architectures:
        table.add_column(f"sm_{architecture}", justify="right")
    for name in dict.fromkeys(one.file for one in done):
        table.add_row(name, *(seconds[name, architecture] for architecture in architectures))
    logs = [Text(f"{one.file} for {one.architecture}:\n{one.log.rstrip()}")
            for one in done if one.log.strip()]  # fmt: skip
    kept = sum(one.kept for one in done)
    end = f"{len(done)} compiled, {kept} of them by an earlier call; " + (
        f"nvcc warned in {len(logs)}" if logs else "no warnings")  # fmt: skip
    return [table, *logs, Text(end)]


def cuda_check_json(done: Sequence[Compiled]) -> list[dict[str, Any]]:
    """What `runtime cuda-check --json` prints; `log` is what nvcc printed."""
    return [vars(one) for one in done]


def _tree_json(tree: TreeInfo) -> dict[str, Any]:
    return {
        "source": str(tree.source),
        "commit": tree.commit,
        "own": None if tree.own is None else str(tree.own),
        "patched": bool(tree.patches),
        "patches": [{"name": name, "purpose": purpose} for name, purpose in tree.patches],
        "current": tree.current,
        "bytes": tree.nbytes,
        "builds": [_build_json(build) for build in tree.builds],
    }


def _build_json(build: BuildInfo) -> dict[str, Any]:
    told = build.backends
    return {
        "folder": str(build.folder),
        "binaries": str(build.folder / "bin"),
        "finished": build.finished,
        "options": build.options,
        "tools": list(build.tools),
        "libraries": list(build.libraries),
        "ggml": None if isinstance(told, str) else told["version"],
        "backends": None if isinstance(told, str) else told["backends"],
        "backends_error": told if isinstance(told, str) else None,
        "bytes": build.nbytes,
    }


def _tree(tree: TreeInfo) -> RenderableType:
    table = Table(box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    what = "patched" if tree.patches else "stock"
    table.add_row("llama.cpp", f"{tree.commit or 'unknown commit'}, {what}{_remark(tree)}")
    if tree.own is not None:
        table.add_row("copied from", str(tree.own))
    for name, purpose in tree.patches:
        table.add_row("patch", f"{name}: {purpose}")
    table.add_row("source", f"{tree.source} ({size(tree.nbytes)})")
    if not tree.builds:
        table.add_row("builds", "none")
    for build in tree.builds:
        _add_build(table, build)
    return Group(Text(""), table)


def _remark(tree: TreeInfo) -> str:
    """Nothing for the two that this moequant would use."""
    return "" if tree.current or tree.own else "; not what this moequant builds: may be deleted"


def _add_build(table: Table, build: BuildInfo) -> None:
    state = "" if build.finished else ", not finished"
    table.add_row("build", f"{build.folder} ({size(build.nbytes)}{state})")
    table.add_row("  options", ", ".join(f"{k}={v}" for k, v in build.options.items()) or "none")
    table.add_row("  tools", ", ".join(build.tools) or "none")
    table.add_row("  libraries", ", ".join(build.libraries) or "none")
    table.add_row("  backends", _backends(build))


def _backends(build: BuildInfo) -> str:
    told = build.backends
    if isinstance(told, str):
        return f"not known: {told}"
    shown = []
    for backend in told["backends"]:
        devices = [one["description"] or one["name"] for one in backend["devices"]]
        shown.append(f"{backend['name']} ({', '.join(devices) or 'no device'})")
    return ", ".join(shown) or "none"
