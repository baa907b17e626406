"""What a trace would have been worth under another rule of what to verify.

A rule is a threshold: verification stops before the first slot whose value lies below it. The trace
is replayed, not decoded anew: whether a slot is verified, and then accepted, depends on the slots
before it alone, so cutting a round short changes nothing in front of the cut. What the replay keeps
fixed is where rounds begin; the real run would begin its next round earlier.

This file knows the rounds of a trace and what their confidences become under temperatures; it runs
no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Shaped

from dspark_lab.checks import require_number
from dspark_lab.decoding import Rounds, rounds_of
from dspark_lab.rates.intervals import interval, resampled
from dspark_lab.rates.scores import Binning, as_probabilities
from dspark_lab.rates.temperatures import (
    TEMPERATURE_GRID,
    SequentialTemperatures,
    quiet_fit,
    rounds_apart,
)

__all__ = ["gain_table", "threshold_sweep"]

# To look at, and to choose from.
_THRESHOLDS = tuple(step / 20 for step in range(20))
_FINE_THRESHOLDS = tuple(np.linspace(0, 1, 201).tolist())


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
    level = _level(confidence, drafted, "slot")
    conversation = rounds.conversation
    count = np.bincount(conversation)
    passing, verified, accepted = (
        _passing(level, mask, cuts, conversation)
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


def gain_table(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    draft_seconds: float,
    verify_seconds: float,
    token_seconds: float,
    thresholds: Sequence[float] = _FINE_THRESHOLDS,
    on: Literal["slot", "product"] = "slot",
    bins: int = 15,
    binning: Binning = "width",
    grid: Sequence[float] = TEMPERATURE_GRID,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """What scaling gains, and what perfect calibration would gain at most, in tokens and in speed.

    Four ways to decide how much of a drafted block is verified: ``everything``; a threshold on the
    ``raw`` confidence; on the ``scaled`` one; and on the ``oracle``, the true accept rate c* in
    place of the confidence. Temperatures and each way's threshold, the fastest, are chosen on
    ``fit``; every figure is of ``test``. Slots that no temperature can be told for keep their
    confidences. Both traces must have verified whole blocks.

    A round that verifies n slots accepts, in expectation, the sum of c* over those of them that the
    trace reached, and yields one token more, the target's own. It takes ``draft_seconds +
    verify_seconds + token_seconds * (n + 1)``: the target reads the last token and the n slots.
    Speed is all tokens over all seconds.

    Args:
        fit, test: traces of one drafter without a prompt in common.
        draft_seconds: of drafting a block.
        verify_seconds: of one target pass, whatever its length.
        token_seconds: more for each token of that pass.
        thresholds: to choose from, in [0, 1].
        on: ``"slot"``, a threshold on each slot's own value, or ``"product"``, on the product up to
            the slot, which is how a scheduler weighs slots. Under ``"slot"`` one threshold serves
            early and late slots alike, though they are not worth the same: a miscalibration that
            happens to favour the early ones can be faster than its repair.
        bins, binning, grid: as in :meth:`SequentialTemperatures.fit`.
        resamples, seed: of the bootstrap.

    Returns:
        one row for each way: ``values``, its name, ``threshold`` (NaN for everything), ``verified``
        and ``accepted`` (slots per round), ``speed`` (tokens per second) with ``speed_low`` and
        ``speed_high``, and, over raw, ``gain_percent`` with ``gain_low`` and ``gain_high``: 95 %
        percentile bootstrap intervals over the conversations of ``test``, all ways resampled
        together; NaN with fewer than two conversations.

    Raises:
        TypeError, ValueError: as :func:`dspark_lab.rates.calibration.calibration_report`; costs that are
            negative or all 0, or thresholds outside [0, 1].
    """
    fitted, held = rounds_apart(fit, test)
    costs = {"draft": draft_seconds, "verify": verify_seconds, "token": token_seconds}
    for name, value in costs.items():
        require_number(f"{name}_seconds", value)
        if not (np.isfinite(value) and value >= 0):
            raise ValueError(f"{name}_seconds must be >= 0 and finite, got {value}")
    per_round = draft_seconds + verify_seconds + token_seconds
    if per_round == 0:
        raise ValueError("a round must take time, got 0 for each of the three costs")
    if on not in ("slot", "product"):
        raise ValueError(f"on must be 'slot' or 'product', got {on!r}")
    cuts = as_probabilities("thresholds", thresholds)
    scaling = quiet_fit(fitted, grid=grid, bins=bins, binning=binning)
    tried, levels = (_levels(rounds, scaling, on) for rounds in (fitted, held))
    expected, worth = (np.nan_to_num(rounds.outcome("analytic")) for rounds in (fitted, held))
    together = np.zeros(len(fitted), dtype=np.int64)
    conversation = held.conversation
    rounds_each = np.bincount(conversation)
    drawn = resampled(len(rounds_each), resamples, seed)
    rows, speeds = [], {}
    for way, level in levels.items():
        [verified] = _passing(tried[way], fitted.verified, cuts, together)
        [accepted] = _passing(tried[way], expected, cuts, together)
        spent = len(fitted) * per_round + token_seconds * verified
        threshold = cuts[np.argmax((len(fitted) + accepted) / spent)]
        passing = level >= threshold
        slots = np.bincount(conversation, passing.sum(axis=1))
        gained = np.bincount(conversation, (passing * worth).sum(axis=1))
        tokens, seconds = rounds_each + gained, rounds_each * per_round + token_seconds * slots
        speeds[way] = np.append(tokens.sum() / seconds.sum(), (drawn @ tokens) / (drawn @ seconds))
        rows.append(
            {
                "values": way,
                "threshold": float("nan") if way == "everything" else threshold,
                "verified": slots.sum() / len(held),
                "accepted": gained.sum() / len(held),
            }
        )
    for row in rows:
        speed = speeds[row["values"]]
        gain = 100 * (speed / speeds["raw"] - 1)
        row["speed"] = speed[0]
        row["speed_low"], row["speed_high"] = interval(speed[1:], len(rounds_each))
        row["gain_percent"] = gain[0]
        row["gain_low"], row["gain_high"] = interval(gain[1:], len(rounds_each))
    return pd.DataFrame(rows)


def _levels(
    rounds: Rounds, scaling: SequentialTemperatures, on: Literal["slot", "product"]
) -> dict[str, Float[np.ndarray, "round slot"]]:
    """The level of each slot under each way to decide what is verified."""
    values = {
        "raw": rounds.confidence,
        "scaled": scaling.apply(rounds.confidence),
        "oracle": rounds.accept_rate,
    }
    everything = np.where(rounds.verified, np.inf, -np.inf)
    return {"everything": everything} | {
        way: _level(value, rounds.verified, on) for way, value in values.items()
    }


def _level(
    values: Float[np.ndarray, "round slot"],
    allowed: Shaped[np.ndarray, "round slot"],
    on: Literal["slot", "product"],
) -> Float[np.ndarray, "round slot"]:
    """The highest threshold at which each slot is still verified; -inf where it never is."""
    along = np.minimum.accumulate if on == "slot" else np.multiply.accumulate
    return np.where(allowed, along(np.where(allowed, values, 0), axis=1), -np.inf)


def _passing(
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
