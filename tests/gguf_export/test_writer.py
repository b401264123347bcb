"""The writer: what gguf's reader and ours get back, and what stays when writing fails."""

import errno
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from moequant.errors import ExportError, UsageError
from moequant.files import check_distinct, check_target
from moequant.gguf_export import writer
from moequant.gguf_export.metadata import MetadataEntry
from moequant.gguf_export.writer import TensorToWrite, write_gguf
from moequant.gguf_file import read_gguf

METADATA = [
    MetadataEntry("general.architecture", "gemma4", gguf.GGUFValueType.STRING),
    MetadataEntry("gemma4.block_count", 2, gguf.GGUFValueType.UINT32),
    MetadataEntry("gemma4.flags", [True, False], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.BOOL),
    MetadataEntry("a.name", "größe", gguf.GGUFValueType.STRING),
]
VALUES = {
    "odd.weight": np.arange(35, dtype=np.float32).reshape(5, 7),
    "experts.weight": np.arange(48, dtype=np.float32).reshape(2, 3, 8),
    "scalar.weight": np.array([3.5], np.float32),
}
TENSORS = [TensorToWrite(name, v.shape, "F32", v.nbytes) for name, v in VALUES.items()]


def pieces(tensor: TensorToWrite, size: int = 13) -> Iterator[bytes]:
    data = VALUES[tensor.name].tobytes()
    for start in range(0, len(data), size):
        yield data[start : start + size]


