"""A serving engine under load, against a plain loop and against queueing theory."""

import math
from collections import Counter
from itertools import cycle, islice, takewhile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab import serving
from dspark_lab.pairs import load_traces
from dspark_lab.rates import SequentialTemperatures, temperature_scale
from dspark_lab.serving import FixedLength, StaticThreshold, answers_of, draw_requests, simulate
from tests import traces
from tests.traces import SLOTS, TRACE, equal_answers, made_trace, schedule_by_hand

# In standard errors: a true statement fails with a probability of 6e-5 (normal), and the seeds are
# fixed. Where a standard error comes from 40 batches, 3e-4 (Student's t).
FAR = 4.0


def with_probs(trace: pd.DataFrame) -> pd.DataFrame:
    return trace.assign(accept_prob=trace["accept_rate"])


def trace_of(rounds: list[tuple[int, list[float], int, int]]) -> pd.DataFrame:
    """From (prompt, accept_prob of each slot, verified, accepted), all of one domain."""
    made = [
        traces.Made(prompt, [0.1 + prob / 2 for prob in probs], probs, verified, accepted, "all")
        for prompt, probs, verified, accepted in rounds
    ]
    return with_probs(traces.trace_of(made))


def line(step: float, token: float) -> serving.StepsPerSecond:
    """A step takes so many seconds, and more for each token."""
    tokens = np.array([1, 1000])
    return serving.StepsPerSecond(tokens, 1 / (step + token * tokens), 0, "imaginary")


def engine_of(
    sps: serving.StepsPerSecond, draft: tuple[float, float] = (0.0, 0.0), rest: float = 0.0
) -> serving.Engine:
    """Drafting takes ``draft[0]``, and ``draft[1]`` for each request; every step has the rest."""
    seconds = np.array([[sum(draft)] * 7, [draft[0] + 100 * draft[1]] * 7])
    return serving.Engine(sps, np.array([1, 100]), seconds, np.full(2, rest), np.full(2, rest))


SPEED = line(0.02, 0.001)
ENGINE = engine_of(SPEED, (0.01, 0.002), 0.005)
READING = engine_of(SPEED)


def lengths_by_hand(policy, confidence: list[list[float]], step_seconds) -> list[int]:
    if isinstance(policy, FixedLength):
        return [policy.slots] * len(confidence)
    if isinstance(policy, StaticThreshold):
        sure = [takewhile(lambda c: c >= policy.threshold, row) for row in confidence]
        return [len(list(slots)) for slots in sure]
    return schedule_by_hand(confidence, lambda tokens: 1 / step_seconds(tokens))


def serve_by_hand(
    requests: serving.Requests, policy, concurrency, rate, warm_up
) -> tuple[list[dict], list[tuple]]:
    """One step after the other, one request after the other."""
    count = len(requests)
    order = islice(cycle(range(count)), -warm_up % count, None)
    clock = arriving = 0.0
    known: list[dict] = []

    def one_more() -> dict:
        nonlocal arriving
        which = next(order)
        arriving += requests.gap[which] / rate if rate else 0.0
        left = int(requests.tokens[which])
        zeros = dict.fromkeys(("rounds", "verified", "accepted", "tokens"), 0)
        return {"request": which, "left": left, "arrival": arriving, "end": math.nan, **zeros}

    waiting = one_more()
    batch: list[dict] = []
    steps: list[tuple] = []
    while sum(not math.isnan(r["end"]) for r in known[warm_up : warm_up + count]) < count:
        if not batch and rate:
            clock = max(clock, waiting["arrival"])
        while len(batch) < concurrency and (not rate or waiting["arrival"] <= clock):
            waiting["start"] = clock
            if not rate:
                waiting["arrival"] = clock
            known.append(waiting)
            batch.append(waiting)
            waiting = one_more()
        size = len(batch)
        blocks = [requests.block[r["request"], r["rounds"]] for r in batch]
        confidence = [requests.answers.confidence[block].tolist() for block in blocks]
        drafting = 0.0 if policy == FixedLength(0) else 0.01 + 0.002 * size

        def step_seconds(tokens, drafting=drafting):
            return drafting + 0.005 + 0.02 + 0.001 * tokens

        lengths = lengths_by_hand(policy, confidence, step_seconds)
        verified, grown = sum(lengths), 0
        seconds = step_seconds(size + verified)
        for request, length in zip(batch, lengths, strict=True):
            acceptable = int(requests.acceptable[request["request"], request["rounds"]])
            yielded = min(min(acceptable, length) + 1, request["left"])
            request["accepted"] += min(acceptable, length, request["left"])
            request["rounds"] += 1
            request["verified"] += length
            request["tokens"] += yielded
            request["left"] -= yielded
            grown += yielded
            if request["left"] == 0:
                request["end"] = clock + seconds
        steps.append((clock, seconds, size, verified, size + verified, grown))
        clock += seconds
        batch = [request for request in batch if request["left"]]
    return known, steps


