"""The formulas on cases small enough to compute by hand."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from moequant.routing.measures import (
    LEAST_SEQUENCES,
    cosine_between_experts,
    dead,
    dominant,
    gini,
    normalised_entropy,
    specialisation,
)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ([0.25, 0.25, 0.25, 0.25], 0.0),
        ([0.0, 1.0, 0.0, 0.0], 0.75),  # 1 - 1/4
        ([0.4, 0.1, 0.3, 0.2], 0.25),  # (-3·0.1 - 0.2 + 0.3 + 3·0.4) / 4
        ([1.0], 0.0),
    ],
)
def test_gini(share: list[float], expected: float) -> None:
    assert gini(torch.tensor(share)) == pytest.approx(expected, abs=1e-7)


def test_entropy_is_over_its_largest() -> None:
    rows = torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4, [1.0, 0, 0, 0]], dtype=torch.float64)
    assert normalised_entropy(rows).tolist() == pytest.approx([0.5, 1.0, 0.0])
    assert float(normalised_entropy(torch.ones(1))) == 1.0


def test_an_expert_without_a_token_is_dead() -> None:
    assert dead(torch.tensor([3, 0, 1, 0])) == [1, 3]


@pytest.mark.parametrize(
    ("experts", "used", "limit"),
    [(128, 8, 0.25), (8, 2, 0.625), (16, 4, 0.625), (4, 1, 0.625), (64, 1, 4 / 64)],
)
def test_dominant_is_four_times_even_or_halfway_to_every_token(
    experts: int, used: int, limit: float
) -> None:
    counts = torch.ones(experts, dtype=torch.int64)
    counts[2] = round(limit * 10_000)
    assert dominant(counts, 10_000, used) == []
    counts[2] += 1
    assert dominant(counts, 10_000, used) == [2]


def test_no_expert_dominates_where_every_token_takes_all() -> None:
    assert dominant(torch.full((4,), 100), 100, used=4) == []


def test_domains_with_experts_of_their_own_share_one_bit() -> None:
    counts = torch.tensor([[8, 0]] * 6 + [[0, 8]] * 6)
    found = specialisation(counts, torch.arange(12) // 6, ["code", "prose"])
    assert found.bits == pytest.approx(1.0)
    assert found.chance_bits < 0.3
    assert {(s.expert, s.domain, s.ratio) for s in found.specialists} == {
        (0, "code", 2.0),
        (1, "prose", 2.0),
    }
    assert found.domain_share["code"].tolist() == [1.0, 0.0]


def test_divergence_of_three_quarters_and_one() -> None:
    """H(½, ½) - H(¾, ¼) = 1 - 0.811278; the domains weigh alike, however long they are."""
    counts = torch.tensor([[300, 100], [1, 3]])
    found = specialisation(counts, torch.tensor([0, 1]), ["a", "b"])
    expected = 1 + 0.75 * math.log2(0.75) + 0.25 * math.log2(0.25)
    assert expected == pytest.approx(0.188722, abs=1e-6)
    assert found.bits == pytest.approx(expected)


def test_chance_is_the_mean_over_ways_to_label() -> None:
    """Two sequences use one expert, two the other. Of the three ways to halve them one has a bit
    of divergence, two have none."""
    counts = torch.tensor([[4, 0], [4, 0], [0, 4], [0, 4]])
    found = specialisation(counts, torch.tensor([0, 0, 1, 1]), ["a", "b"])
    assert found.chance_bits == pytest.approx(1 / 3, abs=0.1)
    assert found.specialists == ()  # one time in three by chance


def test_noise_is_not_specialisation() -> None:
    """Sequences of one distribution: positive bits, but no more than chance, and nobody named."""
    generator = torch.Generator().manual_seed(3)
    drawn = torch.multinomial(torch.ones(60, 32), 100, replacement=True, generator=generator)
    counts = torch.stack([row.bincount(minlength=32) for row in drawn])
    found = specialisation(counts, torch.arange(60) // 20, ["a", "b", "c"])
    assert found.bits > 0.005
    assert found.bits == pytest.approx(found.chance_bits, rel=0.3)
    assert found.specialists == ()


@pytest.mark.parametrize("domains", [2, 3, 6])
def test_sequences_that_it_takes_to_name_somebody(domains: int) -> None:
    """Domains with an expert each are told with four, and never with less."""
    names = [str(n) for n in range(domains)]
    for n in (1, 3, 4):
        labels = torch.arange(domains * n) // n
        counts = 8 * torch.nn.functional.one_hot(labels, domains)
        for seed in range(5):
            found = specialisation(counts, labels, names, seed)
            assert found.enough == (len(found.specialists) > 0) == (n == 4)


def partitions(items: frozenset[int], size: int) -> Iterator[list[frozenset[int]]]:
    """Every way to give `items` to domains of `size` each."""
    if not items:
        yield []
        return
    for first in map(frozenset, itertools.combinations(sorted(items), size)):
        for rest in partitions(items - first, size):
            yield [first, *rest]


@pytest.mark.parametrize(("domains", "each"), [(2, 3), (3, 3), (2, 4), (3, 4)])
def test_how_often_a_domain_s_sequences_stay_together(domains: int, each: int) -> None:
    """Counted over every way to label: with three each it is more than 1 in 20."""
    ways = list(partitions(frozenset(range(domains * each)), each))
    assert len(ways) == math.factorial(domains * each) / math.factorial(each) ** domains
    own = {frozenset(range(d * each, (d + 1) * each)) for d in range(domains)}
    together = sum(not own.isdisjoint(way) for way in ways) / len(ways)
    assert 0 < together <= domains**2 / math.comb(domains * each, each)
    assert (together <= 0.05) == (each >= LEAST_SEQUENCES)


def test_one_sequence_beside_many_names_nobody() -> None:
    counts = torch.tensor([[0, 8]] + [[8, 0]] * 60)
    labels = torch.tensor([0] + [1] * 60)
    assert specialisation(counts, labels, ["one", "many"]).specialists == ()


def test_one_sequence_per_domain_says_nothing() -> None:
    counts = torch.tensor([[8, 1, 3], [0, 8, 9], [2, 3, 1]])
    found = specialisation(counts, torch.arange(3), ["a", "b", "c"])
    assert found.bits == pytest.approx(found.chance_bits)
    assert found.specialists == ()


def test_a_single_domain_has_no_divergence() -> None:
    found = specialisation(torch.tensor([[8, 1], [0, 8]]), torch.zeros(2).long(), ["a"])
    assert (found.bits, found.chance_bits, found.specialists) == (0.0, 0.0, ())


@pytest.mark.parametrize("columns", [1, 8, 1 << 20])
def test_cosines_over_all_weights(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts (1, 0 | 1), (1, 1 | 0), (0, 0 | 0), (-2, 0 | -2): parts of two tensors."""
    monkeypatch.setattr("moequant.routing.measures._COLUMNS", columns)
    first = torch.tensor([[[1.0, 0]], [[1, 1]], [[0, 0]], [[-2, 0]]])
    second = torch.tensor([[[1.0]], [[0]], [[0]], [[-2]]])
    found = cosine_between_experts([first, second])
    assert found is not None
    assert found.mean == pytest.approx((0.5 - 1 - 0.5) / 6)
    assert (found.max, found.pair) == (pytest.approx(0.5), (0, 1))


def test_copies_have_a_cosine_of_one_and_a_single_expert_none() -> None:
    weight = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    weight[2] = weight[0]
    found = cosine_between_experts([weight])
    assert found is not None and found.pair == (0, 2)
    assert found.max == pytest.approx(1.0, abs=1e-6)
    assert cosine_between_experts([weight[:1]]) is None
