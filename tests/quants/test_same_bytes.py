"""Bytes depend on values and importance alone."""

from functools import partial

import pytest
import torch

from moequant.quants import CODECS, QUANT_TYPES, dequantize, kernels, quantize

# The encoder that the CPU takes, and torch where that is another one.
ENCODERS = [*((name, None) for name in QUANT_TYPES), *((name, False) for name in kernels())]
ROWS, COLS = 37, 768  # leaves a remainder in every chunk and every vector register


@pytest.fixture
def rows() -> torch.Tensor:
    values = torch.randn(ROWS, COLS) * torch.randn(ROWS, 1).exp()
    values[3] = 0
    values[5] = 0.7
    values[7, ::3] *= 50
    return values


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("name", "compiled"), ENCODERS)
def test_threads_chunks_and_neighbours_change_nothing(
    name: str, compiled: bool | None, weighted: bool, rows: torch.Tensor
) -> None:
    importance = torch.rand(COLS) if weighted else None
    encode = partial(quantize, qtype=name, importance=importance, compiled=compiled)
    expected = encode(rows, threads=1)
    for threads, chunk_values in ((1, 256), (1, 1280), (2, 5 * 256), (3, 4864), (2, 1 << 20)):
        again = encode(rows, threads=threads, chunk_values=chunk_values)
        assert torch.equal(again, expected), (threads, chunk_values)
    for rows_taken in ([0], [5, 3], [7, 36, 1], list(range(0, ROWS, 2))):
        alone = encode(rows[rows_taken])
        assert torch.equal(alone, expected[rows_taken]), rows_taken


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_torch_threads_change_nothing(name: str, rows: torch.Tensor) -> None:
    importance = torch.rand(COLS)
    many = torch.cat([rows] * 6)  # large enough for torch to share it among its threads
    encode = partial(quantize, qtype=name, importance=importance, compiled=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = encode(many, chunk_values=many.numel())
        torch.set_num_threads(2)
        two = encode(many, chunk_values=many.numel())
        shared = encode(many, chunk_values=2048)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
    assert torch.equal(one, shared)


@pytest.mark.parametrize("compiled", [None, False])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q2_K", "Q4_K", "Q5_K"])
def test_a_power_of_two_on_the_importance_changes_nothing(
    name: str, compiled: bool | None, rows: torch.Tensor
) -> None:
    importance = torch.rand(COLS) + 0.01
    expected = quantize(rows, name, importance, compiled=compiled)
    for exponent in (-100, -7, 100):
        scaled = importance * 2.0**exponent
        assert torch.equal(quantize(rows, name, scaled, compiled=compiled), expected)


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_strided_rows_are_read_as_they_are(name: str, rows: torch.Tensor) -> None:
    expected = quantize(rows, name)
    wide = torch.cat([rows, rows], 1)
    assert torch.equal(quantize(wide[:, :COLS], name), expected)
    assert torch.equal(quantize(rows.t().contiguous().t(), name), expected)


@pytest.mark.parametrize("name", QUANT_TYPES)
def test_encode_is_fit_round_pack(name: str, rows: torch.Tensor) -> None:
    codec, size = CODECS[name], QUANT_TYPES[name].block_size
    blocks = rows.reshape(-1, size)
    scales = codec.fit(blocks, None)
    levels = codec.round(blocks, scales)
    packed = codec.pack(levels, scales)
    assert torch.equal(packed.view(ROWS, -1), quantize(rows, name, compiled=False))
    if scales.offset is not None:  # what GPTQ relies on: value = step * level + offset
        groups = levels.view(*scales.step.shape, -1)
        values = scales.step.unsqueeze(-1) * groups + scales.offset.unsqueeze(-1)
        assert torch.equal(
            values.reshape(ROWS, COLS), dequantize(packed.view(ROWS, -1), name, COLS)
        )


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU: CUDA encoders not tested")
@pytest.mark.parametrize("name", QUANT_TYPES)
def test_cuda_encodes_as_well_as_torch_on_the_cpu(name: str, rows: torch.Tensor) -> None:
    importance = torch.rand(COLS)
    on_gpu = quantize(rows.cuda(), name, importance.cuda())
    assert on_gpu.is_cuda
    values = dequantize(on_gpu, name, COLS)
    assert torch.equal(values.cpu(), dequantize(on_gpu.cpu(), name, COLS))
    ours = dequantize(quantize(rows, name, importance, compiled=False), name, COLS)
    gpu_error = (importance * (rows - values.cpu()) ** 2).sum()
    assert gpu_error <= 1.0001 * (importance * (rows - ours) ** 2).sum()
