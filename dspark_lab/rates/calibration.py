"""Calibration of the confidences in a trace: report, reliability, drift, bias and variance.

A confidence is a predicted probability that a drafted slot is accepted, given that all slots before
it in its round were. Its outcome is *empirical* (accepted, 0 or 1) or *analytic* (the accept rate
c* = sum_v min(p_draft, p_target)), on *reached* slots alone: verified, and all before accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from dspark_lab.checks import Count, NotEmpty, Positive, Size, checked
from dspark_lab.decoding import Outcome, Rounds, column, read_trace
from dspark_lab.rates import scaling, scores
from dspark_lab.rates.intervals import interval, resampled
from dspark_lab.rates.survival import prefix_survival


@checked
def split_prompts(
    trace: pd.DataFrame, share: float = 0.5, *, seed: Size = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut a trace in two by conversation, drawn within each domain: to fit on, and to report on."""
    prompt, domain = column(trace, "prompt"), column(trace, "domain")
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for _, part in prompt.groupby(domain, sort=True, dropna=False):
        prompts = np.sort(part.unique())
        chosen.extend(rng.permutation(prompts)[: round(share * len(prompts))])
    fitted = prompt.isin(chosen)
    if fitted.all() or not fitted.any():
        raise ValueError(f"share {share} of {prompt.nunique()} conversations leaves one side empty")
    return trace[fitted], trace[~fitted]


@checked
def calibration_report(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    outcome: Outcome = "empirical",
    bins: Count = 15,
    binning: scores.Binning = "width",
    grid: ArrayLike = scaling.TEMPERATURE_GRID,
    resamples: Count = 200,
    seed: Size = 0,
) -> pd.DataFrame:
    """Return the calibration of each slot before and after scaling, on conversations held out.

    Temperatures are found on what ``fit`` accepted, as :meth:`SequentialTemperatures.fit` does;
    non-identifiable slots keep their confidences. Every figure is of ``test``. Intervals are 95 %
    percentile bootstraps over its conversations, temperatures and bins kept. Resampling adds chance
    of its own, which a calibration error takes for miscalibration: its interval lies too high, the
    more so the nearer it is to 0.

    Args:
        fit, test: traces of one drafter without a prompt in common, as from :func:`split_prompts`.

    Returns:
        one row for each ``slot``, and a last one, ``"all"``, of all reached slots together.
        ``ece_product`` is the error of the product up to the slot against survival; ``_scaled``
        marks the figures of scaled confidences. NaN where undefined.
    """
    fitted, held = scaling.disjoint_rounds(fit, test)
    calibrated = scaling.fit_identifiable_slots(fitted, grid=grid, bins=bins, binning=binning)
    temperatures = np.array(calibrated.temperatures)
    survival = prefix_survival(fitted.outcome())
    temperatures[list(scaling.non_identifiable_slots(fitted.confidence, survival, bins))] = np.nan
    seen = held.outcome(outcome)
    survival = prefix_survival(seen)
    drawn = resampled(int(held.conversation.max()) + 1, resamples, seed)

    def figures(
        confidence: Float[np.ndarray, "round slot"], part: slice, suffix: str
    ) -> dict[str, float]:
        taken = ~np.isnan(seen[:, part])
        f, o = confidence[:, part][taken], seen[:, part][taken]
        known = ~np.isnan(survival[:, part]) & ~np.isnan(confidence[:, part])
        product, survived = np.cumprod(confidence, axis=1)[:, part][known], survival[:, part][known]
        low = high = float("nan")
        error = scores.error_or_nan(f, o, bins, binning)
        if not np.isnan(error):
            owner = held.conversation[np.nonzero(taken)[0]]
            errors = scores.resampled_errors(f, o, owner, drawn, bins, binning)
            low, high = interval(errors, len(np.unique(owner)))
        return {
            f"confidence{suffix}": _mean(f),
            f"ece{suffix}": error,
            f"ece{suffix}_low": low,
            f"ece{suffix}_high": high,
            f"brier{suffix}": _mean((f - o) ** 2),
            f"auroc{suffix}": scores.auroc(f, o) if len(o) else float("nan"),
            f"ece_product{suffix}": scores.error_or_nan(product, survived, bins, binning),
        }

    scaled = calibrated.apply(held.confidence)
    slots = seen.shape[1]
    parts: dict[Any, slice] = {k: slice(k, k + 1) for k in range(slots)} | {"all": slice(None)}
    rows = []
    for (slot, part), t in zip(parts.items(), [*temperatures[:slots], np.nan], strict=True):
        outcomes = seen[:, part][~np.isnan(seen[:, part])]
        row = {"slot": slot, "temperature": t, "samples": len(outcomes), "outcome": _mean(outcomes)}
        rows.append(row | figures(held.confidence, part, "") | figures(scaled, part, "_scaled"))
    return pd.DataFrame(rows)


