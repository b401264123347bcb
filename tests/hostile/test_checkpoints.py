"""Bad checkpoints: each gets one `CheckpointError` that says what is wrong and what to do.

Owns: folders, configs, indexes and files that are not what they say. Leaves out: the headers'
arithmetic (`tests/checkpoint/test_header.py`) and models that are not what their config says.
"""

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moequant.checkpoint import open_checkpoint
from moequant.errors import CheckpointError
from tests.checkpoint.files import SHARDS, tensors_file, two_shards, write_sharded, write_single

INDEX = "model.safetensors.index.json"


def refusal(source: str | Path) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(source)
    assert error.value.exit_code == 2
    return str(error.value)


class Bomb:
    """Leaves a trace if anything unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.trace,)


# --- pickle ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "m.pt", "m.PTH", "m.ckpt"]
)
def test_pickle_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    torch.save({"w": torch.zeros(1)}, tmp_path / name)
    text = refusal(tmp_path)
    assert f"pickle files ({name})" in text
    assert "runs code" in text
    assert "save_pretrained" in text


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickle_under_a_safetensors_name(protocol: int, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    write_single(tmp_path, pickle.dumps(Bomb(trace), protocol=protocol))
    text = refusal(tmp_path)
    assert "model.safetensors: " in text
    assert "pickle" in text or protocol == 0  # protocol 0 is text and cannot be told from noise
    assert not trace.exists()


def test_torch_archive_under_a_safetensors_name(tmp_path: Path) -> None:
    write_single(tmp_path, b"")
    torch.save({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "model.safetensors: a pickle file" in refusal(tmp_path)


def test_index_that_names_pickle(tmp_path: Path) -> None:
    write_sharded(tmp_path, {}, {"a": "pytorch_model.bin"})
    assert "shard pytorch_model.bin is a pickle file" in refusal(tmp_path)


def test_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    folder = two_shards(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(trace)))
    assert len(open_checkpoint(folder).tensors) == 3
    assert not trace.exists()


# --- the wrong thing ---------------------------------------------------------------------------


def test_no_such_folder(tmp_path: Path) -> None:
    assert "nothing: no folder to open: no such file" in refusal(tmp_path / "nothing")
    assert "no such file" in refusal("./nothing")
    assert "no such file" in refusal("models/of/mine")
    assert "no such file" in refusal("org//model")
    assert "no such file" in refusal("org/model.gguf")


@pytest.mark.parametrize(
    "source",
    ["", "gpt2", "org/na me", "a\0b/c", "org/" + "x" * 200, "a--b/c", "x" * 5000],
)
def test_neither_folder_nor_id(source: str) -> None:
    assert "not a Hugging Face id" in refusal(source)


def test_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "a GGUF file, which is moequant's output" in refusal(tmp_path / "model.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert "holds GGUF (model.gguf)" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"GGUF\3\0\0\0" + bytes(100))
    assert "a GGUF file under a safetensors name" in refusal(tmp_path)


def test_one_file_of_a_checkpoint(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    assert f"pass its folder, {folder}" in refusal(folder / SHARDS[0])
    assert "a file; pass a folder" in refusal(folder / "config.json")


def test_an_empty_folder(tmp_path: Path) -> None:
    text = refusal(tmp_path)
    assert "2 problems" in text
    assert "config.json: missing" in text
    assert "no weights" in text


def test_a_lora_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors_file({"a": (1,)}))
    assert "a LoRA adapter" in refusal(tmp_path)


def test_shards_without_an_index(tmp_path: Path) -> None:
    (two_shards(tmp_path) / INDEX).unlink()
    assert f"{INDEX}: missing, though shards are there ({SHARDS[0]}, {SHARDS[1]})" in refusal(
        tmp_path
    )


def test_weights_by_another_name(tmp_path: Path) -> None:
    write_single(tmp_path, tensors_file({"a": (1,)}))
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert "rename it model.safetensors" in refusal(tmp_path)


def test_a_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    write_single(tmp_path, pointer)
    assert "run `git lfs pull`" in refusal(tmp_path)


def test_no_tensor_at_all(tmp_path: Path) -> None:
    write_single(tmp_path, b"\2\0\0\0\0\0\0\0{}")
    assert "model.safetensors: no tensor inside" in refusal(tmp_path)


# --- config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "config.json: empty"),
        (b"{", "config.json: not valid JSON"),
        (b"\xff\xfe{}", "config.json: not valid JSON"),
        (b"[" * 100_000, "config.json: not valid JSON"),
        (b"[1]", "config.json: a JSON list, not an object"),
    ],
)
def test_bad_config(content: bytes, message: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / "config.json").write_bytes(content)
    assert message in refusal(folder)


def test_infinity_in_a_config_is_what_transformers_writes(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    assert open_checkpoint(folder).config["time_step_limit"][1] == float("inf")


def test_a_mistral_folder(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    (tmp_path / "consolidated.safetensors").write_bytes(tensors_file({"a": (1,)}))
    assert "use the Hugging Face version" in refusal(tmp_path)


# --- the index ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"{]", "not valid JSON"),
        (b'"x"', "a JSON str, not an object"),
        (b"{}", 'no "weight_map"'),
        (b'{"weight_map": {}}', 'no "weight_map"'),
        (b'{"weight_map": ["a"]}', 'no "weight_map"'),
        (b'{"weight_map": {"a": 1}}', "weight_map[a] is not a file name"),
    ],
)
def test_bad_index(content: bytes, message: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / INDEX).write_bytes(content)
    assert f"{INDEX}: {message}" in refusal(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/../../x.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x\0.safetensors",
        "x\ud800.safetensors",
        "x\n.safetensors",
        "./x.safetensors",
        "sub//x.safetensors",
        "",
        "config.json",
    ],
)
def test_shards_that_are_no_shards(shard: str, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", {}, {"a": shard})
    (tmp_path / "x.safetensors").write_bytes(tensors_file({"a": (1,)}))
    text = refusal(folder)
    assert f"{INDEX}: shard " in text
    assert "missing" not in text, "the path must be refused before it is looked at"


def test_everything_wrong_with_index_and_shards_is_one_error(tmp_path: Path) -> None:
    shards = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    folder = write_sharded(
        tmp_path,
        {
            shards[0]: tensors_file({"a": (1,), "twice": (1,), "unlisted": (1,)}),
            shards[1]: tensors_file({"twice": (1,), "moved": (1,)}),
            shards[2]: tensors_file({"d": (4,)})[:-1],
            shards[4]: tensors_file({"f": (1,)}, dtype="U8").replace(b'"U8"', b'"Q8"'),
        },
        {
            "a": shards[0],
            "absent": shards[0],
            "twice": shards[0],
            "moved": shards[0],
            "also": shards[1],
            "d": shards[2],
            "e": shards[3],
            "f": shards[4],
        },
    )
    (folder / "config.json").write_text("")
    text = refusal(folder)
    assert "9 problems" in text
    for line in (
        "config.json: empty",
        f"{shards[2]}: truncated: the header describes 16 bytes of data, the file has 15",
        f"{shards[3]}: missing",
        f"{shards[4]}: f has unknown dtype Q8",
        f"{shards[0]}: absent is not in it, though {INDEX} says so; nor in any other shard",
        f"{shards[0]}: moved is not in it, though {INDEX} says so; it is in {shards[1]}",
        f"{shards[1]}: also is not in it",
        f"twice is in 2 shards: {shards[0]}, {shards[1]}",
        f"{shards[0]}: unlisted is in it, but not in {INDEX}",
    ):
        assert line in text


# --- the file system ---------------------------------------------------------------------------


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder anyone may enter; root, whom permissions do not stop, becomes another user."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    root = os.geteuid() == 0
    two_shards(folder)
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARDS[1]])
def test_no_permission_for_a_file(name: str, as_nobody: Path) -> None:
    set_mode(as_nobody / name, 0)
    assert f"{name}: may not be read by this user" in refusal(as_nobody)


def test_no_permission_for_the_folder(as_nobody: Path) -> None:
    set_mode(as_nobody, 0)
    assert "cannot be listed: permission denied" in refusal(as_nobody)


def set_mode(path: Path, mode: int) -> None:
    """chmod as the files' owner, then back to whoever runs the test."""
    user = os.geteuid()
    os.seteuid(os.getuid())
    path.chmod(mode)
    os.seteuid(user)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARDS[1]])
