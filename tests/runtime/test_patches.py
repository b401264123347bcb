"""Patches are applied exactly where they say or not at all; git's own diffs are the oracle."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moequant.errors import LlamaCppError
from moequant.runtime.patches import Patch, apply_series, read_series, series_hash

OLD = "".join(f"line {n}\n" for n in range(1, 31))
NEW = OLD.replace("line 5\n", "line five\n").replace("line 25\n", "line 25\nand more\n")


def diff(folder: Path, old: bytes | None, new: bytes | None, name: str = "deep/file.txt") -> str:
    """What `git diff` says between two files; None is a file that is not there."""
    for side, content in (("a", old), ("b", new)):
        path = folder / side / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    result = subprocess.run(
        ["git", "diff", "--no-index", "--no-prefix", "--text", "a", "b"],
        cwd=folder, capture_output=True, check=False,
    )  # fmt: skip
    return result.stdout.decode()


def made(folder: Path, old: str | None = OLD, new: str | None = NEW) -> Patch:
    encoded = (None if text is None else text.encode() for text in (old, new))
    return Patch("0001-x.patch", "purpose\n\nwhy\n---\n" + diff(folder / "diff", *encoded))


def tree_of(folder: Path, content: str | None = OLD) -> Path:
    tree = folder / "tree"
    (tree / "deep").mkdir(parents=True)
    if content is not None:
        (tree / "deep" / "file.txt").write_text(content, newline="")
    return tree


ODD = ("a", "b", "", " c", "-d", "+e", "\\f", "g\r", "h\x0c", "é\u2028")
LINES = st.lists(st.sampled_from(ODD), max_size=40)


@settings(max_examples=60, deadline=None)
@given(LINES, LINES, st.booleans(), st.booleans())
def test_what_git_diffs_is_what_we_apply(
    tmp_path_factory: pytest.TempPathFactory,
    old: list[str],
    new: list[str],
    old_end: bool,
    new_end: bool,
) -> None:
    folder = tmp_path_factory.mktemp("git")
    before = ("\n".join(old) + "\n" * old_end).encode()
    after = ("\n".join(new) + "\n" * new_end).encode()
    if before == after:
        return
    patch = Patch("0001-x.patch", diff(folder, before, after))
    tree = folder / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "file.txt").write_bytes(before)
    apply_series([patch], tree)
    assert (tree / "deep" / "file.txt").read_bytes() == after


def test_files_are_added_and_removed(tmp_path: Path) -> None:
    tree = tree_of(tmp_path, None)
    apply_series([made(tmp_path, None, NEW)], tree)
    assert (tree / "deep" / "file.txt").read_text() == NEW
    with pytest.raises(LlamaCppError, match=r"deep/file.txt exists already"):
        apply_series([made(tmp_path, None, NEW)], tree)
    apply_series([made(tmp_path, NEW, None)], tree)
    assert not (tree / "deep" / "file.txt").exists()
    with pytest.raises(LlamaCppError, match=r"deep/file.txt does not exist"):
        apply_series([made(tmp_path, NEW, None)], tree)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("new first line\n" + OLD, "hunk 1 of 2 .*line 2 should be 'line 2.n' and is 'line 1"),
        (OLD.replace("line 23\n", "line 23 \n"), "hunk 2 of 2 .*line 23 .*is 'line 23 "),
        (OLD.replace("\n", "\r\n"), "hunk 1 of 2 "),
        (OLD[: OLD.index("line 26")], "hunk 2 of 2 .*line 26 .*is the end of the file"),
        (NEW, "hunk 1 of 2 .*line 5 should be 'line 5.n' and is 'line five"),
    ],
    ids=["offset", "white space", "line ends", "shorter", "applied already"],
)
def test_neither_fuzz_nor_offset(tmp_path: Path, content: str, message: str) -> None:
    tree = tree_of(tmp_path, content)
    with pytest.raises(
        LlamaCppError, match=f"0001-x.patch does not apply: deep/file.txt, {message}"
    ):
        apply_series([made(tmp_path)], tree)
    assert (tree / "deep" / "file.txt").read_bytes() == content.encode()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("only words\n", "0001-x.patch changes nothing"),
        ("--- a/f\n+++ b/f\n@@ -1,9 +1,9 @@\n a\n", "0001-x.patch is no valid patch"),
        ("--- a/f\n+++ b/f\n@@ -1 +1 @@\n-a\n+b\n+c\n", "-1 is longer than it says: '.c'"),
        ("--- a/../f\n+++ b/../f\n@@ -1 +1 @@\n-a\n+b\n", "outside the source tree"),
        ("--- /etc/f\n+++ /etc/f\n@@ -1 +1 @@\n-a\n+b\n", "outside the source tree"),
        ("diff --git a/f b/g\nrename from f\nrename to g\n", "'rename from f': only changes of"),
        ("diff --git a/f b/f\nBinary files a/f and b/f differ\n", "only changes of text"),
    ],
    ids=["no change", "cut off", "too long", "above", "absolute", "rename", "binary"],
)
def test_what_is_no_patch_of_text_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(LlamaCppError, match=message):
        apply_series([Patch("0001-x.patch", text)], tree_of(tmp_path))


def test_header_and_purpose(tmp_path: Path) -> None:
    plain = made(tmp_path)
    assert (plain.purpose, plain.header) == ("purpose", "purpose\n\nwhy\n---")
    mail = "From 0123 Mon Sep 17 00:00:00 2001\nSubject: [PATCH 1/2] skip\n\nwhy\n---\n"
    assert (
        Patch("0001-x.patch", mail + plain.text[len("purpose\n\nwhy\n---\n") :]).purpose == "skip"
    )
    assert Patch("0001-x.patch", diff(tmp_path / "d", b"a\n", b"b\n")).purpose == ""


def test_the_series_is_read_in_order_and_hashed(tmp_path: Path) -> None:
    assert read_series(tmp_path) == ()
    for name in ("0002-b.patch", "0001-a.patch"):
        (tmp_path / name).write_text(name)
    series = read_series(tmp_path)
    assert [patch.name for patch in series] == ["0001-a.patch", "0002-b.patch"]
    hashes = {series_hash(series), series_hash(series[::-1]), series_hash(series[:1])}
    renamed = (Patch("0001-c.patch", series[0].text), series[1])
    assert len(hashes | {series_hash(renamed)}) == 4
    (tmp_path / "0002-c.patch").write_text("")
    with pytest.raises(LlamaCppError, match="another patch has the number 0002"):
        read_series(tmp_path)
    (tmp_path / "0002-c.patch").rename(tmp_path / "c.patch")
    with pytest.raises(LlamaCppError, match="patches are named NNNN-words.patch"):
        read_series(tmp_path)
    (tmp_path / "c.patch").rename(tmp_path / "0003-c.patch")
    (tmp_path / "0003-c.patch").write_bytes(b"\xff")
    with pytest.raises(LlamaCppError, match="not UTF-8"):
        read_series(tmp_path)
