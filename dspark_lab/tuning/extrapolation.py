"""Learning curves: where tau will be at the end of a run, from its points so far.

The log-odds of the one accept rate of all slots that tau stands for (:mod:`.growth`; of endless
blocks it is the logarithm of tau - 1) is, in the run's own time,

    y = level + growth g + annealing v + offset of training + wander,

where g = 2 (sqrt(s) - 1) grows with the share s = S / S_end of the whole run's area under the
learning rate, and v = 1 - rate / peak with how far the rate has fallen since its peak: after Tissue
et al. 2024 (arXiv 2408.11029), whose loss has a power of S and a gain by annealing. ``wander`` is
what a run does besides, forgotten within some e-folds of S (an Ornstein-Uhlenbeck process), so that
the last points count most. A run that its points show to be unlike others may grow by another power
of s, or by its logarithm, and may be less noisy.

The level is the run's own. All other coefficients are drawn from a normal distribution over runs,
:class:`Curves`, so that a run's points overrule it as they come; its mean depends on how long the
run is. How wide the intervals are follows from how far the same procedure was off on other runs at
the same share of the run, never from the residuals of the fit alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab.checks import Positive, checked, require_columns
from dspark_lab.files import read_json, shipped
from dspark_lab.training import TrainConfig
from dspark_lab.tuning.cells import ALL
from dspark_lab.tuning.growth import logit_of, tau_at, tau_slope
from dspark_lab.tuning.results import RUN

# The coefficients, in this order.
COEFFICIENTS = ("level", "growth", "annealing", "training")
# Shares of a run's area at which finished runs are extrapolated, to see how far off that is.
SHARES = (0.05, 0.1, 0.2, 0.4, 0.7, 0.9)
# Another tenth of steps that brings less than this share of tau leaves it flat.
FLAT, TENTH = 0.01, 1.1
# All that follows was chosen on 22 runs of "math" conversations that no advice is judged on, 22 to
# 2,000 steps long. Variances, in units of the noise's:
# of wander, of a training point that is the mean over a fortieth of a run, and of any point the
# more, the earlier: at first a drafter's outputs still swing.
_WANDER, _TRAINING, _WINDOWS, _EARLY = 4.0, 4.0, 40, 10.0
# E-folds of the area in which wander is forgotten.
_MEMORY = 1.5
# The standard deviation of an evaluation's tau around its curve.
_EVALUATION = 0.02
# A run may be less noisy than others, by one of these factors, or unlike them: then it grows by
# another power of s, 0 being the logarithm, and this is what is known of its coefficients.
_NOISES, _POWERS = (1.0, 0.5, 0.25, 0.125), (0.0, -0.5)
_UNLIKE = (np.array([0, 0.25, 0.3, 1.0]), np.diag([1.0, 0.3, 0.3, 1.0]) ** 2)
_ODDS = 0.05
# The most that y is ever said to be unsure by, and how near to its bounds tau may come.
_MOST, _LEAST = 10.0, 1e-3
_ITERATIONS = 40
# The least variance of the coefficients, and for how many runs it counts.
_LEAST_VARIANCE, _LEAST_RUNS = 1e-3, 2


@dataclass(frozen=True, eq=False)
class Curves:
    """How learning curves are bent, and how far their extrapolations are off.

    ``mean`` of :data:`COEFFICIENTS` over runs, and what it changes by with the logarithm of a run's
    length (its area over its peak, in steps), which is cut to ``lengths``, those learned from; the
    ``covariance`` of the coefficients; of the level, neither is used. ``noise``: standard deviation
    of an evaluation around its curve. ``scale``: at each of :data:`SHARES`, the 90 % quantile of
    the error of the end over that of the normal distribution which the points leave, of runs with
    evaluations, then of runs without. ``runs``: how many were learned from.
    """

    mean: Float[np.ndarray, "2 coefficient"]
    covariance: Float[np.ndarray, "coefficient coefficient"]
    noise: float
    lengths: tuple[float, float]
    scale: Float[np.ndarray, "kind share"]
    runs: int


@dataclass(frozen=True, eq=False)
class Reference:
    """The curves of tau and of slots' accept rates in other runs, and which runs these are."""

    tau: Curves
    accept: Curves | None
    source: str