@checked
def reliability_tables(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    outcome: Outcome = "empirical",
    bins: Count = 15,
    binning: scores.Binning = "width",
    grid: ArrayLike = scaling.TEMPERATURE_GRID,
    resamples: Count = 200,
    seed: Size = 0,
) -> dict[str, pd.DataFrame]:
    """Return the reliability of all reached slots of ``test``, before and after scaling on ``fit``.

    Arguments as in :func:`calibration_report`; ``raw`` and ``scaled`` as :func:`reliability_table`,
    with the intervals of the outcomes, ``outcome_low`` and ``outcome_high``.
    """
    fitted, held = scaling.disjoint_rounds(fit, test)
    calibrated = scaling.fit_identifiable_slots(fitted, bins=bins, binning=binning, grid=grid)
    parts = {"raw": held, "scaled": replace(held, confidence=calibrated.apply(held.confidence))}
    owner = held.conversation[np.nonzero(held.reached)[0]]
    conversations = int(held.conversation.max()) + 1
    drawn = resampled(conversations, resamples, seed)
    tables = {}
    for name, part in parts.items():
        confidence, seen = part.pairs(outcome)
        table = scores.reliability_table(confidence, seen, bins, binning)
        cell = scores.bin_numbers(confidence, table) * conversations + owner
        count, total = (
            np.bincount(cell, weights, bins * conversations).reshape(bins, conversations)
            for weights in (None, seen)
        )
        with np.errstate(invalid="ignore"):
            means = (drawn @ total.T) / (drawn @ count.T)
        low, high = interval(means, (count > 0).sum(axis=1))
        tables[name] = table.assign(outcome_low=low, outcome_high=high)
    return tables


