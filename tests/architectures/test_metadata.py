"""`general.*`, and values that a key cannot hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType

from moequant.architectures import describe
from moequant.checkpoint import Checkpoint
from moequant.errors import CheckpointError
from moequant.gguf_export import metadata as module
from moequant.gguf_export.metadata import gguf_metadata


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer has tests of its own."""
    monkeypatch.setattr(module, "tokenizer_metadata", lambda spec, checkpoint: [])


def _keys(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        entry.key: entry.value
        for entry in gguf_metadata(describe(checkpoint), checkpoint, file_type=15)
    }


def test_general(gemma: Checkpoint, tmp_path: Path) -> None:
    card = """---
license: gemma
base_model: google/gemma-4-31B-it
tags: [moe, additive]
language: [en, de]
---
# A model
"""
    (tmp_path / "README.md").write_text(card)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"temperature": 1, "top_k": 64, "repetition_penalty": 1.1, "eos_token_id": [1]})
    )
    keys = _keys(replace(gemma, path=tmp_path, name="someone/gemma-4-52B-A36B-it"))
    assert keys["general.architecture"] == "gemma4"
    assert keys["general.type"] == "model"
    assert keys["general.file_type"] == 15
    assert keys["general.quantization_version"] == 2
    assert keys["general.name"] == "Gemma 4 52B A36B It"
    assert keys["general.license"] == "gemma"
    assert keys["general.base_model.0.name"] == "Gemma 4 31B It"
    assert keys["general.tags"] == ["moe", "additive"]
    assert keys["general.languages"] == ["en", "de"]
    assert keys["general.sampling.temp"] == 1
    assert keys["general.sampling.top_k"] == 64
    assert keys["general.sampling.penalty_repeat"] == 1.1


@pytest.mark.parametrize(
    "card",
    [
        "---\nlicense: {a: [1]}\ntags: {b: c}\n---\n",
        "---\n: : [\n---\n",
        "---\n5\n---\n",
        "",
        "\udcff",
    ],
)
def test_odd_model_cards_stop_nothing(gemma: Checkpoint, tmp_path: Path, card: str) -> None:
    (tmp_path / "README.md").write_bytes(card.encode(errors="surrogateescape"))
    (tmp_path / "generation_config.json").write_text('{"top_k": "many", "temperature": 0.5')
    keys = _keys(replace(gemma, path=tmp_path, name="plain"))
    assert keys["general.name"] == "Plain"
    assert "general.license" not in keys
    assert not [key for key in keys if key.startswith("general.sampling")]


def test_sampling_of_the_wrong_type_is_not_written(gemma: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"top_k": "many", "temperature": 0.5}')
    keys = _keys(replace(gemma, path=tmp_path))
    assert keys["general.sampling.temp"] == 0.5
    assert "general.sampling.top_k" not in keys


def test_value_types(gemma: Checkpoint) -> None:
    entries = {e.key: e for e in gguf_metadata(describe(gemma), gemma, file_type=0)}
    pattern = entries["gemma4.attention.sliding_window_pattern"]
    assert (pattern.type, pattern.sub_type) == (GGUFValueType.ARRAY, GGUFValueType.BOOL)
    heads = entries["gemma4.attention.head_count_kv"]
    assert (heads.type, heads.sub_type) == (GGUFValueType.ARRAY, GGUFValueType.INT32)
    assert entries["gemma4.rope.freq_base"].type == GGUFValueType.FLOAT32
    assert entries["gemma4.embedding_length_per_layer_input"].value == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": -1},
        {"sliding_window": 1 << 40},
        {"final_logit_softcapping": "30"},
        {"rms_norm_eps": True},
    ],
)
def test_values_that_no_key_holds(gemma: Checkpoint, changes: dict[str, Any]) -> None:
    spec = describe(gemma)
    spoiled = replace(spec, config={**spec.config, **changes})
    with pytest.raises(CheckpointError, match=next(iter(changes)).split("_")[0]):
        gguf_metadata(spoiled, gemma, file_type=0)
