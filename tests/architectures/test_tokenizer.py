"""The tokenizer's keys: what is refused, and what the converter test has no case for."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType

from moequant.architectures import ModelSpec, describe
from moequant.checkpoint import Checkpoint
from moequant.errors import TokenizerError
from moequant.gguf_export.tokenizer import tokenizer_metadata

Change = Callable[[dict[str, Any]], object]
FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _copy(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with its small files in `folder`, to be changed there."""
    for name in FILES:
        if (checkpoint.path / name).is_file():
            shutil.copy(checkpoint.path / name, folder / name)
    return replace(checkpoint, path=folder)


def _edit(folder: Path, change: Change, name: str = "tokenizer.json") -> None:
    value = json.loads((folder / name).read_text(encoding="utf-8"))
    change(value)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def _keys(spec: ModelSpec, checkpoint: Checkpoint) -> dict[str, Any]:
    return {entry.key: entry.value for entry in tokenizer_metadata(spec, checkpoint)}


def test_missing_tokenizer(gemma: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        tokenizer_metadata(describe(gemma), replace(gemma, path=tmp_path))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, '{"model": 5}', "\udcff"])
def test_damaged_tokenizer(gemma: Checkpoint, tmp_path: Path, text: str) -> None:
    damaged = _copy(gemma, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(TokenizerError):
        tokenizer_metadata(describe(gemma), damaged)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t["model"].update(byte_fallback=False), "without byte fallback"),
        (lambda t: t["model"].update(type="WordPiece"), "WordPiece"),
        (lambda t: t["model"].update(merges=[]), "no merges"),
        (lambda t: t["model"].update(merges=[["a", "b", "c"]]), "refuses it: .*tuple of length 2"),
        (lambda t: t["model"].pop("vocab"), "refuses it"),
        (lambda t: t.update(post_processor={"type": "Other"}), "refuses it: .*PostProcessor"),
    ],
)
def test_tokenizers_that_are_not_gemmas(
    gemma: Checkpoint, tmp_path: Path, change: Change, text: str
) -> None:
    spoiled = _copy(gemma, tmp_path)
    _edit(tmp_path, change)
    with pytest.raises(TokenizerError, match=text):
        tokenizer_metadata(describe(gemma), spoiled)


def test_another_pre_tokenizer_than_qwens(qwen: Checkpoint, tmp_path: Path) -> None:
    """llama.cpp would split text otherwise than the model was trained on."""
    spoiled = _copy(qwen, tmp_path)
    _edit(
        tmp_path, lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+")
    )
    with pytest.raises(TokenizerError, match=r"is not llama\.cpp's 'qwen2'"):
        tokenizer_metadata(describe(qwen), spoiled)


def test_more_tokens_than_rows(gemma: Checkpoint) -> None:
    spec = replace(describe(gemma), vocab_size=639)
    with pytest.raises(TokenizerError, match="up to id 639, but the model has 639 embedding rows"):
        tokenizer_metadata(spec, gemma)


def test_fewer_tokens_than_rows_are_padded(gemma: Checkpoint) -> None:
    keys = _keys(replace(describe(gemma), vocab_size=650), gemma)
    assert keys["tokenizer.ggml.tokens"][639:] == [
        keys["tokenizer.ggml.tokens"][639],
        *(f"[PAD{index}]" for index in range(640, 650)),
    ]
    assert keys["tokenizer.ggml.token_type"][640:] == [int(TokenType.UNUSED)] * 10
    assert keys["tokenizer.ggml.scores"] == [-1000.0] * 650


def test_visible_tokens_are_user_defined(gemma: Checkpoint) -> None:
    """A chat parser has to see them; as control tokens they would not be rendered."""
    keys = _keys(describe(gemma), gemma)
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert types["<|channel>"] == types['<|"|>'] == TokenType.USER_DEFINED
    assert types["<bos>"] == TokenType.CONTROL
    assert types["<0x0A>"] == TokenType.BYTE


def test_spaces_in_merges(qwen: Checkpoint, tmp_path: Path) -> None:
    changed = _copy(qwen, tmp_path)

    def merge_space(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"] |= {"x ": 507, "x y": 508}
        tokenizer["model"]["merges"] = [["x ", "y"], ["a", "b"]]
        tokenizer["model"]["vocab"]["ab"] = 509

    _edit(tmp_path, merge_space)
    assert _keys(describe(qwen), changed)["tokenizer.ggml.merges"] == ["xĠ y", "a b"]


def test_special_token_without_a_row(qwen: Checkpoint, tmp_path: Path) -> None:
    spoiled = replace(_copy(qwen, tmp_path), config={**qwen.config, "mask_token_id": 999})
    with pytest.raises(TokenizerError, match="mask_token has id 999"):
        tokenizer_metadata(describe(qwen), spoiled)


def test_no_chat_template(gemma: Checkpoint, tmp_path: Path) -> None:
    plain = _copy(gemma, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    keys = _keys(describe(gemma), plain)
    assert not [key for key in keys if "chat_template" in key]
    (tmp_path / "chat_template.json").write_text('{"chat_template": "{{ x }}"}')
    assert _keys(describe(gemma), plain)["tokenizer.chat_template"] == "{{ x }}"
