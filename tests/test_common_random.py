"""The law of the sampler of `dspark_lab.common`: which draw gives which anchors, and how often."""

import itertools
import random

import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from dspark_lab import common

pytestmark = pytest.mark.usefixtures("one_thread")


def full_sort(draw, candidates, num_anchors):
    """The anchors by a stable sort of the whole draw."""
    order = torch.sort(draw.masked_fill(~candidates, 2.0), dim=1, stable=True).indices
    width = draw.shape[1]
    kept = candidates.sum(1, keepdim=True).clamp(max=num_anchors)
    keep = torch.arange(num_anchors, device=draw.device) < kept
    chosen = order[:, :num_anchors]
    chosen = nn.functional.pad(chosen, (0, num_anchors - chosen.shape[1]), value=width)
    anchors = chosen.masked_fill(~keep, width).sort(dim=1).values
    return anchors.masked_fill(~keep, 0), keep


def assert_sorted(mask, num_anchors, drawn):
    """The anchors are those of a full sort of the numbers ``drawn()`` for them."""
    seq_len = mask.shape[1]
    anchors, keep = common.sample_anchor_positions(seq_len, mask, num_anchors, mask.device)
    candidates = common.build_anchor_candidate_mask(seq_len, mask)
    expected_anchors, expected_keep = full_sort(drawn(), candidates, num_anchors)
    assert torch.equal(anchors, expected_anchors)
    assert torch.equal(keep, expected_keep)


def random_mask(batch, seq_len, density, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(batch, seq_len, generator=rng) < density


SIZES = [
    (4, 2, 1, 1.0),
    (3, 17, 16, 1.0),
    (3, 17, 64, 0.9),
    (2, 1025, 1, 0.5),
    (5, 4096, 512, 0.6),
    (2, 4097, 4096, 1.0),
    (2, 5000, 4999, 0.9),
    (3, 65536, 1536, 0.3),
    (1, 200_000, 3000, 0.8),
    (300, 40, 7, 0.7),
]


@pytest.mark.parametrize(("batch", "seq_len", "num_anchors", "density"), SIZES)
def test_anchors_match_a_full_sort_at_every_size(batch, seq_len, num_anchors, density):
    mask = random_mask(batch, seq_len, density)
    torch.manual_seed(11)
    draw = torch.rand(batch, seq_len - 1)
    torch.manual_seed(11)
    assert_sorted(mask, num_anchors, lambda: draw)


# A GPU's draws have bits below 2**-24; an order that rounds them away is another order.
FINE = 2.0**-20


@pytest.mark.parametrize("steps", [1, 2, 16, 1024, None])
@pytest.mark.parametrize(
    ("seq_len", "num_anchors"), [(9, 3), (40, 20), (2000, 1), (2000, 700), (70_000, 900)]
)
def test_equal_draws_go_to_the_lower_position_and_fine_ones_keep_their_order(
    steps, seq_len, num_anchors, monkeypatch
):
    real, draws = torch.rand, []
    mask = random_mask(3, seq_len, 0.8, seed=1)

    def changed(*args, **kwargs):
        draw = real(*args, **kwargs)
        draws.append((draw * steps).floor() / steps if steps else draw * FINE)
        return draws[-1]

    monkeypatch.setattr(torch, "rand", changed)
    assert_sorted(mask, num_anchors, draws.pop)
    assert not draws


def test_a_draw_of_almost_one_still_beats_a_position_that_is_no_candidate(monkeypatch):
    """The largest draw is 1 - 2**-24; a filler at or below it would be drawn in its place."""
    top = 1 - 2.0**-24
    real = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: real(*size, **kw).fill_(top))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0]])
    anchors, keep = common.sample_anchor_positions(8, mask, 3, "cpu")
    assert anchors.tolist() == [[3, 4, 0]]
    assert keep.tolist() == [[True, True, False]]


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 2), (2, 7), (3, 40), (2, 0), (2, 1)])
def test_sampling_uses_up_exactly_one_draw(batch, seq_len, density):
    mask = random_mask(batch, seq_len, density)
    torch.manual_seed(5)
    if seq_len > 1:
        torch.rand(batch, seq_len - 1)
    expected = torch.rand(4)
    torch.manual_seed(5)
    common.sample_anchor_positions(seq_len, mask, 3, "cpu")
    assert torch.equal(torch.rand(4), expected)


# Uniformity. The seed is fixed, so the test cannot flake; a uniform sampler with another seed
# would be rejected once in ten thousand.

ERROR_RATE = 1e-4
TRIALS = 21_000


def chance_if_uniform(drawn, positions):
    """The chi-square test's p-value, from how often each pair of positions was drawn."""
    seen = dict.fromkeys(itertools.combinations(positions, 2), 0)
    for pair in drawn:
        seen[tuple(pair)] += 1
    return chisquare(list(seen.values())).pvalue


def test_every_set_of_anchors_is_equally_likely():
    row = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 0]])
    torch.manual_seed(1)
    anchors, keep = common.sample_anchor_positions(13, row.expand(TRIALS, 13), 2, "cpu")
    assert keep.all()
    assert chance_if_uniform(anchors.tolist(), [0, 3, 4, 5, 9, 10]) > ERROR_RATE


def test_the_chi_square_rejects_a_sampler_that_leans_to_the_left():
    """A sampler without replacement whose first position is 10% too likely."""
    pairs = list(itertools.combinations(range(6), 2))
    weights = [1.1 if 0 in pair else 1.0 for pair in pairs]
    drawn = random.Random(0).choices(pairs, weights, k=TRIALS)
    assert chance_if_uniform(drawn, range(6)) < ERROR_RATE
