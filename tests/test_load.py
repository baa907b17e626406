"""A serving engine under load, against a plain loop and against queueing theory."""

import math
from collections import Counter
from itertools import cycle, islice

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.pairs import load_traces
from dspark_lab.rates import SequentialTemperatures, temperature_scale
from dspark_lab.serving import (
    Answers,
    Engine,
    FixedLength,
    Geometric,
    LoadResult,
    PrefixScheduler,
    Requests,
    StaticThreshold,
    StepsPerSecond,
    answers_of,
    draw_requests,
    load_table,
    simulate,
)
from tests.traces import SLOTS, TRACE, made_trace

# In standard errors: a true statement fails with a probability of 6e-5 (normal), and the seeds are
# fixed. Where a standard error comes from 40 batches, 3e-4 (Student's t).
FAR = 4.0


def with_probs(trace: pd.DataFrame) -> pd.DataFrame:
    return trace.assign(accept_prob=trace["accept_rate"])


def alike(rate: float, slots: int, tokens: int = 1) -> Answers:
    """One conversation whose every slot is accepted with the same probability."""
    one = np.array([1])
    return Answers(
        accept_prob=np.full((1, slots), rate),
        confidence=np.full((1, slots), rate),
        first=np.array([0]),
        count=one,
        tokens=one * tokens,
        domain=np.array(["all"], dtype=object),
    )


def trace_of(rounds: list[tuple[int, list[float], int, int]], **columns: list) -> pd.DataFrame:
    """From (prompt, accept_prob of each slot, verified, accepted), all of one domain."""
    rows, numbers = [], Counter()
    for prompt, probs, verified, accepted in rounds:
        for slot, prob in enumerate(probs):
            asked = slot < verified
            rows.append(
                {
                    "prompt": prompt,
                    "domain": "all",
                    "round": numbers[prompt],
                    "slot": slot,
                    "accept_prob": prob if asked else math.nan,
                    "accept_rate": prob if asked else math.nan,
                    "confidence": 0.1 + prob / 2,
                    "verified": asked,
                    "accepted": slot < accepted,
                }
            )
        numbers[prompt] += 1
    return pd.DataFrame(rows).assign(**columns)


def line(step: float, token: float) -> StepsPerSecond:
    """A step takes so many seconds, and more for each token."""
    tokens = np.array([1, 1000])
    return StepsPerSecond(tokens, 1 / (step + token * tokens), 0, "imaginary")


def engine_of(
    sps: StepsPerSecond, draft: tuple[float, float] = (0.0, 0.0), rest: float = 0.0
) -> Engine:
    """Drafting takes ``draft[0]``, and ``draft[1]`` for each request; every step has the rest."""
    seconds = np.array([[sum(draft)] * 7, [draft[0] + 100 * draft[1]] * 7])
    return Engine(sps, np.array([1, 100]), seconds, np.full(2, rest), np.full(2, rest))


SPEED = line(0.02, 0.001)
ENGINE = engine_of(SPEED, (0.01, 0.002), 0.005)
READING = engine_of(SPEED)


def lengths_by_hand(policy, confidence: list[list[float]], step_seconds) -> list[int]:
    if isinstance(policy, FixedLength):
        return [policy.slots] * len(confidence)
    lengths = [0] * len(confidence)
    if isinstance(policy, StaticThreshold):
        for request, row in enumerate(confidence):
            for value in row:
                if value < policy.threshold:
                    break
                lengths[request] += 1
        return lengths
    candidates = []
    for request, row in enumerate(confidence):
        survival = 1.0
        for slot, value in enumerate(row):
            survival *= value
            candidates.append((-survival, slot, request))
    size = tau = len(confidence)
    theta = tau / step_seconds(size)
    for survival, _, request in sorted(candidates):
        size, tau = size + 1, tau - survival
        if tau / step_seconds(size) <= theta:
            break
        theta = tau / step_seconds(size)
        lengths[request] += 1
    return lengths


