"""The series of patches applies to the pinned source as it is, exactly, and says what it is for."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moequant.errors import LlamaCppError
from moequant.runtime.fetch import ensure_source
from moequant.runtime.patches import Patch, apply_series, read_series

SERIES = read_series()


@pytest.fixture(scope="module")
def pinned() -> Path:
    return ensure_source()


def _changed(patch: Patch) -> set[str]:
    """The files that a patch names, read from its text alone."""
    lines = re.findall(r"^(?:---|\+\+\+) (?:[ab]/)?([^\t\n]+)", patch.text, re.M)
    return {name for name in lines if name != "/dev/null"}


def _copy(source: Path, names: set[str], target: Path) -> Path:
    """Those of the files that there are."""
    target.mkdir()
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
    return target


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


def test_the_series_applies_to_the_pinned_source_without_fuzz(pinned: Path, tmp_path: Path) -> None:
    names = set[str]().union(*map(_changed, SERIES))
    tree = _copy(pinned, names, tmp_path / "tree")
    before = _contents(tree)
    apply_series(SERIES, tree)
    after = _contents(tree)
    assert set(after) <= names
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == names, "a file is named in the series but not changed by it"
    for name, data in before.items():
        assert (pinned / name).read_bytes() == data, "the pinned source itself was written to"


@pytest.mark.skipif(shutil.which("patch") is None, reason="no GNU patch to compare with")
def test_gnu_patch_without_fuzz_makes_the_same_tree(pinned: Path, tmp_path: Path) -> None:
    names = set[str]().union(*map(_changed, SERIES))
    ours, theirs = (_copy(pinned, names, tmp_path / name) for name in ("ours", "theirs"))
    apply_series(SERIES, ours)
    for patch in SERIES:
        result = subprocess.run(
            ["patch", "-p1", "--fuzz=0", "--batch", "--directory", theirs],
            input=patch.text, text=True, capture_output=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{patch.name}: {result.stdout}{result.stderr}"
        assert "offset" not in result.stdout, f"{patch.name}: {result.stdout}"
    assert _contents(ours) == _contents(theirs)


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name)
def test_each_patch_says_what_and_why(patch: Patch) -> None:
    assert 10 <= len(patch.purpose) <= 100, f"{patch.name}: {patch.purpose!r}"
    assert len(patch.header) > len(patch.purpose), f"{patch.name} has no header beyond its purpose"


@pytest.mark.parametrize("patch", SERIES, ids=lambda patch: patch.name)
def test_each_patch_needs_the_source_that_it_was_made_for(
    pinned: Path, tmp_path: Path, patch: Patch
) -> None:
    """One line put before everything else moves every hunk: nothing may apply any more."""
    earlier = SERIES[: SERIES.index(patch)]
    names = set[str]().union(*map(_changed, (*earlier, patch)))
    tree = _copy(pinned, names, tmp_path / "tree")
    apply_series(earlier, tree)
    for path in (tree / name for name in _changed(patch)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\n" + (path.read_bytes() if path.is_file() else b""))
    with pytest.raises(LlamaCppError, match=f"{patch.name} does not apply: "):
        apply_series([patch], tree)
