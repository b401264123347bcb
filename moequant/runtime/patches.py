"""The series of patches to llama.cpp: read in order, hashed, applied without any tolerance.

Owns: `llama_cpp_patch/NNNN-*.patch` as text. Leaves out: what the patches do, and which tree they
are applied to.

A hunk is applied at the line that it names and only if every line it shows is there, byte for byte:
no fuzz, no offset, no white space that does not count. The pin names one source tree, so that a
hunk which fits elsewhere is one that nobody has looked at. Files may be changed, added and removed;
renames, copies and binary files are refused. The format is parsed by `unidiff`.
"""

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from unidiff.errors import UnidiffParseError
from unidiff.patch import Hunk, PatchedFile, PatchSet

from moequant.errors import LlamaCppError
from moequant.runtime.pin import patch_folder

NAME = re.compile(r"\d{4}-[\w.+-]+\.patch")
HASH_LENGTH = 12  # hexadecimal digits of a series' hash in names of folders
_SUBJECT = re.compile(r"Subject: (?:\[PATCH[^\]]*\] )?(.+)")
_FIRST_FILE = re.compile(r"^(?:diff --git |--- \S+(?:\t.*)?$)", re.M)
_REFUSED = re.compile(r"(rename|copy) (from|to) |GIT binary patch|Binary files ")


@dataclass(frozen=True)
class Patch:
    """One file of the series; `header` is its text before the first changed file."""

    name: str
    text: str

    @property
    def header(self) -> str:
        """What and why, in words; empty if the patch starts with its first file."""
        return re.split(r"^(?:diff --git |--- \S+(?:\t.*)?$)", self.text, maxsplit=1, flags=re.M)[
            0
        ].strip()

    @property
    def purpose(self) -> str:
        """The header's `Subject:`, or its first line; empty without a header."""
        found = _SUBJECT.search(self.header)
        return (found[1] if found else self.header.partition("\n")[0]).strip()


def read_series(folder: Path | None = None) -> tuple[Patch, ...]:
    """The patches of `folder` (default: moequant's own) in the order of their numbers.

    Raises:
        LlamaCppError: a name that is not `NNNN-words.patch`, a number twice, or no UTF-8.
    """
    folder = patch_folder() if folder is None else folder
    paths = sorted(folder.glob("*.patch"), key=lambda path: path.name)
    numbers = [path.name[:4] for path in paths]
    for path in paths:
        if not NAME.fullmatch(path.name):
            raise LlamaCppError(f"{path}: patches are named NNNN-words.patch, by their order.")
        if numbers.count(path.name[:4]) > 1:
            raise LlamaCppError(f"{path}: another patch has the number {path.name[:4]}, too.")
    try:
        return tuple(Patch(path.name, path.read_bytes().decode("utf-8")) for path in paths)
    except UnicodeDecodeError as error:
        raise LlamaCppError(f"{folder}: a patch is not UTF-8 text ({error}).") from error


def series_hash(series: Sequence[Patch]) -> str:
    """sha256 over names and texts, the first `HASH_LENGTH` digits."""
    digest = hashlib.sha256()
    for patch in series:
        text = patch.text.encode()
        digest.update(f"{patch.name}\0{len(text)}\0".encode() + text)
    return digest.hexdigest()[:HASH_LENGTH]


def changed_paths(patch: Patch) -> list[str]:
    """The files that the patch changes, adds or removes, by their paths in the tree.

    Raises:
        LlamaCppError: it is no valid patch.
    """
    return [file.path for file in _parse(patch)]


def apply_series(series: Sequence[Patch], tree: Path) -> None:
    """Apply every patch, in order, to the files below `tree`.

    Raises:
        LlamaCppError: a patch cannot be read or does not fit; it names patch, file, hunk and line.
            `tree` is then partly patched: give a copy.
    """
    for patch in series:
        for file in _parse(patch):
            _apply_file(patch, file, tree)