def serve_by_hand(
    requests: Requests, policy, concurrency, rate, warm_up
) -> tuple[list[dict], list[dict]]:
    """One step after the other, one request after the other."""
    count = len(requests)
    order = islice(cycle(range(count)), -warm_up % count, None)
    clock = arriving = 0.0
    known: list[dict] = []

    def draft_of(size: int) -> float:
        return 0.0 if policy == FixedLength(0) else 0.01 + 0.002 * size

    def one_more() -> dict:
        nonlocal arriving
        which = next(order)
        arriving += requests.gap[which] / rate if rate else 0.0
        left = int(requests.tokens[which])
        zeros = dict.fromkeys(("rounds", "verified", "accepted", "tokens"), 0)
        return {"request": which, "left": left, "arrival": arriving, "end": math.nan, **zeros}

    waiting = one_more()
    batch: list[dict] = []
    steps: list[dict] = []
    while not all(not math.isnan(r["end"]) for r in known[warm_up : warm_up + count]) or (
        len(known) < warm_up + count
    ):
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

        def step_seconds(tokens: int, size: int = size) -> float:
            return draft_of(size) + 0.005 + 0.02 + 0.001 * tokens

        lengths = lengths_by_hand(policy, confidence, step_seconds)
        seconds = step_seconds(size + sum(lengths))
        grown = 0
        for request, length in zip(batch, lengths, strict=True):
            acceptable = int(requests.acceptable[request["request"], request["rounds"]])
            yielded = min(min(acceptable, length) + 1, request["left"])
            request["accepted"] += min(acceptable, length, request["left"])
            request["rounds"] += 1
            request["verified"] += length
            request["tokens"] += yielded
            request["left"] -= yielded
            grown += yielded
        steps.append(
            {
                "start": clock,
                "seconds": seconds,
                "requests": size,
                "verified": sum(lengths),
                "batch_tokens": size + sum(lengths),
                "tokens": grown,
            }
        )
        clock += seconds
        for request in batch:
            if request["left"] == 0:
                request["end"] = clock
        batch = [request for request in batch if request["left"]]
    return known, steps


ANSWERS = answers_of(with_probs(made_trace(0)))
POLICIES = [
    FixedLength(0),
    FixedLength(2),
    FixedLength(SLOTS),
    StaticThreshold(0.7),
    PrefixScheduler(),
]


@settings(max_examples=60)
@given(
    policy=st.sampled_from(POLICIES),
    count=st.integers(1, 12),
    concurrency=st.integers(1, 6),
    rate=st.sampled_from([None, 0.5, 5.0, 50.0]),
    warm_up=st.integers(0, 15),
    tokens=st.sampled_from([1, 7, Geometric(6.0)]),
    seed=st.integers(0, 100),
)
def test_requests_are_served_as_by_a_loop_over_steps(
    policy, count, concurrency, rate, warm_up, tokens, seed
) -> None:
    requests = draw_requests(ANSWERS, count, answer_tokens=tokens, seed=seed)

    settings_ = {"concurrency": concurrency, "rate": rate, "warm_up": warm_up}
    result = simulate(requests, ENGINE, policy, **settings_)
    known, steps = serve_by_hand(requests, policy, **settings_)
    pd.testing.assert_frame_equal(result.steps, pd.DataFrame(steps), check_dtype=False, rtol=1e-9)
    domains = requests.answers.domain
    for number, row in enumerate(known):
        row["domain"] = domains[requests.conversation[row["request"]]]
        row["measured"] = warm_up <= number < warm_up + count
    expected = pd.DataFrame(known)[list(result.requests)]
    pd.testing.assert_frame_equal(result.requests, expected, check_dtype=False, rtol=1e-9)


