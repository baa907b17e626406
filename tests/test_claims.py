"""Published claims: their figures are those of the tables, on traces that were made up."""

import math
import random
from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd
import pytest

from dspark_lab.decoding import Rounds, rounds_of
from dspark_lab.rates import (
    auroc,
    calibration_report,
    claims,
    claims_table,
    expected_calibration_error,
    rate_table,
    signals,
    split_prompts,
    study,
    tau_table,
    threshold_sweep,
    trace_sums,
)
from tests.traces import Made, trace_of

COLUMNS = ["claim", "drafter", "published", "here", "low", "high", "unit", "holds"]
SHORT = ("dspark-k7", "dflash-k7", "gated-k7", "rnn-k7")
LONG = ("dspark-k15", "dflash-k15")
NAN, INF = math.nan, math.inf


def frame(drafter: str, rounds: Sequence[Made], temperature: float = 1.0) -> pd.DataFrame:
    """With margins that know something of the confidences."""
    trace = trace_of(rounds).assign(drafter=drafter, temperature=temperature)
    noise = np.random.default_rng(len(trace)).uniform(0, 1, len(trace))
    return trace.assign(top_prob=trace["confidence"], margin=trace["confidence"] + noise)


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
            rates = [min(1, max(0, base + own + random_.gauss(0, 0.1))) for _ in range(block)]
            sure = [min(0.999, max(0.001, rate + random_.gauss(0.03, 0.1))) for rate in rates]
            verified = block if random_.random() < 0.8 else random_.randrange(block + 1)
            accepted = 0
            while accepted < verified and random_.random() < rates[accepted]:
                accepted += 1
            domain = ("math", "code")[prompt % 2]
            found.append(Made(prompt, sure, rates, verified, accepted, domain))
    return tuple(found)


def expected_of(drafter: str) -> dict[str, float]:
    """The figures of a drafter's confidence, by claim."""
    trace = frame(drafter, made_up(drafter))
    pairs = rounds_of(trace).pairs()
    every = study(trace, by=["drafter"], resamples=1).iloc[0]
    held = calibration_report(*split_prompts(trace), resamples=1).iloc[-1]
    areas = {
        name: auroc(*rounds_of(test).pairs())
        for name, (_, test) in signals(*split_prompts(trace)).items()
    }
    rise = threshold_sweep(trace, [0.0, 0.9], resamples=1).diff().iloc[-1]
    return {
        "the raw confidence is too high": 100 * every["bias"],
        "slot error, raw": 100 * expected_calibration_error(*pairs),
        "product error, scaled": 100 * held["ece_product_scaled"],
        "scaling lowers the product error": 100
        * (held["ece_product_scaled"] - held["ece_product"]),
        "AUROC of the confidence": auroc(*pairs),
        "the margin of two logits, learned online, is the better signal": 100
        * (areas["online margin"] - areas["head"]),
        "a threshold raises the acceptance rate": 100 * rise["acceptance_rate"],
        "at the price of verified slots": rise["verified"],
    }


def expected_of_heads() -> dict[str, float]:
    """The figures about heads, by claim."""
    sums = pd.concat(
        trace_sums(trace_of(made_up(name))).assign(drafter=name) for name in (*SHORT, *LONG)
    )
    sums = sums[sums["kind"] == "on policy"]
    tau = tau_table(sums, "drafter", resamples=1).set_index("drafter")["tau"]
    rates = rate_table(sums, "drafter", resamples=1).set_index(["drafter", "slot"])["conditional"]

    def gain(ours: str, baseline: str) -> float:
        return 100 * (tau[ours] - tau[baseline]) / tau[baseline]

    def change(drafter: str, slot: int) -> float:
        return 100 * (rates[drafter, slot] - rates[drafter, 0])

    short, long = gain("dspark-k7", "dflash-k7"), gain(*LONG)
    return {
        "a Markov head raises tau, K 7": short,
        "a Markov head raises tau, K 15": long,
        "its gain grows from K 7 to K 15": long - short,
        "without it acceptance falls along the block": change("dflash-k7", 6),
        "without it acceptance falls at slot 1": change("dflash-k7", 1),
        "with it acceptance does not fall": change("dspark-k7", 6),
        "a gated head beats the vanilla one": gain("gated-k7", "dspark-k7"),
        "an RNN head beats the vanilla one": gain("rnn-k7", "dspark-k7"),
    }


@pytest.fixture(scope="module")
def traces() -> pd.DataFrame:
    """Six drafters at temperature 1, and one of them at 0 with other rounds."""
    others = frame("dspark-k7", made_up("another-k7"), temperature=0.0)
    return pd.concat([others, *(frame(name, made_up(name)) for name in (*SHORT, *LONG))])