@dataclass(frozen=True, eq=False)
class Forecast:
    """Where tau will be at the end of a run, ``low`` to ``high`` with probability ``level``.

    ``kind``: "held_out" where the points hold evaluations, else "train", the mean over the last
    fortieth of training. ``gain``: what another tenth of steps would bring, the schedule stretched
    over them, as a share of tau, ``gain_low`` to ``gain_high``: what it brings from run to run of
    other lengths, times how this run's growth compares with theirs; ``flat``: whether this is below
    1 % up to its upper end. ``table``: the curve so far and to come, a line a ``step``: ``tau``,
    ``low``, ``high``, and whether it is ``ahead``. ``by_slot``: the ``accept`` rate of each
    ``slot`` at the end, ``low`` to ``high``; no lines where the points have none. ``step`` is the
    last one measured, ``steps`` the last one of the run; ``source``: the runs that say how curves
    go on; ``reason``: all of it in words; ``options``: see ``progress`` of :func:`forecast`.
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
    options: pd.DataFrame | None = None

    def __repr__(self) -> str:
        return self.reason


class Points(NamedTuple):
    """Points of a curve: step, kind (0 held out, 1 training), log s, factors, y, its variance."""

    step: Int[np.ndarray, " point"]
    kind: Int[np.ndarray, " point"]
    x: Float[np.ndarray, " point"]
    design: Float[np.ndarray, "point coefficient"]
    y: Float[np.ndarray, " point"]
    variance: Float[np.ndarray, " point"]

    def where(self, keep: Any) -> Points:
        return Points(*(part[keep] for part in self))


class _Sums(NamedTuple):
    """Sums over points that are made independent: of squares, of products with y, of y squared."""

    squares: Float[np.ndarray, "*run coefficient coefficient"]
    products: Float[np.ndarray, "*run coefficient"]
    y_squared: Float[np.ndarray, "*run"]
    points: Float[np.ndarray, "*run"]


@checked
def learning_rates(config: TrainConfig) -> Float[np.ndarray, " step"]:
    """The learning rate of every step of a run."""
    return np.array([config.learning_rate_at(step) for step in range(config.steps)])


@checked
def extrapolate(
    points: pd.DataFrame,
    learning_rates: Float[np.ndarray, " step"],
    *,
    reference: Reference | None = None,
    level: Positive = 0.9,
) -> Forecast:
    """Extrapolate the points of a run to its end.

    Args:
        points: a line for each: ``step`` (until which, from 1), ``tau``; optional ``kind``,
            "held_out" (else all are) or "train" (the mean over the steps since the training point
            before), ``accept``, for evaluations the list of accept rates by slot, and
            ``block_size``: by either of these two it is known what tau cannot exceed. A run's lines
            of :func:`load_runs` are such a table, of one domain; other kinds of line are ignored.
            For tau of fewer slots, give ``tau`` and ``accept`` of fewer.
        learning_rates: of every step of the run that is asked about, from its first to its last.
        reference: what :func:`learn_curves` learned from other runs; by default
            :func:`shipped_reference`, from small runs of this lab.
        level: of the intervals, below 1; levels other than 0.9 take errors as normal.
    """
    if level >= 1:
        raise ValueError(f"level must be below 1, got {level}")
    reference = reference or shipped_reference()
    rates = learning_rates
    if not len(rates) or not np.isfinite(rates).all() or rates[0] <= 0 or rates.min() < 0:
        raise ValueError("learning_rates must be finite, the first above 0 and none below")
    table = _points_table(points, len(rates))
    area = rates.cumsum()
    factors = _factors(rates, float(area[-1]))
    slots = _slots(table)
    found = _points(table, factors, slots)
    kind = int((found.kind == 1).all())
    step = int(found.step.max())
    now, length = float(area[step - 1]), float(area[-1] / rates.max())
    share = now / float(area[-1])
    fit = _Fit(reference.tau, found, length, slots)
    at = np.unique(np.linspace(1, len(area), 121).round().astype(int)) - 1
    ahead = area[at] > now
    design = factors[at]
    design[:, -1] = kind
    y, deviation = fit.predict(design)
    half = deviation * _quantile(reference.tau, kind, now / np.maximum(area[at], now), level)
    half = np.minimum(half, _MOST)
    frame = pd.DataFrame({"step": at + 1, "tau": tau_at(y, slots)})
    frame["low"], frame["high"] = tau_at(y - half, slots), tau_at(y + half, slots)
    frame["ahead"] = ahead
    tau, low, high = (float(frame[name].iloc[-1]) for name in ("tau", "low", "high"))
    growth, spread = fit.mean[1], fit.covariance[1, 1] ** 0.5
    spread *= _quantile(reference.tau, kind, share, level)
    # What a longer run gains, times how this run's growth compares with that of others.
    more = reference.tau.mean[1, 0] * np.log(TENTH) / fit.prior[1]
    gained = more * (growth + spread * np.array([0, -1, 1]))
    gain, gain_low, gain_high = (tau_at(y[-1] + gained, slots) / tau - 1).tolist()
    of: Literal["held_out", "train"] = "train" if kind else "held_out"
    result = Forecast(
        tau=tau,
        low=low,
        high=high,
        level=level,
        kind=of,
        step=step,
        steps=len(area),
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        flat=gain_high < FLAT,
        table=frame,
        by_slot=_slot_table(table, factors, reference.accept, length, level),
        source=reference.source,
        reason="",
    )
    return replace(result, reason=_reason(result))


@checked
def learn_curves(
    runs: pd.DataFrame, *, domain: str = ALL, by_slot: bool = True, source: str | None = None
) -> Reference:
    """Learn from finished runs, as :func:`load_runs` gives them, how curves go on.

    The coefficients' distribution is the likeliest one (by expectation and maximisation: Laird and
    Ware 1982, Biometrics 38). How far extrapolations are off is seen on runs that were left out:
    all of one budget and mix at a time, or one run at a time where all are of one. ``domain``: of
    the held-out conversations; ``by_slot``: learn of accept rates, too, which takes longer.
    """
    line = ["kind", "step", "domain", "tau", "lr"] + ["accept"] * by_slot
    require_columns("runs", runs, [*RUN, "steps", *line])
    groups, tau, accept = [], [], []
    for key, lines in runs.groupby(RUN, observed=True, sort=False):
        rates = run_rates(lines)
        whole = float(rates.sum())
        factors, length = _factors(rates, whole), whole / float(rates.max())
        table = _points_table(run_points(lines, domain), None)
        groups.append(key)
        slots = _slots(table)
        tau.append(_Run(_points(table, factors, slots), length, slots))
        held = _by_slot(table) if by_slot else []
        accept.append([_Run(_points(one, factors, 1), length, 1) for one in held])
    if len(groups) < 3:
        raise ValueError(f"runs must hold at least 3 finished runs, got {len(groups)}")
    settings: list[Hashable] = [key[:3] for key in groups]
    if len(set(settings)) == 1:
        settings = list(groups)
    of_slots = [setting for setting, slots in zip(settings, accept, strict=True) for _ in slots]
    return Reference(
        _learn(tau, settings),
        _learn([run for slots in accept for run in slots], of_slots) if by_slot else None,
        source or f"{len(groups)} runs",
    )


def run_rates(lines: pd.DataFrame) -> Float[np.ndarray, " step"]:
    """The learning rate of every step of a run, straight between the ends of its windows."""
    windows = lines[lines["kind"] == "train"].sort_values("step")
    steps = np.arange(1, int(lines["steps"].iloc[0]) + 1)
    return np.interp(steps, windows["step"], windows["lr"])


def run_points(lines: pd.DataFrame, domain: str = ALL) -> pd.DataFrame:
    """A run's training windows, and its evaluations of one domain."""
    held_out = (lines["kind"] == "held_out") & (lines["domain"] == domain)
    found = lines[held_out | (lines["kind"] == "train")]
    if not held_out.any():
        allowed = sorted(set(lines["domain"].dropna()))
        raise ValueError(f"domain must be one of {allowed}, got {domain!r}")
    return found


