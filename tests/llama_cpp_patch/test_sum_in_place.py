"""Sums of expert banks on the CPU: written in place where that is right, and only there.

What is written tells which way it went: NaN in the memory of the last product if its rows went
straight into the sum, zeros and products otherwise.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from moequant.runtime.llama_cpp import ensure_built
from tests.llama_cpp_patch.bank_sums import SUMS, products

pytestmark = pytest.mark.llama_cpp
ROOT = Path(__file__).resolve().parents[2]
Found = Mapping[str, np.ndarray]
FUSED = (
    "one type", "two types", "three of one type", "the last differs", "the second differs",
    "floats", "one repacked", "two repacked", "in place by name",
)  # fmt: skip
TOLERANCE = 0.02  # of products with activations of 8 bits


def _run(target: Path, **environment: str) -> Found:
    folder = ensure_built(patched=True).binaries
    run = subprocess.run(
        [sys.executable, "-m", "tests.llama_cpp_patch.bank_sums", str(folder), str(target)],
        env=os.environ | {"OMP_WAIT_POLICY": "passive"} | environment, cwd=ROOT,
        timeout=60, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(np.load(target))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return _run(tmp_path_factory.mktemp("fused") / "found.npz")


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Found:
    target = tmp_path_factory.mktemp("one-by-one") / "found.npz"
    return _run(target, GGML_CPU_DISABLE_FUSION="1")


def _last(name: str) -> int:
    return len(SUMS[name].qtypes) - 1


def _untouched(found: Found, name: str) -> float:
    """How much of the last product's memory nobody wrote."""
    return float(np.isnan(found[f"{name}/product {_last(name)}"]).mean())


@pytest.mark.parametrize("name", SUMS)
def test_values(name: str, fused: Found, one_by_one: Found) -> None:
    """As numpy has them, and the same bit by bit whichever way they were made."""
    case, right = SUMS[name], products(name)
    expected = {f"sum {_last(name)}": sum(right)}
    if case.first_only:
        expected = {"product 0": right[0]}
    if case.output:
        kind, index = case.output.split()
        expected[case.output] = right[int(index)] if kind == "product" else sum(
            right[: int(index) + 1])  # fmt: skip
    if case.again is not None:
        expected["again"] = 2 * right[case.again]
    for node, values in expected.items():
        got = fused[f"{name}/{node}"]
        assert np.abs(got - values).max() < TOLERANCE * np.abs(values).max(), node
        assert (got == one_by_one[f"{name}/{node}"]).all(), node


@pytest.mark.parametrize("name", SUMS)
def test_which_sums_are_in_place(name: str, fused: Found, one_by_one: Found) -> None:
    if SUMS[name].first_only:
        assert _untouched(fused, name) == _untouched(one_by_one, name) == 1
        return
    assert _untouched(one_by_one, name) == 0
    assert _untouched(fused, name) == (1 if name in FUSED else 0)


def test_the_sums_memory_is_the_first_products(one_by_one: Found) -> None:
    """Without which no sum could be written in place."""
    for name in FUSED:
        first = one_by_one[f"{name}/product 0"]
        assert (first == one_by_one[f"{name}/sum {_last(name)}"]).all()