@checked
def reached_rows(trace: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of a trace whose slots verification reached, round by round."""
    rounds, row = read_trace(trace)
    return trace.iloc[row[rounds.reached]].reset_index(drop=True)


@checked
def reliability_slots(
    fit: pd.DataFrame,
    test: pd.DataFrame,
    *,
    bins: Count = 15,
    binning: scores.Binning = "width",
    grid: ArrayLike = scaling.TEMPERATURE_GRID,
) -> pd.DataFrame:
    """Return the reached slots of ``test``, the samples of :func:`reliability_tables`.

    Arguments as there. The rows of the trace with the confidence ``scaled``, and the bins that
    ``raw`` and scaled confidences lie in, ``raw_bin`` and ``scaled_bin``.
    """
    fitted, held = scaling.disjoint_rounds(fit, test)
    calibrated = scaling.fit_identifiable_slots(fitted, bins=bins, binning=binning, grid=grid)
    slots = reached_rows(test)
    slots["scaled"] = calibrated.apply(held.confidence)[held.reached]
    for name, own in (("raw", "confidence"), ("scaled", "scaled")):
        samples = slots[own].to_numpy(dtype=np.float64)
        table = scores.reliability_table(samples, np.zeros_like(samples), bins, binning)
        slots[f"{name}_bin"] = scores.bin_numbers(samples, table)
    return slots


@checked
def drift_table(
    fit: pd.DataFrame | Rounds,
    before: pd.DataFrame | Rounds,
    after: pd.DataFrame | Rounds,
    *,
    half_life: Positive,
    window: Count = 200,
    every: Count = 50,
    bins: Count = 15,
    grid: ArrayLike = scaling.COARSE_GRID,
) -> pd.DataFrame:
    """Return how an abrupt change of domain breaks the calibration, and how fast it is repaired.

    Static temperatures are found on ``fit``; non-identifiable slots keep their confidences. The
    online ones begin there too, see the rounds of ``fit``, then those of ``before``, then, at once,
    those of ``after``, and are never told of the change.

    Args:
        fit, before: rounds of the first domain, of other prompts.
        half_life, every, bins, grid: as in :func:`online_temperatures`.
        window: rounds in a row of the table. Small ones add the same chance error to all figures.

    Returns:
        one row per window: its ``start``, counted from the change, and the calibration errors of
        all the products of a block against survival; NaN with fewer samples than bins.
    """
    parts = scaling.disjoint_rounds(fit, before, after)
    widths = [part.confidence.shape[1] for part in parts]
    if len(set(widths)) > 1:
        raise ValueError(f"fit, before and after must have blocks of one length, got {widths}")
    f = np.concatenate([part.confidence for part in parts])
    outcome = np.concatenate([part.outcome() for part in parts])
    static = scaling.fit_identifiable_slots(parts[0], grid=grid, bins=bins)
    online = scaling.online_temperatures(
        f, outcome, half_life=half_life, every=every, start=static, grid=grid, bins=bins
    )
    ways = {"raw": f, "static": static.apply(f), "online": scaling.temperature_scale(f, online)}
    survival = prefix_survival(outcome)
    known = ~np.isnan(survival) & ~np.isnan(np.cumprod(f, axis=1))
    change = len(parts[0]) + len(parts[1])
    rows = []
    for start in range(-(len(parts[1]) // window) * window, len(parts[2]) - window + 1, window):
        here = slice(change + start, change + start + window)
        row: dict[str, float] = {"start": start, "rounds": window}
        survived = survival[here][known[here]]
        for way, confidence in ways.items():
            product = np.cumprod(confidence[here], axis=1)[known[here]]
            row[f"ece_{way}"] = scores.error_or_nan(product, survived, bins, "width")
        rows.append(row)
    if not rows:
        found = f"{window} for {len(parts[1])} and {len(parts[2])} rounds"
        raise ValueError(f"window must fit into before or after, got {found}")
    return pd.DataFrame(rows)


@checked
def study(
    traces: pd.DataFrame,
    *,
    by: Annotated[Sequence[str], NotEmpty()] = ("drafter", "temperature", "domain", "slot"),
    outcome: Outcome = "analytic",
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """Return bias and variance of the confidence head, by whatever it may depend on.

    The error of a reached slot is its confidence less its outcome. ``bias`` is the mean error, over
    slots; ``variance`` its variance; ``spread`` the standard deviation, over conversations, of
    their mean errors: how far off a head that is right on average can be for one user. Against
    accept rates the variance is the head's own; against 0/1 outcomes it holds their chance too.
    Intervals are 95 % percentile bootstraps over conversations, prompt numbers within a domain: in
    all traces the same. Traces are told apart by columns ``drafter`` and ``temperature``.
    """
    for name in by:
        column(traces, name)
    groups = [name for name in ("drafter", "temperature") if name in traces.columns]
    runs = traces.groupby(groups, sort=False, dropna=False) if groups else [(None, traces)]
    frame = pd.concat([_reached_rows(run, outcome) for _, run in runs], ignore_index=True)
    rows = []
    for key, part in frame.groupby(list(by), dropna=False):
        labels = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        figures = _bias_and_variance(part.dropna(subset="confidence"), resamples, seed)
        rows.append({**labels, **figures})
    return pd.DataFrame(rows)


def confidence_error(
    confidence: Float[np.ndarray, " sample"], outcome: Float[np.ndarray, " sample"]
) -> Float[np.ndarray, " sample"]:
    """Positive where the head is overconfident."""
    return confidence - outcome


def _mean(values: Float[np.ndarray, " sample"]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _reached_rows(trace: pd.DataFrame, outcome: Outcome) -> pd.DataFrame:
    rounds, row = read_trace(trace)
    reached = rounds.reached
    confidence, chosen = rounds.confidence[reached], rounds.outcome(outcome)[reached]
    return trace.iloc[row[reached]].assign(
        confidence=confidence, _outcome=chosen, _error=confidence_error(confidence, chosen)
    )


def _bias_and_variance(part: pd.DataFrame, resamples: int, seed: int) -> dict[str, float]:
    conversation = part.groupby(["domain", "prompt"], dropna=False).ngroup().to_numpy()
    error = part["_error"].to_numpy()
    count = np.bincount(conversation)
    total, squares = np.bincount(conversation, error), np.bincount(conversation, error**2)
    means = total / count

    def figures(drawn: Int[np.ndarray, "resample conversation"]) -> np.ndarray:
        """Bias, variance and spread ``[resample, figure]`` of conversations drawn so often."""
        samples = drawn @ count
        bias = drawn @ total / samples
        variance = np.maximum(drawn @ squares / samples - bias**2, 0)
        centre = (drawn @ means / len(count))[:, None]
        between = (drawn * (means - centre) ** 2).sum(axis=1) / max(len(count) - 1, 1)
        return np.stack([bias, variance, np.sqrt(between)], axis=1)

    found, low, high = np.full((3, 3), np.nan)
    if len(part):
        found = figures(np.ones((1, len(count)), dtype=np.int64))[0]
    if len(count) > 1:
        low, high = interval(figures(resampled(len(count), resamples, seed)), len(count))
    else:
        found[2] = np.nan
    row: dict[str, float] = {"conversations": len(count), "samples": len(part)}
    row["confidence"] = _mean(part["confidence"].to_numpy())
    row["outcome"] = _mean(part["_outcome"].to_numpy())
    for index, name in enumerate(("bias", "variance", "spread")):
        row |= {name: found[index], f"{name}_low": low[index], f"{name}_high": high[index]}
    return row