@pytest.fixture(scope="module")
def table(traces: pd.DataFrame) -> pd.DataFrame:
    return claims_table(traces, resamples=40)


def test_every_figure_is_that_of_the_tables(table):
    heads, short, long = expected_of_heads(), expected_of("dspark-k7"), expected_of("dspark-k15")
    assert list(table.columns) == COLUMNS
    assert table["claim"].tolist() == [*heads, *short, *long]
    expected = [*heads.values(), *short.values(), *long.values()]
    assert table["here"].tolist() == pytest.approx(expected)
    assert table["drafter"].tolist()[8:] == ["dspark-k7"] * 8 + ["dspark-k15"] * 8
    assert table.loc[[0, 2], ["drafter", "published", "unit"]].to_numpy().tolist() == [
        ["dspark-k7, dflash-k7", "+16 %", "%"],
        ["dspark-k7, dflash-k7, dspark-k15, dflash-k15", "+14 points", "points"],
    ]
    assert (table["low"] < table["here"]).all() and (table["here"] < table["high"]).all()


def test_the_runs_of_another_temperature_are_not_looked_at(traces, table):
    alone = traces[traces["temperature"] == 1.0]
    pd.testing.assert_frame_equal(claims_table(alone, resamples=40), table)
    cold = claims_table(traces, temperature=0.0, resamples=10).set_index("claim")["here"]
    expected = expected_of("another-k7")
    assert cold[list(expected)].tolist() == pytest.approx(list(expected.values()))


@pytest.mark.parametrize("names", [["dflash-k7"], ["dspark-k7", "rnn-k7"], ["dspark-k15"], []])
def test_claims_of_a_drafter_that_is_missing_are_left_out(traces, names):
    # A drafter of another name is no reason to refuse the others.
    other = frame("own", made_up("dflash-k7"))
    some = pd.concat([traces[traces["drafter"].isin(names)], other])
    found = claims_table(some, resamples=2)
    wanted = [claim[0] for claim in claims.HEADS if set(claim[2]) <= set(names)]
    wanted += [claim[0] for name in names if "dspark" in name for claim in claims.CONFIDENCE]
    assert found["claim"].tolist() == wanted and found.columns.tolist() == COLUMNS
    without = claims_table(some.drop(columns="margin"), resamples=2)["claim"].tolist()
    assert without == [claim for claim in wanted if "margin" not in claim]


def test_what_is_no_set_of_traces_is_refused(traces):
    with pytest.raises(ValueError, match=r"must be one of \[0.0, 1.0\], got 0.7"):
        claims_table(traces, temperature=0.7)
    with pytest.raises(ValueError, match="must have a column 'drafter'"):
        claims_table(traces.drop(columns="drafter"))


def mean_rate(run: Rounds) -> float:
    return float(run.accept_rate[:, 0].mean())


def difference(ours: Rounds, baseline: Rounds) -> float:
    return mean_rate(ours) - mean_rate(baseline)


def interval_of(figure, *drafters: Sequence[Made], resamples: int = 50, seed: int = 0):
    runs = [rounds_of(trace_of(rounds)) for rounds in drafters]
    return claims.figure_and_interval(figure, runs, resamples, seed)


def of_rates(*rates: Sequence[float]) -> list[Made]:
    """For each prompt a round of one slot at each of its rates, accepted if above 1/2."""
    return [
        Made(prompt, (0.5,), (rate,), 1, int(rate > 0.5))
        for prompt, own in enumerate(rates)
        for rate in own
    ]


def test_conversations_are_drawn_whole_and_together_in_all_runs():
    rounds = made_up("dspark-k7")
    assert interval_of(claims.tau_gain, rounds, rounds) == (0, 0, 0)
    random_ = random.Random(0)
    rates = [[random_.uniform(0.2, 1.0)] * random_.randint(1, 4) for _ in range(30)]
    lower = [[rate - 0.1 for rate in own] for own in rates]
    _, low, high = interval_of(mean_rate, of_rates(*rates))
    assert high - low > 0.05
    together = interval_of(difference, of_rates(*rates), of_rates(*lower))
    assert together == pytest.approx((0.1, 0.1, 0.1), abs=1e-12)
    # Every conversation's mean is 1/2, whatever its first round is like.
    rates = [[rate, 1 - rate] for rate in (random_.random() for _ in range(20))]
    assert interval_of(mean_rate, of_rates(*rates)) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize("conversations, copies, off", [(60, 1, 0.12), (20, 60, 0.15)])
def test_the_interval_of_a_mean_is_as_wide_as_its_conversations_say(conversations, copies, off):
    """Sixty equal rounds in each of twenty conversations are twenty, not 1200.

    With 1000 resamples the width is off by some 3 %.
    """
    rates = np.random.default_rng(3).beta(4, 2, conversations)
    rounds = of_rates(*([rate] * copies for rate in rates.tolist()))
    here, low, high = interval_of(mean_rate, rounds, resamples=1000)
    half = 1.96 * rates.std() / math.sqrt(conversations)
    assert here == pytest.approx(rates.mean())
    assert (high - here, here - low) == pytest.approx((half, half), rel=off)


