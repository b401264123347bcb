"""Our imatrix against llama-imatrix's on the same tokens, and llama.cpp's tools reading ours.

llama-imatrix runs on the F32 file that moequant exports, with F32 keys and values and without
flash attention, so that only the order of sums differs, and ggml's GELU, which is a table in F16:
in random weights that flips a route in a thousand, so our side takes ggml's GELU for these.
Its text is one line: there the tokenizers of the random checkpoints agree with llama.cpp's.
"""

import functools
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers.activations

from moequant.architectures import describe
from moequant.calibrate import CalibrationOptions, Imatrix, calibrate
from moequant.checkpoint import Checkpoint, open_checkpoint
from moequant.evaluate import perplexity, text_windows
from moequant.pipeline import ExportOptions, export
from moequant.runtime.llama_cpp import LlamaCpp
from tests.calibrate.models import ONE_LINE, folder
from tests.checkpoints import KINDS
from tests.oracles import perplexity_tool
from tests.oracles.perplexity_tool import final_estimate

pytestmark = pytest.mark.llama_cpp

LENGTH = 128
KEPT = tempfile.TemporaryDirectory()
EXACT = (*perplexity_tool.EXACT, "-ngl", "0", "-t", "1")


def run(llama_cpp: LlamaCpp, tool: str, *arguments: object) -> str:
    command = [str(llama_cpp.tool(tool)), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout + done.stderr


@functools.cache
def f32_file(checkpoint_folder: Path) -> Path:
    path = Path(KEPT.name) / f"{checkpoint_folder.name}.gguf"
    options = ExportOptions(preset="F32", calibration=None)
    export(open_checkpoint(checkpoint_folder), path, options)
    return path


@functools.cache
def text(copies: int) -> Path:
    """One line of some 400 to 500 tokens for each copy."""
    path = Path(KEPT.name) / f"{copies}.txt"
    path.write_text(" ".join(f"{n}. {ONE_LINE}" for n in range(copies)))
    return path


def ggml_gelu(_: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`ggml_vec_gelu_f32` of ggml-cpu/vec.h: a table from F16 to F16 between -10 and 10."""
    inside = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
    return torch.where(x <= -10, 0.0, torch.where(x >= 10, x, inside))


@functools.cache
def ours(checkpoint_folder: Path, text: Path, *, like_ggml: bool = True) -> Imatrix:
    """`like_ggml`: with ggml's GELU, so that what is compared is the statistics."""
    checkpoint = open_checkpoint(checkpoint_folder)
    options = CalibrationOptions(
        texts=(text,), sequence_length=LENGTH, compute_dtype="float32", process_output=True
    )
    with pytest.MonkeyPatch.context() as patch:
        if like_ggml:
            patch.setattr(transformers.activations.GELUTanh, "forward", ggml_gelu)
        return calibrate(checkpoint, describe(checkpoint), options)


def theirs(llama_cpp: LlamaCpp, checkpoint_folder: Path, text: Path) -> Imatrix:
    path = Path(KEPT.name) / f"{checkpoint_folder.name}.imatrix.gguf"
    run(
        llama_cpp, "llama-imatrix", "-m", f32_file(checkpoint_folder), "-f", text, "-o", path,
        "-c", LENGTH, "-b", LENGTH, "--no-ppl", "--process-output", *EXACT,
    )  # fmt: skip
    return Imatrix.read(path)


def compare(ours: Imatrix, theirs: Imatrix) -> None:
    """Every tensor and expert: sums within 0.5 %, counts within 1 %.

    Every expert has enough tokens that one of them, routed elsewhere, is inside of that.
    """
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    tied_output = {"token_embd.weight"}  # which llama-imatrix, unlike us, has no entry for
    assert ours.entries.keys() - tied_output == theirs.entries.keys() - tied_output
    for name, entry in theirs.entries.items():
        found = ours.entries[name]
        assert found.in_sum2.shape == entry.in_sum2.shape, name
        assert entry.counts.min() >= 100, (name, entry.counts)
        np.testing.assert_allclose(found.counts, entry.counts, rtol=0.01, err_msg=name)
        apart = np.abs(found.in_sum2 - entry.in_sum2).sum(1) / entry.in_sum2.sum(1)
        assert (apart < 0.005).all(), (name, apart)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_and_counts_are_llama_imatrix_s(kind: str, llama_cpp: LlamaCpp) -> None:
    found, expected = ours(folder(kind), text(12)), theirs(llama_cpp, folder(kind), text(12))
    compare(found, expected)
    if "moe" in kind or "additive" in kind:
        routed = [e.counts for n, e in expected.entries.items() if "_exps" in n]
        assert len({tuple(counts) for counts in routed}) > 1  # layers route differently
    if "qwen3" in kind:  # no table in its activation: nothing at all is apart
        for name, entry in expected.entries.items():
            np.testing.assert_allclose(found.entries[name].in_sum2, entry.in_sum2, rtol=1e-4)
            np.testing.assert_array_equal(found.entries[name].counts, entry.counts)


def test_the_trained_model_agrees_too(llama_cpp: LlamaCpp, tiny_model: Path) -> None:
    """A real, trained additive MoE: what is compared above holds outside of random weights."""
    source = Path(KEPT.name) / "held-out.txt"
    source.write_text(" ".join((tiny_model / "held-out.txt").read_text()[:20000].split()))
    compare(ours(tiny_model, source, like_ggml=False), theirs(llama_cpp, tiny_model, source))


@pytest.mark.parametrize("kind", ["gemma4-additive", "qwen3-moe"])
def test_llama_quantize_takes_ours(kind: str, llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """All entries, none of the tensors beside them."""
    imatrix = ours(folder(kind), text(3))
    imatrix.write(tmp_path / "ours.gguf")
    told = run(
        llama_cpp, "llama-quantize", "--imatrix", tmp_path / "ours.gguf",
        f32_file(folder(kind)), tmp_path / "q.gguf", "Q4_K_M", 1,
    )  # fmt: skip
    entries = re.search(r"have (\d+) importance matrix entries", told)
    assert entries is not None and int(entries[1]) == len(imatrix.entries)
    assert f"computed on {imatrix.chunk_count} chunks" in told
    assert (tmp_path / "q.gguf").stat().st_size > 0


def test_llama_imatrix_takes_ours(llama_cpp: LlamaCpp, tmp_path: Path) -> None:
    """It reads our file and writes the same sums again."""
    imatrix = ours(folder("gemma4-additive"), text(3))
    imatrix.write(tmp_path / "ours.gguf")
    model = f32_file(folder("gemma4-additive"))
    run(
        llama_cpp, "llama-imatrix", "-m", model, "--in-file", tmp_path / "ours.gguf",
        "-o", tmp_path / "again.gguf", "-c", LENGTH, "-b", LENGTH, "-ngl", "0",
    )  # fmt: skip
    again = Imatrix.read(tmp_path / "again.gguf")
    assert again.entries.keys() == imatrix.entries.keys()
    for name, entry in imatrix.entries.items():
        np.testing.assert_array_equal(again.entries[name].in_sum2, entry.in_sum2)
        np.testing.assert_array_equal(again.entries[name].counts, entry.counts)


@pytest.mark.parametrize("kind", ["gemma4-ple", "gemma4-additive", "qwen3-moe"])
def test_perplexity_is_llama_perplexity_s(kind: str, llama_cpp: LlamaCpp) -> None:
    """Random weights are chaotic where routes flip, yet far inside 0.5 % of log-likelihood."""
    checkpoint: Checkpoint = open_checkpoint(folder(kind))
    windows = text_windows(checkpoint.path, text(2), LENGTH)
    found = perplexity(checkpoint, describe(checkpoint), windows)
    ppl, stderr = final_estimate(llama_cpp, f32_file(folder(kind)), text(2), context=LENGTH)
    assert found.ppl == pytest.approx(ppl, rel=0.005)
    assert found.stderr == pytest.approx(stderr, rel=0.005)
