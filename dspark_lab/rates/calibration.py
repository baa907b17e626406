"""Whether a confidence means what it says, how to repair it, and what a better one would be worth.

A confidence is a predicted probability that a drafted slot is accepted, given that all slots before
it in its round were. Its outcome is either *empirical* (accepted, 0 or 1) or *analytic*: the accept
rate c* = sum_v min(p_draft, p_target), a probability itself. Both are defined on *reached* slots
only: verified, and every earlier slot of the round accepted.

This file knows what temperatures do to the confidences of a trace; it runs no model. The
temperatures themselves are in :mod:`dspark_lab.rates.scaling`, scores in :mod:`dspark_lab.rates.scores`,
replays in :mod:`dspark_lab.rates.thresholds`, and how a trace is read in :mod:`dspark_lab.decoding.trace`; what
belongs to the subject is imported here from them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from dspark_lab.checks import require_int, require_number
from dspark_lab.decoding import Outcome, Rounds, column, read_trace, rounds_of
from dspark_lab.model import CALIBRATION
from dspark_lab.rates.intervals import interval, resampled
from dspark_lab.rates.scaling import (
    COARSE_GRID,
    TEMPERATURE_GRID,
    SequentialTemperatures,
    disjoint_rounds,
    fit_identifiable_slots,
    non_identifiable_slots,
    online_temperatures,
    temperature_scale,
)
from dspark_lab.rates.scores import (
    Binning,
    Brier,
    auroc,
    binned_error,
    brier,
    error_or_nan,
    expected_calibration_error,
    reliability_table,
    resampled_errors,
)
from dspark_lab.rates.survival import prefix_survival

__all__ = [
    "CALIBRATION",
    "TEMPERATURE_GRID",
    "Brier",
    "Rounds",
    "SequentialTemperatures",
    "auroc",
    "brier",
    "calibration_report",
    "drift_table",
    "expected_calibration_error",
    "online_temperatures",
    "reliability_table",
    "reliability_tables",
    "rounds_of",
    "split_prompts",
    "study",
    "temperature_scale",
]


def split_prompts(
    trace: pd.DataFrame, share: float = 0.5, *, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cuts a trace in two by conversation: to fit on, and to report on.

    Conversations are drawn at random within each domain, ``share`` of them (rounded to whole ones)
    for fitting. The draw follows from the seed and the prompt numbers, not from the rows' order.

    Raises:
        TypeError, ValueError: no trace, a share not between 0 and 1, or too few conversations for
            both sides to have one.
    """
    prompt, domain = column(trace, "prompt"), column(trace, "domain")
    require_number("share", share)
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


