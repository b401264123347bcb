"""Errors by hand, and what choosing leaves behind; the variants themselves: `test_analysis`."""

import math

import pytest
import torch

from moequant.calibrate.near_miss import router_output
from moequant.routing.ablation import choosing, mean_of_texts


def test_a_router_chooses_as_before_after_an_error() -> None:
    row = router_output("qwen3_moe")
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Module()
    layer.mlp.gate = torch.nn.Linear(1, 1)
    layer.mlp.gate.top_k = 4
    with pytest.raises(KeyError), choosing(layer, row, 2):
        assert layer.mlp.gate.top_k == 2
        raise KeyError
    assert layer.mlp.gate.top_k == 4


def test_what_texts_differ_by_is_no_error() -> None:
    """Means of windows 1, 3 | 10, 10, 10: the first text's error is 1, and 2/5 of all count."""
    values = torch.tensor([0, 2, 4, 2, 9, 11, 10, 10, 10, 10], dtype=torch.float64)
    found = mean_of_texts(values, [2, 3])
    assert found.value == pytest.approx(6.8)
    assert found.stderr == pytest.approx(0.4)
    assert found.token_stderr == pytest.approx(float(values.std()) / math.sqrt(10))


def test_a_text_of_one_window_has_no_error_of_its_own() -> None:
    """Means of windows 1, 3 | 11: as of one text, a variance of 28."""
    values = torch.tensor([0, 2, 4, 2, 11, 11], dtype=torch.float64)
    assert mean_of_texts(values, [2, 1]).stderr == pytest.approx(math.sqrt(28 / 3))
