"""`dspark_lab.rates.claims`: every figure added up slot by slot, on traces that were made up.

A round here is what verification made of it: for each slot a confidence and an accept rate, how
many slots were verified, how many of them accepted. The oracles are loops over such rounds.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dspark_lab.decoding import TRACE_COLUMNS, Rounds
from dspark_lab.rates import (
    Claim,
    SequentialTemperatures,
    claims,
    claims_of,
    claims_table,
    split_prompts,
)

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


def course(rounds: Sequence[Made], first: int, last: int) -> float:
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


def area(rounds: Sequence[Made]) -> float:
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
        "AUROC of the confidence": area(rounds),
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
        "without it acceptance falls along the block": course(dflash, 0, 6),
        "without it acceptance falls at slot 1": course(dflash, 0, 1),
        "with it acceptance does not fall": course(dspark, 0, 6),
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


def test_what_holds_follows_from_the_interval(table):
    by_rule = {claim.text: claim.verdict for claim in claims_of([*SHORT, *LONG])}
    for row in table.itertuples():
        assert row.holds == by_rule[row.claim](row.low, row.high)


def test_the_runs_of_another_temperature_are_not_looked_at(traces, table):
    alone = traces[traces["temperature"] == 1.0]
    pd.testing.assert_frame_equal(claims_table(alone, resamples=40), table)
    cold = claims_table(traces, temperature=0.0, resamples=10).set_index("claim")["here"]
    rounds = made_up("another-k7")
    assert cold["the raw confidence is too high"] == pytest.approx(bias(rounds))
    assert cold["raw calibration error"] == pytest.approx(slot_error(rounds))


@pytest.mark.parametrize("names", [["dflash-k7"], ["dspark-k7", "rnn-k7"], ["dspark-k15"], ["own"]])
def test_claims_of_a_drafter_that_is_missing_are_left_out(traces, names):
    # A drafter of another name is no reason to refuse the others.
    other = frame("own", made_up("dflash-k7"))
    some = pd.concat([traces[traces["drafter"].isin(names)], other])
    found = claims_table(some, resamples=2)
    wanted = [
        claim.text
        for claim in claims_of([*SHORT, *LONG])
        if {name for name, _ in claim.runs} <= set(names)
    ]
    assert found.get("claim", pd.Series(dtype=object)).tolist() == wanted


def test_a_temperature_that_was_not_traced_is_refused(traces):
    with pytest.raises(ValueError, match=r"temperature must be one of \[0.0, 1.0\], got 0.7"):
        claims_table(traces, temperature=0.7)


def mean_rate(run: Rounds) -> float:
    return float(run.accept_rate[:, 0].mean())


def difference(ours: Rounds, baseline: Rounds) -> float:
    return mean_rate(ours) - mean_rate(baseline)


def claim(figure: Callable[..., float], *names: str) -> Claim:
    runs = tuple((name, claims.ALL) for name in names)
    return Claim("of the test", "nothing", runs, figure, claims.above, "points")


def of_rates(*rates: Sequence[float]) -> list[Made]:
    """For each prompt a round of one slot at each of its rates, accepted if above 1/2."""
    return [
        Made(prompt, (0.5,), (rate,), 1, int(rate > 0.5))
        for prompt, own in enumerate(rates)
        for rate in own
    ]


def test_a_drafter_has_no_gain_over_itself(traces):
    own = traces[traces["drafter"] == "dspark-k7"]
    both = pd.concat([own, own.assign(drafter="dflash-k7")])
    row = claims_table(both, [claim(claims.gain, "dspark-k7", "dflash-k7")], resamples=50).loc[0]
    assert (row["here"], row["low"], row["high"], row["holds"]) == (0.0, 0.0, 0.0, "undecided")


def test_conversations_are_drawn_together_in_all_runs():
    random_ = random.Random(0)
    rates = [[random_.uniform(0.2, 1.0)] * random_.randint(1, 4) for _ in range(30)]
    lower = [[rate - 0.1 for rate in own] for own in rates]
    # The order of a table's rows says nothing.
    shuffled = frame("theirs", of_rates(*lower)).sample(frac=1, random_state=1)
    both = pd.concat([frame("ours", of_rates(*rates)), shuffled])
    wanted = [claim(difference, "ours", "theirs"), claim(mean_rate, "ours")]
    apart, alone = claims_table(both, wanted, resamples=50).itertuples()
    assert alone.high - alone.low > 0.05
    assert (apart.here, apart.low, apart.high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)


def test_the_interval_of_a_mean_is_as_wide_as_the_normal_distribution_says():
    rng = np.random.default_rng(3)
    rates = rng.beta(4, 2, 60)
    trace = frame("ours", of_rates(*rates[:, None].tolist()))
    row = claims_table(trace, [claim(mean_rate, "ours")], resamples=1000).loc[0]
    half = 1.96 * rates.std() / math.sqrt(60)
    assert row["here"] == pytest.approx(rates.mean())
    # Of 1000 resamples the width is off by some 3 %.
    assert row["high"] - row["here"] == pytest.approx(half, rel=0.12)
    assert row["here"] - row["low"] == pytest.approx(half, rel=0.12)


def test_a_conversation_counts_as_a_whole():
    """Sixty equal rounds in each of twenty conversations are twenty, not 1200."""
    rng = np.random.default_rng(4)
    rates = rng.beta(4, 2, 20)
    row = claims_table(
        frame("ours", of_rates(*([rate] * 60 for rate in rates.tolist()))),
        [claim(mean_rate, "ours")],
        resamples=400,
    ).loc[0]
    half = 1.96 * rates.std() / math.sqrt(20)
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=0.15)


def test_all_rounds_of_a_conversation_are_drawn_with_it():
    """Here every conversation's mean is 1/2, whatever its first round is like."""
    random_ = random.Random(1)
    rates = [[rate, 1 - rate] for rate in (random_.random() for _ in range(20))]
    trace = frame("ours", of_rates(*rates))
    row = claims_table(trace, [claim(mean_rate, "ours")], resamples=50).loc[0]
    assert (row["here"], row["low"], row["high"]) == pytest.approx((0.5, 0.5, 0.5))


