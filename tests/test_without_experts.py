"""The dense part of an additive MoE is the model whose experts add nothing, and a plain one."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

from moequant.architectures import describe
from moequant.calibrate.forward import StreamedModel
from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.checkpoint.part import CheckpointPart
from moequant.errors import ArchitectureError, CheckpointError, UsageError
from moequant.evaluate.perplexity import perplexity, text_windows
from moequant.gguf_file import read_gguf
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp
from moequant.without_experts import without_experts
from tests.calibrate.models import described, reference, windows
from tests.calibrate.test_forward import streamed_logits
from tests.checkpoints import make_checkpoint
from tests.command_line import SHORT, export_by_stages, run
from tests.oracles.perplexity_tool import llama_perplexity

ADDITIVE = ("gemma4-moe", "gemma4-additive", "gemma4-additive-some-layers",
            "gemma4-conditional-additive")  # fmt: skip
DOWN, NORM = "mlp.down_proj.weight", "post_feedforward_layernorm_1.weight"


def zero_experts(model: Any) -> None:
    """The experts' last matrices become zero, so that their branch adds nothing."""
    touched = 0
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down_proj"):
            torch.nn.init.zeros_(parameter)
            touched += 1
    assert touched


def logits(part: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    return streamed_logits(StreamedModel(part, describe(part), dtype=torch.float32), ids, 200)


@pytest.mark.parametrize("kind", ADDITIVE)
def test_logits_are_those_of_the_model_with_experts_that_add_nothing(kind: str) -> None:
    part, ids = without_experts(described(kind)[0]), windows()
    model = reference(kind)
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        zero_experts(model)
        expected = model(input_ids=ids).logits
    scale = expected.abs().max()
    assert (whole - expected).abs().max() > 0.1 * scale  # the experts matter here
    assert (logits(part, ids) - expected).abs().max() <= 1e-4 * scale
    assert isinstance(part, CheckpointPart)
    unfolded = dataclasses.replace(part, folded={})
    assert (logits(unfolded, ids) - expected).abs().max() > 1e-2 * scale


def test_nothing_is_rounded_and_layers_without_experts_stay_as_they_are(tmp_path: Path) -> None:
    whole = open_checkpoint(make_checkpoint("gemma4-additive-some-layers", tmp_path / "some"))
    part = without_experts(whole)
    for bid in range(4):
        name = f"model.layers.{bid}.{DOWN}"
        down, found = whole.read(name), part.read(name)
        if bid in (0, 2):
            assert found.dtype == torch.bfloat16 and torch.equal(found, down)
            continue
        norm = whole.read(f"model.layers.{bid}.{NORM}")
        assert found.dtype == part.tensors[name].dtype == torch.float32
        assert torch.equal(found.double(), down.double() * norm.double()[:, None])
        assert torch.equal(part.read_slice(name, 3, 7), found[3:7])
    gone = whole.tensors.keys() - part.tensors.keys()
    assert len(gone) == 2 * 8
    with pytest.raises(CheckpointError, match="no tensor named"):
        part.read(min(gone))
    assert part.tensors[name].nbytes == whole.tensors[name].nbytes
    assert part.digest() != whole.digest()


def test_the_original_is_left_alone() -> None:
    whole, _ = described("gemma4-conditional-additive")
    before = json.dumps(whole.config, sort_keys=True)
    part = without_experts(whole)
    assert json.dumps(whole.config, sort_keys=True) == before
    assert part.config["text_config"]["enable_moe_block"] is False
    assert describe(part).expert_count == 0 and describe(whole).expert_count == 16


def held_out_windows(folder: Path) -> torch.Tensor:
    """As the example model's README has it: 511 tokens behind <bos>, all of them scored."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = (folder / "held-out.txt").read_text("utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    rows = ids[: len(ids) // 511 * 511].view(-1, 511)
    return F.pad(rows, (1, 0), value=2)


def test_the_example_models_dense_part_has_the_perplexity_of_its_readme(tiny_model: Path) -> None:
    readme = (tiny_model / "README.md").read_text("utf-8")
    assert "| the experts' branch zeroed | 51.59 " in readme
    part = without_experts(open_checkpoint(tiny_model))
    rows = held_out_windows(tiny_model)
    assert len(rows) == 71
    found = perplexity(part, describe(part), rows, score_all=True, dtype=torch.float32)
    assert found.ppl == pytest.approx(51.59, abs=0.005)


@pytest.fixture(scope="module")
def text(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the held-out text, about a dozen windows."""
    whole = (tiny_model / "held-out.txt").read_text("utf-8")
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(whole[len(whole) // 2 : len(whole) // 2 + 24000], "utf-8")
    return path


@pytest.fixture(scope="module")
def zeroed_ppl(tiny_model: Path, text: Path) -> float:
    """Perplexity by transformers of the whole model whose experts add nothing."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    zero_experts(model.eval())
    rows = text_windows(tiny_model, text)
    assert len(rows) >= 10
    losses = []
    with torch.no_grad():
        for row in rows.split(4):
            scores = model(input_ids=row).logits[:, 256:-1].flatten(0, 1)
            losses.append(F.cross_entropy(scores, row[:, 257:].flatten(), reduction="none"))
    return math.exp(float(torch.cat(losses).double().mean()))


@pytest.mark.llama_cpp
@pytest.mark.parametrize("preset", ["F32", "BF16"])
def test_stock_llama_cpp_runs_the_file_at_the_zeroed_models_perplexity(
    llama_cpp: LlamaCpp,
    tiny_model: Path,
    text: Path,
    zeroed_ppl: float,
    tmp_path: Path,
    preset: str,
) -> None:
    path = tmp_path / "dense.gguf"
    part = without_experts(open_checkpoint(tiny_model))
    export(part, path, ExportOptions(preset=preset, calibration=None))
    assert llama_perplexity(llama_cpp, path, text) == pytest.approx(zeroed_ppl, rel=0.005)


@pytest.fixture(scope="module")
def additive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gemma4-additive", tmp_path_factory.mktemp("dense") / "Tiny-3B-A1B")


def test_the_file_is_a_dense_one_and_says_what_it_is(additive: Path, tmp_path: Path) -> None:
    path = tmp_path / "dense.gguf"
    result = run("export", additive, "-o", path, "--without-experts", *SHORT)
    assert result.exit_code == 0, result.output
    assert "without experts: 32 tensors of 4 layers are left out" in result.stderr
    fields = gguf.GGUFReader(path).fields
    assert not [key for key in fields if key.startswith("gemma4.") and "expert" in key]
    marks = ("exps", "gate_inp", "norm_1", "norm_2")
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    assert names and not [name for name in names if any(mark in name for mark in marks)]
    assert fields["moequant.source.part"].contents() == "without experts"
    assert fields["moequant.checkpoint.part"].contents() == "without experts"
    assert fields["moequant.parameters.expert"].contents() == 0
    assert "without experts" in fields["general.name"].contents()
    assert fields["general.size_label"].contents() not in ("3B-A1B", "3B")


def test_the_stages_one_by_one_give_the_same_weights(additive: Path, tmp_path: Path) -> None:
    whole, parts, imatrix = export_by_stages(additive, tmp_path, "--without-experts")
    one, other = read_gguf(whole), read_gguf(parts)
    assert one.tensors.keys() == other.tensors.keys()
    assert all((one.read(name) == other.read(name)).all() for name in one.tensors)
    note = run("export", additive, "-o", tmp_path / "moe.gguf", "--imatrix", imatrix).output
    assert "another checkpoint (Tiny-3B-A1B, without experts)" in " ".join(note.split())


def test_an_imatrix_of_the_whole_model_is_refused(additive: Path, tmp_path: Path) -> None:
    imatrix, path = tmp_path / "whole.imatrix.gguf", tmp_path / "dense.gguf"
    assert run("calibrate", additive, "-o", imatrix, *SHORT).exit_code == 0
    result = run("export", additive, "-o", path, "--without-experts", "--imatrix", imatrix)
    assert result.exit_code == 2 and "belongs to another model" in result.stderr
    assert "`moequant calibrate --without-experts`" in " ".join(result.stderr.split())
    assert not path.exists()


def test_a_plan_of_the_whole_model_is_refused_with_the_remedy(
    additive: Path, tmp_path: Path
) -> None:
    plan, path = tmp_path / "whole.json", tmp_path / "dense.gguf"
    assert run("plan", additive, "-o", plan).exit_code == 0
    export = ("export", additive, "-o", path, "--plan", plan, "--no-calibration")
    result = run(*export, "--without-experts")
    assert result.exit_code == 2 and not path.exists()
    assert "`moequant plan --without-experts`" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("qwen3-moe", ArchitectureError, "in qwen3moe the experts are a layer's only MLP"),
        ("qwen3-dense", UsageError, "has no experts"),
        ("gemma4-dense", UsageError, "has no experts"),
    ],
)
def test_models_that_have_no_dense_part_of_their_own_are_refused(
    kind: str, error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        without_experts(described(kind)[0])
    folder = make_checkpoint(kind, tmp_path / kind)
    result = run("export", folder, "-o", tmp_path / "out.gguf", "--without-experts")
    assert result.exit_code == 2 and said in result.stderr
    assert not (tmp_path / "out.gguf").exists()


def test_nan_in_a_norm_that_is_folded_is_named(tmp_path: Path) -> None:
    folder = make_checkpoint("gemma4-additive", tmp_path / "nan", max_shard_size="1GB")
    shard = folder / "model.safetensors"
    tensors = load_file(shard)
    name = f"model.layers.2.{NORM}"
    tensors[name][5] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    result = run("export", folder, "-o", tmp_path / "o.gguf", "--without-experts", "--quant", "F32")
    assert result.exit_code == 2
    assert f"{name} has 1 NaN" in result.stderr
    assert not (tmp_path / "o.gguf").exists()
