"""From documents to windows of tokens.

Owns: loading the checkpoint's tokenizer, the token stream, cutting and choosing windows. Leaves
out: finding the text (`text`), running it (`forward`).

The cut is llama-imatrix's and llama-perplexity's: the text as one stream of tokens, cut into
windows of n, the rest dropped, and the first token of each window replaced by BOS where the
tokenizer adds one. Several documents are tokenized apart, each as the tokenizer would begin it,
and joined. Unlike llama-imatrix without `--parse-special`, special tokens written out in a text
are parsed as such, since calibration text may be rendered chats.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.calibrate.text import Document
from moequant.errors import CalibrationError, TokenizerError


def load_tokenizer(folder: Path) -> Any:
    """The transformers tokenizer in `folder`, from local files; raises TokenizerError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise TokenizerError(f"{folder}: no usable tokenizer: {error}") from error


def token_stream(tokenizer: Any, documents: Sequence[Document]) -> Tensor:
    """All documents as one stream of token ids, int64 (tokens,)."""
    ids: list[int] = []
    for document in documents:
        ids += _encode(tokenizer, document)
    return torch.tensor(ids, dtype=torch.int64)


def _encode(tokenizer: Any, document: Document) -> list[int]:
    if not document.messages:
        return list(tokenizer(document.text, verbose=False)["input_ids"])
    try:
        text = tokenizer.apply_chat_template(
            list(document.messages), tools=list(document.tools) or None, tokenize=False
        )
    except Exception as error:
        raise CalibrationError(
            f"{document.origin}: the chat template does not render these messages: {error}; "
            'a checkpoint without a chat template takes "text" only'
        ) from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def leading_token(tokenizer: Any) -> int | None:
    """The BOS id when the tokenizer puts it before a text, else None."""
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


def choose_windows(windows: Tensor, tokens: int, seed: int) -> Tensor:
    """At most `tokens` tokens in whole windows: a sample by `seed`, kept in reading order."""
    wanted = max(1, tokens // windows.shape[1])
    if wanted >= len(windows):
        return windows
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(windows), generator=generator)[:wanted]
    return windows[chosen.sort().values]
