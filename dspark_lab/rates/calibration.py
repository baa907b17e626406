"""Calibration of the confidences in a trace: report, reliability, drift, bias and variance.

A confidence is a predicted probability that a drafted slot is accepted, given that all slots before
it in its round were. Its outcome is either *empirical* (accepted, 0 or 1) or *analytic*: the accept
rate c* = sum_v min(p_draft, p_target), a probability itself. Both are defined on *reached* slots
only: verified, and every earlier slot of the round accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from dspark_lab.checks import Count, NotEmpty, Positive, Size, checked
from dspark_lab.decoding import Outcome, Rounds, column, read_trace
from dspark_lab.rates.intervals import interval, resampled
from dspark_lab.rates.scaling import (
    COARSE_GRID,
    TEMPERATURE_GRID,
    disjoint_rounds,
    fit_identifiable_slots,
    non_identifiable_slots,
    online_temperatures,
    temperature_scale,
)
from dspark_lab.rates.scores import (
    Binning,
    auroc,
    error_or_nan,
    reliability_table,
    resampled_errors,
)
from dspark_lab.rates.survival import prefix_survival

__all__ = [
    "calibration_report",
    "drift_table",
    "reliability_tables",
    "split_prompts",
    "study",
]


@checked
def split_prompts(
    trace: pd.DataFrame, share: float = 0.5, *, seed: Size = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cut a trace in two by conversation: to fit on, and to report on.

    Conversations are drawn at random within each domain, ``share`` of them (rounded to whole ones)
    for fitting. The draw follows from the seed and the prompt numbers, not from the rows' order.
    """
    prompt, domain = column(trace, "prompt"), column(trace, "domain")
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    rng = np.random.default_rng(seed)
    chosen: list[np.ndarray] = []
    for _, part in prompt.groupby(domain, sort=True, dropna=False):
        prompts = np.sort(part.unique())
        chosen.append(rng.permutation(prompts)[: round(share * len(prompts))])
    fitted = prompt.isin(np.concatenate(chosen) if chosen else [])
    fit, test = trace[fitted], trace[~fitted]
    if fit.empty or test.empty:
        raise ValueError(f"share {share} of {prompt.nunique()} conversations leaves one side empty")
    return fit, test


@checked
def calibration_report(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    outcome: Outcome = "empirical",
    bins: Count = 15,
    binning: Binning = "width",
    grid: ArrayLike = TEMPERATURE_GRID,
    resamples: Count = 200,
    seed: Size = 0,
) -> pd.DataFrame:
    """Calibration of each slot before and after scaling, on conversations not fitted on.

    Temperatures are found on what ``fit`` accepted; every figure is of ``test``. Non-identifiable
    slots keep their confidences. Intervals are 95 % percentile bootstraps over the conversations of
    ``test``, with the temperatures and the bins kept as they are. Resampling adds chance of its
    own, which a calibration error takes for miscalibration: its interval lies too high, the more so
    the nearer the error is to 0.

    Args:
        fit, test: traces of one drafter without a prompt in common, as from :func:`split_prompts`.
        outcome: what confidences are compared with in ``test``, see :class:`Rounds`.
        bins, binning, grid: as in :meth:`SequentialTemperatures.fit`.

    Returns:
        one row for each ``slot``, and a last one, ``"all"``, of all reached slots together:
        ``temperature``, ``samples`` (reached) and ``outcome`` (mean); ``confidence`` (mean),
        ``ece`` with its interval ``ece_low`` to ``ece_high``, ``brier``, ``auroc``, and
        ``ece_product``, the error of the product up to the slot against survival; and the same of
        scaled confidences, with ``_scaled`` behind ``confidence``, ``ece``, ``brier``, ``auroc``
        (of one slot the same before and after) and ``ece_product``. NaN where undefined: a
        temperature of a non-identifiable slot, no samples, fewer samples than bins, one class only,
        or for an interval fewer than two conversations.
    """
    fitted, held = disjoint_rounds(fit, test)
    scaling = fit_identifiable_slots(fitted, grid=grid, bins=bins, binning=binning)
    temperatures = np.array(scaling.temperatures)
    survival = prefix_survival(fitted.outcome())
    temperatures[list(non_identifiable_slots(fitted.confidence, survival, bins))] = np.nan
    seen = held.outcome(outcome)
    survival = prefix_survival(seen)
    conversation = held.conversation
    drawn = resampled(int(conversation.max()) + 1, resamples, seed)

    def figures(
        confidence: Float[np.ndarray, "round slot"], part: slice, suffix: str = ""
    ) -> dict[str, float]:
        taken = ~np.isnan(seen[:, part])
        f, o = confidence[:, part][taken], seen[:, part][taken]
        known = ~np.isnan(survival[:, part]) & ~np.isnan(confidence[:, part])
        product = np.cumprod(confidence, axis=1)[:, part][known]
        low = high = float("nan")
        error = error_or_nan(f, o, bins, binning)
        if not np.isnan(error):
            owner = conversation[np.nonzero(taken)[0]]
            errors = resampled_errors(f, o, owner, drawn, bins, binning)
            low, high = interval(errors, len(np.unique(owner)))
        return {
            f"confidence{suffix}": _mean(f),
            f"ece{suffix}": error,
            f"ece{suffix}_low": low,
            f"ece{suffix}_high": high,
            f"brier{suffix}": _mean((f - o) ** 2),
            f"auroc{suffix}": auroc(f, o) if len(o) else float("nan"),
            f"ece_product{suffix}": error_or_nan(product, survival[:, part][known], bins, binning),
        }

    parts = {k: slice(k, k + 1) for k in range(seen.shape[1])} | {"all": slice(None)}
    scaled = scaling.apply(held.confidence)
    rows = []
    for slot, part in parts.items():
        outcomes = seen[:, part][~np.isnan(seen[:, part])]
        rows.append(
            {
                "slot": slot,
                "temperature": np.nan if slot == "all" else temperatures[slot],
                "samples": len(outcomes),
                "outcome": _mean(outcomes),
                **figures(held.confidence, part),
                **figures(scaled, part, "_scaled"),
            }
        )
    return pd.DataFrame(rows)


