"""Forecasts of a training run, whether it goes on or has ended, and how good they are."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from dspark_lab.checks import Count, Positive, Within, checked, require_columns
from dspark_lab.training import History, TrainConfig, read_run
from dspark_lab.tuning.cells import ALL
from dspark_lab.tuning.extrapolation import (
    Forecast,
    Reference,
    extrapolate,
    learn_curves,
    learning_rates,
    run_points,
    run_rates,
    shipped_reference,
)
from dspark_lab.tuning.results import RUN
from dspark_lab.tuning.runs import window_ends


@checked
def forecast(
    run: str | os.PathLike[str] | History | pd.DataFrame,
    *,
    steps: Count | None = None,
    config: TrainConfig | None = None,
    reference: Reference | pd.DataFrame | None = None,
    progress: pd.DataFrame | None = None,
    level: Positive = 0.9,
) -> Forecast:
    """Say where tau will be at the end of a run, from its metrics so far.

        lab.forecast("run/metrics.jsonl")

    It is the held-out tau where the run has evaluations, else that of training. The learning rates
    to come are those of the run's own configuration, which :func:`dspark_lab.train` writes beside
    the metrics.

    Args:
        run: its folder or ``metrics.jsonl``, its history, or a table of such lines: ``step``,
            ``tau`` and ``lr`` of each training step, ``held_out_tau`` and ``accept_by_slot`` of
            evaluations.
        steps: of the whole run; other than the configuration's to ask about a run that goes on for
            more, or ends earlier, from now on by a schedule of so many steps.
        config: where no configuration stands beside the metrics; by default the schedule is then a
            cosine, and the peak that of the metrics.
        reference: other runs, as :func:`dspark_lab.tuning.load_runs` gives them, or what was
            learned from them; else small runs of this lab.
        progress: what steps of other rows and anchors teach a second, for one block size and with
            the run's own among them, by :func:`dspark_lab.tuning.progress_table`: would another
            choice have been better from here? ``options`` of the forecast has a line for each:
            its ``speed`` over the run's own, and the ``tau`` at the end, had the time that is left
            been spent on it: as much as the run itself learns in ``speed`` times its steps left.
            ``low`` and ``high`` are the tau of the slowest and the fastest that the two intervals
            allow together.
        level: probability of the intervals.

    Raises:
        ValueError: neither a configuration nor ``steps``, or not one step yet.
    """
    if isinstance(run, pd.DataFrame):
        rows = run.to_dict("records")
    elif isinstance(run, History):
        rows = run.rows
        if config is None and run.out.is_dir():
            config = read_run(run.out)[1]
    else:
        rows, found = read_run(run)
        config = config or found
    taken = [row for row in rows if _number(row, "tau") and _number(row, "lr")]
    if not taken:
        raise ValueError("run must hold the tau and lr of one training step or more, got none")
    rates = _rates(np.array([row["lr"] for row in taken]), config, steps)
    if isinstance(reference, pd.DataFrame):
        reference = learn_curves(reference)
    points = _points(rows, taken)
    result = extrapolate(points, rates, reference=reference, level=level)
    if progress is None:
        return result
    if config is None:
        raise ValueError("progress needs the run's own rows and anchors: give its config")
    return _compared(result, points, rates, config, progress, reference)


def _compared(
    result: Forecast,
    points: pd.DataFrame,
    rates: Float[np.ndarray, " step"],
    config: TrainConfig,
    progress: pd.DataFrame,
    reference: Reference | None,
) -> Forecast:
    """The forecast with what the other options would have come to in the time that is left."""
    option = ["batch_size", "num_anchors", "block_size"]
    require_columns("progress", progress, [*option, "rate", "low", "high"])
    sizes = progress["block_size"].unique().tolist()
    rows, anchors = config.batch_size * config.accumulate, config.num_anchors
    mine = (progress["batch_size"] == rows) & (progress["num_anchors"] == anchors)
    if len(sizes) != 1 or mine.sum() != 1:
        wanted = f"one block size, and one line of {rows} rows and {anchors} anchors"
        raise ValueError(f"progress must have {wanted}, got {sizes} and {mine.sum()} lines")
    own, step = progress[mine].iloc[0], result.step
    past, left = rates[:step], rates[step:]
    taught = replace(reference or shipped_reference(), accept=None)

    def tau(speed: float) -> float:
        steps = max(1, round(len(left) * speed))
        places = (np.arange(steps) + 0.5) / steps * len(left) - 0.5
        ahead = np.interp(places, np.arange(len(left)), left) if len(left) else left
        whole = np.concatenate([past, ahead])
        return extrapolate(points, whole, reference=taught).tau

    options = progress[["batch_size", "num_anchors"]].copy()
    options["speed"] = progress["rate"] / own["rate"]
    options["tau"] = options["speed"].map(tau)
    options["low"] = np.where(mine, 1.0, progress["low"] / own["high"])
    options["high"] = np.where(mine, 1.0, progress["high"] / own["low"])
    options[["low", "high"]] = options[["low", "high"]].map(tau)
    best = options.loc[options["speed"].idxmax()]
    words = "No other choice of rows and anchors would teach faster from here."
    if best["speed"] > 1:
        words = (
            f"From here {best['num_anchors']:.0f} anchors and {best['batch_size']:.0f} rows "
            f"instead of {anchors} and {rows} would teach {best['speed']:.2f} times as fast: tau "
            f"{best['tau']:.2f} ({best['low']:.2f} to {best['high']:.2f}) instead of "
            f"{result.tau:.2f} after the same time."
        )
    return replace(result, options=options, reason=f"{result.reason} {words}")


def _number(row: Mapping[Any, Any], name: str) -> bool:
    value = row.get(name)
    return value is not None and value == value


def _rates(
    past: Float[np.ndarray, " step"], config: TrainConfig | None, steps: int | None
) -> Float[np.ndarray, " step"]:
    """The learning rates of the whole run: those of the past, and what the schedule brings."""
    if config is None:
        if steps is None:
            raise ValueError(
                "no configuration stands beside the metrics: say how many steps the run has "
                "(steps=), and by config= how its learning rate falls where not by a cosine"
            )
        config = TrainConfig(
            steps=steps, learning_rate=float(past.max()), warmup_steps=int(past.argmax()) + 1
        )
    elif steps is not None:
        config = replace(config, steps=steps)
    if config.steps < len(past):
        raise ValueError(
            f"steps must be at least those of the metrics, {len(past)}, got {config.steps}"
        )
    return np.concatenate([past, learning_rates(config)[len(past) :]])


def _points(rows: Any, taken: list[Any]) -> pd.DataFrame:
    """The evaluations, and the means of training's tau over windows, fewer steps in the first."""
    tau = np.array([row["tau"] for row in taken])
    ends = np.array(window_ends(len(tau)))
    means = np.add.reduceat(tau, np.append(0, ends[:-1])) / np.diff(ends, prepend=0)
    lines = [{"step": int(e), "kind": "train", "tau": t} for e, t in zip(ends, means, strict=True)]
    for row in rows:
        if _number(row, "held_out_tau"):
            found = {"step": int(row["step"]), "kind": "held_out", "tau": row["held_out_tau"]}
            lines.append(found | {"accept": row.get("accept_by_slot")})
    return pd.DataFrame(lines, columns=["step", "kind", "tau", "accept"])


