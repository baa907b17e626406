"""Accept rates by slot and tau, actual beside predicted, as ratios from one table of sums.

    teacher-forced:   c* of every supervised slot, on the text as it was written;
    on policy:        c* of every slot that verification reached, along the path really taken;
    empirical:        whether such a slot was accepted, 1 or 0;
    predicted:        the confidence head's probability, on the slots of *on policy*;
    predicted, teacher-forced: the same, on the slots of *teacher-forced*.

c* = sum_v min(p_draft, p_target) is the probability that a token drawn from the drafter is
accepted (Leviathan et al. 2022, arXiv 2211.17192; DSpark, arXiv 2607.05147, section 3.3). A slot
is *reached* where the target was asked about it and every slot of its round before it was accepted.
The table of sums has a row for each kind, conversation and slot:

    conditional_k = passed_k / reached_k    the slot survives, given that all before it did;
    survival_k    = survived_k / rounds     the slot and all before it survive;
    tau           = 1 + sum_k survival_k    tokens of a round, the target's own token included.

A slot that was not verified was not accepted: it lowers survival and tau, and does not enter a
conditional rate. Tau counts the target's token in every round, also where the turn ends before it.
A round without a row in the trace does not count.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import read_trace
from dspark_lab.rates.intervals import ratio_interval, resampled
from dspark_lab.rates.survival import prefix_survival

BySlot = Shaped[np.ndarray, "round slot"]
ByRound = Shaped[np.ndarray, " round"]

_SUMS = ["rounds", "reached", "passed", "survived"]


@checked
def trace_sums(trace: pd.DataFrame) -> pd.DataFrame:
    """Return the sums of a trace, of the kinds *on policy*, *empirical* and *predicted*.

    A prediction survives as the product of its round's confidences up to it, which is what a
    scheduler goes by. These products run over slots past a rejection too, and treat a token's
    acceptance and the c* after it as independent: even exact confidences have another survival than
    the empirical one. A conversation is a prompt; tables of other prompts can be concatenated.
    """
    rounds, _ = read_trace(trace)
    reached, confidence = rounds.reached, rounds.confidence
    chance = np.where(reached, rounds.accept_rate, 0)
    predicted = np.where(rounds.verified, prefix_survival(confidence), 0)
    kinds = {
        "on policy": (chance, chance),
        "empirical": (rounds.accepted, rounds.accepted),
        "predicted": (np.where(reached, confidence, 0), predicted),
    }
    return sums_by_conversation(rounds.prompt, rounds.domain, reached, kinds)


def sums_by_conversation(
    conversation: ByRound, domain: ByRound, reached: BySlot, kinds: dict[str, tuple[BySlot, BySlot]]
) -> pd.DataFrame:
    """The table of sums, where conversations are in one piece; ``kinds``: what passed, survived."""
    starts = np.flatnonzero(np.append(True, conversation[1:] != conversation[:-1]))
    slots = reached.shape[1]

    def total(values: BySlot) -> Float[np.ndarray, " sum"]:
        return np.add.reduceat(values.astype(np.float64), starts, axis=0).ravel()

    common = pd.DataFrame(
        {
            "kind": None,
            "conversation": conversation[starts].repeat(slots),
            "domain": domain[starts].repeat(slots),
            "slot": np.tile(np.arange(slots), len(starts)),
            "rounds": total(np.ones_like(reached)),
            "reached": total(reached),
        }
    )
    tables = [
        common.assign(kind=kind, passed=total(passed), survived=total(survived))
        for kind, (passed, survived) in kinds.items()
    ]
    return pd.concat(tables, ignore_index=True)


@checked
def rate_table(
    sums: pd.DataFrame, by: str | Sequence[str] = (), *, resamples: Count = 1000, seed: Size = 0
) -> pd.DataFrame:
    """Return the conditional rate and the survival of each slot, for every kind in the sums.

    An interval is the 95 % percentile bootstrap of a ratio of sums, over the conversations that
    enter its denominator; NaN where these are fewer than two. Groups of equally many conversations
    are resampled by the same draws.

    Args:
        sums: of :func:`trace_sums`, :func:`teacher_forced_sums` and :func:`teacher_forced_answers`,
            concatenated.
        by: columns to keep apart, such as ``"domain"``, or one added to the sums.

    Returns:
        a row for each ``kind``, ``by`` and ``slot``, with the ``conversations`` that reach the
        slot, the ``rounds`` of all, and ``low`` to ``high``, the interval of ``conditional``.
    """
    group = ["kind", *_columns_to_keep_apart(sums, by)]
    keys = [*group, "slot"]
    # A conversation counts at every slot of its group, if its own rounds were shorter too.
    once = _total(sums[sums["slot"] == 0], [*group, "conversation"], ["rounds"])
    grid = once.merge(sums[keys].drop_duplicates(), on=group)
    grid[_SUMS[1:]] = 0.0
    each = pd.concat([grid, sums.assign(rounds=0)], ignore_index=True)
    each = _total(each, [*keys, "conversation"], _SUMS)
    table = _ratios(each, keys, "passed", "reached", resamples, seed)
    survival = _ratios(each, keys, "survived", "rounds", resamples, seed)
    table.insert(len(keys) + 1, "rounds", survival["rounds"].astype(np.int64))
    return table.rename(columns={"ratio": "conditional"}).assign(
        survival=survival["ratio"], survival_low=survival["low"], survival_high=survival["high"]
    )


@checked
def tau_table(
    sums: pd.DataFrame, by: str | Sequence[str] = (), *, resamples: Count = 1000, seed: Size = 0
) -> pd.DataFrame:
    """Return tau, in tokens per round, as :func:`rate_table` with the slots pooled."""
    keys = ["kind", *_columns_to_keep_apart(sums, by)]
    # Every slot repeats the rounds of its conversation.
    once = sums.assign(rounds=sums["rounds"].where(sums["slot"] == 0, 0))
    each = _total(once, [*keys, "conversation"], ["rounds", "survived"])
    table = _ratios(each, keys, "survived", "rounds", resamples, seed)
    figures = ["ratio", "low", "high"]
    table[figures] = with_own_token(table[figures])
    return table.astype({"rounds": np.int64}).rename(columns={"ratio": "tau"})


def with_own_token(accepted: pd.DataFrame) -> pd.DataFrame:
    """Tokens of a round: the accepted ones and the target's own."""
    return accepted + 1


