"""Speed-up: rounds enumerated one by one, traces counted again by loops, a made-up clock.

The oracle of a round is the list of what can become of it, each with its probability, tokens and
seconds. No test reads a real clock: where decoding is timed, each call of a model takes so many
made-up seconds.
"""

import math
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspark_lab import serving
from dspark_lab.decoding import decode, loop
from dspark_lab.model import Drafter, Target
from dspark_lab.pairs import load_traces
from dspark_lab.rates import SequentialTemperatures, threshold_sweep
from dspark_lab.serving import AcceptanceProfile, RoundCosts, acceptance_profile, speedup_table
from tests.samples import tell_clock, tiny_drafter, tiny_target
from tests.traces import PROBABILITY, SLOTS, TRACE, Made, made_trace, rounds_by_hand, trace_of

pytestmark = pytest.mark.usefixtures("one_thread")

# Numbers of which no two sums are alike.
COSTS = RoundCosts(
    plain_seconds=1.0,
    draft_seconds=(0.1, 0.13, 0.17, 0.19),
    verify_seconds=(1.0, 1.1, 1.3, 1.6, 2.0),
    replay_seconds=(0.9, 1.07, 1.21, 1.55),
    rollback_seconds=0.031,
    overhead_seconds=0.057,
)
SECONDS = st.floats(0.01, 3)


