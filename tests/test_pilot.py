"""Pilots: what is known before them, which are run, what their results say, and the real ones."""

import dataclasses
import json
import math
import re
import shlex
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.files import write_json
from dspark_lab.training import TrainConfig
from dspark_lab.training.__main__ import main as train_main
from dspark_lab.tuning import (
    GROWTH,
    Contest,
    Growth,
    Pilot,
    TrainingSettings,
    block_loss,
    decide,
    evaluation_steps,
    fit_growth,
    next_pilots,
    pilot,
    pilot_allowance,
    pilots,
    race,
    replay_pilot,
    runs,
    shipped_noise,
)
from dspark_lab.tuning import growth as growing
from dspark_lab.tuning.extrapolation import Forecast
from dspark_lab.tuning.progress import EXPONENT
from tests.runs import target_on_disk

CELLS = ["batch_size", "num_anchors", "block_size"]


@pytest.fixture(autouse=True)
def short_pilots(monkeypatch: Any) -> int:
    """Pilots of these small runs may end after any step; returns how many are needed else."""
    least = race.PILOT_STEPS
    monkeypatch.setattr(race, "PILOT_STEPS", 1)
    return least


def options(*cells: tuple[int, int, int]) -> pd.DataFrame:
    """Steps that take the longer the more slots they have, and are the less noisy."""
    table = pd.DataFrame(cells or list(product((2, 8), (4, 32), (4, 15))), columns=CELLS)
    slots = table.prod(axis=1)
    table["seconds"] = 0.1 + 0.002 * slots
    table["noise"] = (16 + 125 / table["num_anchors"]) / table["batch_size"]
    table["rate"] = 1 / (1 + table["noise"]) / table["seconds"]
    return table.assign(low=table["rate"] / 1.1, high=table["rate"] * 1.1)


def run_lines(steps: int, tau: float, label: int = 0) -> pd.DataFrame:
    """The evaluations of a run on its straight way to a tau; the label is where a fake reads it."""
    table = pd.DataFrame({"step": evaluation_steps(steps, 12)})
    table["tau"] = 1 + (tau - 1) * table["step"] / steps
    table["survival"] = [[one - 1] for one in table["tau"]]
    run = {"steps": steps, "learning_rate": 1e-3, "warmup_steps": 1, "blocks": label}
    return table.assign(kind="held_out", domain="all", **run)


class World:
    """Options whose final tau is known, and forecasts that are off by what they say."""

    def __init__(self, seed: int, table: pd.DataFrame, budget: float, **others: Any) -> None:
        rng = np.random.default_rng(seed)
        self.contest = Contest(table, budget, pilot_allowance(budget), **others)
        mean, covariance = GROWTH.predict(table, (budget / table["seconds"]).to_numpy())
        self.log_tau = np.maximum(rng.multivariate_normal(mean, covariance), 0.01)
        self.seed = seed

    def pilot(self, label: int, share: float) -> Pilot:
        lines = run_lines(int(self.contest.steps[label]), math.exp(self.log_tau[label]), label)
        return Pilot(share, lines)

    def extrapolate(self, lines: pd.DataFrame, rates: Any, reference: Any = None) -> Forecast:
        share = lines["step"].iloc[-1] / len(rates)
        error = race.pilot_error(min(share, 0.99))
        drawn = np.random.default_rng([self.seed, int(lines["blocks"].iloc[0]), len(lines)])
        tau = math.exp(self.log_tau[int(lines["blocks"].iloc[0])] + error * drawn.normal())
        return forecast(tau, error, len(rates))

    def play(self, monkeypatch: Any, order: int = 0, extra: bool = False) -> dict[int, Pilot]:
        """Run what is asked for, one pilot after the other; ``order`` shuffles them."""
        monkeypatch.setattr(race, "extrapolate", self.extrapolate)
        rng = np.random.default_rng(order)
        begun: dict[int, Pilot] = {}
        if extra:
            begun = {label: self.pilot(label, 0.9) for label in self.contest.options.index[::2]}
        while todo := next_pilots(self.contest, begun):
            label = int(rng.choice(list(todo)))
            begun[label] = self.pilot(label, todo[label])
        return begun


def forecast(tau: float, error: float, steps: int = 10) -> Forecast:
    half = math.exp(1.645 * error)
    table = pd.DataFrame({"step": [steps], "tau": [tau], "low": [tau / half], "high": [tau * half]})
    rest = (0.0, 0.0, 0.0, False, table, pd.DataFrame(), "", "")
    return Forecast(tau, tau / half, tau * half, 0.9, "held_out", steps, steps, *rest)


def test_pilots_may_have_a_share_of_the_budget_and_of_short_ones_half_a_minute():
    assert pilot_allowance(3600) == 540 and pilot_allowance(200) == 30
    assert pilot_allowance(180) == pilot_allowance(134) == 30
    assert pilot_allowance(20) == pytest.approx(4.5) and pilot_allowance(100, 0.0) == 0
    assert pilot_allowance(1000, 0.1) == 100 and pilot_allowance(100, 0.1) == 15