def test_figures_are_of_the_measured_requests_and_of_the_steps_while_they_are_served() -> None:
    requests = draw_requests(ANSWERS, 30, seed=3)
    result = simulate(requests, READING, StaticThreshold(0.6), concurrency=4, rate=4.0, warm_up=9)
    known, steps = result.requests.to_dict("records"), result.steps.to_dict("records")
    counted = [row for row in known if row["measured"]]
    assert [row["request"] for row in counted] == list(range(30))
    begin, end = counted[0]["start"], max(row["end"] for row in counted)
    during = [row for row in steps if begin <= row["start"] < end]
    assert len(during) < len(steps)

    def mean(values) -> float:
        values = list(values)
        return sum(values) / len(values)

    def total(rows, name) -> float:
        return sum(row[name] for row in rows)

    speeds = [row["tokens"] / (row["end"] - row["start"]) for row in counted]
    expected = {
        "throughput": total(during, "tokens") / (end - begin),
        "per_user": mean(speeds),
        "per_user_p10": np.quantile(speeds, 0.1),
        "per_user_p50": np.quantile(speeds, 0.5),
        "wait": mean(row["start"] - row["arrival"] for row in counted),
        "latency": mean(row["end"] - row["arrival"] for row in counted),
        "tokens_per_round": total(counted, "tokens") / total(counted, "rounds"),
        "rounds_per_request": total(counted, "rounds") / 30,
        "verified_per_request": total(counted, "verified") / 30,
        "acceptance": total(counted, "accepted") / total(counted, "verified"),
        "batch_requests": mean(row["requests"] for row in during),
        "verified_per_step": mean(row["verified"] for row in during),
        "batch_tokens": mean(row["batch_tokens"] for row in during),
        "busy": total(during, "seconds") / (end - begin),
    }
    assert dict(result.figures) == pytest.approx(expected)
    assert 0 < result.figures["wait"] and result.figures["busy"] < 1


def waits(result: LoadResult) -> np.ndarray:
    counted = result.requests[result.requests["measured"]]
    return (counted["start"] - counted["arrival"]).to_numpy()


@pytest.mark.parametrize(
    "tokens, moment",
    [(1, 1.0), (Geometric(2.0), 2 * 2.0**2 - 2.0)],
    ids=["M/D/1", "geometric M/G/1"],
)
def test_one_at_a_time_waits_as_pollaczek_and_khinchine_say(tokens, moment) -> None:
    """Mean wait = rate E[S^2] / (2 (1 - load)); ``moment`` is E[tokens^2].

    Plain decoding, a tenth of a second per token, load 0.6; 40 batches of 1000 requests.
    """
    mean = 1.0 if tokens == 1 else tokens.mean
    rate = 0.6 / (0.1 * mean)
    requests = draw_requests(alike(0.5, 1), 40_000, answer_tokens=tokens, seed=1)
    result = simulate(
        requests,
        engine_of(StepsPerSecond(np.array([1]), np.array([10.0]), 0, "imaginary")),
        FixedLength(0),
        concurrency=1,
        rate=rate,
        warm_up=1000,
    )
    batches = waits(result).reshape(40, 1000).mean(axis=1)
    error = batches.std(ddof=1) / math.sqrt(40)
    expected = rate * moment * 0.1**2 / (2 * (1 - 0.6))
    assert error < 0.05 * expected
    assert abs(batches.mean() - expected) < FAR * error
    assert result.figures["wait"] == pytest.approx(batches.mean())


def test_one_at_a_time_waits_as_lindley_says() -> None:
    """wait' = max(0, wait + service - gap), whatever the services are."""
    requests = draw_requests(ANSWERS, 300, answer_tokens=Geometric(9.0), seed=5)
    rate = 3.0
    result = simulate(requests, READING, PrefixScheduler(), concurrency=1, rate=rate, warm_up=0)
    served = result.requests
    wait, found = 0.0, waits(result)
    for number in range(300):
        assert found[number] == pytest.approx(wait, abs=1e-9)
        service = served["end"][number] - served["start"][number]
        wait = max(0.0, wait + service - requests.gap[(number + 1) % 300] / rate)
    assert (found == 0).any() and (found > 0).any()


