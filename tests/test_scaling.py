"""Sequential temperature scaling, against loops.

The loops below are the definitions, one round at a time. Where a test draws at random its seed is
fixed, and the chance that a right implementation fails over seeds is said beside it.
"""

import linecache
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_lab.decoding import rounds_of
from dspark_lab.model import CALIBRATION
from dspark_lab.rates import (
    TEMPERATURE_GRID,
    SequentialTemperatures,
    online_temperatures,
    prefix_survival,
    temperature_scale,
)
from tests.traces import PROBABILITY, RAGGED, ece_by_hand


@given(values=st.lists(PROBABILITY, min_size=2, max_size=30), temperature=st.floats(0.2, 5.0))
def test_scaling_keeps_the_order_of_a_slots_confidences(values, temperature) -> None:
    ordered = np.sort(np.array(values))
    scaled = temperature_scale(ordered, temperature)
    assert (np.diff(scaled) >= 0).all()
    assert ((scaled >= 0) & (scaled <= 1)).all()
    for f, g in zip(ordered, scaled, strict=True):
        if 0 < f < 1:
            expected = 1 / (1 + ((1 - f) / f) ** (1 / temperature)) if f > 1e-60 else 0
            assert g == pytest.approx(expected, rel=1e-6, abs=1e-9)
        else:
            assert g == f
    with pytest.raises(ValueError, match=r"confidence must lie in \[0, 1\]"):
        temperature_scale([*values, 1.2], temperature)


def test_scaling_goes_slot_by_slot_and_lets_unknown_ones_be() -> None:
    scaling = SequentialTemperatures((0.5, 2.0, 1.0))
    confidence = np.array([[[0.8, 0.8, 0.8]], [[0.3, np.nan, 1.0]]])
    scaled = scaling.apply(confidence)
    assert scaled.shape == (2, 1, 3)
    assert scaled[0, 0].tolist() == pytest.approx([16 / 17, 2 / 3, 0.8])
    assert math.isnan(scaled[1, 0, 1]) and scaled[1, 0, 2] == 1
    assert scaling.apply(confidence[..., :2]).shape == (2, 1, 2)
    with pytest.raises(ValueError, match="1 to 3 slots"):
        scaling.apply(np.full((2, 4), 0.5))


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, math.nan]), min_size=4, max_size=4))
def test_survival_is_the_product_and_a_rejection_settles_it(outcome) -> None:
    [survival] = prefix_survival(np.array([outcome]))
    expected = [0.0 if 0.0 in outcome[:k] else math.prod(outcome[:k]) for k in range(1, 5)]
    assert survival.tolist() == pytest.approx(expected, nan_ok=True)


def nearest_to_1(grid, errors) -> float:
    least = min(errors)
    best = [t for t, e in zip(grid, errors, strict=True) if e <= least + 1e-9]
    return min(best, key=lambda t: abs(math.log(t)))


def product_by_hand(f_row, temperatures) -> float:
    """The product of scaled confidences, as far as there are temperatures."""
    product = 1.0
    for f, t in zip(f_row, temperatures, strict=False):
        product *= 1 / (1 + math.exp(-math.log(f / (1 - f)) / t))
    return product


def fit_by_hand(confidence, outcome, grid, bins, given=()) -> list[float]:
    """Sequential temperature scaling, one round, slot and temperature at a time.

    Slots in ``given`` have the temperature that it says.
    """
    edges = [k / bins for k in range(bins + 1)]
    found: list[float] = []
    for slot in range(len(confidence[0])):
        if slot in given:
            found.append(given[slot])
            continue
        known = [
            (f_row, 0.0 if 0 in o_row[: slot + 1] else math.prod(o_row[: slot + 1]))
            for f_row, o_row in zip(confidence, outcome, strict=True)
        ]
        known = [(f_row, survival) for f_row, survival in known if not math.isnan(survival)]
        lived = [survival for _, survival in known]
        errors = []
        for temperature in grid:
            products = [product_by_hand(f_row, [*found, temperature]) for f_row, _ in known]
            errors.append(ece_by_hand(products, lived, edges))
        found.append(nearest_to_1(grid, errors))
    return found


