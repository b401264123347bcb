"""The files run in stock llama.cpp, and mean there what they mean in transformers."""

import re
from pathlib import Path

import pytest
import torch

from moequant.architectures import describe
from moequant.calibrate import CalibrationOptions
from moequant.checkpoint import open_checkpoint
from moequant.evaluate.gguf_weights import GGUFWeights
from moequant.evaluate.perplexity import perplexity, text_windows
from moequant.gguf_file import read_gguf
from moequant.pipeline import ExportOptions, export
from moequant.plan import PRESETS
from moequant.runtime.llama_cpp import LlamaCpp
from tests.checkpoints import KINDS, make_checkpoint
from tests.oracles.perplexity_tool import llama_perplexity

pytestmark = pytest.mark.llama_cpp

NO_CALIBRATION = ExportOptions(calibration=None)
SHORT = CalibrationOptions(tokens=2048, sequence_length=256, floor=16)


def export_tiny(tiny_model: Path, path: Path, preset: str) -> Path:
    export(open_checkpoint(tiny_model), path, ExportOptions(preset=preset, calibration=SHORT))
    return path


@pytest.fixture(scope="module")
def text(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of the held-out text, from its middle: two languages and code."""
    whole = (tiny_model / "held-out.txt").read_text("utf-8")
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(whole[len(whole) // 2 : len(whole) // 2 + 24000], "utf-8")
    return path


@pytest.mark.parametrize(("preset", "tolerance"), [("F32", 0.005), ("Q8_0", 0.01)])
def test_llama_perplexity_agrees_with_transformers(
    llama_cpp: LlamaCpp, tiny_model: Path, text: Path, tmp_path: Path, preset: str, tolerance: float
) -> None:
    path = export_tiny(tiny_model, tmp_path / "tiny.gguf", preset)
    checkpoint = open_checkpoint(tiny_model)
    windows = text_windows(tiny_model, text)
    ours = perplexity(checkpoint, describe(checkpoint), windows, dtype=torch.float32)
    theirs = llama_perplexity(llama_cpp, path, text)
    assert len(windows) >= 10
    assert theirs == pytest.approx(ours.ppl, rel=tolerance)


def test_our_perplexity_of_a_quantized_file_is_llama_cpps(
    llama_cpp: LlamaCpp, tiny_model: Path, text: Path, tmp_path: Path
) -> None:
    # llama.cpp rounds activations to 8 bits for K-quants, hence the wider tolerance
    path = export_tiny(tiny_model, tmp_path / "tiny.gguf", "Q4_K_M")
    model = describe(open_checkpoint(tiny_model))
    windows = text_windows(tiny_model, text)
    weights = GGUFWeights(read_gguf(path), model)
    ours = perplexity(weights, model, windows, dtype=torch.float32)
    assert llama_perplexity(llama_cpp, path, text) == pytest.approx(ours.ppl, rel=0.02)


# How far a preset may be from F32, relative to its perplexity. Two to four times what is seen.
CLOSENESS = {
    "F": 0.005, "BF": 0.005, "Q8": 0.01, "Q6": 0.01, "Q5": 0.015,
    "Q4": 0.03, "IQ4": 0.03, "MXFP4": 0.03, "Q3": 0.08, "Q2": 0.2,
}  # fmt: skip
WINDOWS, CONTEXT = 8, 256


@pytest.fixture(scope="module")
def f32_ppl(tiny_model: Path, text: Path) -> float:
    """Our own perplexity of the checkpoint in F32, on what llama-perplexity is given below."""
    checkpoint = open_checkpoint(tiny_model)
    windows = text_windows(tiny_model, text, CONTEXT)[:WINDOWS]
    return perplexity(checkpoint, describe(checkpoint), windows, dtype=torch.float32).ppl


@pytest.mark.parametrize("preset", PRESETS)
def test_stock_llama_cpp_runs_every_preset(
    llama_cpp: LlamaCpp, tiny_model: Path, text: Path, tmp_path: Path, f32_ppl: float, preset: str
) -> None:
    """Nothing but the rounding of weights is lost: a wrong scale would cost many times as much."""
    path = export_tiny(tiny_model, tmp_path / "tiny.gguf", preset)
    ppl = llama_perplexity(llama_cpp, path, text, "--chunks", str(WINDOWS), context=CONTEXT)
    tolerance = CLOSENESS[re.split(r"(?<=[A-Z])16|32|_", preset)[0]]
    assert ppl == pytest.approx(f32_ppl, rel=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_llama_cpp_runs_every_kind_of_checkpoint(
    llama_cpp: LlamaCpp, tmp_path: Path, kind: str
) -> None:
    folder = make_checkpoint(kind, tmp_path / kind)
    path = tmp_path / "model.gguf"
    export(open_checkpoint(folder), path, NO_CALIBRATION)
    text = Path(__file__).parents[2] / "README.md"
    llama_perplexity(llama_cpp, path, text, "--chunks", "1", context=64)
