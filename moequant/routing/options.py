"""What a routing analysis can be told.

Owns: the options, their defaults with the reason for each, and their checks. Leaves out: parsing a
command line. It imports nothing heavy, since `--help` shows the defaults.

Defaults:
- `tokens` 2048 per text: with 128 experts, 8 active, and the six built-in texts an expert sees 768
  tokens on average; the ablation runs them k + 1 times.
- `sequence_length` 512 is llama-perplexity's, so that perplexities compare.
- `tops`: every number of experts up to k; beyond `EVERY_TOP`, the powers of two and k.
"""

from dataclasses import dataclass
from pathlib import Path

from moequant.calibration_options import COMPUTE_DTYPES
from moequant.errors import UsageError, listing

EVERY_TOP = 8  # up to this k, each number of experts is tried


@dataclass(frozen=True)
class RoutingOptions:
    """Options of one run; raises UsageError that lists every value out of range.

    `texts`: (name, file or folder) for each domain, () = the built-in texts. `tokens`: at most so
    many per text (whole windows, sampled by `seed`). `ablation`: whether perplexities are measured;
    `tops`: the numbers of experts to measure them with, None = `default_tops`. `compute_dtype`: one
    of `COMPUTE_DTYPES`, None = the checkpoint's.
    """

    texts: tuple[tuple[str, Path], ...] = ()
    tokens: int = 2048
    sequence_length: int = 512
    seed: int = 0
    device: str = "cpu"
    compute_dtype: str | None = None
    ablation: bool = True
    tops: tuple[int, ...] | None = None
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        """Check ranges and names; contradictions between options are named together."""
        names = [name for name, _ in self.texts]
        wrong = [
            f"{what} = {value}, at least {least} is needed"
            for what, value, least in (
                ("sequence length", self.sequence_length, 3),
                ("tokens", self.tokens, self.sequence_length),
                ("batch tokens", self.batch_tokens, 1),
            )
            if value < least
        ]
        wrong += [
            f"two texts are named {name!r}; give each a name of its own"
            for name in dict.fromkeys(names)
            if names.count(name) > 1
        ]
        if not 0 <= self.seed < 1 << 63:
            wrong.append(f"seed = {self.seed}, it must be from 0 to 2^63 - 1")
        if self.compute_dtype not in (None, *COMPUTE_DTYPES):
            wrong.append(f"compute dtype {self.compute_dtype!r} is none of {[*COMPUTE_DTYPES]}")
        if self.tops is not None and not self.ablation:
            wrong.append("numbers of experts to try have no use without the ablation")
        if wrong:
            raise UsageError(f"routing options:{listing(wrong)}")

    def tops_for(self, used: int, experts: int) -> tuple[int, ...]:
        """The numbers of experts to measure, ascending, always with `used`, the model's own.

        Raises UsageError for numbers that a model of `experts` experts cannot choose.
        """
        if self.tops is None:
            return default_tops(used)
        wrong = sorted(top for top in set(self.tops) if not 1 <= top <= experts)
        if wrong:
            raise UsageError(
                f"--top {', '.join(map(str, wrong))}: the model has {experts} experts in a layer; "
                f"use numbers from 1 to {experts}."
            )
        return tuple(sorted({*self.tops, used}))


def default_tops(used: int) -> tuple[int, ...]:
    """1 to `used`, or powers of two and `used` where that is more than `EVERY_TOP`."""
    if used <= EVERY_TOP:
        return tuple(range(1, used + 1))
    powers = (1 << n for n in range(used.bit_length()))
    return tuple(sorted({*(power for power in powers if power < used), used}))