def calibration_report(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    outcome: Outcome = "empirical",
    bins: int = 15,
    binning: Binning = "width",
    grid: Sequence[float] = TEMPERATURE_GRID,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How well calibrated each slot is before and after scaling, on conversations not fitted on.

    Temperatures are found on what ``fit`` accepted; every figure is of ``test``. Slots that no
    temperature can be told for keep their confidences. Intervals are 95 % percentile bootstraps
    over the conversations of ``test``, with the temperatures and the bins kept as they are.
    Resampling adds chance of its own, which a calibration error takes for miscalibration: its
    interval lies too high, the more so the nearer the error is to 0.

    Args:
        fit, test: traces of one drafter without a prompt in common, as from :func:`split_prompts`.
        outcome: what confidences are compared with in ``test``, see :class:`Rounds`.
        bins, binning, grid: as in :meth:`SequentialTemperatures.fit`.
        resamples, seed: of the bootstrap.

    Returns:
        one row for each ``slot``, and a last one, ``"all"``, of all reached slots together:
        ``samples`` (reached), ``temperature``, ``confidence``, ``confidence_scaled`` and
        ``outcome`` (means), ``ece`` and ``ece_scaled``, each with its interval, ``ece_low`` to
        ``ece_high``, ``brier``, ``brier_scaled``, ``auroc`` (the same before and after for one
        slot), ``auroc_scaled``, and ``ece_product`` and ``ece_product_scaled``, the error of the
        product up to the slot against survival. NaN where undefined: no temperature can be told, no
        samples, fewer samples than bins, one class only, or for an interval fewer than two
        conversations.

    Raises:
        TypeError, ValueError: as :func:`rounds_of` and :meth:`SequentialTemperatures.fit` with
            ``otherwise``, or a prompt that is in both.
    """
    fitted, held = disjoint_rounds(fit, test)
    seen = held.outcome(outcome)
    scaling = fit_identifiable_slots(fitted, grid=grid, bins=bins, binning=binning)
    told = np.array(scaling.temperatures)
    told[
        list(non_identifiable_slots(fitted.confidence, prefix_survival(fitted.outcome()), bins))
    ] = np.nan
    raw, scaled = held.confidence, scaling.apply(held.confidence)
    survival = prefix_survival(seen)
    products = np.cumprod(raw, axis=1), np.cumprod(scaled, axis=1)
    conversation = held.conversation
    drawn = resampled(int(conversation.max()) + 1, resamples, seed)

    def error(f: np.ndarray, o: np.ndarray, owner: np.ndarray, name: str) -> dict[str, float]:
        if len(f) < bins:
            return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
        errors = resampled_errors(f, o, owner, drawn, bins, binning)
        low, high = interval(errors, len(np.unique(owner)))
        value = binned_error(f, o, bins, binning)
        return {name: value, f"{name}_low": low, f"{name}_high": high}

    def row(part: slice) -> dict[str, int | float]:
        taken = ~np.isnan(seen[:, part])
        o, before, after = (values[:, part][taken] for values in (seen, raw, scaled))
        owner = conversation[np.nonzero(taken)[0]]
        alive = ~np.isnan(survival[:, part]) & ~np.isnan(raw[:, part])
        lived = survival[:, part][alive]
        product, product_scaled = (
            error_or_nan(values[:, part][alive], lived, bins, binning) for values in products
        )
        return {
            "samples": len(o),
            "confidence": _mean(before),
            "confidence_scaled": _mean(after),
            "outcome": _mean(o),
            **error(before, o, owner, "ece"),
            **error(after, o, owner, "ece_scaled"),
            "brier": _mean((before - o) ** 2),
            "brier_scaled": _mean((after - o) ** 2),
            "auroc": auroc(before, o) if len(o) else float("nan"),
            "auroc_scaled": auroc(after, o) if len(o) else float("nan"),
            "ece_product": product,
            "ece_product_scaled": product_scaled,
        }

    slots = seen.shape[1]
    rows: list[dict[str, object]] = [
        {"slot": k, "temperature": told[k], **row(slice(k, k + 1))} for k in range(slots)
    ]
    rows.append({"slot": "all", "temperature": float("nan"), **row(slice(None))})
    return pd.DataFrame(rows)


def reliability_tables(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    outcome: Outcome = "empirical",
    bins: int = 15,
    binning: Binning = "width",
    grid: Sequence[float] = TEMPERATURE_GRID,
) -> dict[str, pd.DataFrame]:
    """Reliability of all reached slots of ``test``, before and after scaling on ``fit``.

    Slots that no temperature can be told for keep their confidences.

    Args:
        fit, test, outcome, bins, binning, grid: as in :func:`calibration_report`.

    Returns:
        ``raw`` and ``scaled``, each as :func:`reliability_table`.

    Raises:
        TypeError, ValueError: as :func:`calibration_report`.
    """
    fitted, held = disjoint_rounds(fit, test)
    scaling = fit_identifiable_slots(fitted, bins=bins, binning=binning, grid=grid)
    scaled = replace(held, confidence=scaling.apply(held.confidence))
    return {
        name: reliability_table(*rounds.pairs(kind=outcome), bins, binning)
        for name, rounds in {"raw": held, "scaled": scaled}.items()
    }


def drift_table(
    fit: pd.DataFrame | Rounds,
    before: pd.DataFrame | Rounds,
    after: pd.DataFrame | Rounds,
    *,
    half_life: float,
    window: int = 200,
    every: int = 50,
    bins: int = 15,
    grid: Sequence[float] = COARSE_GRID,
) -> pd.DataFrame:
    """What an abrupt change of domain does to the calibration, and how fast it is repaired.

    Static temperatures are found on ``fit``; slots that none can be told for keep their
    confidences. The online ones begin there too, see the rounds of
    ``fit``, then those of ``before``, then, at once, those of ``after``, and are never told of the
    change. Reported are windows of rounds, counted from it.

    Args:
        fit: rounds of the first domain, to fit on.
        before: more of the first domain, other prompts.
        after: of the second domain.
        half_life, every: as in :func:`online_temperatures`.
        window: rounds in a row of the table; windows that are not full are left out. Small windows
            add the same chance error to all three figures.
        bins: of equal width.
        grid: of both searches.

    Returns:
        one row per window: ``start`` (its first round, counted from the change, negative before
        it), ``rounds``, and the calibration error of all the products of a block against survival,
        ``ece_raw``, ``ece_static`` and ``ece_online``; NaN with fewer samples than bins.

    Raises:
        TypeError, ValueError: as :func:`rounds_of` and :func:`online_temperatures`, blocks of
            different length, a prompt of ``fit`` in the others, or no full window.
    """
    parts = disjoint_rounds(fit, before, after)
    widths = [part.confidence.shape[1] for part in parts]
    if len(set(widths)) > 1:
        raise ValueError(f"fit, before and after must have blocks of one length, got {widths}")
    require_int("window", window, 1)
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


def study(
    traces: pd.DataFrame | Mapping[str | tuple[str, float], pd.DataFrame],
    *,
    by: Sequence[str] = ("drafter", "temperature", "domain", "slot"),
    outcome: Outcome = "analytic",
    resamples: int = 1000,
    seed: int = 0,
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
        traces: drafter -> trace, or (drafter, decoding temperature) -> trace, or one table with
            columns ``drafter`` and ``temperature`` of its own. A trace with a column of that name
            keeps it.
        by: columns to group by, in this order; leave some out for margins.
        outcome: ``"analytic"`` or ``"empirical"``.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        one row per group of reached slots: the columns of ``by``, ``conversations``, ``samples``,
        ``confidence`` and ``outcome`` (means), and the three figures with their intervals. Slots
        without a confidence do not count. NaN where undefined: no samples, or for spread and
        intervals fewer than two conversations.

    Raises:
        TypeError: no table or mapping of tables.
        ValueError: as :func:`rounds_of`, but for missing confidences; a column to group by that is
            not there; no traces.
    """
    require_int("resamples", resamples, 1)
    frame = _labelled(traces, by)
    groups = [name for name in ("drafter", "temperature") if name in frame.columns]
    parts = [frame]
    if groups:
        parts = [part for _, part in frame.groupby(groups, sort=False, dropna=False)]
    frame = pd.concat([_reached_rows(part, outcome) for part in parts], ignore_index=True)
    rows = []
    for key, part in frame.groupby(list(by), dropna=False):
        labels = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        rows.append(
            {**labels, **_bias_and_variance(part.dropna(subset="confidence"), resamples, seed)}
        )
    return pd.DataFrame(rows)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


def _reached_rows(trace: pd.DataFrame, outcome: Outcome) -> pd.DataFrame:
    """The reached rows of a trace, with their outcomes and the errors of their confidences."""
    rounds, row = read_trace(trace)
    reached = rounds.reached
    confidence, chosen = rounds.confidence[reached], rounds.outcome(outcome)[reached]
    return trace.iloc[row[reached]].assign(
        confidence=confidence, _outcome=chosen, _error=confidence - chosen
    )


def _labelled(
    traces: pd.DataFrame | Mapping[str | tuple[str, float], pd.DataFrame], by: Sequence[str]
) -> pd.DataFrame:
    if isinstance(traces, pd.DataFrame):
        frame = traces
    elif isinstance(traces, Mapping):
        parts = []
        for key, trace in traces.items():
            if not isinstance(trace, pd.DataFrame):
                raise TypeError(f"traces[{key!r}] must be a DataFrame, got {type(trace).__name__}")
            names = ("drafter", "temperature") if isinstance(key, tuple) else ("drafter",)
            values = key if isinstance(key, tuple) else (key,)
            labels = dict(zip(names, values, strict=True))
            own = {name: value for name, value in labels.items() if name not in trace.columns}
            parts.append(trace.assign(**own))
        if not parts:
            raise ValueError("traces must hold one or more traces, got none")
        frame = pd.concat(parts, ignore_index=True)
    else:
        raise TypeError(f"traces must be a DataFrame or a mapping, got {type(traces).__name__}")
    if isinstance(by, str) or not by:
        raise TypeError(f"by must be a sequence of column names, got {by!r}")
    for name in by:
        column(frame, name)
    return frame


def _bias_and_variance(part: pd.DataFrame, resamples: int, seed: int) -> dict[str, int | float]:
    conversation = part.groupby(["domain", "prompt"], dropna=False).ngroup().to_numpy()
    error = part["_error"].to_numpy()
    count = np.bincount(conversation)
    total, squares = np.bincount(conversation, error), np.bincount(conversation, error**2)
    means = total / count

    def figures(drawn: np.ndarray) -> np.ndarray:
        """Bias, variance and spread of samples that hold each conversation so many times."""
        samples = drawn @ count
        bias = drawn @ total / samples
        variance = np.maximum(drawn @ squares / samples - bias**2, 0)
        centre = (drawn @ means / len(count))[:, None]
        between = (drawn * (means - centre) ** 2).sum(axis=1) / max(len(count) - 1, 1)
        return np.stack([bias, variance, np.sqrt(between)])

    found = np.full(3, np.nan)
    bounds = np.full((3, 2), np.nan)
    if len(part):
        found = figures(np.ones((1, len(count))))[:, 0]
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
