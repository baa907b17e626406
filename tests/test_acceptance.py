"""Rates of acceptance: each kind against loops over rounds, and against what was simulated."""

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.decoding import rounds_of
from dspark_lab.rates import rate_table, tau_table, trace_sums
from tests.traces import Made, trace_of

ON_TRACE = ("on policy", "empirical", "predicted")


def a_round(prompt: int, rates: list[float], verified: int, accepted: int) -> Made:
    return Made(prompt, [0.5] * len(rates), rates, verified, accepted)


@st.composite
def some_rounds(draw: Callable) -> list[Made]:
    """One to four prompts of two domains, with rounds of different lengths, in any order."""
    rate = st.floats(0, 1, allow_subnormal=False)
    found = []
    for prompt in draw(st.lists(st.integers(-5, 50), min_size=1, max_size=4, unique=True)):
        domain = draw(st.sampled_from(["math", "code"]))
        for _ in range(draw(st.integers(1, 4))):
            slots = draw(st.lists(st.tuples(rate, rate), min_size=1, max_size=4))
            verified = draw(st.integers(0, len(slots)))
            accepted = draw(st.integers(0, verified))
            found.append(Made(prompt, *zip(*slots, strict=True), verified, accepted, domain))
    return found


def by_loops(rounds: list[Made]) -> dict[str, list[tuple[float, float, int]]]:
    """Of each kind, for each slot: what passed, what survived, and how many were reached."""
    longest = max(len(one.rate) for one in rounds)
    result: dict[str, list] = {kind: [] for kind in ON_TRACE}
    for k in range(longest):
        passed, survived, count = dict.fromkeys(ON_TRACE, 0.0), dict.fromkeys(ON_TRACE, 0.0), 0
        for one in rounds:
            if k < one.verified:
                survived["predicted"] += math.prod(one.confidence[: k + 1])
            if k < one.reached:
                count += 1
                passed["predicted"] += one.confidence[k]
                passed["on policy"] += one.rate[k]
                survived["on policy"] += one.rate[k]
            if k < one.accepted:
                passed["empirical"] += 1
                survived["empirical"] += 1
        for kind in ON_TRACE:
            result[kind].append((passed[kind], survived[kind], count))
    return result


def same(found: float, numerator: float, denominator: float) -> bool:
    if denominator == 0:
        return bool(np.isnan(found))
    return found == pytest.approx(numerator / denominator, rel=1e-9, abs=1e-12)


@settings(max_examples=12)
@given(some_rounds(), st.randoms(use_true_random=False))
@pytest.mark.parametrize("by", [None, "domain", "conversation"])
def test_rates_and_tau_are_what_loops_over_rounds_find(by, rounds, random) -> None:
    trace = trace_of(rounds)
    order = list(range(len(trace)))
    random.shuffle(order)
    sums = trace_sums(trace.iloc[order])
    slots = sums["slot"].nunique()
    rates = rate_table(sums, by or (), resamples=2)
    taus = tau_table(sums, by or (), resamples=2)
    groups: dict = defaultdict(list)
    for one in rounds:
        groups[{"domain": one.domain, "conversation": one.prompt}.get(by)].append(one)
    assert len(rates) == 3 * len(groups) * slots and len(taus) == 3 * len(groups)
    for label, part in groups.items():
        expected = by_loops(part)
        for kind in ON_TRACE:
            one = rates[(rates["kind"] == kind) & (True if by is None else rates[by] == label)]
            total = 0.0
            for k, row in enumerate(one.itertuples()):
                # Other conversations may have longer rounds.
                short = k >= len(expected[kind])
                passed, survived, count = (0.0, 0.0, 0) if short else expected[kind][k]
                assert (row.slot, row.rounds, row.reached) == (k, len(part), count)
                assert same(row.conditional, passed, count)
                assert same(row.survival, survived, len(part))
                total += survived
            tau = taus[(taus["kind"] == kind) & (True if by is None else taus[by] == label)]
            assert tau["rounds"].tolist() == [len(part)]
            assert same(tau["tau"].item() - 1, total, len(part))


def test_a_slot_that_was_never_reached_has_no_conditional_rate_and_does_not_survive() -> None:
    rejected = [a_round(prompt, [0.3, 0.9], verified=2, accepted=0) for prompt in range(3)]
    table = rate_table(trace_sums(trace_of(rejected))).set_index(["kind", "slot"])
    for kind in ("on policy", "empirical"):
        last = table.loc[(kind, 1)]
        assert (last["reached"], last["conversations"], last["survival"]) == (0, 0, 0)
        assert last[["conditional", "low", "high"]].isna().all()


