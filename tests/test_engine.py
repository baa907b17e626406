"""`dspark_lab.serving.engine`: curves read off by hand, a full batch predicted and then simulated,
and measurements by a clock that tells what it is told.

No test reads a real clock: where decoding is timed, each call of a model takes so many made-up
seconds.
"""

import dataclasses
import re
from collections import Counter

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab import serving
from dspark_lab.decoding import RandomNumbers, verification
from dspark_lab.model import Drafter, Target
from dspark_lab.serving import Engine, FixedLength, RoundCosts, StepsPerSecond, timing
from tests.samples import tell_clock, tiny_drafter, tiny_target
from tests.traces import equal_answers

pytestmark = pytest.mark.usefixtures("one_thread")

# A step takes 1 s, and 1/16 s for each token; all is in binary fractions, so that sums are exact.
SPS = StepsPerSecond(np.array([16, 48]), np.array([1 / 2, 1 / 4]), 128, "a card, bf16", "a target")


def made(**changes: object) -> Engine:
    """Of blocks of up to 3 slots, for 2, 4 and 10 requests together."""
    curves: dict[str, object] = {
        "sps": SPS,
        "requests": [2, 4, 10],
        "draft": [[1.0, 1.25, 1.5], [2.0, 2.5, 3.0], [8.0, 8.5, 6.0]],
        "rest": [0.25, 0.75, 0.5],
        "plain_rest": [0.125, 0.25, 1.0],
    }
    return Engine(**(curves | changes))


ENGINE = made()


def measured(target: Target | None = None, block_size: int = 3, **changes: object) -> Engine:
    drafter, options = tiny_drafter(block_size=block_size), {"context_length": 5} | changes
    return serving.measure_engine(target or tiny_target(), drafter, **options)


def test_seconds_are_linear_between_points_hold_below_and_get_no_faster_above() -> None:
    """Drafting 1 takes 1, 2 and 8 s for 2, 4 and 10 requests: from 4 on 1 s for each request."""
    assert [ENGINE.draft_seconds(n, 1) for n in (1, 2, 3, 4, 5, 10, 12)] == [1, 1, 1.5, 2, 3, 8, 10]
    assert [ENGINE.draft_seconds(n, 2) for n in (3, 7, 13)] == [1.875, 5.5, 11.5]
    assert [ENGINE.rest_seconds(n) for n in (1, 3, 7)] == [0.25, 0.5, 0.625]
    # A target's step reads one token of each request: below 16 as long as 16, 2 s.
    assert [ENGINE.plain_seconds(n) for n in (1, 3, 12)] == [2.125, 2.1875, 3.25]
    assert ENGINE.plain_seconds(32) == 3 + 1.0 + 22 * 0.125
    assert ENGINE.longest == 3
    assert [ENGINE.rest_seconds(n) for n in (10, 11, 1000)] == [0.5] * 3
    assert ENGINE.draft_seconds(20, 3) == 6.0 + 10 * 0.5
    falling = made(draft=[[3.0], [2.0], [1.0]])
    assert [falling.draft_seconds(n, 1) for n in (4, 7, 10, 99)] == [2, 1.5, 1, 1]
    alone = made(requests=[4], draft=[[2.0]], rest=[0.5], plain_rest=[0.25])
    assert [alone.draft_seconds(n, 1) for n in (1, 4, 400)] == [2.0] * 3
    assert [alone.rest_seconds(n) for n in (1, 4, 400)] == [0.5] * 3


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("requests", [1, 3, 10, 12])
def test_costs_of_a_round_are_those_put_together_by_hand(requests, replay) -> None:
    verify = [SPS.seconds(requests * n) for n in (1, 2, 3, 4)]
    by_hand = RoundCosts(
        plain_seconds=ENGINE.plain_seconds(requests),
        draft_seconds=tuple(ENGINE.draft_seconds(requests, k) for k in (1, 2, 3)),
        verify_seconds=tuple(verify),
        replay_seconds=tuple(verify[:3]) if replay else (),
        overhead_seconds=ENGINE.rest_seconds(requests),
    )
    found = ENGINE.costs(requests, replay=replay)
    assert dataclasses.replace(found, source="given") == by_hand
    assert found.source == f"a card, bf16, context 128, {requests} requests"


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("requests", [1, 3, 10, 12])
def test_a_full_batch_is_simulated_as_fast_as_its_costs_say(requests, slots) -> None:
    """Every round of R requests yields R (K + 1) tokens: answers hold whole rounds."""
    drawn = serving.draw_requests(equal_answers(1.0, 3, 5 * (slots + 1)), 20)
    options = {"concurrency": requests, "draft_length": slots}
    figures = serving.simulate(drawn, ENGINE, FixedLength(slots), **options).figures
    seconds = ENGINE.draft_seconds(requests, slots) + SPS.seconds(requests * (slots + 1))
    seconds += ENGINE.rest_seconds(requests)
    assert figures["tokens_per_round"] == slots + 1 and figures["batch_requests"] == requests
    assert figures["throughput"] == pytest.approx(requests * (slots + 1) / seconds, rel=1e-12)
    always = serving.AcceptanceProfile.of([1.0] * slots)
    row = serving.speedup_table(always, ENGINE.costs(requests), [slots]).iloc[0]
    assert figures["throughput"] == pytest.approx(requests * row["tokens_per_second"], rel=1e-12)
    plain = serving.simulate(drawn, ENGINE, FixedLength(0), **options).figures
    per_second = requests / ENGINE.plain_seconds(requests)
    assert plain["throughput"] == pytest.approx(per_second, rel=1e-12)
    assert plain["per_user"] == pytest.approx(per_second / requests)
    assert plain["verified_per_request"] == 0 and np.isnan(plain["acceptance"])
    speedup = figures["throughput"] / plain["throughput"]
    assert speedup == pytest.approx(row["speedup"], rel=1e-12)


