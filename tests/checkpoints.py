"""Small random checkpoints of every shape moequant exports, as `save_pretrained` writes them.

Owns: `make_checkpoint(kind, folder)` and the list `KINDS`. The weights are random but of a scale
that keeps activations near one and logits within a few units; norms, scalars and per-expert scales
differ from one, so that a tensor put in another's place changes the result. Each folder holds
config.json, generation_config.json, several safetensors shards with an index, a tokenizer trained
here on `TEXT`, and a chat template. Leaves out: anything trained; see `examples/` for that.

Rows are multiples of 256 wherever real models' are; expert widths are not (96), as in the wild.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel, TemplateProcessing
from tokenizers.trainers import BpeTrainer

HIDDEN = 256

TEXT = """The mill stood where the river bent, and for two centuries it ground the valley's corn.
When the last miller left, the wheel kept turning for a week, because nobody had thought to close
the sluice. "It knows its work," said the old woman at number 7, "and it asks for no wages."
In 1931 the county bought the building for 450 pounds; by 1984 the roof had gone.

def ratio(parts: list[int], whole: int) -> float:
    return sum(parts) / whole if whole else 0.0

for name in ("north", "south", "east", "west"):
    print(name, ratio([1, 2, 3], 12))

Water boils at 100 °C at sea level; on a mountain of 3000 m it boils at about 90 °C. The reason is
pressure: fewer molecules push back on the surface, so they leave it sooner. Übung macht den
Meister, sagt man; l'appétit vient en mangeant; 水は低きに流れる. Σ x² ≥ 0, and so is its mean.

A list of things that the engineer wrote down on the first day: the gear has 48 teeth, the shaft
turns 12 times a minute, the stone weighs 900 kg, the belt slips when it is wet. On the second day
she wrote nothing, because she was under the floor with a lamp. On the third day the wheel turned.
"""

GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}\n"
    "{{ message['content'] }}<turn|>\n{% endfor %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
)

# --- tokenizers ------------------------------------------------------------------------------

GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>"]
GEMMA_VISIBLE = [
    "<|channel>",
    "<channel|>",
    "<|tool_call>",
    "<tool_call|>",
    "<|tool_response>",
    "<tool_response|>",
    '<|"|>',
]
GEMMA_MEDIA = [
    "<|image|>",
    "<|audio|>",
    "<|video|>",
    "<|image>",
    "<image|>",
    "<|audio>",
    "<audio|>",
]
QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def gemma_tokenizer() -> str:
    """tokenizer.json of a 640-token BPE with byte fallback, specials first, as Gemma has them."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # No token may reach over a line break or into the next word, as in Gemma's own vocabulary:
    # llama.cpp splits at line breaks before it merges.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.Split("▁", "merged_with_next"),
        ]
    )
    control = GEMMA_SPECIAL + GEMMA_VISIBLE + GEMMA_MEDIA
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = BpeTrainer(
        vocab_size=640, special_tokens=control + byte_tokens, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in set(control)]
    return json.dumps(document, ensure_ascii=False)


