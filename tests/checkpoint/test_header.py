"""Our header parser against literal bytes, and against safetensors' own reader as the oracle."""

import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from moequant.checkpoint import open_checkpoint
from moequant.errors import CheckpointError
from tests.checkpoint.files import file_bytes, tensors_file, write_single

GOOD = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FOUR = b"\x00\x00\x80\x3f"  # 1.0

# Where we refuse what safetensors opens; `header.py` gives the reasons under the same numbers.
STRICTER = {
    0: "no tensor inside",
    1: "twice",
    2: "is described by a list|has unknown dtype {",
    3: "which torch|does not fill whole bytes",
    4: "whose product overflows",
}


def ours(folder: Path, content: bytes) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(write_single(folder, content))
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def theirs(folder: Path, content: bytes) -> dict[str, torch.Tensor] | None:
    """What safetensors reads, or None where it refuses the header."""
    path = folder / "oracle.safetensors"
    path.write_bytes(content)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, RuntimeError, OverflowError):
        return None


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal dtype, shape and bytes, whatever NaN they may hold."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    flat = [t.reshape(-1).view(torch.uint8) for t in (left, right)]
    return bool(torch.equal(*flat))


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4), **extra: Any) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **extra}


def test_golden_bytes(tmp_path: Path) -> None:
    """A file written out by hand: length 0x3c, header, one BF16 pair 1.0, -2.0."""
    header = b'{"w":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}   '
    content = b"\x3c\0\0\0\0\0\0\0" + header + b"\x80\x3f\x00\xc0"
    assert len(header) == 0x3C
    checkpoint = open_checkpoint(write_single(tmp_path, content))
    info = checkpoint.tensors["w"]
    assert (info.name, info.dtype, info.shape) == ("w", torch.bfloat16, (1, 2))
    assert (info.file, info.start, info.stop) == (tmp_path / "model.safetensors", 68, 72)
    assert checkpoint.read("w").tolist() == [[1.0, -2.0]]


def nested(levels: int) -> str:
    text = "[" * levels + "]" * levels
    return f'{{"a":{{"dtype":"F32","x":{text},"shape":[1],"data_offsets":[0,4]}}}}'


ACCEPTED = {
    "spaces around the header": (f' {{"a":{GOOD}}}  ', FOUR),
    "metadata": (f'{{"__metadata__":{{"format":"pt"}},"a":{GOOD}}}', FOUR),
    "metadata null": (f'{{"__metadata__":null,"a":{GOOD}}}', FOUR),
    "an extra field": ({"a": entry(extra=[1.5, None, "x"])}, FOUR),
    "an extra field of many digits": ('{"a":' + GOOD[:-1] + ',"x":' + "9" * 300 + "}}", FOUR),
    "nested 127 deep": (nested(125), FOUR),
    "scalar": ({"a": entry(shape=[])}, FOUR),
    "empty tensors": ({"a": entry(shape=[0, 7], offsets=[0, 0]), "b": entry()}, FOUR),
    "empty tensor at the end": ({"a": entry(), "b": entry(shape=[0], offsets=[4, 4])}, FOUR),
    "out of order": ({"b": entry(offsets=[4, 8]), "a": entry()}, FOUR + FOUR),
    "unaligned": ({"a": entry("U8", [1], [0, 1]), "b": entry(offsets=[1, 5])}, b"\7" + FOUR),
    "empty name": ({"": entry()}, FOUR),
    "escaped name": ('{"\\ud83d\\ude00\\u0000":' + GOOD + "}", FOUR),
    "F4": ({"a": entry("F4", [2, 4])}, FOUR),
    "bool bytes beyond 1": ({"a": entry("BOOL", [4])}, b"\0\1\2\xff"),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_as_safetensors_does(case: str, tmp_path: Path) -> None:
    content = file_bytes(*ACCEPTED[case])
    expected = theirs(tmp_path, content)
    assert expected is not None, "the oracle must accept this file, or the test proves nothing"
    found = ours(tmp_path / "ours", content)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)