def test_a_step_with_a_draft_takes_no_less_than_one_without() -> None:
    """Where a draft and the rest of its round are measured to be quicker than the plain rest."""
    cheap = made(draft=[[0.0]] * 3, rest=[0.0] * 3)
    options = {"concurrency": 10, "draft_length": 1}
    for slots in (0, 1):
        drawn = serving.draw_requests(equal_answers(1.0, 1, 4), 20)
        steps = serving.simulate(drawn, cheap, FixedLength(slots), **options).steps
        assert (steps["seconds"] == 1 + SPS.seconds(10 * (1 + slots))).all()


def test_numbers_from_elsewhere_make_an_engine() -> None:
    flat = Engine.of(SPS, 4, draft_seconds=0.5, rest_seconds=0.25)
    assert flat.longest == 4
    for requests in (1, 5, 64):
        assert [flat.draft_seconds(requests, k) for k in (1, 2, 3, 4)] == [0.5] * 4
        assert flat.rest_seconds(requests) == 0.25
        assert flat.plain_seconds(requests) == SPS.seconds(requests)
    by_requests = Engine.of(SPS, 2, draft_seconds={8: 2.0, 1: 0.25})
    assert by_requests.requests.tolist() == [1, 8]
    assert by_requests.draft_seconds(np.array([1, 5, 8, 12]), 2).tolist() == [0.25, 1.25, 2.0, 3.0]
    assert by_requests.rest_seconds(8) == 0


