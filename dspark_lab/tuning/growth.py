"""How tau grows with training: with steps, with the noise of their gradients, and with the block.

A step whose gradient has the variance ``noise`` (over the squared length of its mean) makes
1 / (1 + noise) of the progress of a step on all data (McCandlish et al. 2018, arXiv 1812.06162,
equation 2.6), so that noise would count as fewer steps do. But gradients are less noisy at first
than where noise was measured, so it counts less there. Of a block of K slots each of which is
accepted with the same probability p, given that all before it are, tau is
(1 - p^(K+1)) / (1 - p) (Leviathan et al. 2022, arXiv 2211.17192, equation 1): whatever tau is,
there is one such p. With x = log(steps), v = log(1 + noise) and k = log(K), each from an origin,

    logit(p) = a + b x + c_1 (x - x_1)^+ + ... + d v + e x v + f k + g x k + residual

a broken line in x: drafters learn little at first, then much within few steps, then slowly. The
coefficients are known from runs on other data. Of the level a, of what noise costs, d, and of what
a longer block brings, f, each data set has its own about those that all have in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import checked, require_columns
from dspark_lab.files import read_json, shipped
from dspark_lab.tuning.cells import ALL
from dspark_lab.tuning.judging import CELL
from dspark_lab.tuning.results import run_table

# The origins of steps, 1 + noise and block size, and the steps at which the line may break.
_STEPS, _NOISE, _BLOCK = 500.0, 5.0, 7.0
_BREAKS = (100.0, 200.0, 500.0, 1500.0)
# The places of a, d and f.
_OWN = [0, 6, 8]
# Of logit(p) and of log(steps), for derivatives.
_SMALL = 1e-4


@dataclass(frozen=True, eq=False)
class Growth:
    """The coefficients a, b, c, ... g with their covariance.

    ``residual``: the standard deviation of logit(p) of a single run about the curve.
    """

    mean: Float[np.ndarray, " coefficient"]
    covariance: Float[np.ndarray, "coefficient coefficient"]
    residual: float

    @checked
    def predict(
        self, options: pd.DataFrame, steps: Float[np.ndarray, " option"]
    ) -> tuple[Float[np.ndarray, " option"], Float[np.ndarray, "option option"]]:
        """Log tau of options (columns ``noise``, ``block_size``) after so many steps each.

        Returns its mean and its covariance, both to first order.
        """
        terms, slots = _terms(options, steps), options["block_size"].to_numpy(dtype=float)
        logit = terms @ self.mean
        covariance = terms @ self.covariance @ terms.T + self.residual**2 * np.eye(len(terms))
        by_logit = self.by_logit(options, steps)
        return np.log(tau_at(logit, slots)), covariance * np.outer(by_logit, by_logit)

    @checked
    def by_logit(
        self, options: pd.DataFrame, steps: Float[np.ndarray, " option"]
    ) -> Float[np.ndarray, " option"]:
        """The derivative of log tau by logit(p)."""
        logit, slots = _terms(options, steps) @ self.mean, options["block_size"].to_numpy(float)
        return tau_slope(logit, slots) / tau_at(logit, slots)

    @checked
    def slope(
        self, options: pd.DataFrame, steps: Float[np.ndarray, " option"]
    ) -> Float[np.ndarray, " option"]:
        """The derivative of log tau by log steps."""
        slots = options["block_size"].to_numpy(dtype=float)
        logits = (_terms(options, more) @ self.mean for more in (steps, steps * math.exp(_SMALL)))
        here, ahead = (np.log(tau_at(logit, slots)) for logit in logits)
        return (ahead - here) / _SMALL


def tau_at(logit: Any, slots: Any) -> Any:
    """Tau of blocks all of whose slots are accepted with one probability."""
    survival = 1 / (1 + np.exp(-logit))
    # 1 - p exactly, where p is nearly 1.
    return -np.expm1((slots + 1) * np.log(survival)) * (1 + np.exp(logit))


def tau_slope(logit: Any, slots: Any) -> Any:
    """The derivative of that tau by the logit."""
    return (tau_at(logit + _SMALL, slots) - tau_at(logit, slots)) / _SMALL


def logit_of(
    tau: Float[np.ndarray, " option"], slots: Float[np.ndarray, " option"]
) -> Float[np.ndarray, " option"]:
    """The inverse of :func:`tau_at`, by bisection; of a tau of 1 or of all slots its bound, 20."""
    low, high = np.full(len(tau), -20.0), np.full(len(tau), 20.0)
    for _ in range(50):
        middle = (low + high) / 2
        less = tau_at(middle, slots) < tau
        low, high = np.where(less, middle, low), np.where(less, high, middle)
    return (low + high) / 2


def _terms(
    options: pd.DataFrame, steps: Float[np.ndarray, " option"]
) -> Float[np.ndarray, "option coefficient"]:
    """The factors of the coefficients a, b, c, ... g."""
    x = np.log(steps / _STEPS)
    v = np.log((1 + options["noise"].to_numpy(dtype=float)) / _NOISE)
    k = np.log(options["block_size"].to_numpy(dtype=float) / _BLOCK)
    beyond = [np.log(steps / at).clip(min=0) for at in _BREAKS]
    return np.stack([np.ones(len(x)), x, *beyond, v, x * v, k, x * k], axis=1)


# What least squares find in two earlier sweeps, of 72 runs of 16 rows on all domains (tau at
# temperature 1) and of 18 runs of 4 rows on conversations of mathematics, each with its own level
# and with the noise that was measured after 100 steps; the deviations are twice those of that fit,
# or of the two alone.
GROWTH = Growth(
    np.array([0.0, 0.82, 0.39, -0.46, -0.3, 0.0, -0.55, -0.1, -0.06, -0.06]),
    np.diag(np.square([0.7, 0.15, 0.2, 0.22, 0.3, 0.3, 0.2, 0.07, 0.12, 0.08])),
    0.12,
)


@checked
def fit_growth(
    runs: pd.DataFrame,
    progress: pd.DataFrame,
    prior: Growth = GROWTH,
    *,
    mix: str | None = None,
    domain: str = ALL,
) -> Growth:
    """The growth that the ends of recorded runs show (:func:`load_runs`), beside the ``prior``.

    Half of the prior's variance of a, d and f is what mixes differ by. The growth is that of
    ``mix``, of which runs may have other budgets, or of data of which there are none. ``progress``
    has the ``noise`` of each batch size, number of anchors and block size, and of each ``mix``
    where it has such a column.
    """
    require_columns("progress", progress, [*CELL, "noise"])
    ends = run_table(runs, domain=domain).astype({"mix": str})
    ends = ends.merge(progress[[*CELL, *{"mix"} & set(progress), "noise"]])
    if ends.empty:
        raise ValueError("progress must hold the options of runs, got none of them")
    terms, size = _terms(ends, ends["steps"].to_numpy(dtype=float)), len(prior.mean)
    mixes = sorted({mix or "", *ends["mix"]})
    # The common coefficients, then what those of each mix differ by.
    design, every = [terms], [np.eye(size)]
    for name in mixes:
        design.append(terms[:, _OWN] * (ends["mix"] == name).to_numpy()[:, None])
        every.append(np.eye(size)[:, _OWN] * (name == (mix or "")))
    factors, of_mix = np.concatenate(design, axis=1), np.concatenate(every, axis=1)
    before, start = np.zeros((factors.shape[1],) * 2), np.zeros(factors.shape[1])
    before[:size, :size], start[:size] = prior.covariance, prior.mean
    before[np.ix_(_OWN, _OWN)] /= 2
    for first in range(size, len(start), len(_OWN)):
        place = slice(first, first + len(_OWN))
        before[place, place] = before[np.ix_(_OWN, _OWN)]
    aim = logit_of(ends["held_out"].to_numpy(dtype=float), ends["block_size"].to_numpy(dtype=float))
    residual = prior.residual
    for _ in range(20):
        noisy = factors @ before @ factors.T + residual**2 * np.eye(len(aim))
        gain = np.linalg.solve(noisy, factors @ before).T
        mean = start + gain @ (aim - factors @ start)
        # As if the prior's residual had been seen in as many runs as there are coefficients, which
        # is what these take away.
        left = ((aim - factors @ mean) ** 2).sum() + size * prior.residual**2
        residual = math.sqrt(left / len(aim))
    after = before - gain @ factors @ before
    return Growth(of_mix @ mean, of_mix @ after @ of_mix.T, residual)


@cache
def shipped_growth() -> Growth:
    """The growth of new data that the shipped runs (:func:`load_runs`) of one seed teach."""
    found = read_json(shipped("pocket/learned.json"))["growth"]
    return Growth(np.array(found["mean"]), np.array(found["covariance"]), found["residual"])