def blocks(seed: int, rounds: int, slots: int = 3):
    """True accept rates of every slot, and what came of it: 0 or 1 while reached, else NaN."""
    rng = np.random.default_rng(seed)
    rate = rng.beta(6, 2, (rounds, slots))
    accepted = np.logical_and.accumulate(rng.random(rate.shape) < rate, axis=1)
    outcome = accepted.astype(float)
    outcome[:, 1:][~accepted[:, :-1]] = np.nan
    return rate, outcome


@pytest.mark.filterwarnings("ignore:.*at the end of the grid")
@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_the_search_from_left_to_right(seed) -> None:
    rate, outcome = blocks(seed, 120)
    confidence = temperature_scale(rate, [0.6, 1.7, 0.8])
    # The end of an answer: what came of the last slots is unknown.
    outcome[::7, 2] = np.nan
    outcome[::21, 1:] = np.nan
    grid = [0.4, 0.55, 0.7, 0.9, 1.2, 1.5, 1.9, 2.4]
    ours = SequentialTemperatures.fit(confidence, outcome, grid=grid, bins=5)
    assert list(ours.temperatures) == pytest.approx(fit_by_hand(confidence, outcome, grid, 5))


def test_a_round_counts_up_to_its_first_unknown_confidence() -> None:
    rate, outcome = blocks(8, 200)
    confidence = temperature_scale(rate, 0.6)
    some = np.flatnonzero(outcome[:, 0] == 1)[:40]
    unseen, unpredicted = outcome.copy(), confidence.copy()
    unseen[some, 1:] = np.nan
    unpredicted[some, 1] = np.nan
    fit = SequentialTemperatures.fit(unpredicted, outcome)
    assert fit == SequentialTemperatures.fit(confidence, unseen)


DISTORTED = np.array([0.6, 1.8, 1.0, 2.5])


def test_known_temperatures_are_recovered_from_rates_to_one_step_of_the_grid() -> None:
    rate, _ = blocks(0, 4000, 4)
    confidence = temperature_scale(rate, 1 / DISTORTED)
    fit = SequentialTemperatures.fit(confidence, rate)
    # The grid's steps are 2 %.
    assert list(fit.temperatures) == pytest.approx(list(DISTORTED), rel=0.021)
    assert fit.apply(confidence) == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_known_temperatures_are_recovered_from_outcomes(binning) -> None:
    """Of 20,000 rounds. The errors' deviation over other seeds is 2, 3, 5 and 6 %.

    What is allowed is more than four times as much: a chance below 1e-3 that a seed fails.
    """
    rate, outcome = blocks(1, 20_000, 4)
    confidence = temperature_scale(rate, 1 / DISTORTED)
    fit = SequentialTemperatures.fit(confidence, outcome, binning=binning)
    off = np.abs(np.log(np.array(fit.temperatures) / DISTORTED))
    assert (off <= np.log([1.1, 1.15, 1.25, 1.3])).all()


def test_a_trace_is_fitted_on_what_it_accepted() -> None:
    rounds = rounds_of(RAGGED)
    expected = SequentialTemperatures.fit(rounds.confidence, rounds.outcome(), bins=10)
    assert SequentialTemperatures.fit_trace(RAGGED, bins=10) == expected
    assert SequentialTemperatures.fit_trace(rounds, bins=10) == expected
    with pytest.raises(ValueError, match="confidence must be a number in every row"):
        SequentialTemperatures.fit_trace(RAGGED.assign(confidence=math.nan))