def test_an_engine_does_not_change_with_the_arrays_it_was_made_from() -> None:
    draft = np.array([[1.0, 2.0]])
    engine = made(requests=[1], draft=draft, rest=[0.0], plain_rest=[0.0])
    draft[:] = 7
    assert engine.draft_seconds(1, 2) == 2
    for name in ("requests", "draft", "rest", "plain_rest"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(engine, name)[0] = 3


def test_the_table_is_a_row_for_each_measured_point() -> None:
    rows = [
        ("target", 0, 0, 16, 2.0),
        ("target", 0, 0, 48, 4.0),
        *(
            ("draft", requests, k + 1, 0, seconds)
            for requests, each in zip((2, 4, 10), ENGINE.draft.tolist(), strict=True)
            for k, seconds in enumerate(each)
        ),
        *(("rest", n, 0, 0, s) for n, s in ((2, 0.25), (4, 0.75), (10, 0.5))),
        *(("plain rest", n, 0, 0, s) for n, s in ((2, 0.125), (4, 0.25), (10, 1.0))),
    ]
    table = ENGINE.table
    facts = ["context_length", "device", "target"]
    assert list(table) == ["part", "requests", "draft_length", "tokens", "seconds", *facts]
    assert list(table.drop(columns=facts).itertuples(index=False, name=None)) == rows
    assert table[facts].drop_duplicates().to_numpy().tolist() == [[128, "a card, bf16", "a target"]]


@settings(max_examples=30)
@given(
    values=st.lists(st.floats(0, 1e3), min_size=8, max_size=8),
    taken=st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)),
    facts=st.sampled_from([("a card, bf16", "a target"), ("NA", ""), ("7", "nan")]),
    rows=st.randoms(),
)
def test_a_saved_engine_is_read_back_exactly(tmp_path_factory, values, taken, facts, rows) -> None:
    """Whatever the order of the rows of drafts and rests."""
    path = tmp_path_factory.mktemp("saved") / "engine.csv"
    sps = StepsPerSecond(np.array([1, 8]), 1 / np.array(taken), 256, *facts)
    draft, rest, plain = np.reshape(values[:4], (2, 2)), values[4:6], values[6:]
    engine = Engine(sps, [1, 4], draft, rest, plain)
    engine.save(path)
    assert [item.name for item in path.parent.iterdir()] == ["engine.csv"]
    lines = path.read_text().splitlines()
    others = lines[3:]
    rows.shuffle(others)
    path.write_text("\n".join([*lines[:3], *others]))
    found = Engine.read(path)
    for name in ("requests", "draft", "rest", "plain_rest"):
        assert getattr(found, name).tolist() == getattr(engine, name).tolist()
    assert (found.sps.context_length, found.sps.device, found.sps.target) == (256, *facts)
    assert found.plain_known
    assert type(found.sps.context_length) is int
    assert found.sps.tokens.tolist() == [1, 8]
    # Seconds are written, speeds are kept: 1 / (1 / x) may end a rounding beside x.
    speeds = sps.steps_per_second.tolist()
    assert found.sps.steps_per_second.tolist() == pytest.approx(speeds, rel=1e-15)
    # So is the curve alone.
    sps.save(path)
    alone = StepsPerSecond.read(path)
    pd.testing.assert_frame_equal(alone.table, sps.table, rtol=1e-14)
    assert list(sps.table) == ["tokens", "steps_per_second", "context_length", "device", "target"]
    assert type(alone.context_length) is int


def test_a_saved_engine_goes_on_saying_that_its_plain_steps_are_not_known(tmp_path) -> None:
    path = tmp_path / "engine.csv"
    Engine.of(SPS, 2, draft_seconds=0.5, plain_known=False).save(path)
    assert not Engine.read(path).plain_known
    assert Engine.of(SPS, 2, draft_seconds=0.5).plain_known and "plain_known" not in ENGINE.table


@pytest.mark.parametrize("kind", [Engine, StepsPerSecond])
def test_curves_are_written_whole_or_not_at_all(kind, tmp_path, monkeypatch) -> None:
    path, curves = tmp_path / "curves.csv", ENGINE if kind is Engine else SPS
    curves.save(path)
    before = path.read_text()

    def half(self, place, **options) -> None:
        place.write_text("tokens,requests")
        raise OSError("no space")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(OSError, match="no space"):
        curves.save(path)
    assert path.read_text() == before and len(list(tmp_path.iterdir())) == 1


TABLE = ENGINE.table
OF_REST = TABLE["part"] == "rest"
OF_FOUR, SECOND_SLOT = TABLE["requests"] == 4, TABLE["draft_length"] == 2