def _columns_to_keep_apart(sums: pd.DataFrame, by: str | Sequence[str]) -> list[str]:
    needed = ["kind", "conversation", "domain", "slot", *_SUMS]
    if len(sums) == 0 or not set(needed) <= set(sums.columns):
        found = f"{len(sums)} rows of {list(sums.columns)}"
        raise ValueError(f"sums must have rows and the columns {needed}, got {found}")
    allowed = [name for name in sums.columns if name not in ("kind", "slot", *_SUMS)]
    names = [by] if isinstance(by, str) else list(by)
    if not set(names) <= set(allowed) or len(set(names)) < len(names):
        raise ValueError(f"by must name columns, each once, among {allowed}, got {names}")
    return names


def _total(frame: pd.DataFrame, keys: list[str], values: list[str]) -> pd.DataFrame:
    """The sums of values by keys, in the order in which these first appear. NaN stays NaN."""
    keys = list(dict.fromkeys(keys))
    code = frame.groupby(keys, sort=False, dropna=False).ngroup()
    result = frame[keys].drop_duplicates(ignore_index=True)
    # A groupby's sum compensates for rounding: other digits than a plain sum.
    return result.assign(**{name: np.bincount(code, frame[name]) for name in values})


def _ratios(
    each: pd.DataFrame, keys: list[str], top: str, bottom: str, resamples: int, seed: int
) -> pd.DataFrame:
    """The ratio of two sums for each group, with its interval; a row is a conversation's."""
    code = each.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()
    groups = _total(each, keys, [bottom, top])
    tops, bottoms = each[top].to_numpy(float), each[bottom].to_numpy(float)
    entering = np.flatnonzero(bottoms != 0)
    entering = entering[np.argsort(code[entering], kind="stable")]
    count = np.bincount(code[entering], minlength=len(groups))
    start = np.cumsum(count) - count
    low, high = bounds = np.full((2, len(groups)), np.nan)
    for n in np.unique(count[count > 1]):
        alike = np.flatnonzero(count == n)
        members = entering[start[alike, None] + np.arange(n)]
        drawn = resampled(n, resamples, (seed, n), one_by_one=True)
        bounds[:, alike] = ratio_interval(tops[members], bottoms[members], drawn)
    total = groups[bottom].to_numpy(float)
    ratio = groups[top] / np.where(total == 0, np.nan, total)
    table = groups[keys].assign(conversations=count, **{bottom: total})
    return table.assign(ratio=ratio, low=low, high=high)
