"""Divergence against the whole softmax in float64, and its statistics by hand."""

import math

import pytest
import torch
from torch import Tensor

from moequant.evaluate.divergence import Divergence, Logits, diverge
from moequant.evaluate.statistics import exponential, mean, percentile

POSITIONS, VOCABULARY = 7, 50


def sliced(logits: Tensor, rows: int, columns: int) -> Logits:
    """As `StreamedModel.logits` yields them: all positions of a slice of the vocabulary in turn."""
    for start in range(0, logits.shape[1], columns):
        for first in range(0, len(logits), rows):
            yield first, start, logits[first : first + rows, start : start + columns]


def made(seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(POSITIONS, VOCABULARY, generator=generator)


@pytest.mark.parametrize(("rows", "columns"), [(7, 50), (3, 16), (1, 1), (2, 49)])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_slices_give_what_the_whole_softmax_gives(rows: int, columns: int, scale: float) -> None:
    p, q, targets = made(1, scale), made(2, scale), torch.arange(POSITIONS) * 8
    found = diverge(sliced(p, rows, columns), sliced(q, rows, columns), targets)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    torch.testing.assert_close(
        found.kld,
        torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1),
    )
    at = targets[:, None]
    torch.testing.assert_close(found.nll, -log_q.gather(1, at)[:, 0])
    torch.testing.assert_close(found.reference_nll, -log_p.gather(1, at)[:, 0])
    torch.testing.assert_close(
        found.delta_p, (log_q.gather(1, at).exp() - log_p.gather(1, at).exp())[:, 0]
    )
    assert found.same_top.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()


def test_equal_logits_diverge_nowhere() -> None:
    found = diverge(sliced(made(1), 2, 9), sliced(made(1), 2, 9), torch.zeros(7, dtype=torch.int64))
    assert found.kld.abs().max() < 1e-12
    assert bool(found.same_top.all())
    assert found.rms_delta_p.value == 0.0
    assert (found.ppl_ratio.value, found.ppl_ratio.stderr) == (1.0, 0.0)


def test_a_shift_of_all_logits_is_no_divergence() -> None:
    shifted = made(1) + 5.0
    found = diverge(sliced(made(1), 7, 50), sliced(shifted, 7, 50), torch.arange(7))
    assert found.kld.abs().max() < 1e-5  # float32 logits of 15


def of(kld: list[float], windows: int = 1, **others: list[float]) -> Divergence:
    values = {
        "nll": [0.0] * len(kld),
        "reference_nll": [0.0] * len(kld),
        "delta_p": [0.0] * len(kld),
    }
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in {**values, **others}.items()}
    same = torch.tensor([True] * (len(kld) - 1) + [False])
    return Divergence(
        windows=windows, kld=torch.tensor(kld, dtype=torch.float64), same_top=same, **tensors
    )


def test_the_statistics_are_llama_perplexity_s() -> None:
    found = of([1.0, 3.0, 1.0, 3.0], delta_p=[0.1, -0.1, 0.3, -0.3], nll=[2.0, 4.0, 2.0, 4.0],
               reference_nll=[1.0, 2.0, 1.0, 2.0])  # fmt: skip
    assert found.mean_kld.value == 2.0
    assert found.mean_kld.token_stderr == pytest.approx(math.sqrt(1 / 3))
    assert found.rms_delta_p.value == pytest.approx(math.sqrt(0.05))
    # mean of squares 0.05, their variance 0.04²; 0.5 / rms times the error of the mean
    assert found.rms_delta_p.stderr == pytest.approx(0.5 / math.sqrt(0.05) * 0.04 / math.sqrt(3))
    assert found.agreement.value == 0.75
    assert found.agreement.stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    # paired: differences 1, 2, 1, 2, so 1.5 with variance 0.25
    assert found.ppl_ratio.value == pytest.approx(math.exp(1.5))
    assert found.ppl_ratio.stderr == pytest.approx(math.exp(1.5) * math.sqrt(0.25 / 3))


def test_percentiles_lie_between_neighbours() -> None:
    values = torch.tensor([4.0, 1.0, 2.0, 3.0])
    assert [percentile(values, f) for f in (0.0, 0.5, 0.9, 1.0)] == pytest.approx([1, 2.5, 3.7, 4])
    assert mean(torch.tensor([5.0]), 1).stderr == 0.0


def test_the_histogram_counts_every_token_once() -> None:
    edges, counts = of([-1e-9, 0.0, 1e-5, 0.02, 0.02, 3.0]).kld_histogram()
    assert len(edges) == len(counts) + 1
    assert sum(counts) == 6
    assert counts[0] == 2
    assert counts[-1] == 1
    (bin_of_two,) = [n for n, count in enumerate(counts) if count == 2 and n]
    assert edges[bin_of_two] <= 0.02 < edges[bin_of_two + 1]


def test_errors_are_those_of_windows_as_samples() -> None:
    """Windows of means 1 and 3: their mean 2 has the error sqrt(2) / sqrt(2) = 1."""
    found = mean(torch.tensor([1.0, 1.0, 1.0, 3.0, 3.0, 3.0]), 2)
    assert (found.value, found.stderr) == pytest.approx((2.0, 1.0))
    assert found.token_stderr == pytest.approx(math.sqrt(1 / 5))


def test_the_clustered_error_is_what_repetition_shows() -> None:
    """4000 texts of 12 windows of 20 tokens that share a level: the spread of their means."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(4000, 12, 1, generator=generator)
    texts = (level + torch.randn(4000, 12, 20, generator=generator)).double()
    spread = float(texts.mean((1, 2)).std())
    errors = [mean(text.flatten(), 12) for text in texts[:500]]
    by_window = sum(error.stderr**2 for error in errors) / len(errors)
    by_token = sum(error.token_stderr**2 for error in errors) / len(errors)
    assert math.sqrt(by_window) == pytest.approx(spread, rel=0.05)
    assert math.sqrt(by_token) < 0.4 * spread


def test_an_exponential_that_overflows_is_infinite() -> None:
    assert exponential(mean(torch.tensor([1e4, 1e4]), 1)).value == math.inf
