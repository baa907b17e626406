"""A static threshold applied to the rounds of a trace.

Verification stops before the first slot whose value lies below the threshold. What became of a slot
depends on the slots before it alone, so cutting a round short changes nothing in front of the cut.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import Rounds, rounds_of
from dspark_lab.rates.intervals import interval, resampled
from dspark_lab.rates.scaling import SequentialTemperatures
from dspark_lab.rates.scores import as_probabilities

THRESHOLDS = tuple(step / 20 for step in range(20))


@checked
def highest_threshold(
    values: Float[np.ndarray, "round slot"],
    allowed: Bool[np.ndarray, "round slot"],
    on: Literal["slot", "product"] = "slot",
) -> Float[np.ndarray, "round slot"]:
    """Return the highest threshold at which each slot is still verified.

    It is on each slot's own value, or on the product of values up to it; -inf from the first slot
    that is not ``allowed``.
    """
    along = np.minimum.accumulate if on == "slot" else np.multiply.accumulate
    return np.where(allowed, along(np.where(allowed, values, 0), axis=1), -np.inf)


@checked
def sums_by_threshold(
    highest: Float[np.ndarray, "round slot"],
    weight: Shaped[np.ndarray, "round slot"],
    thresholds: Float[np.ndarray, " threshold"],
    group: Int[np.ndarray, " round"],
) -> Float[np.ndarray, "group threshold slot"]:
    """Return the summed weight of the slots verified at each threshold, by group of rounds."""
    slots = highest.shape[1]
    order = np.argsort(thresholds)
    # A slot counts at the thresholds up to its highest: count those, then sum from the last on.
    passed = np.searchsorted(thresholds[order], highest, side="right")
    shape = int(group.max()) + 1, len(thresholds) + 1, slots
    cell = (group[:, None] * shape[1] + passed) * slots + np.arange(slots)
    by_passed = np.bincount(cell.ravel(), weight.ravel(), np.prod(shape)).reshape(shape)
    sums = np.empty((shape[0], len(thresholds), slots))
    sums[:, order] = by_passed[:, ::-1].cumsum(axis=1)[:, -2::-1]
    return sums


@checked
def threshold_sweep(
    trace: pd.DataFrame | Rounds,
    thresholds: Iterable[float] = THRESHOLDS,
    calibrated: SequentialTemperatures | None = None,
    *,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """Return how many slots a static threshold on each slot's confidence verifies and accepts.

    A threshold can only cut what the trace verified: use a trace that was decoded without one.

    Returns:
        one row per ``threshold``. ``verified`` and ``accepted``: slots per round, without the
        target's own token. ``acceptance_rate``: their ratio. ``_low`` to ``_high``: the 95 %
        percentile bootstrap over conversations, all thresholds resampled together.
        ``not_in_trace``: slots per round that pass the threshold but were not verified.
    """
    rounds = rounds_of(trace)
    cuts = as_probabilities("thresholds", list(thresholds))
    confidence = calibrated.apply(rounds.confidence) if calibrated else rounds.confidence
    drafted = ~np.isnan(confidence)
    highest = highest_threshold(confidence, drafted)
    conversation = rounds.conversation
    count = np.bincount(conversation)
    passing, verified, accepted = (
        sums_by_threshold(highest, mask, cuts, conversation).sum(axis=2)
        for mask in (drafted, rounds.verified, rounds.accepted)
    )

    def figures(drawn: Shaped[np.ndarray, "resample conversation"]) -> dict[str, np.ndarray]:
        size, asked, taken = (drawn @ count)[:, None], drawn @ verified, drawn @ accepted
        return {
            "acceptance_rate": taken / np.where(asked > 0, asked, np.nan),
            "verified": asked / size,
            "accepted": taken / size,
        }

    found = figures(np.ones((1, len(count))))
    entering = dict.fromkeys(found, np.full(len(cuts), len(count)))
    entering["acceptance_rate"] = (verified > 0).sum(axis=0)
    table = {"threshold": cuts}
    for name, resample in figures(resampled(len(count), resamples, seed)).items():
        table[name] = found[name][0]
        table[f"{name}_low"], table[f"{name}_high"] = interval(resample, entering[name])
    table["not_in_trace"] = (passing - verified).sum(axis=0) / len(rounds)
    return pd.DataFrame(table)
