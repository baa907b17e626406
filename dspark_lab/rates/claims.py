"""Published findings about DSpark held against traces.

The published figures are of drafters of Qwen3-4B at temperature 1 (DSpark, arXiv 2607.05147); the
lab's models are far smaller: compare the direction more than the number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd

from dspark_lab.checks import Count, NonNegative, Size, checked
from dspark_lab.decoding import Rounds, column, rounds_of
from dspark_lab.rates.calibration import split_prompts
from dspark_lab.rates.intervals import figure_and_interval
from dspark_lab.rates.margins import area_gain, has_margins, roc_area, signals
from dspark_lab.rates.scaling import fit_identifiable_slots
from dspark_lab.rates.scores import expected_calibration_error
from dspark_lab.rates.survival import prefix_survival
from dspark_lab.rates.thresholds import threshold_sweep

Figure = Callable[..., float]


def tau(run: Rounds) -> float:
    return 1 + float(np.nansum(run.outcome("analytic")) / len(run))


def tau_gain(ours: Rounds, baseline: Rounds) -> float:
    return 100 * (tau(ours) / tau(baseline) - 1)


def tau_gain_growth(
    ours: Rounds, baseline: Rounds, ours_long: Rounds, baseline_long: Rounds
) -> float:
    return tau_gain(ours_long, baseline_long) - tau_gain(ours, baseline)


def rate_change(run: Rounds, slot: int = 6) -> float:
    """How much the conditional accept rate rises from slot 0 to another."""
    first, other = np.nanmean(run.outcome("analytic")[:, [0, slot]], axis=0)
    return 100 * float(other - first)


def bias(run: Rounds) -> float:
    confidence, rate = run.pairs("analytic")
    return 100 * float((confidence - rate).mean())


def slot_error(run: Rounds) -> float:
    return 100 * expected_calibration_error(*run.pairs())


def product_error(run: Rounds) -> float:
    """The error of the confidences' product against survival, which scaling works on."""
    survival = prefix_survival(run.outcome())
    known = ~np.isnan(survival) & ~np.isnan(run.confidence)
    product = run.confidence.cumprod(axis=1)
    return 100 * expected_calibration_error(product[known], survival[known])


def product_error_change(scaled: Rounds, raw: Rounds) -> float:
    return product_error(scaled) - product_error(raw)


def margin_gain(margin: Rounds, head: Rounds) -> float:
    return 100 * area_gain(margin, head)


def threshold_effect(run: Rounds, figure: str) -> float:
    """How much a figure of the sweep rises from no threshold to 0.9."""
    none, high = threshold_sweep(run, [0.0, 0.9], resamples=1)[figure]
    return float(high - none)


def acceptance_rise(run: Rounds) -> float:
    return 100 * threshold_effect(run, "acceptance_rate")


_RISE, _FALL = (0.0, np.inf), (-np.inf, 0.0)
_MARKOV, _PLAIN = ["dspark-k7"], ["dflash-k7"]
_SHORT, _LONG = _MARKOV + _PLAIN, ["dspark-k15", "dflash-k15"]
_ALL, _SCALED, _HELD, _MARGIN = ["all"], ["scaled"], ["held"], ["online margin"]
_NOT_REFUTED = "with it acceptance does not fall"
_VERIFIED_RISE = partial(threshold_effect, figure="verified")

