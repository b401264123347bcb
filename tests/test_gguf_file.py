"""Split models: shards written by gguf-py are read as one model, and wrong ones are refused."""

import subprocess
from pathlib import Path

import gguf
import pytest

from moequant.checkpoint import open_checkpoint
from moequant.errors import GGUFError
from moequant.gguf_file import read_gguf, read_model
from moequant.inspection import inspect
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp
from tests.checkpoints import make_checkpoint
from tests.gguf_files import rewrite, split


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = open_checkpoint(make_checkpoint("qwen3-moe", folder / "checkpoint"))
    export(checkpoint, folder / "whole.gguf", ExportOptions("Q8_0", calibration=None))
    return folder / "whole.gguf"


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_shards_are_read_as_one_model(whole: Path, tmp_path: Path, small_first_shard: bool) -> None:
    """With `small_first_shard` the first file has metadata and not one tensor."""
    first = split(whole, tmp_path, 13, small_first_shard=small_first_shard)
    single, model = read_model(whole), read_model(first)
    assert len(model.shards) == len(list(tmp_path.iterdir())) == 4 + small_first_shard
    assert single.shards == () and model.path == model.shards[0] == first
    assert model.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert {t.path for t in model.tensors.values()} == set(model.shards[small_first_shard:])
    assert set(model.tensors) == set(single.tensors)
    for name, tensor in single.tensors.items():
        assert (model.tensors[name].shape, model.tensors[name].qtype) == (
            tensor.shape,
            tensor.qtype,
        )
        assert model.read(name).tobytes() == single.read(name).tobytes()
    kept = {key: v for key, v in model.metadata.items() if not key.startswith("split.")}
    assert kept == single.metadata


def test_inspect_shows_a_split_model_as_one(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path, 13)
    one, parts = inspect(str(whole)), inspect(str(first))
    assert (parts.roles, parts.parameters, parts.nbytes) == (one.roles, one.parameters, one.nbytes)
    assert parts.metadata["split.count"] == 4


@pytest.mark.llama_cpp
def test_llama_cpp_loads_the_same_shards(llama_cpp: LlamaCpp, whole: Path, tmp_path: Path) -> None:
    """The files that we read are a split model for llama.cpp, too, with the same tensors."""
    first = split(whole, tmp_path / "shards", 13)
    joined = tmp_path / "joined.gguf"
    command = [llama_cpp.tool("llama-quantize"), "--allow-requantize", first, joined, "COPY", "1"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    theirs, ours = gguf.GGUFReader(joined), read_model(first)
    assert len(theirs.tensors) == len(ours.tensors)
    for tensor in theirs.tensors:
        assert ours.read(tensor.name).tobytes() == tensor.data.tobytes(), tensor.name


def test_a_later_shard_is_refused_and_the_first_named(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path, 13)
    third = tmp_path / "model-00003-of-00004.gguf"
    with pytest.raises(GGUFError, match=rf"shard 3 of 4; give the first: {first}"):
        read_model(third)


def test_missing_shards_are_all_listed(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path, 13)
    for number in (2, 4):
        (tmp_path / f"model-0000{number}-of-00004.gguf").unlink()
    with pytest.raises(GGUFError, match="2 of 4 shards missing") as caught:
        read_model(first)
    assert "00002-of" in str(caught.value) and "00004-of" in str(caught.value)
    assert "00003-of" not in str(caught.value)


def test_a_renamed_shard_is_refused(whole: Path, tmp_path: Path) -> None:
    first = split(whole, tmp_path, 13)
    other = first.rename(tmp_path / "other.gguf")
    with pytest.raises(GGUFError, match=r"name must end in -00001-of-00004\.gguf"):
        read_model(other)


@pytest.mark.parametrize(
    ("replacement", "message"),
    [
        ("model-00003-of-00004.gguf", r"its split\.no is 2, not 1"),
        ("three", r"its split\.count is 3, not 4"),
        ("whole", r"split\.count is None, not a count"),
        ("fewer", r"its split\.tensors\.count is 50, not 51"),
    ],
)
def test_a_shard_of_another_model_is_refused(
    whole: Path, tmp_path: Path, replacement: str, message: str
) -> None:
    first = split(whole, tmp_path / "shards", 13)
    assert len(read_gguf(whole).tensors) == 51
    dropped = tmp_path / "dropped.gguf"
    rewrite(whole, dropped, tensors={"blk.3.ffn_norm.weight": None})
    sources = {
        "three": split(whole, tmp_path / "three", 17).with_name("model-00002-of-00003.gguf"),
        "fewer": split(dropped, tmp_path / "fewer", 13).with_name("model-00002-of-00004.gguf"),
        "whole": whole,
    }
    source = sources.get(replacement, first.with_name(replacement))
    second = first.with_name("model-00002-of-00004.gguf")
    second.write_bytes(source.read_bytes())
    with pytest.raises(GGUFError, match=message) as caught:
        read_model(first)
    assert str(second) in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(whole: Path, tmp_path: Path) -> None:
    """Two models of the same number of tensors, cut in another order."""
    first = split(whole, tmp_path / "shards", 13)
    name = "blk.0.attn_norm.weight"
    _moved_to_the_end(whole, tmp_path / "moved.gguf", name)
    other = split(tmp_path / "moved.gguf", tmp_path / "moved", 13)
    last = "model-00004-of-00004.gguf"
    (first.with_name(last)).write_bytes(other.with_name(last).read_bytes())
    with pytest.raises(GGUFError, match=rf"{name}: also in {first.name}"):
        read_model(first)


def _moved_to_the_end(source: Path, target: Path, name: str) -> None:
    tensor = next(t for t in gguf.GGUFReader(source).tensors if t.name == name)
    rewrite(source, target, tensors={name: (tensor.data, tensor.tensor_type)})


def test_the_number_of_tensors_is_checked(whole: Path, tmp_path: Path) -> None:
    """A shard whose tensors are fewer than all shards together announce."""
    first = split(whole, tmp_path, 13)
    last = first.with_name("model-00004-of-00004.gguf")
    copy = tmp_path / "copy.gguf"
    names = list(read_gguf(last).tensors)
    _without(last, copy, names[0])
    last.write_bytes(copy.read_bytes())
    with pytest.raises(GGUFError, match=r"split\.tensors\.count is 51, but its 4 shards hold 50"):
        read_model(first)


def _without(source: Path, target: Path, name: str) -> None:
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "qwen3moe")
    for key, field in reader.fields.items():
        if key.startswith("split."):
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if tensor.name != name:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
