"""Published claims: every figure added up slot by slot, on traces that were made up.

A round here is what verification made of it: for each slot a confidence and an accept rate, how
many slots were verified, how many of them accepted. The oracles are loops over such rounds.
"""

import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dspark_lab.decoding import TRACE_COLUMNS, Rounds, rounds_of
from dspark_lab.rates import SequentialTemperatures, claims, claims_table, split_prompts

COLUMNS = ["claim", "drafter", "published", "here", "low", "high", "unit", "holds"]
SHORT = ("dspark-k7", "dflash-k7", "gated-k7", "rnn-k7")
LONG = ("dspark-k15", "dflash-k15")
NAN = math.nan


@dataclass(frozen=True)
class Made:
    """A round that was made up."""

    prompt: int
    confidence: tuple[float, ...]
    rate: tuple[float, ...]
    verified: int
    accepted: int

    @property
    def reached(self) -> int:
        """So many slots from the first on."""
        return min(self.verified, self.accepted + 1)


def frame(drafter: str, rounds: Sequence[Made], temperature: float = 1.0) -> pd.DataFrame:
    """The rounds as the trace of a drafter."""
    rows: list[dict[str, Any]] = []
    numbers: dict[int, int] = defaultdict(int)
    for r in rounds:
        for slot, (confidence, rate) in enumerate(zip(r.confidence, r.rate, strict=True)):
            asked = slot < r.verified
            chance = rate if asked else NAN
            rejected = asked and slot == r.accepted
            rows.append(
                {
                    "prompt": r.prompt,
                    "domain": ("math", "code")[r.prompt % 2],
                    "round": numbers[r.prompt],
                    "slot": slot,
                    "position": slot + 1,
                    "token": 7,
                    "draft_prob": 0.5,
                    "target_prob": chance,
                    "accept_prob": chance,
                    "accept_rate": chance,
                    "confidence": confidence,
                    "verified": asked,
                    "accepted": slot < r.accepted,
                    "resampled": 3 if rejected else None,
                }
            )
        numbers[r.prompt] += 1
    trace = pd.DataFrame(rows, columns=list(TRACE_COLUMNS)).astype(TRACE_COLUMNS)
    return trace.assign(drafter=drafter, temperature=temperature)


TRACE = pd.concat(
    [frame("own", [Made(0, (0.5,), (0.5,), 1, 1)], temperature=value) for value in (0.0, 1.0)]
)


@cache
def made_up(drafter: str, prompts: int = 24, rounds: int = 8) -> tuple[Made, ...]:
    """Rounds with rates about 0.9, confidences that know something of them, and some cut short."""
    random_ = random.Random(drafter)
    block = 15 if drafter.endswith("k15") else 7
    base = random_.uniform(0.8, 0.95)
    found = []
    for prompt in range(prompts):
        own = random_.uniform(-0.1, 0.04)
        for _ in range(rounds):
            rates = tuple(
                min(1.0, max(0.0, base + own + random_.gauss(0, 0.1))) for _ in range(block)
            )
            confidences = tuple(
                min(0.999, max(0.001, rate + random_.gauss(0.03, 0.1))) for rate in rates
            )
            verified = block if random_.random() < 0.8 else random_.randrange(block + 1)
            accepted = 0
            while accepted < verified and random_.random() < rates[accepted]:
                accepted += 1
            found.append(Made(prompt, confidences, rates, verified, accepted))
    return tuple(found)


def scaled(drafter: str) -> tuple[list[Made], list[Made]]:
    """The rounds that temperatures were not fitted on, as they are, and with these temperatures."""
    fit, held = split_prompts(frame(drafter, made_up(drafter)))
    temperatures = SequentialTemperatures.fit_trace(fit).temperatures
    before = [r for r in made_up(drafter) if r.prompt in set(held["prompt"])]
    after = []
    for r in before:
        logits = [math.log(f / (1 - f)) for f in r.confidence]
        values = [1 / (1 + math.exp(-x / t)) for x, t in zip(logits, temperatures, strict=True)]
        after.append(Made(r.prompt, tuple(values), r.rate, r.verified, r.accepted))
    return before, after


def tau(rounds: Sequence[Made]) -> float:
    return sum(1 + sum(r.rate[: r.reached]) for r in rounds) / len(rounds)


def gain(ours: Sequence[Made], baseline: Sequence[Made]) -> float:
    return 100 * (tau(ours) - tau(baseline)) / tau(baseline)


