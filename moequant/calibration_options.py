"""What a calibration run can be told.

Owns: the options, their defaults with the reason for each, and their checks. Leaves out: parsing a
command line (`moequant.cli`). Not part of `moequant.calibrate`, which takes
seconds to import, since `--help` shows the defaults.

Defaults:
- `sequence_length` 512 is llama-imatrix's, so that `imatrix.chunk_size` and sums mean the same.
- `tokens` 131072: with 128 experts, 8 active, an expert sees 8192 tokens on average; the built-in
  corpus is shorter and is used whole.
- `floor` 256: the relative standard error of a mean of x² over n tokens is sqrt((kurtosis - 1)/n),
  so 9 % for Gaussian columns and some 20 % for heavy-tailed ones; a quantizer's choice of scales
  does not notice errors of that size.
- `kappa` 32: an expert that just meets the floor by routed tokens keeps 8/9 of its own statistics,
  one that saw nothing gets the layer's, one with thousands of tokens is not moved.
- `batch_tokens` 4096: tokens run through a layer at once; bounds activations. Results change
  by rounding only: matrix products round differently at another size.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from moequant.errors import UsageError, listing

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")  # torch's names


@dataclass(frozen=True)
class CalibrationOptions:
    """Options of one run; raises UsageError that lists every value out of range.

    `texts`: files or folders, () = the built-in corpus. `tokens`: at most so many (whole windows).
    `compute_dtype`: one of `COMPUTE_DTYPES`, None = the checkpoint's. `floor`: tokens an expert
    should have seen, 0 switches the near-miss rule off. `process_output`: also the output matrix,
    as llama-imatrix's `--process-output`.
    """

    texts: tuple[Path, ...] = ()
    tokens: int = 131072
    sequence_length: int = 512
    seed: int = 0
    device: str = "cpu"
    compute_dtype: str | None = None
    floor: int = 256
    kappa: float = 32.0
    batch_tokens: int = 4096
    process_output: bool = False

    def __post_init__(self) -> None:
        """Check ranges; contradictions between options are named together."""
        wrong = [
            f"{name} = {value}, at least {least} is needed"
            for name, value, least in (
                ("sequence length", self.sequence_length, 2),
                ("calibration tokens", self.tokens, self.sequence_length),
                ("floor", self.floor, 0),
                ("kappa", self.kappa, 0),
                ("batch tokens", self.batch_tokens, 1),
            )
            if not value >= least
        ]
        if not 0 <= self.seed < 1 << 63:
            wrong.append(f"seed = {self.seed}, it must be from 0 to 2^63 - 1")
        if self.kappa == math.inf:
            wrong.append("kappa = inf, a finite number is needed")
        if self.compute_dtype not in (None, *COMPUTE_DTYPES):
            wrong.append(f"compute dtype {self.compute_dtype!r} is none of {[*COMPUTE_DTYPES]}")
        if wrong:
            raise UsageError(f"calibration options:{listing(wrong)}")