@checked
def judge_forecasts(
    runs: pd.DataFrame,
    *,
    at: Annotated[float, Within(0, 1, above=True)] = 0.25,
    by: Literal["mix", "amount"] = "mix",
    level: Positive = 0.9,
    domain: str = ALL,
) -> pd.DataFrame:
    """Forecast the end of finished runs from their first part, with the others as the reference.

    The reference of a run is all runs of other mixes, or of other budgets: never one of its own.

    Args:
        runs: finished, as :func:`dspark_lab.tuning.load_runs` gives them.
        at: share of the steps that is seen, one step at least.
        by: what is left out, "mix" or "amount" (of the budget).
        level: of the intervals.
        domain: of the held-out conversations.

    Returns:
        two lines for each run: of ``kind`` "held_out", whose final ``actual`` tau is forecast from
        evaluations and training; and "train", the tau of the last training window, from training
        alone. ``tau`` from ``low`` to ``high``, the relative ``error``, whether the interval has
        ``covered`` the actual one; and the relative errors of two simpler forecasts from points of
        the same kind: ``last``, the last of them, and ``power``, a power law of the step through
        all of them.
    """
    require_columns("runs", runs, RUN)
    allowed = runs[by].unique().tolist()
    if len(allowed) < 2:
        raise ValueError(f"runs must have two of {by} or more, got {allowed}")
    lines = []
    for left_out in allowed:
        reference = learn_curves(runs[runs[by] != left_out], domain=domain, by_slot=False)
        own = runs[runs[by] == left_out]
        for key, whole in own.groupby(RUN, observed=True, sort=False):
            rates, points = run_rates(whole), run_points(whole, domain).sort_values("step")
            for kind in ("held_out", "train"):
                mine = points[points["kind"] == kind]
                seen = points if kind == "held_out" else mine
                until = max(at * len(rates), mine["step"].iloc[0])
                found = extrapolate(
                    seen[seen["step"] <= until], rates, reference=reference, level=level
                )
                actual = float(mine["tau"].iloc[-1])
                simple = _simple_forecasts(mine[mine["step"] <= until], len(rates))
                off = [value / actual - 1 for value in (found.tau, *simple)]
                covered = found.low <= actual <= found.high
                told = (found.tau, found.low, found.high, actual, off[0], covered, *off[1:])
                lines.append((*key, len(rates), kind, *told))
    columns = ["kind", "tau", "low", "high", "actual", "error", "covered", "last", "power"]
    return pd.DataFrame(lines, columns=[*RUN, "steps", *columns])


