"""Pilots: what is known before them, which are run, what their results say, and the real ones."""

import math
from dataclasses import replace
from itertools import permutations, product
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.tuning import (
    GROWTH,
    Contest,
    Growth,
    Pilot,
    decide,
    evaluation_steps,
    fit_growth,
    next_pilots,
    pilot_allowance,
    race,
    replay_pilot,
)
from dspark_lab.tuning import growth as growing
from dspark_lab.tuning.extrapolation import Forecast

CELLS = ["batch_size", "num_anchors", "block_size"]


def options(*cells: tuple[int, int, int]) -> pd.DataFrame:
    """Steps that take the longer the more slots they have, and are the less noisy."""
    table = pd.DataFrame(cells or list(product((2, 8), (4, 32), (4, 15))), columns=CELLS)
    slots = table.prod(axis=1)
    table["seconds"] = 0.01 + 0.0002 * slots
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
        rng, pilots = np.random.default_rng(order), {}
        if extra:
            pilots = {label: self.pilot(label, 0.9) for label in self.contest.options.index[::2]}
        while todo := next_pilots(self.contest, pilots):
            label = int(rng.choice(list(todo)))
            pilots[label] = self.pilot(label, todo[label])
        return pilots


def forecast(tau: float, error: float, steps: int = 10) -> Forecast:
    half = math.exp(1.645 * error)
    table = pd.DataFrame({"step": [steps], "tau": [tau], "low": [tau / half], "high": [tau * half]})
    rest = (0.0, 0.0, 0.0, False, table, pd.DataFrame(), "")
    return Forecast(tau, tau / half, tau * half, 0.9, "held_out", steps, *rest)


def test_pilots_may_have_a_share_of_the_budget_and_of_short_ones_half_a_minute():
    assert pilot_allowance(3600) == 540 and pilot_allowance(200) == 30
    assert pilot_allowance(180) == pilot_allowance(67) == 30
    assert pilot_allowance(20) == pytest.approx(9) and pilot_allowance(100, 0.0) == 0
    assert pilot_allowance(1000, 0.1) == 100 and pilot_allowance(100, 0.1) == 20
