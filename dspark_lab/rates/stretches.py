"""Tau over depth, time or load: in stretches of anything that changes while answers are drafted."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from dspark_lab.checks import Count, Size, checked, require_columns
from dspark_lab.decoding import read_trace
from dspark_lab.rates.intervals import interval, resampled

ByPart = Float[np.ndarray, " part"]
_CHANGES = ["change", "change_low", "change_high"]


@checked
def tau_by_stretch(
    values: ByPart,
    rounds: ByPart,
    accepted: ByPart,
    conversation: Shaped[np.ndarray, " part"] | None = None,
    *,
    stretches: Count = 8,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """Cut parts of answers, such as rounds, into stretches of a value with about as many rounds.

    Args:
        values: of each part, such as its position or its time.
        rounds, accepted: of each part; accepted tokens without the target's own.
        conversation: of each part; intervals are 95 % bootstraps over them, NaN without.
        stretches: at most so many; equal values are never put apart.

    Returns:
        a row for each stretch: the first and last value in it, ``begin`` and ``end``, its
        ``rounds`` and ``tau`` with ``low`` and ``high``, and the ``change`` of tau against the
        first stretch, as a share of it, with ``change_low`` and ``change_high``.

    Raises:
        ValueError: a value that is not finite, or no rounds at all.
    """
    if not np.isfinite(values).all() or not rounds.sum():
        found = "no rounds" if np.isfinite(values).all() else "some that are not"
        raise ValueError(f"parts must have rounds, and values that are finite, got {found}")
    at, place = np.unique(values, return_inverse=True)
    before = np.cumsum(np.bincount(place, rounds)) - np.bincount(place, rounds)
    of_value = np.unique((before / rounds.sum() * stretches).astype(int), return_inverse=True)[1]
    stretch, count = of_value[place], int(of_value.max()) + 1
    owner = np.zeros(len(values), int)
    if conversation is not None:
        owner = np.unique(conversation, return_inverse=True)[1]
    conversations = int(owner.max()) + 1
    cell = stretch + count * owner
    sums = [
        np.bincount(cell, weights, count * conversations).reshape(conversations, count)
        for weights in (rounds, accepted)
    ]
    tau = _tau(*(one.sum(axis=0) for one in sums))
    bounds = np.full((2, 2, count), np.nan)
    if conversation is not None:
        drawn = resampled(conversations, resamples, seed)
        again = _tau(*(drawn @ one for one in sums))
        for number, figures in enumerate((again, again / again[:, :1] - 1)):
            bounds[number] = interval(figures, (sums[0] > 0).sum(axis=0))
    edges = [[at[of_value == k][end] for k in range(count)] for end in (0, -1)]
    table = pd.DataFrame({"begin": edges[0], "end": edges[1], "rounds": sums[0].sum(axis=0)})
    table["tau"], (table["low"], table["high"]) = tau, bounds[0]
    table["change"] = tau / tau[0] - 1
    table["change_low"], table["change_high"] = bounds[1]
    table.loc[0, _CHANGES] = np.nan
    return table


@checked
def depth_table(
    trace: pd.DataFrame,
    *,
    prompt_tokens: Mapping[int, int] | None = None,
    stretches: Count = 8,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """Tau of a trace by how far into its answer, or its context, a round begins.

    Answers that end early are in the first stretches alone, so that later ones are of other
    prompts: a change says what is served there, not what depth does to one answer.

    Args:
        prompt_tokens: of each prompt's number; depth then counts from the context's first token.

    Returns:
        as :func:`tau_by_stretch`, with intervals over prompts.
    """
    rounds, row = read_trace(trace)
    depth = trace["position"].to_numpy(dtype=float)[row[:, 0]]
    if prompt_tokens is not None:
        if missing := sorted(set(rounds.prompt.tolist()) - set(prompt_tokens))[:3]:
            raise ValueError(
                f"prompt_tokens must have all prompts of the trace, got none of {missing}"
            )
        depth = depth + np.array([prompt_tokens[prompt] for prompt in rounds.prompt.tolist()])
    accepted = rounds.accepted.sum(axis=1).astype(float)
    options = {"stretches": stretches, "resamples": resamples, "seed": seed}
    return tau_by_stretch(depth, np.ones(len(depth)), accepted, rounds.prompt, **options)


@checked
def stretch_reason(table: pd.DataFrame, of: str = "position") -> str:
    """Say in a sentence whether tau changes, and from where, by :func:`tau_by_stretch`.

    That is the first stretch from which on all differ from the first one in the same direction,
    each by more than its interval.
    """
    require_columns("table", table, ["begin", "tau", *_CHANGES])
    begin = table["tau"].iloc[0]
    for sign, word in ((-1, "falls"), (1, "rises")):
        ends = sign * table["change_low" if sign > 0 else "change_high"].to_numpy()[1:] > 0
        from_here = np.flatnonzero(np.logical_and.accumulate(ends[::-1])[::-1])
        if len(from_here):
            rest = table.iloc[1 + from_here[0] :]
            row = rest.iloc[0]
            return (
                f"Tau {word} from {of} {row['begin']:,.0f} on: {row['tau']:.2f} there where it is "
                f"{begin:.2f} at first, {row['change']:+.0%} ({row['change_low']:+.0%} to "
                f"{row['change_high']:+.0%})."
            )
    if table["change_low"].isna().all():
        return f"Whether tau changes with {of} cannot be told: there is nothing to draw again."
    return f"No lasting change of tau with {of} is larger than chance; it is {begin:.2f} at first."


def _tau(rounds: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    return 1 + accepted / np.where(rounds == 0, np.nan, rounds)
