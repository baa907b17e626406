"""Learning curves: where tau will be at the end of a run, from its points so far.

The logarithm of tau - 1 (the log-odds of a slot's accept rate) is, in the run's own time,

    y = level + slope x + growth s + annealing v + offset of training,

where s = S / S_end is the area S under the learning rate so far, as a share of the whole run's,
x = log s, and v = 1 - rate / peak how far the rate has fallen since its peak: after Tissue et al.
2024 (arXiv 2408.11029), whose loss has a power of S and a gain by annealing. Nothing here depends
on how many steps a run has.

The level is the run's own. All other coefficients are drawn from a normal distribution over runs,
:class:`Curves`, so that a run's points overrule it as they come. How wide the intervals are follows
from how far the same procedure was off on other runs at the same share of the run.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.special import expit, logit
from scipy.stats import norm

from dspark_lab.checks import Positive, checked
from dspark_lab.training import TrainConfig
from dspark_lab.tuning.cells import ALL
from dspark_lab.tuning.results import RUN

# The coefficients, in this order.
COEFFICIENTS = ("level", "slope", "growth", "annealing", "training")
# Shares of a run's area at which finished runs are extrapolated, to see how far off that is.
SHARES = (0.05, 0.1, 0.2, 0.4, 0.7, 0.9)
# Another tenth of steps that brings less than this share of tau leaves it flat.
FLAT, TENTH = 0.01, 1.1
# A training point's noise is that of a mean over such a part of a run.
WINDOWS = 40
# The variance of a point is 1 + this over its step: at first a drafter's outputs still swing.
_EARLY = 10
_ITERATIONS = 60
# The least variance of the coefficients, and for how many runs it counts.
_LEAST_VARIANCE, _LEAST_RUNS = 1e-3, 2


@dataclass(frozen=True, eq=False)
class Curves:
    """How learning curves are bent, and how far their extrapolations are off.

    ``mean`` and ``covariance`` of :data:`COEFFICIENTS` over runs, of which the level's are not
    used; ``noise``: standard deviation of an evaluation and of a training point (the mean over a
    fortieth of a run) around its curve; ``scale``: at each of :data:`SHARES`, the 90 % quantile of
    the error of the end over that of the normal distribution which the points leave, of runs with
    evaluations, then of runs without; ``runs``: how many were learned from.
    """

    mean: Float[np.ndarray, " coefficient"]
    covariance: Float[np.ndarray, "coefficient coefficient"]
    noise: Float[np.ndarray, " kind"]
    scale: Float[np.ndarray, "kind share"]
    runs: int

    def fit(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Mean and covariance of a run's coefficients, given its points."""
        sums = _sums(points)
        mean, covariance = _solve(self, sums.squares[None], sums.products[None])
        return mean[0], covariance[0]

    def half(self, kind: int, share: Any, level: float) -> Any:
        """Half the interval of ``level``, in standard deviations, from this share of a run."""
        return np.interp(share, SHARES, self.scale[kind]) * norm.ppf((1 + level) / 2)


@dataclass(frozen=True, eq=False)
class Reference:
    """The curves of tau and of slots' accept rates in other runs, and which runs these are."""

    tau: Curves
    accept: Curves
    source: str


@dataclass(frozen=True, eq=False)
class Forecast:
    """Where tau will be at the end of a run, ``low`` to ``high`` with probability ``level``.

    ``kind``: "held_out" where the points hold evaluations, else "train", the mean over the last
    fortieth of training. ``gain``: what another tenth of steps would bring, the schedule stretched
    over them, as a share of tau, ``gain_low`` to ``gain_high``; ``flat``: whether this is below
    1 % up to its upper end. ``table``: the curve so far and to come, a line a ``step``: ``tau``,
    ``low``, ``high``, and whether it is ``ahead``. ``by_slot``: the ``accept`` rate of each
    ``slot`` at the end, ``low`` to ``high``; no lines where the points have none. ``step`` is the
    last one measured, ``steps`` the last one of the run; ``source``: the runs that say how curves
    go on; ``reason``: all of it in words.
    """

    tau: float
    low: float
    high: float
    level: float
    kind: Literal["held_out", "train"]
    step: int
    steps: int
    gain: float
    gain_low: float
    gain_high: float
    flat: bool
    table: pd.DataFrame
    by_slot: pd.DataFrame
    source: str
    reason: str

    def __repr__(self) -> str:
        return self.reason


