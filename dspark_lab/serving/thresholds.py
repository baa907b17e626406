"""The speed of a static threshold on the confidence, and how much better confidences would help.

Thresholds are applied to the rounds of a trace, see :mod:`dspark_lab.rates.thresholds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from dspark_lab import rates
from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import Rounds, rounds_of, slot_before
from dspark_lab.serving.costs import RoundCosts, expected_verify_seconds, require_lengths
from dspark_lab.serving.profile import ratio, require_whole_blocks, rows_of

_FINE_THRESHOLDS = tuple(step / 100 for step in range(101))
_FINER_THRESHOLDS = tuple(np.linspace(0, 1, 201).tolist())


@checked
def threshold_table(
    trace: pd.DataFrame | Rounds,
    costs: RoundCosts,
    *,
    thresholds: Iterable[float] = rates.THRESHOLDS,
    draft_lengths: Sequence[int] | None = None,
    calibrated: rates.SequentialTemperatures | None = None,
    drafter: str | None = None,
    temperature: float | None = None,
    resamples: Count = 200,
    seed: Size = 0,
) -> pd.DataFrame:
    """Predicted speed under a static threshold on each slot's confidence.

    The whole block is drafted, and paid for. A row holds the ``verified`` slots per round and
    otherwise what :func:`speedup_table` says, which it equals at threshold 0 of whole blocks;
    rounds of a shorter ``draft_length`` are taken to begin where the trace's did.

    Args:
        trace, drafter, temperature: as in :func:`acceptance_profile`; rounds are taken as they are.
        draft_lengths: by default the longest that has both a slot and a cost.
    """
    rounds = _rounds(trace, drafter, temperature)
    cuts = rates.as_probabilities("thresholds", list(thresholds))
    counts = _counts(rounds, cuts, calibrated)
    conversations, _, slots = counts.existing.shape
    longest = min(slots, costs.longest)
    lengths = [longest] if draft_lengths is None else require_lengths(draft_lengths, longest)
    whole = np.ones((1, conversations), dtype=np.int64)
    drawn = rates.resampled(conversations, resamples, seed)
    tables = []
    for k in lengths:
        found, sample = (_figures(counts, costs, k, times) for times in (whole, drawn))
        table = pd.DataFrame({"draft_length": k, "threshold": cuts})
        table = table.assign(**{name: value[0] for name, value in found.items()})
        for name in ("tau", "speedup"):
            low, high = rates.interval(sample[name], conversations)
            table[f"{name}_low"], table[f"{name}_high"] = low, high
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@checked
def best_threshold(
    trace: pd.DataFrame | Rounds,
    costs: RoundCosts,
    *,
    test: pd.DataFrame | Rounds | None = None,
    thresholds: Iterable[float] = _FINE_THRESHOLDS,
    draft_lengths: Sequence[int] | None = None,
    calibrated: rates.SequentialTemperatures | None = None,
    drafter: str | None = None,
    temperature: float | None = None,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.Series:
    """The fastest pair of draft length and static threshold, as a row of :func:`threshold_table`.

    The fastest of many is faster on the trace that it was chosen on than elsewhere; ``test``, a
    trace of other conversations, gives figures without that bias.
    """
    rounds = _rounds(trace, drafter, temperature)
    lengths = require_lengths(draft_lengths, min(rounds.verified.shape[1], costs.longest))
    table_of = partial(threshold_table, costs=costs, calibrated=calibrated)
    tried = table_of(rounds, thresholds=thresholds, draft_lengths=lengths, resamples=1)
    if tried["speedup"].isna().all():
        raise ValueError("trace must reach the slots of one draft length at least, got none")
    best = tried.loc[tried["speedup"].idxmax()]
    cut, length = [best["threshold"]], [int(best["draft_length"])]
    shown = rounds if test is None else _rounds(test, drafter, temperature)
    table = table_of(shown, thresholds=cut, draft_lengths=length, resamples=resamples, seed=seed)
    return table.iloc[0]


@checked
def gain_table(
    fit: pd.DataFrame | Rounds,
    test: pd.DataFrame | Rounds,
    costs: RoundCosts,
    *,
    thresholds: Sequence[float] = _FINER_THRESHOLDS,
    on: Literal["slot", "product"] = "slot",
    bins: Count = 15,
    binning: rates.Binning = "width",
    grid: Sequence[float] = rates.TEMPERATURE_GRID,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """The gain of scaling, and of perfect calibration, in tokens and in speed.

    Verified is ``everything``, or up to a threshold on the ``raw`` confidence, on the ``scaled``
    one, or on the ``oracle``, the true accept rate c*. Temperatures and each way's fastest
    threshold are chosen on ``fit``; figures are of ``test``.

    Args:
        fit, test: traces of whole blocks of one drafter, without a prompt in common.
        on: each slot's own value, or the product up to the slot. Under ``"slot"`` a miscalibration
            that favours early slots, which are worth more, can be faster than its repair.
        bins, binning, grid: as in :meth:`SequentialTemperatures.fit`.

    Returns:
        a row for each way: slots per round, ``speed`` in tokens per second without replay and
        rollback, and ``gain_percent`` over raw, with 95 % bootstrap intervals.
    """
    fitted, held = rates.disjoint_rounds(fit, test)
    slots = max(rounds.verified.shape[1] for rounds in (fitted, held))
    require_lengths([slots], costs.longest)
    allowed = rates.as_probabilities("thresholds", thresholds)
    scaling = rates.fit_identifiable_slots(fitted, grid=grid, bins=bins, binning=binning)
    tried, levels = (_highest_thresholds(rounds, scaling, on) for rounds in (fitted, held))

    def sums(
        rounds: Rounds, highest: np.ndarray, thresholds: np.ndarray, group: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, seconds and verified slots, ``[group, threshold]`` each."""
        worth = np.nan_to_num(rounds.outcome("analytic"))
        verified = rates.sums_by_threshold(highest, rounds.verified, thresholds, group)
        accepted = rates.sums_by_threshold(highest, worth, thresholds, group)
        count = np.bincount(group)[:, None]
        verify = np.array(costs.verify_seconds[: verified.shape[2] + 1])
        seconds = expected_verify_seconds(verify, verified / count[..., None])
        seconds += costs.draft_seconds[slots - 1] + costs.overhead_seconds
        return count + accepted.sum(axis=2), count * seconds, verified.sum(axis=2)

    together = np.zeros(len(fitted), dtype=np.int64)
    drawn = rates.resampled(held.conversation.max() + 1, resamples, seed)
    rows, speeds = [], []
    for way, highest in tried.items():
        tokens, seconds, _ = sums(fitted, highest, allowed, together)
        best = allowed[[np.argmax(tokens / seconds)]]
        tokens, seconds, verified = sums(held, levels[way], best, held.conversation)
        threshold = float("nan") if way == "everything" else best[0]
        rows.append((way, threshold, verified.sum() / len(held), tokens.sum() / len(held) - 1))
        sample = (drawn @ tokens[:, 0]) / (drawn @ seconds[:, 0])
        speeds.append(np.append(tokens.sum() / seconds.sum(), sample))
    table = pd.DataFrame(rows, columns=["values", "threshold", "verified", "accepted"])
    speed = np.stack(speeds, axis=1)
    raw = speed[:, [list(tried).index("raw")]]
    for name, values in (("speed", speed), ("gain", 100 * (speed / raw - 1))):
        table["speed" if name == "speed" else "gain_percent"] = values[0]
        table[f"{name}_low"], table[f"{name}_high"] = rates.interval(values[1:], drawn.shape[1])
    return table


