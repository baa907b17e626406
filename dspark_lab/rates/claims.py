"""Published findings about DSpark, each held against the shipped drafters' traces.

    figure:   one number of one or two runs, with its 95 % bootstrap interval over conversations;
    verdict:  yes or no where the interval leaves no doubt, else undecided.

The published figures are of drafters of Qwen3-4B at temperature 1 (DSpark, arXiv 2607.05147); the
lab's models are far smaller, so what is compared is the direction more than the number. A finding
that does not show up here is a result like any other. This file knows traces; it runs no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pandas as pd

from dspark_lab.decoding import Rounds, rounds_of
from dspark_lab.rates.calibration import split_prompts
from dspark_lab.rates.intervals import interval, resampled
from dspark_lab.rates.scaling import fit_identifiable_slots
from dspark_lab.rates.scores import auroc, expected_calibration_error
from dspark_lab.rates.survival import prefix_survival
from dspark_lab.rates.thresholds import threshold_sweep

__all__ = ["Claim", "claims_of", "claims_table"]

# Runs of a drafter: all conversations; the half that scaling was not fitted on, before and after.
ALL, HELD, SCALED = "all", "held", "scaled"
_COLUMNS = ["claim", "drafter", "published", "here", "low", "high", "unit", "holds"]


@dataclass(frozen=True)
class Claim:
    """A finding, what was published, and what decides it here.

    ``runs`` names the drafters that ``figure`` is worked out of, and which of their conversations.
    ``verdict`` takes the bounds of its interval.
    """

    text: str
    published: str
    runs: tuple[tuple[str, str], ...]
    figure: Callable[..., float]
    verdict: Callable[[float, float], str]
    unit: str


def claims_table(
    traces: pd.DataFrame,
    claims: Sequence[Claim] | None = None,
    *,
    temperature: float = 1.0,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Each claim with its figure, the figure's interval, and whether the claim holds here.

    Conversations are resampled together in all runs of a claim, since they answer the same
    questions. An interval is the spread of the resampled figures, moved so that their mean is the
    figure: a calibration error is larger where conversations are drawn twice.

    Args:
        traces: as :func:`dspark_lab.pairs.load_traces` returns them.
        claims: those of :func:`claims_of` where None; where a drafter has no trace, it is left out.
        temperature: of the runs to look at.
        resamples, seed: of the bootstrap.

    Returns:
        a row for each claim: ``claim``, ``drafter``, ``published``, ``here``, ``low``, ``high``,
        ``unit`` and ``holds``: yes, no or undecided.

    Raises:
        ValueError: no run at this temperature, runs of a claim that share no prompt, or, where
            scaling is asked about, too few conversations to fit it on half of them.
    """
    chosen = traces[traces["temperature"] == temperature]
    if chosen.empty:
        temperatures = sorted(traces["temperature"].unique().tolist())
        raise ValueError(f"temperature must be one of {temperatures}, got {temperature}")
    names = list(dict.fromkeys(chosen["drafter"]))
    wanted = claims_of(names) if claims is None else claims
    runs = {}
    for name in names:
        trace = chosen[chosen["drafter"] == name]
        runs[name, ALL] = rounds_of(trace)
        if any((name, HELD) in claim.runs for claim in wanted):
            fit, held = map(rounds_of, split_prompts(trace))
            scaling = fit_identifiable_slots(fit)
            runs[name, HELD] = held
            runs[name, SCALED] = replace(held, confidence=scaling.apply(held.confidence))
    rows = []
    for claim in wanted:
        if not set(claim.runs) <= runs.keys():
            continue
        own = [runs[key] for key in claim.runs]
        here, low, high = _bootstrap(claim.figure, own, resamples, seed)
        rows.append(
            {
                "claim": claim.text,
                "drafter": ", ".join(dict.fromkeys(name for name, _ in claim.runs)),
                "published": claim.published,
                "here": here,
                "low": low,
                "high": high,
                "unit": claim.unit,
                "holds": claim.verdict(low, high),
            }
        )
    return pd.DataFrame(rows, columns=_COLUMNS)


def tau(run: Rounds) -> float:
    """Tokens of a round on policy: 1 + the accept rates of its reached slots."""
    return 1 + float(np.nansum(run.outcome("analytic")) / len(run))


def gain(ours: Rounds, baseline: Rounds) -> float:
    """By how much tau is larger, in percent."""
    return 100 * (tau(ours) / tau(baseline) - 1)


def growth(ours: Rounds, baseline: Rounds, ours_long: Rounds, baseline_long: Rounds) -> float:
    """By how much the gain of long blocks exceeds that of short ones, in points."""
    return gain(ours_long, baseline_long) - gain(ours, baseline)


def course(run: Rounds, first: int, last: int) -> float:
    """How much the conditional accept rate rises from one slot to another, in points."""
    rates = np.nanmean(run.outcome("analytic")[:, [first, last]], axis=0)
    return 100 * float(rates[1] - rates[0])


def bias(run: Rounds) -> float:
    """Mean confidence less mean accept rate on reached slots, in points."""
    confidence, rate = run.pairs(kind="analytic")
    return 100 * float((confidence - rate).mean())


def slot_error(run: Rounds) -> float:
    """Expected calibration error of the confidence, in percent."""
    return 100 * expected_calibration_error(*run.pairs())


