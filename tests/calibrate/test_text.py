"""Calibration text: what is read, in which order, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moequant.calibrate import windows
from moequant.calibrate.text import BUILT_IN, Document, read_corpus
from moequant.calibrate.windows import (
    choose_windows,
    cut_windows,
    leading_token,
    load_tokenizer,
    token_stream,
)
from moequant.errors import CalibrationError, TokenizerError
from tests.calibrate.models import described, folder
from tests.checkpoints import TEXT


def texts(*sources: Path) -> list[str]:
    return [document.text for document in read_corpus(sources).documents]


def test_a_folder_stands_for_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "d.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth"}\n')
    (tmp_path / "z.bin").write_bytes(b"\xff")
    assert texts(tmp_path) == ["first", "second", "third", "fourth"]
    assert texts(tmp_path / "c", tmp_path / "a.md") == ["third", "fourth", "first"]


def test_messages_go_through_the_chat_template(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "the mill"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    (document,) = read_corpus([tmp_path / "a.jsonl"]).documents
    assert document.messages == tuple(messages)
    tokenizer = load_tokenizer(folder("gemma4-dense"))
    ids = token_stream(tokenizer, [document])
    assert tokenizer.decode(ids) == "<bos><|turn>user\nthe mill<turn|>\n"  # one BOS, not two


def test_messages_need_a_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder("gemma4-dense"))
    tokenizer.chat_template = None
    conversation = Document("chat.jsonl:7", messages=({"role": "user", "content": "hello"},))
    with pytest.raises(CalibrationError, match=r"chat\.jsonl:7.*chat template"):
        token_stream(tokenizer, [conversation])


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', "{}", '{"text": 1}', '{"messages": []}'])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(CalibrationError, match=r"a\.jsonl:2: "):
        read_corpus([file])


@pytest.mark.parametrize(
    "line",
    [
        r'{"text": "a\ud800b"}',
        r'{"messages": [{"role": "user", "content": "\udfff"}]}',
        r'{"messages": [{"role": "user", "content": "a"}], "tools": [{"\ud800": 1}]}',
    ],
)
def test_half_a_character_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(r'{"text": "\ud83d\ude00"}' + "\n" + line + "\n")
    with pytest.raises(CalibrationError, match=r"a\.jsonl:2: .*lone surrogate"):
        read_corpus([file])


def test_undecodable_bytes_are_placed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc\xe9t")
    with pytest.raises(CalibrationError, match=r"a\.txt: byte 0xe9 at offset 3 is not UTF-8"):
        read_corpus([tmp_path / "a.txt"])


def test_nothing_to_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such file"):
        read_corpus([tmp_path / "missing.txt"])
    with pytest.raises(CalibrationError, match=r"no \.txt"):
        read_corpus([tmp_path])
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CalibrationError, match="no text"):
        read_corpus([tmp_path])


def test_the_digest_is_of_contents_in_order(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "c.txt").write_text("a")
    a, b, c = (tmp_path / f"{name}.txt" for name in "abc")
    assert read_corpus([a]).digest() == read_corpus([c]).digest()
    assert read_corpus([a, b]).digest() != read_corpus([b, a]).digest()


def test_the_built_in_corpus_is_what_it_says() -> None:
    """About 100 KB, no separator left in it, text in several scripts."""
    corpus = read_corpus(())
    text = "".join(document.text for document in corpus.documents)
    assert corpus.datasets == (BUILT_IN,)
    assert 80_000 < len(text.encode()) < 200_000
    assert all(document.text.strip() for document in corpus.documents)
    assert not any(line.strip() == "%%" for line in text.splitlines())
    assert "def " in text and '{"' in text
    for first, last in ("АЯ", "一龥", "ぁん", "ءي"):
        assert any(first <= character <= last for character in text), first


def test_windows_are_cut_as_llama_cpp_does() -> None:
    stream = torch.arange(10, 21)
    assert cut_windows(stream, 4, bos=2).tolist() == [[2, 11, 12, 13], [2, 15, 16, 17]]
    assert cut_windows(stream, 4, bos=None)[:, 0].tolist() == [10, 14]
    with pytest.raises(CalibrationError, match="11 tokens, a window needs 12"):
        cut_windows(stream, 12, bos=2)


def test_windows_are_chosen_by_seed_and_kept_in_order() -> None:
    windows = torch.arange(400).reshape(100, 4)
    chosen = choose_windows(windows, 43, seed=5)
    assert chosen.shape == (10, 4)
    assert torch.equal(chosen, choose_windows(windows, 43, seed=5))
    assert not torch.equal(chosen, choose_windows(windows, 43, seed=6))
    assert chosen[:, 0].diff().min() > 0
    assert torch.equal(choose_windows(windows, 400, seed=5), windows)


def test_bos_is_found_where_the_tokenizer_puts_it() -> None:
    assert leading_token(load_tokenizer(folder("gemma4-dense"))) == 2
    assert leading_token(load_tokenizer(folder("qwen3-dense"))) is None


def without_bos(tokenizer: Any) -> Any:
    """The tokenizer without its post-processor."""
    tokenizer.backend_tokenizer.post_processor = None
    assert leading_token(tokenizer) is None
    return tokenizer


def test_a_family_may_force_bos() -> None:
    """Gemma 4's files say add_bos_token whatever the tokenizer does; the stream begins with it."""
    kind = "gemma4-dense"
    _, spec = described(kind)
    documents = [Document("a", "the mill"), Document("b", "the wheel")]
    expected = token_stream(load_tokenizer(folder(kind)), documents)
    tokenizer = without_bos(load_tokenizer(folder(kind)))
    assert leading_token(tokenizer, spec) == 2
    assert torch.equal(token_stream(tokenizer, documents, spec), expected)
    assert len(token_stream(tokenizer, documents)) == len(expected) - 2
    assert torch.equal(token_stream(load_tokenizer(folder(kind)), documents, spec), expected)
    _, qwen = described("qwen3-dense")
    assert leading_token(load_tokenizer(folder("qwen3-dense")), qwen) is None


@pytest.mark.parametrize("kind", ["gemma4-dense", "qwen3-dense"])
def test_long_texts_are_tokenized_in_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No token of these reaches over a line break and on, so that the ids are the same."""
    text = "".join(f"{n}. {line}\n" for n in range(5) for line in TEXT.splitlines() if line)
    documents = [Document("a", text), Document("b", "short"), Document("c", "")]
    expected = token_stream(load_tokenizer(folder(kind)), documents)
    tokenizer = load_tokenizer(folder(kind))
    asked: list[str] = []
    monkeypatch.setattr("moequant.calibrate.windows._BLOCK", 300)
    monkeypatch.setattr(windows, "_ids", noting(windows._ids, asked))
    _, spec = described(kind)
    assert torch.equal(token_stream(tokenizer, documents, spec), expected)
    assert "".join(asked) == text + "short"
    assert len(asked) > 10 and max(map(len, asked)) < 450
    if kind == "gemma4-dense":
        assert torch.equal(token_stream(without_bos(tokenizer), documents, spec), expected)


def noting(call: Callable[..., torch.Tensor], asked: list[str]) -> Callable[..., torch.Tensor]:
    def noted(tokenizer: Any, text: str, **options: Any) -> torch.Tensor:
        asked.append(text)
        return call(tokenizer, text, **options)

    return noted


def test_code_of_a_checkpoint_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda _, **options: given.update(options)
    )
    load_tokenizer(folder("qwen3-dense"))
    assert given == {"local_files_only": True, "trust_remote_code": False}


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
