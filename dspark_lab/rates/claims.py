"""Published findings about DSpark held against traces.

The published figures are of drafters of Qwen3-4B at temperature 1 (DSpark, arXiv 2607.05147); the
lab's models are far smaller, so what is compared is the direction more than the number. A finding
that does not show up here is a result like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from dspark_lab.checks import Count, NonNegative, Size, checked
from dspark_lab.decoding import Rounds, column, rounds_of
from dspark_lab.rates.calibration import split_prompts
from dspark_lab.rates.intervals import interval, resampled
from dspark_lab.rates.scaling import fit_identifiable_slots
from dspark_lab.rates.scores import auroc, expected_calibration_error
from dspark_lab.rates.survival import prefix_survival
from dspark_lab.rates.thresholds import threshold_sweep

__all__ = ["claims_table"]

_COLUMNS = ["claim", "drafter", "published", "here", "low", "high", "unit", "holds"]


def tau(run: Rounds) -> float:
    """Tokens of a round on policy: 1 + the accept rates of its reached slots."""
    return 1 + float(np.nansum(run.outcome("analytic")) / len(run))


def tau_gain(ours: Rounds, baseline: Rounds) -> float:
    """By how much tau is larger, in percent."""
    return 100 * (tau(ours) / tau(baseline) - 1)


def tau_gain_growth(
    ours: Rounds, baseline: Rounds, ours_long: Rounds, baseline_long: Rounds
) -> float:
    """By how much the gain of long blocks exceeds that of short ones, in points."""
    return tau_gain(ours_long, baseline_long) - tau_gain(ours, baseline)


def rate_change(run: Rounds, last: int) -> float:
    """How much the conditional accept rate rises from slot 0 to another, in points."""
    first, other = np.nanmean(run.outcome("analytic")[:, [0, last]], axis=0)
    return 100 * float(other - first)


def bias(run: Rounds) -> float:
    """Mean confidence less mean accept rate on reached slots, in points."""
    confidence, rate = run.pairs(kind="analytic")
    return 100 * float((confidence - rate).mean())


def slot_error(run: Rounds) -> float:
    """Expected calibration error of the confidence, in percent."""
    return 100 * expected_calibration_error(*run.pairs())


def product_error(run: Rounds) -> float:
    """That of the confidences' product against survival, in percent: what scaling works on."""
    survival = prefix_survival(run.outcome())
    known = ~np.isnan(survival) & ~np.isnan(run.confidence)
    product = run.confidence.cumprod(axis=1)
    return 100 * expected_calibration_error(product[known], survival[known])


def product_error_change(scaled: Rounds, raw: Rounds) -> float:
    """How much scaling changes the error of the product, in points."""
    return product_error(scaled) - product_error(raw)


def roc_area(run: Rounds) -> float:
    """AUROC of the confidence over all reached slots."""
    return auroc(*run.pairs())


def threshold_effect(run: Rounds, figure: str) -> float:
    """How much a figure of the sweep rises from no threshold to 0.9."""
    none, high = threshold_sweep(run, [0.0, 0.9], resamples=1)[figure]
    return float(high - none)


Figure = Callable[..., float]
Claim = tuple[str, str, list[str], Figure, tuple[float, float], str]

_ABOVE_0, _BELOW_0 = (0.0, np.inf), (-np.inf, 0.0)
_MARKOV, _PLAIN = ["dspark-k7"], ["dflash-k7"]
_LONG = ["dspark-k15", "dflash-k15"]
_NOT_REFUTED = "with it acceptance does not fall"

# Claim, published, runs that the figure is of, figure, range in which the claim holds, unit.
# fmt: off
HEADS: list[Claim] = [  # of drafters
    ("a Markov head raises tau, K 7", "+16 %", _MARKOV + _PLAIN, tau_gain, _ABOVE_0, "%"),
    ("a Markov head raises tau, K 15", "+30 %", _LONG, tau_gain, _ABOVE_0, "%"),
    ("its gain grows from K 7 to K 15", "+14 points", _MARKOV + _PLAIN + _LONG, tau_gain_growth,
     _ABOVE_0, "points"),
    ("without it acceptance falls along the block", "0.87 to 0.78", _PLAIN,
     lambda run: rate_change(run, 6), _BELOW_0, "points"),
    ("without it acceptance falls at slot 1", "falls", _PLAIN,
     lambda run: rate_change(run, 1), _BELOW_0, "points"),
    (_NOT_REFUTED, "flat", _MARKOV, lambda run: rate_change(run, 6), _ABOVE_0, "points"),
    ("a gated head beats the vanilla one", "a variant", ["gated-k7", *_MARKOV], tau_gain,
     _ABOVE_0, "%"),
    ("an RNN head beats the vanilla one", "a variant", ["rnn-k7", *_MARKOV], tau_gain,
     _ABOVE_0, "%"),
]
CONFIDENCE: list[Claim] = [  # of one drafter; "held" is the half that scaling was not fitted on
    ("the raw confidence is too high", "too high", ["all"], bias, _ABOVE_0, "points"),
    ("raw calibration error", "3 to 8 %", ["all"], slot_error, (3.0, 8.0), "%"),
    ("calibration error after scaling", "about 1 %", ["scaled"], product_error, (0.0, 1.5), "%"),
    ("scaling lowers the error", "to about 1 %", ["scaled", "held"], product_error_change,
     _BELOW_0, "points"),
    ("AUROC of the confidence", "0.81 to 0.91", ["all"], roc_area, (0.81, 0.91), ""),
    ("a threshold raises the acceptance rate", "45.7 to 95.7 %", ["all"],
     lambda run: 100 * threshold_effect(run, "acceptance_rate"), _ABOVE_0, "points"),
    ("at the price of verified slots", "fewer", ["all"],
     lambda run: threshold_effect(run, "verified"), _BELOW_0, "a round"),
]
# fmt: on


