"""Bytes written out by hand, so that encoder and decoder cannot share a mistake."""

import pytest
import torch

from moequant.quants import dequantize, quantize


def hex_of(data: torch.Tensor) -> str:
    return bytes(data.flatten().tolist()).hex()


def test_q8_0() -> None:
    """amax 127, so d is 1 (fp16 0x3c00) and levels are the values."""
    x = torch.arange(32.0).view(1, 32) * 4
    x[0, 31], x[0, 1] = -127, -1
    levels = [0, 0xFF, *range(8, 124, 4), 0x81]
    expected = "003c" + bytes(levels).hex()
    assert hex_of(quantize(x, "Q8_0")) == expected
    assert torch.equal(dequantize(quantize(x, "Q8_0"), "Q8_0", 32), x)


def test_q4_0() -> None:
    """-8 is the extreme: d = 1, stored level = value + 8, the second half in the high nibbles."""
    x = torch.tensor([[-8.0, 7.0, *[0.0] * 14, 1.0, -1.0, *[0.0] * 14]])
    expected = "003c" + "90" + "7f" + "88" * 14
    assert hex_of(quantize(x, "Q4_0")) == expected
    assert torch.equal(dequantize(quantize(x, "Q4_0"), "Q4_0", 32), x)


def test_q5_1() -> None:
    """0..31: d = 1, m = 0; fifth bits of values 16..31 fill the upper half of the 32-bit field."""
    x = torch.arange(32.0).view(1, 32)
    nibbles = bytes(level | level << 4 for level in range(16)).hex()
    assert hex_of(quantize(x, "Q5_1")) == "003c" + "0000" + "0000ffff" + nibbles
    assert torch.equal(dequantize(quantize(x, "Q5_1"), "Q5_1", 32), x)


def q4_k_example() -> tuple[torch.Tensor, torch.Tensor]:
    """A superblock with d = 1, dmin = 2, scales 8g + 7, mins 8g + 1: two-bit parts all differ."""
    scales = [8 * g + 7 for g in range(8)]  # 7 15 23 31 | 39 47 55 63
    mins = [8 * g + 1 for g in range(8)]  # 1 9 17 25 | 33 41 49 57
    first = [scales[g] | (scales[g + 4] >> 4 << 6) for g in range(4)]
    second = [mins[g] | (mins[g + 4] >> 4 << 6) for g in range(4)]
    third = [(scales[g + 4] & 15) | (mins[g + 4] & 15) << 4 for g in range(4)]
    packed = [(i % 16) | (15 - i % 16) << 4 for i in range(128)]
    data = bytes.fromhex("003c" + "0040") + bytes([*first, *second, *third, *packed])
    values = [
        scales[g] * (i % 16 if g % 2 == 0 else 15 - i % 16) - 2 * mins[g]
        for g in range(8)
        for i in range(32)
    ]
    return (
        torch.tensor(list(data), dtype=torch.uint8).view(1, 144),
        torch.tensor(values, dtype=torch.float32).view(1, 256),
    )


def test_q4_k_decodes() -> None:
    data, values = q4_k_example()
    assert hex_of(data[:, 4:16]) == "878fd7df8189d1d917 9f 17 9f".replace(" ", "")
    assert torch.equal(dequantize(data, "Q4_K", 256), values)


@pytest.mark.parametrize("weighted", [False, True])
def test_q4_k_finds_an_exact_superblock(weighted: bool) -> None:
    _, values = q4_k_example()
    importance = torch.rand(256) + 0.5 if weighted else None
    found = dequantize(quantize(values, "Q4_K", importance), "Q4_K", 256)
    assert (found - values).abs().max() < 1e-3 * values.abs().max()


def test_f16_and_bf16_round_to_even() -> None:
    x = torch.tensor([[1.0, 1 + 2**-11, 1 + 3 * 2**-11, -2.0]])
    assert hex_of(quantize(x, "F16")) == "003c" + "003c" + "023c" + "00c0"
    x = torch.tensor([[1.0, 1 + 2**-8, 1 + 3 * 2**-8, -2.0]])
    assert hex_of(quantize(x, "BF16")) == "803f" + "803f" + "823f" + "00c0"
