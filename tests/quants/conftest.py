"""Matrices and importance rows that every codec must cope with, and ggml as the oracle."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moequant.runtime.llama_cpp import LlamaCpp
from tests.oracles.ggml import Ggml

ROWS, COLS = 12, 1536  # a multiple of every block size that is not a power of two


@pytest.fixture(autouse=True)
def one_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def ggml(llama_cpp: LlamaCpp) -> Ggml:
    return Ggml.of(llama_cpp)


@pytest.fixture(scope="session")
def matrices(tiny_model: Path) -> dict[str, torch.Tensor]:
    """Kind of row to float32 [ROWS, COLS]."""
    draw = torch.Generator().manual_seed(1)
    gaussian = torch.randn(ROWS, COLS, generator=draw)
    chi2 = torch.randn(3, ROWS, COLS, generator=draw).square().sum(0)
    scales = torch.randn(ROWS, COLS // 32, generator=draw).exp().repeat_interleave(32, 1)
    outliers = 100 * (torch.rand(ROWS, COLS, generator=draw) < 0.003)
    uniform = torch.rand(ROWS, COLS, generator=draw)
    return {
        "gaussian": 0.02 * gaussian,
        "heavy-tailed": 0.02 * gaussian / (chi2 / 3).sqrt(),
        "uneven": gaussian * scales,
        "outliers": gaussian + outliers,
        "positive": uniform + 0.5,
        "negative": -uniform - 3,
        "constant": torch.linspace(-1.7, 2.3, ROWS).unsqueeze(1).repeat(1, COLS),
        "zero": torch.zeros(ROWS, COLS),
        "real": real_rows(tiny_model),
    }


def real_rows(tiny_model: Path) -> torch.Tensor:
    """Rows of the trained model's largest matrices, end to end."""
    tensors = safetensors.torch.load_file(tiny_model / "model.safetensors")
    trained = [t.float().flatten() for n, t in sorted(tensors.items()) if "proj" in n]
    assert len(trained) >= 3, "the tiny model has no projections?"
    part = ROWS * COLS // 3
    picked = [trained[i][:part] for i in (0, len(trained) // 2, len(trained) - 1)]
    return torch.cat([p.repeat(-(-part // len(p)))[:part] for p in picked]).view(ROWS, COLS)


@pytest.fixture(scope="session")
def importances() -> dict[str, torch.Tensor | None]:
    """Kind of importance to float32 [COLS]."""
    draw = torch.Generator().manual_seed(2)
    uniform = torch.rand(COLS, generator=draw)
    return {
        "none": None,
        "ones": torch.ones(COLS),
        "squares": torch.randn(COLS, generator=draw).square() + 0.01,
        "zeros": uniform * (torch.rand(COLS, generator=draw) < 0.7),
        "large": 1e12 * (uniform + 0.1),
    }
