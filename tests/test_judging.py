"""Advice held against trained runs: the best cell, what another loses, and budgets in between."""

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
import pytest

from dspark_lab.tuning import (
    Shape,
    SweepConfig,
    choose_training,
    coverage_advice,
    fitted_cells,
    judge_advice,
    judged_table,
    recorded_step_time,
    taus_at,
)
from tests.samples import random_chats


def surface(seeds: int = 1, spread: float = 0.0, rows: Sequence[int] = (2, 8)) -> pd.DataFrame:
    """Runs whose tau has its peak at 16 anchors and seven slots, the higher the more rows."""
    every = product(rows, (4, 16, 96), (4, 7, 15), range(seeds))
    table = pd.DataFrame(every, columns=["batch_size", "num_anchors", "block_size", "seed"])
    peak = -((np.log(table["num_anchors"] / 16)) ** 2) - np.log(table["block_size"] / 7) ** 2
    noise = np.random.default_rng(0).normal(0, spread, len(table))
    tau = 2 * np.exp(0.1 * peak + noise) * table["batch_size"] ** 0.1
    return table.assign(budget="seconds", amount=20.0, mix="all", held_out=tau)


def test_the_best_cell_is_that_of_a_surface_through_all_cells():
    cells = fitted_cells(surface())
    assert len(cells) == 18 and cells["fitted"].tolist() == pytest.approx(cells["found"].tolist())
    (best,) = cells[cells["best"]].itertuples()
    assert (best.batch_size, best.num_anchors, best.block_size, best.seeds) == (8, 16, 7, 1)
    assert best.low == pytest.approx(best.high) == pytest.approx(2 * 8**0.1)
    # One lucky cell is no peak.
    lucky = surface()
    lucky.loc[0, "held_out"] = 2.6
    again = fitted_cells(pd.concat([lucky, surface().assign(mix="code")]))
    best = again[again["best"]]
    assert best["num_anchors"].tolist() == [16, 16] and best["mix"].tolist() == ["all", "code"]
    # As many coefficients as cells leave nothing to tell the error by.
    few = fitted_cells(surface().iloc[:2])
    assert few["low"].isna().all() and few["best"].sum() == 1


def test_the_interval_of_a_fitted_cell_is_that_of_least_squares():
    table = surface(seeds=3, spread=0.02, rows=(2,))
    table = table[table["block_size"] == 7]
    cells = fitted_cells(table)
    x, y = np.log(table["num_anchors"]), np.log(table["held_out"])
    coefficients, covariance = np.polyfit(x, y, 2, cov=True)
    for cell in cells.itertuples():
        powers = np.log(cell.num_anchors) ** np.array([2, 1, 0])
        centre, error = powers @ coefficients, math.sqrt(powers @ covariance @ powers)
        # The quantile for 9 - 3 degrees of freedom from a printed table.
        assert math.log(cell.fitted) == pytest.approx(centre)
        assert math.log(cell.high) == pytest.approx(centre + 2.4469 * error, abs=1e-6)
        assert math.log(cell.low) == pytest.approx(centre - 2.4469 * error, abs=1e-6)


def test_what_a_cell_loses_has_the_interval_of_a_difference():
    """On a line through log N: the difference of two fitted values, by numpy's covariance."""
    table = surface(seeds=3, spread=0.02, rows=(2,))
    table = table[table["block_size"] == 7]
    cells = fitted_cells(table).set_index("num_anchors")
    x, y = np.log(table["num_anchors"]), np.log(table["held_out"])
    coefficients, covariance = np.polyfit(x, y, 2, cov=True)
    best = cells.index[cells["best"]][0]
    assert cells.loc[best, ["lost", "lost_low", "lost_high"]].tolist() == [0, 0, 0]
    for anchors in {4, 16, 96} - {best}:
        powers = [np.log(n) ** np.array([2, 1, 0]) for n in (anchors, best)]
        apart = powers[0] - powers[1]
        behind, error = apart @ coefficients, math.sqrt(apart @ covariance @ apart)
        lost, low, high = cells.loc[anchors, ["lost", "lost_low", "lost_high"]]
        assert lost == pytest.approx(1 - math.exp(behind))
        assert low == pytest.approx(1 - math.exp(behind + 2.4469 * error), abs=1e-6)
        assert high == pytest.approx(1 - math.exp(behind - 2.4469 * error), abs=1e-6)


