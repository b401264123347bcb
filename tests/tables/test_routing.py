"""What the verdict says, and what it does not claim."""

import math
from types import SimpleNamespace
from typing import Any

import pytest

from moequant.evaluate.statistics import Estimate
from moequant.routing.ablation import Ablated
from moequant.tables.routing import routing_json, verdict

ANALYSIS: Any = SimpleNamespace(
    checkpoint="x", texts={}, experts=8, experts_used=2, expert_bytes=3_000, total_bytes=4_000,
    layers=[], ablation=None, sequence_length=512, notes=(),
)  # fmt: skip


def variant(experts: int, nats: float, stderr: float = 0.001) -> Ablated:
    """Perplexity 100·e^nats, `nats` more than that of top-2."""
    ppl = 100 * math.exp(nats) if nats < 700 else math.inf
    name = f"top-{experts}" if experts else "off"
    whole, delta = Estimate(ppl, 0.01 * ppl, 0.001 * ppl), Estimate(nats, stderr, stderr / 9)
    return Ablated(name, experts, whole, {"a": 100.0}, delta)


@pytest.mark.parametrize(
    ("off", "said"),
    [
        (variant(0, math.log(2)), "The experts lower perplexity by 50.0% (200.0 without, 100.0 "),
        (variant(0, -math.log(2)), "The experts raise perplexity by 100.0% (50.00 without, 100.0 "),
        (
            variant(0, 0.01, 0.006),
            "cannot tell whether the experts lower or raise perplexity, since Δ is within two "
            "standard errors (101.0",
        ),
    ],
)
def test_the_effect_of_the_branch(off: Ablated, said: str) -> None:
    found = verdict([off, variant(1, 0.05), variant(2, 0)], ANALYSIS)
    assert said in found and "within 1%" not in found
    assert found.endswith("The experts take 3.0 kB of the checkpoint's 4.0 kB (75%).")


def test_the_fewest_experts_that_are_within_a_percent() -> None:
    variants = [variant(1, 0.009), variant(2, 0)]
    assert verdict(variants, ANALYSIS).startswith("top-1 is within 1% of top-2. The experts take")
    assert "without" not in verdict(variants, ANALYSIS)


def test_an_infinite_perplexity_is_null_in_json() -> None:
    found = SimpleNamespace(**{**vars(ANALYSIS), "ablation": [variant(1, 1e4), variant(2, 0)]})
    one = routing_json(found)["ablation"][0]  # type: ignore[arg-type]
    assert (one["ppl"], one["stderr"]) == (None, None)
