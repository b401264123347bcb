"""Fixtures that every test may use. The pinned llama.cpp is built once, into the user's cache."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from moequant.runtime.llama_cpp import LlamaCpp, ensure_built

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """The models are tiny, so that a second thread only waits; and pytest-xdist uses all cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama_cpp() -> LlamaCpp:
    """The pinned llama.cpp, built; a failure to build fails the test (it is never skipped)."""
    return ensure_built()


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """The trained additive MoE in `examples/`."""
    return ROOT / "examples" / "tiny-additive-moe"