def expected_logit(coefficients: list[float], steps: float, noise: float, slots: float) -> float:
    """The sentence of growth.py, a term a line."""
    a, b, *c, d, e, f, g = coefficients
    x, v, k = math.log(steps / 500), math.log((1 + noise) / 5), math.log(slots / 7)
    for break_, at in zip(c, (100, 200, 500, 1500), strict=True):
        a += break_ * max(0.0, math.log(steps / at))
    return a + b * x + d * v + e * x * v + f * k + g * x * k


def tau_of(probability: float, slots: int) -> float:
    return sum(probability**k for k in range(slots + 1))


def test_tau_grows_as_the_curve_says():
    table, coefficients = options(), [0.1, 0.8, 0.3, -0.5, -0.1, 0.2, -0.4, 0.05, 0.2, -0.03]
    steps = np.array([2, 30, 100, 500, 900, 3000, 7000, 20_000], dtype=float)
    known = Growth(np.array(coefficients), np.zeros((10, 10)), 0.1)
    mean, covariance = known.predict(table, steps)
    slopes = known.slope(table, steps)
    for place, option in enumerate(table.itertuples()):
        around = []
        for shift, stretch in ((0, 1), (1e-3, 1), (0, math.exp(1e-3))):
            logit = expected_logit(
                coefficients, steps[place] * stretch, option.noise, option.block_size
            )
            probability = 1 / (1 + math.exp(-logit - shift))
            around.append(math.log(tau_of(probability, option.block_size)))
        here, by_logit, by_steps = around
        assert mean[place] == pytest.approx(here)
        spread = 0.1 * (by_logit - here) / 1e-3
        assert covariance[place, place] == pytest.approx(spread**2, rel=1e-2)
        assert slopes[place] == pytest.approx((by_steps - here) / 1e-3, rel=1e-2)
    assert not covariance[~np.eye(len(table), dtype=bool)].any()


@given(st.floats(-8, 8), st.integers(1, 40))
def test_a_tau_stands_for_one_probability_of_all_slots(logit: float, slots: int):
    tau = tau_of(1 / (1 + math.exp(-logit)), slots)
    found = growing.logit_of(np.array([tau]), np.array([float(slots)]))
    assert growing.tau_at(np.array([logit]), np.array([float(slots)])) == pytest.approx(tau)
    assert growing.tau_at(found, np.array([float(slots)])) == pytest.approx(tau)


def ended_runs(mixes: dict[str, list[float]], spread: float) -> pd.DataFrame:
    """Ends of runs that lie about the curve, each mix with coefficients of its own."""
    rng, lines = np.random.default_rng(0), []
    cells = product(mixes, (2, 8), (4, 16, 96), (4, 7, 15), (200.0, 600.0, 1800.0))
    for mix, rows, anchors, size, amount in cells:
        (option,) = options((rows, anchors, size)).itertuples()
        steps = round(amount / option.seconds)
        logit = expected_logit(mixes[mix], steps, option.noise, size)
        tau = tau_of(1 / (1 + math.exp(-logit - spread * rng.normal())), size)
        line = {"budget": "seconds", "amount": amount, "mix": mix, "seed": 0, "steps": steps}
        line |= dict(zip(CELLS, (rows, anchors, size), strict=True)) | {"noise": option.noise}
        line |= {"step_seconds": option.seconds, "kind": "held_out", "domain": "all"}
        lines.append(line | {"step": steps, "tau": tau})
    return pd.DataFrame(lines)


def with_all_columns(runs: pd.DataFrame) -> pd.DataFrame:
    from dspark_lab.tuning import results

    return runs.reindex(columns=list(dict.fromkeys([*results._SETTINGS, *results._LINE])))


def test_growth_is_learned_from_the_runs_of_other_data():
    true = np.array([0.3, 0.9, 0.2, -0.5, -0.3, 0.0, -0.7, -0.2, 0.2, 0.05])
    own = np.zeros(10)
    own[[0, 6, 8]] = 0.25, 0.1, -0.1
    mixes = {"one": list(true + own), "two": list(true - own)}
    runs = with_all_columns(ended_runs(mixes, 0.05))
    progress = ended_runs(mixes, 0.05)[[*CELLS, "noise"]].drop_duplicates()
    before = np.sqrt(np.diag(GROWTH.covariance))
    for mix, coefficients in [*mixes.items(), (None, true), ("three", true)]:
        found = fit_growth(runs, progress, mix=mix)
        error = np.sqrt(np.diag(found.covariance))
        # Ten intervals of three standard deviations, with the seed that there is.
        assert (np.abs(found.mean - coefficients) < 3 * error).all()
        assert (error < before).all()
        # Of new data, others say less than half of what these have of their own.
        new = mix not in mixes
        assert ((before / error)[[0, 6, 8]] < 2**0.5).all() == new
        assert ((before / error)[[0, 6, 8]] > 2).all() == (not new)
        assert 0.04 < found.residual < 0.07
        both = runs[["mix", *CELLS]].drop_duplicates().merge(progress)
        np.testing.assert_allclose(fit_growth(runs, both, mix=mix).mean, found.mean)
    with pytest.raises(ValueError, match="progress must hold the options of runs"):
        fit_growth(runs, options((3, 3, 3)))


