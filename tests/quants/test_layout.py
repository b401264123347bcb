"""Our table against gguf's, and against what our encoders really write."""

import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from moequant.quants import CODECS, QUANT_TYPES, quantize, row_bytes
from tests.oracles.ggml import Ggml


def test_every_type_has_a_codec_and_the_other_way_round() -> None:
    assert CODECS.keys() == QUANT_TYPES.keys()
    assert len(CODECS) == 16


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_sizes_are_ggufs(name: str) -> None:
    layout = QUANT_TYPES[name]
    assert layout.id == GGMLQuantizationType[name].value
    assert (layout.block_size, layout.type_size) == GGML_QUANT_SIZES[GGMLQuantizationType[name]]


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_sizes_are_ggmls(name: str, ggml: Ggml) -> None:
    traits = ggml.traits(name)
    layout = QUANT_TYPES[name]
    assert (traits.blck_size, traits.type_size) == (layout.block_size, layout.type_size)


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_rows_have_row_bytes(name: str) -> None:
    data = quantize(torch.randn(3, 512), name)
    assert data.dtype == torch.uint8
    assert data.shape == (3, row_bytes(name, 512))
    assert row_bytes(name, 512) == int(QUANT_TYPES[name].bpw * 512 / 8)