class Points(NamedTuple):
    """Points of a curve: their step, kind (0 held out, 1 training), coefficients' factors and y.

    ``weight``: the kind's variance over the point's.
    """

    step: Int[np.ndarray, " point"]
    kind: Int[np.ndarray, " point"]
    design: Float[np.ndarray, "point coefficient"]
    y: Float[np.ndarray, " point"]
    weight: Float[np.ndarray, " point"]

    def where(self, keep: Any) -> Points:
        return Points(*(part[keep] for part in self))


class _Sums(NamedTuple):
    """Of the points of each kind: sums of squares and products, of y squared, and their number."""

    squares: Float[np.ndarray, "*run kind coefficient coefficient"]
    products: Float[np.ndarray, "*run kind coefficient"]
    y_squared: Float[np.ndarray, "*run kind"]
    count: Float[np.ndarray, "*run kind"]


class _Run(NamedTuple):
    """A finished run: its points, and the share of its area at each."""

    points: Points
    share: Float[np.ndarray, " point"]


@checked
def learning_rates(config: TrainConfig) -> Float[np.ndarray, " step"]:
    """The learning rate of every step of a run."""
    return np.array([config.learning_rate_at(step) for step in range(config.steps)])


@checked
def extrapolate(
    points: pd.DataFrame,
    learning_rates: Float[np.ndarray, " step"],
    *,
    measured: Float[np.ndarray, " measured_step"] | None = None,
    reference: Reference | None = None,
    level: Positive = 0.9,
) -> Forecast:
    """Extrapolate the points of a run to its end.

    Args:
        points: a line for each: ``step`` (until which, from 1), ``tau``; optional ``kind``,
            "held_out" (else all are) or "train" (the mean over the steps since the training point
            before), and ``accept``, for evaluations the list of accept rates by slot. A run's lines
            of :func:`load_runs` are such a table, of one domain; other kinds of line are ignored.
            For tau of fewer slots, give ``tau`` of fewer.
        learning_rates: of every step of the run that is asked about, from its first to its last.
        measured: those of the run that the points are of, where it is another one of the same
            settings: a pilot of fewer steps, whose rate has fallen earlier.
        reference: what :func:`learn_curves` learned from other runs; by default
            :data:`REFERENCE`, from small runs of this lab.
        level: of the intervals, below 1; levels other than 0.9 take errors as normal.
    """
    if level >= 1:
        raise ValueError(f"level must be below 1, got {level}")
    reference = REFERENCE if reference is None else reference
    own = learning_rates if measured is None else measured
    for name, rates in (("learning_rates", learning_rates), ("measured", own)):
        if not len(rates) or not np.isfinite(rates).all() or rates[0] <= 0 or rates.min() < 0:
            raise ValueError(f"{name} must be finite, the first above 0 and none below")
    table = _points_table(points, len(own))
    whole = float(learning_rates.sum())
    factors = _factors(learning_rates, whole)
    own_factors = factors if measured is None else _factors(own, whole)
    found = _points(table, own_factors)
    kind = int((found.kind == 1).all())
    factors[:, -1] = kind
    step = int(found.step.max())
    now, area = float(own[:step].sum()), learning_rates.cumsum()
    curves = reference.tau
    mean, covariance = curves.fit(found)

    at = np.unique(np.linspace(1, len(area), 121).round().astype(int)) - 1
    y = factors[at] @ mean
    half = curves.half(kind, now / np.maximum(area[at], now), level)
    half *= _deviation(factors[at], covariance, curves.noise[kind])
    frame = pd.DataFrame({"step": at + 1, "tau": _tau(y)})
    frame["low"], frame["high"], frame["ahead"] = _tau(y - half), _tau(y + half), area[at] > now
    tau, low, high = (float(frame[name].iloc[-1]) for name in ("tau", "low", "high"))
    longer = np.zeros(len(COEFFICIENTS))
    longer[1:3] = np.log(TENTH), TENTH - 1
    gained = longer @ mean
    half = curves.half(kind, now / whole, level) * _deviation(longer, covariance)
    gain, gain_low, gain_high = (
        float(_tau(y[-1] + change) / tau - 1) for change in (gained, gained - half, gained + half)
    )
    slots = _slot_table(table, own_factors, factors[-1], reference.accept, now / whole, level)
    name: Literal["held_out", "train"] = "train" if kind else "held_out"
    result = Forecast(
        *(tau, low, high, level, name, step, len(area), gain, gain_low, gain_high),
        flat=gain_high < FLAT,
        table=frame,
        by_slot=slots,
        source=reference.source,
        reason="",
    )
    return replace(result, reason=_reason(result))


