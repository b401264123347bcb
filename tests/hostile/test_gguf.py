"""Damaged GGUF files: one clear error each, never a crash, a loop or an allocation without end."""

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moequant.errors import GGUFError
from moequant.gguf_export.writer import write_gguf
from moequant.gguf_file import read_gguf
from tests.gguf_export.test_writer import METADATA, TENSORS, pieces


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "model.gguf"
    write_gguf(path, "gemma4", METADATA, TENSORS, pieces)
    return path.read_bytes()


def header(version: int, n_tensors: int, n_keys: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor(name: str, ne: list[int], qtype: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(ne)}Q", len(ne), *ne)
    return text(name) + shape + struct.pack("<IQ", qtype, offset)


BAD = {
    "empty": (b"", "damaged or cut short"),
    "magic": (b"GGML" + bytes(100), "does not start with 'GGUF'"),
    "version": (header(9, 0, 0), "GGUF version 9"),
    "big-endian": (b"GGUF\x00\x00\x00\x03" + bytes(16), "big-endian"),
    "a tensor count of 2^60": (header(3, 2**60, 0), "1152921504606846976 tensors"),
    "a key count of 2^60": (header(3, 0, 2**60), "1152921504606846976 keys"),
    "a huge string": (header(3, 0, 1) + struct.pack("<Q", 2**50) + bytes(32), "a string of"),
    "an unknown value type": (header(3, 0, 1) + text("k") + struct.pack("<IQ", 99, 0), "type 99"),
    "an array longer than the file": (
        header(3, 0, 1) + text("k") + struct.pack("<IIQ", 9, 4, 2**40),
        "1099511627776 values",
    ),
    "a duplicate key": (
        header(3, 0, 2) + 2 * (text("k") + struct.pack("<II", 4, 1)),
        "'k' stands twice",
    ),
    "alignment of 3": (
        header(3, 0, 1) + text("general.alignment") + struct.pack("<II", 4, 3),
        "not a power of two",
    ),
    "nine dimensions": (header(3, 1, 0) + tensor("t", [1] * 9, 0, 0), "9 dimensions"),
    "an unknown tensor type": (header(3, 1, 0) + tensor("t", [32], 250, 0), "unknown type 250"),
    "rows that do not fit": (header(3, 1, 0) + tensor("t", [100], 12, 0), "rows of 100"),
    "data past the end": (header(3, 1, 0) + tensor("t", [1 << 40], 0, 0), "t .* should lie at"),
    "a shape that overflows": (
        header(3, 1, 0) + tensor("t", [1 << 40, 1 << 40], 0, 0),
        "t .* should lie at",
    ),
    "an offset that is not aligned": (
        header(3, 1, 0) + tensor("t", [1], 0, 5) + bytes(200),
        "should lie at",
    ),
    "overlapping tensors": (
        header(3, 2, 0) + tensor("a", [16], 0, 0) + tensor("b", [16], 0, 32) + bytes(200),
        "a and b overlap",
    ),
    "a name that is not UTF-8": (
        header(3, 0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(30),
        "not UTF-8",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    data, message = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(GGUFError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused(good: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    end = max(t.start + t.nbytes for t in _read(good, path).tensors.values())
    for length in range(0, end, 7):
        path.write_bytes(good[:length])
        with pytest.raises(GGUFError):
            read_gguf(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_gives_a_gguf_error_or_a_readable_file(
    good: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(good) - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    try:
        found = _read(bytes(damaged), path)
    except GGUFError as error:
        assert str(path) in str(error)
    else:
        for name in found.tensors:
            assert len(found.read(name)) == found.tensors[name].nbytes


def _read(data: bytes, path: Path):  # type: ignore[no-untyped-def]
    path.write_bytes(data)
    return read_gguf(path)
