"""Reading tensors: equal to safetensors' own reader, and only the bytes that were asked for."""

import hashlib
import os
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.errors import CheckpointError, UsageError
from tests.checkpoint.files import (
    SHARDS,
    file_bytes,
    tensors_file,
    two_shards,
    write_sharded,
    write_single,
)

MIB = 1 << 20

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    count = size * torch.Size(shape).numel()
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> Checkpoint:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file(tensors, folder / "model.safetensors")
    return open_checkpoint(folder)


def assert_same_bytes(left: torch.Tensor, right: torch.Tensor) -> None:
    assert (left.dtype, left.shape) == (right.dtype, right.shape)
    assert torch.equal(
        left.contiguous().reshape(-1).view(torch.uint8),
        right.contiguous().reshape(-1).view(torch.uint8),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_as_safetensors_reads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "matrix": random_bits(dtype, 5, 3),
        "experts": random_bits(dtype, 4, 2, 3),
        "scalar": random_bits(dtype),
        "empty": torch.empty(0, 3, dtype=dtype),
        "odd": torch.zeros(3, dtype=torch.uint8),  # what follows it is not aligned
    }
    checkpoint = saved(tmp_path, tensors)
    expected = load_file(tmp_path / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_same_bytes(checkpoint.read(name), tensor)
        if tensor.ndim:
            assert_same_bytes(checkpoint.read_slice(name, 0, len(tensor)), tensor)
    assert_same_bytes(checkpoint.read_slice("experts", 1, 3), expected["experts"][1:3])
    assert checkpoint.read_slice("matrix", 2, 2).shape == (0, 3)


def test_bool(tmp_path: Path) -> None:
    mask = torch.tensor([[True, False, True]])
    assert_same_bytes(saved(tmp_path, {"mask": mask}).read("mask"), mask)


def test_every_row_of_a_slice(tmp_path: Path) -> None:
    values = torch.arange(7 * 3).reshape(7, 3)
    checkpoint = saved(tmp_path, {"w": values})
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(checkpoint.read_slice("w", start, stop), values[start:stop])


@pytest.mark.parametrize(
    ("name", "start", "stop"), [("w", -1, 2), ("w", 0, 8), ("w", 3, 2), ("s", 0, 1)]
)
def test_rows_that_are_not_there(name: str, start: int, stop: int, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"w": torch.zeros(7, 3), "s": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match=f"rows {start}:{stop} of {name} .* shape is "):
        checkpoint.read_slice(name, start, stop)


def test_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"model.norm.weight": torch.zeros(1)})
    with pytest.raises(
        CheckpointError, match=r"no tensor named .*; did you mean model.norm.weight"
    ):
        checkpoint.read("model.norms.weight")


def sparse_checkpoint(folder: Path, rows: int) -> Checkpoint:
    """One F32 tensor "big" of `rows` x 1 MiB that takes no room on the disk."""
    header = {
        "big": {
            "dtype": "F32",
            "shape": [rows, MIB // 4],
            "data_offsets": [0, rows * MIB],
        }
    }
    content = file_bytes(header)
    write_single(folder, content)
    os.truncate(folder / "model.safetensors", len(content) + rows * MIB)
    return open_checkpoint(folder)


def bytes_read_by_this_process() -> int:
    """What read() and its relatives returned so far, from the page cache or the disk."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes with Linux's /proc")
def test_only_the_bytes_asked_for_are_read(tmp_path: Path) -> None:
    before = bytes_read_by_this_process()
    overhead = bytes_read_by_this_process() - before
    checkpoint = sparse_checkpoint(tmp_path, rows=16 * 1024)
    opened = bytes_read_by_this_process()
    assert opened - before - 2 * overhead < 100_000, "opening read more than a header"
    rows = checkpoint.read_slice("big", 9000, 9003)
    assert rows.shape == (3, MIB // 4)
    assert abs(bytes_read_by_this_process() - opened - 3 * MIB) < 1000


def test_memory_holds_the_slice_and_not_the_shard(tmp_path: Path) -> None:
    checkpoint = sparse_checkpoint(tmp_path, rows=4096)
    process = psutil.Process()
    before = process.memory_info().rss
    for row in range(0, 4096, 256):
        assert checkpoint.read_slice("big", row, row + 2).sum() == 0
    assert process.memory_info().rss - before < 64 * MIB


def test_no_file_stays_open(tmp_path: Path) -> None:
    process = psutil.Process()
    before = process.num_fds()
    checkpoint = open_checkpoint(two_shards(tmp_path / "good"))
    for name in checkpoint.tensors:
        checkpoint.read(name)
    write_single(tmp_path / "bad", b"short")
    for _ in range(3):
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "bad")
        with pytest.raises(CheckpointError):
            checkpoint.read("d")
    assert process.num_fds() == before


def test_reads_in_pieces_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors over the limit of one system call; the limit is lowered to keep the test small."""
    values = torch.arange(1000, dtype=torch.int16)
    checkpoint = saved(tmp_path, {"w": values})
    monkeypatch.setattr("moequant.checkpoint.reader._MAX_READ", 7)
    assert torch.equal(checkpoint.read("w"), values)


def test_a_file_cut_off_after_opening(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"w": torch.zeros(100)})
    os.truncate(tmp_path / "model.safetensors", 90)
    with pytest.raises(CheckpointError, match=r"model.safetensors: w: the file changed"):
        checkpoint.read("w")


