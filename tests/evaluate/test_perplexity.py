"""Perplexity against the loss that transformers' ordinary logits give."""

import math
from pathlib import Path

import pytest
import torch

from moequant.calibrate.forward import StreamedModel
from moequant.errors import CalibrationError, UsageError
from moequant.evaluate import Perplexity, perplexity, text_windows
from tests.calibrate.models import ONE_LINE, described, folder, reference, windows


@pytest.mark.parametrize("kind", ["gemma4-additive", "qwen3-dense-tied"])
@pytest.mark.parametrize("score_all", [False, True])
def test_losses_are_those_of_the_whole_logits(
    kind: str, score_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of 9: positions 4 to 7 predict tokens 5 to 8, or all eight with `score_all`."""
    monkeypatch.setattr("moequant.calibrate.forward._VOCABULARY_SLICE", 200)
    monkeypatch.setattr("moequant.calibrate.forward._POSITIONS", 5)
    ids = windows(3, 9)
    first = 0 if score_all else 4
    with torch.no_grad():
        logits = reference(kind)(input_ids=ids).logits[:, first:-1].double()
    targets = ids[:, first + 1 :, None]
    expected = -logits.log_softmax(-1).gather(-1, targets).flatten()
    found = perplexity(*described(kind), ids, score_all=score_all)
    assert found.tokens == 3 * (8 - first)
    torch.testing.assert_close(found.nll, expected, rtol=1e-4, atol=1e-4)


def test_the_estimate_is_llama_perplexity_s() -> None:
    """Mean 2, mean of squares 5: variance 1 over 4 tokens, error e² · sqrt(1 / 3)."""
    found = Perplexity(torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.float64))
    assert found.ppl == pytest.approx(math.exp(2))
    assert found.stderr == pytest.approx(math.exp(2) * math.sqrt(1 / 3))
    assert Perplexity(torch.tensor([1e4], dtype=torch.float64)).ppl == math.inf


def test_windows_without_anything_to_score_are_refused() -> None:
    with pytest.raises(UsageError, match="windows of 2"):
        perplexity(*described("qwen3-dense"), windows(1, 2))


def test_positions_go_through_the_norm_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = windows(5, 9)
    whole = perplexity(*described("qwen3-dense"), ids)
    sizes: list[int] = []
    norm = StreamedModel.final_norm

    def noted(self: StreamedModel, hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return norm(self, hidden)

    monkeypatch.setattr(StreamedModel, "final_norm", noted)
    found = perplexity(*described("qwen3-dense"), ids, batch_tokens=18)
    assert sizes == [8, 8, 4]  # four positions of each window
    torch.testing.assert_close(found.nll, whole.nll, rtol=1e-5, atol=1e-5)


def test_windows_follow_the_model_where_it_is_given(tmp_path: Path) -> None:
    """BOS is the family's; an id that the model lacks is noticed before any work."""
    text = tmp_path / "a.txt"
    text.write_text(ONE_LINE)
    _, spec = described("gemma4-dense")
    plain = text_windows(folder("gemma4-dense"), text, 32)
    found = text_windows(folder("gemma4-dense"), text, 32, spec=spec)
    assert torch.equal(found, plain) and found[:, 0].unique().tolist() == [2]
    small = type(spec)(**{**vars(spec), "vocab_size": 300})
    with pytest.raises(CalibrationError, match="300 rows"):
        text_windows(folder("gemma4-dense"), text, 32, spec=small)
