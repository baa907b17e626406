"""The speed of a static threshold on the confidence, and how much better confidences would help.

Thresholds are replayed on the rounds of a trace, see :mod:`dspark_lab.rates.thresholds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import Rounds, rounds_of
from dspark_lab.rates import (
    TEMPERATURE_GRID,
    Binning,
    SequentialTemperatures,
    as_probabilities,
    disjoint_rounds,
    fit_identifiable_slots,
    highest_threshold,
    interval,
    prefix_survival,
    resampled,
    slot_before,
    sums_by_threshold,
)
from dspark_lab.serving.costs import Outcomes, RoundCosts, expected_verify_seconds, require_lengths
from dspark_lab.serving.profile import ratio, require_whole_blocks, rows_of

# To look at, and to choose from.
_THRESHOLDS = tuple(step / 20 for step in range(20))
_FINE_THRESHOLDS = tuple(step / 100 for step in range(101))
_FINER_THRESHOLDS = tuple(np.linspace(0, 1, 201).tolist())


@checked
def threshold_table(
    trace: pd.DataFrame | Rounds,
    costs: RoundCosts,
    *,
    thresholds: Iterable[float] = _THRESHOLDS,
    draft_lengths: Sequence[int] | None = None,
    calibrated: SequentialTemperatures | None = None,
    drafter: str | None = None,
    temperature: float | None = None,
    resamples: Count = 200,
    seed: Size = 0,
) -> pd.DataFrame:
    """Predicted speed under a static threshold on each slot's confidence.

    The whole block is drafted, and paid for; verification stops before the first slot whose
    confidence lies below the threshold. At threshold 0 a row is that of :func:`speedup_table`.

    Args:
        trace: of whole blocks, of one drafter that has a confidence head, at one temperature.
        draft_lengths: by default the longest that has both a slot and a cost.
        calibrated: scales the confidences first.
        drafter, temperature: as in :func:`acceptance_profile`; not for rounds.

    Returns:
        a row for each draft length and threshold: ``draft_length``, ``threshold``, ``verified``
        slots per round, and the columns of :meth:`RoundCosts.figures`, with the 95 % intervals
        ``_low`` to ``_high`` of ``tau`` and ``speedup``.
    """
    counts = _Counts.of(trace, thresholds, calibrated, drafter, temperature)
    longest = min(counts.slots, costs.longest)
    lengths = [longest] if draft_lengths is None else require_lengths(draft_lengths, longest)
    drawn = resampled(counts.conversations, resamples, seed)
    each = np.arange(len(counts.thresholds))
    tables = [counts.table(costs, k, each, drawn) for k in lengths]
    return pd.concat(tables, ignore_index=True)


@checked
def best_threshold(
    trace: pd.DataFrame | Rounds,
    costs: RoundCosts,
    *,
    test: pd.DataFrame | Rounds | None = None,
    thresholds: Iterable[float] = _FINE_THRESHOLDS,
    draft_lengths: Sequence[int] | None = None,
    calibrated: SequentialTemperatures | None = None,
    drafter: str | None = None,
    temperature: float | None = None,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.Series:
    """The fastest pair of draft length and static threshold, as a row of :func:`threshold_table`.

    The fastest of many is faster on the trace that it was chosen on than elsewhere; ``test``, a
    trace of other conversations, gives figures without that bias.

    All thresholds and draft lengths are tried; of equally fast ones the lowest is taken. Other
    arguments as in :func:`threshold_table`.
    """
    counts = _Counts.of(trace, thresholds, calibrated, drafter, temperature)
    lengths = require_lengths(draft_lengths, min(counts.slots, costs.longest))
    whole = np.ones((1, counts.conversations), dtype=np.int64)
    speeds = np.array([costs.figures(counts.outcomes(k, whole))["speedup"][0] for k in lengths])
    if np.isnan(speeds).all():
        raise ValueError("trace must reach the slots of one draft length at least, got none")
    length, best = np.unravel_index(np.nanargmax(speeds), speeds.shape)
    if test is not None:
        counts = _Counts.of(test, counts.thresholds, calibrated, drafter, temperature)
    drawn = resampled(counts.conversations, resamples, seed)
    return counts.table(costs, lengths[length], np.array([best]), drawn).iloc[0]


@checked
def gain_table(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    costs: RoundCosts,
    *,
    thresholds: Sequence[float] = _FINER_THRESHOLDS,
    on: Literal["slot", "product"] = "slot",
    bins: Count = 15,
    binning: Binning = "width",
    grid: Sequence[float] = TEMPERATURE_GRID,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """What scaling gains, and what perfect calibration would gain at most, in tokens and in speed.

    Four ways to decide how much of a drafted block is verified: ``everything``; a threshold on the
    ``raw`` confidence; on the ``scaled`` one; and on the ``oracle``, the true accept rate c*.
    Temperatures and each way's fastest threshold are chosen on ``fit``; every figure is of
    ``test``. Slots without an identifiable temperature keep their confidences. Speed is all tokens
    over all seconds, without replay and rollback.

    Args:
        fit, test: traces of whole blocks of one drafter, without a prompt in common.
        thresholds: to choose from, in [0, 1].
        on: ``"slot"``, a threshold on each slot's own value, or ``"product"``, on the product up to
            the slot, which is how a scheduler weighs slots. Under ``"slot"`` a miscalibration that
            happens to favour early slots, which are worth more, can be faster than its repair.
        bins, binning, grid: as in :meth:`SequentialTemperatures.fit`.

    Returns:
        one row for each way: ``values``, its name, ``threshold`` (NaN for everything), ``verified``
        and ``accepted`` (slots per round), ``speed`` (tokens per second) with ``speed_low`` and
        ``speed_high``, and, over raw, ``gain_percent`` with ``gain_low`` and ``gain_high``: 95 %
        bootstrap intervals over the conversations of ``test``, NaN with fewer than two.
    """
    fitted, held = disjoint_rounds(fit, test)
    slots = max(rounds.verified.shape[1] for rounds in (fitted, held))
    require_lengths([slots], costs.longest)
    allowed = as_probabilities("thresholds", thresholds)
    scaling = fit_identifiable_slots(fitted, grid=grid, bins=bins, binning=binning)
    tried, levels = (_highest_thresholds(rounds, scaling, on) for rounds in (fitted, held))

    def sums(
        rounds: Rounds, highest: np.ndarray, thresholds: np.ndarray, group: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, seconds and verified slots, ``[group, threshold]`` each."""
        worth = np.nan_to_num(rounds.outcome("analytic"))
        verified, accepted = (
            sums_by_threshold(highest, weight, thresholds, group)
            for weight in (rounds.verified, worth)
        )
        count = np.bincount(group)[:, None]
        verify = np.array(costs.verify_seconds[: verified.shape[2] + 1])
        seconds = expected_verify_seconds(verify, verified / count[..., None])
        seconds += costs.draft_seconds[slots - 1] + costs.overhead_seconds
        return count + accepted.sum(axis=2), count * seconds, verified.sum(axis=2)

    together = np.zeros(len(fitted), dtype=np.int64)
    drawn = resampled(held.conversation.max() + 1, resamples, seed)
    rows, speeds = [], {}
    for way, highest in tried.items():
        tokens, seconds, _ = sums(fitted, highest, allowed, together)
        best = allowed[[np.argmax(tokens / seconds)]]
        tokens, seconds, verified = sums(held, levels[way], best, held.conversation)
        speeds[way] = np.append(
            tokens.sum() / seconds.sum(), (drawn @ tokens[:, 0]) / (drawn @ seconds[:, 0])
        )
        rows.append(
            {
                "values": way,
                "threshold": float("nan") if way == "everything" else best[0],
                "verified": verified.sum() / len(held),
                "accepted": tokens.sum() / len(held) - 1,
            }
        )
    for row in rows:
        speed = speeds[row["values"]]
        gain = 100 * (speed / speeds["raw"] - 1)
        row["speed"] = speed[0]
        row["speed_low"], row["speed_high"] = interval(speed[1:], drawn.shape[1])
        row["gain_percent"] = gain[0]
        row["gain_low"], row["gain_high"] = interval(gain[1:], drawn.shape[1])
    return pd.DataFrame(rows)