@checked
def reliability_tables(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    outcome: Outcome = "empirical",
    bins: Count = 15,
    binning: Binning = "width",
    grid: ArrayLike = TEMPERATURE_GRID,
) -> dict[str, pd.DataFrame]:
    """Reliability of all reached slots of ``test``, before and after scaling on ``fit``.

    Non-identifiable slots keep their confidences.

    Arguments as in :func:`calibration_report`. Returns ``raw`` and ``scaled``, each as
    :func:`reliability_table`.
    """
    fitted, held = disjoint_rounds(fit, test)
    scaling = fit_identifiable_slots(fitted, bins=bins, binning=binning, grid=grid)
    scaled = replace(held, confidence=scaling.apply(held.confidence))
    return {
        name: reliability_table(*rounds.pairs(kind=outcome), bins, binning)
        for name, rounds in {"raw": held, "scaled": scaled}.items()
    }


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
    grid: ArrayLike = COARSE_GRID,
) -> pd.DataFrame:
    """How an abrupt change of domain breaks the calibration, and how fast it is repaired.

    Static temperatures are found on ``fit``; non-identifiable slots keep their confidences. The
    online ones begin there too, see the rounds of ``fit``, then those of ``before``, then, at once,
    those of ``after``, and are never told of the change. Reported are windows of rounds, counted
    from it.

    Args:
        fit: rounds of the first domain, to fit on.
        before: more of the first domain, other prompts.
        after: of the second domain, with blocks of the same length.
        half_life, every, bins, grid: as in :func:`online_temperatures`.
        window: rounds in a row of the table; windows that are not full are left out. Small windows
            add the same chance error to all three figures.

    Returns:
        one row per window: ``start`` (its first round, counted from the change, negative before
        it), ``rounds``, and the calibration error of all the products of a block against survival,
        ``ece_raw``, ``ece_static`` and ``ece_online``; NaN with fewer samples than bins.
    """
    parts = disjoint_rounds(fit, before, after)
    widths = [part.confidence.shape[1] for part in parts]
    if len(set(widths)) > 1:
        raise ValueError(f"fit, before and after must have blocks of one length, got {widths}")
    f = np.concatenate([part.confidence for part in parts])
    outcome = np.concatenate([part.outcome() for part in parts])
    static = fit_identifiable_slots(parts[0], grid=grid, bins=bins)
    online = online_temperatures(
        f, outcome, half_life=half_life, every=every, start=static, grid=grid, bins=bins
    )
    scaled = {
        "ece_raw": f,
        "ece_static": static.apply(f),
        "ece_online": temperature_scale(f, online),
    }
    products = {name: np.cumprod(values, axis=1) for name, values in scaled.items()}
    survival = prefix_survival(outcome)
    change = len(parts[0]) + len(parts[1])
    starts = range(-(len(parts[1]) // window) * window, len(parts[2]) - window + 1, window)
    rows = []
    for start in starts:
        here = slice(change + start, change + start + window)
        known = ~np.isnan(survival[here]) & ~np.isnan(products["ece_raw"][here])
        errors = {
            name: error_or_nan(values[here][known], survival[here][known], bins, "width")
            for name, values in products.items()
        }
        rows.append({"start": start, "rounds": window, **errors})
    if not rows:
        raise ValueError(
            f"window must fit into before or after, got {window} for {len(parts[1])} and "
            f"{len(parts[2])} rounds"
        )
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
    """Bias and variance of the confidence head, by whatever it may depend on.

    The error of a reached slot is its confidence less its outcome. ``bias`` is the mean error, over
    slots; ``variance`` its variance; ``spread`` the standard deviation, over conversations, of
    their mean errors: how far off a head that is right on average can be for one user. Against
    accept rates the variance is the head's own; against 0/1 outcomes it holds their chance too.
    ``_low`` and ``_high`` are 95 % percentile bootstrap intervals over conversations, since the
    slots of one conversation resemble each other. A conversation is a prompt number within a
    domain: the same number in two traces must mean the same conversation.

    Args:
        traces: one trace, or several with columns ``drafter`` and ``temperature`` that keep them
            apart.
        by: columns to group by, in this order; leave some out for margins.

    Returns:
        one row per group of reached slots: the columns of ``by``, ``conversations``, ``samples``,
        ``confidence`` and ``outcome`` (means), and the three figures with their intervals. Slots
        without a confidence do not count. NaN where undefined: no samples, or for spread and
        intervals fewer than two conversations.
    """
    for name in by:
        column(traces, name)
    groups = [name for name in ("drafter", "temperature") if name in traces.columns]
    parts = [traces]
    if groups:
        parts = [part for _, part in traces.groupby(groups, sort=False, dropna=False)]
    frame = pd.concat([_reached_rows(part, outcome) for part in parts], ignore_index=True)
    rows = []
    for key, part in frame.groupby(list(by), dropna=False):
        labels = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        rows.append(
            {**labels, **_bias_and_variance(part.dropna(subset="confidence"), resamples, seed)}
        )
    return pd.DataFrame(rows)


def confidence_error(
    confidence: Float[np.ndarray, " sample"], outcome: Float[np.ndarray, " sample"]
) -> Float[np.ndarray, " sample"]:
    """Positive where the head is overconfident."""
    return confidence - outcome


def _mean(values: Float[np.ndarray, " sample"]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _reached_rows(trace: pd.DataFrame, outcome: Outcome) -> pd.DataFrame:
    """The reached rows of a trace, with their outcomes and the errors of their confidences."""
    rounds, row = read_trace(trace)
    reached = rounds.reached
    confidence, chosen = rounds.confidence[reached], rounds.outcome(outcome)[reached]
    return trace.iloc[row[reached]].assign(
        confidence=confidence, _outcome=chosen, _error=confidence_error(confidence, chosen)
    )


def _bias_and_variance(part: pd.DataFrame, resamples: int, seed: int) -> dict[str, int | float]:
    conversation = part.groupby(["domain", "prompt"], dropna=False).ngroup().to_numpy()
    error = part["_error"].to_numpy()
    count = np.bincount(conversation)
    total, squares = np.bincount(conversation, error), np.bincount(conversation, error**2)
    means = total / count

    def figures(drawn: Int[np.ndarray, "resample conversation"]) -> np.ndarray:
        """Bias, variance and spread ``[figure, resample]`` of conversations drawn so often."""
        samples = drawn @ count
        bias = drawn @ total / samples
        variance = np.maximum(drawn @ squares / samples - bias**2, 0)
        centre = (drawn @ means / len(count))[:, None]
        between = (drawn * (means - centre) ** 2).sum(axis=1) / max(len(count) - 1, 1)
        return np.stack([bias, variance, np.sqrt(between)])

    found, bounds = np.full(3, np.nan), np.full((3, 2), np.nan)
    if len(part):
        found = figures(np.ones((1, len(count)), dtype=np.int64))[:, 0]
    if len(count) > 1:
        bounds = interval(figures(resampled(len(count), resamples, seed)).T, len(count)).T
    else:
        found[2] = np.nan
    row = {
        "conversations": len(count),
        "samples": len(part),
        "confidence": _mean(part["confidence"].to_numpy()),
        "outcome": _mean(part["_outcome"].to_numpy()),
    }
    for name, value, (low, high) in zip(("bias", "variance", "spread"), found, bounds, strict=True):
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return row