def rate_at(rounds: Sequence[Made], slot: int) -> float:
    rates = [r.rate[slot] for r in rounds if slot < r.reached]
    return sum(rates) / len(rates)


def rate_change(rounds: Sequence[Made], first: int, last: int) -> float:
    return 100 * (rate_at(rounds, last) - rate_at(rounds, first))


def samples(rounds: Sequence[Made]) -> list[tuple[float, float, bool]]:
    """Confidence, rate and outcome of each reached slot."""
    return [
        (r.confidence[slot], r.rate[slot], slot < r.accepted)
        for r in rounds
        for slot in range(r.reached)
    ]


def bias(rounds: Sequence[Made]) -> float:
    errors = [confidence - rate for confidence, rate, _ in samples(rounds)]
    return 100 * sum(errors) / len(errors)


def calibration_error(pairs: Sequence[tuple[float, float]]) -> float:
    """Of 15 bins, one of which ends at each fifteenth: what each is off, by how full it is."""
    bins: dict[int, list[float]] = defaultdict(list)
    for confidence, outcome in pairs:
        bins[max(0, math.ceil(15 * confidence) - 1)].append(confidence - outcome)
    return 100 * sum(abs(sum(errors)) for errors in bins.values()) / len(pairs)


def slot_error(rounds: Sequence[Made]) -> float:
    return calibration_error([(f, float(taken)) for f, _, taken in samples(rounds)])


def product_error(rounds: Sequence[Made]) -> float:
    """Of a block's product up to each slot, where it is known whether all slots were accepted."""
    pairs = []
    for r in rounds:
        rejected = r.accepted < r.verified
        for slot in range(len(r.confidence)):
            if slot < r.accepted or rejected:
                product = math.prod(r.confidence[: slot + 1])
                pairs.append((product, float(slot < r.accepted)))
    return calibration_error(pairs)


def roc_area(rounds: Sequence[Made]) -> float:
    good = [f for f, _, taken in samples(rounds) if taken]
    bad = [f for f, _, taken in samples(rounds) if not taken]
    won = sum((f > g) + (f == g) / 2 for f in good for g in bad)
    return won / (len(good) * len(bad))


def with_threshold(rounds: Sequence[Made], threshold: float) -> tuple[float, float]:
    """Slots verified a round, and accepted ones in percent of them."""
    verified = accepted = 0
    for r in rounds:
        sure = 0
        while sure < r.verified and r.confidence[sure] >= threshold:
            sure += 1
        verified += sure
        accepted += min(sure, r.accepted)
    return verified / len(rounds), 100 * accepted / verified


def expected_of(drafter: str) -> dict[str, float]:
    """The figures of a drafter's confidence, by claim."""
    rounds = made_up(drafter)
    before, after = scaled(drafter)
    none, high = (with_threshold(rounds, threshold) for threshold in (0.0, 0.9))
    return {
        "the raw confidence is too high": bias(rounds),
        "raw calibration error": slot_error(rounds),
        "calibration error after scaling": product_error(after),
        "scaling lowers the error": product_error(after) - product_error(before),
        "AUROC of the confidence": roc_area(rounds),
        "a threshold raises the acceptance rate": high[1] - none[1],
        "at the price of verified slots": high[0] - none[0],
    }


def expected_of_heads() -> dict[str, float]:
    """The figures about heads, by claim."""
    dspark, dflash, gated, rnn, dspark_long, dflash_long = map(made_up, (*SHORT, *LONG))
    return {
        "a Markov head raises tau, K 7": gain(dspark, dflash),
        "a Markov head raises tau, K 15": gain(dspark_long, dflash_long),
        "its gain grows from K 7 to K 15": gain(dspark_long, dflash_long) - gain(dspark, dflash),
        "without it acceptance falls along the block": rate_change(dflash, 0, 6),
        "without it acceptance falls at slot 1": rate_change(dflash, 0, 1),
        "with it acceptance does not fall": rate_change(dspark, 0, 6),
        "a gated head beats the vanilla one": gain(gated, dspark),
        "an RNN head beats the vanilla one": gain(rnn, dspark),
    }


@pytest.fixture(scope="module")
def traces() -> pd.DataFrame:
    """Six drafters at temperature 1, and one of them at 0 with other rounds."""
    others = frame("dspark-k7", made_up("another-k7"), temperature=0.0)
    return pd.concat([others, *(frame(name, made_up(name)) for name in (*SHORT, *LONG))])