HUGE = 2**63
REFUSED = {
    "empty file": (b"", "0 bytes long"),
    "seven bytes": (b"\0" * 7, "7 bytes long"),
    "header over the limit": (file_bytes("{}", length=100_000_001), "claims 100000001 bytes"),
    "header of 2**64-1": (file_bytes("{}", length=2**64 - 1), "over the format's limit"),
    "header past the end": (file_bytes("{}", length=3), "claims 3 bytes, but only 2"),
    "no header": (file_bytes(""), "not valid JSON"),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "not UTF-8 (byte 2)"),
    "not JSON": (file_bytes("{'a': 1}"), "not valid JSON"),
    "BOM": (file_bytes("\ufeff{}"), "not valid JSON"),
    "bytes after the JSON": (file_bytes("{}\0"), "not valid JSON"),
    "NaN in it": (file_bytes('{"a":' + GOOD[:-1] + ',"x":NaN}}', FOUR), "NaN is not JSON"),
    "1e400 in it": (file_bytes('{"a":' + GOOD[:-1] + ',"x":1e400}}', FOUR), "out of range"),
    "400 digits": (file_bytes('{"a":' + GOOD[:-1] + f',"x":{"9" * 400}}}}}', FOUR), "out of range"),
    "lone surrogate": (file_bytes('{"\\uD800":' + GOOD + "}", FOUR), "half a character"),
    "nested 128 deep": (file_bytes(nested(126), FOUR), "nests too deeply"),
    "nested 5000 deep": (file_bytes(nested(5000), FOUR), "nests too deeply"),
    "a list": (file_bytes("[]"), "a JSON list, not an object"),
    "null": (file_bytes("null"), "not an object"),
    "metadata list": (file_bytes({"__metadata__": []}), "__metadata__ is a list"),
    "metadata number": (file_bytes({"__metadata__": {"k": 1}}), "__metadata__[k] is a int"),
    "entry null": (file_bytes({"a": None}), "a is described by a NoneType"),
    "no dtype": (file_bytes({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR), "a lacks dtype"),
    "only a dtype": (file_bytes({"a": {"dtype": "F32"}}, FOUR), "lacks shape, data_offsets"),
    "unknown dtype": (file_bytes({"a": entry("Q4_K")}, FOUR), "unknown dtype Q4_K; known: BOOL"),
    "shape not a list": (file_bytes({"a": entry(shape="1")}, FOUR), "shape of type str"),
    "negative axis": (file_bytes({"a": entry(shape=[-1])}, FOUR), "has -1 in its shape"),
    "true as an axis": (file_bytes({"a": entry(shape=[True])}, FOUR), "has True in its shape"),
    "1.0 as an axis": (file_bytes({"a": entry(shape=[1.0])}, FOUR), "has 1.0 in its shape"),
    "-0 as an offset": (file_bytes(f'{{"a":{GOOD.replace("[0", "[-0")}}}', FOUR), "has -0.0 in"),
    "axis 2**64": (file_bytes({"a": entry(shape=[2**64])}, FOUR), "18446744073709551616 in"),
    "product overflows": (file_bytes({"a": entry(shape=[2**32, 2**32])}, FOUR), "overflows"),
    "bits overflow": (file_bytes({"a": entry(shape=[2**60])}, FOUR), "whose size overflows"),
    "huge times zero": (file_bytes({"a": entry(shape=[0, HUGE], offsets=[0, 0])}), "overflows"),
    "one offset": (file_bytes({"a": entry(offsets=[0])}, FOUR), "has 1 data_offsets"),
    "three offsets": (file_bytes({"a": entry(offsets=[0, 4, 4])}, FOUR), "has 3 data_offsets"),
    "backwards": (file_bytes({"a": entry(offsets=[4, 0])}, FOUR), "ends before it begins"),
    "size is not the shape's": (
        file_bytes({"a": entry(shape=[2])}, FOUR),
        "says 4 bytes in data_offsets [0, 4], but F32 [2] takes 8",
    ),
    "a million huge axes": (file_bytes({"a": entry(shape=[HUGE - 1] * 10**6)}, FOUR), "(1000000 a"),
    "a dtype 900 deep": (
        file_bytes('{"a":{"dtype":' + "[" * 900 + "]" * 900 + ',"shape":0,"data_offsets":0}}'),
        "nests too deeply",
    ),
    "half a byte": (file_bytes({"a": entry("F4", [3])}, FOUR), "does not fill whole bytes"),
    "overlap": (
        file_bytes({"a": entry(), "b": entry(offsets=[2, 6])}, FOUR + FOUR),
        "b [2, 6] overlaps a [0, 4] by 2 bytes",
    ),
    "the same bytes twice": (file_bytes({"a": entry(), "b": entry()}, FOUR), "overlaps"),
    "a hole": (
        file_bytes({"a": entry(), "b": entry(offsets=[6, 10])}, FOUR * 3),
        "2 bytes between a [0, 4] and b [6, 10] are unused",
    ),
    "a hole in front": (file_bytes({"a": entry(offsets=[4, 8])}, FOUR * 2), "4 bytes between the"),
    "truncated": (
        file_bytes({"a": entry(), "b": entry(offsets=[4, 8])}, FOUR + b"\0"),
        "describes 8 bytes of data, the file has 5; 1 tensors are cut off, first b",
    ),
    "bytes at the end": (file_bytes({"a": entry()}, FOUR + b"\0"), "1 bytes after the last tensor"),
    "bytes and no tensor": (file_bytes("{}", b"\0"), "1 bytes after the last tensor"),
    "F6": (file_bytes({"a": entry("F6_E2M3", [4], [0, 3])}, b"abc"), "F6_E2M3, which torch"),
    "F4 of odd rows": (file_bytes({"a": entry("F4", [2, 1], [0, 1])}, b"a"), "whole bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_safetensors_does(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    assert theirs(tmp_path, content) is None, "the oracle must refuse this file too"
    with pytest.raises(CheckpointError) as error:
        ours(tmp_path / "ours", content)
    assert message in str(error.value)
    assert "model.safetensors: " in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (file_bytes(f'{{"a":{GOOD},"a":{GOOD}}}', FOUR), "names a twice"),
        (file_bytes('{"a":["F32",[1],[0,4]]}', FOUR), "a is described by a list"),
        (file_bytes({"a": entry({"F32": None})}, FOUR), "has unknown dtype {'F32': None}"),
    ],
)
def test_refused_although_safetensors_does_not(
    content: bytes, message: str, tmp_path: Path
) -> None:
    assert theirs(tmp_path, content) is not None, "if this changes, header.py's list must too"
    with pytest.raises(CheckpointError, match=message):
        ours(tmp_path / "ours", content)