def test_the_growth_of_a_mix_is_that_of_normal_equations():
    rng = np.random.default_rng(3)
    lines = ended_runs({name: list(rng.normal(GROWTH.mean, 0.05)) for name in "ab"}, 0.1)
    lines = lines.sample(7, random_state=0)
    progress = lines[[*CELLS, "noise"]].drop_duplicates()
    found = fit_growth(with_all_columns(lines), progress, mix="b")
    # Unknown: ten common coefficients, and three by which each of two mixes differs from them.
    variance = np.diag(GROWTH.covariance).copy()
    variance[[0, 6, 8]] /= 2
    prior = np.concatenate([variance, variance[[0, 6, 8]], variance[[0, 6, 8]]])
    precision, right = np.diag(1 / prior), np.concatenate([GROWTH.mean / variance, np.zeros(6)])
    for line in lines.to_dict("records"):
        unit = np.eye(10)
        terms = [
            expected_logit(list(one), line["steps"], line["noise"], line["block_size"])
            for one in unit
        ]
        row = np.zeros(16)
        row[:10] = terms
        first = 10 if line["mix"] == "a" else 13
        row[first : first + 3] = np.array(terms)[[0, 6, 8]]
        sizes = np.array([float(line["block_size"])])
        (aim,) = growing.logit_of(np.array([line["tau"]]), sizes)
        precision += np.outer(row, row) / found.residual**2
        right += row * aim / found.residual**2
    covariance = np.linalg.inv(precision)
    mean, to_b = covariance @ right, np.eye(10, 16)
    to_b[[0, 6, 8], [13, 14, 15]] = 1
    np.testing.assert_allclose(found.mean, to_b @ mean, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.covariance, to_b @ covariance @ to_b.T, atol=1e-9)


def test_estimates_and_what_was_known_before_are_joined_as_gaussians():
    rng = np.random.default_rng(1)
    root = rng.normal(size=(4, 4))
    mean, covariance = rng.normal(size=4), root @ root.T
    seen, errors, found = [0, 2], np.array([0.5, 0.8]), np.array([1.0, -1.0])
    before = race.Beliefs(mean, covariance, np.ones(4), np.ones(4))
    together = np.array([0.3, 0.6])
    after = before.given(seen, found, errors, together)
    # All six at once: four values, and two estimates with an error in common.
    joint = np.zeros((6, 6))
    joint[:4, :4] = covariance
    for i, one in enumerate(seen):
        joint[4 + i, :4] = joint[:4, 4 + i] = covariance[one]
        for j, other in enumerate(seen):
            shared = together[i] * together[j]
            own = errors[i] ** 2 if i == j else 0.0
            joint[4 + i, 4 + j] = covariance[one, other] + shared + own
    precision = np.linalg.inv(joint)
    left = np.linalg.inv(precision[:4, :4])
    expected = mean - left @ precision[:4, 4:] @ (found - mean[seen])
    np.testing.assert_allclose(after.mean, expected)
    np.testing.assert_allclose(after.covariance, left, atol=1e-12)
    drawn = after.draws()
    np.testing.assert_allclose(drawn.mean(axis=0), after.mean, atol=0.15)
    np.testing.assert_allclose(np.cov(drawn.T), after.covariance, atol=0.3)


def test_choosing_after_an_estimate_gains_what_the_formula_of_two_normals_says():
    mean, covariance = np.array([0.2, 0.0]), np.diag([0.1, 0.3]) ** 2
    before = race.Beliefs(mean, covariance, np.ones(2), np.ones(2))
    errors = np.array([0.2, 0.2])
    gain = before.expected_gain([0, 1], errors)
    # The difference of the two posterior means is a normal with this variance.
    moved = covariance @ np.linalg.inv(covariance + np.diag(errors**2)) @ covariance
    deviation = math.sqrt(moved[0, 0] + moved[1, 1] - 2 * moved[0, 1])
    normal = NormalDist()
    expected = deviation * normal.pdf(0.2 / deviation) - 0.2 * normal.cdf(-0.2 / deviation)
    assert gain == pytest.approx(expected, abs=3 * deviation / race._DRAWS**0.5)
    assert before.expected_gain([0, 1], errors * 1000) == pytest.approx(0, abs=1e-3)


