"""The tokens on which models are measured.

Owns: the default text, `--chat`, and how many windows are taken. Leaves out: reading text, and
tokenizing and cutting it (`calibrate.text`, `calibrate.windows`).

Windows are llama-perplexity's: the text as one stream, cut from its beginning. Of more text than
is wanted, windows are taken evenly from all of it. The default text, six kinds of writing in
`corpus/`, shares nothing with the text that calibration uses by default.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from moequant.architectures import ModelSpec
from moequant.calibrate.text import Document, packaged_documents, read_corpus
from moequant.calibrate.windows import (
    check_ids,
    cut_windows,
    evenly_spaced,
    leading_token,
    token_stream,
)
from moequant.errors import CalibrationError, UsageError
from moequant.evaluate.models import MeasuredModel

BUILT_IN = "moequant held-out text"


@dataclass(frozen=True)
class TextOptions:
    """`texts` empty: the built-in text. `length`: tokens of a window. `tokens`: at most so many."""

    texts: tuple[Path, ...] = ()
    chat: bool = False
    length: int = 512
    tokens: int = 32768

    @property
    def name(self) -> str:
        return ", ".join(map(str, self.texts)) or BUILT_IN


def documents_of(options: TextOptions) -> tuple[Document, ...]:
    """What is to be tokenized: plain texts as one document, conversations as they are.

    With `chat`, a plain text becomes a conversation whose turns are its paragraphs, in turn the
    user's and the assistant's.
    """
    if options.texts:
        documents = read_corpus(options.texts).documents
    else:
        documents = tuple(packaged_documents("moequant.evaluate", BUILT_IN))
    if options.chat:
        return tuple(_conversation(document) for document in documents)
    plain = [document.text for document in documents if document.text]
    spoken = tuple(document for document in documents if document.messages)
    joined = (Document(options.name, "\n".join(plain)),) if plain else ()
    return joined + spoken


def text_windows(model: MeasuredModel, options: TextOptions, *, from_start: bool = False) -> Tensor:
    """Windows (n, length) of token ids, by the model's own tokenizer.

    `from_start`: of more text than wanted the beginning, as llama-perplexity takes it.

    Raises:
        CalibrationError: text that is unreadable or shorter than one window, or ids outside the
            vocabulary.
        UsageError: `chat` and a tokenizer without a chat template.
        TokenizerError: no usable tokenizer.
    """
    tokenizer = model.tokenizer()
    if options.chat and not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"--chat: {model.name} has no chat template; leave --chat out.")
    windows = _cut(tokenizer, documents_of(options), model.spec, options)
    wanted = max(1, options.tokens // options.length)
    return windows[:wanted] if from_start else windows[evenly_spaced(len(windows), wanted)]


def _cut(
    tokenizer: object, documents: Sequence[Document], spec: ModelSpec, options: TextOptions
) -> Tensor:
    stream = token_stream(tokenizer, documents, spec)
    if len(stream) < options.length:
        raise CalibrationError(
            f"{options.name} has {len(stream)} tokens and a window {options.length}: give a longer "
            "text, or a smaller --context."
        )
    windows = cut_windows(stream, options.length, leading_token(tokenizer, spec))
    check_ids(windows, spec)
    return windows


def _conversation(document: Document) -> Document:
    """A plain document as messages; a conversation as it is."""
    if document.messages:
        return document
    turns = list(_paragraphs(document.text))
    roles = ("user", "assistant")
    messages = tuple({"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns))
    return Document(document.origin, messages=messages)


def _paragraphs(text: str) -> Iterator[str]:
    """What stands between blank lines."""
    for part in text.replace("\r\n", "\n").split("\n\n"):
        if part.strip():
            yield part.strip()