@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_a_full_batch_of_plain_decoding_has_the_throughput_of_its_size(concurrency) -> None:
    requests = draw_requests(ANSWERS, 40, answer_tokens=Geometric(12.0), seed=2)
    engine = engine_of(SPEED, draft=(7.0, 0.0))
    figures = simulate(requests, engine, FixedLength(0), concurrency=concurrency).figures
    sps = SPEED(concurrency)
    assert figures["throughput"] == pytest.approx(concurrency * sps)
    for name in ("per_user", "per_user_p10", "per_user_p50"):
        assert figures[name] == pytest.approx(sps)
    assert figures["latency"] == pytest.approx(requests.tokens.mean() / sps)
    assert figures["batch_requests"] == figures["batch_tokens"] == concurrency
    assert figures["tokens_per_round"] == pytest.approx(1)
    assert figures["busy"] == pytest.approx(1)
    assert figures["wait"] == figures["verified_per_request"] == 0
    assert math.isnan(figures["acceptance"])


def rounds_of_equal_slots(rate: float, slots: int, tokens: int) -> list[float]:
    """Rounds that so many tokens take on average: the first yields n, the rest takes its own."""
    yields = [rate**k * (1 - rate) for k in range(slots)] + [rate**slots]
    rounds = [0.0]
    for left in range(1, tokens + 1):
        rounds.append(1 + sum(p * rounds[max(0, left - n)] for n, p in enumerate(yields, start=1)))
    return rounds


@pytest.mark.parametrize("slots, tokens", [(1, 5), (3, 5), (7, 40)], ids=str)
@pytest.mark.parametrize("rate", [0.4, 0.8])
def test_equal_slots_take_the_rounds_of_the_renewal_equation(rate, slots, tokens) -> None:
    requests = draw_requests(alike(rate, 7, tokens), 3000, seed=4)
    result = simulate(requests, READING, FixedLength(slots), concurrency=50)
    rounds = result.requests.loc[result.requests["measured"], "rounds"].to_numpy()
    error = rounds.std(ddof=1) / math.sqrt(len(rounds))
    assert abs(rounds.mean() - rounds_of_equal_slots(rate, slots, tokens)[tokens]) < FAR * error


def test_equal_slots_yield_the_geometric_sum_in_a_long_answer() -> None:
    """tokens per round = sum of a^k, k = 0..K; and a full batch makes R times that per step."""
    rate, slots, size = 0.7, 4, 8
    requests = draw_requests(alike(rate, slots, 4000), size, seed=6)
    engine = engine_of(SPEED, draft=(0.03, 0.0))
    result = simulate(requests, engine, FixedLength(slots), concurrency=size)
    figures = result.figures
    expected = sum(rate**k for k in range(slots + 1))
    variance = sum(
        n**2 * p
        for n, p in enumerate([rate**k * (1 - rate) for k in range(slots)] + [rate**slots], 1)
    ) - (expected**2)
    error = math.sqrt(variance / (size * figures["rounds_per_request"]))
    assert abs(figures["tokens_per_round"] - expected) < FAR * error
    seconds = 0.03 + SPEED.seconds(size * (slots + 1))
    during = result.steps[result.steps["start"] >= result.requests["start"][size]]
    assert set(during["requests"]) == {size}
    assert figures["throughput"] == pytest.approx(during["tokens"].mean() / seconds)
    assert abs(figures["throughput"] - size * expected / seconds) < FAR * error * size / seconds


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_time_in_the_batch_is_time_of_steps_times_requests_in_them(policy) -> None:
    """Little's law as an identity: both sides are the integral of the number in the batch."""
    requests = draw_requests(ANSWERS, 60, seed=7)
    result = simulate(requests, READING, policy, concurrency=5, rate=3.0)
    known, steps = result.requests, result.steps
    stop = steps["start"].iloc[-1] + steps["seconds"].iloc[-1]
    inside = (known["end"].fillna(stop) - known["start"]).sum()
    assert inside == pytest.approx((steps["seconds"] * steps["requests"]).sum())
    assert (steps["requests"] <= 5).all() and steps["requests"].nunique() > 1
    assert known["tokens"].sum() == steps["tokens"].sum()
    assert known["verified"].sum() == steps["verified"].sum()
    assert (np.diff(steps["start"]) >= steps["seconds"][:-1] - 1e-9).all()