@pytest.fixture(scope="module")
def table(traces: pd.DataFrame) -> pd.DataFrame:
    return claims_table(traces, resamples=40)


def test_every_figure_of_the_heads_is_that_of_a_plain_loop(table):
    expected = expected_of_heads()
    assert table["claim"].tolist()[: len(expected)] == list(expected)
    assert table["here"].tolist()[: len(expected)] == pytest.approx(list(expected.values()))


@pytest.mark.filterwarnings("ignore:.*at the end of the grid")
@pytest.mark.parametrize("drafter", ["dspark-k7", "dspark-k15"])
def test_every_figure_of_a_confidence_is_that_of_a_plain_loop(table, drafter):
    [start] = table.index[
        (table["drafter"] == drafter) & (table["claim"] == "the raw confidence is too high")
    ]
    expected = expected_of(drafter)
    own = table.loc[start : start + len(expected) - 1]
    assert own["claim"].tolist() == list(expected)
    assert own["here"].tolist() == pytest.approx(list(expected.values()))
    assert (own["drafter"] == drafter).all()


def test_a_row_says_what_was_published_of_which_drafters_and_in_which_unit(table):
    assert list(table.columns) == COLUMNS
    assert len(table) == 8 + 2 * 7
    first, third = table.loc[0], table.loc[2]
    assert (first["drafter"], first["published"], first["unit"]) == (
        "dspark-k7, dflash-k7",
        "+16 %",
        "%",
    )
    assert third["drafter"] == "dspark-k7, dflash-k7, dspark-k15, dflash-k15"
    assert third["unit"] == "points"


def test_every_interval_holds_its_figure(table):
    assert (table["low"] < table["here"]).all() and (table["here"] < table["high"]).all()


def test_the_runs_of_another_temperature_are_not_looked_at(traces, table):
    alone = traces[traces["temperature"] == 1.0]
    pd.testing.assert_frame_equal(claims_table(alone, resamples=40), table)
    cold = claims_table(traces, temperature=0.0, resamples=10).set_index("claim")["here"]
    rounds = made_up("another-k7")
    assert cold["the raw confidence is too high"] == pytest.approx(bias(rounds))
    assert cold["raw calibration error"] == pytest.approx(slot_error(rounds))


@pytest.mark.parametrize("names", [["dflash-k7"], ["dspark-k7", "rnn-k7"], ["dspark-k15"], []])
def test_claims_of_a_drafter_that_is_missing_are_left_out(traces, names):
    # A drafter of another name is no reason to refuse the others.
    other = frame("own", made_up("dflash-k7"))
    some = pd.concat([traces[traces["drafter"].isin(names)], other])
    found = claims_table(some, resamples=2)
    wanted = [claim[0] for claim in claims.HEADS if set(claim[2]) <= set(names)]
    wanted += [claim[0] for name in names if "dspark" in name for claim in claims.CONFIDENCE]
    assert found["claim"].tolist() == wanted and found.columns.tolist() == COLUMNS