def _points_table(points: pd.DataFrame, steps: int | None) -> pd.DataFrame:
    """The lines that are points, in order."""
    if missing := {"step", "tau"} - set(points):
        raise ValueError(f"points must have step and tau, got no {' and no '.join(missing)}")
    table = points if "kind" in points else points.assign(kind="held_out")
    table = table[table["kind"].isin(["held_out", "train"]) & table["tau"].notna()]
    if table.empty:
        raise ValueError("points must hold an evaluation or a training step, got neither")
    first, last = table["step"].min(), table["step"].max()
    if first < 1 or (steps is not None and last > steps):
        wanted = f"lie between 1 and {steps}, the number of learning rates"
        raise ValueError(f"points' steps must {wanted}, got {first} to {last}")
    return table.sort_values("step", kind="stable")


def _factors(
    rates: Float[np.ndarray, " step"], whole: float
) -> Float[np.ndarray, "step coefficient"]:
    """The coefficients' factors after each step; ``whole``: the area that is the unit."""
    growth = 2 * (np.sqrt(rates.cumsum() / whole) - 1)
    fallen = np.where(np.arange(len(rates)) < rates.argmax(), 0, 1 - rates / rates.max())
    return np.stack([np.ones_like(growth), growth, fallen, 0 * growth], axis=1)


