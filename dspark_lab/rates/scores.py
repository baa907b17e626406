"""Scores of predicted probabilities: reliability, calibration error, Brier score, ROC area.

A prediction is a *confidence*; its *outcome* is 0 or 1, or an accept rate in between.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from dspark_lab.checks import Count, checked

Binning = Literal["width", "mass"]
Sample = Float[np.ndarray, " sample"]


@checked
def reliability_table(
    confidence: ArrayLike, outcome: ArrayLike, bins: Count = 15, binning: Binning = "width"
) -> pd.DataFrame:
    """Return mean confidence and mean outcome, bin by bin: the numbers of a reliability diagram.

    Bins of equal *width* cut [0, 1] evenly. Bins of equal *mass*, at most as many as samples, are
    cut at the quantiles of the confidences, so that each holds about as many samples; where many
    are equal, bins stay empty. A confidence on a cut belongs to the bin below it (Guo et al. 2017,
    section 2). ``gap`` is positive where the head is overconfident.
    """
    f, o = _pairs(confidence, outcome)
    if binning == "mass" and len(f) < bins:
        raise ValueError(f"{bins} bins of equal mass need at least as many samples, got {len(f)}")
    edges = _edges(f, bins, binning)
    group = _bin(f, edges)
    count = np.bincount(group, minlength=bins)
    known = np.where(count > 0, count, np.nan)
    means = {"confidence": np.bincount(group, f, bins) / known}
    means["outcome"] = np.bincount(group, o, bins) / known
    means["gap"] = means["confidence"] - means["outcome"]
    return pd.DataFrame({"low": edges[:-1], "high": edges[1:], "count": count, **means})


def bin_numbers(confidence: Sample, table: pd.DataFrame) -> Int[np.ndarray, " sample"]:
    """The number of the bin of a :func:`reliability_table` that each confidence lies in."""
    return _bin(confidence, np.append(table["low"], table["high"].iloc[-1]))


@checked
def expected_calibration_error(
    confidence: ArrayLike, outcome: ArrayLike, bins: Count = 15, binning: Binning = "width"
) -> float:
    """Return the mean over samples of their bin's \\|mean confidence - mean outcome\\|.

    NaN with fewer samples than bins. A finite sample of a perfectly calibrated head has a positive
    error too, the more so the fewer samples a bin holds: compare numbers of like sample sizes.
    """
    return error_or_nan(*_pairs(confidence, outcome), bins, binning)


def brier(confidence: ArrayLike, outcome: ArrayLike) -> float:
    """Return the mean squared distance of confidence and outcome."""
    f, o = _pairs(confidence, outcome)
    return float(np.mean((f - o) ** 2))


def auroc(confidence: ArrayLike, outcome: ArrayLike) -> float:
    """Return the chance that an accepted slot has more confidence than a rejected one, a tie 1/2.

    An outcome between 0 and 1 counts as that share of an accepted slot and the rest of a rejected
    one. NaN where all outcomes are 0 or all 1.
    """
    # Imported here, so that `import dspark_lab` does not wait for it.
    from sklearn.metrics import roc_auc_score

    f, o = _pairs(confidence, outcome)
    if not 0 < o.sum() < len(o):
        return float("nan")
    accepted = np.repeat([True, False], len(f))
    return float(roc_auc_score(accepted, np.tile(f, 2), sample_weight=np.append(o, 1 - o)))


def as_numbers(name: str, values: ArrayLike) -> Float[np.ndarray, "..."]:
    """Return the values as floats; refuse what are no numbers."""
    array = np.asarray(values)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must hold numbers, got {array.dtype} ({type(values).__name__})")
    return array.astype(np.float64)


def as_probabilities(name: str, values: ArrayLike) -> Sample:
    """Return the values as floats; refuse anything but one or more probabilities."""
    array = as_numbers(name, values)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"{name} must be [sample] with one or more, got shape {array.shape}")
    missing = int(np.isnan(array).sum())
    if missing:
        raise ValueError(f"{name} must lie in [0, 1], got {missing} NaN of {len(array)}")
    require_range(name, array)
    return array


def require_range(name: str, values: Float[np.ndarray, "..."]) -> None:
    """Refuse a number outside [0, 1]; NaN passes."""
    known = values[~np.isnan(values)]
    if known.size and not (known.min() >= 0 and known.max() <= 1):
        found = f"values from {known.min()} to {known.max()}"
        raise ValueError(f"{name} must lie in [0, 1], got {found}")


def binned_error(
    f: Sample, o: Sample, bins: int, binning: Binning, weights: Sample | None = None
) -> float:
    """The expected calibration error of any number of samples, unchecked."""
    w = np.ones_like(f) if weights is None else weights
    gaps = np.bincount(_bin(f, _edges(f, bins, binning)), w * (f - o), bins)
    return float(np.abs(gaps).sum() / w.sum())


def error_or_nan(f: Sample, o: Sample, bins: int, binning: Binning) -> float:
    """The same, or NaN of fewer samples than bins."""
    return binned_error(f, o, bins, binning) if len(f) >= bins else float("nan")


@checked
def resampled_errors(
    f: Sample,
    o: Sample,
    group: Int[np.ndarray, " sample"],
    drawn: Int[np.ndarray, "resample group"],
    bins: Count,
    binning: Binning,
) -> Float[np.ndarray, " resample"]:
    """The error where each group counts as often as it was drawn; NaN without any sample."""
    groups = drawn.shape[1]
    cell = group * bins + _bin(f, _edges(f, bins, binning))
    gaps = np.bincount(cell, f - o, groups * bins).reshape(groups, bins)
    count = drawn @ np.bincount(group, minlength=groups)
    return np.abs(drawn @ gaps).sum(axis=1) / np.where(count > 0, count, np.nan)


def _pairs(confidence: ArrayLike, outcome: ArrayLike) -> tuple[Sample, Sample]:
    f, o = as_probabilities("confidence", confidence), as_probabilities("outcome", outcome)
    if len(f) != len(o):
        raise ValueError(f"confidence and outcome must be as long, got {len(f)} and {len(o)}")
    return f, o


def _edges(f: Sample, bins: int, binning: Binning) -> Float[np.ndarray, " edge"]:
    """The bounds of the bins. A cut of equal mass at a sample, or between equal ones, is that very
    number: places in the order of samples are whole numbers of ``1 / bins``, without rounding."""
    if binning == "width":
        return np.linspace(0, 1, bins + 1)
    ordered = np.sort(f)
    place, rest = np.divmod(np.arange(bins + 1) * (len(f) - 1), bins)
    low, high = ordered[place], ordered[np.minimum(place + 1, len(f) - 1)]
    return low + (high - low) * (rest / bins)


def _bin(f: Sample, edges: Float[np.ndarray, " edge"]) -> Int[np.ndarray, " sample"]:
    """The bin of each value; one that lies on a cut is in the bin below it."""
    return np.searchsorted(edges[1:-1], f, side="left")