@checked
def learn_curves(runs: pd.DataFrame, *, domain: str = ALL, source: str | None = None) -> Reference:
    """Learn from finished runs, as :func:`load_runs` gives them, how curves go on.

    The coefficients' distribution is the likeliest (by expectation and maximisation, Laird and Ware
    1982). How far extrapolations are off is seen on runs that were not learned from: those of one
    budget and mix at a time, or of one run at a time where there is only one such setting.
    ``domain``: of the held-out conversations.
    """
    groups, tau, accept = [], [], []
    for key, lines in runs.groupby(RUN, observed=True, sort=False):
        rates = learning_rates(_run_config(lines))
        table = _points_table(lines[lines["domain"].isna() | (lines["domain"] == domain)], None)
        factors = _factors(rates, float(rates.sum()))
        groups.append(key)
        tau.append(_finished(table, factors))
        held = table[table["kind"] == "held_out"]
        slots = len(held["accept"].iloc[-1])
        accept.append([_finished(held, factors, slot) for slot in range(slots)])
    if len(groups) < 3:
        raise ValueError(f"runs must hold at least 3 finished runs, got {len(groups)}")
    settings: list[Hashable] = [key[:3] for key in groups]
    if len(set(settings)) == 1:
        settings = list(groups)
    of_slots = [setting for setting, slots in zip(settings, accept, strict=True) for _ in slots]
    return Reference(
        _learn(tau, settings),
        _learn([run for slots in accept for run in slots], of_slots),
        source or f"{len(groups)} runs",
    )


def _run_config(lines: pd.DataFrame) -> TrainConfig:
    """What decides a run's learning rates; sweeps have the default schedule."""
    steps, peak, warmup = lines[["steps", "learning_rate", "warmup_steps"]].iloc[0]
    return TrainConfig(steps=int(steps), learning_rate=float(peak), warmup_steps=int(warmup))


def _points_table(points: pd.DataFrame, steps: int | None) -> pd.DataFrame:
    """The lines that are points, in order."""
    missing = {"step", "tau"} - set(points)
    if missing:
        raise ValueError(f"points must have step and tau, got {list(points)}")
    table = points if "kind" in points else points.assign(kind="held_out")
    table = table[table["kind"].isin(["held_out", "train"]) & table["tau"].notna()]
    if table.empty:
        raise ValueError("points must hold at least one of kind held_out or train, got none")
    last = table["step"].max()
    if table["step"].min() < 1 or (steps is not None and last > steps):
        got = f"got {table['step'].min()} to {last}"
        raise ValueError(
            f"points must be of steps 1 to {steps}, those of the learning rates, {got}"
        )
    return table.sort_values("step", kind="stable")


def _factors(
    rates: Float[np.ndarray, " step"], whole: float
) -> Float[np.ndarray, "step coefficient"]:
    """The coefficients' factors after each step; ``whole``: the area that is the unit."""
    share = rates.cumsum() / whole
    fallen = np.where(np.arange(len(rates)) < rates.argmax(), 0, 1 - rates / rates.max())
    one = np.ones_like(share)
    return np.stack([one, np.log(share), share, fallen, 0 * one], axis=1)


