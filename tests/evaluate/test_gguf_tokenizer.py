"""The tokenizer of a GGUF file against the checkpoint's own, and against llama.cpp's ids."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moequant.architectures import describe_gguf
from moequant.calibrate.text import Document
from moequant.calibrate.windows import leading_token, load_tokenizer, token_stream
from moequant.checkpoint import open_checkpoint
from moequant.errors import ArchitectureError, GGUFError, TokenizerError
from moequant.evaluate.gguf_tokenizer import (
    check_vocabulary,
    gguf_tokenizer,
    metadata_differences,
)
from moequant.gguf_file import read_model
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp
from tests.checkpoints import TEXT, make_checkpoint
from tests.gguf_files import rewrite, split

KINDS = ("gemma4-dense", "qwen3-moe")
TEXTS = [
    TEXT,
    "a\n\n\nb  c   d\t\te\r\nf \n g",
    "   leading, and trailing   ",
    "日本語テキスト、Übung, façade, ﬁ ligature, 😀🎉, кириллица, العربية",
    "x = 12345678\n    if y:\n\treturn '''it's'''\n",
    "<|turn>user\nhi<turn|>\n<|channel>thought\n<channel|><bos>text<eos><|tool_call>",
    "<|im_start|>user\nhi<|im_end|>\n<think>x</think> <tool_call> <|endoftext|>",
    "",
]


def _with_turns(folder: Path) -> None:
    """Gemma's own files name the tokens of a turn as special, so that they are exported so."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["extra_special_tokens"] = {"sot_token": "<|turn>", "eot_token": "<turn|>"}
    path.write_text(json.dumps(config), "utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Checkpoint folder and file of a kind."""
    root = tmp_path_factory.mktemp("made")

    def of(kind: str) -> tuple[Path, Path]:
        folder, path = root / kind, root / f"{kind}.gguf"
        if not path.exists():
            make_checkpoint(kind, folder)
            if kind.startswith("gemma4"):
                _with_turns(folder)
            export(open_checkpoint(folder), path, ExportOptions("Q8_0", calibration=None))
        return folder, path

    return of


Made = Callable[[str], tuple[Path, Path]]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_checkpoint_s_tokenizer(kind: str, text: str, made: Made) -> None:
    folder, path = made(kind)
    ours, theirs = gguf_tokenizer(read_model(path)), load_tokenizer(folder)
    for special in (False, True):
        expected = theirs(text, add_special_tokens=special)["input_ids"]
        assert ours(text, add_special_tokens=special)["input_ids"] == expected
    assert ours.decode(expected) == theirs.decode(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_and_special_tokens_are_the_checkpoint_s(kind: str, made: Made) -> None:
    folder, path = made(kind)
    file = read_model(path)
    spec = describe_gguf(file)
    ours, theirs = gguf_tokenizer(file), load_tokenizer(folder)
    messages = ({"role": "user", "content": "How deep is it?"},
                {"role": "assistant", "content": "7 m, says the map."})  # fmt: skip
    documents = [Document("a", TEXT), Document("b", messages=messages), Document("c", TEXTS[3])]
    found = token_stream(ours, documents, spec)
    assert len(found) > 400
    assert torch.equal(found, token_stream(theirs, documents, spec))
    assert leading_token(ours, spec) == leading_token(theirs, spec)
    assert (leading_token(ours, spec) is None) == (kind == "qwen3-moe")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_the_example_s_held_out_text(tiny_model: Path, tmp_path: Path) -> None:
    """Eight domains, several languages, code: 96 KB."""
    path = tmp_path / "tiny.gguf"
    export(open_checkpoint(tiny_model), path, ExportOptions("Q8_0", calibration=None))
    text = (tiny_model / "held-out.txt").read_text("utf-8")
    ours = gguf_tokenizer(read_model(path))(text)["input_ids"]
    assert len(ours) > 20000
    assert ours == load_tokenizer(tiny_model)(text)["input_ids"]


def test_the_first_shard_has_the_tokenizer(made: Made, tmp_path: Path) -> None:
    _, path = made("qwen3-moe")
    first = split(path, tmp_path, 20, small_first_shard=True)
    ours, whole = gguf_tokenizer(read_model(first)), gguf_tokenizer(read_model(path))
    assert ours(TEXT)["input_ids"] == whole(TEXT)["input_ids"]


@pytest.mark.llama_cpp
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_llama_cpps(llama_cpp: LlamaCpp, kind: str, made: Made, tmp_path: Path) -> None:
    """llama-perplexity writes the ids it made of a text before the logits it is asked to keep."""
    _, path = made(kind)
    text = tmp_path / "text.txt"
    text.write_text(TEXT.replace("\n\n", "\n").rstrip("\n") + "\n" + TEXTS[3] + "\n" + TEXT)
    logits = tmp_path / "logits"
    command = [llama_cpp.tool("llama-perplexity"), "-m", path, "-f", text, "-c", "64", "-b", "64",
               "-t", "1", "--kl-divergence-base", logits]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    data = logits.read_bytes()
    assert data[:8] == b"_logits_"
    context, _, chunks = np.frombuffer(data, np.int32, 3, offset=8)
    theirs = np.frombuffer(data, np.int32, context * chunks, offset=20)
    ours = gguf_tokenizer(read_model(path))(text.read_text())["input_ids"]
    assert len(theirs) > 700
    assert ours[: len(theirs)] == theirs.tolist()


# --- what is refused -------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens is missing"),
    ({"tokenizer.ggml.merges": [1, 2]}, r"tokenizer\.ggml\.merges is not a list of strings"),
    ({"tokenizer.ggml.token_type": [1, 3]}, r"token_type is missing, or not one for each token"),
    ({"tokenizer.ggml.model": "llama"}, r"model is 'llama'; qwen3moe has 'gpt2'"),
    ({"tokenizer.ggml.pre": "no-such"}, r"pre is 'no-such'; .*qwen2"),
    ({"tokenizer.ggml.eos_token_id": 512}, r"eos_token_id is 512, of 512 tokens"),
    ({"tokenizer.ggml.merges": ["zz yy"]}, "transformers refuses its tokenizer"),
]


@pytest.mark.parametrize(("keys", "message"), BAD, ids=[m for _, m in BAD])
def test_a_damaged_tokenizer_is_refused(
    keys: dict[str, Any], message: str, made: Made, tmp_path: Path
) -> None:
    rewrite(made("qwen3-moe")[1], tmp_path / "bad.gguf", keys=keys)
    with pytest.raises(TokenizerError, match=message) as caught:
        gguf_tokenizer(read_model(tmp_path / "bad.gguf"))
    assert str(tmp_path / "bad.gguf") in str(caught.value)


def test_another_family_is_named(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    data = made("qwen3-moe")[1].read_bytes()
    path.write_bytes(data.replace(b"qwen3moe", b"qwen9moe"))
    with pytest.raises(ArchitectureError, match="'qwen9moe' is not supported"):
        gguf_tokenizer(read_model(path))


# --- comparison ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_has_its_checkpoint_s_vocabulary_and_keys(kind: str, made: Made) -> None:
    folder, path = made(kind)
    checkpoint, file = open_checkpoint(folder), read_model(path)
    for one in (checkpoint, file):
        for other in (checkpoint, file):
            check_vocabulary(one, other)
            assert metadata_differences(one, other) == []


def test_the_first_other_token_is_named(made: Made, tmp_path: Path) -> None:
    """Padding may have other names; the first of two other tokens is told."""
    folder, path = made("qwen3-moe")
    tokens = list(read_model(path).metadata["tokenizer.ggml.tokens"])
    tokens[509], reference = "<dummy509>", open_checkpoint(folder)
    rewrite(path, tmp_path / "padding.gguf", keys={"tokenizer.ggml.tokens": tokens})
    check_vocabulary(read_model(tmp_path / "padding.gguf"), reference)
    tokens[17], tokens[300] = "changed", "later"
    rewrite(path, tmp_path / "other.gguf", keys={"tokenizer.ggml.tokens": tokens})
    with pytest.raises(GGUFError, match=r"other\.gguf is not .*: token 17 is 'changed'.* '\S+'\."):
        check_vocabulary(read_model(tmp_path / "other.gguf"), reference)


def test_another_number_of_tokens_is_told(made: Made) -> None:
    with pytest.raises(GGUFError, match="it has 640 tokens, the reference 512"):
        check_vocabulary(read_model(made("gemma4-dense")[1]), open_checkpoint(made("qwen3-moe")[0]))


def test_keys_that_differ_are_listed(made: Made, tmp_path: Path) -> None:
    folder, path = made("gemma4-dense")
    keys = {"gemma4.rope.freq_base": 10000.0, "gemma4.attention.sliding_window": 32,
            "gemma4.final_logit_softcapping": None, "gemma4.something.new": 3,
            "gemma4.attention.shared_kv_layers": None}  # fmt: skip
    rewrite(path, tmp_path / "other.gguf", keys=keys)
    file = read_model(tmp_path / "other.gguf")
    expected = [
        "gemma4.attention.sliding_window is 32, the reference has 64",
        "gemma4.final_logit_softcapping is not there, the reference has 30.0",
        "gemma4.rope.freq_base is 10000.0, the reference has 1000000.0",
    ]
    assert metadata_differences(file, open_checkpoint(folder)) == expected
    assert metadata_differences(file, read_model(path)) == expected