# Claim, published, runs that the figure is of, figure, range in which the claim holds.
Claim = tuple[str, str, list[str], Figure, tuple[float, float]]
# Claims about drafters.
HEADS: list[Claim] = [
    ("a Markov head raises tau, K 7", "+16 %", _SHORT, tau_gain, _RISE),
    ("a Markov head raises tau, K 15", "+30 %", _LONG, tau_gain, _RISE),
    ("its gain grows from K 7 to K 15", "+14 points", _SHORT + _LONG, tau_gain_growth, _RISE),
    ("without it acceptance falls along the block", "0.87 to 0.78", _PLAIN, rate_change, _FALL),
    ("without it acceptance falls at slot 1", "falls", _PLAIN, partial(rate_change, slot=1), _FALL),
    (_NOT_REFUTED, "flat", _MARKOV, rate_change, _RISE),
    ("a gated head beats the vanilla one", "a variant", ["gated-k7", *_MARKOV], tau_gain, _RISE),
    ("an RNN head beats the vanilla one", "a variant", ["rnn-k7", *_MARKOV], tau_gain, _RISE),
]
# Claims about one drafter's confidence; "held" is the half that scaling, and what
# is learned of the margin, was not fitted on. That claim needs traces with margins.
CONFIDENCE: list[Claim] = [
    ("the raw confidence is too high", "too high", _ALL, bias, _RISE),
    ("slot error, raw", "3 to 8 %", _ALL, slot_error, (3.0, 8.0)),
    ("product error, scaled", "about 1 %", _SCALED, product_error, (0.0, 1.5)),
    (
        "scaling lowers the product error",
        "to about 1 %",
        _SCALED + _HELD,
        product_error_change,
        _FALL,
    ),
    ("AUROC of the confidence", "0.81 to 0.91", _ALL, roc_area, (0.81, 0.91)),
    (
        "the margin of two logits, learned online, is the better signal",
        "AUROC 0.884 to 0.839",
        _MARGIN + _HELD,
        margin_gain,
        _RISE,
    ),
    ("a threshold raises the acceptance rate", "45.7 to 95.7 %", _ALL, acceptance_rise, _RISE),
    ("at the price of verified slots", "fewer", _ALL, _VERIFIED_RISE, _FALL),
]
# The unit of each figure that is not in points.
_UNITS: dict[Figure, str] = dict.fromkeys((tau_gain, slot_error, product_error), "%")
_UNITS |= {roc_area: "", _VERIFIED_RISE: "a round"}


@checked
def claims_table(
    traces: pd.DataFrame, *, temperature: NonNegative = 1.0, resamples: Count = 200, seed: Size = 0
) -> pd.DataFrame:
    """Return each published claim with its figure here, an interval, and whether it holds.

    Conversations are resampled together in all runs of a claim. An interval is the spread of the
    resampled figures, moved so that their mean is the figure.

    The claims about heads are of the drafters of the shipped pairs, where all that one needs have a
    trace; those about a confidence are of every drafter whose name begins with dspark. ``holds`` is
    yes or no where the interval leaves no doubt, else undecided.

    Args:
        traces: as :func:`dspark_lab.pairs.load_traces` returns them.
        temperature: of the runs to look at.
    """
    at = column(traces, "temperature")
    chosen = traces[at == temperature]
    if chosen.empty:
        known = sorted(at.unique().tolist())
        raise ValueError(f"temperature must be one of {known}, got {temperature}")
    parts = {name: part for name, part in chosen.groupby(column(chosen, "drafter"), sort=False)}
    runs = {name: rounds_of(part) for name, part in parts.items()}
    wanted = [(claim, claim[2], runs) for claim in HEADS if set(claim[2]) <= runs.keys()]
    for name, part in parts.items():
        if name.startswith("dspark"):
            halves = split_prompts(part)
            fit, held = map(rounds_of, halves)
            confidence = fit_identifiable_slots(fit).apply(held.confidence)
            scaled = replace(held, confidence=confidence)
            own = {"all": runs[name], "held": held, "scaled": scaled}
            if has_margins(part):
                own |= {signal: rounds_of(test) for signal, (_, test) in signals(*halves).items()}
            known = [claim for claim in CONFIDENCE if set(claim[2]) <= own.keys()]
            wanted += [(claim, [name], own) for claim in known]
    rows = []
    for (claim, published, names, figure, allowed), drafters, among in wanted:
        of, unit = [among[name] for name in names], _UNITS.get(figure, "points")
        here, low, high = figure_and_interval(figure, of, resamples, seed)
        holds = verdict(low, high, allowed, unless_refuted=claim == _NOT_REFUTED)
        rows.append([claim, ", ".join(drafters), published, here, low, high, unit, holds])
    columns = ["claim", "drafter", "published", "here", "low", "high", "unit", "holds"]
    return pd.DataFrame(rows, columns=columns)


def verdict(
    low: float, high: float, allowed: tuple[float, float], *, unless_refuted: bool = False
) -> str:
    """Whether an interval lies within the allowed range, or ``unless_refuted`` only meets it."""
    least, most = allowed
    if high < least or low > most:
        return "no"
    certain = least < low and high < most
    return "yes" if certain or (unless_refuted and low <= high) else "undecided"
