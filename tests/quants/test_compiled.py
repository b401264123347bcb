"""What the compiled encoders stand on: fp16 by integers, dispatch, where machine code is kept."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import moequant
from moequant.quants import CODECS, QUANT_TYPES, compiled, kernels, quantize
from tests.oracles.ggml import Ggml
from tests.quants.test_compiled_symmetric import error_ratio

Matrices = dict[str, torch.Tensor]
PACKAGE = Path(moequant.__file__).parents[1]


@compiled.jit
def _through_half(x: np.ndarray, bits: np.ndarray, back: np.ndarray) -> None:
    for i in range(len(x)):
        bits[i] = compiled.half_bits(x[i])
        back[i] = compiled.from_half(bits[i])


def test_fp16_is_that_of_numpy() -> None:
    every = np.arange(0, 0x7F800000, 4999, dtype=np.int64).astype(np.int32).view(np.float32)
    halves = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = (halves[1:] + halves[:-1]) / 2
    edges = np.array([65504, 65519.99, 65520, 3e38], np.float32)
    x = np.concatenate([every, halves, ties, edges])
    x = np.concatenate([x, -x])
    bits, back = np.empty(len(x), np.uint16), np.empty(len(x), np.float32)
    _through_half(x, bits, back)
    expected = np.clip(x, -65504, 65504).astype(np.float16) + np.float16(0)
    assert np.array_equal(bits, expected.view(np.uint16))
    assert np.array_equal(back, expected.astype(np.float32))


@pytest.mark.parametrize("name", kernels())
def test_weights_follow_the_place_in_the_matrix(name: str) -> None:
    layout = QUANT_TYPES[name]
    x = torch.randn(12, layout.block_size).numpy()
    weights = torch.rand(3, layout.block_size).numpy()
    whole, part = (np.zeros((n, layout.type_size), np.uint8) for n in (12, 5))
    kernels()[name](x, weights, 0, whole)
    kernels()[name](x[4:9], weights, 4, part)
    assert np.array_equal(part, whole[4:9])
    if CODECS[name].weighted:  # the others' weights make no difference
        kernels()[name](x[4:9], weights, 5, part)
        assert not np.array_equal(part, whole[4:9])


@pytest.mark.parametrize("name", kernels())
def test_unaligned_values_need_no_other_kernel(name: str) -> None:
    memory = torch.empty(4 * 512 + 1, dtype=torch.uint8)
    odd = torch.from_numpy(np.frombuffer(memory.numpy(), np.float32, 512, offset=1))
    odd.copy_(torch.randn(512))
    assert torch.equal(quantize(odd.view(1, 512), name), quantize(odd.clone().view(1, 512), name))


def test_compiled_can_be_insisted_on() -> None:
    assert torch.equal(
        quantize(torch.ones(1, 256), "Q4_K", compiled=True), quantize(torch.ones(1, 256), "Q4_K")
    )
    missing = [name for name in QUANT_TYPES if name not in kernels()]
    for name in missing:
        with pytest.raises(ValueError, match=f"no compiled encoder of {name} on cpu"):
            quantize(torch.ones(1, 256), name, compiled=True)


def test_numba_is_imported_only_to_quantize() -> None:
    script = "import sys, moequant.quants; assert 'numba' not in sys.modules"
    run_python(script)


@pytest.mark.parametrize("kept", [True, False])
def test_where_machine_code_is_kept(tmp_path: Path, kept: bool) -> None:
    """In NUMBA_CACHE_DIR if that can be; if nowhere, code is compiled for the process alone."""
    script = (
        "import sys, numba.core.caching as caching\n"
        "if not int(sys.argv[1]): caching.CacheImpl._locator_classes.clear()\n"
        "from moequant.quants.compiled import from_half, inlined\n"
        "assert from_half(0x3C00) == 1\n"
    )
    run_python(script, str(int(kept)), NUMBA_CACHE_DIR=str(tmp_path))
    assert bool(list(tmp_path.rglob("*from_half*.nbc"))) == kept


def run_python(script: str, *arguments: str, **environment: str) -> None:
    """Run a script with warnings as errors."""
    subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": str(PACKAGE), **environment},
        check=True,
    )


@pytest.mark.parametrize("kind", ["outliers", "positive", "negative", "uneven", "real"])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q4_1", "Q5_1", "Q3_K", "Q6_K", "MXFP4"])
def test_no_worse_than_ggml_on_unlikely_rows(
    name: str, kind: str, ggml: Ggml, matrices: Matrices
) -> None:
    x = matrices[kind]
    heavy = torch.rand(x.shape[1])
    heavy[::97] = 1e8
    for importance in (None, torch.rand(x.shape[1]), torch.randn(x.shape[1]).square(), heavy):
        assert error_ratio(ggml, x, name, importance) <= 1.001