def _log_share(design: Float[np.ndarray, "point coefficient"]) -> Float[np.ndarray, " point"]:
    """The logarithm of the share of the area, of whose root growth is a function."""
    return 2 * np.log1p(design[:, 1] / 2)


def _with_power(
    design: Float[np.ndarray, "point coefficient"], power: float
) -> Float[np.ndarray, "point coefficient"]:
    """The factors with another power of the share, instead of its root."""
    share = _log_share(design)
    grown = share if power == 0 else np.expm1(power * share) / power
    return np.concatenate([design[:, :1], grown[:, None], design[:, 2:]], axis=1)


def _slots(table: pd.DataFrame) -> float:
    """The slots of a block, infinitely many where nothing says how many there are."""
    if "block_size" in table:
        return float(table["block_size"].iloc[0])
    held = table["accept"].dropna().tolist() if "accept" in table else []
    return float(len(held[0])) if held else math.inf


def _by_slot(table: pd.DataFrame) -> list[pd.DataFrame]:
    """The evaluations of each slot, as a block of one slot: its tau is 1 + the accept rate."""
    held = table[table["kind"] == "held_out"]
    if "accept" not in held or held.empty or held["accept"].isna().any():
        return []
    return [held.assign(tau=1 + rates) for rates in np.array(held["accept"].tolist()).T]


def _points(
    table: pd.DataFrame, factors: Float[np.ndarray, "step coefficient"], slots: float
) -> Points:
    """The points of the tau of so many slots; the factors of training points are means."""
    step = table["step"].to_numpy(dtype=int)
    kind = (table["kind"] == "train").to_numpy().astype(int)
    design, trained = factors[step - 1].copy(), kind == 1
    total = np.concatenate([np.zeros_like(factors[:1]), factors.cumsum(axis=0)])
    last = step[trained]
    over = np.maximum(last - np.append(0, last)[:-1], 1)
    design[trained] = (total[last] - total[last - over]) / over[:, None]
    design[:, -1] = kind
    variance = 1 + _EARLY / step
    variance[trained] *= _TRAINING * len(factors) / _WINDOWS / over
    tau = np.clip(table["tau"].to_numpy(dtype=float), 1 + _LEAST, slots + 1 - _LEAST)
    y = logit_of(tau, np.full(len(tau), slots))
    return Points(step, kind, _log_share(design), design, y, variance)


def _wander(
    one: Float[np.ndarray, " a"], other: Float[np.ndarray, " b"]
) -> Float[np.ndarray, "a b"]:
    """The covariance of wander at all pairs of points, told by the logarithms of their shares."""
    return _WANDER * np.exp(-np.abs(one[:, None] - other) / _MEMORY)


def _sums(points: Points) -> _Sums:
    root = np.linalg.cholesky(np.diag(points.variance) + _wander(points.x, points.x))
    design, y = np.linalg.solve(root, points.design), np.linalg.solve(root, points.y)
    return _Sums(design.T @ design, design.T @ y, y @ y, np.array(float(len(y))))


def _solve(
    curves: Curves, sums: _Sums, lengths: Float[np.ndarray, " run"]
) -> tuple[Float[np.ndarray, "run coefficient"], np.ndarray]:
    """Mean and covariance of each run's coefficients, given its points."""
    precision = np.zeros_like(curves.covariance)
    precision[1:, 1:] = np.linalg.inv(curves.covariance[1:, 1:])
    covariance = np.linalg.inv(precision + sums.squares / curves.noise**2)
    prior = _logs(lengths, curves.lengths) @ curves.mean
    weighted = prior[:, 1:] @ precision[1:] + sums.products / curves.noise**2
    return np.einsum("rij,rj->ri", covariance, weighted), covariance


def _logs(lengths: Any, limits: tuple[float, float]) -> Float[np.ndarray, "run 2"]:
    log = np.log(np.clip(np.asarray(lengths, dtype=float), *limits))
    return np.stack([np.ones_like(log), log], axis=-1)