def test_one_seed_gives_one_table_and_another_seed_another() -> None:
    tables = [
        load_table(with_probs(TRACE), READING, POLICIES, (1, 3), requests=15, seed=seed)
        for seed in (1, 1, 2)
    ]
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert (tables[0]["throughput"] != tables[2]["throughput"]).any()
    assert tables[0]["policy"].tolist() == [str(policy) for policy in POLICIES for _ in range(2)]
    assert tables[0]["concurrency"].tolist() == [1, 3] * len(POLICIES)


def test_all_policies_and_concurrencies_serve_the_same_requests() -> None:
    requests = draw_requests(ANSWERS, 20, seed=8)
    asked = ["request", "domain", "tokens"]
    seen = [
        simulate(requests, READING, policy, concurrency=size, rate=2.0).requests
        for policy in POLICIES
        for size in (1, 4)
    ]
    first = seen[0][seen[0]["measured"]]
    for other in seen:
        counted = other[other["measured"]]
        assert counted[asked].to_numpy().tolist() == first[asked].to_numpy().tolist()
        gaps = np.diff(counted["arrival"])
        assert gaps == pytest.approx(requests.gap[1:] / 2.0)


def test_a_row_of_the_table_is_a_simulation() -> None:
    options = {"rate": 2.5, "draft_length": 3, "warm_up": 4}
    drawing = {
        "answer_tokens": Geometric(9.0),
        "domains": {"code": 2.0, "chat": 1.0},
        "within": "domain",
        "seed": 5,
    }
    [row] = load_table(
        ANSWERS, ENGINE, {"mine": StaticThreshold(0.7)}, [3], requests=25, **options, **drawing
    ).to_dict("records")
    drawn = draw_requests(ANSWERS, 25, **drawing)
    result = simulate(drawn, ENGINE, StaticThreshold(0.7), concurrency=3, **options)
    assert row == {"policy": "mine", "concurrency": 3, **result.figures}


def test_policies_that_look_at_one_request_verify_the_same_at_any_load() -> None:
    """And the scheduler verifies less, the more requests share the step."""
    table = load_table(ANSWERS, READING, POLICIES, (1, 4, 16, 64), requests=60)
    asked = table.pivot(index="concurrency", columns="policy", values="verified_per_request")
    for policy in POLICIES[:-1]:
        assert asked[str(policy)].nunique() == 1
    assert (
        asked["fixed 2"].iloc[0]
        == 2 * table.set_index("policy").loc["fixed 2", "rounds_per_request"].iloc[0]
    )
    assert asked["prefix scheduler"].is_monotonic_decreasing
    assert asked["prefix scheduler"].nunique() == 4


def test_a_scheduler_sees_the_whole_steps_speed() -> None:
    seen = []

    def policy(confidence, engine):
        seen.append((len(confidence), engine(np.array([2, 7]))))
        return np.ones(len(confidence), dtype=int)

    requests = draw_requests(ANSWERS, 5)
    result = simulate(requests, engine_of(SPEED, (0.0, 0.1), 0.3), policy, concurrency=3)
    assert seen
    for size, speeds in seen:
        seconds = [0.1 * size + 0.3 + SPEED.seconds(b) for b in (2, 7)]
        assert speeds == pytest.approx([1 / each for each in seconds])
    assert (result.steps["verified"] == result.steps["requests"]).all()


def test_blocks_that_are_drafted_shorter_are_verified_no_further() -> None:
    requests = draw_requests(ANSWERS, 10)
    for policy in (StaticThreshold(0.0), FixedLength(2)):
        short = simulate(requests, ENGINE, policy, concurrency=2, draft_length=2)
        assert (short.steps["verified"] == 2 * short.steps["requests"]).all()
    with pytest.raises(ValueError, match="a block has 2 slots, got a policy that verifies 3"):
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
    confidence = 0.1 + answers.accept_prob / 2
    assert answers.confidence == pytest.approx(confidence)
    again = answers_of(trace_of(whole + ends), seed=3)
    assert (again.accept_prob == answers.accept_prob).all()


