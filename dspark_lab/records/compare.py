"""Two records side by side, and one record by temperature or label, over time, load or length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import Count, Size, checked
from dspark_lab.rates import interval, resampled, tau_by_stretch
from dspark_lab.records.record import LINE, AcceptanceRecord
from dspark_lab.serving import RoundCosts, temperature_table

_Sums = Float[np.ndarray, "line sum"]


@checked
def compare_acceptance(
    before: AcceptanceRecord,
    after: AcceptanceRecord,
    *,
    resamples: Count = 10_000,
    seed: Size = 0,
) -> pd.DataFrame:
    """Whether acceptance of one record differs from that of another: tau and survival by slot.

    Requests with the same id in both, at least two, are compared in pairs, and only these; else all
    of either are. Ids are those of the records; their numbers in a file are none.

    Returns:
        one line for each ``figure``, "tau" or "survival k": its value ``before`` and ``after``,
        their ``difference`` in its 95 % bootstrap interval over requests, ``low`` to ``high`` (NaN
        where a record has no requests), whether they are ``paired``, and how many ``requests``
        count, of the later record.
    """
    if before.rounds == 0 or after.rounds == 0:
        raise ValueError("both records must have rounds, got none in one of them")
    slots = min(before.passed.shape[1], after.passed.shape[1])
    sums = [_sums(record, slots) for record in (before, after)]
    places = _pairs(before, after)
    if places is not None:
        sums = [own[place] for own, place in zip(sums, places, strict=True)]
    values = [_figures(own.sum(axis=0)) for own in sums]
    low, high = np.full((2, slots + 1), np.nan)
    requests = before.unit == after.unit == "request"
    if requests and min(map(len, sums)) > 1:
        drawn = [resampled(len(own), resamples, (seed, place)) for place, own in enumerate(sums)]
        if places is not None:
            drawn[1] = drawn[0]
        both = [_figures(times @ own) for times, own in zip(drawn, sums, strict=True)]
        low, high = interval(both[1] - both[0], min(map(len, sums)))
    return pd.DataFrame(
        {
            "figure": ["tau", *(f"survival {slot}" for slot in range(slots))],
            "before": values[0],
            "after": values[1],
            "difference": values[1] - values[0],
            "low": low,
            "high": high,
            "paired": places is not None,
            "requests": len(sums[1]) if requests else 0,
        }
    )


@checked
def counted_since(before: AcceptanceRecord, after: AcceptanceRecord) -> AcceptanceRecord:
    """What a server counted between two looks at its counters, both of its whole time.

    Where they fell, as after a restart, it is all that they hold now; so it is where a record is
    not of counters (SGLang's metrics and server_info are mean lengths, of rounds not known).
    """
    alike = before.passed.shape == after.passed.shape and before.rounds <= after.rounds
    if not alike or not after.exact:
        return after
    lines = after.lines.copy()
    counts = ["rounds", "accepted", "drafted"]
    lines[counts] = after.lines[counts].to_numpy() - before.lines[counts].to_numpy()
    left = {name: getattr(after, name) - getattr(before, name) for name in ("reached", "passed")}
    return replace(after, lines=lines, **left)


@checked
def acceptance_over(
    record: AcceptanceRecord,
    by: str = "seconds",
    *,
    stretches: Count = 8,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """Tau of a record over time, load or length, in stretches of about as many rounds.

    Args:
        by: a column of numbers of the record's lines: "seconds", which count from its first,
            "running" (requests that decode together, in SGLang's log), "prompt_tokens",
            "output_tokens".

    Returns:
        as :func:`dspark_lab.rates.tau_by_stretch`, with intervals where lines are requests.

    Raises:
        ValueError: the record does not say ``by`` of all its lines.
    """
    lines = record.lines
    numbers = [name for name in lines if pd.api.types.is_numeric_dtype(lines[name])]
    if by not in numbers or lines[by].isna().any():
        known = [name for name in numbers if name not in LINE and lines[name].notna().all()]
        raise ValueError(
            f"by must be a number that all lines of the record have, {known}, got {by!r}"
        )
    values = lines[by].to_numpy(dtype=float)
    rounds, accepted = (lines[name].to_numpy(dtype=float) for name in ("rounds", "accepted"))
    owner = np.arange(len(lines)) if record.unit == "request" else None
    begin = values.min() if by == "seconds" else 0
    options = {"stretches": stretches, "resamples": resamples, "seed": seed}
    return tau_by_stretch(values - begin, rounds, accepted, owner, **options)


@checked
def speedup_by(
    record: AcceptanceRecord,
    costs: RoundCosts,
    by: Literal["temperature", "label"],
    *,
    resamples: Count = 1000,
    seed: Size = 0,
) -> pd.DataFrame:
    """What drafting brings at each temperature of a record, or for each of its labels.

    Returns:
        a row for each value of ``by``, in order: its ``requests`` (0 where lines are none),
        ``rounds``, and as in :func:`dspark_lab.serving.temperature_table` ``draft_length``,
        ``tau``, ``accept_rate``, ``break_even_rate``, ``speedup``, ``best_length`` (0: do not
        draft) and ``best_speedup``. ``tau``, ``speedup`` and ``best_speedup`` have 95 % intervals
        (``tau_low``, ``tau_high`` and so on) where there are requests, else NaN. ``draft_length``
        is the served one, or the longest that the value's rounds reached and ``costs`` have.
        Lines without a value are left out.

    Raises:
        ValueError: the record does not say ``by``, or not how often a value's slots were verified.
    """
    values = record.values(by)
    if not values:
        known = [name for name in ("temperature", "label") if record.values(name)]
        raise ValueError(f"by must be one of those that the record's lines have, {known}, got {by}")
    rows: list[dict[str, Any]] = []
    for value in values:
        part = record.part(**{by: value})
        profile = part.profile(resamples=resamples, seed=seed)
        length = min(profile.longest, costs.longest)
        # Each value has a table of its own, where any temperature stands for a label.
        table = temperature_table([replace(profile, temperature=0.0)], costs, draft_length=length)
        counts = {"requests": len(part.lines) if part.unit == "request" else 0}
        [row] = table.drop(columns="temperature").to_dict("records")
        rows.append({by: value, **counts, "rounds": part.rounds, **row})
    spreads = [
        f"{name}{end}"
        for name in ("tau", "speedup", "best_speedup")
        for end in ("", "_low", "_high")
    ]
    columns = [by, "requests", "rounds", "draft_length", *spreads[:3], "accept_rate"]
    columns += ["break_even_rate", *spreads[3:6], "best_length", *spreads[6:]]
    return pd.DataFrame(rows, columns=columns)


def _sums(record: AcceptanceRecord, slots: int) -> _Sums:
    """Of each line the rounds, the accepted tokens, and the rounds that passed each slot."""
    counts = record.lines[["rounds", "accepted"]].to_numpy(dtype=float)
    return np.concatenate([counts, record.passed[:, :slots]], axis=1)


def _figures(sums: Float[np.ndarray, "*resample sum"]) -> Float[np.ndarray, "*resample figure"]:
    """Tau and survival by slot."""
    shares = sums[..., 1:] / np.where(sums[..., :1] == 0, np.nan, sums[..., :1])
    shares[..., 0] += 1
    return shares


def _pairs(
    before: AcceptanceRecord, after: AcceptanceRecord
) -> tuple[np.ndarray, np.ndarray] | None:
    """The places of requests that are in both records; None where these are fewer than two."""
    ids = []
    for record in (before, after):
        names = record.lines["line"]
        if record.unit != "request" or not names.map(lambda one: isinstance(one, str)).all():
            return None
        if names.duplicated().any():
            return None
        ids.append(pd.Index(names))
    shared = ids[0].intersection(ids[1], sort=False)
    if len(shared) < 2:
        return None
    return ids[0].get_indexer(shared), ids[1].get_indexer(shared)