ANSWERS = answers_of(with_probs(made_trace(0)))
POLICIES = [*map(FixedLength, (0, 2, SLOTS)), StaticThreshold(0.7), serving.PrefixScheduler()]


@settings(max_examples=60)
@given(
    policy=st.sampled_from(POLICIES),
    count=st.integers(1, 12),
    concurrency=st.integers(1, 6),
    rate=st.sampled_from([None, 0.5, 5.0, 50.0]),
    warm_up=st.integers(0, 15),
    tokens=st.sampled_from([1, 7, serving.Geometric(6.0)]),
    seed=st.integers(0, 100),
)
def test_requests_are_served_as_by_a_loop_over_steps(
    policy, count, concurrency, rate, warm_up, tokens, seed
) -> None:
    requests = draw_requests(ANSWERS, count, answer_tokens=tokens, seed=seed)
    settings_ = {"concurrency": concurrency, "rate": rate, "warm_up": warm_up}
    result = simulate(requests, ENGINE, policy, **settings_)
    known, steps = serve_by_hand(requests, policy, **settings_)
    columns = ["start", "seconds", "requests", "verified", "batch_tokens", "tokens"]
    by_hand = pd.DataFrame(steps, columns=columns)
    pd.testing.assert_frame_equal(result.steps, by_hand, check_dtype=False, rtol=1e-9)
    domains = requests.answers.domain
    for number, row in enumerate(known):
        row["domain"] = domains[requests.conversation[row["request"]]]
        row["measured"] = warm_up <= number < warm_up + count
    expected = pd.DataFrame(known)[list(result.requests)]
    pd.testing.assert_frame_equal(result.requests, expected, check_dtype=False, rtol=1e-9)


def test_figures_are_of_the_measured_requests_and_of_the_steps_while_they_are_served() -> None:
    requests = draw_requests(ANSWERS, 30, seed=3)
    result = simulate(requests, READING, StaticThreshold(0.6), concurrency=4, rate=4.0, warm_up=9)
    counted = result.requests[result.requests["measured"]]
    assert counted["request"].tolist() == list(range(30))
    begin, end = counted["start"].min(), counted["end"].max()
    during = result.steps[result.steps["start"].between(begin, end, inclusive="left")]
    assert len(during) < len(result.steps)
    speeds = counted["tokens"] / (counted["end"] - counted["start"])
    total, mean, elapsed = counted.sum(), during.mean(), end - begin
    expected = {
        "throughput": during["tokens"].sum() / elapsed,
        "per_user": speeds.mean(),
        "per_user_p10": speeds.quantile(0.1),
        "per_user_p50": speeds.median(),
        "wait": (total["start"] - total["arrival"]) / 30,
        "latency": (total["end"] - total["arrival"]) / 30,
        "tokens_per_round": total["tokens"] / total["rounds"],
        "rounds_per_request": total["rounds"] / 30,
        "verified_per_request": total["verified"] / 30,
        "acceptance": total["accepted"] / total["verified"],
        "batch_requests": mean["requests"],
        "verified_per_step": mean["verified"],
        "batch_tokens": mean["batch_tokens"],
        "busy": during["seconds"].sum() / elapsed,
    }
    assert dict(result.figures) == pytest.approx(expected)
    assert 0 < result.figures["wait"] and result.figures["busy"] < 1


def test_one_at_a_time_waits_as_pollaczek_and_khinchine_say() -> None:
    """Mean wait = rate E[S^2] / (2 (1 - load)), and E[tokens^2] = 2 mean^2 - mean.

    Plain decoding, a tenth of a second per token, load 0.6; 40 batches of 1000 requests.
    """
    tokens, rate = serving.Geometric(2.0), 0.6 / (0.1 * 2.0)
    requests = draw_requests(equal_answers(0.5, 1), 40_000, answer_tokens=tokens, seed=1)
    engine = engine_of(serving.StepsPerSecond(np.array([1]), np.array([10.0]), 0, "imaginary"))
    options = {"concurrency": 1, "rate": rate, "warm_up": 1000}
    result = simulate(requests, engine, FixedLength(0), **options)
    counted = result.requests[result.requests["measured"]]
    waits = (counted["start"] - counted["arrival"]).to_numpy()
    batches = waits.reshape(40, 1000).mean(axis=1)
    error = batches.std(ddof=1) / math.sqrt(40)
    expected = rate * (2 * 2.0**2 - 2.0) * 0.1**2 / (2 * (1 - 0.6))
    assert error < 0.05 * expected
    assert abs(batches.mean() - expected) < FAR * error
    assert result.figures["wait"] == pytest.approx(batches.mean())