def test_the_interval_of_a_calibration_error_is_around_the_error():
    """Drawing conversations twice makes the error larger: the resamples alone would lie above."""
    rounds = made_up("dspark-k7", prompts=10, rounds=3)
    for figure in (claims.slot_error, claims.product_error):
        here, low, high = interval_of(figure, rounds, resamples=200)
        assert low < here < high and here == figure(rounds_of(trace_of(rounds)))
    # Of any draw but one with as many of each kind the error is above 0.
    even = [Made(i, (0.5,), (0.5,), 1, i % 2) for i in range(40)]
    here, low, high = interval_of(claims.slot_error, even, resamples=200)
    assert low < here == 0 < high


def test_one_conversation_decides_nothing(traces):
    first = traces[(traces["prompt"] == 0) & (traces["temperature"] == 1)]
    with np.errstate(all="ignore"):
        table = claims_table(first[~first["drafter"].str.startswith("dspark")], resamples=5)
        rounds = [r for r in made_up("dspark-k7") if r.prompt == 0]
        bounds = [interval_of(claim[3], rounds, resamples=5)[1:] for claim in claims.CONFIDENCE[:2]]
    assert table[["low", "high"]].isna().all(axis=None) and (table["holds"] == "undecided").all()
    assert np.isnan(bounds).all()


def test_runs_of_other_prompts_are_held_against_each_other_on_those_they_share():
    theirs = made_up("dflash-k7")
    few = [r for r in made_up("dspark-k7") if r.prompt < 10]
    same = [r for r in theirs if r.prompt < 10]
    found, expected = (
        interval_of(claims.tau_gain, few, baseline, resamples=5) for baseline in (theirs, same)
    )
    assert found == pytest.approx(expected)
    with pytest.raises(ValueError, match="must answer the same prompts, got none in common"):
        interval_of(claims.tau_gain, few, [r for r in theirs if r.prompt >= 10])


RISE, FALL, RANGE = (0, INF), (-INF, 0), (3, 8)


@pytest.mark.parametrize(
    ("allowed", "holds", "intervals"),
    [
        (RISE, "yes", [(0.1, 2)]),
        (RISE, "no", [(-2, -0.1)]),
        (RISE, "undecided", [(-0.1, 2), (0, 2), (-2, 0), (0, 0), (NAN, NAN)]),
        (FALL, "yes", [(-2, -0.1)]),
        (FALL, "no", [(0.1, 2)]),
        (FALL, "undecided", [(-2, 0.1), (-2, 0)]),
        (RANGE, "yes", [(4, 5)]),
        (RANGE, "no", [(1, 2.9), (8.1, 9)]),
        (RANGE, "undecided", [(2.9, 5), (5, 8.1), (2, 9), (1, 3), (8, 9), (NAN, NAN)]),
    ],
)
def test_a_verdict_is_given_where_the_interval_leaves_no_doubt(allowed, holds, intervals):
    assert {claims.verdict(*bounds, allowed) for bounds in intervals} == {holds}


def test_what_need_only_not_be_refuted_holds_unless_the_interval_excludes_it():
    intervals = [(-2, -0.1), (-2, 0), (-2, 1), (0.5, 1), (NAN, NAN)]
    found = [claims.verdict(*bounds, RISE, unless_refuted=True) for bounds in intervals]
    assert found == ["no", "yes", "yes", "yes", "undecided"]


# An interval of which each claim holds, and one of which it does not.
UP, DOWN = ((1, 9), (-9, -1)), ((-9, -1), (1, 9))
OF_HEADS = [UP, UP, UP, DOWN, DOWN, ((-1, 9), (-9, -1)), UP, UP]
OF_CONFIDENCE = [UP, ((3.1, 7.9), (0.5, 2.9)), ((0.5, 1.4), (1.6, 3)), DOWN]
OF_CONFIDENCE += [((0.82, 0.9), (0.7, 0.8)), UP, UP, DOWN]


@pytest.mark.parametrize("side, holds", [(0, "yes"), (1, "no")])
def test_every_claim_holds_on_the_side_that_was_published(traces, monkeypatch, side, holds):
    known = traces[traces["drafter"].isin(SHORT + LONG) & (traces["temperature"] == 1)]
    bounds = iter(OF_HEADS + 2 * OF_CONFIDENCE)
    monkeypatch.setattr(claims, "figure_and_interval", lambda *_: (0.0, *next(bounds)[side]))
    assert claims_table(known)["holds"].tolist() == [holds] * 24