@checked
def claims_table(
    traces: pd.DataFrame,
    *,
    temperature: NonNegative = 1.0,
    resamples: Count = 200,
    seed: Size = 0,
) -> pd.DataFrame:
    """Each published claim with its figure here, the figure's interval, and whether it holds.

    Conversations are resampled together in all runs of a claim, since they answer the same
    questions. An interval is the spread of the resampled figures, moved so that their mean is the
    figure: a calibration error is larger where conversations are drawn twice.

    Args:
        traces: as :func:`dspark_lab.pairs.load_traces` returns them. The claims about heads are of
            the drafters of the shipped pairs, where all that one needs have a trace; those about a
            confidence are of every drafter whose name begins with dspark.
        temperature: of the runs to look at.

    Returns:
        a row for each claim: ``claim``, ``drafter``, ``published``, ``here``, ``low``, ``high``,
        ``unit`` and ``holds``: yes or no where the interval leaves no doubt, else undecided.
    """
    at = column(traces, "temperature")
    chosen = traces[at == temperature]
    if chosen.empty:
        raise ValueError(
            f"temperature must be one of {sorted(at.unique().tolist())}, got {temperature}"
        )
    parts = {name: part for name, part in chosen.groupby(column(chosen, "drafter"), sort=False)}
    runs = {name: rounds_of(part) for name, part in parts.items()}
    wanted = [(claim, claim[2], runs) for claim in HEADS if set(claim[2]) <= runs.keys()]
    for name, part in parts.items():
        if name.startswith("dspark"):
            halves = {**_halves(part), "all": runs[name]}
            wanted += [(claim, [name], halves) for claim in CONFIDENCE]
    rows = []
    for (claim, published, names, figure, holds, unit), drafters, of in wanted:
        here, low, high = figure_and_interval(figure, [of[name] for name in names], resamples, seed)
        holding = verdict(low, high, holds, unless_refuted=claim == _NOT_REFUTED)
        label = ", ".join(drafters)
        rows.append([claim, label, published, here, low, high, unit, holding])
    return pd.DataFrame(rows, columns=_COLUMNS)


def verdict(
    low: float, high: float, allowed: tuple[float, float], *, unless_refuted: bool = False
) -> str:
    """Whether an interval lies within the allowed range, or outside; undecided where neither.

    ``unless_refuted``: yes also where it is only not outside.
    """
    least, most = allowed
    if high < least or low > most:
        return "no"
    if unless_refuted and low <= most and high >= least:
        return "yes"
    return "yes" if least < low and high < most else "undecided"


def figure_and_interval(
    figure: Figure, runs: Sequence[Rounds], resamples: int, seed: int
) -> tuple[float, float, float]:
    """The figure of all conversations, and its interval when these are drawn anew."""
    shared = sorted(set.intersection(*(set(run.prompt.tolist()) for run in runs)))
    if not shared:
        raise ValueError("the runs of a claim must answer the same prompts, got none in common")
    runs = [run.take(np.isin(run.prompt, shared)) for run in runs]
    owners = [run.conversation for run in runs]
    values = np.empty(resamples)
    for index, times in enumerate(resampled(len(shared), resamples, seed, one_by_one=True)):
        rows = (np.repeat(np.arange(len(owner)), times[owner]) for owner in owners)
        values[index] = figure(*(run.take(r) for run, r in zip(runs, rows, strict=True)))
    here = figure(*runs)
    # A calibration error grows when conversations are drawn twice; its spread does not.
    low, high = interval(values - np.nanmean(values) + here, len(shared))
    return here, float(low), float(high)


def _halves(trace: pd.DataFrame) -> dict[str, Rounds]:
    """The conversations that scaling was not fitted on, as they are and scaled."""
    fit, held = map(rounds_of, split_prompts(trace))
    confidence = fit_identifiable_slots(fit).apply(held.confidence)
    return {"held": held, "scaled": replace(held, confidence=confidence)}
