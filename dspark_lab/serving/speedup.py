"""Speed-up over plain decoding against draft length and temperature, and which length to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import Count, Size, checked
from dspark_lab.decoding import column
from dspark_lab.serving.costs import RoundCosts, break_even, break_even_rate, require_lengths
from dspark_lab.serving.profile import AcceptanceProfile, acceptance_profile, tau_of_answers

# How long an answer is, or each of several, without its first token; None is an endless one.
AnswerTokens = Count | Sequence[Size] | None
_OF_ANSWERS = ("tau", "tokens_per_second", "speedup", "without_replay", "without_overhead")


@checked
def speedup_table(
    profile: AcceptanceProfile,
    costs: RoundCosts,
    draft_lengths: Sequence[int] | None = None,
    *,
    tokens: AnswerTokens = None,
) -> pd.DataFrame:
    """Predicted speed for each number of tokens drafted a round.

    A row for each length, by default all that have both a rate and a cost: the figures of
    :meth:`RoundCosts.figures`, with 95 % bootstrap intervals, the rates of :func:`break_even`, and
    ``best_share``, how often the length is the fastest of a resample (NaN without any).

    Answers of so many ``tokens``, their first ones left out, end within a round, which yields less
    and is counted as dear as the others: the shorter they are, the less long blocks pay.
    """
    rows, speeds = [], []
    for k in require_lengths(draft_lengths, min(len(profile.rates), costs.longest)):
        figures, sample = (
            _figures(costs, survival, tokens)
            for survival in (profile.survival_of(k), profile.sampled_survival(k))
        )
        row = {"draft_length": k, **{name: float(value) for name, value in figures.items()}}
        for name in ("tau", "speedup"):
            row[f"{name}_low"], row[f"{name}_high"] = profile.interval(sample[name])
        row["break_even_rate"] = break_even(costs, k)
        row["break_even_without_replay"] = break_even(costs.cutting(), k)
        rows.append(row)
        speeds.append(np.nan_to_num(sample["speedup"], nan=-np.inf))
    fastest = np.argmax(speeds, axis=0)
    share = [float(np.mean(fastest == i)) if len(fastest) else np.nan for i in range(len(rows))]
    return pd.DataFrame(rows).assign(best_share=share)


@checked
def gain_by_length(
    profile: AcceptanceProfile, costs: RoundCosts, served: Count | None = None
) -> pd.DataFrame:
    """Gain in speed of each draft length over the one that is ``served``, by default the profile's.

    A row for each ``draft_length`` that has both a rate and a cost: its ``speedup`` over plain
    decoding and its ``gain_percent`` over the served length, each with its 95 % interval. Both
    lengths are of the same resamples, so that the gain is told better than either speed-up.
    """
    lengths = require_lengths(None, min(profile.longest, costs.longest))
    [served] = require_lengths([served or profile.longest], lengths[-1])
    speeds = {
        k: [
            costs.figures(survival)["speedup"]
            for survival in (profile.survival_of(k), profile.sampled_survival(k))
        ]
        for k in lengths
    }
    rows = []
    for k, (speed, sample) in speeds.items():
        low, high = profile.interval(sample)
        gain, gains = (
            100 * (own / other - 1) for own, other in zip(speeds[k], speeds[served], strict=True)
        )
        rows.append((k, float(speed), low, high, float(gain), *profile.interval(gains)))
    names = ["draft_length", "speedup", "speedup_low", "speedup_high"]
    return pd.DataFrame(rows, columns=[*names, "gain_percent", "gain_low", "gain_high"])


def best_length(
    profile: AcceptanceProfile,
    costs: RoundCosts,
    draft_lengths: Sequence[int] | None = None,
    *,
    tokens: AnswerTokens = None,
) -> int:
    """The fastest number of tokens to draft a round; 0 where plain decoding is as fast.

    Arguments are those of :func:`speedup_table`.
    """
    best = _fastest(speedup_table(profile, costs, draft_lengths, tokens=tokens))
    return int(best["draft_length"]) if best["speedup"] > 1 else 0


@checked
def temperature_table(
    trace: pd.DataFrame | Sequence[AcceptanceProfile],
    costs: RoundCosts | Mapping[float, RoundCosts],
    *,
    drafter: str | None = None,
    draft_length: Count | None = None,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """The same drafter at each temperature of a trace.

    Args:
        trace: with a column ``temperature``; or a profile of each temperature, to which
            ``drafter``, ``resamples`` and ``seed`` do not apply.
        costs: of all temperatures, or of each.
        draft_length: by default the fastest at the lowest temperature, of those that all have.

    Returns:
        columns as in :func:`speedup_table`, ``accept_rate``, that of every slot which would give
        the same tau, and ``best_length`` (0: do not draft) with its ``best_speedup`` in its 95 %
        interval, ``best_speedup_low`` to ``best_speedup_high`` (NaN for plain decoding).
    """
    if isinstance(trace, pd.DataFrame):
        options: dict[str, Any] = {"drafter": drafter, "resamples": resamples, "seed": seed}
        found = column(trace, "temperature", complete=True).unique().tolist()
        profiles = [acceptance_profile(trace, temperature=value, **options) for value in found]
    else:
        profiles = list(trace)
    by_temperature = {profile.temperature: profile for profile in profiles}
    if not profiles or None in by_temperature or len(by_temperature) < len(profiles):
        given = [profile.temperature for profile in profiles]
        raise ValueError(
            f"profiles must be one or more, each of another known temperature, got {given}"
        )
    values = sorted(value for value in by_temperature if value is not None)
    if isinstance(costs, RoundCosts):
        costs = dict.fromkeys(values, costs)
    if missing := [value for value in values if value not in costs]:
        raise ValueError(f"costs must be of every temperature, got none of {missing}")
    shared = ["break_even_rate", "break_even_without_replay", "tau", "tau_low", "tau_high"]
    shared += ["speedup", "speedup_low", "speedup_high", "without_replay", "without_overhead"]
    tables = [speedup_table(by_temperature[value], costs[value]) for value in values]
    longest = min(int(table["speedup"].notna().sum()) for table in tables)
    draft_length = draft_length or int(_fastest(tables[0][:longest])["draft_length"])
    require_lengths([draft_length], longest)
    rows = []
    for value, table in zip(values, tables, strict=True):
        best = _fastest(table)
        choice: tuple[float, ...] = (0, 1.0, np.nan, np.nan)
        if best["speedup"] > 1:
            speeds = best[["speedup", "speedup_low", "speedup_high"]]
            choice = (int(best["draft_length"]), *speeds)
        row = table.iloc[draft_length - 1]
        rate = break_even_rate(row["tau"], draft_length)
        rows.append((value, draft_length, rate, *row[shared], *choice))
    names = ["temperature", "draft_length", "accept_rate", *shared, "best_length", "best_speedup"]
    names += ["best_speedup_low", "best_speedup_high"]
    return pd.DataFrame(rows, columns=names)


def advice(
    profile: AcceptanceProfile,
    costs: RoundCosts,
    draft_lengths: Sequence[int] | None = None,
    *,
    tokens: AnswerTokens = None,
) -> str:
    """How many tokens to draft and why, in one sentence; "Do not draft" where nothing pays.

    Arguments are those of :func:`speedup_table`.
    """
    table = speedup_table(profile, costs, draft_lengths, tokens=tokens)
    best = _fastest(table)
    length, speed = int(best["draft_length"]), best["speedup"]
    where = "" if profile.temperature is None else f" at temperature {profile.temperature:g}"
    spread = ""
    if not np.isnan(best["speedup_low"]):
        spread = f" ({best['speedup_low']:.2f} to {best['speedup_high']:.2f})"
    rate, need = break_even_rate(best["tau"], length), best["break_even_rate"]
    if speed <= 1:
        needed = "no accept rate would pay" if np.isinf(need) else f"it pays from {need:.2f} on"
        reason = (
            f"even the best length, {length}, gives {speed:.2f}{spread} times the speed of plain "
            f"decoding{where}: slots are accepted at a rate of {rate:.2f}, and {needed}"
        )
        if (hopeful := best["without_replay"]) > 1:
            reason += f"; without the cost of rejections it would be {hopeful:.2f}"
        return f"Do not draft: {reason}."
    reason = (
        f"{speed:.2f}{spread} times the speed of plain decoding{where}, with {best['tau']:.2f} "
        f"tokens a round: slots are accepted at a rate of {rate:.2f}, and it pays from "
        f"{need:.2f} on"
    )
    others = table[table["draft_length"] != length].dropna(subset=["speedup"])
    if len(others):
        next_ = _fastest(others)
        reason += f"; {int(next_['draft_length'])} comes next with {next_['speedup']:.2f}"
        if not np.isnan(best["best_share"]):
            reason += f", and {length} is the fastest in {best['best_share']:.0%} of resamples"
    return f"Draft {length} a round: {reason}."


def _figures(
    costs: RoundCosts, survival: Float[np.ndarray, "*axes slot"], tokens: AnswerTokens
) -> dict[str, Any]:
    figures = costs.figures(survival)
    if tokens is None:
        return figures
    share = tau_of_answers(survival, np.atleast_1d(tokens)) / figures["tau"]
    return figures | {name: share * figures[name] for name in _OF_ANSWERS}


def _fastest(table: pd.DataFrame) -> pd.Series:
    return table.loc[table["speedup"].idxmax()]
