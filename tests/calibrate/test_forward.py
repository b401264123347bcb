"""The streamed forward against transformers' ordinary one, for every kind of checkpoint."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moequant.architectures import describe
from moequant.calibrate.forward import StreamedModel
from moequant.calibrate.weights import WeightNames
from moequant.checkpoint import open_checkpoint
from moequant.errors import ArchitectureError, CalibrationError
from tests.calibrate.models import described, folder, reference, windows
from tests.checkpoints import KINDS


def streamed_logits(model: StreamedModel, ids: torch.Tensor, batch_tokens: int) -> torch.Tensor:
    batches = model.embed(ids, batch_tokens)
    model.run_layers(batches)
    hidden = torch.cat([batch.hidden for batch in batches]).flatten(0, 1)
    found = torch.full((len(hidden), model.spec.vocab_size), torch.nan)
    for first, start, logits in model.logits(model.final_norm(hidden)):
        found[first : first + len(logits), start : start + logits.shape[1]] = logits
    return found.reshape(*ids.shape, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_the_ordinary_forward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches, and slices of positions and vocabulary that do not divide evenly."""
    monkeypatch.setattr("moequant.calibrate.forward._VOCABULARY_SLICE", 200)
    monkeypatch.setattr("moequant.calibrate.forward._POSITIONS", 100)
    monkeypatch.setattr("moequant.calibrate.forward._EMBEDDING_SLICE", 100)
    ids = windows()
    with torch.no_grad():
        expected = reference(kind)(input_ids=ids).logits
    found = streamed_logits(StreamedModel(*described(kind)), ids, batch_tokens=200)
    assert expected.std() > 1  # logits that differ from each other, so that agreement means much
    assert (found - expected).abs().max() <= 1e-4


def test_an_output_matrix_beside_the_text_model_is_used(tmp_path: Path) -> None:
    """As some models for several media have it: language_model.model.*, language_model.lm_head."""
    names = {"lm_head.weight": "language_model.lm_head.weight"}
    for file in folder("qwen3-dense").iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            renamed = {names.get(n, f"language_model.{n}"): t for n, t in tensors.items()}
            save_file(renamed, tmp_path / file.name, metadata={"format": "pt"})
        elif file.name.endswith(".index.json"):
            index = json.loads(file.read_text())
            index["weight_map"] = {
                names.get(n, f"language_model.{n}"): f for n, f in index["weight_map"].items()
            }
            (tmp_path / file.name).write_text(json.dumps(index))
        else:
            shutil.copy(file, tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    spec = describe(checkpoint)
    assert spec.prefix == "language_model.model." and not spec.tied_embeddings
    ids = windows(1, 16)
    expected = streamed_logits(StreamedModel(*described("qwen3-dense")), ids, 100)
    assert torch.equal(streamed_logits(StreamedModel(checkpoint, spec), ids, 100), expected)


def test_bfloat16_is_computed_in_bfloat16() -> None:
    """On a dense model: in a random MoE one flipped route changes a token altogether."""
    exact = StreamedModel(*described("gemma4-dense"))
    rough = StreamedModel(*described("gemma4-dense"), dtype=torch.bfloat16)
    found = []
    for model in (exact, rough):
        batches = model.embed(windows())
        assert {batch.hidden.dtype for batch in batches} == {model.dtype}
        model.run_layers(batches)
        found.append(batches[0].hidden.float())
    error = (found[0] - found[1]).square().mean() / found[0].square().mean()
    assert 1e-6 < error < 1e-2


def test_a_layer_is_gone_after_its_turn() -> None:
    model = StreamedModel(*described("gemma4-additive"))
    with model.layer(0) as layer:
        kept = weakref.ref(layer.experts.gate_up_proj)
        assert kept() is not None
    gc.collect()
    assert kept() is None  # although `layer` still names the module
    assert all(parameter.is_meta for parameter in layer.parameters())


def test_only_the_rows_of_tokens_that_occur_are_read() -> None:
    checkpoint, spec = described("gemma4-ple")

    class Source:
        tensors = checkpoint.tensors
        read = checkpoint.read

        def __init__(self) -> None:
            self.rows = 0

        def read_slice(self, name: str, start: int, stop: int) -> torch.Tensor:
            self.rows += stop - start
            return checkpoint.read_slice(name, start, stop)

    source = Source()
    StreamedModel(source, spec).embed(torch.tensor([[100, 103, 101]]))
    assert source.rows == 2 * 4  # of embed_tokens and embed_tokens_per_layer


def test_a_source_without_slices_serves_too() -> None:
    checkpoint, spec = described("qwen3-dense")

    class Source:
        tensors = dict.fromkeys(checkpoint.tensors)
        read = checkpoint.read

    ids = windows(1, 8)
    expected = streamed_logits(StreamedModel(checkpoint, spec), ids, 100)
    assert torch.equal(streamed_logits(StreamedModel(Source(), spec), ids, 100), expected)


def test_missing_tensors_are_all_named() -> None:
    checkpoint, spec = described("qwen3-moe")

    kept = {n: t for n, t in checkpoint.tensors.items() if "layers.1.self_attn." not in n}

    class Source:
        tensors = kept
        read = checkpoint.read

    model = StreamedModel(Source(), spec)
    with (
        pytest.raises(CalibrationError, match=r"(?s)q_proj\.weight.*k_norm\.weight"),
        model.layer(1),
    ):
        pass


def test_batches_share_what_is_equal() -> None:
    model = StreamedModel(*described("gemma4-additive"))
    first, second = model.embed(windows(4), batch_tokens=2 * 96)
    for one, other in zip(first.calls, second.calls, strict=True):
        assert one is not None and other is not None
        assert one[1]["position_embeddings"][0] is other[1]["position_embeddings"][0]
        assert one[1]["attention_mask"] is other[1]["attention_mask"]
    assert first.calls[0][1]["shared_kv_states"] is not second.calls[0][1]["shared_kv_states"]


def test_an_unknown_model_type_is_refused() -> None:
    checkpoint, spec = described("qwen3-dense")
    altered = type(spec)(**{**vars(spec), "config": {"model_type": "no-such-model"}})
    with pytest.raises(ArchitectureError, match="no-such-model"):
        StreamedModel(checkpoint, altered)


def test_names_lead_to_parameters() -> None:
    names = StreamedModel(*described("qwen3-moe")).names
    assert isinstance(names, WeightNames)
    fused = "model.layers.0.mlp.experts.gate_up_proj"
    for expert in (0, 15):
        assert names.parameter(f"model.layers.0.mlp.experts.{expert}.up_proj.weight") == fused
    assert names.checkpoint_name(fused) is None
    assert names.checkpoint_name("lm_head.weight") == "lm_head.weight"