@checked
def forecast_summary(judged: pd.DataFrame, by: Sequence[str] = ("kind",)) -> pd.DataFrame:
    """The errors and coverage of :func:`judge_forecasts`, over all runs that are alike in ``by``.

    Returns:
        a line for each: how many ``runs``; the median and the largest of the relative errors'
        sizes, ``error`` and ``worst``; ``bias``, their median with the sign; the share of intervals
        that ``covered``, with its own exact 95 % interval (Clopper and Pearson) ``low`` to
        ``high``, and the median relative ``width`` of the intervals; and the median errors of the
        simpler forecasts, ``last`` and ``power``.
    """
    from scipy.stats import binomtest

    figures = ["tau", "low", "high", "error", "covered", "last", "power"]
    require_columns("judged", judged, [*by, *figures])
    lines = []
    for key, part in judged.groupby(list(by), observed=True, sort=False):
        hits, count = int(part["covered"].sum()), len(part)
        interval = binomtest(hits, count).proportion_ci()
        width = ((part["high"] - part["low"]) / part["tau"]).median()
        off = part[["error", "last", "power"]].abs()
        median = off.median()
        told = (count, median["error"], off["error"].max(), part["error"].median(), hits / count)
        simple = (median["last"], median["power"])
        lines.append((*key, *told, interval.low, interval.high, width, *simple))
    columns = ["runs", "error", "worst", "bias", "covered", "low", "high", "width", "last", "power"]
    return pd.DataFrame(lines, columns=[*by, *columns])


def _simple_forecasts(points: pd.DataFrame, steps: int) -> tuple[float, float]:
    """The last tau, and that of a power law of the step at the end."""
    tau = points["tau"].to_numpy(dtype=float)
    if len(tau) < 2:
        return tau[-1], tau[-1]
    slope, level = np.polyfit(np.log(points["step"]), np.log(tau), 1)
    return tau[-1], float(np.exp(level + slope * np.log(steps)))
