"""Sums by expert and near misses, on cases small enough to compute by hand."""

import pytest
import torch
from torch import nn

from moequant.calibrate.experts import (
    ExpertObserver,
    ExpertStatistics,
    _experts_forward,
    inner_activation,
    observe_experts,
)
from moequant.calibrate.near_miss import Routing, near_misses, probabilities, router_output
from moequant.errors import ArchitectureError


class TwoExperts(nn.Module):
    """2 experts, 2 columns in, 1 inside. gate_up of expert 0 is [[1, 0], [0, 1]], of expert 1
    [[0, 2], [1, 0]]; the activation is the identity, so inner is gate times up."""

    has_gate, has_bias, has_post_expert_norm, is_transposed = True, False, False, False
    num_experts = 2

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.tensor([[[1.0, 0], [0, 1]], [[0, 2.0], [1, 0]]]))
        self.down_proj = nn.Parameter(torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]]))

    def _apply_gate(self, projected: torch.Tensor) -> torch.Tensor:
        gate, up = projected.chunk(2, -1)
        return gate * up


HIDDEN = torch.tensor([[1.0, 2.0], [3.0, -1.0], [2.0, 2.0]])
CHOSEN = torch.tensor([[0], [1], [0]])
GATES = torch.tensor([[0.5], [1.0], [2.0]])


def test_output_and_sums_of_three_tokens() -> None:
    """Token 0 and 2 to expert 0 (inner 2 and 4), token 1 to expert 1 (inner 2·-1·3 = -6)."""
    module, observer = TwoExperts(), ExpertObserver(2, keep=True)
    observe_experts(module, observer)
    output = _experts_forward(module, HIDDEN, CHOSEN, GATES)
    assert output.tolist() == [[0.5 * 2, 0.5 * 4], [-18.0, 0.0], [2 * 4.0, 2 * 8.0]]
    sums = observer.statistics
    assert sums.counts.tolist() == [2, 1]
    assert sums.gate_counts.tolist() == [0.25 + 4, 1]
    assert sums.in_sum2["input"].tolist() == [[1 + 4, 4 + 4], [9, 1]]
    assert sums.gate_in_sum2["input"].tolist() == [[0.25 + 16, 1 + 16], [9, 1]]
    assert sums.in_sum2["inner"].tolist() == [[4 + 16], [36]]
    assert sums.gate_in_sum2["inner"].tolist() == [[0.25 * 4 + 4 * 16], [36]]
    tokens = torch.tensor([2, 0])
    assert torch.equal(observer.rows(tokens), HIDDEN[tokens])
    assert torch.equal(observer.chosen, CHOSEN)


def test_inputs_are_gathered_from_batches_in_the_order_asked_for() -> None:
    observer = ExpertObserver(2, keep=True)
    for start in (0, 1):
        observer.note_tokens(HIDDEN[start : 2 * start + 1], CHOSEN[:1], GATES[:1])
    tokens = torch.tensor([1, 0, 1])
    assert torch.equal(observer.rows(tokens), HIDDEN[tokens])


def test_sums_are_the_same_in_two_batches() -> None:
    whole, parts = ExpertObserver(2, keep=False), ExpertObserver(2, keep=False)
    module = TwoExperts()
    for observer, cuts in ((whole, [3]), (parts, [1, 2])):
        observe_experts(module, observer)
        pieces = zip(HIDDEN.split(cuts), CHOSEN.split(cuts), GATES.split(cuts), strict=True)
        for piece in pieces:
            _experts_forward(module, *piece)
    for side in ("input", "inner"):
        assert torch.equal(whole.statistics.in_sum2[side], parts.statistics.in_sum2[side])


def test_nobody_watches_when_told_so() -> None:
    module, observer = TwoExperts(), ExpertObserver(2, keep=True)
    observe_experts(module, observer)
    observe_experts(module, None)
    _experts_forward(module, HIDDEN, CHOSEN, GATES)
    assert observer.statistics.counts.tolist() == [0, 0]


def test_an_expert_may_be_hit_twice_by_a_token_in_different_places() -> None:
    chosen, gates = torch.tensor([[1, 0]] * 3), torch.full((3, 2), 0.5)
    output = _experts_forward(TwoExperts(), HIDDEN, chosen, gates)
    alone = [
        _experts_forward(TwoExperts(), HIDDEN, torch.full((3, 1), e), gates[:, :1]) for e in (0, 1)
    ]
    assert torch.allclose(output, alone[0] + alone[1])