@pytest.mark.parametrize(
    "table, message",
    [
        (
            TABLE.drop(columns=["tokens", "part"]),
            "draft_length, tokens, seconds: it has no part, tokens",
        ),
        (TABLE[~OF_REST], "'rest', 'plain rest'], got no ['rest']"),
        (TABLE[TABLE["part"] != "target"], "got no ['target']"),
        (TABLE[~SECOND_SLOT], "draft must be of every length from 1 on, got [1, 3]"),
        (TABLE[~(OF_REST & OF_FOUR)], "rest, draft_length 0, for each of the requests [2, 4, 10]"),
        (TABLE[~(OF_FOUR & SECOND_SLOT)], "draft, draft_length 2, for each of the requests [2, 4"),
        (pd.concat([TABLE, TABLE[OF_REST]]), "one row for each point, got two of {'part': 'rest'"),
        (TABLE.drop(columns="device"), "device must be given, or be a column"),
        (TABLE.assign(seconds=-1.0), "steps_per_second[0] must be > 0, got -1.0"),
    ],
)
def test_a_file_that_is_no_engine_is_refused(tmp_path, table, message) -> None:
    path = tmp_path / "mine.csv"
    table.to_csv(path, index=False)
    with pytest.raises(ValueError, match=re.escape(message)):
        Engine.read(path)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: made(rest=["a"] * 3), "rest must hold numbers"),
        (lambda: made(draft=[[1.0]] * 2), "draft must be [point, slot] with 3 points, got shape"),
        (lambda: made(draft=np.ones((3, 0))), "with 3 points, got shape (3, 0)"),
        (lambda: made(requests=[], draft=np.ones((0, 2))), "with one or more points"),
        (lambda: made(requests=3), "requests must be [point]"),
        (lambda: made(plain_known=0), "plain_known must be True or False, got 0"),
        (lambda: made(rest=[1.0]), "rest must be [point] with 3 points, got shape (1,)"),
        (lambda: made(requests=[1, 2.5, 4]), "requests must be whole numbers >= 1, got 2.5"),
        (lambda: made(requests=[1, 4, 4]), "requests must rise from point to point"),
        (lambda: made(draft=[[-0.5]] * 3), "draft[0, 0] must be >= 0, got -0.5"),
        (lambda: made(rest=[0, 0, np.nan]), "rest[2] must be finite, got nan"),
        (lambda: made(plain_rest=[0, np.inf, 0]), "plain_rest[1] must be finite, got inf"),
        (lambda: made(sps=lambda tokens: 1.0), "sps must be a StepsPerSecond, got function"),
        (lambda: ENGINE.draft_seconds(0, 1), "requests must be >= 1, got 0"),
        (lambda: ENGINE.draft_seconds(1, 4), "draft_length must be at most 3, got 4"),
        (lambda: ENGINE.rest_seconds(1.5), "requests must be an int or an array of ints, got 1.5"),
        (lambda: Engine.of(SPS, 2, draft_seconds={}), "one or more points"),
    ],
)
def test_curves_and_questions_that_are_none_are_refused(call, message) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call()


@pytest.fixture
def slow_rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Made-up seconds. B tokens take the target 1 + B / 8 s; R requests take drafting R / 2 s and,
    for each slot drawn, 1/16 s, reading what was accepted R / 4 s, and drawing a token of the
    target's own R / 32 s, and judging each slot 1/64 s. The rounds listed take 50 s more."""
    slow: list[int] = []
    rounds: Counter[RandomNumbers] = Counter()

    def own(numbers: RandomNumbers, prompts: list[int]) -> float:
        # The first token of an answer is no round's.
        rounds[numbers] += 1
        return len(prompts) / 32 + 50 * (rounds[numbers] - 2 in slow)

    tell_clock(
        monkeypatch,
        {
            (Target, "advance"): lambda _, ids, *__: 1 + ids.numel() / 8,
            (Drafter, "propose"): lambda _, anchors, *__: len(anchors) / 2,
            (Drafter, "read"): lambda _, __, ___, counts: len(counts) / 4,
            (RandomNumbers, "draft"): lambda *_: 1 / 16,
            (RandomNumbers, "target"): own,
            (verification, "accepts"): lambda probs, _: probs.shape[1] / 64,
        },
    )
    return slow


def test_a_measured_engine_is_that_of_the_calls(slow_rounds) -> None:
    """The target is linear, so what is measured on it holds in between; so is drafting."""
    engine = measured(requests=(1, 3), repeats=2, warm_up=1)
    # Of one and of three requests: plain, with one slot, with three.
    assert engine.sps.tokens.tolist() == [1, 2, 3, 4, 6, 12]
    steps = [1.125, 1.25, 1.375, 1.5, 1.75, 2.5]
    assert [engine.sps.seconds(n) for n in (1, 2, 3, 4, 6, 12)] == pytest.approx(steps)
    assert (engine.sps.context_length, engine.sps.target) == (5, "in memory")
    assert engine.requests.tolist() == [1, 3] and engine.longest == 3
    slots = np.array([1, 2, 3]) / 16
    assert engine.draft.tolist() == [(0.5 + slots).tolist(), (1.5 + slots).tolist()]
    # Of a round with the longest block.
    rest = [0.25 + 1 / 32 + 3 / 64, 0.75 + 3 / 32 + 3 / 64]
    assert engine.rest.tolist() == pytest.approx(rest, abs=1e-12)
    assert engine.plain_rest.tolist() == pytest.approx([1 / 32, 3 / 32], abs=1e-12)