def ended(tau_of, amounts=(20.0, 60.0, 180.0), seeds: int = 1) -> pd.DataFrame:
    """Runs of four cells; a step of N anchors takes N hundredths of a second and has 4 N slots."""
    lines = []
    for amount, rows, anchors, seed in product(amounts, (2, 8), (4, 16), range(seeds)):
        steps = round(amount / (anchors / 100))
        line = {"budget": "seconds", "amount": amount, "mix": "all", "batch_size": rows}
        line |= {"num_anchors": anchors, "block_size": 7, "seed": seed, "steps": steps}
        line |= {"step_seconds": anchors / 100, "slots": 4 * anchors * steps}
        lines.append({**line, "held_out": tau_of(amount, rows, anchors, seed)})
    return pd.DataFrame(lines)


def advised(**given) -> pd.DataFrame:
    line = {"budget": "seconds", "amount": 60.0, "mix": "all", "batch_size": 8, "num_anchors": 4}
    line |= {"block_size": 7, "advisor": "mine", "spent": 0.0}
    return pd.DataFrame([line | given])


def test_tau_between_two_budgets_lies_on_a_line_through_logarithms():
    table = ended(
        lambda seconds, rows, anchors, seed: seconds ** (0.1 * rows) * (1 + seed), seeds=2
    )
    for seconds in (15, 20, 40, 100, 180, 260):
        found = taus_at(table, "seconds", seconds).set_index(["batch_size", "num_anchors"])
        for rows, anchors in product((2, 8), (4, 16)):
            # The geometric mean of the two seeds' 1 and 2.
            expected = seconds ** (0.1 * rows) * math.sqrt(2)
            assert found.loc[(rows, anchors), "held_out"] == pytest.approx(expected)
            assert found.loc[(rows, anchors), "steps"] == pytest.approx(seconds / (anchors / 100))
    # A kink at the middle budget is kept, and each end goes on with its own slope.
    kinked = ended(lambda seconds, *_: {20.0: 1.0, 60.0: 3.0, 180.0: 4.0}[seconds])
    last = math.log(4 / 3, 3)
    for at, (end, slope, budget) in {15: (1.0, 1.0, 20), 260: (4.0, last, 180)}.items():
        found = taus_at(kinked, "seconds", at)["held_out"]
        assert found.tolist() == pytest.approx([end * (at / budget) ** slope] * 4)


def test_a_cell_is_left_out_where_its_runs_do_not_reach():
    table = ended(lambda *_: 2.0)
    # 400 slots a second in each cell: 8,000 to 72,000 slots, and half as much beyond.
    assert len(taus_at(table, "slots", 5_400)) == 4 and taus_at(table, "slots", 5_300).empty
    assert len(taus_at(table, "slots", 107_000)) == 4 and taus_at(table, "slots", 109_000).empty
    assert taus_at(table[table["amount"] == 60], "seconds", 59.0).empty
    assert len(taus_at(table[table["amount"] == 60], "seconds", 60.0)) == 4
    slots = taus_at(table, "slots", 20_000)
    assert slots["slots"].tolist() == pytest.approx([20_000] * 4)
    assert slots["budget"].tolist() == ["slots"] * 4


def test_a_loss_is_against_the_best_of_its_setting_and_counts_the_time_that_was_spent():
    table = ended(lambda seconds, rows, anchors, seed: seconds**0.2 * (1.0 if rows == 8 else 0.9))
    (free,) = judge_advice(table, advised(batch_size=2)).to_dict("records")
    assert free["lost"] == pytest.approx(0.1) and free["best_batch_size"] == 8
    assert free["tau"] == pytest.approx(0.9 * 60**0.2) and free["lost_to_time"] == 0
    (paid,) = judge_advice(table, advised(batch_size=2, spent=15.0)).to_dict("records")
    assert paid["lost"] == pytest.approx(1 - 0.9 * 0.75**0.2)
    assert paid["lost_to_time"] == pytest.approx(0.9 * (1 - 0.75**0.2))
    slots = taus_at(table, "slots", 20_000)
    given = advised(budget="slots", amount=20_000.0, batch_size=2, spent=15.0)
    assert judge_advice(slots, given)["lost"].tolist() == pytest.approx([0.1])
    with pytest.raises(ValueError, match="table must hold every advised cell, got none for .*64"):
        judge_advice(table, advised(num_anchors=64))
    with pytest.raises(ValueError, match="spent must be less than the budget, 60.0, got 60.0"):
        judge_advice(table, advised(spent=60.0))
    with pytest.raises(ValueError, match="table must reach down to 5 seconds"):
        judge_advice(table, advised(amount=20.0, spent=15.0))


