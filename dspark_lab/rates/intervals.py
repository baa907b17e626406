"""The bootstrap over conversations, whose slots and rounds are no independent sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import Rounds

# Numbers that are drawn at a time.
_PIECE = 2**22


@checked
def resampled(
    count: Count, resamples: Count, seed: Size | tuple[Size, Size], *, one_by_one: bool = False
) -> Int[np.ndarray, "resample conversation"]:
    """Return how often each of ``count`` conversations is drawn when as many are, with replacement.

    ``one_by_one`` draws conversations instead of counts: other random numbers.
    """
    rng = np.random.default_rng(seed)
    if not one_by_one:
        return rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    times = np.empty((resamples, count), dtype=np.int64)
    step = max(1, _PIECE // count)
    for first in range(0, resamples, step):
        piece = times[first : first + step]
        drawn = rng.integers(0, count, piece.shape) + count * np.arange(len(piece))[:, None]
        piece[:] = np.bincount(drawn.ravel(), minlength=piece.size).reshape(piece.shape)
    return times


@checked
def interval(
    figures: Float[np.ndarray, "resample *figure"], conversations: int | Int[np.ndarray, "*figure"]
) -> Float[np.ndarray, "bound *figure"]:
    """Return the 95 % percentile interval of each figure, from its values in every resample.

    Undefined figures are left out. NaN where fewer than two ``conversations`` enter it.
    """
    entering = np.broadcast_to(np.asarray(conversations) > 1, figures.shape[1:])
    undefined = np.isnan(figures)
    bounds = np.full((2, *figures.shape[1:]), np.nan)
    # The quantile that leaves out NaN is slow: it goes through the figures one by one.
    whole, partly = entering & ~undefined.any(axis=0), entering & ~undefined.all(axis=0)
    for known, quantile in ((whole, np.quantile), (partly & ~whole, np.nanquantile)):
        if known.any():
            bounds[:, known] = quantile(figures[:, known], [0.025, 0.975], axis=0)
    return bounds


@checked
def ratio_interval(
    top: Float[np.ndarray, "*figure conversation"],
    bottom: Float[np.ndarray, "*figure conversation"],
    drawn: Int[np.ndarray, "resample conversation"],
) -> Float[np.ndarray, "bound *figure"]:
    """Return the interval of sum(top) / sum(bottom) over conversations, for each figure."""
    times = drawn.T.astype(np.float64)
    ratios = (top @ times) / (bottom @ times)
    return interval(np.moveaxis(ratios, -1, 0), drawn.shape[1])


@checked
def bootstrap(
    values: ArrayLike, *, resamples: Count = 10_000, seed: Size = 0
) -> tuple[float, float, float]:
    """Return the mean of one or more values and its interval; NaN of fewer than two."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or len(sample) == 0:
        raise ValueError(f"values must be one or more numbers, got shape {sample.shape}")
    drawn = resampled(len(sample), resamples, seed, one_by_one=True)
    low, high = ratio_interval(sample, np.ones_like(sample), drawn)
    return float(sample.mean()), float(low), float(high)


def figure_and_interval(
    figure: Callable[..., float], runs: Sequence[Rounds], resamples: int, seed: int
) -> tuple[float, float, float]:
    """The figure of all conversations, and its interval when these are drawn anew."""
    shared = sorted(set.intersection(*(set(run.prompt.tolist()) for run in runs)))
    if not shared:
        raise ValueError("the runs of a figure must answer the same prompts, got none in common")
    runs = [run.take(np.isin(run.prompt, shared)) for run in runs]
    owners = [run.conversation for run in runs]
    values = np.empty(resamples)
    for index, times in enumerate(resampled(len(shared), resamples, seed, one_by_one=True)):
        rows = (np.repeat(np.arange(len(owner)), times[owner]) for owner in owners)
        values[index] = figure(*(run.take(r) for run, r in zip(runs, rows, strict=True)))
    here = figure(*runs)
    # A calibration error grows when conversations are drawn twice; its spread does not.
    low, high = interval(values - np.nanmean(values) + here, len(shared))
    return here, float(low), float(high)