def _highest_thresholds(
    rounds: Rounds, scaling: rates.SequentialTemperatures, on: Literal["slot", "product"]
) -> dict[str, Float[np.ndarray, "round slot"]]:
    found = {"everything": np.where(rounds.verified, np.inf, -np.inf)}
    scaled = scaling.apply(rounds.confidence)
    values = {"raw": rounds.confidence, "scaled": scaled, "oracle": rounds.accept_rate}
    for way, value in values.items():
        found[way] = rates.highest_threshold(value, rounds.verified, on)
    return found


class _Counts(NamedTuple):
    """Rounds of each conversation by threshold and slot, ``[conversation, threshold, slot]``.

    ``existing`` have the slot and pass before it, ``passed`` at it too. Of those ``open``
    verification would reach it; ``reached`` pass there too, and ``accepted`` is their summed c*.
    """

    existing: np.ndarray
    passed: np.ndarray
    open: np.ndarray
    reached: np.ndarray
    accepted: np.ndarray


def _rounds(trace: pd.DataFrame | Rounds, drafter: str | None, temperature: float | None) -> Rounds:
    if isinstance(trace, pd.DataFrame):
        trace = rows_of(trace, drafter, temperature)[0]
    return rounds_of(trace)


def _counts(
    rounds: Rounds,
    thresholds: Float[np.ndarray, " threshold"],
    calibrated: rates.SequentialTemperatures | None,
) -> _Counts:
    confidence = rounds.confidence
    if calibrated is not None:
        confidence = calibrated.apply(confidence)
    exists, reached = ~np.isnan(confidence), rounds.reached
    require_whole_blocks(rounds, exists)
    own, before = thresholds_at(confidence, exists)

    def count(highest: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return rates.sums_by_threshold(highest, weight, thresholds, rounds.conversation)

    return _Counts(
        existing=count(before, exists),
        passed=count(own, exists),
        open=count(before, reached),
        reached=count(own, reached),
        accepted=count(own, np.nan_to_num(rounds.outcome("analytic"))),
    )


def _figures(
    counts: _Counts,
    costs: RoundCosts,
    draft_length: int,
    drawn: Int[np.ndarray, "resample conversation"],
) -> dict[str, Float[np.ndarray, "resample threshold"]]:
    """``verified`` slots and the figures of a round, conversations ``drawn`` so many times."""
    total = _Counts(*(np.tensordot(drawn, each[..., :draft_length], axes=1) for each in counts))
    accepted = rates.prefix_survival(ratio(total.accepted, total.open))
    before = slot_before(accepted)
    refused = ratio(total.reached - total.accepted, total.open)
    rejected = np.where(before == 0, 0, before * refused)
    verified = rates.prefix_survival(ratio(total.passed, total.existing))
    return {"verified": verified.sum(axis=-1), **costs.figures(accepted, verified, rejected)}


def thresholds_at(
    confidence: Float[np.ndarray, "round slot"], exists: np.ndarray
) -> tuple[Float[np.ndarray, "round slot"], Float[np.ndarray, "round slot"]]:
    """The highest thresholds that let each slot through, and all slots before it."""
    own = rates.highest_threshold(confidence, exists)
    before = slot_before(own)
    before[:, 0] = np.inf
    return own, before
