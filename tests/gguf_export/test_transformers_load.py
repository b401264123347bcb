"""Exported files through transformers' own GGUF loader: its config, its names, its decoders.

That loader reads no expert width and, for dense Qwen3, no head width: it takes the defaults of the
configuration class (768 and 128), which Qwen3-30B-A3B and all released dense Qwen3 have. So these
checkpoints have them too; for others the checkpoint's configuration has to be passed, as below.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moequant import pipeline
from moequant.architectures import describe
from moequant.calibrate.forward import StreamedModel
from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.evaluate.gguf_weights import GGUFWeights
from moequant.gguf_file import read_gguf
from tests.calibrate.models import windows
from tests.checkpoints import TEXT, make_checkpoint

SMALL = {"num_hidden_layers": 2, "head_dim": 128}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-moe": SMALL | {"num_experts": 8, "moe_intermediate_size": 768},
    "qwen3-dense": SMALL,
    "qwen3-dense-tied": SMALL,
}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def exported(kind: str, folder: Path, preset: str, **config: Any) -> Checkpoint:
    """The checkpoint in `folder / "checkpoint"`, exported to `folder / "model.gguf"`."""
    made = make_checkpoint(kind, folder / "checkpoint", dtype=torch.float32, **config)
    checkpoint = open_checkpoint(made)
    options = pipeline.ExportOptions(preset=preset, calibration=None)
    pipeline.export(checkpoint, folder / "model.gguf", options)
    return checkpoint


def load(folder: Path, **arguments: Any) -> Any:
    """The GGUF file as transformers loads it, in float32, with eager experts."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.float32, **arguments
    ).eval()
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=windows(2, 40)).logits


def whole(checkpoint: Checkpoint) -> Any:
    """The checkpoint as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("kind", SHAPES)
def test_a_lossless_file_gives_the_checkpoint_s_logits(kind: str, tmp_path: Path) -> None:
    checkpoint = exported(kind, tmp_path, "F32", **SHAPES[kind])
    model = load(tmp_path)
    assert model.config.model_type == checkpoint.config["model_type"]
    torch.testing.assert_close(logits(model), logits(whole(checkpoint)), rtol=1e-5, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    original = transformers.AutoTokenizer.from_pretrained(checkpoint.path)
    assert tokenizer(TEXT).input_ids == original(TEXT).input_ids


def test_other_widths_load_with_the_checkpoint_s_configuration(tmp_path: Path) -> None:
    checkpoint = exported("qwen3-moe", tmp_path, "F32", num_hidden_layers=2)
    config = transformers.AutoConfig.from_pretrained(checkpoint.path)
    assert config.moe_intermediate_size != 768
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(tmp_path)
    found = logits(load(tmp_path, config=config))
    torch.testing.assert_close(found, logits(whole(checkpoint)), rtol=1e-5, atol=1e-5)


def test_a_quantized_file_gives_what_our_forward_gives(tmp_path: Path) -> None:
    """Two forwards over the same bytes: transformers' loader, and ours reading layer by layer."""
    checkpoint = exported("qwen3-moe", tmp_path, "Q4_K_M", **SHAPES["qwen3-moe"])
    spec = describe(checkpoint)
    weights = GGUFWeights(read_gguf(tmp_path / "model.gguf"), spec)
    model = StreamedModel(weights, spec, dtype=torch.float32)
    ids = windows(2, 40)
    batches = model.embed(ids)
    model.run_layers(batches)
    normed = model.final_norm(torch.cat([batch.hidden for batch in batches]))
    parts = [part for _, _, part in model.logits(normed.flatten(0, -2))]
    ours = torch.cat(parts, dim=-1).reshape(*ids.shape, -1)
    found = logits(load(tmp_path))
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    assert (found - logits(whole(checkpoint))).abs().max() > 1e-2