def _highest_thresholds(
    rounds: Rounds, scaling: SequentialTemperatures, on: Literal["slot", "product"]
) -> dict[str, Float[np.ndarray, "round slot"]]:
    """The highest threshold that verifies each slot, under each way to decide."""
    values = {
        "raw": rounds.confidence,
        "scaled": scaling.apply(rounds.confidence),
        "oracle": rounds.accept_rate,
    }
    everything = np.where(rounds.verified, np.inf, -np.inf)
    return {"everything": everything} | {
        way: highest_threshold(value, rounds.verified, on) for way, value in values.items()
    }


@dataclass(frozen=True, eq=False)
class _Counts:
    """Rounds of each conversation by threshold and slot, ``[conversation, threshold, slot]``.

    ``existing`` have the slot and pass the threshold at all before it, ``passed`` at this one too.
    ``open`` are those in which, besides, verification would reach the slot; of these ``reached``
    pass the threshold at it, and ``accepted`` is their summed c*.
    """

    thresholds: Float[np.ndarray, " threshold"]
    existing: np.ndarray
    passed: np.ndarray
    open: np.ndarray
    reached: np.ndarray
    accepted: np.ndarray

    @classmethod
    def of(
        cls,
        trace: pd.DataFrame | Rounds,
        thresholds: Iterable[float],
        calibrated: SequentialTemperatures | None,
        drafter: str | None,
        temperature: float | None,
    ) -> _Counts:
        if not isinstance(trace, Rounds):
            trace, _, _ = rows_of(trace, drafter, temperature)
        rounds = rounds_of(trace)
        given = as_probabilities("thresholds", list(thresholds))
        confidence = rounds.confidence
        if calibrated is not None:
            confidence = calibrated.apply(confidence)
        exists, reached = ~np.isnan(confidence), rounds.reached
        require_whole_blocks(rounds, exists)
        own, before = thresholds_at(confidence, exists)
        conversation = rounds.conversation

        def count(highest: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return sums_by_threshold(highest, weight, given, conversation)

        return cls(
            thresholds=given,
            existing=count(before, exists),
            passed=count(own, exists),
            open=count(before, reached),
            reached=count(own, reached),
            accepted=count(own, np.where(reached, rounds.accept_rate, 0)),
        )

    @property
    def conversations(self) -> int:
        return len(self.existing)

    @property
    def slots(self) -> int:
        return self.existing.shape[2]

    def outcomes(
        self,
        draft_length: int,
        drawn: Int[np.ndarray, "resample conversation"],
        chosen: Int[np.ndarray, " threshold"] | slice = slice(None),
    ) -> Outcomes:
        """What happens to the slots, ``[resample, threshold, slot]``."""

        def total(counts: np.ndarray) -> np.ndarray:
            return np.tensordot(drawn, counts[:, chosen, :draft_length], axes=1)

        opened, taken = total(self.open), total(self.accepted)
        accepted = prefix_survival(ratio(taken, opened))
        before = slot_before(accepted)
        refused = ratio(total(self.reached) - taken, opened)
        return Outcomes(
            verified=prefix_survival(ratio(total(self.passed), total(self.existing))),
            accepted=accepted,
            rejected=np.where(before == 0, 0, before * refused),
        )

    def table(
        self,
        costs: RoundCosts,
        draft_length: int,
        chosen: Int[np.ndarray, " threshold"],
        drawn: Int[np.ndarray, "resample conversation"],
    ) -> pd.DataFrame:
        whole = np.ones((1, self.conversations), dtype=np.int64)
        found = self.outcomes(draft_length, whole, chosen)
        sample = costs.figures(self.outcomes(draft_length, drawn, chosen))
        table: dict[str, Any] = {
            "draft_length": np.full(len(chosen), draft_length),
            "threshold": self.thresholds[chosen],
            "verified": found.verified.sum(axis=-1)[0],
        }
        table |= {name: value[0] for name, value in costs.figures(found).items()}
        for name in ("tau", "speedup"):
            table[f"{name}_low"], table[f"{name}_high"] = interval(sample[name], self.conversations)
        return pd.DataFrame(table)


def thresholds_at(
    confidence: Float[np.ndarray, "round slot"], exists: np.ndarray
) -> tuple[Float[np.ndarray, "round slot"], Float[np.ndarray, "round slot"]]:
    """The highest thresholds that let each slot through, and all slots before it."""
    own = highest_threshold(confidence, exists)
    before = slot_before(own)
    before[:, 0] = np.inf
    return own, before