def test_a_file_gone_after_opening(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"w": torch.zeros(100)})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: w: missing"):
        checkpoint.read("w")


def test_tensors_come_in_natural_order(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.w": (1,) for i in (10, 2, 1, 0, 11)} | {"embed": (1,)}
    checkpoint = open_checkpoint(write_single(tmp_path, tensors_file(shapes)))
    assert list(checkpoint.tensors) == ["embed", *(f"layers.{i}.w" for i in (0, 1, 2, 10, 11))]


def test_names_of_endless_digits(tmp_path: Path) -> None:
    """Python refuses int() of more than 4300 digits."""
    names = ["w." + "9" * 5000, "w.007", "w.8", "w.٣", "w."]
    checkpoint = open_checkpoint(write_single(tmp_path, tensors_file(dict.fromkeys(names, (1,)))))
    assert [name[:5] for name in checkpoint.tensors] == ["w.", "w.007", "w.8", "w.999", "w.٣"]


def test_tensors_cannot_be_changed(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"w": torch.zeros(1)})
    with pytest.raises(TypeError):
        checkpoint.tensors["x"] = checkpoint.tensors["w"]  # type: ignore[index]


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(two_shards(tmp_path / "model-7b")))
    assert checkpoint.name == "model-7b"
    assert checkpoint.path == tmp_path / "model-7b"
    assert checkpoint.revision is None
    assert checkpoint.config == {"model_type": "x"}
    assert [info.file.name for info in checkpoint.tensors.values()] == [SHARDS[0], *SHARDS]
    for shard in SHARDS:
        for name, tensor in load_file(tmp_path / "model-7b" / shard).items():
            assert_same_bytes(checkpoint.read(name), tensor)


def test_digest_is_that_of_config_and_index(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    content = b"".join(
        (folder / name).read_bytes() for name in ("config.json", "model.safetensors.index.json")
    )
    assert open_checkpoint(folder).digest() == hashlib.sha256(content).hexdigest()
    (folder / "config.json").write_text('{"model_type": "y"}')
    assert open_checkpoint(folder).digest() != hashlib.sha256(content).hexdigest()


def test_digest_without_an_index_is_over_the_header(tmp_path: Path) -> None:
    content = tensors_file({"a": (2,)})
    folder = write_single(tmp_path, content)
    header = content[8:-8]
    expected = hashlib.sha256((folder / "config.json").read_bytes() + header).hexdigest()
    assert open_checkpoint(folder).digest() == expected


def test_files_beside_the_weights(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, {"w": torch.zeros(1)})
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").symlink_to("blobs/gone")
    assert checkpoint.file("tokenizer.json") == tmp_path / "tokenizer.json"
    assert checkpoint.file("tokenizer.model") is None
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: a link to blobs/gone"):
        checkpoint.file("chat_template.jinja")


def test_links_out_of_the_folder_are_followed(tmp_path: Path) -> None:
    """Hugging Face's cache is made of them: snapshots/<commit>/x -> ../../blobs/<hash>."""
    folder = two_shards(tmp_path / "snapshots" / "0123")
    (tmp_path / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(i))
        path.symlink_to(f"../../blobs/{i}")
    assert list(open_checkpoint(folder).tensors) == ["a", "b", "c"]


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two_shards(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("org/name").name == "name"
    monkeypatch.chdir(tmp_path / "org" / "name")
    assert open_checkpoint(".").name == "name"


def test_a_revision_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a local folder has no revision main"):
        open_checkpoint(two_shards(tmp_path), revision="main")


def test_notes(tmp_path: Path) -> None:
    assert open_checkpoint(two_shards(tmp_path)).notes == ()
    write_sharded(
        tmp_path / "size", {SHARDS[0]: tensors_file({"a": (2,)})}, {"a": SHARDS[0]}, total_size=9
    )
    (note,) = open_checkpoint(tmp_path / "size").notes
    assert "total_size 9, the shards hold 8" in note


def test_the_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """As in transformers, which loads the same folder here; the two hold different weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "vocab_size": 16}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **size))
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    index = (tmp_path / "model.safetensors.index.json").read_bytes()
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    (tmp_path / "consolidated.safetensors").write_bytes(b"not read at all")

    checkpoint = open_checkpoint(tmp_path)
    reference = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert checkpoint.read("model.norm.weight").tolist() == [7] * 8
    assert reference["model.norm.weight"].tolist() == [7] * 8
    assert (
        "model.safetensors is read and model.safetensors.index.json is not" in checkpoint.notes[0]
    )
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), reference[name])
