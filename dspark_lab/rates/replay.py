"""What a trace would have been worth under another rule of what to verify.

A rule is a threshold: verification stops before the first slot whose value lies below it. The trace
is replayed, not decoded anew: whether a slot is verified, and then accepted, depends on the slots
before it alone, so cutting a round short changes nothing in front of the cut. What the replay keeps
fixed is where rounds begin; the real run would begin its next round earlier.

This file knows the rounds of a trace and what their confidences become under temperatures; it runs
no model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from dspark_lab.decoding import Rounds, rounds_of
from dspark_lab.rates.intervals import interval, resampled
from dspark_lab.rates.scores import as_probabilities
from dspark_lab.rates.temperatures import SequentialTemperatures

__all__ = ["passing_sums", "threshold_levels", "threshold_sweep"]

_THRESHOLDS = tuple(step / 20 for step in range(20))


def threshold_sweep(
    trace: pd.DataFrame | Rounds,
    thresholds: Iterable[float] = _THRESHOLDS,
    calibrated: SequentialTemperatures | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """What a static threshold on the confidence of each slot would have verified and accepted.

    Verification stops before the first slot whose confidence lies below the threshold. A replay can
    only cut what was verified: use a trace that was decoded without a threshold.

    Args:
        trace: of one drafter.
        thresholds: in [0, 1], every 0.05 below 1 where left out; 0 verifies all that the trace did.
        calibrated: scales the confidences first.
        resamples, seed: of the bootstrap.

    Returns:
        one row per threshold: ``threshold``, ``acceptance_rate`` (accepted over verified; NaN where
        nothing is verified), ``verified`` and ``accepted`` (slots per round, without the target's
        own token), each of the three with ``_low`` and ``_high``, and ``not_replayed``: slots per
        round that pass the threshold but that the trace did not verify, because it was cut there or
        the answer ended. ``_low`` and ``_high`` are 95 % percentile bootstrap intervals over
        conversations, all thresholds resampled together; NaN where fewer than two conversations
        have what a figure is divided by, a round or a verified slot.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.decoding.trace.rounds_of`, thresholds outside [0, 1], or
            ``resamples`` not an int of at least 1.
    """
    rounds = rounds_of(trace)
    cuts = as_probabilities("thresholds", list(thresholds))
    confidence = rounds.confidence
    if calibrated is not None:
        confidence = calibrated.apply(confidence)
    drafted = ~np.isnan(confidence)
    level = threshold_levels(confidence, drafted, "slot")
    conversation = rounds.conversation
    count = np.bincount(conversation)
    passing, verified, accepted = (
        passing_sums(level, mask, cuts, conversation)
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
    table["not_replayed"] = (passing - verified).sum(axis=0) / len(rounds)
    return pd.DataFrame(table)


def threshold_levels(
    values: Float[np.ndarray, "round slot"],
    allowed: Shaped[np.ndarray, "round slot"],
    on: Literal["slot", "product"],
) -> Float[np.ndarray, "round slot"]:
    """The highest threshold at which each slot is still verified; -inf where it never is."""
    along = np.minimum.accumulate if on == "slot" else np.multiply.accumulate
    return np.where(allowed, along(np.where(allowed, values, 0), axis=1), -np.inf)


def passing_sums(
    level: Float[np.ndarray, "round slot"],
    weight: Shaped[np.ndarray, "round slot"],
    cuts: Float[np.ndarray, " threshold"],
    group: Int[np.ndarray, " round"],
) -> Float[np.ndarray, "group threshold"]:
    """For each group of rounds, the summed weight of the slots whose level is not below a cut."""
    order = np.argsort(cuts)
    passed = np.searchsorted(cuts[order], level, side="right")
    width = len(cuts) + 1
    cell = group[:, None] * width + passed
    size = (int(group.max()) + 1) * width
    by_passed = np.bincount(cell.ravel(), weight.ravel(), size).reshape(-1, width)
    result = np.empty((len(by_passed), len(cuts)))
    result[:, order] = by_passed[:, ::-1].cumsum(axis=1)[:, -2::-1]
    return result
