"""Opened checkpoints to describe, and to spoil in copies: an opened one is frozen."""

from pathlib import Path

import pytest

from moequant.checkpoint import Checkpoint, open_checkpoint
from tests.checkpoints import make_checkpoint


@pytest.fixture(scope="package")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Additive MoE with experts in layers 1 and 3 of 4."""
    return _opened("gemma4-additive-some-layers", tmp_path_factory)


@pytest.fixture(scope="package")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """E2B shape, inside `Gemma4ForConditionalGeneration`."""
    return _opened("gemma4-conditional", tmp_path_factory)


@pytest.fixture(scope="package")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Qwen3-MoE with 8 experts in each of 2 layers."""
    return _opened("qwen3-moe", tmp_path_factory, num_experts=8, num_hidden_layers=2)


def _opened(kind: str, factory: pytest.TempPathFactory, **config: int) -> Checkpoint:
    folder: Path = factory.mktemp(kind) / kind
    return open_checkpoint(make_checkpoint(kind, folder, **config))