def _points(
    table: pd.DataFrame, factors: Float[np.ndarray, "step coefficient"], slot: int | None = None
) -> Points:
    """The points of tau, or of a slot's accept rate; the factors of training points are means."""
    step = table["step"].to_numpy(dtype=int)
    kind = (table["kind"] == "train").to_numpy().astype(int)
    design, trained = factors[step - 1].copy(), kind == 1
    total = np.concatenate([np.zeros_like(factors[:1]), factors.cumsum(axis=0)])
    last = step[trained]
    first = np.append(0, last)[:-1]
    design[trained] = (total[last] - total[first]) / np.maximum(last - first, 1)[:, None]
    design[:, -1] = kind
    weight = 1 / (1 + _EARLY / step)
    weight[trained] *= (last - first) * WINDOWS / len(factors)
    if slot is None:
        y = np.log(np.maximum(table["tau"].to_numpy(dtype=float) - 1, 1e-3))
    else:
        y = logit(np.clip([rates[slot] for rates in table["accept"]], 1e-3, 1 - 1e-3))
    return Points(step, kind, design, y, weight)


def _tau(y: Any) -> Any:
    return 1 + np.exp(y)


def _sums(points: Points) -> _Sums:
    parts = []
    for kind in (0, 1):
        _, _, design, y, weight = points.where(points.kind == kind)
        scaled = design.T * weight
        parts.append((scaled @ design, scaled @ y, weight @ y**2, float(len(y))))
    return _Sums(*(np.array(part) for part in zip(*parts, strict=True)))


def _solve(
    curves: Curves, squares: np.ndarray, products: np.ndarray
) -> tuple[Float[np.ndarray, "run coefficient"], np.ndarray]:
    """Mean and covariance of each run's coefficients, from its sums."""
    precision = np.zeros_like(curves.covariance)
    precision[1:, 1:] = np.linalg.inv(curves.covariance[1:, 1:])
    certain = curves.noise**-2
    covariance = np.linalg.inv(precision + np.einsum("rkij,k->rij", squares, certain))
    weighted = precision[:, 1:] @ curves.mean[1:] + np.einsum("rkj,k->rj", products, certain)
    return np.einsum("rij,rj->ri", covariance, weighted), covariance


def _deviation(design: np.ndarray, covariance: np.ndarray, noise: float = 0.0) -> Any:
    return np.sqrt(np.einsum("...i,ij,...j->...", design, covariance, design) + noise**2)


def _finished(
    table: pd.DataFrame, factors: Float[np.ndarray, "step coefficient"], slot: int | None = None
) -> _Run:
    points = _points(table, factors, slot)
    return _Run(points, np.exp(factors[points.step - 1, 1]))


def _learn(runs: Sequence[_Run], settings: Sequence[Hashable]) -> Curves:
    """The distribution of the runs' coefficients, and how far off it is on settings left out."""
    found = [_sums(run.points) for run in runs]
    errors: dict[tuple[int, int], list[float]] = {}
    for left_out in dict.fromkeys(settings):
        inside = [setting == left_out for setting in settings]
        others = [sums for sums, out in zip(found, inside, strict=True) if not out]
        curves = _likeliest(others)
        for run, out in zip(runs, inside, strict=True):
            for kind, place in product((0, 1), range(len(SHARES))) if out else ():
                error = _end_error(curves, run, kind, SHARES[place])
                if error is not None:
                    errors.setdefault((kind, place), []).append(error)
    scale = np.ones((2, len(SHARES)))
    for at, values in errors.items():
        share = min(1.0, 0.9 * (1 + 1 / len(values)))
        scale[at] = np.quantile(values, share) / norm.ppf(0.95)
    return replace(_likeliest(found), scale=scale)


def _end_error(curves: Curves, run: _Run, kind: int, share: float) -> float | None:
    """The error of a run's end from its first part, in standard deviations, without the sign."""
    points = run.points
    ends = np.flatnonzero(points.kind == kind)
    # A run without evaluations has training points alone.
    seen = np.flatnonzero((run.share <= share) & (points.kind >= kind))
    if not len(ends) or not len(seen):
        return None
    end = ends[-1]
    mean, covariance = curves.fit(points.where(seen))
    design = points.design[end]
    off = points.y[end] - design @ mean
    return float(abs(off) / _deviation(design, covariance, curves.noise[kind]))


