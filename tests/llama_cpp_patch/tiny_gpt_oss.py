"""A random gpt-oss file, whose experts have biases, and a LoRA adapter for its experts.

Owns: names and shapes as llama.cpp's `openai-moe` wants them. The tokenizer is another file's.
Leaves out: anything trained; a checkpoint, as moequant does not export this family.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

ARCHITECTURE = "gpt-oss"
HIDDEN, WIDTH, EXPERTS, USED, LAYERS, HEADS, KV_HEADS, HEAD = 128, 96, 12, 3, 2, 4, 2, 32
RANK = 4
KINDS = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}


def write_gpt_oss(target: Path, tokenizer_of: Path) -> None:
    """Experts of Q8_0, the rest F32; the vocabulary of `tokenizer_of`."""
    fields = gguf.GGUFReader(tokenizer_of).fields
    writer = gguf.GGUFWriter(target, ARCHITECTURE)
    for name, field in fields.items():
        if name.startswith("tokenizer."):
            kind = field.types[0]
            item = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, item)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_rope_freq_base(150000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_sliding_window(128)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(USED)
    vocabulary = len(fields["tokenizer.ggml.tokens"].contents())
    for name, values in _tensors(vocabulary):
        if name.endswith("_exps.weight"):
            qtype = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, qtype), raw_dtype=qtype)
        else:
            writer.add_tensor(name, values)
    _write(writer)


def write_lora(target: Path) -> None:
    """An adapter of rank `RANK` for every expert tensor, large enough to move the logits."""
    random = np.random.default_rng(8)
    writer = gguf.GGUFWriter(target, ARCHITECTURE)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 2.0 * RANK)
    for layer in range(LAYERS):
        for kind, (rows, columns) in KINDS.items():
            for part, shape in {"a": (EXPERTS, RANK, columns), "b": (EXPERTS, rows, RANK)}.items():
                values = random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
                writer.add_tensor(f"blk.{layer}.ffn_{kind}_exps.weight.lora_{part}", values)
    _write(writer)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(vocabulary: int) -> Iterator[tuple[str, np.ndarray]]:
    random = np.random.default_rng(7)

    def matrix(*shape: int) -> np.ndarray:
        return random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    def vector(*shape: int, mean: float = 0.0) -> np.ndarray:
        return (mean + 0.3 * random.normal(size=shape)).astype(np.float32)

    yield "token_embd.weight", vector(vocabulary, HIDDEN)
    yield "output.weight", matrix(vocabulary, HIDDEN)
    yield "output_norm.weight", vector(HIDDEN, mean=1.0)
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        for name in ("attn_norm", "post_attention_norm"):
            yield f"{block}{name}.weight", vector(HIDDEN, mean=1.0)
        for name, heads in (("attn_q", HEADS), ("attn_k", KV_HEADS), ("attn_v", KV_HEADS)):
            yield f"{block}{name}.weight", matrix(heads * HEAD, HIDDEN)
            yield f"{block}{name}.bias", vector(heads * HEAD)
        yield f"{block}attn_output.weight", matrix(HIDDEN, HEADS * HEAD)
        yield f"{block}attn_output.bias", vector(HIDDEN)
        yield f"{block}attn_sinks.weight", vector(HEADS)
        yield f"{block}ffn_gate_inp.weight", matrix(EXPERTS, HIDDEN)
        yield f"{block}ffn_gate_inp.bias", vector(EXPERTS)
        for kind, (rows, columns) in KINDS.items():
            yield f"{block}ffn_{kind}_exps.weight", matrix(EXPERTS, rows, columns)
            yield f"{block}ffn_{kind}_exps.bias", vector(EXPERTS, rows)