@pytest.mark.parametrize(
    ("traces", "options", "error", "message"),
    [
        (TRACE, {"temperature": 0.7}, ValueError, r"must be one of \[0.0, 1.0\], got 0.7"),
        (TRACE, {"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        (TRACE, {"resamples": 0}, ValueError, "resamples must be >= 1, got 0"),
        (TRACE.drop(columns="drafter"), {}, ValueError, "must have a column 'drafter'"),
        (None, {}, TypeError, "traces must be a DataFrame, got None"),
    ],
)
def test_what_is_no_set_of_traces_is_refused(traces, options, error, message):
    with pytest.raises(error, match=message):
        claims_table(traces, **options)


def mean_rate(run: Rounds) -> float:
    return float(run.accept_rate[:, 0].mean())


def difference(ours: Rounds, baseline: Rounds) -> float:
    return mean_rate(ours) - mean_rate(baseline)


def runs_of(*drafters: Sequence[Made]) -> list[Rounds]:
    return [rounds_of(frame("any", rounds)) for rounds in drafters]


def of_rates(*rates: Sequence[float]) -> list[Made]:
    """For each prompt a round of one slot at each of its rates, accepted if above 1/2."""
    return [
        Made(prompt, (0.5,), (rate,), 1, int(rate > 0.5))
        for prompt, own in enumerate(rates)
        for rate in own
    ]


def test_a_drafter_has_no_gain_over_itself():
    runs = runs_of(made_up("dspark-k7")) * 2
    bounds = claims.figure_and_interval(claims.tau_gain, runs, 50, 0)
    assert bounds == (0.0, 0.0, 0.0)
    assert claims.verdict(*bounds[1:], (0.0, math.inf)) == "undecided"


def test_conversations_are_drawn_together_in_all_runs():
    random_ = random.Random(0)
    rates = [[random_.uniform(0.2, 1.0)] * random_.randint(1, 4) for _ in range(30)]
    lower = [[rate - 0.1 for rate in own] for own in rates]
    runs = runs_of(of_rates(*rates), of_rates(*lower))
    _, low, high = claims.figure_and_interval(mean_rate, runs[:1], 50, 0)
    assert high - low > 0.05
    together = claims.figure_and_interval(difference, runs, 50, 0)
    assert together == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)


def test_the_interval_of_a_mean_is_as_wide_as_the_normal_distribution_says():
    rates = np.random.default_rng(3).beta(4, 2, 60)
    runs = runs_of(of_rates(*rates[:, None].tolist()))
    here, low, high = claims.figure_and_interval(mean_rate, runs, 1000, 0)
    half = 1.96 * rates.std() / math.sqrt(60)
    assert here == pytest.approx(rates.mean())
    # Of 1000 resamples the width is off by some 3 %.
    assert high - here == pytest.approx(half, rel=0.12)
    assert here - low == pytest.approx(half, rel=0.12)


def test_a_conversation_counts_as_a_whole():
    """Sixty equal rounds in each of twenty conversations are twenty, not 1200."""
    rates = np.random.default_rng(4).beta(4, 2, 20)
    runs = runs_of(of_rates(*([rate] * 60 for rate in rates.tolist())))
    _, low, high = claims.figure_and_interval(mean_rate, runs, 400, 0)
    assert (high - low) / 2 == pytest.approx(1.96 * rates.std() / math.sqrt(20), rel=0.15)


def test_all_rounds_of_a_conversation_are_drawn_with_it():
    """Here every conversation's mean is 1/2, whatever its first round is like."""
    random_ = random.Random(1)
    rates = [[rate, 1 - rate] for rate in (random_.random() for _ in range(20))]
    bounds = claims.figure_and_interval(mean_rate, runs_of(of_rates(*rates)), 50, 0)
    assert bounds == pytest.approx((0.5, 0.5, 0.5))


def test_the_interval_of_a_calibration_error_is_around_the_error():
    """Drawing conversations twice makes the error larger: the resamples alone would lie above."""
    rounds = made_up("dspark-k7", prompts=10, rounds=3)
    for figure, by_hand in (
        (claims.slot_error, slot_error),
        (claims.product_error, product_error),
    ):
        here, low, high = claims.figure_and_interval(figure, runs_of(rounds), 200, 0)
        assert low < here < high and here == pytest.approx(by_hand(rounds))
    # Of any draw but one with as many of each kind the error is above 0.
    even = [Made(i, (0.5,), (0.5,), 1, i % 2) for i in range(40)]
    here, low, high = claims.figure_and_interval(claims.slot_error, runs_of(even), 200, 0)
    assert low < here == 0 < high


def test_the_same_seed_gives_the_same_intervals_and_another_does_not():
    runs = runs_of(made_up("dspark-k7"), made_up("dflash-k7"))
    one, same, other = (
        claims.figure_and_interval(claims.tau_gain, runs, 20, seed) for seed in (5, 5, 6)
    )
    assert one == same and one[0] == other[0] and one[1] != other[1]


def test_one_conversation_decides_nothing(traces):
    first = traces[(traces["prompt"] == 0) & (traces["temperature"] == 1)]
    with np.errstate(all="ignore"):
        table = claims_table(first[~first["drafter"].str.startswith("dspark")], resamples=5)
        runs = runs_of([r for r in made_up("dspark-k7") if r.prompt == 0])
        bounds = [
            claims.figure_and_interval(claim[3], runs, 5, 0) for claim in claims.CONFIDENCE[:2]
        ]
    assert table[["low", "high"]].isna().all(axis=None) and (table["holds"] == "undecided").all()
    assert all(math.isnan(low) and math.isnan(high) for _, low, high in bounds)


def test_runs_of_other_prompts_are_held_against_each_other_on_those_they_share():
    theirs = made_up("dflash-k7")
    few = [r for r in made_up("dspark-k7") if r.prompt < 10]
    same = [r for r in theirs if r.prompt < 10]
    found, expected = (
        claims.figure_and_interval(claims.tau_gain, runs_of(few, baseline), 5, 0)
        for baseline in (theirs, same)
    )
    assert found == pytest.approx(expected)
    others = [r for r in theirs if r.prompt >= 10]
    with pytest.raises(ValueError, match="must answer the same prompts, got none in common"):
        claims.figure_and_interval(claims.tau_gain, runs_of(few, others), 5, 0)


@pytest.mark.parametrize(
    ("allowed", "low", "high", "holds"),
    [
        ((0, math.inf), 0.1, 2.0, "yes"),
        ((0, math.inf), -2.0, -0.1, "no"),
        ((0, math.inf), -0.1, 2.0, "undecided"),
        ((0, math.inf), 0.0, 2.0, "undecided"),
        ((0, math.inf), -2.0, 0.0, "undecided"),
        ((0, math.inf), 0.0, 0.0, "undecided"),
        ((0, math.inf), NAN, NAN, "undecided"),
        ((-math.inf, 0), -2.0, -0.1, "yes"),
        ((-math.inf, 0), 0.1, 2.0, "no"),
        ((-math.inf, 0), -2.0, 0.1, "undecided"),
        ((-math.inf, 0), -2.0, 0.0, "undecided"),
        ((3, 8), 4, 5, "yes"),
        ((3, 8), 1, 2.9, "no"),
        ((3, 8), 8.1, 9, "no"),
        ((3, 8), 2.9, 5, "undecided"),
        ((3, 8), 5, 8.1, "undecided"),
        ((3, 8), 2, 9, "undecided"),
        ((3, 8), 1, 3, "undecided"),
        ((3, 8), 8, 9, "undecided"),
        ((3, 8), NAN, NAN, "undecided"),
    ],
)
def test_a_verdict_is_given_where_the_interval_leaves_no_doubt(allowed, low, high, holds):
    assert claims.verdict(low, high, allowed) == holds


@pytest.mark.parametrize(
    ("low", "high", "holds"),
    [(-2, -0.1, "no"), (-2, 0, "yes"), (-2, 1, "yes"), (0.5, 1, "yes"), (NAN, NAN, "undecided")],
)
def test_what_need_only_not_be_refuted_holds_where_the_interval_does_not_exclude_it(
    low, high, holds
):
    assert claims.verdict(low, high, (0.0, math.inf), unless_refuted=True) == holds


# An interval of which each claim holds, and one of which it does not.
SIDES = {
    "a Markov head raises tau, K 7": ((1, 9), (-9, -1)),
    "a Markov head raises tau, K 15": ((1, 9), (-9, -1)),
    "its gain grows from K 7 to K 15": ((1, 9), (-9, -1)),
    "without it acceptance falls along the block": ((-9, -1), (1, 9)),
    "without it acceptance falls at slot 1": ((-9, -1), (1, 9)),
    "with it acceptance does not fall": ((-1, 9), (-9, -1)),
    "a gated head beats the vanilla one": ((1, 9), (-9, -1)),
    "an RNN head beats the vanilla one": ((1, 9), (-9, -1)),
    "the raw confidence is too high": ((1, 9), (-9, -1)),
    "raw calibration error": ((3.1, 7.9), (0.5, 2.9)),
    "calibration error after scaling": ((0.5, 1.4), (1.6, 3)),
    "scaling lowers the error": ((-9, -1), (1, 9)),
    "AUROC of the confidence": ((0.82, 0.9), (0.7, 0.8)),
    "a threshold raises the acceptance rate": ((1, 9), (-9, -1)),
    "at the price of verified slots": ((-9, -1), (1, 9)),
}


def test_every_claim_holds_on_the_side_that_was_published(traces, monkeypatch):
    """Each with the first interval of its own, then each with the second."""
    known = traces[traces["drafter"].isin(SHORT + LONG) & (traces["temperature"] == 1)]
    for side, holds in enumerate(("yes", "no")):
        bounds = iter([*SIDES.values(), *list(SIDES.values())[8:]])
        monkeypatch.setattr(
            claims, "figure_and_interval", lambda *_, it=bounds, s=side: (0.0, *next(it)[s])
        )
        table = claims_table(known)
        assert table["claim"].tolist() == [*SIDES, *list(SIDES)[8:]]
        assert (table["holds"] == holds).all()