@pytest.mark.parametrize("slots, tokens", [(1, 5), (3, 5), (7, 40)], ids=str)
@pytest.mark.parametrize("rate", [0.4, 0.8])
def test_equal_slots_take_as_many_rounds_as_their_profile_says(rate, slots, tokens) -> None:
    requests = draw_requests(equal_answers(rate, 7, tokens), 3000, seed=4)
    result = simulate(requests, READING, FixedLength(slots), concurrency=50)
    rounds = result.requests.loc[result.requests["measured"], "rounds"].to_numpy()
    error = rounds.std(ddof=1) / math.sqrt(len(rounds))
    expected = tokens / serving.AcceptanceProfile.of([rate] * slots).tau(slots, tokens)
    assert abs(rounds.mean() - expected) < FAR * error


def test_one_seed_gives_one_table_and_another_seed_another() -> None:
    tables = [
        serving.load_table(with_probs(TRACE), READING, POLICIES, (1, 3), requests=15, seed=seed)
        for seed in (1, 1, 2)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert (tables[0]["throughput"] != tables[2]["throughput"]).any()
    assert tables[0]["policy"].tolist() == [str(policy) for policy in POLICIES for _ in range(2)]
    assert tables[0]["concurrency"].tolist() == [1, 3] * len(POLICIES)


def test_a_row_of_the_table_is_a_simulation() -> None:
    options = {"rate": 2.5, "draft_length": 3, "warm_up": 4}
    drawing = {"domains": {"code": 2.0}, "within": "domain"}
    drawing |= {"answer_tokens": serving.Geometric(9.0), "seed": 5}
    policies = {"mine": StaticThreshold(0.7)}
    table = serving.load_table(ANSWERS, ENGINE, policies, [3], requests=25, **options, **drawing)
    drawn = draw_requests(ANSWERS, 25, **drawing)
    result = simulate(drawn, ENGINE, StaticThreshold(0.7), concurrency=3, **options)
    [row] = table.to_dict("records")
    assert row == {"policy": "mine", "concurrency": 3, **result.figures}


def test_policies_that_look_at_one_request_verify_the_same_at_any_load() -> None:
    """And the scheduler verifies less, the more requests share the step."""
    table = serving.load_table(ANSWERS, READING, POLICIES, (1, 4, 16, 64), requests=60)
    asked = table.pivot(index="concurrency", columns="policy", values="verified_per_request")
    for policy in POLICIES[:-1]:
        assert asked[str(policy)].nunique() == 1
    fixed = table[table["policy"] == "fixed 2"]
    assert (fixed["verified_per_request"] == 2 * fixed["rounds_per_request"]).all()
    assert asked["prefix scheduler"].is_monotonic_decreasing
    assert asked["prefix scheduler"].nunique() == 4


def test_blocks_that_are_drafted_shorter_are_verified_no_further() -> None:
    requests = draw_requests(ANSWERS, 10)
    for policy in (StaticThreshold(0.0), FixedLength(2)):
        short = simulate(requests, ENGINE, policy, concurrency=2, draft_length=2)
        assert (short.steps["verified"] == 2 * short.steps["requests"]).all()
    with pytest.raises(ValueError, match=r"0 to 2 whole slots .*, got \[3, "):
        simulate(requests, ENGINE, FixedLength(3), concurrency=2, draft_length=2)
    with pytest.raises(ValueError, match="draft_length must be at most 4, got 5"):
        simulate(requests, ENGINE, FixedLength(3), concurrency=2, draft_length=5)


def test_a_slot_is_accepted_as_often_as_its_drafted_token_not_as_its_rate() -> None:
    """Two blocks, equally likely: x_0 = A passes always and then 0.9, x_0 = B 0.6 and then 0.2.

    Both slots pass with 0.5 (1 * 0.9) + 0.5 (0.6 * 0.2) = 0.51. Rates c* = 0.8, then 0.9 or 0.2,
    multiply to 0.44: they forget that an accepted x_0 is rather A.
    """
    trace = trace_of([(0, [1.0, 0.9], 2, 2), (0, [0.6, 0.2], 2, 0)])
    trace["accept_rate"] = [0.8, 0.9, 0.8, 0.2]
    requests = draw_requests(trace, 2000, answer_tokens=50, seed=9)
    acceptable = requests.acceptable.ravel()
    for length, expected in ((1, 0.8), (2, 0.51)):
        share = (acceptable >= length).mean()
        assert abs(share - expected) < FAR * math.sqrt(expected * (1 - expected) / len(acceptable))


def test_a_round_that_its_answer_cut_is_completed_from_one_that_lived_as_long() -> None:
    """The givers survive slot 0 with 0.75 and 0.25: of 4000 takers three quarters get the first."""
    whole = [(0, [0.75, 0.5, 0.4], 3, 1), (0, [0.25, 0.3, 0.2], 3, 0)]
    ends = [(prompt, [0.6, 0.9, 0.9], 1, 1) for prompt in range(1, 4001)]
    answers = answers_of(trace_of(whole + ends), seed=3)
    assert answers.accept_prob[:2].tolist() == [[0.75, 0.5, 0.4], [0.25, 0.3, 0.2]]
    assert answers.accept_prob[2:, 0].tolist() == [0.6] * 4000
    found = Counter(map(tuple, answers.accept_prob[2:, 1:].tolist()))
    assert set(found) == {(0.5, 0.4), (0.3, 0.2)}
    assert abs(found[0.5, 0.4] - 3000) < FAR * math.sqrt(4000 * 0.75 * 0.25)
    assert answers.confidence == pytest.approx(0.1 + answers.accept_prob / 2)


def test_an_answer_has_the_tokens_that_its_rounds_yielded() -> None:
    """1 + 1 and 2 + 1; then 0 + 1 and 2 that ended it; then 0 + 1 alone, two slots left."""
    half = [0.5] * 3
    rounds = [(5, half, 3, 1), (5, half, 3, 2), (2, half, 3, 0), (2, half, 2, 2)]
    trace = trace_of([*rounds, (9, half[:2], 2, 0)])
    answers = answers_of(trace.sample(frac=1, random_state=0))
    assert answers.tokens.tolist() == [3, 5, 1]
    assert answers.count.tolist() == [2, 2, 1] and answers.first.tolist() == [0, 2, 4]
    assert set(draw_requests(answers, 50).tokens) == {1, 3, 5}


def test_calibrated_confidences_are_what_policies_see() -> None:
    scaling = SequentialTemperatures((2.0, 0.5, 1.0, 3.0))
    trace = with_probs(TRACE)
    plain, scaled = answers_of(trace), answers_of(trace, scaling)
    for slot, temperature in enumerate(scaling.temperatures):
        assert scaled.confidence[:, slot] == pytest.approx(
            temperature_scale(plain.confidence[:, slot], temperature)
        )
    assert (scaled.accept_prob == plain.accept_prob).all()


@pytest.mark.parametrize("within", ["conversation", "domain"])
def test_rounds_are_drawn_from_the_requests_conversation_or_domain(within) -> None:
    trace = with_probs(made_trace(3, range(6), rounds=5))
    answers = answers_of(trace)
    requests = draw_requests(answers, 300, within=within, answer_tokens=30, seed=10)
    owner = np.arange(6).repeat(5)
    of_block = owner[requests.block]
    mine = requests.conversation[:, None]
    if within == "conversation":
        assert (of_block == mine).all()
        groups = np.bincount(requests.block[requests.conversation == 2].ravel())[10:15]
    else:
        assert (answers.domain[of_block] == answers.domain[mine]).all()
        groups = np.bincount(requests.block[requests.conversation % 2 == 0].ravel())
        groups = groups[groups > 0]
        assert len(groups) == 15
    expected = groups.sum() / len(groups)
    assert (abs(groups - expected) < 4.5 * math.sqrt(expected)).all()


def test_domains_are_mixed_by_their_weights() -> None:
    trace = with_probs(made_trace(2, range(9), rounds=3, domains=("code", "chat", "math")))
    trace = trace[~trace["prompt"].isin([0, 3])]
    requests = draw_requests(trace, 4000, domains={"code": 3, "chat": 1, "math": 0}, seed=11)
    found = Counter(requests.answers.domain[requests.conversation])
    assert set(found) == {"code", "chat"}
    assert abs(found["code"] - 3000) < FAR * math.sqrt(4000 * 0.75 * 0.25)
    by_default = Counter(draw_requests(trace, 7000, seed=11).conversation.tolist())
    assert sorted(by_default) == list(range(7))
    assert all(abs(n - 1000) < FAR * math.sqrt(1000) for n in by_default.values())


@settings(max_examples=50)
@given(mean=st.floats(1, 50), point=st.floats(0, 0.999999))
def test_geometric_lengths_are_the_quantiles_of_their_distribution(mean, point) -> None:
    """n is the least with P(length <= n) = 1 - (1 - 1/mean)^n above the point, but for rounding."""
    [length] = serving.Geometric(mean).quantile(np.array([point])).tolist()
    assert length >= 1
    assert 1 - (1 - 1 / mean) ** length >= point - 1e-9
    assert length == 1 or 1 - (1 - 1 / mean) ** (length - 1) <= point + 1e-9


def shipped_trace() -> pd.DataFrame:
    trace = load_traces()
    return trace[(trace["drafter"] == "dspark-k7") & (trace["temperature"] == 1)]


def test_a_shipped_trace_is_served_in_as_many_rounds_as_it_took() -> None:
    """Within 3 % and sampling error, all slots verified: the trace's rounds are one such run."""
    trace = shipped_trace()
    requests = draw_requests(trace, 3000, seed=13)
    result = simulate(requests, READING, FixedLength(7), concurrency=100)
    rounds = result.requests.loc[result.requests["measured"], "rounds"]
    took = trace.groupby("prompt")["round"].nunique()
    error = rounds.std() / math.sqrt(len(rounds))
    assert abs(rounds.mean() - took.mean()) < 0.03 * took.mean() + FAR * error


def test_the_scheduler_beats_the_others_on_a_shipped_trace() -> None:
    """At each load, where a token takes a 50th of the step's own seconds: a smooth curve."""
    policies = [FixedLength(0), FixedLength(7), StaticThreshold(0.6), serving.PrefixScheduler()]
    engine = engine_of(line(0.02, 0.0004), draft=(0.003, 0.0))
    table = serving.load_table(shipped_trace(), engine, policies, (4, 16, 64))
    found = table.pivot(index="concurrency", columns="policy", values="throughput")
    for other in map(str, policies[:-1]):
        assert (found["prefix scheduler"] > found[other]).all()


def test_without_confidences_only_fixed_lengths_serve() -> None:
    requests = draw_requests(with_probs(TRACE).assign(confidence=math.nan), 5)
    assert simulate(requests, READING, FixedLength(2), concurrency=2).figures["throughput"] > 0
    for policy in (StaticThreshold(0.5), serving.PrefixScheduler()):
        with pytest.raises(ValueError, match=f"{policy} needs confidences"):
            simulate(requests, READING, policy, concurrency=2)


@pytest.mark.parametrize(
    "policy, message",
    [
        (FixedLength(5), r"0 to 4 whole slots for each of .*, got \[5, 5, "),
        (lambda c, s: np.ones(1), r"0 to 4 whole slots for each of 2 requests, got \[1\.0\]"),
        (lambda c, s: None, "0 to 4 whole slots for each of 2 requests, got None"),
        (lambda c, s: np.array([0, -1]), r"0 to 4 whole slots .*, got \[0, -1\]"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(policy, message) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(draw_requests(ANSWERS, 3), ENGINE, policy, concurrency=2)


ANY = with_probs(TRACE)
CUT = pd.concat([ANY, trace_of([(99, [0.5] * 4, 1, 1)])])


@pytest.mark.parametrize(
    "trace, domains, message",
    [
        (trace_of([(4, [0.5] * 3, 2, 1)]), None, "scheduler.* 4 that verified 2 of 3 slots"),
        (trace_of([(4, [0.5] * 3, 0, 0)]), None, "scheduler.* 4 that verified 0 of 3 slots"),
        (CUT, None, "a round of domain 'all' that verified 4 slots"),
        (pd.concat([ANY, ANY]), None, "every run a trace of its own"),
        (ANSWERS, {"law": 1}, r"among \['chat', 'code'\], got 'law'"),
        (ANSWERS, {"code": 0}, "domains must have a weight above 0"),
    ],
)
def test_requests_that_cannot_be_drawn_are_refused(trace, domains, message) -> None:
    with pytest.raises(ValueError, match=message):
        draw_requests(trace, 5, domains=domains)
