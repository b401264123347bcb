"""Rewrites what of CUDA C++ no header can give to g++; everything else stays as it is written.

Owns: launches (`kernel<<<grid, block>>>(…)`), shared variables, launch bounds, PTX; taking one
function out of a file, and cases out of a switch, so that what no test runs need not be compiled.
Leaves out: what the calls that it writes do (`include/cuda_runtime.h`). No line is added or
removed, so that messages name the lines of the original.
"""

import re
from collections.abc import Collection

LAUNCH_BOUNDS = re.compile(r"__launch_bounds__\s*\(")
KERNEL = re.compile(r"__global__\s+void\s+(\w+)\s*\(")
SHARED = re.compile(
    r"(?P<extern>extern\s+)?(?:\[\[maybe_unused\]\]\s*)?__shared__\s+(?P<type>[\w:]+)\s+"
    r"(?P<name>\w+)\s*(?P<dims>(?:\[[^;]*\])?)\s*;"
)
ASSEMBLY = re.compile(r'\basm\s*(?:volatile\s*)?\((?=\s*"\s*(?P<instruction>[\w.]+))')
OPERAND = re.compile(r'"[=+]?\w"\s*\(')
PTX = {
    "ldmatrix.sync.aligned.m8n8.x2.b16",
    "ldmatrix.sync.aligned.m8n8.x4.b16",
    "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
}
LAUNCH = re.compile(r"<<<(?P<grid>[^;]*?)>>>\s*\(", re.S)


def translate(source: str) -> str:
    """The text of one file of ggml's CUDA backend, for g++ with `include/` before all else."""
    return launches(shared_variables(kernels(assembly(source))))


def assembly(source: str) -> str:
    """PTX becomes a call of the function of `include/ptx.h` with the instruction's name."""
    out, position = [], 0
    while match := ASSEMBLY.search(source, position):
        end = closing(source, match.end() - 1)
        inside = source[match.end() : end]
        name = match["instruction"]
        operands = [
            inside[m.end() : closing(inside, m.end() - 1)] for m in OPERAND.finditer(inside)
        ]
        call = f"emu::ptx::{name.replace('.', '_')}({', '.join(operands)})"
        if name not in PTX:
            call = f'emu::fail("not emulated: {name}")'
        out += [source[position : match.start()], call, "\n" * inside.count("\n")]
        position = end + 1
    return "".join([*out, source[position:]])


def kernels(source: str) -> str:
    """Each kernel first tells its name and how many threads it was compiled for."""
    out, bounds, position = [], None, 0
    while True:
        found = [m for m in (LAUNCH_BOUNDS.search(source, position),
                             KERNEL.search(source, position)) if m]  # fmt: skip
        if not found:
            return "".join([*out, source[position:]])
        match = min(found, key=lambda m: m.start())
        end = closing(source, match.end() - 1)
        if match.re is LAUNCH_BOUNDS:
            out.append(source[position : match.start()])
            inside = source[match.end() : end]
            out.append("\n" * inside.count("\n"))
            bounds = " ".join(first_argument(inside).split())
        else:
            out.append(source[position : end + 1])
            body = re.match(r"\s*\{", source[end + 1 :])
            if body:
                end += body.end()
                out.append(source[end + 1 - body.end() : end + 1])
                out.append(f' emu::enter_kernel("{match[1]}", {bounds or 1024});')
            bounds = None
        position = end + 1


def shared_variables(source: str) -> str:
    def replaced(match: re.Match[str]) -> str:
        kind, name, dims = match["type"], match["name"], match["dims"]
        if match["extern"]:
            return f"{kind} * {name} = static_cast<{kind} *>(emu::dynamic_shared());"
        return (f"using emu_{name} = {kind}{dims}; [[maybe_unused]] emu_{name} & {name} = "
                f'emu::shared<emu_{name}>("{name}", __FILE__, __LINE__);')  # fmt: skip

    return SHARED.sub(replaced, source)


def launches(source: str) -> str:
    while match := LAUNCH.search(source):
        start = kernel_start(source, match.start())
        end = closing(source, match.end() - 1)
        kernel, arguments = source[start : match.start()], source[match.end() : end]
        lines = "\n" * source[match.end("grid") : match.end()].count("\n")
        comma = ", " if arguments.strip() else ""
        call = (f"emu::launch(emu::Grid({match['grid']}), [&](auto... emu_a) {{ "
                f"{kernel.strip()}(emu_a...); }}{comma}{lines}{arguments})")  # fmt: skip
        source = source[:start] + call + source[end + 1 :]
    return source


def with_cases(source: str, function: str, keep: Collection[str]) -> str:
    """`source` with only the cases `keep` in the switch of `function`; others are its default."""
    start, end = body(source, function)
    switch = source.index("switch (", start, end)
    parts = re.split(r"^(?=[ \t]+(?:case\s+\w+\s*:|default\s*:))", source[switch:end], flags=re.M)
    found = [re.match(r"\s*case\s+(\w+)\s*:", part) for part in parts]
    assert {m[1] for m in found if m} >= set(keep), f"{function} has not all of {sorted(keep)}"
    kept = [
        part if not m or m[1] in keep else "\n" * part.count("\n")
        for part, m in zip(parts, found, strict=True)
    ]
    return source[:switch] + "".join(kept) + source[end:]


def function(source: str, name: str) -> str:
    """The definition of the function `name`, from the start of its line."""
    start, end = body(source, name)
    return source[source.rindex("\n", 0, source.rindex(name, 0, start)) + 1 : end]


def body(source: str, name: str) -> tuple[int, int]:
    """Where the braces of the definition of function `name` begin and, after them, end."""
    for match in re.finditer(rf"\b{name}\s*\(", source):
        after = closing(source, match.end() - 1) + 1
        if brace := re.match(r"\s*\{", source[after:]):
            start = after + brace.end() - 1
            return start, closing(source, start, "{}") + 1
    raise AssertionError(f"no function {name}")


def kernel_start(source: str, end: int) -> int:
    """Where the name of the kernel begins whose name, with template arguments, ends at `end`."""
    at = len(source[:end].rstrip())
    if source[at - 1] == ">":
        depth = 0
        while True:
            at -= 1
            depth += {">": 1, "<": -1}.get(source[at], 0)
            if depth == 0:
                break
    name = re.search(r"[\w:]+\s*$", source[:at])
    assert name is not None, source[max(0, end - 80) : end]
    return name.start()


def closing(source: str, start: int, pair: str = "()") -> int:
    """Where the parenthesis, or brace, that opens at `start` closes."""
    depth = 0
    for at in range(start, len(source)):
        depth += {pair[0]: 1, pair[1]: -1}.get(source[at], 0)
        if depth == 0:
            return at
    raise AssertionError(source[start : start + 80])


def first_argument(text: str) -> str:
    depth = 0
    for at, character in enumerate(text):
        if character == "," and depth == 0:
            return text[:at]
        depth += {"(": 1, "<": 1, ")": -1, ">": -1}.get(character, 0)
    return text