def test_an_error_of_0_has_an_interval_around_0():
    """Of any draw but one with as many of each kind the error is above 0."""
    rounds = [Made(i, (0.5,), (0.5,), 1, i % 2) for i in range(40)]
    trace = frame("ours", rounds)
    row = claims_table(trace, [claim(claims.slot_error, "ours")], resamples=200).loc[0]
    assert row["low"] < row["here"] == 0 < row["high"]


def test_the_interval_of_a_calibration_error_is_around_the_error():
    """Drawing conversations twice makes the error larger: the resamples alone would lie above."""
    rounds = made_up("dspark-k7", prompts=10, rounds=3)
    wanted = [claim(claims.slot_error, "ours"), claim(claims.product_error, "ours")]
    table = claims_table(frame("ours", rounds), wanted, resamples=200)
    assert table["here"].tolist() == pytest.approx([slot_error(rounds), product_error(rounds)])
    assert (table["low"] < table["here"]).all() and (table["here"] < table["high"]).all()


def test_the_same_seed_gives_the_same_intervals_and_another_does_not(traces):
    one, same, other = (
        claims_table(traces, claims_of([])[:1], resamples=20, seed=seed) for seed in (5, 5, 6)
    )
    pd.testing.assert_frame_equal(one, same)
    assert one["here"].equals(other["here"]) and not one["low"].equals(other["low"])


@pytest.mark.parametrize("number", range(len(claims_of([]))))
def test_one_conversation_decides_nothing(traces, number):
    first = traces[(traces["prompt"] == 0) & (traces["temperature"] == 1)]
    with np.errstate(all="ignore"):
        row = claims_table(first, [claims_of([])[number]], resamples=5).loc[0]
    assert math.isnan(row["low"]) and math.isnan(row["high"])
    assert row["holds"] == "undecided"


VERDICTS: list[tuple[Callable[[float, float], str], float, float, str]] = [
    (claims.above, 0.1, 2.0, "yes"),
    (claims.above, -2.0, -0.1, "no"),
    (claims.above, -0.1, 2.0, "undecided"),
    (claims.above, 0.0, 2.0, "undecided"),
    (claims.above, -2.0, 0.0, "undecided"),
    (claims.above, 0.0, 0.0, "undecided"),
    (claims.below, -2.0, -0.1, "yes"),
    (claims.below, 0.1, 2.0, "no"),
    (claims.below, -2.0, 0.1, "undecided"),
    (claims.below, -2.0, 0.0, "undecided"),
    (claims.below, 0.0, 2.0, "undecided"),
    (claims.not_below, -2.0, -0.1, "no"),
    (claims.not_below, -2.0, 0.0, "yes"),
    (claims.not_below, -2.0, 1.0, "yes"),
    (claims.not_below, 0.5, 1.0, "yes"),
]


