"""What calibration is worth: tokens and speed under thresholds on raw, scaled and true accept rates.

Thresholds are applied to a trace, see :mod:`dspark_lab.rates.thresholds`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import require_number
from dspark_lab.decoding import Rounds
from dspark_lab.rates import (
    TEMPERATURE_GRID,
    Binning,
    SequentialTemperatures,
    as_probabilities,
    disjoint_rounds,
    fit_identifiable_slots,
    highest_threshold,
    interval,
    resampled,
    sums_by_threshold,
)

__all__ = ["gain_table"]

_THRESHOLDS = tuple(np.linspace(0, 1, 201).tolist())


def gain_table(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    *,
    draft_seconds: float,
    verify_seconds: float,
    token_seconds: float,
    thresholds: Sequence[float] = _THRESHOLDS,
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
        TypeError, ValueError: as :func:`dspark_lab.rates.calibration_report`; costs that are
            negative or all 0, or thresholds outside [0, 1].
    """
    fitted, held = disjoint_rounds(fit, test)
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
    scaling = fit_identifiable_slots(fitted, grid=grid, bins=bins, binning=binning)
    tried, levels = (_levels(rounds, scaling, on) for rounds in (fitted, held))
    expected, worth = (np.nan_to_num(rounds.outcome("analytic")) for rounds in (fitted, held))
    together = np.zeros(len(fitted), dtype=np.int64)
    conversation = held.conversation
    rounds_each = np.bincount(conversation)
    drawn = resampled(len(rounds_each), resamples, seed)
    rows, speeds = [], {}
    for way, level in levels.items():
        verified, accepted = (
            sums_by_threshold(tried[way], weight, cuts, together)[0].sum(axis=1)
            for weight in (fitted.verified, expected)
        )
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
        way: highest_threshold(value, rounds.verified, on) for way, value in values.items()
    }