def test_without_a_confidence_head_nothing_is_predicted() -> None:
    trace = trace_of([a_round(p, [0.5, 0.5], verified=2, accepted=1) for p in range(12)])
    sums = trace_sums(trace.assign(confidence=np.nan))
    figures = ["conditional", "low", "high", "survival", "survival_low", "survival_high"]
    rates = rate_table(sums).set_index("kind")[figures]
    assert rates.loc["predicted"].isna().all(axis=None)
    assert rates.drop("predicted").notna().all(axis=None)
    assert tau_table(sums).set_index("kind")["tau"].isna().tolist() == [False, False, True]


def test_a_product_of_exact_confidences_is_not_the_survival() -> None:
    """The drafter gives A and B 1/2 each, the target 0.7 and 0.3; after A c* is 0.9, after B 0.

    In 40 rounds as they fall on average, 20 draft A, which all survive, and 18 the next slot too;
    of 20 that draft B 12 survive, and none the next slot.
    """
    rounds = []
    for second, accepted in [(0.9, [2] * 18 + [1] * 2), (0.0, [1] * 12 + [0] * 8)]:
        for length in accepted:
            rounds.append(Made(0, (0.8, second), (0.8, second), 2, length))
    table = rate_table(trace_sums(trace_of(rounds))).set_index("kind")
    for kind, survival in (("empirical", 0.45), ("on policy", 0.45), ("predicted", 0.36)):
        assert table.loc[kind, "conditional"].tolist() == pytest.approx([0.8, 18 / 32])
        assert table.loc[kind, "survival"].tolist() == pytest.approx([0.8, survival])


@pytest.mark.parametrize("prompt", [0, 1])
def test_pooled_traces_count_at_every_slot_and_an_added_column_keeps_them_apart(prompt) -> None:
    short = trace_sums(trace_of([a_round(0, [0.5], verified=1, accepted=1)]))
    long = trace_sums(trace_of([a_round(prompt, [0.5, 0.5], verified=2, accepted=2)]))
    both = pd.concat([short.assign(drafter="short"), long.assign(drafter="long")])
    table = rate_table(both).query("kind == 'empirical'")
    assert table["rounds"].tolist() == [2, 2] and table["survival"].tolist() == [1, 0.5]
    assert tau_table(both).set_index("kind").loc["empirical", "tau"] == 2.5
    apart = tau_table(both, "drafter").set_index(["drafter", "kind"])["tau"]
    assert apart["short", "empirical"] == 2 and apart["long", "empirical"] == 3


def conversations(rng: np.random.Generator, count: int, rounds: int) -> pd.DataFrame:
    """Conversations of two slots that differ much more than their rounds do, by coins."""
    rates = rng.beta(3, 2, count).repeat(2 * rounds)
    accepted = (rng.random((count * rounds, 2)) < rates.reshape(-1, 2)).cumprod(axis=1)
    trace = pd.DataFrame({"prompt": np.arange(count).repeat(2 * rounds), "domain": "none"})
    trace["round"] = np.arange(count * rounds).repeat(2)
    trace["slot"] = np.tile([0, 1], count * rounds)
    trace["accept_rate"] = trace["confidence"] = rates
    return trace.assign(verified=True, accepted=accepted.ravel().astype(bool))


