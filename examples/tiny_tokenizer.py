"""The tiny additive MoE's tokenizer: of Gemma 4's kind, only smaller.

Byte-pair merges over text whose spaces are "▁", over the whole text without splitting it into
words, with byte fallback, and Gemma 4's turn, tool and channel tokens. llama.cpp knows this kind
as `tokenizer.ggml.model = "gemma4"`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import GemmaTokenizer

VOCAB_SIZE = 2048
TURN = ["<|turn>", "<turn|>"]
TOOL = ["<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"]
RESPONSE = ["<|tool_response>", "<tool_response|>"]
THOUGHT = ['<|"|>', "<|think|>", "<|channel>", "<channel|>"]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *TOOL, *RESPONSE, *THOUGHT, *TURN]
LONGEST_RUN = {"\n": 4, "▁": 20, "\t": 4}  # runs of one character that are a single token

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] | trim -}}
    {%- else -%}
        {%- for part in message['content'] if part['type'] == 'text' -%}
            {{- part['text'] | trim -}}
        {%- endfor -%}
    {%- endif -%}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
{%- endif -%}
"""


def run_merges() -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges for runs of newlines, spaces and tabs.

    As in Gemma 4, they come before all other merges and the longest first, so that a run up to the
    longest becomes one token. llama.cpp takes a run of newlines as one token if there is one, and
    splits the text at newlines before merging; no other token may therefore hold a newline.
    """
    tokens = [c * n for c, longest in LONGEST_RUN.items() for n in range(1, longest + 1)]
    merges = [(t[:-1], t[-1]) for t in sorted(tokens, key=len, reverse=True) if len(t) > 1]
    return tokens, merges


def learn_merges(texts: Iterator[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Single characters and merges of a BPE learnt on words, digits and runs of punctuation.

    The split is for learning only: as Gemma's, the final tokenizer merges over the whole text.
    """
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.Replace(" ", "▁")
    pieces = r"▁{2,}|▁?\p{L}+|\p{N}|▁?[^\s▁\p{L}\p{N}]+|\s+"
    learner.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, limit_alphabet=170, max_token_length=16, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    learnt = json.loads(learner.to_str())["model"]
    characters = sorted(t for t in learnt["vocab"] if len(t) == 1 and t not in LONGEST_RUN)
    merges = [(a, b) for a, b in learnt["merges"] if "\n" not in a + b]
    merges = [(a, b) for a, b in merges if not set(a + b) <= set(LONGEST_RUN)]
    return characters, merges


def make_tokenizer(texts: Iterator[str]) -> GemmaTokenizer:
    """A tokenizer of Gemma 4's kind: BPE over ▁ with byte fallback, `VOCAB_SIZE` tokens."""
    runs, merges = run_merges()
    characters, learnt = learn_merges(texts)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    vocab = {token: i for i, token in enumerate(SPECIAL + runs + byte_tokens + characters)}
    for left, right in learnt:
        if left + right not in vocab:
            if len(vocab) == VOCAB_SIZE:
                break
            vocab[left + right] = len(vocab)
        merges.append((left, right))
    tokenizer = GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=True,
        extra_special_tokens=SPECIAL[5:],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