def test_all_bad_entries_are_listed(tmp_path: Path) -> None:
    content = file_bytes({f"t{i}": entry("F99") for i in range(25)}, FOUR)
    with pytest.raises(CheckpointError) as error:
        ours(tmp_path, content)
    assert "25 problems" in str(error.value)
    assert "… and 5 more" in str(error.value)


def test_names_are_printed_safely(tmp_path: Path) -> None:
    content = file_bytes({"\x1b[2Jgone" + "x" * 1000: entry("F99")}, FOUR)
    with pytest.raises(CheckpointError) as error:
        ours(tmp_path, content)
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 800


# --- fuzz ------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 12, -1, 2**31, 2**61, 2**63, 2**64, 1.0, True, None])
DTYPES = st.sampled_from(["F32", "BF16", "U8", "BOOL", "F4", "F8_E4M3", "C64", "Q", "", None, 3])
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header laid out correctly, then up to three of its fields replaced; and some data."""
    header: dict[str, Any] = {}
    position = 0
    for i in range(draw(st.integers(0, 4))):
        dtype, size = draw(st.sampled_from([("F32", 4), ("BF16", 2), ("U8", 1), ("C64", 8)]))
        shape = draw(SHAPES)
        for axis in shape:
            size *= axis
        header[f"t{i}"] = entry(dtype, shape, [position, position + size])
        position += size
    for _ in range(draw(st.integers(0, 3)) if header else 0):
        fields = header[draw(st.sampled_from(sorted(header)))]
        what = draw(st.sampled_from(["dtype", "shape", "data_offsets", "extra", "drop"]))
        if what == "drop":
            fields.pop(draw(st.sampled_from(["dtype", "shape", "data_offsets"])), None)
        elif what == "dtype":
            fields["dtype"] = draw(DTYPES)
        else:
            fields[what] = draw(st.lists(NUMBERS, max_size=3) | NUMBERS)
    data_bytes = max(0, position + draw(st.sampled_from([0, 0, 0, 1, -1, 8])))
    return file_bytes(header, bytes(data_bytes))


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A correct file with bytes of its header or length replaced, removed or put in."""
    shapes = draw(st.dictionaries(st.text(max_size=3), SHAPES.map(tuple), max_size=3))
    content = bytearray(tensors_file(shapes))
    stop = 8 + struct.unpack("<Q", content[:8])[0]
    header, data = content[8:stop], content[stop:]
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(header)))
        piece = draw(
            st.sampled_from([b"", b"0", b"9", b'"', b"{", b"}", b"\\", b",", b"\xff", b" "])
        )
        header[place : place + draw(st.integers(0, 1))] = piece
    wrong = draw(st.sampled_from([0, 0, 0, 0, 1, -1, 256, 2**40]))
    data += b"0" * draw(st.sampled_from([0, 0, 0, 1]))
    return file_bytes(bytes(header), bytes(data), length=max(0, len(header) + wrong))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def agree(folder: Path, content: bytes) -> str:
    """One verdict from both readers, but for the listed points; then the same tensors."""
    expected = theirs(folder, content)
    try:
        found = ours(folder / "ours", content)
    except CheckpointError as error:
        message = str(error)
        stricter = any(m in message for text in STRICTER.values() for m in text.split("|"))
        assert expected is None or stricter, message
        return "refused" if expected is None else "stricter"
    assert expected is not None, "safetensors refuses this file"
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
    return "accepted"


@pytest.mark.parametrize("files", [headers(), damaged_files()], ids=["headers", "bytes"])
def test_fuzz(folder: Path, files: st.SearchStrategy[bytes]) -> None:
    verdicts: Counter[str] = Counter()

    @settings(max_examples=200, deadline=None, database=None)
    @given(files)
    def run(content: bytes) -> None:
        verdicts[agree(folder, content)] += 1

    run()
    assert min(verdicts["accepted"], verdicts["refused"]) > 20, f"too one-sided: {verdicts}"


@settings(max_examples=100, deadline=None, database=None)
@given(st.binary(max_size=64))
def test_random_bytes(folder: Path, content: bytes) -> None:
    agree(folder, content)
