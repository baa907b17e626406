"""The advised length against decoded ones: a made-up clock, hand-made runs, simulated noise."""

import itertools

import numpy as np
import pandas as pd
import pytest

from dspark_lab import serving
from dspark_lab.decoding import decode, decode_rounds, loop
from dspark_lab.model import Drafter, Target
from dspark_lab.serving import AcceptanceProfile, RoundCosts, decode_lengths, turns
from tests.samples import tell_clock, tiny_drafter, tiny_target

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10], [11, 12]]


def decoded(speeds: np.ndarray, tokens: int = 60, requests: int = 1) -> pd.DataFrame:
    """Runs of as many tokens at these speeds, ``[group, length]``."""
    rows = [
        (0, group, k, requests, tokens, tokens // (k + 1), tokens / speed)
        for (group, k), speed in np.ndenumerate(speeds)
    ]
    columns = ["turn", "group", "draft_length", "requests", "tokens", "steps", "seconds"]
    return pd.DataFrame(rows, columns=columns)


def simulated(seed: int, means: list[float], groups: int = 40) -> pd.DataFrame:
    """Groups differ by 20 %, and each of their runs by another 5 %."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(1, 0.2, (groups, 1)) * rng.normal(1, 0.05, (groups, len(means)))
    return decoded(np.array(means) / noise.clip(0.2))


def test_every_group_meets_every_length_before_the_next_one(monkeypatch) -> None:
    seen = []

    def recorded(target, drafter, prompts, **options):
        lacks = (options["draft_length"] is None) == (drafter is None)
        seen.append((tuple(map(tuple, prompts)), options["draft_length"] or 0, options["seed"]))
        assert lacks
        return decode_rounds(target, drafter, prompts, **options)

    monkeypatch.setattr(turns, "decode_rounds", recorded)
    options = {"draft_lengths": [3, 0, 1, 2], "requests": 2, "turns": 3, "max_new_tokens": 3}
    table = decode_lengths(tiny_target(), tiny_drafter(), PROMPTS, **options)
    first, second = (tuple(map(tuple, PROMPTS[i : i + 2])) for i in (0, 2))
    blocks = [seen[i : i + 4] for i in range(0, len(seen), 4)]
    # The first one warms up.
    assert [{prompts for prompts, *_ in block} for block in blocks] == (
        [{first}, *[{first}, {second}] * 3]
    )
    orders = [[k for _, k, _ in block] for block in blocks[1:]]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(map(tuple, orders))) > 1
    seeds = [{seed for *_, seed in block} for block in blocks[1:]]
    assert all(len(one) == 1 for one in seeds) and len(set.union(*seeds)) == 6
    assert table["draft_length"].tolist() == list(itertools.chain.from_iterable(orders))
    assert table["turn"].tolist() == [turn for turn in range(3) for _ in range(8)]
    assert table["group"].tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4
    assert (table["requests"] == 2).all()


def test_tokens_and_seconds_are_those_of_decoding(monkeypatch) -> None:
    """A step of n tokens takes 1 + n / 8 s, a draft 0.5 s, the drafter's reading 0.25 s."""
    seconds = {
        (Target, "advance"): lambda _, ids, *__: 1 + ids.shape[1] / 8,
        (Drafter, "propose"): lambda *_: 0.5,
        (Drafter, "read"): lambda *_: 0.25,
        (loop, "distribution"): lambda *_: 0.0,
    }
    tell_clock(monkeypatch, seconds)
    target, drafter = tiny_target(), tiny_drafter()
    options = {"temperature": 1.0, "max_new_tokens": 20}
    table = decode_lengths(
        target, drafter, PROMPTS[:2], draft_lengths=[0, 2], turns=2, seed=7, **options
    )
    for row in table.itertuples():
        run = decode(
            target,
            drafter if row.draft_length else None,
            [PROMPTS[row.group]],
            draft_length=row.draft_length or None,
            seed=7 + 2 * row.turn + row.group,
            **options,
        )
        assert (row.tokens, row.steps) == (run.rounds["tokens"].sum(), len(run.rounds))
        spent = sum(run.seconds.values()) - run.seconds["prompt"]
        assert row.seconds == pytest.approx(spent) and spent > 0
        if row.draft_length == 0:
            assert row.seconds == pytest.approx(row.steps * 1.125)


def test_requests_count_as_long_as_all_of_them_go_on() -> None:
    target, drafter = tiny_target(), tiny_drafter()
    options = {"temperature": 1.0, "max_new_tokens": 30, "seed": 3}
    [row] = decode_lengths(
        target, drafter, PROMPTS, draft_lengths=[2], requests=5, turns=1, **options
    ).itertuples()
    rounds = decode(target, drafter, PROMPTS, draft_length=2, **options).rounds
    shared = rounds.groupby("prompt").size().min()
    assert 0 < shared < rounds.groupby("prompt").size().max()
    assert row.steps == shared
    assert row.tokens == rounds.loc[rounds["round"] < shared, "tokens"].sum()


def test_a_table_of_lengths_has_speeds_beside_their_predictions() -> None:
    # Of two requests together; plainly 3 and 1 tokens a second each, drafted 4 and 2.
    runs = decoded(np.array([[6.0, 8.0], [2.0, 4.0]]), tokens=60, requests=2)
    costs = RoundCosts.of(1, plain_seconds=0.5, draft_seconds=0.2, verify_seconds=0.7)
    profile = AcceptanceProfile.of([0.8])
    table = serving.length_table(runs, profile, costs, resamples=200)
    assert table["draft_length"].tolist() == [0, 1]
    # 120 tokens of two requests in 40 and 22.5 s; in 120 and 60 steps.
    assert table["tokens_per_second"].tolist() == pytest.approx([1.5, 60 / 22.5])
    assert table["tau"].tolist() == pytest.approx([0.5, 1.0])
    assert table["round_seconds"].tolist() == pytest.approx([40 / 120, 22.5 / 60])
    assert table["tokens_per_second_low"].tolist() == pytest.approx([1.0, 2.0])
    assert table["tokens_per_second_high"].tolist() == pytest.approx([3.0, 4.0])
    assert table["tau_predicted"].tolist() == pytest.approx([1, 1.8])
    assert table["round_seconds_predicted"].tolist() == pytest.approx([0.5, 0.9])
    assert table["tokens_per_second_predicted"].tolist() == pytest.approx([2.0, 2.0])
    alone = serving.length_table(runs, resamples=200)
    pd.testing.assert_frame_equal(alone, table[list(alone)])


def test_the_loss_is_counted_where_the_fastest_was_not_chosen() -> None:
    """Each half of four groups finds another length the fastest, by what no other half sees."""
    speeds = np.full((4, 3), 10.0)
    half = np.random.default_rng(0).permutation(4) % 2
    speeds[half == 0, 1], speeds[half == 1, 2] = 20.0, 20.0
    found = serving.length_loss(decoded(speeds), 0, resamples=50)
    assert found["loss"] == pytest.approx(0) and not found["told_apart"]
    # A length of all groups takes 6 s for two and 3 s for the others: 4 / 3 of the advised speed.
    assert found["loss_of_all"] == pytest.approx(1 / 4) and found["fastest"] == 1
    # The same length for both halves: 9 s against 6 s for every 60 tokens.
    speeds[:] = [10.0, 15.0, 5.0]
    found = serving.length_loss(decoded(speeds), 0, resamples=50)
    assert found["loss"] == found["loss_low"] == found["loss_high"] == pytest.approx(1 / 3)
    assert found["told_apart"] and found["loss_of_all"] == pytest.approx(1 / 3)
    assert (found["advised"], found["fastest"]) == (0, 1)
    best = serving.length_loss(decoded(speeds), 1, resamples=50)
    assert best["loss"] == best["loss_of_all"] == 0 and not best["told_apart"]


def test_equal_lengths_are_seldom_told_apart_and_lose_nothing() -> None:
    """Of 200 draws of 8 equal lengths more than 16 told apart have a chance of 1 in 10,000, at the
    2.5 % that the interval promises. Against the fastest of all the advised one seems to lose."""
    draws = [
        serving.length_loss(simulated(seed, [10.0] * 8), 3, resamples=200) for seed in range(200)
    ]
    table = pd.DataFrame(draws)
    loss = table["loss"].astype(float)
    assert abs(loss.mean()) < 3.5 * loss.std() / len(loss) ** 0.5
    assert table["told_apart"].sum() <= 16
    assert table["loss_of_all"].mean() > 0.008


def test_the_interval_covers_a_true_loss() -> None:
    """The advised length is 5 % slower than the fastest: fewer than 178 of 200 intervals that cover
    that have a chance of 1 in 10,000, at 95 %; and the loss is unbiased."""
    draws = [
        serving.length_loss(simulated(seed, [8.0, 9.5, 10.0, 7.0]), 1, resamples=200)
        for seed in range(200)
    ]
    table = pd.DataFrame(draws)
    covered = (table["loss_low"] <= 0.05) & (0.05 <= table["loss_high"])
    assert 178 <= covered.sum() < 200
    loss = table["loss"].astype(float)
    assert abs(loss.mean() - 0.05) < 3.5 * loss.std() / len(loss) ** 0.5
    assert table["told_apart"].mean() > 0.9


RUNS = decoded(np.array([[1.0, 2.0], [1.0, 2.0]]))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: serving.length_loss(RUNS, 2), r"one of the decoded \[0, 1\], got 2"),
        (lambda: serving.length_loss(RUNS[RUNS["group"] == 0], 1), "two or more groups, got 1"),
        (lambda: serving.length_loss(RUNS.drop(columns="steps"), 1), r"got no \['steps'\]"),
        (lambda: serving.length_table(RUNS[:3]), "every group at every length"),
        (lambda: serving.length_table(RUNS[:0]), "one number of requests, got"),
        (lambda: serving.length_table(RUNS.assign(requests=range(4))), "one number of requests"),
        (lambda: serving.length_table(RUNS.assign(steps=0)), "a step at every length"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_prompts_and_lengths_must_be_there() -> None:
    target, drafter = tiny_target(), tiny_drafter()
    with pytest.raises(ValueError, match="prompts must be 6 or more for a group, got 5"):
        decode_lengths(target, drafter, PROMPTS, requests=6)
    most = drafter.config.predicted
    with pytest.raises(ValueError, match=f"draft_length must be at most {most}, got {most + 1}"):
        decode_lengths(target, drafter, PROMPTS, draft_lengths=[0, most + 1])
    with pytest.raises(ValueError, match="at least one length, got none"):
        decode_lengths(target, drafter, PROMPTS, draft_lengths=[0])