def test_the_grid_has_1_in_its_middle_and_ties_go_to_the_temperature_nearest_to_it() -> None:
    certain = np.tile([[0.0], [1.0]], (20, 1))
    outcome = np.tile([[0.0], [1.0], [1.0], [1.0]], (10, 1))
    for grid in ([0.5, 1.1, 4.0], [4.0, 1.1, 0.5]):
        fit = SequentialTemperatures.fit(certain, outcome, grid=grid)
        assert fit.temperatures == (1.1,)
    grid = np.array(TEMPERATURE_GRID)
    assert grid[len(grid) // 2] == 1 and (np.diff(grid) > 0).all()
    assert grid[0] == pytest.approx(0.2) and grid[-1] == pytest.approx(5)


def test_a_non_identifiable_slot_is_refused() -> None:
    rate, outcome = blocks(4, 200)
    with pytest.raises(ValueError, match="slot 0: 10 rounds with a known survival, 15 are needed"):
        SequentialTemperatures.fit(rate[:10], outcome[:10])
    fit = SequentialTemperatures.fit(rate[:10], outcome[:10], otherwise=0.7)
    assert fit.temperatures == (0.7, 0.7, 0.7)
    never = outcome.copy()
    never[:, 1] = np.where(np.isnan(never[:, 1]), np.nan, 0)
    never[:, 2] = np.nan
    with pytest.raises(ValueError, match="slot 1: survival is 0 in all of its 200 rounds"):
        SequentialTemperatures.fit(rate, never)
    with pytest.raises(ValueError, match="slot 0: survival is 1 in all"):
        SequentialTemperatures.fit(rate, np.ones_like(rate))


def test_non_identifiable_slots_leave_the_others_as_they_are_found() -> None:
    """Slot 0 always survives, slot 3 is never reached: known are the rounds rejected earlier."""
    rate, outcome = blocks(4, 200, 4)
    confidence = temperature_scale(rate, 0.6)
    outcome[:, 0], outcome[:, 3] = 1, np.nan
    options = {"grid": [0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.7, 2.0], "bins": 5}
    fit = SequentialTemperatures.fit(confidence, outcome, otherwise=1.6, **options)
    expected = fit_by_hand(confidence, outcome, **options, given={0: 1.6, 3: 1.6})
    assert list(fit.temperatures) == pytest.approx(expected)


def test_a_choice_at_the_end_of_the_grid_is_warned_of_in_the_line_that_asked_for_the_fit() -> None:
    rate, _ = blocks(4, 200)
    narrow = temperature_scale(rate[:, :1], 0.4)
    grid = [0.8, 1.0, 1.2]
    words = "the best temperature, 1.2, is at the end of the grid"
    with pytest.warns(UserWarning, match=f"slot 0: {words}") as caught:
        SequentialTemperatures.fit(narrow, rate[:, :1], grid=grid)
    [warning] = caught
    assert "fit(narrow" in linecache.getline(warning.filename, warning.lineno)
    with pytest.warns(UserWarning, match=words) as caught:
        SequentialTemperatures.fit_trace(RAGGED, grid=grid)
    for warning in caught:
        assert "fit_trace(RAGGED" in linecache.getline(warning.filename, warning.lineno)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SequentialTemperatures.fit(rate, np.ones_like(rate), otherwise=1.2, grid=grid)


@pytest.mark.parametrize(
    ("confidence", "outcome", "words"),
    [
        (np.full((20, 2), 1.5), np.ones((20, 2)), r"confidence must lie in \[0, 1\]"),
        (np.full((20, 2), 0.5), np.ones((20, 3)), "one shape"),
        (np.full(20, 0.5), np.ones(20), r"\[round, slot\]"),
        (np.empty((0, 2)), np.empty((0, 2)), r"\[round, slot\] with one or more"),
    ],
)
def test_arrays_that_are_no_rounds_are_refused(confidence, outcome, words) -> None:
    with pytest.raises(ValueError, match=words):
        SequentialTemperatures.fit(confidence, outcome)
    with pytest.raises(ValueError, match=words):
        online_temperatures(confidence, outcome, half_life=10)


def test_what_is_no_temperature_is_refused() -> None:
    with pytest.raises(ValueError, match="one or more numbers, got none"):
        SequentialTemperatures(())
    with pytest.raises(ValueError, match="grid must be one or more positive temperatures"):
        SequentialTemperatures.fit(np.full((20, 1), 0.5), np.ones((20, 1)), grid=[0.0, 1.0])
    with pytest.raises(ValueError, match="temperatures must be positive and finite"):
        temperature_scale([0.5], 0.0)


def test_temperatures_come_back_from_beside_the_drafter(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    scaling = SequentialTemperatures((0.1 + 0.2, 1.0, 2.5))
    SequentialTemperatures((9.0,)).save(tmp_path)
    scaling.save(tmp_path)
    assert SequentialTemperatures.load(tmp_path) == scaling
    assert sorted(path.name for path in tmp_path.iterdir()) == [CALIBRATION, "config.json"]
    with pytest.raises(ValueError, match="an existing folder"):
        scaling.save(tmp_path / "missing")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "must be a JSON file"),
        ("{}", "must be of method 'sequential_temperature_scaling', got None"),
        ('{"method": "platt", "temperatures": [1.0]}', "got 'platt'"),
        ('{"method": "sequential_temperature_scaling", "temperatures": [0.0]}', "must be > 0"),
        ('{"method": "sequential_temperature_scaling", "temperatures": [null]}', "got None"),
        ('{"method": "sequential_temperature_scaling", "temperatures": "1"}', "must list"),
    ],
)
def test_a_file_that_holds_no_temperatures_is_refused_by_name(tmp_path, content, words) -> None:
    with pytest.raises(FileNotFoundError):
        SequentialTemperatures.load(tmp_path)
    (tmp_path / CALIBRATION).write_text(content)
    with pytest.raises(ValueError, match=f"{CALIBRATION} .*{words}"):
        SequentialTemperatures.load(tmp_path)