def test_a_folder_in_a_files_place(name: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert f"{name}: a folder, where a file is expected" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", INDEX, SHARDS[1], "model.safetensors"])
def test_links_that_lead_nowhere(name: str, tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("../../blobs/0123")
    assert f"{name}: a link to ../../blobs/0123, which is not there" in refusal(folder)


def test_a_link_to_itself(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    assert "config.json: " in refusal(folder)


@pytest.mark.timeout(20)
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    folder = two_shards(tmp_path)
    (folder / SHARDS[0]).unlink()
    os.mkfifo(folder / SHARDS[0])
    assert f"{SHARDS[0]}: not a regular file" in refusal(folder)


@pytest.mark.parametrize("kept", range(0, 200, 7))
def test_a_shard_cut_off_anywhere(kept: int, tmp_path: Path) -> None:
    content = tensors_file({"a": (2, 3), "b": (4,), "c": (5,)})
    assert kept < len(content)
    write_single(tmp_path, content[:kept])
    assert "model.safetensors: " in refusal(tmp_path)


def test_many_offenders_are_counted_not_all_listed(tmp_path: Path) -> None:
    names = {f"model.layers.{i}.w": SHARDS[0] for i in range(500)}
    write_sharded(tmp_path, {SHARDS[0]: tensors_file({"model.layers.0.w": (1,)})}, names)
    text = refusal(tmp_path)
    assert "499 problems" in text
    assert "… and 479 more" in text
    assert len(text) < 5000
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"] == names