def test_draft_lengths_to_measure_can_be_chosen(slow_rounds) -> None:
    few = measured(requests=(1,), temperature=1.0, repeats=1, draft_lengths=[2, 1])
    assert few.sps.tokens.tolist() == [1, 2, 3]
    assert few.draft.tolist() == [[0.5 + 1 / 16, 0.5 + 2 / 16]]
    for wrong, message in (
        ({"draft_lengths": [4]}, "draft_length must be at most 3, got 4"),
        ({"requests": (4, 1)}, r"requests must rise .*, got \[4, 1\]"),
        ({"temperature": -1.0}, "temperature must be"),
    ):
        with pytest.raises(ValueError, match=message):
            measured(**wrong)


def test_costs_are_medians_of_the_rounds_behind_the_warm_up(slow_rounds) -> None:
    even = measured(requests=(2,), repeats=1, warm_up=0)
    slow_rounds[:] = [0, 1, 3]
    uneven = measured(requests=(2,), repeats=3, warm_up=2)
    pd.testing.assert_frame_equal(uneven.table, even.table)
    slow_rounds[:] = [2, 3]
    slow = measured(requests=(2,), repeats=3, warm_up=2)
    assert slow.rest[0] == pytest.approx(even.rest[0] + 50)


def test_steps_of_as_many_tokens_are_one_point_of_the_curve(monkeypatch) -> None:
    def spent(runs, *_):
        return {key: [0.1, 1.0 + sum(key), 0.2] for key in runs}

    monkeypatch.setattr(timing, "_timed_rounds", spent)
    engine = measured(requests=(1, 2))
    # 2 tokens: one request with one slot and two without; 4: one with three, two with one.
    assert engine.sps.tokens.tolist() == [1, 2, 4, 8]
    seconds = [2.0, (3 + 3) / 2, (5 + 4) / 2, 6.0]
    assert [engine.sps.seconds(n) for n in (1, 2, 4, 8)] == pytest.approx(seconds)
    assert engine.plain_rest.tolist() == pytest.approx([0.3, 0.3])


def test_a_target_that_decodes_one_row_at_a_time_is_measured_at_one_request(slow_rounds) -> None:
    target = tiny_target()
    target.model.config.model_type = "of a family that is not known"
    assert measured(target, repeats=1, warm_up=0).requests.tolist() == [1]
    with pytest.raises(ValueError, match=r"decodes one row at a time, got \[1, 2\]"):
        measured(target, requests=(1, 2))


def test_one_seed_measures_on_the_same_tokens_and_another_on_others(monkeypatch) -> None:
    seen: list[list[list[int]]] = []
    advance = Target.advance

    def listening(self, input_ids, *others):
        seen.append(input_ids.tolist())
        return advance(self, input_ids, *others)

    monkeypatch.setattr(Target, "advance", listening)
    read = []
    for seed in (3, 3, 4):
        seen.clear()
        measured(requests=(2,), repeats=1, warm_up=0, seed=seed)
        read.append([ids for ids in seen if len(ids[0]) == 5])
    # The contexts of plain decoding, of one slot, of three.
    assert read[0] == read[1] and len(read[0]) == 3
    assert all(one != other for one, other in zip(read[0], read[2], strict=True))


def test_no_token_ends_a_measurement(slow_rounds) -> None:
    target = tiny_target()
    target.model.generation_config.eos_token_id = list(range(64))
    engine = measured(target, requests=(1,), repeats=3)
    assert engine.draft.tolist() == [[0.5625, 0.625, 0.6875]]


def test_blocks_of_one_slot_are_measured_too_by_default_for_three_batches(slow_rounds) -> None:
    engine = measured(block_size=1, repeats=1)
    assert engine.requests.tolist() == [1, 4, 16]
    assert engine.draft.tolist() == [[1 / 2 + 1 / 16], [2 + 1 / 16], [8 + 1 / 16]]


@pytest.mark.parametrize(
    "pair, target, most", [("pocket", "pocket/target", 64), ("smollm2", "smollm2", 16)]
)
def test_a_shipped_engine_is_that_of_its_pair(pair, target, most) -> None:
    engine = serving.load_engine(pair)
    assert engine.longest == 7 and engine.sps.target == target
    assert engine.requests.tolist() == [2**i for i in range(most.bit_length())]
    assert engine.sps.tokens.tolist() == [2**i for i in range((8 * most).bit_length())]
    assert (engine.draft > 0).all()
    with pytest.raises(ValueError, match="pair must be one of"):
        serving.load_engine("nobody's")