def test_answers_that_cut_their_last_round_do_not_make_rounds_look_short() -> None:
    """Answers of 12 tokens, slots that pass with 0.75: a round yields 3.05 tokens, cut or not."""
    rng = np.random.default_rng(0)
    rounds = []
    for prompt in range(1500):
        left = 12
        while left > 0:
            passes = (rng.random(4) < 0.75).astype(float)
            accepted = int(np.logical_and.accumulate(passes > 0).sum())
            if accepted >= left:
                rounds.append((prompt, passes.tolist(), left, left))
            else:
                rounds.append((prompt, passes.tolist(), 4, accepted))
            left -= min(accepted + 1, left)
    answers = answers_of(trace_of(rounds))
    truth = sum(0.75**k for k in range(5))
    yielded = 1 + np.multiply.accumulate(answers.accept_prob, axis=1).sum(axis=1)
    error = yielded.std(ddof=1) / math.sqrt(len(yielded))
    assert abs(yielded.mean() - truth) < FAR * error
    for naive in (
        [accepted + 1 for _, _, verified, accepted in rounds if verified == 4],
        [accepted + 1 for _, _, verified, accepted in rounds],
    ):
        assert truth - np.mean(naive) > 1.5 * FAR * error


def test_an_answer_has_the_tokens_that_its_rounds_yielded() -> None:
    """1 + 1 and 2 + 1; then 0 + 1 and 2 that ended it; then 0 + 1 alone, two slots left."""
    trace = trace_of(
        [
            (5, [0.5] * 3, 3, 1),
            (5, [0.5] * 3, 3, 2),
            (2, [0.5] * 3, 3, 0),
            (2, [0.5] * 3, 2, 2),
            (9, [0.5] * 2, 2, 0),
        ]
    )
    answers = answers_of(trace.sample(frac=1, random_state=0))
    assert answers.tokens.tolist() == [3, 5, 1]
    assert answers.count.tolist() == [2, 2, 1] and answers.first.tolist() == [0, 2, 4]
    assert set(draw_requests(answers, 50).tokens) == {1, 3, 5}


def test_calibrated_confidences_are_what_policies_see() -> None:
    scaling = SequentialTemperatures((2.0, 0.5, 1.0, 3.0))
    plain, scaled = answers_of(with_probs(TRACE)), answers_of(with_probs(TRACE), scaling)
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


def test_the_mix_changes_who_asks_and_nothing_else() -> None:
    one = draw_requests(ANSWERS, 50, seed=12, answer_tokens=20)
    other = draw_requests(ANSWERS, 50, seed=12, answer_tokens=20, domains={"code": 1.0})
    assert (one.gap == other.gap).all() and (one.conversation != other.conversation).any()


@settings(max_examples=50)
@given(mean=st.floats(1, 50), point=st.floats(0, 0.999999))
def test_geometric_lengths_are_the_quantiles_of_their_distribution(mean, point) -> None:
    """n is the least with P(length <= n) = 1 - (1 - 1/mean)^n above the point, but for rounding."""
    [length] = Geometric(mean).quantile(np.array([point])).tolist()
    assert length >= 1
    assert 1 - (1 - 1 / mean) ** length >= point - 1e-9
    assert length == 1 or 1 - (1 - 1 / mean) ** (length - 1) <= point + 1e-9


