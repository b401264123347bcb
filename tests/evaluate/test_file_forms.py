"""`moequant evaluate` on files that llama.cpp takes in another form, and on damaged values."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from moequant.checkpoint import open_checkpoint
from moequant.gguf_file import read_model
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp
from tests.evaluate.test_run import LAYERS, measured, refused
from tests.gguf_files import split
from tests.halved_files import halved
from tests.oracles.perplexity_tool import llama_perplexity

FEW = ("--tokens", "512", "--sample-tokens", "512")


@pytest.fixture(scope="module")
def fused(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model as Q4_K_M, without calibration."""
    path = tmp_path_factory.mktemp("files") / "Q4_K_M.gguf"
    export(open_checkpoint(str(tiny_model)), path, ExportOptions("Q4_K_M", calibration=None))
    return path


@pytest.fixture(scope="module")
def held_out(tiny_model: Path) -> tuple[object, ...]:
    return "--text", tiny_model / "held-out.txt"


@pytest.mark.llama_cpp
def test_separate_gate_and_up_experts(
    fused: Path, tiny_model: Path, held_out: tuple[object, ...], llama_cpp: LlamaCpp, tmp_path: Path
) -> None:
    """What llama.cpp takes for the fused file is that here, too, as file and as reference."""
    apart = tmp_path / "apart.gguf"
    halved(fused, apart)
    text = Path(str(held_out[1]))
    here, there = (llama_perplexity(llama_cpp, p, text, "--chunks", "2") for p in (apart, fused))
    assert here == there
    arguments = (*held_out, *FEW, "--reference")
    (row,) = measured(apart, *arguments, fused)["models"]
    assert row["kld"]["max"] < 1e-9
    assert len(row["tensors"]) == len(gguf.GGUFReader(fused).tensors)
    assert {t["nmse"] for t in row["tensors"] if t["nmse"] is not None} == {0.0}
    types = {tensor["name"]: tensor["qtype"] for tensor in row["tensors"]}
    assert types["blk.1.ffn_gate_up_exps.weight"] == "Q4_K"

    halved(fused, tmp_path / "worse.gguf", (None, GGMLQuantizationType.Q4_0))
    (row,) = measured(tmp_path / "worse.gguf", *arguments, apart)["models"]
    found = {tensor["name"]: tensor for tensor in row["tensors"]}
    assert found["blk.1.ffn_gate_up_exps.weight"]["qtype"] == "Q4_K+Q4_0"
    changed = {name for name, tensor in found.items() if tensor["nmse"]}
    assert changed == {f"blk.{bid}.ffn_gate_up_exps.weight" for bid in range(LAYERS)}
    assert row["bytes"] == sum(tensor["nbytes"] for tensor in row["tensors"])


NAN = {
    "a scale in a block": ("blk.2.attn_output.weight", "Q4_K", 144 * 5, "<f2", "256 NaN"),
    "a scale in the embeddings": ("token_embd.weight", "Q6_K", 208, "<f2", "256 NaN"),
    "a norm": ("blk.3.attn_norm.weight", "F32", 4 * 7, "<f4", "1 NaN among 256 values"),
    "the last norm": ("output_norm.weight", "F32", 4 * 255, "<f4", "1 NaN among 256 values"),
    "a block of an expert": ("blk.1.ffn_gate_up_exps.weight", "Q4_K", 0, "<f2", "256 NaN"),
}


@pytest.mark.parametrize("place", NAN)
def test_a_nan_in_a_file_is_the_file_s(
    place: str, fused: Path, tiny_model: Path, held_out: tuple[object, ...], tmp_path: Path
) -> None:
    """File and tensor are named as they are, with what can be done about a GGUF file."""
    name, qtype, offset, kind, counts = NAN[place]
    first = split(fused, tmp_path / "shards", 40)
    tensor = read_model(first).tensors[name]
    assert tensor.qtype == qtype
    with tensor.path.open("r+b") as shard:
        shard.seek(tensor.start + offset)
        shard.write(np.array([np.nan], kind).tobytes())
    for arguments in ((first, "--reference", tiny_model), (fused, "--reference", first)):
        said = refused(*arguments, *held_out, *FEW)
        assert f"{tensor.path.name}: {name} ({qtype}) has {counts}" in said
        assert "damaged: make it again, or download it again" in said
        assert "checkpoint" not in said