def ended_early(trace: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """As the ends of answers cut rounds: every third one, in one of two ways.

    By a limit, slots are left out; behind an accepted end of turn they stand there unverified.
    """
    rounds, kind = trace.groupby(["prompt", "round"]), trace["round"] % 3
    end = np.random.default_rng(seed).integers(1, SLOTS + 1, rounds.ngroups)[rounds.ngroup()]
    behind = trace["slot"] >= end
    over = behind & (kind == 1) & (end <= rounds["accepted"].transform("sum"))
    flags = {name: trace[name] & ~over for name in ("verified", "accepted")}
    ended = trace.assign(**flags, accept_rate=trace["accept_rate"].mask(over))
    return ended[~(behind & (kind == 0))].reset_index(drop=True)


ENDED = ended_early(TRACE)


def outcomes(rates: Sequence[float]) -> list[tuple[int, float]]:
    """How many of a block are accepted, and how often."""
    found, alive = [], 1.0
    for accepted, rate in enumerate(rates):
        found.append((accepted, alive * (1 - rate)))
        alive *= rate
    return [*found, (len(rates), alive)]


def by_hand(costs: RoundCosts, rates: Sequence[float], forget: str = "") -> tuple[float, float]:
    """Tokens and seconds of a round that drafts and verifies a token for each of the rates."""
    tokens = seconds = 0.0
    k = len(rates)
    for accepted, chance in outcomes(rates):
        spent = costs.draft_seconds[k - 1] + costs.verify_seconds[k]
        if "overhead" not in forget:
            spent += costs.overhead_seconds
        if accepted < k and "replay" not in forget:
            spent += costs.rollback_seconds
            spent += costs.replay_seconds[accepted] if costs.replay_seconds else 0
        tokens += chance * (accepted + 1)
        seconds += chance * spent
    return tokens, seconds


@settings(max_examples=60)
@given(
    rates=st.lists(PROBABILITY, min_size=1, max_size=4),
    draft=st.lists(SECONDS, min_size=4, max_size=4),
    verify=st.lists(SECONDS, min_size=5, max_size=5),
    replay=st.one_of(st.just([]), st.lists(SECONDS, min_size=4, max_size=4)),
    rest=st.tuples(SECONDS, SECONDS, SECONDS),
)
def test_speed_is_that_of_all_that_can_become_of_a_round(
    rates, draft, verify, replay, rest
) -> None:
    plain, rollback, overhead = rest
    costs = RoundCosts(plain, draft, verify, replay, rollback, overhead)
    table = speedup_table(AcceptanceProfile.of(rates), costs)
    assert table["draft_length"].tolist() == list(range(1, len(rates) + 1))
    for row in table.itertuples():
        drafted = rates[: row.draft_length]
        tokens, seconds = by_hand(costs, drafted)
        assert row.tau == pytest.approx(tokens)
        assert row.round_seconds == pytest.approx(seconds)
        assert row.tokens_per_second == pytest.approx(tokens / seconds)
        for name, forget in (
            ("speedup", ""),
            ("without_replay", "replay"),
            ("without_overhead", "replay, overhead"),
        ):
            tokens, seconds = by_hand(costs, drafted, forget)
            assert getattr(row, name) == pytest.approx(plain * tokens / seconds)
        assert row.speedup <= row.without_replay <= row.without_overhead
        assert row.break_even_rate == serving.break_even(costs, row.draft_length)
        # Forgetting the replay puts the break-even too low.
        forgotten = serving.break_even(costs.cutting(), row.draft_length)
        assert row.break_even_without_replay == forgotten
        assert row.break_even_without_replay <= row.break_even_rate + 1e-9
        parts = [n for n in table if n.endswith("_seconds") and n != "round_seconds"]
        assert len(parts) == 5
        assert sum(getattr(row, n) for n in parts) == pytest.approx(row.round_seconds)


def test_the_best_length_is_the_fastest_and_none_where_nothing_pays() -> None:
    profile = AcceptanceProfile.of([0.9, 0.8, 0.7, 0.6])
    table = speedup_table(profile, COSTS)
    speeds = table.set_index("draft_length")["speedup"].to_dict()
    assert serving.best_length(profile, COSTS) == max(speeds, key=speeds.__getitem__)
    assert serving.best_length(profile, COSTS, [2, 1]) == max([2, 1], key=speeds.__getitem__)
    assert serving.best_length(AcceptanceProfile.of([0.1] * 4), COSTS) == 0
    dear = RoundCosts.of(4, plain_seconds=1, draft_seconds=9, verify_seconds=1)
    assert serving.best_length(AcceptanceProfile.of([1.0] * 4), dear) == 0


def yielded_by_hand(rates: Sequence[float], left: int) -> float:
    """Rounds that an answer still takes, each way that each round can fall tried in turn."""
    if left <= 0:
        return 0.0
    # No round drafts more than is left behind the target's own token.
    drafted = rates[: max(0, left - 1)]
    return 1 + sum(
        chance * yielded_by_hand(rates, left - accepted - 1)
        for accepted, chance in outcomes(drafted)
        if chance
    )


@settings(max_examples=40)
@given(rates=st.lists(PROBABILITY, min_size=1, max_size=3), tokens=st.integers(1, 7))
def test_tau_of_short_answers_counts_their_cut_rounds(rates, tokens) -> None:
    profile = AcceptanceProfile.of(rates)
    expected = tokens / yielded_by_hand(rates, tokens)
    assert profile.tau(len(rates), tokens) == pytest.approx(expected)
    assert profile.tau(len(rates), tokens) <= profile.tau(len(rates)) + 1e-9
    assert profile.tau(len(rates), 3000) == pytest.approx(profile.tau(len(rates)), rel=2e-3)


def test_short_answers_make_long_blocks_pay_less() -> None:
    profile = acceptance_profile(TRACE, resamples=30)
    costs = COSTS.cutting()
    endless = speedup_table(profile, costs).set_index("draft_length")
    for tokens in (5, [5], [5, 5, 5]):
        table = speedup_table(profile, costs, tokens=tokens).set_index("draft_length")
        for k, row in table.iterrows():
            tau = profile.tau(k, 5)
            assert row["tau"] == pytest.approx(tau)
            for name in ("speedup", "tokens_per_second", "without_replay", "without_overhead"):
                expected = endless.loc[k, name] * tau / profile.tau(k)
                assert row[name] == pytest.approx(expected)
            survival = profile.sampled_survival(k)
            sampled = [AcceptanceProfile.of(chain_of(one)).tau(k, 5) for one in survival]
            assert row["tau_low"] == pytest.approx(np.quantile(sampled, 0.025))
            seconds = row["draft_seconds"] + row["verify_seconds"] + row["overhead_seconds"]
            assert row["round_seconds"] == pytest.approx(seconds)
    assert (table["tau"].diff() < endless["tau"].diff())[1:].all()
    # Free verification: the longer the better, but not where an answer has two tokens more.
    costs = RoundCosts.of(4, plain_seconds=1, draft_seconds=[0.1, 0.2, 0.3, 0.4], verify_seconds=1)
    sure = AcceptanceProfile.of([1.0] * 4)
    assert serving.best_length(sure, costs) == 4
    assert serving.best_length(sure, costs, tokens=2) == 1
    assert serving.advice(sure, costs, tokens=2).startswith("Draft 1 a round: 1.82 times")
    with pytest.raises(ValueError, match="tokens must be >= 1, got 0"):
        serving.best_length(sure, costs, tokens=0)


def chain_of(survival: np.ndarray) -> list[float]:
    """Rates that survive so."""
    return (survival / np.append(1, survival[:-1])).tolist()


def counted(
    trace: pd.DataFrame, prompts: Sequence[int] | None = None, k: int = SLOTS
) -> list[float]:
    """Of each slot of rounds of k, mean c* over the drafted tokens that fall on it.

    Conversation by conversation, and token by token: those of a run, from one rejection to the
    next, are dealt to rounds of k slots and the target's own token.
    """
    blocks = rounds_by_hand(trace)
    top, bottom = [0.0] * (k + 1), [0] * (k + 1)
    for prompt in sorted(set(trace["prompt"])) if prompts is None else prompts:
        token = 0
        for own, number in sorted(blocks):
            if own != prompt:
                continue
            going = 0
            for row in blocks[own, number]:
                if not row.verified:
                    break
                top[token % (k + 1)] += row.accept_rate
                bottom[token % (k + 1)] += 1
                if not row.accepted:
                    break
                going, token = going + 1, token + 1
            # Behind a whole block stands the target's own token.
            token = token + 1 if going == SLOTS else 0
    return [a / b if b else math.nan for a, b in zip(top[:k], bottom[:k], strict=True)]


@pytest.mark.parametrize("trace", [TRACE, ENDED], ids=["whole", "ended"])
def test_a_profile_is_the_rates_of_reached_slots(trace) -> None:
    profile = acceptance_profile(trace, resamples=30, seed=3)
    assert profile.rates.tolist() == pytest.approx(counted(trace))
    assert profile.survival.tolist() == pytest.approx(np.cumprod(counted(trace)).tolist())
    for k in range(1, SLOTS + 1):
        rates = counted(trace, k=k)
        assert profile.by_length[k - 1, :k].tolist() == pytest.approx(rates)
        assert np.isnan(profile.by_length[k - 1, k:]).all()
        assert profile.survival_of(k).tolist() == pytest.approx(np.cumprod(rates).tolist())
        assert profile.tau(k) == pytest.approx(1 + sum(np.cumprod(rates)))
    assert profile.conversations == 12
    times = np.random.default_rng(3).multinomial(12, [1 / 12] * 12, size=30)
    for sample, drawn in zip(profile.samples, times, strict=True):
        again = [prompt for prompt, often in enumerate(drawn) for _ in range(often)]
        for k in range(1, SLOTS + 1):
            assert sample[k - 1, :k].tolist() == pytest.approx(counted(trace, again, k))
    table = profile.table()
    whole = profile.samples[:, -1]
    for name, values in (("rate", whole), ("survival", np.cumprod(whole, axis=1))):
        low, high = np.quantile(values, [0.025, 0.975], axis=0)
        assert table[f"{name}_low"].tolist() == pytest.approx(low.tolist())
        assert table[f"{name}_high"].tolist() == pytest.approx(high.tolist())
    speeds = speedup_table(profile, COSTS)
    sampled = [
        [by_hand(COSTS, sample[k - 1, :k]) for k in range(1, SLOTS + 1)]
        for sample in profile.samples
    ]
    each = np.array([[tokens / seconds for tokens, seconds in row] for row in sampled])
    low, high = np.quantile(each, [0.025, 0.975], axis=0)
    assert speeds["speedup_low"].tolist() == pytest.approx(low.tolist())
    assert speeds["speedup_high"].tolist() == pytest.approx(high.tolist())
    fastest = each.argmax(axis=1).tolist()
    share = [fastest.count(k) / 30 for k in range(SLOTS)]
    assert speeds["best_share"].tolist() == pytest.approx(share)


def rounds_in_text(easy: Sequence[bool], k: int) -> list[int]:
    """How many of k are accepted in each round, where a drafted token is iff it is easy."""
    accepted, token = [], 0
    while token + k < len(easy):
        going = list(easy[token : token + k])
        accepted.append(going.index(False) if False in going else k)
        token += accepted[-1] + 1
    return accepted


@given(st.lists(st.booleans(), min_size=6, max_size=60), st.sampled_from([1, 2]))
@example([True] * 40 + [False] * 20, 2)
def test_short_blocks_are_accepted_as_the_text_is_easy(easy, k) -> None:
    """Rounds of one or two slots end where those of five do, so that nothing is left to guess."""
    whole = rounds_in_text(easy, 5)
    rates = ([float(slot < accepted) for slot in range(5)] for accepted in whole)
    trace = trace_of(Made(0, [0.5] * 5, one, 5, int(sum(one))) for one in rates)
    profile = acceptance_profile(trace, resamples=1)
    tokens = sum(accepted + 1 for accepted in whole)
    short = rounds_in_text([*easy[:tokens], *[True] * k], k)
    assert sum(accepted + 1 for accepted in short) == tokens
    for slot, rate in enumerate(profile.by_length[k - 1, :k]):
        reached = [accepted > slot for accepted in short if accepted >= slot]
        assert rate == pytest.approx(np.mean(reached) if reached else math.nan, nan_ok=True)


def test_between_two_temperatures_rates_are_linear() -> None:
    cold = acceptance_profile(TRACE, temperature=0.0, resamples=20)
    hot = acceptance_profile(made_trace(5), temperature=0.8, resamples=20)
    warm = cold.between(hot, 0.2)
    assert warm.temperature == 0.2 and warm.conversations == 12
    assert warm.rates.tolist() == pytest.approx((0.75 * cold.rates + 0.25 * hot.rates).tolist())
    expected = 0.75 * cold.samples + 0.25 * hot.samples
    np.testing.assert_allclose(warm.samples, expected)
    assert cold.between(hot, 0.8).rates.tolist() == hot.rates.tolist()
    for other, temperature in ((hot, 0.9), (cold, 0.0), (acceptance_profile(TRACE), 0.2)):
        with pytest.raises(
            ValueError, match="between those of two profiles, a colder and a hotter"
        ):
            cold.between(other, temperature)
    with pytest.raises(ValueError, match=r"as many samples and slots, got \[\[20, 4, 4\], \[9, "):
        cold.between(acceptance_profile(TRACE, temperature=1.0, resamples=9), 0.5)


def test_rounds_that_the_end_of_an_answer_cut_do_not_lower_tau() -> None:
    """What is left of the rounds says the same; a mean over rounds would be 0.4 tokens too low.

    Both estimates have an error of about 0.03.
    """
    whole = acceptance_profile(TRACE, resamples=1)
    ended = acceptance_profile(ENDED, resamples=1)
    mean = 1 + ENDED["accepted"].sum() / len(rounds_by_hand(ENDED))
    assert ended.tau(SLOTS) == pytest.approx(whole.tau(SLOTS), abs=0.1)
    assert mean < whole.tau(SLOTS) - 0.3


def test_behind_a_rate_of_nothing_nothing_is_missing() -> None:
    never = acceptance_profile(TRACE.assign(accepted=False, accept_rate=0.0), resamples=5)
    assert never.rates[0] == 0 and np.isnan(never.rates[1:]).all()
    assert never.survival.tolist() == [0.0] * SLOTS
    assert never.tau(SLOTS) == 1.0
    # Where every answer ends at the first slot, nobody knows of the second one.
    first = TRACE["slot"] == 0
    ended = TRACE.assign(
        verified=first,
        accepted=first & TRACE["accepted"],
        accept_rate=TRACE["accept_rate"].where(first),
    )[lambda trace: trace.groupby(["prompt", "round"])["accepted"].transform("any")]
    short = acceptance_profile(ended, resamples=5)
    assert np.isnan(short.survival[1:]).all() and short.rates[0] > 0
    free = RoundCosts.of(SLOTS, plain_seconds=1, draft_seconds=0, verify_seconds=1)
    assert speedup_table(short, free)["speedup"].notna().tolist() == [True] + [False] * 3
    assert serving.best_length(short, free) == 1


def test_a_trace_is_of_one_drafter_at_one_temperature() -> None:
    hot = made_trace(7, range(4), 10).assign(temperature=1.0, drafter="a")
    cold = made_trace(8, range(4), 10).assign(temperature=0.0, drafter="a")
    other = made_trace(9, range(4), 10).assign(temperature=0.0, drafter="b")
    several = pd.concat([hot, cold, other], ignore_index=True)
    for options, message in (
        ({}, r"of one drafter, or .* say which, got \['a', 'b'\]"),
        ({"drafter": "a"}, r"of one temperature, .* got \[0.0, 1.0\]"),
        ({"drafter": "a", "temperature": 0.5}, r"temperature must be one of .*\], got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            acceptance_profile(several, **options)
    chosen = acceptance_profile(several, drafter="a", temperature=1)
    assert chosen.rates.tolist() == acceptance_profile(hot).rates.tolist()
    assert (chosen.drafter, chosen.temperature) == ("a", 1)
    alone = acceptance_profile(cold)
    assert (alone.drafter, alone.temperature) == ("a", 0.0)
    unlabelled = acceptance_profile(TRACE, temperature=0.7, resamples=1)
    assert (unlabelled.drafter, unlabelled.temperature) == (None, 0.7)


def test_a_trace_cut_by_a_threshold_is_refused() -> None:
    cut = TRACE.copy()
    rejected = (cut["prompt"] == 3) & (cut["slot"] == 1) & ~cut["accepted"]
    number = cut["round"][rejected].iloc[0]
    behind = (cut["prompt"] == 3) & (cut["round"] == number) & (cut["slot"] > 1)
    cut.loc[behind, ["verified", "accepted"]] = False
    with pytest.raises(ValueError, match="of whole blocks, without a threshold .* of prompt 3"):
        acceptance_profile(cut)
    with pytest.raises(ValueError, match="of whole blocks"):
        serving.threshold_table(cut, COSTS)
    # A drafter without a confidence head leaves no confidences.
    with pytest.raises(ValueError, match="of whole blocks"):
        acceptance_profile(cut.assign(confidence=math.nan))
    with pytest.raises(ValueError, match="trace must have a verified slot, got none"):
        acceptance_profile(TRACE.assign(verified=False, accepted=False))


def threshold_by_hand(trace: pd.DataFrame, threshold: float, k: int) -> tuple[list[float], ...]:
    """How often each slot is verified, accepted, rejected: each step over the rounds at risk.

    A round is at risk of being stopped at a slot if it has the slot and was not stopped before; its
    slot is at risk of a rejection if, besides, all before it were accepted and the answer goes on.
    """
    asked, taken, refused = [], [], []
    going = alive = 1.0
    for slot in range(k):
        have = passed = reached = 0
        accepted = rejected = 0.0
        for block in rounds_by_hand(trace).values():
            if len(block) <= slot or any(row.confidence < threshold for row in block[:slot]):
                continue
            sure = block[slot].confidence >= threshold
            have += 1
            passed += sure
            if all(row.accepted for row in block[:slot]) and block[slot].verified:
                reached += 1
                if sure:
                    accepted += block[slot].accept_rate
                    rejected += 1 - block[slot].accept_rate
        refused.append(alive * rejected / reached if reached else 0.0)
        going *= passed / have if have else 0.0
        alive *= accepted / reached if reached else 0.0
        asked.append(going)
        taken.append(alive)
    return asked, taken, refused


@pytest.mark.parametrize("trace", [TRACE, ENDED], ids=["whole", "ended"])
def test_thresholds_are_replayed_round_by_round(trace) -> None:
    thresholds = [0.0, 0.4, float(trace["confidence"][7]), 0.7, 0.99, 1.0]
    options = {"thresholds": thresholds, "draft_lengths": [2, 4], "resamples": 9}
    table = serving.threshold_table(trace, COSTS, **options)
    assert table["threshold"].tolist() == thresholds * 2
    for row in table.itertuples():
        k = row.draft_length
        asked, taken, refused = threshold_by_hand(trace, row.threshold, k)
        verified = [1.0, *asked, 0.0]
        verify = sum(
            (verified[n] - verified[n + 1]) * COSTS.verify_seconds[n] for n in range(k + 1)
        )
        replay = sum(a * b for a, b in zip(refused, COSTS.replay_seconds, strict=False))
        assert row.verified == pytest.approx(sum(asked))
        assert row.tau == pytest.approx(1 + sum(taken))
        assert row.verify_seconds == pytest.approx(verify)
        assert row.replay_seconds == pytest.approx(replay)
        seconds = COSTS.draft_seconds[k - 1] + verify + replay
        seconds += COSTS.overhead_seconds + COSTS.rollback_seconds * sum(refused)
        assert row.speedup == pytest.approx((1 + sum(taken)) / seconds)
        assert row.speedup_low <= row.speedup_high


@pytest.mark.parametrize("trace", [TRACE, ENDED], ids=["whole", "ended"])
def test_a_threshold_of_nothing_is_a_fixed_length(trace) -> None:
    drawn = {"resamples": 40, "seed": 5}
    loose = serving.threshold_table(trace, COSTS, thresholds=[0.0], **drawn)
    fixed = speedup_table(acceptance_profile(trace, **drawn), COSTS, [SLOTS])
    shared = [name for name in loose if name in fixed]
    assert len(shared) == len(loose.columns) - 2
    pd.testing.assert_frame_equal(loose[shared], fixed[shared])
    assert loose["verified"].tolist() == [SLOTS]


def test_whole_rounds_are_swept_as_the_sweep_sweeps_them() -> None:
    """With outcomes in place of c*, both count the same slots."""
    plain = TRACE.assign(accept_rate=TRACE["accepted"].astype(float))
    scaling = SequentialTemperatures((2.0, 0.5, 1.0, 3.0))
    for calibrated in (None, scaling):
        mine = serving.threshold_table(plain, COSTS, calibrated=calibrated, resamples=1)
        sweep = threshold_sweep(plain, calibrated=calibrated, resamples=1)
        assert mine["threshold"].tolist() == sweep["threshold"].tolist()
        assert mine["verified"].tolist() == pytest.approx(sweep["verified"].tolist())
        assert (mine["tau"] - 1).tolist() == pytest.approx(sweep["accepted"].tolist())


def test_the_best_threshold_is_the_fastest_of_all() -> None:
    options = {"thresholds": [step / 10 for step in range(11)], "resamples": 20, "seed": 2}
    table = serving.threshold_table(ENDED, COSTS, draft_lengths=[1, 2, 3, 4], **options)
    best = serving.best_threshold(ENDED, COSTS, **options)
    row = table.loc[table["speedup"].idxmax()]
    pd.testing.assert_series_equal(best, row, check_names=False)
    fixed = speedup_table(acceptance_profile(ENDED, resamples=1), COSTS)["speedup"].max()
    assert best["speedup"] > fixed
    # Figures of other conversations, by the choice of these.
    other = made_trace(11, range(100, 106))
    shown = serving.best_threshold(ENDED, COSTS, test=other, **options)
    options |= {"thresholds": [best["threshold"]], "draft_lengths": [int(best["draft_length"])]}
    again = serving.threshold_table(other, COSTS, **options).iloc[0]
    pd.testing.assert_series_equal(shown, again, check_names=False)


def speedup_at(costs: RoundCosts, rate: float, k: int) -> float:
    tokens, seconds = by_hand(costs, [rate] * k)
    return costs.plain_seconds * tokens / seconds


@settings(max_examples=80)
@given(
    k=st.integers(1, 4),
    draft=SECONDS,
    verify=st.lists(SECONDS, min_size=5, max_size=5),
    replay=st.one_of(st.just([]), st.lists(SECONDS, min_size=4, max_size=4)),
    rest=st.tuples(SECONDS, st.sampled_from([0.0, 0.2]), SECONDS),
)
# Pays, does not, and pays again.
@example(2, 0.0, [1.0] * 5, [0.05, 3.0, 1.0, 1.0], (1.2, 0.0, 0.0))
def test_from_the_break_even_rate_on_drafting_pays(k, draft, verify, replay, rest) -> None:
    plain, rollback, overhead = rest
    costs = RoundCosts(plain, (draft,) * 4, verify, replay, rollback, overhead)
    found = serving.break_even(costs, k)
    if math.isinf(found):
        assert speedup_at(costs, 1.0, k) < 1
        return
    assert 0 <= found <= 1 and speedup_at(costs, 1.0, k) >= 1 - 1e-12
    if found > 0:
        assert speedup_at(costs, found, k) == pytest.approx(1)
        assert speedup_at(costs, found - 1e-4, k) < 1 + 1e-9 or found < 1e-4
    for step in range(1, 51):
        rate = found + (1 - found) * step / 50
        assert speedup_at(costs, rate, k) >= 1 - 1e-9
    if not replay and rollback == 0:
        fixed = draft + verify[k] + overhead
        assert found == serving.break_even_rate(fixed / plain, k)


def test_costs_can_be_given_as_numbers_lists_and_functions() -> None:
    costs = RoundCosts.of(
        3, plain_seconds=2, draft_seconds=0.5, verify_seconds=lambda n: 1 + n, replay=True
    )
    assert costs.draft_seconds == (0.5,) * 3
    assert costs.verify_seconds == (2, 3, 4, 5)
    assert costs.replay_seconds == (2, 3, 4) and costs.longest == 3
    assert costs.cutting().replay_seconds == ()
    assert COSTS.cutting().rollback_seconds == 0
    assert COSTS.replaying().rollback_seconds == COSTS.rollback_seconds
    listed = RoundCosts.of(2, plain_seconds=1, draft_seconds=[1, 2, 3], verify_seconds=[3, 4, 5])
    assert (listed.draft_seconds, listed.verify_seconds) == ((1, 2), (3, 4, 5))


GIVEN = {"plain_seconds": 1, "draft_seconds": (1, 1), "verify_seconds": (1, 1, 1)}
THREE = AcceptanceProfile.of([0.5] * 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: RoundCosts(**(GIVEN | {"verify_seconds": (1, 1)})), "of one more, got 2 and 2"),
        (lambda: RoundCosts(**GIVEN, replay_seconds=(1,)), "of no length or of 2, got 1"),
        (lambda: RoundCosts.of(3, **GIVEN), "seconds must be given for 3 lengths, got 2"),
        (lambda: speedup_table(THREE, COSTS, [4]), "draft_length must be at most 3, got 4"),
        (lambda: speedup_table(THREE, COSTS, []), "at least one length, got none"),
        (lambda: AcceptanceProfile.of([1.5]), "rates must lie in"),
        (lambda: serving.threshold_table(TRACE, COSTS, thresholds=[2.0]), "thresholds must lie in"),
    ],
)
def test_costs_and_lengths_that_are_none_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_advice_says_what_to_do_and_why() -> None:
    plain = AcceptanceProfile.of([0.8, 0.7, 0.6, 0.5], temperature=0.0)
    costs = RoundCosts.of(4, plain_seconds=1, draft_seconds=0.1, verify_seconds=1)
    assert serving.advice(plain, costs) == (
        "Draft 4 a round: 2.60 times the speed of plain decoding at temperature 0, with 2.86 "
        "tokens a round: slots are accepted at a rate of 0.72, and it pays from 0.09 on; 3 comes "
        "next with 2.45."
    )
    measured = serving.advice(acceptance_profile(TRACE), costs)
    assert re.search(r" \(\d.\d\d to \d.\d\d\) times .* in 100% of resamples\.$", measured)
    assert "temperature" not in measured
    slow = AcceptanceProfile.of([0.3] * 4, temperature=1.0)
    assert serving.advice(slow, costs.replaying()) == (
        "Do not draft: even the best length, 1, gives 0.72 times the speed of plain decoding at "
        "temperature 1: slots are accepted at a rate of 0.30, and it pays from 0.55 on; "
        "without the cost of rejections it would be 1.18."
    )
    hopeless = RoundCosts.of(4, plain_seconds=1, draft_seconds=9, verify_seconds=1)
    assert serving.advice(plain, hopeless).endswith("a rate of 0.72, and no accept rate would pay.")


def test_a_win_at_temperature_0_vanishes_at_1() -> None:
    """SmolLM2 and its shipped drafter, at costs of round numbers: a draft takes 0.4 plain steps,
    and each token more that is verified 0.1."""
    costs = RoundCosts.of(
        7, plain_seconds=1, draft_seconds=0.4, verify_seconds=lambda n: 0.9 + 0.1 * n
    )
    trace = load_traces("smollm2")
    cut = serving.temperature_table(trace, costs, resamples=100)
    assert cut["temperature"].tolist() == [0.0, 0.7, 1.0]
    assert cut["draft_length"].nunique() == 1
    assert cut["speedup"].is_monotonic_decreasing
    assert cut["speedup_low"][0] > 1.1 and cut["speedup_high"][2] < 1
    assert cut["best_length"][0] == cut["draft_length"][0] and cut["best_length"][2] == 0
    for row in cut.itertuples():
        profile = acceptance_profile(trace, temperature=row.temperature, resamples=100)
        assert row.best_length == serving.best_length(profile, costs)
        table = serving.speedup_table(profile, costs).set_index("draft_length")
        chosen = [np.nan, np.nan]
        if row.best_length:
            chosen = table.loc[row.best_length, ["speedup_low", "speedup_high"]].tolist()
        np.testing.assert_array_equal([row.best_speedup_low, row.best_speedup_high], chosen)
        assert row.tau == pytest.approx(profile.tau(row.draft_length))
        assert serving.break_even_rate(row.tau, row.draft_length) == row.accept_rate
    again = serving.temperature_table(trace, costs.replaying(), draft_length=3, resamples=100)
    assert again["draft_length"].tolist() == [3] * 3
    # Who reads again wins at no temperature; who forgets that sees the win above.
    assert (again["speedup_high"] < 1).all() and (again["best_length"] == 0).all()
    assert (again["best_speedup"] == 1).all() and again["without_replay"][0] > 1.1
    each = serving.temperature_table(
        trace, {0.0: costs, 0.7: costs, 1.0: costs.replaying()}, draft_length=3, resamples=100
    )
    assert each["speedup"][0] == again["without_replay"][0]
    assert each["speedup"][2] == again["speedup"][2]
    with pytest.raises(ValueError, match=r"costs must be of every temperature, got none of \[0.7"):
        serving.temperature_table(trace, {0.0: costs})
    profiles = [acceptance_profile(trace, temperature=t, resamples=100) for t in (1.0, 0.0, 0.7)]
    pd.testing.assert_frame_equal(serving.temperature_table(profiles, costs), cut)
    for wrong in ([], profiles[:1] * 2, [AcceptanceProfile.of([0.5])]):
        with pytest.raises(ValueError, match="each of another known temperature"):
            serving.temperature_table(wrong, costs)


@pytest.mark.parametrize("replay", [False, True])
def test_predicted_is_what_decoding_then_does(replay, monkeypatch) -> None:
    """By a clock that is told, so that only tokens are left to chance: tau within 3.3 errors of the
    prediction, by which one right one in 1,000 would be refused, and the speed-up about as far off
    as tau is."""
    seconds = {
        (Target, "advance"): lambda _, ids, *__: 1 + ids.shape[1] / 8,
        (Drafter, "propose"): lambda *_: 0.5,
        (Drafter, "read"): lambda *_: 0.25,
        # Reading again has no use for a distribution.
        (loop, "distribution"): lambda *_: 0.5,
    }
    tell_clock(monkeypatch, seconds)
    target, drafter = tiny_target(), tiny_drafter()
    prompts = torch.randint(60, (20, 4), generator=torch.Generator().manual_seed(0)).tolist()
    parts = []
    temperatures = (3.0,) if replay else (1.0, 3.0)
    for temperature in temperatures:
        drawn = decode(target, drafter, prompts, temperature=temperature, max_new_tokens=40, seed=5)
        parts.append(drawn.trace.assign(temperature=temperature))
    trace = pd.concat(parts)
    options = {"repeats": 2, "max_new_tokens": 28, "resamples": 200, "draft_lengths": [1, 3]}
    options |= {"temperatures": temperatures, "replay": replay}
    table = serving.decode_check(target, drafter, prompts[:5], trace, **options)
    assert table["draft_length"].tolist() == [1, 3] * len(temperatures)
    for row in table.itertuples():
        assert row.tau_error == row.tau / row.tau_decoded - 1
        # A number between 1 and K + 1 with mean tau varies by (tau - 1) * (K + 1 - tau) at most.
        most = (row.tau_decoded - 1) * (row.draft_length + 1 - row.tau_decoded)
        error = math.hypot((row.tau_high - row.tau_low) / 4, math.sqrt(most / row.rounds))
        assert abs(row.tau - row.tau_decoded) < 3.3 * error
        assert row.speedup_error == row.speedup / row.speedup_decoded - 1
        # An answer's last round, one in ten here, costs less than the others.
        assert abs(row.speedup_error) < 1.5 * abs(row.tau_error) + 0.05
        assert (row.without_replay > 1.05 * row.speedup) == replay
        assert row.without_overhead > row.without_replay
    # The last row's answers once more: tau is predicted for their lengths.
    profile = acceptance_profile(trace, temperature=3.0, resamples=1)
    options = {"temperature": 3.0, "max_new_tokens": 28, "draft_length": 3}
    tokens = rounds = 0.0
    for number, prompt in enumerate(prompts[:5]):
        answer = decode(target, drafter, [prompt], seed=number, **options).tokens[0]
        tokens += len(answer) - 1
        rounds += (len(answer) - 1) / profile.tau(3, len(answer) - 1) if answer[1:] else 0
    assert table["tau"].iloc[-1] == pytest.approx(tokens / rounds)


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=8))
def test_rates_are_found_again_from_their_survival(rates: list[float]):
    survival = np.cumprod(rates)
    found = AcceptanceProfile.of_survival(survival.tolist(), temperature=0.5)
    np.testing.assert_allclose(found.rates, rates)
    np.testing.assert_allclose(found.survival, survival)
    assert found.temperature == 0.5 and found.tau(len(rates)) == pytest.approx(1 + survival.sum())


def test_survival_that_rises_is_refused():
    with pytest.raises(ValueError, match="of slot 2 be at most 0.3, got 0.4"):
        AcceptanceProfile.of_survival([0.5, 0.3, 0.4])