def _parse(patch: Patch) -> PatchSet:
    changes = patch.text[patch.text.find(patch.header) + len(patch.header) :]
    refused = next((line for line in changes.splitlines() if _REFUSED.match(line)), None)
    if refused is not None:
        raise LlamaCppError(f"{patch.name}: {refused!r}: only changes of text can be applied.")
    try:
        files = PatchSet(io.StringIO(patch.text, newline="\n"))
    except UnidiffParseError as error:
        raise LlamaCppError(f"{patch.name} is no valid patch: {error}") from error
    if not files or not all(files):
        raise LlamaCppError(f"{patch.name} changes nothing, or a file in it has no hunk.")
    _check_lengths(patch, files)
    return files


def _check_lengths(patch: Patch, files: PatchSet) -> None:
    """LlamaCppError where lines follow a hunk that its own header does not count."""
    lines = patch.text.split("\n")
    for hunk in (hunk for file in files for hunk in file):
        after = next((n for n in (lines[hunk[-1].diff_line_no or 0 :]) if n[:1] != "\\"), "")
        if after[:1] in ("+", "-", " ") and not after.startswith("--- ") and after != "-- ":
            raise LlamaCppError(f"{patch.name} is no valid patch: the hunk at "
                                f"@@ -{hunk.source_start} is longer than it says: {after!r}"
                                )  # fmt: skip


def _apply_file(patch: Patch, file: PatchedFile, tree: Path) -> None:
    inside = PurePosixPath(file.path)
    if inside.is_absolute() or ".." in inside.parts:
        raise LlamaCppError(f"{patch.name}: {file.path} is outside the source tree.")
    path = tree / inside
    added, removed = (name == "/dev/null" for name in (file.source_file, file.target_file))
    if path.is_file() == added:
        there = "exists already" if added else "does not exist"
        raise LlamaCppError(f"{patch.name} does not apply: {file.path} {there} in {tree}.")
    before = b"" if added else path.read_bytes()
    after = _patched(f"{patch.name} does not apply: {file.path}", file, _lines(before))
    if removed:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(after))


def _patched(what: str, hunks: Sequence[Hunk], lines: list[bytes]) -> list[bytes]:
    """`lines` after all hunks; each stands exactly where it says, or it is an error."""
    after: list[bytes] = []
    done = 0  # lines of the old file that are dealt with
    for number, hunk in enumerate(hunks, 1):
        old, new = _side(hunk, "-"), _side(hunk, "+")
        # a hunk without old lines names the line that it comes after
        start = hunk.source_start - 1 if old else hunk.source_start
        where = f"{what}, hunk {number} of {len(hunks)} (@@ -{hunk.source_start})"
        if start < done:
            raise LlamaCppError(f"{where}: hunks overlap or are out of order.")
        for offset, expected in enumerate(old, start):
            found = lines[offset] if offset < len(lines) else None
            if found != expected:
                shown = "the end of the file" if found is None else repr(_shown(found))
                raise LlamaCppError(f"{where}: line {offset + 1} should be "
                                    f"{_shown(expected)!r} and is {shown}.")  # fmt: skip
        if start > len(lines):
            raise LlamaCppError(f"{where}: the file has {len(lines)} lines.")
        after += lines[done:start] + new
        done = start + len(old)
    return after + lines[done:]


def _side(hunk: Hunk, sign: str) -> list[bytes]:
    """The hunk's lines before (`-`) or after (`+`) the change, with their line ends."""
    lines: list[bytes] = []
    last_counts = False
    for line in hunk:
        if line.line_type == "\\":  # "No newline at end of file", about the line above
            if last_counts:
                lines[-1] = lines[-1].removesuffix(b"\n")
            continue
        last_counts = line.line_type != ("+" if sign == "-" else "-")
        if last_counts:
            lines.append(line.value.encode())
    return lines


def _lines(data: bytes) -> list[bytes]:
    """Lines with their ends, cut at line feeds only."""
    return re.findall(rb"[^\n]*\n|[^\n]+", data)


def _shown(line: bytes) -> str:
    return line.decode("utf-8", "replace")