def _likeliest(found: Sequence[_Sums]) -> Curves:
    """The normal distribution of coefficients under which the runs' points are the likeliest."""
    squares, products, y_squared, count = (np.array(part) for part in zip(*found, strict=True))
    size = len(COEFFICIENTS)
    curves = Curves(np.zeros(size), np.eye(size), np.array([0.1, 0.3]), np.ones((2, 1)), len(found))
    for _ in range(_ITERATIONS):
        means, covariances = _solve(curves, squares, products)
        mean = means.mean(axis=0)
        off = means - mean
        covariance = (
            off.T @ off + covariances.sum(axis=0) + _LEAST_RUNS * _LEAST_VARIANCE * np.eye(size)
        )
        second = covariances + means[:, :, None] * means[:, None, :]
        explained = 2 * np.einsum("rkj,rj->k", products, means)
        residual = y_squared.sum(axis=0) - explained + np.einsum("rkij,rij->k", squares, second)
        points = count.sum(axis=0)
        noise = np.where(points > 0, np.sqrt(residual / np.maximum(points, 1)), curves.noise)
        covariance /= len(found) + _LEAST_RUNS
        curves = replace(curves, mean=mean, covariance=covariance, noise=noise)
    return curves


def _slot_table(
    table: pd.DataFrame,
    own_factors: np.ndarray,
    end: np.ndarray,
    curves: Curves,
    share: float,
    level: float,
) -> pd.DataFrame:
    """The accept rate of each slot at the end, where evaluations have them."""
    columns = ["slot", "accept", "low", "high"]
    held = table[table["kind"] == "held_out"]
    if "accept" not in held or held.empty or held["accept"].isna().any():
        return pd.DataFrame(columns=columns)
    lines = []
    for slot in range(len(held["accept"].iloc[-1])):
        mean, covariance = curves.fit(_points(held, own_factors, slot))
        y, half = (
            end @ mean,
            curves.half(0, share, level) * _deviation(end, covariance, curves.noise[0]),
        )
        lines.append((slot, *expit([y, y - half, y + half])))
    return pd.DataFrame(lines, columns=columns)


def _reason(forecast: Forecast) -> str:
    where = "held-out tau" if forecast.kind == "held_out" else "training's tau (no evaluation yet)"
    sure = f"with {forecast.level:.0%} probability"
    end = f"{where} will be {forecast.tau:.2f}, {sure} {forecast.low:.2f} to {forecast.high:.2f}"
    gain = f"{forecast.gain:+.1%} ({forecast.gain_low:+.1%} to {forecast.gain_high:+.1%})"
    word = "it has flattened" if forecast.flat else "it has not flattened"
    return (
        f"After {forecast.step:,} of {forecast.steps:,} steps: at the end {end}; a tenth more steps "
        f"would bring {gain}: {word}."
    )


_TAU = Curves(
    np.array([-3.022, 0.01597, 2.113, -0.3598, 1.036]),
    np.array(
        [
            [0.4293, 0.02332, -0.05255, -0.01552, 0.03231],
            [0.02332, 0.003394, -0.006418, -0.001864, 0.003879],
            [-0.05255, -0.006418, 0.01811, 0.003384, -0.008742],
            [-0.01552, -0.001864, 0.003384, 0.002832, -0.00279],
            [0.03231, 0.003879, -0.008742, -0.00279, 0.006698],
        ]
    ),
    np.array([0.2317, 0.4493]),
    np.array(
        [
            [1.471, 1.293, 0.9423, 0.7977, 0.7201, 0.8341],
            [0.7222, 1.401, 1.296, 1.487, 1.249, 1.012],
        ]
    ),
    19,
)
_ACCEPT = Curves(
    np.array([-3.393, 0.05259, 2.302, -0.8558, 0]),
    np.array(
        [
            [0.3241, 0.01191, -0.04942, 0.01728, 0],
            [0.01191, 0.003279, -0.0112, 0.003399, 0],
            [-0.04942, -0.0112, 0.07741, -0.04037, 0],
            [0.01728, 0.003399, -0.04037, 0.02837, 0],
            [0, 0, 0, 0, 0.4751],
        ]
    ),
    np.array([0.3251, 0.3]),
    np.array([[1.044, 0.9334, 0.8721, 0.7137, 0.6, 0.5792], [1, 1, 1, 1, 1, 1]]),
    160,
)
# Learned from 19 runs of the pocket target that no advice is judged on: conversations of "math",
# 2 or 4 rows, 6 to 96 anchors, 4 to 15 slots, 22 to 2,000 steps, the rate falling by a cosine.
REFERENCE = Reference(_TAU, _ACCEPT, "19 small runs of the lab's")