def test_fresh_seeds_decide_which_cell_is_the_best():
    """Two cells that one lucky seed had put in the wrong order."""
    table = ended(lambda seconds, rows, anchors, seed: 2.2 if rows == 8 else 2.0)
    taus = {8: [2.0, 2.1, 2.2], 2: [2.3, 2.2, 2.4]}
    fresh = ended(lambda seconds, rows, anchors, seed: taus[rows][seed], (60.0,), seeds=3)
    fresh = fresh[fresh["num_anchors"] == 4]
    (line,) = judge_advice(table, advised(), fresh=fresh).to_dict("records")
    logs = {rows: [math.log(tau) for tau in found] for rows, found in taus.items()}
    mean = {rows: sum(found) / 3 for rows, found in logs.items()}
    squares = sum((x - mean[rows]) ** 2 for rows, found in logs.items() for x in found)
    # Four degrees of freedom: 2.7764 from a printed table.
    half = 2.7764 * math.sqrt(squares / 4) * math.sqrt(2 / 3)
    behind = mean[8] - mean[2]
    assert line["best_batch_size"] == 2 and line["seeds"] == 3
    assert line["lost"] == pytest.approx(1 - math.exp(behind))
    assert line["low"] == pytest.approx(1 - math.exp(behind + half), abs=1e-5)
    assert line["high"] == pytest.approx(1 - math.exp(behind - half), abs=1e-5)
    # Whoever advises the best loses nothing; who is not among them is judged by the surface.
    other = judge_advice(table, advised(batch_size=2), fresh=fresh).iloc[0]
    assert other[["lost", "low", "high", "seeds"]].tolist() == [0, 0, 0, 3]
    alone = judge_advice(table, advised(num_anchors=16), fresh=fresh).iloc[0]
    assert alone["seeds"] == 0 and alone["lost"] == pytest.approx(0)
    with pytest.raises(ValueError, match="fresh must hold two seeds of a cell"):
        judge_advice(table, advised(), fresh=fresh[fresh["seed"] == 0])


def test_the_summary_names_the_worst_setting():
    judged = pd.DataFrame({"advisor": "mine", "budget": "seconds", "mix": "all", "spent": 1.0,
                           "amount": [20.0, 60.0, 180.0], "lost": [0.02, 0.09, 0.01]})  # fmt: skip
    (line,) = judged_table(judged).to_dict("records")
    assert (line["median"], line["worst"], line["where"]) == (0.02, 0.09, "all, 60 seconds")
    assert line["within"] == pytest.approx(2 / 3)
    # A median of three is below its least in none of 27 draws but those of it alone or twice.
    assert (line["low"], line["high"]) == (0.01, 0.09)


def test_the_old_advice_is_the_most_coverage_a_second_or_a_slot():
    chats = random_chats(12)
    table = ended(lambda *_: 2.0)
    found = coverage_advice(table, {"all": chats}, Shape.of("pocket"), SweepConfig.training)
    # Rows of twelve to forty tokens: four anchors cover nearly all, and sixteen take four times as
    # long; four times the rows cover more in the same time.
    assert found[["amount", "batch_size", "num_anchors"]].values.tolist() == [
        [20.0, 8, 4],
        [60.0, 8, 4],
        [180.0, 8, 4],
    ]
    assert found["advisor"].unique().tolist() == ["coverage"]
    slots = coverage_advice(
        taus_at(table, "slots", 20_000), {"all": chats}, Shape.of("pocket"), SweepConfig.training
    )
    assert slots["budget"].tolist() == ["slots"]


def test_recorded_step_times_are_a_line_over_operations_with_cached_features():
    chats, shape = random_chats(12), Shape.of("pocket")
    table, seconds = surface(seeds=2), []
    for line in table.itertuples():
        sizes = {"num_anchors": (line.num_anchors,), "block_sizes": (line.block_size,)}
        sizes |= {"batch_size": line.batch_size, "dtype": "bf16", "features": "cached"}
        counted = choose_training(chats, shape, time="H100", **sizes).table
        seconds.append(0.02 + 3e-11 * counted["operations"].item())
    mixes = {"all": chats}
    time = recorded_step_time(
        table.assign(step_seconds=seconds), mixes, shape, SweepConfig.training
    )
    assert time.seconds_per_step == pytest.approx(0.02)
    assert time.seconds_per_operation == pytest.approx(3e-11)
    # Each kind of step counts once.
    assert time.held_out == 18 and time.worst_error < 1e-6