def test_intervals_cover_about_as_often_as_they_say() -> None:
    """With 40 conversations a percentile bootstrap covers some 93 %.

    The share of 150 intervals that do has a standard deviation of 2.1 points; leaving [0.85, 0.99]
    has a chance below 1e-3 for each of the three figures. Intervals over rows would cover 55 %.
    """
    first, second = 3 / 5, 3 * 4 / (5 * 6)  # moments of beta(3, 2)
    truth = {"conditional": second / first, "survival": second, "tau": 1 + first + second}
    trace = conversations(np.random.default_rng(0), 150 * 40, 12)
    sums = trace_sums(trace).query("kind == 'empirical'")
    sums = sums.assign(sample=sums["conversation"] // 40)
    rates = rate_table(sums, "sample", resamples=200).query("slot == 1")
    taus = tau_table(sums, "sample", resamples=200)
    bounds = {"conditional": rates[["low", "high"]], "tau": taus[["low", "high"]]}
    bounds["survival"] = rates[["survival_low", "survival_high"]]
    for figure, table in bounds.items():
        low, high = table.to_numpy().T
        inside = (low <= truth[figure]) & (truth[figure] <= high)
        assert len(inside) == 150 and 0.85 <= inside.mean() <= 0.99, (figure, inside.mean())


def test_a_groups_interval_is_over_its_own_conversations_and_one_has_none() -> None:
    trace = conversations(np.random.default_rng(3), 12, 3)
    trace["domain"] = np.where(trace["prompt"] < 8, "math", "code")
    sums = trace_sums(trace)
    for domain in ("math", "code"):
        part = rate_table(sums, "domain").query("domain == @domain").drop(columns="domain")
        alone = rate_table(trace_sums(trace[trace["domain"] == domain]))
        pd.testing.assert_frame_equal(part.reset_index(drop=True), alone)
    assert rate_table(sums, "conversation")[["low", "high", "survival_low"]].isna().all(axis=None)
    assert tau_table(sums, ["conversation", "domain"])[["low", "high"]].isna().all(axis=None)
    single = tau_table(sums[sums["conversation"] == 3])
    assert single["low"].isna().all() and single["tau"].notna().all()
    assert tau_table(sums)["low"].notna().all()


def test_rounding_above_one_is_clipped() -> None:
    trace = trace_of([a_round(0, [1 + 1e-7], verified=1, accepted=1)])
    assert tau_table(trace_sums(trace))["tau"].tolist() == [2, 2, 1.5]


def altered(**columns) -> pd.DataFrame:
    """Two rounds of three slots, with some columns replaced."""
    rounds = [a_round(p, [0.5] * 3, verified=2, accepted=1) for p in (4, 7)]
    return trace_of(rounds).assign(**columns)


NO_STORY = [
    (altered().drop(columns="slot"), "must have a column 'slot', got"),
    (altered()[:0], "at least one row, got 0"),
    (altered(slot=[0, 1, -2] * 2), r"each once, .* got -2 in prompt 4, round 0, slot -2"),
    (altered(slot=[0, 1, 3] * 2), r"0, 1, 2, \.\.\., each once, .* got 3 in prompt 4"),
    (altered(slot=[0, 1, 1] * 2), "each once, .* got 1"),
    (altered(prompt=[4] * 6), "each once, and every run a trace of its own, got 0"),
    (altered(domain=["a", "a", "a", "b", "c", "b"]), "one domain, got 'c' and 'b'"),
    (altered(domain=["a"] * 5 + [None]), "'domain'. must have a value in every row, 1 are"),
    (altered(accept_rate=[0.5, 1.2, 0.5] * 2), r"accept_rate must lie in \[0, 1\], got 1.2"),
    (altered(accept_rate=[0.5, np.nan, 0.5] * 2), "a number where verified, got nan"),
    (altered(confidence=[0.5, 0.5, np.inf] * 2), r"confidence must lie in \[0, 1\], got inf"),
    (altered(verified=[True, False, True] * 2), "verified must be False after a slot"),
    (altered(accepted=[True, True, True] * 2), "accepted must be False where not verified"),
    (altered(accepted=[False, True, False] * 2), "accepted must be False after a slot"),
    (altered(slot=[0.0, 1.0, 2.0] * 2), "'slot'. must hold integers, got float64"),
    (altered(accepted=[1, 0, 0] * 2), "'accepted'. must hold truth values, got int64"),
    (altered(accept_rate=[True] * 6), "'accept_rate'. must hold numbers, got bool"),
]


@pytest.mark.parametrize(("trace", "message"), NO_STORY)
def test_a_trace_that_tells_no_story_is_refused(trace, message) -> None:
    for read in (trace_sums, rounds_of):
        with pytest.raises(TypeError if "hold" in message else ValueError, match=message):
            read(trace)


SUMS = trace_sums(altered())


@pytest.mark.parametrize(
    ("sums", "by", "message"),
    [
        (SUMS, "prompt", "by must name columns.*got .'prompt'"),
        (SUMS, ["domain", "domain"], "each once"),
        (SUMS, "reached", "by must name columns"),
        (SUMS[:0], (), "rows and the columns"),
        (altered(), (), "rows and the columns"),
    ],
)
@pytest.mark.parametrize("table", [rate_table, tau_table])
def test_tables_refuse_what_they_cannot_group(table, sums, by, message) -> None:
    with pytest.raises(ValueError, match=message):
        table(sums, by)