@given(st.lists(st.floats(1, 9), min_size=1, max_size=6, unique=True), st.randoms())
@settings(max_examples=15, deadline=None)
def test_the_better_half_is_promoted_whatever_the_order(values: list[float], random: Any):
    order = list(enumerate(values))
    random.shuffle(order)
    kept = race.promoted(dict(order))
    best = sorted(range(len(values)), key=lambda key: -values[key])
    assert set(kept) == set(best[: max(1, len(values) // 2)])


def test_of_equal_runs_the_first_stay():
    assert race.promoted({3: 2.0, 1: 2.0, 2: 2.0, 7: 2.0}) == [3, 1]


BUDGETS = (100.0, 700.0, 5000.0)


@pytest.mark.parametrize(("seed", "budget"), list(enumerate(BUDGETS * 2)))
def test_losing_pilots_never_take_more_than_they_may(seed: int, budget: float, monkeypatch: Any):
    world = World(seed, options(), budget, measured=0.02 * budget)
    contest, asked = world.contest, {}
    monkeypatch.setattr(race, "extrapolate", world.extrapolate)
    pilots: dict[int, Pilot] = {}
    while todo := next_pilots(contest, pilots):
        for label, share in todo.items():
            assert share > asked.get(label, 0)
            asked[label] = share
            pilots[label] = world.pilot(label, share)
    advice = decide(contest, pilots)
    seconds = contest.options["seconds"]
    spent = {label: share * contest.steps[label] * seconds[label] for label, share in asked.items()}
    lost = sum(spent.values()) - spent.get(advice.best.name, 0.0)
    # But for half a step of each.
    rounded = 0.5 * seconds.max() * (1 + len(asked))
    assert lost <= contest.allowed + rounded
    assert advice.spent >= contest.measured
    run = advice.steps * advice.best["seconds"]
    assert run + advice.spent == pytest.approx(budget, abs=advice.best["seconds"])
    assert lost <= advice.spent - contest.measured + rounded
    assert advice.table["best"].sum() == pytest.approx(1)
    assert advice.best["tau"] == advice.table["tau"].max()
    assert advice.best["low"] < advice.best["tau"] < advice.best["high"]
    assert (advice.table["piloted"] > 0).sum() == len(asked) <= contest.arms


@pytest.mark.parametrize("seed", range(2))
def test_the_order_in_which_pilots_end_changes_nothing(seed: int, monkeypatch: Any):
    world = World(seed, options(), 5000.0)
    first, *others = (world.play(monkeypatch, order) for order in range(3))
    assert len(first) > 1
    answer = decide(world.contest, first)
    for shuffled in others:
        again = decide(world.contest, shuffled)
        pd.testing.assert_frame_equal(again.table, answer.table)
        assert again.reason == answer.reason and again.steps == answer.steps
    # Nor does what was run further than it was asked for.
    more = decide(world.contest, world.play(monkeypatch, extra=True))
    pd.testing.assert_frame_equal(more.table, answer.table)


def test_a_race_goes_on_where_it_stopped(monkeypatch: Any):
    world = World(3, options(), 5000.0, growth=replace(GROWTH, residual=0.5))
    world.contest = replace(world.contest, allowed=3 * world.contest.allowed)
    (count, first), (left, second) = world.contest.plan.rungs
    assert (count, left) in ((4, 2), (5, 2)) and first < second
    monkeypatch.setattr(race._Race, "_worth_going_on", lambda *given: True)
    whole = world.play(monkeypatch)
    shares = {label: one.share for label, one in whole.items()}
    # Half of them have gone on to the second rung.
    assert sorted(shares.values()) == [first] * (count - left) + [second] * left
    # With each part of what was run at first, the same is left to run.
    for kept in range(len(whole)):
        begun = dict(list(whole.items())[:kept])
        with pytest.raises(ValueError, match="pilots must hold all of next_pilots"):
            decide(world.contest, begun)
        while todo := next_pilots(world.contest, begun):
            begun |= {label: world.pilot(label, share) for label, share in todo.items()}
        assert {label: one.share for label, one in begun.items()} == shares


def test_pilots_find_the_best_of_what_was_thought_to_be_equal(monkeypatch: Any):
    # Alike in all that is known beforehand.
    table = pd.concat([options((8, 16, 7))] * 4, ignore_index=True)
    world = World(0, table, 2000.0, growth=replace(GROWTH, residual=0.5))
    for winner in (0, 3):
        world.log_tau = np.log([2.0] * 4)
        world.log_tau[winner] = math.log(4.0)
        pilots = world.play(monkeypatch)
        assert len(pilots) > 1
        # An option that was no pilot is not chosen for that.
        if winner in pilots:
            advice = decide(world.contest, pilots)
            assert advice.best.name == winner and advice.sure > 0.3
            assert advice.lead > 0 and advice.lead_low < advice.lead < advice.lead_high
            assert f"{len(pilots)} pilots were run" in advice.reason


def test_pilots_that_cannot_gain_what_they_cost_are_not_run():
    table = options((8, 4, 7), (8, 32, 7))
    certain = Growth(GROWTH.mean, GROWTH.covariance * 1e-6, 1e-3)
    exact = table.assign(low=table["rate"], high=table["rate"])
    for contest in (
        Contest(exact, 1000.0, 150.0, growth=certain),
        Contest(table, 1000.0, 0.0),
        Contest(table, 1000.0, 150.0, arms=1),
        Contest(table.iloc[:1], 1000.0, 150.0),
    ):
        assert next_pilots(contest, {}) == {}
        advice = decide(contest, {})
        assert "No pilot was worth its time" in advice.reason and advice.spent == 0
        assert advice.steps == round(1000 / advice.best["seconds"])
    assert advice.runner_up is None and advice.surer == "There is no other option."
    # Of the same two with their errors, they are worth it.
    assert next_pilots(Contest(table, 1000.0, 150.0), {})


def test_no_pilot_ends_before_drafters_have_learned_enough_to_compare(
    short_pilots: int, monkeypatch: Any
):
    table = pd.concat([options((8, 16, 7))] * 4, ignore_index=True)
    for budget, enough in ((500.0, False), (2000.0, False), (8000.0, True)):
        plans = []
        for least in (1, short_pilots):
            monkeypatch.setattr(race, "PILOT_STEPS", least)
            known = {"growth": replace(GROWTH, residual=0.5)}
            plans.append(Contest(table, budget, pilot_allowance(budget), **known).plan)
        free, held = plans
        ends = [share * free.seconds / table["seconds"].iloc[0] for _, share in free.rungs]
        assert ends and (ends[0] >= short_pilots) == enough
        assert held == (free if enough else race.PilotPlan((), (), budget))


def test_a_contest_refuses_what_it_cannot_race():
    table = options()
    with pytest.raises(ValueError, match=r"options must be lines with .*got 8 without \['noise'\]"):
        Contest(table.drop(columns="noise"), 10.0, 1.0)
    with pytest.raises(ValueError, match="labels of their own"):
        Contest(pd.concat([table, table]), 10.0, 1.0)
    with pytest.raises(ValueError, match="measured must be below budget 10.0, got 10.0"):
        Contest(table, 10.0, 1.0, 10.0)


def test_pilots_that_are_proposed_have_enough_steps_and_fit_into_the_budget(
    short_pilots: int, monkeypatch: Any
):
    monkeypatch.setattr(race, "PILOT_STEPS", short_pilots)
    told = []
    for budget, residual in product((20.0, 60.0, 300.0, 3000.0), (0.02, 0.12, 1.0)):
        table = options((8, 4, 7), (8, 5, 7))
        known = replace(GROWTH, residual=residual)
        told.append(decide(Contest(table, budget, 0.0, growth=known), {}).surer)
        for seconds in re.findall(r"([\d,]+) s of pilots", told[-1]):
            share = float(seconds.replace(",", "")) / 2 / budget
            assert share <= 0.5 and share * budget / table["seconds"].min() > short_pilots - 5
    assert any("s of pilots" in text for text in told)
    assert any("would take longer than the run" in text for text in told)


def test_how_sure_a_longer_pilot_would_make_is_that_of_simulated_ones():
    lead, variance, error = 0.1, 0.04, 0.02
    rng = np.random.default_rng(0)
    truth = lead + variance**0.5 * rng.normal(size=40_000)
    seen = truth + error**0.5 * rng.normal(size=truth.size)
    after = (lead / variance + seen / error) / (1 / variance + 1 / error)
    right = ((after > 0) == (truth > 0)).mean()
    # Three standard errors.
    assert race._expected_sure(lead, variance, error) == pytest.approx(right, abs=0.007)
    unseen = NormalDist().cdf(lead / variance**0.5)
    assert race._expected_sure(lead, variance, math.inf) == pytest.approx(unseen)


def recorded(table: pd.DataFrame, amounts: tuple[float, ...], taus: list[float]) -> pd.DataFrame:
    """Runs of each option and budget on their straight way to a tau, as a sweep records them."""
    parts = []
    for (label, option), amount in product(table.iterrows(), amounts):
        steps = max(1, round(amount / option["seconds"]))
        run = {"budget": "seconds", "amount": amount, "mix": "all", "seed": 0, "loss": 0.0}
        run |= {name: int(option[name]) for name in CELLS} | {"step_seconds": option["seconds"]}
        lines = run_lines(steps, 1 + (taus[label] - 1) * (amount / max(amounts)) ** 0.3)
        slots = lines["step"] * int(option[CELLS].prod())
        parts.append(lines.assign(slots=slots, spent=2.0 + lines["step"] / steps, **run))
    return with_all_columns(pd.concat(parts, ignore_index=True))


def test_a_replay_runs_the_pilots_of_recorded_runs_and_counts_their_time(monkeypatch: Any):
    table, taus = options(), [1.5, 1.6, 1.7, 1.8, 2.2, 2.4, 2.3, 2.1]
    runs = recorded(table, (300.0, 1000.0), taus)
    asked = []

    def extrapolate(lines: pd.DataFrame, rates: Any, reference: Any = None) -> Forecast:
        asked.append(lines)
        return forecast(float(lines["tau"].iloc[-1]) + 0.5, 0.05, len(rates))

    monkeypatch.setattr(race, "extrapolate", extrapolate)
    growth = replace(GROWTH, residual=0.5)
    advice = replay_pilot(runs, table, 1000.0, growth=growth)
    piloted = advice.table[advice.table["piloted"] > 0]
    assert len(piloted) > 1 and 0 < advice.spent < 200
    for lines in asked:
        assert lines["amount"].eq(1000.0).all() and lines["step"].max() < lines["steps"].iloc[0] / 2
    assert replay_pilot(runs, table, 1000.0, growth=growth, measured=50.0).spent >= 50
    # What is spent: the losers' steps, and an evaluation of each pilot at the end of each rung, as
    # long as the quickest of all that were recorded.
    paid = replay_pilot(runs, table, 1000.0, growth=growth, measured=0.0)
    losers = paid.table.drop(index=paid.best.name)
    steps = float((losers["piloted"] * losers["steps"] * losers["seconds"]).sum())
    evaluations = int((paid.curves["kind"] == "measured").sum())
    assert evaluations >= (paid.table["piloted"] > 0).sum() > 1
    whole = steps + runs["spent"].min() * evaluations
    assert paid.spent == pytest.approx(whole, rel=0.02)
    # No pilot, no slots: what measuring takes is all.
    none = replay_pilot(runs, table, 1000.0, growth=growth, share=0.0)
    assert (none.table["piloted"] == 0).all()
    _, timing = race.timed_options(table["seconds"], 1000.0, table["seconds"].to_dict().__getitem__)
    plan = race.noise_plan(table, 1000.0)
    assert none.spent == pytest.approx(timing + plan.seconds)
    by_slots = replay_pilot(runs, table, 5e4, by="slots", measured=0.0)
    np.testing.assert_allclose(by_slots.table["seconds"], table[CELLS].prod(axis=1))
    assert by_slots.spent == 0 and (by_slots.table["piloted"] == 0).all()
    with pytest.raises(ValueError, match="got no N 3, K 3, 1 row"):
        replay_pilot(runs, options((1, 3, 3)), 1000.0)


def test_few_options_are_timed_and_fewer_for_short_budgets():
    work = pd.Series({7: 1.0, 5: 100.0, 3: 10.0, 1: 1000.0, 9: 10_000.0})
    asked: list[int] = []

    def measure(label: int) -> float:
        asked.append(label)
        return 0.01 * work[label]

    found, spent = race.timed_options(work, 1e6, measure)
    assert asked == [7, 3, 1, 9] and spent == pytest.approx(7 * 0.01 * (1 + 10 + 1000 + 10_000))
    assert found == {label: 0.01 * work[label] for label in asked}
    # 2 % of 4,000 s are 80 s, of which the third would take 70 and the fourth far more.
    assert list(race.timed_options(work, 4000.0, measure)[0]) == [7, 3, 1]
    # Two are needed for a fit, whatever they take.
    assert list(race.timed_options(work, 1.0, measure)[0]) == [7, 3]
    assert list(race.timed_options(work[[3]], 1.0, measure)[0]) == [3]


def test_noise_is_measured_where_a_few_percent_of_the_budget_pay_for_it():
    table = options((2, 4, 4), (2, 4, 15), (2, 32, 15), (8, 4, 4))
    seconds = table["seconds"][1]
    plan = race.noise_plan(table, 1e5)
    # Two gradients of each of two block sizes take a conversation twice as long as a step's two.
    assert plan == race.NoisePlan(1, 100, 64, pytest.approx((100 + 64 * 2) * seconds))
    less = race.noise_plan(table, 2000 * seconds)
    assert (less.steps, less.conversations) == (20, 20)
    assert race.noise_plan(table, 1999 * seconds) is None


def test_noise_that_is_not_known_is_that_of_the_nearest_block():
    table = options(*product((2,), (4, 32), (4, 7, 15))).assign(known=True)
    table["noise"] *= table["block_size"]
    pd.testing.assert_frame_equal(race.known_noise(table), table)
    table.loc[[0, 3], "known"], table.loc[[0, 3], "noise"] = False, [math.inf, 1e9]
    found = race.known_noise(table)
    assert found["noise"][[0, 3]].tolist() == table["noise"][[1, 4]].tolist()
    usual = (9 + 125 / np.repeat([4, 32], 3)) / 2
    np.testing.assert_allclose(race.known_noise(table.assign(known=False))["noise"], usual)
    rates = race.usual_noise(table)["rate"]
    np.testing.assert_allclose(rates, (1 + usual) ** -EXPONENT / table["seconds"])


def test_the_usual_noise_is_about_that_which_ships():
    found = shipped_noise()[100].table().query("objective == 'block'")
    assert found["rows_scale"].mean() == pytest.approx(9, rel=0.1)
    assert found["anchors_scale"].mean() == pytest.approx(125, rel=0.1)


def conversation_lines(size: int, amount: float, steps: int, taus: dict[str, float]) -> list[dict]:
    run = {"budget": "seconds", "amount": amount, "mix": "all", "batch_size": 2, "num_anchors": 4}
    run |= {"block_size": size, "seed": 0, "steps": steps, "kind": "conversation", "domain": "all"}
    beyond = [0.1] * (size - 2)
    return [
        {**run, "conversation": name, "step": steps, "survival": [(tau - 1) / 2] * 2 + beyond}
        for name, tau in taus.items()
    ]


def test_what_long_blocks_lose_is_found_in_pairs_of_runs_and_conversations():
    lines = conversation_lines(15, 20.0, 100, {"a": 1.2, "b": 2.0})
    lines += conversation_lines(15, 60.0, 300, {"a": 1.8, "b": 2.4})
    lines += conversation_lines(2, 20.0, 200, {"a": 1.3, "b": 2.1, "c": 9.0})
    lines += conversation_lines(2, 60.0, 600, {"a": 1.9, "b": 2.5})
    # An earlier line of a run that went on.
    lines.append({**lines[0], "step": 50, "survival": [0.0] * 15})
    runs = with_all_columns(pd.DataFrame(lines))
    found = block_loss(runs, 15, 2).set_index(["equal", "amount"])
    assert found.loc[("budget", 20.0), "lost"] == pytest.approx(1 - 3.2 / 3.4)
    assert found.loc[("budget", 60.0), "lost"] == pytest.approx(1 - 4.2 / 4.4)
    assert found.loc[("budget", 60.0), "tau"] == pytest.approx(2.2)
    # 300 steps lie between 200 and 600, 100 do not.
    between = math.log(300 / 200) / math.log(600 / 200)
    same = [
        math.exp(math.log(x) * (1 - between) + math.log(y) * between)
        for x, y in ((1.3, 1.9), (2.1, 2.5))
    ]
    assert found.loc[("steps", 60.0), "lost"] == pytest.approx(1 - 4.2 / sum(same))
    assert len(found) == 3 and (found["runs"] == 1).all() and (found["conversations"] == 2).all()
    assert (found["low"] <= found["lost"]).all() and (found["lost"] <= found["high"]).all()
    (together, _) = block_loss(runs, 15, 2, by=()).to_dict("records")
    assert together["lost"] == pytest.approx(1 - 7.4 / 7.8) and together["runs"] == 2
    # Of two conversations that lose alike there is no doubt but rounding.
    alike = conversation_lines(4, 20.0, 9, {"a": 1.5, "b": 1.5})
    alike += conversation_lines(2, 20.0, 9, {"a": 2.0, "b": 2.0})
    (line,) = (
        block_loss(with_all_columns(pd.DataFrame(alike)), 4, 2, by=("mix",))
        .iloc[:1]
        .to_dict("records")
    )
    assert line["low"] == line["lost"] == line["high"] == pytest.approx(0.25)
    with pytest.raises(ValueError, match="served must be below trained, 4, got 4"):
        block_loss(runs, 4, 4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Any]:
    """A question about a tiny target, of 40 s of which pilots are begun in any case."""
    folder = tmp_path_factory.mktemp("tiny")
    target, data = target_on_disk(folder)
    training = TrainConfig(steps=1, max_length=64, learning_rate=3e-3)
    question: dict[str, Any] = {"target": target, "chats": data, "held_out": data}
    question |= {"num_anchors": (2,), "block_sizes": (2, 4), "batch_sizes": (2,)}
    question |= {"features": "live", "evaluate_chats": 2, "evaluate_anchors": 2}
    question |= {"training": training, "growth": replace(GROWTH, residual=2.0)}
    return question | {"minutes": 1 / 3, "progress": False}


def known(work: Path) -> Path:
    """A folder in which step times and noise are measured already."""
    work.mkdir()
    table = options((2, 2, 2), (2, 2, 4)).assign(seconds=[1.0, 1.2])
    found = {"seconds": 2.0, "evaluation": 0.1, "options": table.to_dict("records")}
    (work / "options.json").write_text(json.dumps(found))
    return work


def test_a_pilot_goes_on_where_it_was_killed_and_so_does_the_run_that_it_recommends(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: Any
):
    whole = pilot(work=known(tmp_path / "whole"), **tiny)
    run_cell, calls = pilots.run_cell, []

    def killed(*given: Any, **named: Any) -> Any:
        raise SystemExit

    def begun(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            # In the middle of the second pilot.
            monkeypatch.setattr(runs, "evaluate", killed)
        return run_cell(*given)

    work, evaluate = known(tmp_path / "work"), runs.evaluate
    monkeypatch.setattr(pilots, "run_cell", begun)
    with pytest.raises(SystemExit):
        pilot(work=work, **tiny)
    assert len(list((work / "pilots").iterdir())) == 1
    monkeypatch.setattr(runs, "evaluate", evaluate)
    again = pilot(work=work, **tiny)
    # The pilot that had ended was not run again.
    assert len(calls) == 3 and calls[2] == calls[1] != calls[0]
    assert again.reason == whole.reason
    pd.testing.assert_frame_equal(again.table, whole.table)
    pd.testing.assert_frame_equal(again.curves, whole.curves)
    monkeypatch.setattr(pilots, "run_cell", lambda *given: pytest.fail("run again"))
    pd.testing.assert_frame_equal(pilot(work=work, **tiny).table, whole.table)

    assert (again.table["piloted"] > 0).all() and again.spent > 2
    assert "Trained on blocks of 4 slots, of which 2 are served, drafters have" in again.reason
    best = again.best
    assert again.settings == TrainingSettings(2, int(best["block_size"]), 64, 2)
    program, *arguments = shlex.split(again.command.removeprefix("python -m "))
    assert program == "dspark_lab.training"
    out = Path(arguments[arguments.index("--out") + 1])
    before = (out / "metrics.jsonl").read_text().splitlines()
    assert 0 < len(before) < again.steps
    train_main(arguments)
    after = (out / "metrics.jsonl").read_text().splitlines()
    assert after[: len(before)] == before and len(after) == again.steps


def test_pilots_are_jobs_of_processes_or_of_a_cluster(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: Any
):
    asked: list[tuple[int, str | None]] = []

    def in_turn(function: Any, jobs: Any, *, processes: int, address: str | None) -> Any:
        asked.append((processes, address))
        return ((key, function(*given)) for key, given in reversed(jobs.items()))

    def pretended(cell: Any, config: Any, steps: int, own: float, work: Path, until: int) -> Any:
        lines = run_lines(steps, 1.5 + cell.block_size / 10)
        lines = lines[lines["step"] <= until].assign(**dataclasses.asdict(cell), step_seconds=own)
        lines = lines.assign(slots=1, tokens=1)
        return {"run": {}, "lines": lines.to_dict("records")}

    monkeypatch.setattr(pilots, "run_jobs", in_turn)
    monkeypatch.setattr(pilots, "run_cell", pretended)
    alone = pilot(work=known(tmp_path / "alone"), **tiny)
    assert not asked
    for where in ({"processes": 2}, {"address": "auto"}):
        other = pilot(work=known(tmp_path / str(len(asked))), **where, **tiny)
        pd.testing.assert_frame_equal(other.table, alone.table)
    assert asked == [(2, None), (1, "auto")]


def test_a_folder_holds_the_pilots_of_one_question(tiny: dict[str, Any], tmp_path: Path):
    work = known(tmp_path / "work")
    write_json(work / "sweep.json", {"minutes": 1})
    with pytest.raises(ValueError, match="must be a new folder or one of the same sweep"):
        pilot(work=work, **tiny)


@pytest.mark.slow
def test_a_pilot_of_the_pocket_pair_measures_races_and_answers(tmp_path: Path):
    sizes: dict[str, Any] = {"num_anchors": (4, 16), "block_sizes": (4, 7), "batch_sizes": (4,)}
    sizes |= {"evaluate_chats": 6, "evaluate_anchors": 4}
    begin = time.process_time()
    unsure = replace(GROWTH, residual=0.5)
    advice = pilot(minutes=1.5, work=tmp_path, growth=unsure, progress=False, **sizes)
    assert time.process_time() - begin < 300
    piloted = advice.table[advice.table["piloted"] > 0]
    assert 2 <= len(piloted) <= 4 and advice.spent < 90 * 0.05 + pilot_allowance(90)
    assert advice.table["tau"].between(1, 5).all()
    # What its runs have learned so far shows in both kinds of figure.
    measured = advice.curves[advice.curves["kind"] == "measured"]
    assert measured.groupby("option")["tau"].last().gt(1).all()
    assert f"--num-anchors {advice.settings.num_anchors}" in advice.command
    assert (tmp_path / "options.json").exists() and len(list((tmp_path / "pilots").iterdir())) >= 2


def test_a_pilot_is_forecast_by_the_schedule_of_its_own_training(monkeypatch):
    seen: list[np.ndarray] = []
    monkeypatch.setattr(race, "extrapolate", lambda lines, rates, **_: seen.append(rates))
    constant = TrainConfig(steps=7, schedule="constant", learning_rate=9.0, warmup_steps=3)
    contest = Contest(options(), 100.0, 10.0, training=constant)
    lines = run_lines(50, 2.0)
    race._forecast(Pilot(0.5, lines), 0.5, contest)
    # Its peak and warm-up are those that the lines say.
    assert seen[0].tolist() == [1e-3] * 50