@pytest.mark.parametrize("verdict, low, high, holds", VERDICTS)
def test_a_verdict_is_given_where_the_interval_leaves_no_doubt(verdict, low, high, holds):
    assert verdict(low, high) == holds


@pytest.mark.parametrize(
    "verdict",
    [
        claims.above,
        claims.below,
        claims.not_below,
        partial(claims.within, least=3, most=8),
    ],
)
def test_an_interval_that_is_unknown_decides_nothing(verdict):
    assert verdict(NAN, NAN) == "undecided"


@pytest.mark.parametrize(
    "low, high, holds",
    [
        (3, 8, "yes"),
        (4, 5, "yes"),
        (1, 2.9, "no"),
        (8.1, 9, "no"),
        (2.9, 5, "undecided"),
        (5, 8.1, "undecided"),
        (2, 9, "undecided"),
        (1, 3, "undecided"),
        (8, 9, "undecided"),
    ],
)
def test_a_published_range_holds_where_the_interval_lies_in_it(low, high, holds):
    assert claims.within(low, high, least=3, most=8) == holds


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
    "raw calibration error": ((3, 8), (0.5, 2.9)),
    "calibration error after scaling": ((0.5, 1.5), (1.6, 3)),
    "scaling lowers the error": ((-9, -1), (1, 9)),
    "AUROC of the confidence": ((0.81, 0.91), (0.7, 0.8)),
    "a threshold raises the acceptance rate": ((1, 9), (-9, -1)),
    "at the price of verified slots": ((-9, -1), (1, 9)),
}


def test_every_claim_holds_on_the_side_that_was_published():
    found = claims_of(["dspark-k7"])
    assert [claim.text for claim in found] == list(SIDES)
    for claim in found:
        assert [claim.verdict(*bounds) for bounds in SIDES[claim.text]] == ["yes", "no"]


def test_a_limit_moves_the_verdict():
    assert claims.above(4, 5, limit=3) == "yes" and claims.above(1, 2, limit=3) == "no"
    assert claims.below(1, 2, limit=3) == "yes" and claims.below(4, 5, limit=3) == "no"


def test_the_confidence_of_each_dspark_drafter_is_asked_about_and_no_others():
    names = [*SHORT, *LONG]
    own = [claim.runs[0][0] for claim in claims_of(names)[8:]]
    assert own == ["dspark-k7"] * 7 + ["dspark-k15"] * 7
    without = [[claim.text for claim in claims_of(names)] for names in (["dflash-k7"], [])]
    assert without[0] == without[1] and len(without[0]) == 8


def test_runs_of_other_prompts_are_held_against_each_other_on_those_they_share():
    ours, baseline = ("dspark-k7", claims.ALL), ("dflash-k7", claims.ALL)
    gain = Claim("gain", "", (ours, baseline), claims.gain, claims.above, "%")
    few = [r for r in made_up("dspark-k7") if r.prompt < 10]
    traces = pd.concat([frame("dspark-k7", few), frame("dflash-k7", made_up("dflash-k7"))])
    same = [r for r in made_up("dflash-k7") if r.prompt < 10]
    alike = pd.concat([frame("dspark-k7", few), frame("dflash-k7", same)])
    [found], [expected] = (claims_table(t, [gain])["here"] for t in (traces, alike))
    assert found == pytest.approx(expected)
    others = [r for r in made_up("dflash-k7") if r.prompt >= 10]
    with pytest.raises(ValueError, match="must answer the same prompts, got none in common"):
        claims_table(pd.concat([frame("dspark-k7", few), frame("dflash-k7", others)]), [gain])


def test_without_a_claim_to_hold_there_is_a_table_of_no_rows():
    table = claims_table(frame("mine", made_up("mine")))
    assert table.columns.tolist() == COLUMNS and table.empty