def test_ggufs_own_reader_gets_every_key_and_tensor(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma4", METADATA, TENSORS, pieces)
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == list(VALUES)
    for tensor in reader.tensors:
        expected = VALUES[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == expected.shape
        np.testing.assert_array_equal(tensor.data, expected)
    assert reader.fields["gemma4.block_count"].contents() == 2
    assert reader.fields["gemma4.flags"].contents() == [True, False]
    assert reader.fields["a.name"].contents() == "größe"
    assert len([key for key in reader.fields if not key.startswith("GGUF.")]) == len(METADATA)


def test_our_reader_agrees_with_ggufs(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, "gemma4", METADATA, TENSORS, pieces)
    theirs, ours = gguf.GGUFReader(path), read_gguf(path)
    assert ours.metadata == {entry.key: entry.value for entry in METADATA}
    assert {name: tensor.start for name, tensor in ours.tensors.items()} == {
        tensor.name: tensor.data_offset for tensor in theirs.tensors
    }


def test_pieces_of_the_wrong_length_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="odd.weight was packed into 2 bytes"):
        write_gguf(tmp_path / "model.gguf", "gemma4", METADATA, TENSORS, lambda _: [b"ab"])
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")

    def fail(_: TensorToWrite) -> Iterator[bytes]:
        yield b"abc"
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(ExportError, match=r"No space left.*free some space"):
        write_gguf(path, "gemma4", METADATA, TENSORS, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_bit_that_flips_on_disk_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = writer._sync

    def flip(file: object) -> None:
        original(file)  # type: ignore[arg-type]
        part = next(tmp_path.glob(".*.part"))
        data = bytearray(part.read_bytes())
        data[read_gguf(part).tensors["experts.weight"].start + 5] ^= 4
        part.write_bytes(data)

    monkeypatch.setattr(writer, "_sync", flip)
    with pytest.raises(ExportError, match=r"differs from what was packed[^-]*- experts\.weight"):
        write_gguf(tmp_path / "model.gguf", "gemma4", METADATA, TENSORS, pieces)
    assert list(tmp_path.iterdir()) == []


CHILD = """
    import resource, sys, time
    from pathlib import Path
    from tests.gguf_export.test_writer import METADATA, TENSORS, VALUES, pieces
    from moequant.gguf_export.writer import TensorToWrite, write_gguf
    {body}
"""


def run_child(body: str, folder: Path) -> subprocess.Popen[str]:
    code = textwrap.dedent(CHILD).format(body=textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip


def test_a_file_size_limit_is_an_export_error(tmp_path: Path) -> None:
    # RLIMIT_FSIZE makes the kernel refuse the write itself, as a full disk would
    if not hasattr(resource, "RLIMIT_FSIZE"):
        pytest.skip("this platform has no RLIMIT_FSIZE to stand in for a full disk")
    body = """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from moequant.errors import ExportError
big = [TensorToWrite("big.weight", (4096,), "F32", 16384)]
try:
    write_gguf(Path(sys.argv[1]) / "m.gguf", "gemma4", METADATA, big, lambda _: [bytes(16384)])
except ExportError as error:
    print(error)
"""
    child = run_child(body, tmp_path)
    stdout, stderr = child.communicate(timeout=60)
    assert "was not written: File too large" in stdout, stderr
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    body = """
def slow(tensor):
    print("started", flush=True)
    time.sleep(60)
    yield b""
write_gguf(Path(sys.argv[1]) / "m.gguf", "gemma4", METADATA, TENSORS, slow)
"""
    child = run_child(body, tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    assert list(tmp_path.iterdir()) != []  # the temporary file was there to be removed
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_places_that_cannot_be_written_are_named_before_any_work(tmp_path: Path) -> None:
    existing = tmp_path / "there.gguf"
    existing.touch()
    for path, message in (
        (existing, "exists.*--force"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "model.gguf", "does not exist; create it"),
    ):
        with pytest.raises(UsageError, match=message):
            check_target(path, force=False)
    with pytest.raises(ExportError, match="needs 1000000000.00 GB"):
        check_target(tmp_path / "model.gguf", force=False, needed=10**18)
    check_target(existing, force=True)


def test_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UsageError, match="cannot be written to; choose another place"):
        check_target(tmp_path / "model.gguf", force=False)


def test_names_that_no_file_can_have_and_things_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: File name too long"):
        check_target(tmp_path / ("x" * 300), force=False)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(UsageError, match="is no regular file"):
        check_target(fifo, force=True)
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nothing")
    with pytest.raises(UsageError, match="exists"):
        check_target(dangling, force=False)


def test_a_long_name_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 250 + ".gguf")
    check_target(path, force=False)
    write_gguf(path, "gemma4", METADATA, TENSORS, pieces)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    target, link = tmp_path / "target.gguf", tmp_path / "link.gguf"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_gguf(link, "gemma4", METADATA, TENSORS, pieces)
    assert link.is_symlink()
    assert target.read_bytes()[:4] == b"GGUF"


def test_outputs_that_are_inputs_or_each_other_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shard = folder / "model.safetensors"
    shard.touch()
    (tmp_path / "link").symlink_to(shard)
    for output in (shard, tmp_path / "link"):
        with pytest.raises(UsageError, match="belongs to what is read"):
            check_distinct([output], [folder])
    with pytest.raises(UsageError, match="two outputs"):
        check_distinct([tmp_path / "a", folder / ".." / "a"], [])
    check_distinct([tmp_path / "a", folder / "new.gguf"], [folder])


def test_a_file_anywhere_below_a_folder_that_is_read_is_kept(tmp_path: Path) -> None:
    folder, blobs = tmp_path / "texts", tmp_path / "blobs"
    (folder / "deep" / "er").mkdir(parents=True)
    blobs.mkdir()
    inner, blob = folder / "deep" / "er" / "a.txt", blobs / "b"
    inner.touch()
    blob.touch()
    (folder / "b.txt").symlink_to(blob)
    (folder / "linked").symlink_to(tmp_path / "other", target_is_directory=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.txt").touch()
    (tmp_path / "out").symlink_to(folder / "deep", target_is_directory=True)
    for output in (
        inner, folder / "b.txt", blob, tmp_path / "out" / "er" / "a.txt", tmp_path / "other/c.txt",
    ):  # fmt: skip
        with pytest.raises(UsageError, match="belongs to what is read"):
            check_distinct([output], [folder])
    check_distinct([folder / "deep" / "new.gguf"], [folder])