def online_by_hand(confidence, outcome, half_life, every, grid, bins) -> list[list[float]]:
    """A search over all rounds before, each weighed by its age."""
    rounds, slots = confidence.shape
    current = [1.0] * slots
    rows = []
    for now in range(rounds):
        if now % every == 0 and now >= bins:
            weights = [0.5 ** ((now - 1 - i) / half_life) for i in range(now)]
            survival = prefix_survival(outcome[:now])
            for slot in range(slots):
                if len(set(survival[:, slot])) == 1:
                    continue
                errors = []
                for t in grid:
                    gaps = [0.0] * bins
                    for i in range(now):
                        p = product_by_hand(confidence[i], [*current[:slot], t])
                        gap = p - survival[i, slot]
                        gaps[max(math.ceil(p * bins) - 1, 0)] += weights[i] * gap
                    errors.append(sum(map(abs, gaps)))
                current[slot] = nearest_to_1(grid, errors)
        rows.append(list(current))
    return rows


def test_online_scaling_is_a_weighted_search_on_earlier_rounds_alone() -> None:
    rate, outcome = blocks(5, 60, 2)
    confidence = temperature_scale(rate, 0.5)
    grid = [0.4, 0.6, 0.9, 1.3, 1.8, 2.6]
    options = {"half_life": 12.0, "every": 10, "grid": grid, "bins": 4}
    ours = online_temperatures(confidence, outcome, **options)
    assert ours.tolist() == online_by_hand(confidence, outcome, 12.0, 10, grid, 4)
    # Nothing that comes later can change what was in force.
    changed = outcome.copy()
    changed[40:] = [1.0, 1.0]
    again = online_temperatures(confidence, changed, **options)
    assert (again[:41] == ours[:41]).all()


def test_online_scaling_begins_at_the_start_and_keeps_non_identifiable_slots() -> None:
    rate, _ = blocks(6, 50, 2)
    start = SequentialTemperatures((1.5, 0.7))
    ours = online_temperatures(rate, np.ones_like(rate), half_life=9, every=5, start=start)
    assert (ours == [1.5, 0.7]).all()
    start = SequentialTemperatures((1.0,))
    with pytest.raises(ValueError, match="1 to 1 slots"):
        online_temperatures(rate, np.ones_like(rate), half_life=9, start=start)
