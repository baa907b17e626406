"""Scores of a confidence, against loops and scikit-learn.

The loops below are the definitions, one sample at a time.
"""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from dspark_lab.rates import auroc, brier, expected_calibration_error, reliability_table
from tests.traces import PROBABILITY, bins_by_hand, ece_by_hand


def samples(outcomes: st.SearchStrategy[float], low: int = 1):
    pairs = st.lists(st.tuples(PROBABILITY, outcomes), min_size=low, max_size=60)
    return pairs.map(lambda drawn: tuple(map(list, zip(*drawn, strict=True))))


def auroc_by_hand(confidence, outcome) -> float:
    """All pairs of an accepted and a rejected share, a tie half a win."""
    wins = pairs = 0.0
    for f, o in zip(confidence, outcome, strict=True):
        for g, p in zip(confidence, outcome, strict=True):
            weight = o * (1 - p)
            pairs += weight
            wins += weight * (1.0 if f > g else 0.5 if f == g else 0.0)
    return wins / pairs if pairs else math.nan


@given(drawn=samples(PROBABILITY, low=8), bins=st.integers(1, 8))
def test_bins_hold_their_samples_and_the_error_is_the_mean_gap_of_bins(drawn, bins) -> None:
    for binning in ("width", "mass"):
        table = reliability_table(*drawn, bins, binning)
        assert len(table) == bins and table["count"].sum() == len(drawn[0])
        assert (table["low"] <= table["high"]).all()
        assert (table["low"].to_numpy()[1:] == table["high"].to_numpy()[:-1]).all()
        edges = [table["low"][0], *table["high"]]
        error = expected_calibration_error(*drawn, bins, binning)
        assert error == pytest.approx(ece_by_hand(*drawn, edges), abs=1e-12)
        if binning == "width":
            assert edges == pytest.approx([k / bins for k in range(bins + 1)])
        for row, held in zip(table.itertuples(), bins_by_hand(*drawn, edges), strict=True):
            assert row.count == len(held)
            means = [sum(values) / len(held) for values in zip(*held, strict=True)]
            expected = [*means, means[0] - means[1]] if held else [math.nan] * 3
            found = [row.confidence, row.outcome, row.gap]
            assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)


@given(hundredths=st.lists(st.integers(0, 100), min_size=8, max_size=60), bins=st.integers(1, 8))
def test_bins_of_equal_mass_are_cut_at_the_exact_quantiles(hundredths, bins) -> None:
    """In fractions, and so without rounding, which lets a cut miss the sample that it falls on."""
    ordered = [Fraction(n, 100) for n in sorted(hundredths)]
    cuts = []
    for k in range(bins + 1):
        place = Fraction(k * (len(ordered) - 1), bins)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        cuts.append(low + (high - low) * (place - math.floor(place)))
    held = bins_by_hand(ordered, ordered, cuts)
    confidence = [n / 100 for n in hundredths]
    counts = reliability_table(confidence, confidence, bins, "mass")["count"]
    assert counts.tolist() == [len(samples) for samples in held]


def test_calibration_error_of_fewer_samples_than_bins_is_undefined() -> None:
    assert math.isnan(expected_calibration_error([0.5, 0.5], [0, 1], 3))
    assert expected_calibration_error([0.5, 0.5], [0, 1], 2) == 0
    with pytest.raises(ValueError, match="3 bins of equal mass need at least as many samples, got"):
        reliability_table([0.5, 0.5], [0, 1], 3, "mass")


@given(drawn=samples(st.integers(0, 1), low=8))
def test_brier_score_agrees_with_scikit_learn(drawn) -> None:
    confidence, outcome = drawn
    expected = brier_score_loss(outcome, confidence, pos_label=1, labels=[0, 1])
    assert brier(confidence, outcome) == pytest.approx(expected, abs=1e-12)


@given(drawn=samples(st.sampled_from([0, 0.25, 0.5, 1])))
def test_a_rate_counts_as_that_share_of_an_accepted_slot(drawn) -> None:
    confidence, outcome = drawn
    ours = auroc(confidence, outcome)
    assert ours == pytest.approx(auroc_by_hand(confidence, outcome), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("score", [reliability_table, expected_calibration_error, brier, auroc])
@pytest.mark.parametrize(
    ("confidence", "outcome", "words"),
    [
        ([0.5, 1.1], [0, 1], r"confidence must lie in \[0, 1\], got values from 0.5"),
        ([0.5, math.nan], [0, 1], "got 1 NaN of 2"),
        ([0.5, 0.5], [0, 2], r"outcome must lie in \[0, 1\]"),
        ([0.5, 0.5], [0], "as long, got 2 and 1"),
        ([], [], "one or more"),
        ([[0.5]], [[1]], r"\[sample\] with one or more, got shape \(1, 1\)"),
        (["0.5"], [1], "confidence must hold numbers"),
        ([0.5], [None], "outcome must hold numbers"),
    ],
)
def test_bad_input_is_refused_by_every_score(score, confidence, outcome, words) -> None:
    with pytest.raises(TypeError if "numbers" in words else ValueError, match=words):
        score(confidence, outcome)