def test_a_shipped_trace_is_served_in_as_many_rounds_as_it_took() -> None:
    """Within 3 % and sampling error, all slots verified: the trace's rounds are one such run."""
    trace = load_traces()
    trace = trace[(trace["drafter"] == "dspark-k7") & (trace["temperature"] == 1)]
    requests = draw_requests(trace, 3000, seed=13)
    result = simulate(requests, READING, FixedLength(7), concurrency=100)
    rounds = result.requests.loc[result.requests["measured"], "rounds"]
    took = trace.groupby("prompt")["round"].nunique()
    error = rounds.std() / math.sqrt(len(rounds))
    assert abs(rounds.mean() - took.mean()) < 0.03 * took.mean() + FAR * error


def test_the_scheduler_beats_the_others_on_a_shipped_trace() -> None:
    """At each load, by 1 % at least over fixed 7, and never by less than nothing over plain.

    A speed of one token in 50 times the step's own costs: a smooth curve. Eight of 500 requests.
    """
    trace = load_traces()
    trace = trace[(trace["drafter"] == "dspark-k7") & (trace["temperature"] == 1)]
    policies = [FixedLength(0), FixedLength(7), StaticThreshold(0.6), PrefixScheduler()]
    engine = engine_of(line(0.02, 0.0004), draft=(0.003, 0.0))
    table = load_table(trace, engine, policies, (4, 16, 64))
    found = table.pivot(index="concurrency", columns="policy", values="throughput")
    for other in map(str, policies[:-1]):
        assert (found["prefix scheduler"] > found[other]).all()


@pytest.mark.parametrize(
    "verified, accepted, message",
    [
        (2, 1, "verified 2 of 3 slots"),
        (0, 0, "verified 0 of 3 slots"),
    ],
    ids=["rejected", "nothing"],
)
def test_a_trace_of_cut_rounds_is_refused(verified, accepted, message) -> None:
    trace = trace_of([(4, [0.5] * 3, 3, 3), (4, [0.5] * 3, verified, accepted)])
    with pytest.raises(ValueError, match=f"without a threshold or scheduler.* 4 that {message}"):
        answers_of(trace)


def test_a_domain_without_a_whole_round_is_refused() -> None:
    trace = trace_of([(0, [0.5] * 3, 3, 3), (1, [0.5] * 3, 1, 1)])
    trace.loc[trace["prompt"] == 1, "domain"] = "chat"
    with pytest.raises(ValueError, match="a round of domain 'chat' that verified 3 slots"):
        answers_of(trace)


def test_a_trace_of_several_runs_is_refused() -> None:
    with pytest.raises(ValueError, match="every run a trace of its own"):
        draw_requests(load_traces(), 5)


def test_without_confidences_only_fixed_lengths_serve() -> None:
    requests = draw_requests(with_probs(TRACE).assign(confidence=math.nan), 5)
    assert simulate(requests, READING, FixedLength(2), concurrency=2).figures["throughput"] > 0
    for policy in (StaticThreshold(0.5), PrefixScheduler()):
        with pytest.raises(ValueError, match=f"{policy} needs confidences"):
            simulate(requests, READING, policy, concurrency=2)


@pytest.mark.parametrize(
    "domains, message",
    [
        ({"law": 1}, r"among \['chat', 'code'\], got 'law'"),
        ({"code": 0}, "domains must have a weight above 0"),
    ],
)
def test_a_mix_that_is_none_is_refused(domains, message) -> None:
    with pytest.raises(ValueError, match=message):
        draw_requests(ANSWERS, 5, domains=domains)


@pytest.mark.parametrize(
    "policy, message",
    [
        (FixedLength(5), "a block has 4 slots, got a policy that verifies 5"),
        (lambda c, s: np.ones(1), "whole number of slots for each of 2 requests"),
        (lambda c, s: None, "whole number of slots for each of 2 requests, got None"),
        (lambda c, s: np.array([5, 0]), r"must verify 0 to 4 slots, got \[5, 0\]"),
        (lambda c, s: np.array([0, -1]), r"must verify 0 to 4 slots, got \[0, -1\]"),
    ],
    ids=["long", "floats", "None", "too many", "negative"],
)
def test_a_policy_that_cannot_be_is_refused(policy, message) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(draw_requests(ANSWERS, 3), ENGINE, policy, concurrency=2)