class _Run(NamedTuple):
    """A run's points, its length, and the slots of its blocks."""

    points: Points
    length: float
    slots: float


class _Fit:
    """The coefficients of one run, given its points, and what follows from them."""

    def __init__(self, curves: Curves, points: Points, length: float, slots: float) -> None:
        self.slots = slots
        self.prior = _logs(length, curves.lengths) @ curves.mean
        like = (0.5, 1.0, self.prior, curves.covariance)
        unlike = [(power, _ODDS, *_UNLIKE) for power in _POWERS]
        fits = []
        for power, odds, mean, covariance in (like, *unlike):
            shaped = points._replace(design=_with_power(points.design, power))
            sums = _sums(shaped)
            for less in _NOISES:
                # A density of the noise that falls off with its square.
                odds_so = odds * less**2
                fit = _fit(sums, mean, covariance, curves.noise * less)
                fits.append((fit[0] + np.log(odds_so), power, shaped, *fit[1:]))
        best = max(fits, key=lambda fit: fit[0])
        _, self.power, self.points, self.noise, self.mean, self.covariance = best

    def predict(
        self, design: Float[np.ndarray, "at coefficient"]
    ) -> tuple[Float[np.ndarray, " at"], Float[np.ndarray, " at"]]:
        """y, and its standard deviation, of evaluations, or of training where its factor is 1."""
        points, near = self.points, _wander(_log_share(design), self.points.x)
        design = _with_power(design, self.power)
        known = np.diag(points.variance) + _wander(points.x, points.x)
        weights = np.linalg.solve(known, near.T).T
        y = design @ self.mean + weights @ (points.y - points.design @ self.mean)
        variance = self.noise**2 * (_WANDER - (weights * near).sum(axis=1))
        variance += _deviation(design - weights @ points.design, self.covariance) ** 2
        trained = design[:, -1] == 1
        evaluated = _EVALUATION / tau_slope(y, self.slots)
        own = np.where(trained, self.noise * _TRAINING**0.5, evaluated)
        return y, np.sqrt(variance + own**2)


def _fit(
    sums: _Sums,
    prior: Float[np.ndarray, " coefficient"],
    covariance: Float[np.ndarray, "coefficient coefficient"],
    noise: float,
) -> tuple[float, float, np.ndarray, np.ndarray]:
    """The evidence for the distribution and the noise, and the coefficients under them."""
    precision = np.zeros_like(covariance)
    precision[1:, 1:] = np.linalg.inv(covariance[1:, 1:])
    posterior = np.linalg.inv(precision + sums.squares / noise**2)
    weighted = precision @ prior + sums.products / noise**2
    mean = posterior @ weighted
    misfit = sums.y_squared / noise**2 + prior @ precision @ prior - mean @ weighted
    size = np.linalg.slogdet(precision[1:, 1:])[1] + np.linalg.slogdet(posterior)[1]
    evidence = (size - misfit) / 2 - sums.points * np.log(noise)
    return float(evidence), noise, mean, posterior


def _deviation(design: np.ndarray, covariance: np.ndarray) -> Any:
    return np.sqrt(np.einsum("...i,ij,...j->...", design, covariance, design))


def _quantile(curves: Curves, kind: int, share: Any, level: float) -> Any:
    """Half the interval of ``level``, in standard deviations, from this share of a run."""
    return np.interp(share, SHARES, curves.scale[kind]) * NormalDist().inv_cdf((1 + level) / 2)


def _learn(runs: Sequence[_Run], settings: Sequence[Hashable]) -> Curves:
    """The distribution of the runs' coefficients, and how far off it is on settings left out."""
    lengths = np.array([run.length for run in runs])
    found = _Sums(*map(np.array, zip(*(_sums(run.points) for run in runs), strict=True)))
    errors: dict[tuple[int, int], list[float]] = {}
    for left_out in dict.fromkeys(settings):
        inside = np.array([setting == left_out for setting in settings])
        curves = _likeliest(_Sums(*(part[~inside] for part in found)), lengths[~inside])
        for place in np.flatnonzero(inside).tolist():
            for kind, number in product((0, 1), range(len(SHARES))):
                error = _end_error(curves, runs[place], kind, SHARES[number])
                if error is not None:
                    errors.setdefault((kind, number), []).append(error)
    scale = np.ones((2, len(SHARES)))
    for at, values in errors.items():
        share = min(1.0, 0.9 * (1 + 1 / len(values)))
        scale[at] = np.quantile(values, share) / NormalDist().inv_cdf(0.95)
    return replace(_likeliest(found, lengths), scale=scale)


