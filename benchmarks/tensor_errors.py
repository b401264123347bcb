"""Does the error that `evaluate` gives a tensor say how much the tensor hurts?

Takes the example model and its export. For every matrix: the reference with this one matrix from
the file, all other weights its own; the KLD of that, and the NMSE that `evaluate` measured. Prints
the rank correlation of the two and both lists. About five minutes on two cores:

    moequant export examples/tiny-additive-moe -o model.gguf --quant Q4_K_M
    python benchmarks/tensor_errors.py model.gguf --reference examples/tiny-additive-moe
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moequant.calibrate.weights import read_rows
from moequant.evaluate.compare import CompareOptions, compare
from moequant.evaluate.models import MeasuredModel, open_file, open_reference
from moequant.evaluate.text import TextOptions, text_windows


class OneFrom:
    """The weights of `base`, but for the sources of one tensor, which are the file's."""

    def __init__(self, base: MeasuredModel, file: MeasuredModel, name: str) -> None:
        ours, theirs = (next(t for t in m.spec.tensors if t.name == name) for m in (base, file))
        self.base, self.file = base.weights, file.weights
        self.names = dict(zip(ours.sources, theirs.sources, strict=True))

    @property
    def tensors(self) -> Mapping[str, Any]:
        return self.base.tensors

    def read(self, name: str) -> Tensor:
        return self.file.read(self.names[name]) if name in self.names else self.base.read(name)

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        if name in self.names:
            return read_rows(self.file, self.names[name], start, stop)
        return read_rows(self.base, name, start, stop)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks."""
    ranks = torch.stack([v.argsort().argsort().double() for v in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    """Measure every matrix alone and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    arguments = parser.parse_args()
    base, file = open_reference(arguments.reference), open_file(arguments.file)
    windows = text_windows(base, TextOptions(tokens=arguments.tokens))
    (whole,) = compare(base, [file], windows, CompareOptions(sample_tokens=arguments.tokens))
    errors = {e.name: e.nmse for e in whole.tensors if e.nmse > 0 and "(" not in e.name}
    klds = {}
    for name in errors:
        model = replace(base, name=name, weights=OneFrom(base, file, name))
        (alone,) = compare(base, [model], windows, CompareOptions(sample_tokens=0))
        assert alone.divergence is not None
        klds[name] = alone.divergence.mean_kld.value
    found = torch.tensor([errors[n] for n in errors]), torch.tensor([klds[n] for n in errors])
    print(f"{len(errors)} matrices, rank correlation {rank_correlation(*found):.2f}")
    for name in sorted(klds, key=lambda n: -klds[n]):
        print(f"{name:32} KLD {klds[name]:.6f}  NMSE {errors[name]:.2e}")


if __name__ == "__main__":
    main()