def product_error(run: Rounds) -> float:
    """That of the confidences' product against survival, in percent: what scaling works on."""
    lived = prefix_survival(run.outcome())
    known = ~np.isnan(lived) & ~np.isnan(run.confidence)
    product = run.confidence.cumprod(axis=1)
    return 100 * expected_calibration_error(product[known], lived[known])


def error_change(scaled: Rounds, raw: Rounds) -> float:
    """How much scaling changes the error of the product, in points."""
    return product_error(scaled) - product_error(raw)


def area(run: Rounds) -> float:
    """AUROC of the confidence over all reached slots."""
    return auroc(*run.pairs())


def threshold_effect(run: Rounds, column: str, threshold: float = 0.9) -> float:
    """How a column of the sweep changes from no threshold to this one."""
    table = threshold_sweep(run, [0.0, threshold], resamples=1)
    return float(table[column].iloc[1] - table[column].iloc[0])


def acceptance_rise(run: Rounds) -> float:
    """How many more of the verified slots are accepted with a threshold of 0.9, in points."""
    return 100 * threshold_effect(run, "acceptance_rate")


def above(low: float, high: float, limit: float = 0.0) -> str:
    """The figure is above the limit."""
    return "yes" if low > limit else "no" if high < limit else "undecided"


def below(low: float, high: float, limit: float = 0.0) -> str:
    """The figure is below the limit."""
    return "yes" if high < limit else "no" if low > limit else "undecided"


def not_below(low: float, high: float) -> str:
    """Nothing shows the figure to be below 0."""
    return "yes" if high >= 0 else "no" if high < 0 else "undecided"


def within(low: float, high: float, least: float, most: float) -> str:
    """The figure is in the published range."""
    if high < least or low > most:
        return "no"
    return "yes" if least <= low and high <= most else "undecided"


def _of_heads() -> list[Claim]:
    dspark, dflash, gated, rnn = (
        (name, ALL) for name in ("dspark-k7", "dflash-k7", "gated-k7", "rnn-k7")
    )
    dspark_long, dflash_long = ("dspark-k15", ALL), ("dflash-k15", ALL)
    no_figure = "a variant"
    end = partial(course, first=0, last=6)
    second = partial(course, first=0, last=1)
    return [
        Claim("a Markov head raises tau, K 7", "+16 %", (dspark, dflash), gain, above, "%"),
        Claim(
            "a Markov head raises tau, K 15", "+30 %", (dspark_long, dflash_long), gain, above, "%"
        ),
        Claim(
            "its gain grows from K 7 to K 15",
            "+14 points",
            (dspark, dflash, dspark_long, dflash_long),
            growth,
            above,
            "points",
        ),
        Claim(
            "without it acceptance falls along the block",
            "0.87 to 0.78",
            (dflash,),
            end,
            below,
            "points",
        ),
        Claim("without it acceptance falls at slot 1", "falls", (dflash,), second, below, "points"),
        Claim("with it acceptance does not fall", "flat", (dspark,), end, not_below, "points"),
        Claim("a gated head beats the vanilla one", no_figure, (gated, dspark), gain, above, "%"),
        Claim("an RNN head beats the vanilla one", no_figure, (rnn, dspark), gain, above, "%"),
    ]


def _of_confidence(name: str) -> list[Claim]:
    every, held, scaled = ((name, kind) for kind in (ALL, HELD, SCALED))
    raw_range = partial(within, least=3.0, most=8.0)
    area_range = partial(within, least=0.81, most=0.91)
    fewer = partial(threshold_effect, column="verified")
    about_one = partial(within, least=0.0, most=1.5)
    return [
        Claim("the raw confidence is too high", "too high", (every,), bias, above, "points"),
        Claim("raw calibration error", "3 to 8 %", (every,), slot_error, raw_range, "%"),
        Claim(
            "calibration error after scaling", "about 1 %", (scaled,), product_error, about_one, "%"
        ),
        Claim(
            "scaling lowers the error",
            "to about 1 %",
            (scaled, held),
            error_change,
            below,
            "points",
        ),
        Claim("AUROC of the confidence", "0.81 to 0.91", (every,), area, area_range, ""),
        Claim(
            "a threshold raises the acceptance rate",
            "45.7 to 95.7 %",
            (every,),
            acceptance_rise,
            above,
            "points",
        ),
        Claim("at the price of verified slots", "fewer", (every,), fewer, below, "a round"),
    ]


def claims_of(drafters: Sequence[str]) -> list[Claim]:
    """The claims about heads, and those about the confidence of each DSpark drafter."""
    confident = [name for name in drafters if name.startswith("dspark")]
    return _of_heads() + [claim for name in confident for claim in _of_confidence(name)]


def _bootstrap(
    figure: Callable[..., float], runs: Sequence[Rounds], resamples: int, seed: int
) -> tuple[float, float, float]:
    """The figure of all conversations, and its interval when these are drawn anew."""
    shared = sorted(set.intersection(*(set(run.prompt.tolist()) for run in runs)))
    if not shared:
        raise ValueError("the runs of a claim must answer the same prompts, got none in common")
    runs = [run.take(np.isin(run.prompt, shared)) for run in runs]
    drawn = resampled(len(shared), resamples, seed, one_by_one=True)
    values = np.array(
        [
            figure(*(run.take(np.repeat(np.arange(len(run)), n[run.conversation])) for run in runs))
            for n in drawn
        ]
    )
    here = figure(*runs)
    # A calibration error grows when conversations are drawn twice; its spread does not.
    low, high = interval(values - np.nanmean(values) + here, len(shared))
    return here, float(low), float(high)