def _end_error(curves: Curves, run: _Run, kind: int, share: float) -> float | None:
    """The size of the error of a run's end from its first part, in standard deviations."""
    points = run.points
    ends = np.flatnonzero(points.kind == kind)
    # A run without evaluations has training points alone.
    seen = (points.kind >= kind) & (points.x <= np.log(share))
    if not len(ends) or not (seen & (points.kind == kind)).any():
        return None
    end = points.where(ends[-1:])
    fit = _Fit(curves, points.where(seen), run.length, run.slots)
    y, deviation = fit.predict(end.design)
    return float(abs(end.y - y)[0] / deviation[0])


def _likeliest(sums: _Sums, lengths: Float[np.ndarray, " run"]) -> Curves:
    """The distribution of coefficients under which the runs' points are the likeliest."""
    size, runs = len(COEFFICIENTS), len(lengths)
    limits = (float(lengths.min()), float(lengths.max()))
    logs = _logs(lengths, limits)
    center = logs[:, 1].mean()
    centered = logs - [0, center]
    # One more run holds the change with length at none.
    squares = centered.T @ centered + np.diag([0, 1])
    curves = Curves(np.zeros((2, size)), np.eye(size), 0.1, limits, np.ones((2, 1)), runs)
    least = _LEAST_RUNS * _LEAST_VARIANCE * np.eye(size)
    for _ in range(_ITERATIONS):
        means, covariances = _solve(curves, sums, lengths)
        mean = np.linalg.solve(squares, centered.T @ means)
        off = means - centered @ mean
        mean[0] -= center * mean[1]
        covariance = (off.T @ off + covariances.sum(axis=0) + least) / (runs + _LEAST_RUNS)
        second = covariances + means[:, :, None] * means[:, None, :]
        explained = 2 * (sums.products * means).sum() - (sums.squares * second).sum()
        left = max((sums.y_squared.sum() - explained) / sums.points.sum(), _LEAST_VARIANCE**2)
        noise = float(np.sqrt(left))
        curves = replace(curves, mean=mean, covariance=covariance, noise=noise)
    return curves


def _slot_table(
    table: pd.DataFrame,
    factors: Float[np.ndarray, "step coefficient"],
    curves: Curves | None,
    length: float,
    level: float,
) -> pd.DataFrame:
    """The accept rate of each slot at the end, where evaluations have them."""
    lines = []
    for slot, held in enumerate(_by_slot(table) if curves else ()):
        assert curves
        fit = _Fit(curves, _points(held, factors, 1), length, 1)
        (y,), (deviation,) = fit.predict(factors[-1:])
        share = np.exp(_log_share(factors[[held["step"].max() - 1]]))
        half = float(_quantile(curves, 0, share, level)[0] * deviation)
        lines.append((slot, *(tau_at(y + np.array([0, -half, half]), 1) - 1)))
    return pd.DataFrame(lines, columns=["slot", "accept", "low", "high"])


def _reason(forecast: Forecast) -> str:
    where = "held-out tau" if forecast.kind == "held_out" else "training's tau (no evaluation yet)"
    between = f"{forecast.low:.2f} to {forecast.high:.2f} with {forecast.level:.0%} probability"
    gain = f"{forecast.gain:+.1%} ({forecast.gain_low:+.1%} to {forecast.gain_high:+.1%})"
    word = "has flattened" if forecast.flat else "has not flattened"
    return (
        f"After {forecast.step:,} of {forecast.steps:,} steps: {where} will be {forecast.tau:.2f} "
        f"at the end, {between}; a tenth more steps would bring {gain}, so it {word}."
    )


@cache
def shipped_reference() -> Reference:
    """What the shipped runs (:func:`load_runs`) of one seed teach of learning curves."""
    found = read_json(shipped("pocket/learned.json"))
    tau, accept = (_curves(**found[name]) for name in ("tau", "accept"))
    return Reference(tau, accept, found["source"])


def _curves(lengths: Any, noise: float, runs: int, **arrays: Any) -> Curves:
    """Curves as JSON has them."""
    made = {name: np.array(values) for name, values in arrays.items()}
    return Curves(lengths=tuple(lengths), noise=noise, runs=runs, **made)