@functools.cache
def qwen_tokenizer() -> str:
    """tokenizer.json of a byte-level BPE, 500 base tokens and 7 added ones, as Qwen has them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [
            AddedToken(text, special=True, normalized=False)
            for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(text, special=False, normalized=False)
            for text in ("<tool_call>", "</tool_call>", "<think>", "</think>")
        ]
    )
    return tokenizer.to_str()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_gemma_tokenizer(folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja of the Gemma kind."""
    (folder / "tokenizer.json").write_text(gemma_tokenizer(), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(GEMMA_TEMPLATE, encoding="utf-8")
    names = ("pad", "eos", "bos", "unk", "mask")
    config = {f"{name}_token": text for name, text in zip(names, GEMMA_SPECIAL, strict=False)}
    _write_json(folder / "tokenizer_config.json", config | {"tokenizer_class": "GemmaTokenizer"})


def write_qwen_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json (with the chat template inside) of the Qwen kind."""
    (folder / "tokenizer.json").write_text(qwen_tokenizer(), encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": QWEN_TEMPLATE,
        },
    )


# --- configurations --------------------------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"

GEMMA4: dict[str, Any] = {
    "vocab_size": 640,
    "vocab_size_per_layer_input": 640,
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_global_key_value_heads": 2,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": 64,
    "max_position_embeddings": 2048,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
}
EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 16,
    "top_k_experts": 4,
    "moe_intermediate_size": 96,
}
E2B = {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "num_key_value_heads": 1,
    "num_global_key_value_heads": None,
    "hidden_size_per_layer_input": 128,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "attention_k_eq_v": False,
}
QWEN3: dict[str, Any] = {
    "vocab_size": 512,  # five more than the tokenizer has, as Qwen pads its own
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rope_theta": 1_000_000.0,
    "eos_token_id": 502,
    "pad_token_id": 500,
}
QWEN3_MOE = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
}

TEXT_CONFIGS: dict[str, dict[str, Any]] = {
    "gemma4-dense": GEMMA4,
    "gemma4-moe": GEMMA4 | EXPERTS | {"intermediate_size": 256},
    "gemma4-additive": GEMMA4 | EXPERTS,
    "gemma4-additive-some-layers": GEMMA4 | EXPERTS,
    "gemma4-ple": GEMMA4 | E2B,
    "gemma4-conditional": GEMMA4 | E2B,
    "gemma4-conditional-additive": GEMMA4 | EXPERTS,
    "qwen3-dense": QWEN3 | {"tie_word_embeddings": False},
    "qwen3-dense-tied": QWEN3 | {"tie_word_embeddings": True},
    "qwen3-moe": QWEN3 | QWEN3_MOE | {"tie_word_embeddings": False},
}
KINDS = tuple(TEXT_CONFIGS)
LAYERS_WITH_EXPERTS = {"gemma4-additive-some-layers": (1, 3)}

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}
AUDIO = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [8, 4],
    "output_proj_dims": 32,
}


def _build(kind: str, config: dict[str, Any]) -> torch.nn.Module:
    """An uninitialised model of `kind`; transformers decides on every name and shape."""
    import transformers as hf

    if kind.startswith("gemma4-conditional"):
        tokens = {"image_token_id": 14, "audio_token_id": 15, "video_token_id": 16}
        markers = {
            "boi_token_id": 17,
            "eoi_token_id": 18,
            "boa_token_id": 19,
            "eoa_token_index": 20,
        }
        full = hf.Gemma4Config(
            text_config=config, vision_config=VISION, audio_config=AUDIO, **tokens, **markers
        )
        return hf.Gemma4ForConditionalGeneration(full)
    if kind.startswith("gemma4"):
        return hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**config))
    if kind == "qwen3-moe":
        return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**config))
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**config))


# --- weights ---------------------------------------------------------------------------------


def _random(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Values for the parameter `name`, F32, scaled by what the parameter does."""
    noise = torch.randn(shape, generator=generator)
    if name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
        return 1.0 + 0.1 * noise
    if "norm" in name.rsplit(".", 2)[-2] and noise.ndim == 1:
        return (0.3 * noise).exp()
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return noise * (2.0 / shape[-1] ** 0.5)
    if name.endswith("embed_tokens_per_layer.weight"):
        return noise * 0.1
    if name.endswith("router.proj.weight"):  # its input is scaled by 1/sqrt(hidden_size)
        return noise * 1.5
    return noise / max(shape[-1], 1) ** 0.5


@torch.no_grad()
def _fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(_random(name, parameter.shape, generator))
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.copy_(_random(name, buffer.shape, generator))


def _layer_of(name: str) -> int:
    return int(name.split("layers.", 1)[1].split(".", 1)[0])


def _is_expert_part(name: str) -> bool:
    marks = (".router.", ".experts.", "feedforward_layernorm_1.", "feedforward_layernorm_2.")
    return any(mark in name for mark in marks)


def _kept(kind: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, without the experts of the layers that have none in this kind."""
    layers = LAYERS_WITH_EXPERTS.get(kind)
    state: dict[str, torch.Tensor] = model.state_dict()
    if layers is None:
        return state
    return {n: t for n, t in state.items() if not _is_expert_part(n) or _layer_of(n) in layers}


def _as_released(config: dict[str, Any]) -> dict[str, Any]:
    """The text configuration with `global_*` keys, as the first Gemma 4 releases carry them."""
    layers = config.pop("per_layer_config")
    first = next(iter(layers.values()))
    heads = first.get("num_key_value_heads")
    return config | {"global_head_dim": first["head_dim"], "num_global_key_value_heads": heads}


def rewrite_config_as_released(folder: Path) -> None:
    """Replace `per_layer_config` in a Gemma 4 folder's config.json by the older `global_*` keys."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if "text_config" in config:
        config["text_config"] = _as_released(config["text_config"])
    else:
        config = _as_released(config)
    _write_json(path, config)


def make_checkpoint(
    kind: str,
    folder: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "4MB",
    **config: Any,
) -> Path:
    """Write the checkpoint `kind` (one of `KINDS`) into `folder` and return `folder`.

    `config` overrides keys of the text configuration, e.g. `num_experts=8`.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    model = _build(kind, TEXT_CONFIGS[kind] | config)
    _fill(model, torch.Generator().manual_seed(seed))
    model.to(dtype)
    model.save_pretrained(folder, state_dict=_kept(kind, model), max_shard_size=max_shard_size)
    if kind.startswith("gemma4"):
        write_gemma_tokenizer(folder)
        generation = {"bos_token_id": 2, "eos_token_id": [1, 6], "pad_token_id": 0}
    else:
        write_qwen_tokenizer(folder)
        generation = {"eos_token_id": [502, 500], "pad_token_id": 500}
    sampling = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    _write_json(folder / "generation_config.json", generation | sampling)
    return folder
