"""Replay pilots on recorded runs, knowing other runs alone: of another mix, or of other budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import pandas as pd

from dspark_lab.chats import Encoded
from dspark_lab.checks import Share, Size, checked, require_columns
from dspark_lab.tuning.extrapolation import Reference, learn_curves
from dspark_lab.tuning.growth import fit_growth
from dspark_lab.tuning.judging import CELL, taus_at
from dspark_lab.tuning.noise import GradientNoise
from dspark_lab.tuning.progress import progress_table
from dspark_lab.tuning.race import (
    Advice,
    noise_plan,
    replay_pilot,
    usual_noise,
)
from dspark_lab.tuning.results import run_table
from dspark_lab.tuning.spans import Spans

# What is left out, so that nothing is known of it: a mix, or a budget.
LeftOut = Literal["mix", "amount"]


@checked
def recorded_progress(
    table: pd.DataFrame,
    data: Mapping[str, Sequence[Encoded] | Spans],
    noise: Mapping[str, GradientNoise],
) -> pd.DataFrame:
    """:func:`progress_table` of the options of recorded runs, with their own step times.

    A column ``mix`` says what each was learned from: ``data`` and ``noise`` hold that of every mix
    of ``table``, which is of :func:`run_table`.
    """
    require_columns("table", table, ("mix", *CELL, "step_seconds"))
    parts = []
    for mix, own in table.groupby("mix", observed=True):
        times = own.groupby(CELL, as_index=False)["step_seconds"].first()
        sizes = ("batch_size", "block_size")
        options: dict[str, Any] = {f"{name}s": sorted(set(own[name])) for name in sizes}
        found = progress_table(
            noise[str(mix)],
            Spans.of(data[str(mix)]),
            times.rename(columns={"step_seconds": "seconds"}),
            num_anchors=sorted(set(own["num_anchors"])),
            **options,
        )
        parts.append(found.assign(mix=str(mix)))
    return pd.concat(parts, ignore_index=True)


@checked
def pilot_advice(
    runs: pd.DataFrame,
    progress: pd.DataFrame,
    *,
    left_out: LeftOut = "mix",
    share: Share = 0.15,
    seed: Size = 0,
) -> pd.DataFrame:
    """What a pilot advises for each setting of recorded runs that it knows nothing of.

    How tau grows (:func:`fit_growth`) and how far forecasts are off is learned from all runs but
    those of the setting's own mix, or of its own budget on any mix. Measuring costs what it costs
    :func:`dspark_lab.pilot`, which measures no noise where the budget is too small for it.

    Args:
        runs: of :func:`load_runs`, with budgets of seconds.
        progress: of :func:`progress_table`, with a column ``mix``.
        share: of a budget, for pilots; with 0 the choice rests on progress alone.
        seed: of the runs that are the pilots.

    Returns:
        a line for each setting, for :func:`judge_advice`: the advised cell, ``spent``, and what
        was promised: ``tau`` between ``tau_low`` and ``tau_high`` (90 %), ``sure``, ``pilots``.
    """
    lines, known = [], _without(runs, progress, left_out)
    for (mix, amount), _ in _settings(runs):
        own = progress[progress["mix"] == mix]
        if noise_plan(own, float(amount)) is None:
            own = usual_noise(own)
        options: dict[str, Any] = {"share": share, "seed": seed}
        options |= known({"mix": mix, "amount": amount}[left_out], str(mix))
        found = replay_pilot(runs[runs["mix"] == mix], own, amount, **options)
        lines.append(_line("seconds", amount, mix, found))
    return pd.DataFrame(lines)


@checked
def slot_advice(
    runs: pd.DataFrame,
    progress: pd.DataFrame,
    amounts: list[int],
    *,
    left_out: LeftOut = "mix",
    seed: Size = 0,
) -> pd.DataFrame:
    """The same for budgets of supervised slots, for which no pilot is run.

    The options are the cells whose recorded runs reach the budget, see :func:`taus_at`.
    """
    lines, ends, known = [], run_table(runs), _without(runs, progress, left_out)
    for amount in amounts:
        for mix in sorted(set(runs["mix"].astype(str))):
            reach = taus_at(ends[ends["mix"] == mix], "slots", amount)
            if reach.empty:
                continue
            within = progress[progress["mix"] == mix].merge(reach[CELL], on=CELL)
            options: dict[str, Any] = {"by": "slots", "seed": seed}
            options |= known({"mix": mix, "amount": amount}[left_out], mix)
            found = replay_pilot(runs[runs["mix"] == mix], within, float(amount), **options)
            lines.append(_line("slots", amount, mix, found))
    return pd.DataFrame(lines)


def _settings(runs: pd.DataFrame) -> Any:
    require_columns("runs", runs, ("budget", "mix", "amount"))
    if set(runs["budget"]) != {"seconds"}:
        raise ValueError(f"runs must have budgets of seconds, got {sorted(set(runs['budget']))}")
    return runs.groupby(["mix", "amount"], observed=True)


def _without(
    runs: pd.DataFrame, progress: pd.DataFrame, left_out: LeftOut
) -> Callable[[Any, str], dict[str, Any]]:
    """What all runs but those of a mix, or of a budget, teach of a mix."""
    require_columns("progress", progress, ["mix"])

    @cache
    def others(own: Any) -> pd.DataFrame:
        found = runs[runs[left_out] != own]
        if found.empty:
            raise ValueError(f"runs must hold another {left_out} than {own}, got none")
        return found

    @cache
    def curves(own: Any) -> Reference:
        return learn_curves(others(own), by_slot=False)

    def known(own: Any, mix: str) -> dict[str, Any]:
        growth = fit_growth(others(own), progress, mix=mix)
        return {"growth": growth, "reference": curves(own)}

    return known


def _line(budget: str, amount: float, mix: Any, found: Advice) -> dict[str, Any]:
    line: dict[str, Any] = {"budget": budget, "amount": float(amount), "mix": str(mix)}
    line |= {name: int(found.best[name]) for name in CELL}
    line |= {"advisor": "pilot", "spent": found.spent if budget == "seconds" else 0.0}
    line |= {"tau": found.best["tau"], "tau_low": found.best["low"], "tau_high": found.best["high"]}
    return line | {"sure": found.sure, "pilots": int((found.table["piloted"] > 0).sum())}
