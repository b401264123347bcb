"""From documents to windows of tokens.

Owns: loading the checkpoint's tokenizer, the token stream, cutting and choosing windows. Leaves
out: finding the text (`text`), running it (`forward`).

The cut is llama-imatrix's and llama-perplexity's: the text as one stream of tokens, cut into
windows of n, the rest dropped, and the first token of each window replaced by BOS where the
tokenizer adds one, or the exported file will say that it does (a family's `add_bos_token`). Several
documents are tokenized apart, each as the tokenizer would begin it, and joined. Unlike
llama-imatrix without `--parse-special`, special tokens written out in a text are parsed as such,
since calibration text may be rendered chats.

A text of more than some MB is tokenized in blocks that end with a line, so that memory is bounded
by the ids; at such a border a token that would reach over the line break is two.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.architectures import ModelSpec, family_named
from moequant.calibrate.text import Document
from moequant.errors import CalibrationError, TokenizerError

_BLOCK = 1 << 20  # characters tokenized at once, and on to the end of the line


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in `folder`, from local files; raises TokenizerError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise TokenizerError(f"{folder}: no usable tokenizer: {error}") from error


def token_stream(
    tokenizer: Any, documents: Sequence[Document], spec: ModelSpec | None = None
) -> Tensor:
    """All documents as one stream of token ids, int64 (tokens,).

    With `spec`, every text begins with BOS where the model's family has it so.
    """
    bos = _forced_bos(tokenizer, spec)
    pieces = [ids for document in documents for ids in _encode(tokenizer, document, bos)]
    return torch.cat(pieces).long() if pieces else torch.empty(0, dtype=torch.int64)


def _encode(tokenizer: Any, document: Document, bos: int | None) -> Iterator[Tensor]:
    """Ids of a document, int32, in pieces."""
    if document.messages:
        yield _ids(tokenizer, _rendered(tokenizer, document), add_special_tokens=False)
        return
    blocks = _blocks(document.text)
    first = next(blocks)
    whole = len(first) == len(document.text)
    ids = _ids(tokenizer, first, add_special_tokens=whole)
    before, after = ([], []) if whole else _around(tokenizer)
    if bos is not None and ids[:1].tolist() != [bos] and before[:1] != [bos]:
        before = [bos, *before]
    yield torch.tensor(before, dtype=torch.int32)
    yield ids
    for block in blocks:
        yield _ids(tokenizer, block, add_special_tokens=False)
    yield torch.tensor(after, dtype=torch.int32)


def _blocks(text: str) -> Iterator[str]:
    """`text` in blocks that end with a line; at least one."""
    start = 0
    while True:
        end = text.find("\n", start + _BLOCK) + 1 or len(text)
        yield text[start:end]
        start = end
        if start >= len(text):
            return


def _ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> Tensor:
    made = tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
    return torch.tensor(made["input_ids"], dtype=torch.int32)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = list(tokenizer("a")["input_ids"])
    starts = range(len(ids) - len(bare) + 1)
    start = next((n for n in starts if ids[n : n + len(bare)] == bare), 0)
    return ids[:start], ids[start + len(bare) :]


def _rendered(tokenizer: Any, document: Document) -> str:
    """A conversation as text; special tokens are the template's."""
    try:
        text: str = tokenizer.apply_chat_template(
            list(document.messages), tools=list(document.tools) or None, tokenize=False
        )
    except Exception as error:
        raise CalibrationError(
            f"{document.origin}: the chat template does not render these messages: {error}. "
            'A model without a chat template takes "text" only'
        ) from error
    return text


def _forced_bos(tokenizer: Any, spec: ModelSpec | None) -> int | None:
    """The BOS id when the family of `spec` begins every text with it, else None."""
    if spec is None:
        return None
    if not family_named(spec.architecture).tokenizer.forced.get("add_bos_token"):
        return None
    bos: int | None = tokenizer.bos_token_id
    return bos


def leading_token(tokenizer: Any, spec: ModelSpec | None = None) -> int | None:
    """The BOS id when the tokenizer, or the family of `spec`, puts it before a text, else None."""
    forced = _forced_bos(tokenizer, spec)
    if forced is not None:
        return forced
    bos: int | None = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return bos if bos is not None and len(ids) > 0 and ids[0] == bos else None


def cut_windows(stream: Tensor, length: int, bos: int | None) -> Tensor:
    """Cut a stream (tokens,) into windows (n, length) of int64, the first token of each BOS.

    Raises CalibrationError when there are fewer tokens than one window needs.
    """
    n = len(stream) // length
    if n == 0:
        raise CalibrationError(
            f"the text has {len(stream)} tokens, a window needs {length}: "
            "give more text or a smaller --sequence-length"
        )
    windows = stream[: n * length].reshape(n, length).clone()
    if bos is not None:
        windows[:, 0] = bos
    return windows


def check_ids(windows: Tensor, spec: ModelSpec) -> None:
    """Raise CalibrationError for token ids that the model has no embedding for."""
    if int(windows.max()) >= spec.vocab_size:
        raise CalibrationError(
            f"the tokenizer gives id {int(windows.max())}, the model has {spec.vocab_size} rows of "
            "embeddings; the checkpoint's tokenizer belongs to another model"
        )


def evenly_spaced(n: int, wanted: int) -> Tensor:
    """`wanted` of the numbers below n, at least one, evenly from first to last; int64."""
    return torch.linspace(0, n - 1, min(n, max(1, wanted))).round().long()


def choose_windows(windows: Tensor, tokens: int, seed: int) -> Tensor:
    """At most `tokens` tokens in whole windows: a sample by `seed`, kept in reading order."""
    wanted = max(1, tokens // windows.shape[1])
    if wanted >= len(windows):
        return windows
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(windows), generator=generator)[:wanted]
    return windows[chosen.sort().values]