# Four tokens, three experts, top 1. Expert 2 is never chosen, expert 1 once (token 3).
PROBABILITIES = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.5, 0.2, 0.3], [0.2, 0.7, 0.1]])
ROUTING = Routing(
    PROBABILITIES,
    torch.tensor([[0], [0], [0], [1]]),
    torch.tensor([[1.0], [1.0], [1.0], [4.0]]),  # expert 1 has a scale of 4, the others of 1
)


def test_starved_experts_get_the_nearest_tokens() -> None:
    """Floor 2: expert 1 lacks one token and gets 0, where it has 0.3; expert 2 gets 1 and 2.

    With a top 1 the token would have had a gate of 1 (p / (mass - weakest + p)) times the scale.
    """
    found = {
        e: (tokens.tolist(), gates.tolist())
        for e, tokens, gates in near_misses(ROUTING, torch.tensor([3, 1, 0]), floor=2)
    }
    assert set(found) == {1, 2}
    assert found[1] == ([0], [pytest.approx(4.0)])
    assert found[2] == ([1, 2], [pytest.approx(1.0)] * 2)


def test_the_gate_displaces_the_weakest_of_the_top_k() -> None:
    """Top 2 of [0.5, 0.3, 0.2]: expert 2 would have 0.2 / (0.8 - 0.3 + 0.2)."""
    routing = Routing(
        torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0, 1]]), torch.tensor([[0.625, 0.375]])
    )
    ((expert, tokens, gates),) = near_misses(routing, torch.tensor([1, 1, 0]), floor=1)
    assert (expert, tokens.tolist()) == (2, [0])
    assert gates.tolist() == [pytest.approx(0.2 / 0.7)]


def test_a_floor_above_all_tokens_takes_what_is_there() -> None:
    found = {e: t for e, t, _ in near_misses(ROUTING, torch.tensor([3, 1, 0]), floor=100)}
    assert [len(found[e]) for e in range(3)] == [1, 3, 4]


def test_nothing_is_lent_where_nobody_starves() -> None:
    assert list(near_misses(ROUTING, torch.tensor([3, 1, 0]), floor=0)) == []


def test_lent_tokens_have_sums_of_their_own() -> None:
    sums = ExpertStatistics(2)
    inner = inner_activation(TwoExperts(), 1, HIDDEN[:1])
    assert inner.tolist() == [[4.0]]
    sums.add_near_miss(1, {"input": HIDDEN[:1], "inner": inner}, torch.tensor([0.5]))
    assert sums.counts.tolist() == [0, 0]
    assert sums.near_miss_counts.tolist() == [0, 1]
    assert sums.near_miss_gate_counts.tolist() == [0, 0.25]
    assert sums.near_miss_in_sum2["inner"].tolist() == [[0.0], [4.0]]


def test_tokens_that_overflow_are_not_lent() -> None:
    """Infinite, not a number, squares beyond float32, a gate beyond it: one of five remains."""
    inner = torch.tensor([[torch.inf], [torch.nan], [1e30], [2.0], [3.0]])
    gates = torch.tensor([1.0, 1.0, 1.0, 3e38, 0.5])
    sums = ExpertStatistics(2)
    sums.add_near_miss(1, {"input": torch.ones(5, 2), "inner": inner}, gates)
    assert sums.near_miss_counts.tolist() == [0, 1]
    assert sums.near_miss_gate_counts.tolist() == [0, 0.25]
    assert sums.near_miss_in_sum2["inner"].tolist() == [[0.0], [0.25 * 9]]
    assert sums.near_miss_in_sum2["input"].tolist() == [[0, 0], [0.25, 0.25]]


def test_router_scores_become_probabilities() -> None:
    scores = torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])
    assert probabilities(scores, "logits").tolist() == [[pytest.approx(0.25), pytest.approx(0.75)]]
    assert probabilities(PROBABILITIES, "probabilities").tolist() == PROBABILITIES.tolist()


def test_a_family_without_a_row_is_named() -> None:
    with pytest.raises(ArchitectureError, match="no_such_moe"):
        router_output("no_such_moe")
