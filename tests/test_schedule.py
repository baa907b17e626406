"""The prefix scheduler against brute force and a heap; that it does not look ahead; SPS curves."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab import serving
from dspark_lab.decoding import decode, distribution
from dspark_lab.model import Target
from dspark_lab.serving import StepsPerSecond, prefix_schedule, retrospective_schedule, timing
from tests.samples import tiny_drafter, tiny_target
from tests.traces import schedule_by_hand, survivals

Confidence = Sequence[Sequence[float]]


def curve(seconds: Callable[[int], float], most: int = 12) -> StepsPerSecond:
    tokens = np.arange(1, most + 1)
    speeds = np.array([1 / seconds(int(b)) for b in tokens])
    return StepsPerSecond(tokens, speeds, 0, "imaginary")


def table_of(speeds: Sequence[float]) -> Callable[[np.ndarray], np.ndarray]:
    """SPS(B) is entry B."""
    return lambda tokens: np.array(speeds)[tokens]


# Each further token costs at least as much as the one before.
SMOOTH = {
    "free": curve(lambda b: 1.0),
    "line": curve(lambda b: 1 + 0.3 * b),
    "bend": curve(lambda b: max(2.0, 0.5 * b)),
    "square": curve(lambda b: 1 + 0.05 * b * b),
}
# SPS(1), SPS(2), SPS(3) of the worked example: the second token is dear, the third nearly free.
CLIFF = StepsPerSecond(np.array([1, 2, 3]), np.array([1.0, 0.5, 0.45]), 0, "imaginary")


def theta(confidence: Confidence, lengths: Sequence[int], sps) -> float:
    rows = zip(survivals(confidence), lengths, strict=True)
    tau = sum(1 + sum(row[:length]) for row, length in rows)
    return tau * float(sps(np.array([len(confidence) + sum(lengths)]))[0])


def best_theta(confidence: Confidence, sps) -> float:
    """Over every choice of a prefix of each request; slots of survival 0 do not exist."""
    rows = [[a for a in row if a > 0] for row in survivals(confidence)]
    sums = [[1 + sum(row[:n]) for n in range(len(row) + 1)] for row in rows]
    requests = len(sums)
    speeds = sps(np.arange(requests, sum(map(len, sums)) + 1)).tolist()
    choices = itertools.product(*(range(len(row)) for row in sums))
    return max(
        sum(row[n] for row, n in zip(sums, chosen, strict=True)) * speeds[sum(chosen)]
        for chosen in choices
    )


tenths = st.integers(0, 10).map(lambda n: n / 10)
some_speeds = st.lists(st.integers(1, 20).map(float), min_size=16, max_size=16)


def confidences(most_requests: int, most_slots: int):
    def rows(slots: int):
        row = st.lists(tenths, min_size=slots, max_size=slots)
        return st.lists(row, min_size=1, max_size=most_requests)

    return st.integers(1, most_slots).flatmap(rows)


@settings(max_examples=300)
@given(confidences(3, 3), st.sampled_from(sorted(SMOOTH)))
def test_no_choice_of_prefixes_beats_early_stopping_on_a_smooth_curve(confidence, name) -> None:
    sps = SMOOTH[name]
    lengths = prefix_schedule(np.array(confidence), sps).tolist()
    assert sps.smooth
    assert theta(confidence, lengths, sps) == pytest.approx(best_theta(confidence, sps), rel=1e-12)


@settings(max_examples=150)
@given(confidences(3, 3), some_speeds)
def test_the_retrospective_schedule_is_the_best_choice_on_any_curve(confidence, speeds) -> None:
    sps = table_of(speeds)
    lengths = retrospective_schedule(np.array(confidence), sps).tolist()
    assert theta(confidence, lengths, sps) == pytest.approx(best_theta(confidence, sps), rel=1e-12)


@settings(max_examples=150)
@given(confidences(3, 4), some_speeds)
def test_early_stopping_is_a_walk_that_knows_the_next_slot_alone(confidence, speeds) -> None:
    """On any curve, ties and dead slots included: the same lengths, the same arithmetic."""
    sps = table_of(speeds)
    assert prefix_schedule(np.array(confidence), sps).tolist() == schedule_by_hand(confidence, sps)


@pytest.mark.parametrize("last", [44.999, 20.0, 3.0, 0.5], ids="SPS falls to {:g}".format)
@pytest.mark.parametrize("decimals", [16, 1], ids=["apart", "ties"])
def test_a_thousand_requests_are_scheduled_as_by_the_walk(decimals, last) -> None:
    """However many are admitted, from a few to all."""
    confidence = np.random.default_rng(0).uniform(0.3, 1, (1000, 16)).round(decimals)
    sps = StepsPerSecond(np.array([1, 17_000]), np.array([45.0, last]), 0, "imaginary")
    lengths = prefix_schedule(confidence, sps)
    assert lengths.dtype == np.int64 and lengths.tolist() == schedule_by_hand(
        confidence.tolist(), sps
    )
    retrospective = retrospective_schedule(confidence, sps)
    # Nothing is better on a smooth curve.
    assert retrospective.tolist() == lengths.tolist()


@pytest.mark.parametrize("scheduler", [prefix_schedule, retrospective_schedule])
def test_of_equally_good_schedules_the_shortest_is_taken(scheduler) -> None:
    # 1.5 * 2, then 2 * 1.5: the second slot changes nothing.
    assert scheduler(np.array([[0.5, 1.0]]), table_of([0, 1.0, 2.0, 1.5])).tolist() == [1]


def test_tensors_arrays_and_lists_are_scheduled_alike() -> None:
    confidence = torch.tensor([[0.9, 0.8], [0.7, 0.1]], requires_grad=True)
    sps = SMOOTH["line"]
    expected = prefix_schedule(confidence.detach().numpy(), sps).tolist()
    assert prefix_schedule(confidence, sps).tolist() == expected
    assert prefix_schedule(confidence.detach().bfloat16(), sps).shape == (2,)
    lengths = serving.prefix_scheduler(sps)(confidence)
    assert lengths.dtype == torch.int64 and lengths.tolist() == expected


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["no request", "no slot"])
def test_where_there_is_nothing_to_admit_nothing_is(shape) -> None:
    for scheduler in (prefix_schedule, retrospective_schedule):
        assert scheduler(np.zeros(shape), SMOOTH["line"]).tolist() == [0] * shape[0]
    assert serving.schedule_table(np.zeros(shape), SMOOTH["line"]).empty


@pytest.mark.parametrize(
    "confidence, message",
    [
        ([0.5, 0.5], r"confidence must be \[request, slot\], got shape \(2,\)"),
        ([[0.5, math.nan]], r"confidence must lie in \[0, 1\], got values from nan"),
        ([[0.5, 1.01]], r"confidence must lie in \[0, 1\], got values from 0.5 to 1.01"),
        ([[-0.1, 0.5]], r"confidence must lie in \[0, 1\], got values from -0.1"),
    ],
)
def test_confidences_that_are_none_are_refused(confidence, message) -> None:
    for scheduler in (prefix_schedule, retrospective_schedule, serving.schedule_table):
        with pytest.raises(ValueError, match=message):
            scheduler(np.array(confidence), SMOOTH["line"])
    with pytest.raises(TypeError, match="confidence must hold numbers"):
        prefix_schedule(np.array([["a"]]), SMOOTH["line"])


@pytest.mark.parametrize(
    "speeds", [lambda b: 1.0, lambda b: 0.0 * b, lambda b: np.nan * b, lambda b: np.inf * b]
)
def test_speeds_that_are_none_are_refused(speeds) -> None:
    with pytest.raises(ValueError, match="sps must return 3 positive and finite steps per second"):
        prefix_schedule(np.array([[0.5, 0.5]]), speeds)


def test_the_table_is_the_walk_slot_by_slot() -> None:
    confidence = [[0.9, 0.5], [0.8, 0.9]]
    # Rises twice, falls, rises above all before.
    sps = table_of([0, 0, 1.0, 0.9, 0.8, 0.4, 0.7])
    table = serving.schedule_table(np.array(confidence), sps)
    assert table[["request", "slot"]].to_numpy().tolist() == [[0, 0], [1, 0], [1, 1], [0, 1]]
    a = [0.9, 0.8, 0.8 * 0.9, 0.9 * 0.5]
    assert table["survival"].tolist() == pytest.approx(a)
    assert table["tokens"].tolist() == [3, 4, 5, 6]
    tau = [2 + sum(a[: n + 1]) for n in range(4)]
    assert table["tau"].tolist() == pytest.approx(tau)
    expected = [2.0, *(t * s for t, s in zip(tau, [0.9, 0.8, 0.4, 0.7], strict=True))]
    assert table["theta_before"].tolist() == pytest.approx(expected[:-1])
    assert table["theta"].tolist() == pytest.approx(expected[1:])
    assert table["admitted"].tolist() == [True, True, False, False]
    assert table["retrospective"].tolist() == [True] * 4
    counted = table.groupby("request")[["admitted", "retrospective"]].sum()
    for name, scheduler in zip(counted, (prefix_schedule, retrospective_schedule), strict=True):
        assert counted[name].tolist() == scheduler(np.array(confidence), sps).tolist()
    # Slots that never survive have no row, however fast more tokens are.
    faster = table_of([0, 10, 9, 9.5, 9.9])
    assert serving.schedule_table(np.array([[0.9, 0, 0]]), faster)["slot"].tolist() == [0]


def test_decoding_by_the_scheduler_verifies_what_it_says_and_answers_the_same() -> None:
    target, drafter = tiny_target(), tiny_drafter(block_size=3)
    with torch.no_grad():
        drafter.confidence_head.proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    sps, asked = curve(lambda b: 4 + b), []
    scheduler = serving.prefix_scheduler(sps)

    def listening(confidence: torch.Tensor) -> torch.Tensor:
        asked.append(confidence.tolist())
        return scheduler(confidence)

    options = {"max_new_tokens": 12, "end_ids": []}
    decoded = decode(target, drafter, prompts, scheduler=listening, **options)
    assert decoded.tokens == decode(target, None, prompts, **options).tokens
    seen = Counter()
    for number, confidence in enumerate(asked):
        batch = decoded.rounds[decoded.rounds["round"] == number]
        wanted = np.minimum(schedule_by_hand(confidence, sps), batch["drafted"]).tolist()
        assert batch["verified"].tolist() == wanted
        seen.update(wanted)
    assert len(seen) > 1, "the lengths must vary for this to say anything"


probabilities = st.integers(1, 9).map(lambda n: Fraction(n, 10))
# Of the token 1: first, after a 0, after a 1.
chains = st.tuples(probabilities, probabilities, probabilities)
sureness = st.tuples(tenths, tenths, tenths)
PAIRS = list(itertools.product(range(2), repeat=2))


def chance(chain, pair) -> Fraction:
    first, second = chain[0], chain[1 + pair[0]]
    return (first if pair[0] else 1 - first) * (second if pair[1] else 1 - second)


def answers(p, q, drafted, length) -> Counter:
    """Of a round that drafted two slots and then plain decoding: the first two tokens."""
    result: Counter = Counter()

    def go(done: tuple[int, ...], so_far: Fraction, drafting: bool) -> None:
        if len(done) == 2:
            result[done] += so_far
            return
        one = p[0] if not done else p[1 + done[0]]
        own = [1 - one, one]
        if drafting and len(done) < length:
            other = q[0] if not done else q[1 + done[0]]
            theirs, token = [1 - other, other], drafted[len(done)]
            kept = min(Fraction(1), own[token] / theirs[token])
            go((*done, token), so_far * kept, True)
            rest = [max(Fraction(0), a - b) for a, b in zip(own, theirs, strict=True)]
            own = [r / sum(rest) for r in rest] if sum(rest) else own
            so_far *= 1 - kept
        for token in range(2):
            go((*done, token), so_far * own[token], False)

    go((), Fraction(1), True)
    return result


def joint_answers(rows, sps, scheduler) -> Counter:
    """Of requests that share a step, over all that may be drafted; a row is (p, q, confidence)."""
    result: Counter = Counter()
    for drafted in itertools.product(PAIRS, repeat=len(rows)):
        block = [[c[0], c[1 + d[0]]] for (_, _, c), d in zip(rows, drafted, strict=True)]
        lengths = scheduler(np.array(block), sps).tolist()
        found = [
            answers(p, q, d, n).items()
            for (p, q, _), d, n in zip(rows, drafted, lengths, strict=True)
        ]
        chances = [chance(q, d) for (_, q, _), d in zip(rows, drafted, strict=True)]
        for said in itertools.product(*found):
            result[tuple(pair for pair, _ in said)] += math.prod(
                [*chances, *(share for _, share in said)]
            )
    return result


@settings(max_examples=40)
@given(st.lists(st.tuples(chains, chains, sureness), min_size=2, max_size=2), some_speeds)
def test_the_answers_of_requests_that_share_a_step_stay_the_targets_own(rows, speeds) -> None:
    """Exact, in fractions, on any curve: each one's own, and independent of the other's."""
    found = joint_answers(rows, table_of(speeds), prefix_schedule)
    for pairs in itertools.product(PAIRS, repeat=2):
        own = math.prod(chance(p, pair) for (p, _, _), pair in zip(rows, pairs, strict=True))
        assert found[pairs] == own


@pytest.mark.parametrize(
    "scheduler, lengths, exact",
    [(prefix_schedule, [0, 0], [0.7, 0.3]), (retrospective_schedule, [2, 0], [0.85, 0.15])],
)
def test_the_worked_example_is_that_of_the_design(scheduler, lengths, exact) -> None:
    """Target (0.7, 0.3), draft (0.5, 0.5), c_1 = 0.8, c_2 = 0.9 after A and 0 after B.

    Theta is 1 with nothing admitted, (1 + 0.8) * 0.5 = 0.9 with the first slot: early stopping ends
    here. After A both slots give (1 + 0.8 + 0.72) * 0.45 = 1.134, so a retrospective search
    verifies A, which is always accepted, and leaves B to the target: 0.5 + 0.5 * 0.7 = 0.85.
    """
    assert not CLIFF.smooth
    found = [scheduler(np.array([[0.8, after]]), CLIFF).item() for after in (0.9, 0.0)]
    assert found == lengths
    output = serving.output_distribution([0.7, 0.3], [0.5, 0.5], found)
    assert output.tolist() == pytest.approx(exact, abs=1e-15)
    half = Fraction(1, 2)
    row = ((Fraction(3, 10), half, half), (half, half, half), (0.8, 0.9, 0.0))
    answered = joint_answers([row], CLIFF, scheduler)
    first = sum(share for ((token, _),), share in answered.items() if token == 0)
    assert float(first) == pytest.approx(exact[0], abs=1e-15)


def test_output_is_rejected_and_corrected_token_by_token() -> None:
    """Verified after the tokens 0 and 2 alone: 0.6 * (1/3 stays 0, 2/3 corrected to 1 or 2 alike),
    0.3 of p anew, 0.1 stays 2."""
    exact = serving.output_distribution([0.2, 0.5, 0.3], [0.6, 0.3, 0.1], [True, False, True])
    assert exact.tolist() == pytest.approx([0.2 + 0.06, 0.2 + 0.15, 0.2 + 0.09 + 0.1])


def test_seconds_are_linear_between_points_hold_below_and_go_on_above() -> None:
    sps = StepsPerSecond(np.array([2, 6, 8]), 1 / np.array([1.0, 3.0, 5.0]), 16, "a device")
    expected = {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.5, 5: 2.5, 6: 3.0, 7: 4.0, 8: 5.0, 9: 6.0, 20: 17.0}
    for tokens, seconds in expected.items():
        assert sps.seconds(tokens) == pytest.approx(seconds)
        assert isinstance(sps(tokens), float) and sps(tokens) == pytest.approx(1 / seconds)
    asked = np.array(list(expected)).reshape(2, 5)
    assert sps(asked).shape == (2, 5)
    assert sps(asked).ravel().tolist() == [sps(tokens) for tokens in expected]
    for wrong in (-1, math.nan, np.array([3, -2])):
        with pytest.raises(ValueError, match="tokens per step must be >= 0"):
            sps(wrong)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tokens": [1]}, "steps_per_second must be [point] with 1 points, got shape (2,)"),
        ({"tokens": ["1", "2"]}, "tokens must hold numbers"),
        ({"steps_per_second": [2.0, 0.0]}, "steps_per_second[1] must be > 0, got 0.0"),
        ({"steps_per_second": [math.inf, 1.0]}, "steps_per_second[0] must be finite, got inf"),
    ],
)
def test_bad_curves_are_refused(changes, message) -> None:
    curve = {"tokens": [1, 2], "steps_per_second": [2.0, 1.0], "context_length": 0, "device": ""}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        StepsPerSecond(**(curve | changes))


@settings(max_examples=200)
@given(st.dictionaries(st.integers(1, 30), st.integers(1, 40), min_size=1, max_size=8))
def test_a_smoothed_curve_is_the_lower_convex_envelope(points) -> None:
    tokens = sorted(points)
    seconds = [points[b] / 10 for b in tokens]
    sps = StepsPerSecond(np.array(tokens), 1 / np.array(seconds), 3, "a device", "a target")
    smoothed = sps.smoothed()
    assert smoothed.smooth and set(smoothed.tokens) <= set(tokens)
    assert smoothed.table.iloc[0, 2:].tolist() == [3, "a device", "a target"]
    first = max(i for i in range(len(tokens)) if seconds[i] == min(seconds))
    for i, b in enumerate(tokens):
        # The lowest chord above or below the point; in front of the fastest step, its seconds.
        expected = min(seconds)
        if i >= first:
            expected = min(
                seconds[low]
                + (seconds[high] - seconds[low])
                * (b - tokens[low])
                / max(tokens[high] - tokens[low], 1)
                for low in range(first, i + 1)
                for high in range(i, len(tokens))
                if low < high or low == i == high
            )
        assert smoothed.seconds(b) == pytest.approx(expected)
    # Below the first point a curve holds, so it is smooth where it is its own envelope.
    assert sps.smooth == np.allclose(smoothed.seconds(np.array(tokens)), seconds, rtol=0, atol=1e-9)


def test_a_table_of_ones_own_needs_two_columns_and_two_facts(tmp_path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("steps_per_second,tokens,note\n30,1,a\n20.5,16,b\n")
    sps = StepsPerSecond.read(path, context_length=2048, device="a server")
    assert sps.table.iloc[:, :4].to_numpy().tolist() == [
        [1, 30.0, 2048, "a server"],
        [16, 20.5, 2048, "a server"],
    ]
    with pytest.raises(ValueError, match="context_length must be given, or be a column"):
        StepsPerSecond.read(path, device="a server")
    with pytest.raises(ValueError, match="device must be given, or be a column"):
        StepsPerSecond.read(path, context_length=1)
    table = sps.table
    assert StepsPerSecond.of(table, device="another").device == "another"
    with pytest.raises(ValueError, match="device must be the same in every row"):
        StepsPerSecond.of(table.assign(device=["one", "two"]))
    with pytest.raises(ValueError, match=r"got no \['tokens'\]"):
        StepsPerSecond.of(table.drop(columns="tokens"))
    path.write_text("tokens,steps_per_second\n1,30\n2,nan\n")
    with pytest.raises(ValueError, match=r"steps_per_second\[1\] must be finite, got nan"):
        StepsPerSecond.read(path, context_length=1, device="")


@pytest.fixture
def steps(monkeypatch) -> list:
    """The target's steps: ids, tokens that each row had read before, features, probabilities."""
    seen: list = []
    advance = Target.advance

    def listening(self, input_ids, cache, layer_ids):
        before = list(cache.rows.lengths)
        features = advance(self, input_ids, cache, layer_ids)
        seen.append([input_ids.clone(), before, features.last.clone(), None])
        return features

    def judging(logits, *options):
        seen[-1][-1] = tuple(logits.shape)
        return distribution(logits, *options)

    monkeypatch.setattr(Target, "advance", listening)
    monkeypatch.setattr(timing, "distribution", judging)
    return seen


def test_every_row_of_a_step_reads_tokens_of_its_own_behind_the_same_context(steps) -> None:
    target = tiny_target()
    sps = serving.measure_steps_per_second(
        target, (1, 5, 6, 11), context_length=7, tokens_per_row=4, warm_up=1, repeats=2, seed=3
    )
    assert sps.tokens.tolist() == [1, 5, 6, 11] and (sps.steps_per_second > 0).all()
    assert (sps.context_length, sps.target) == (7, "in memory")
    threads = torch.get_num_threads()
    assert sps.device == f"cpu, {threads} thread{'' if threads == 1 else 's'}, float32"
    shapes = [(tuple(ids.shape), before, probs) for ids, before, _, probs in steps]
    context = [((1, 7), [0], None)]
    # Of the divisors up to 4: 5 tokens are 5 rows of 1, 6 are 2 rows of 3.
    for rows, each in ((1, 1), (5, 1), (2, 3), (11, 1)):
        assert shapes[:4] == context + [((rows, each), [7] * rows, (rows, each, 64))] * 3
        shapes = shapes[4:]
    assert not shapes
    (context, *_), *later = steps[8:12]
    for ids, _, last, _ in later:
        assert not torch.equal(ids[0], ids[1])
        alone = target.features(torch.cat([context.expand(2, -1), ids], dim=1), [0]).last[:, 7:]
        torch.testing.assert_close(last, alone)


def test_a_curve_names_its_target_without_the_way_to_it() -> None:
    model = tiny_target().model
    for where, name in (("/some/where/pocket/target", "pocket/target"), ("org/name", "org/name")):
        target = Target(model, None, where)
        sps = serving.measure_steps_per_second(target, (1,), context_length=1, warm_up=0, repeats=1)
        assert sps.target == name


def test_the_time_is_the_median_without_the_warm_up(monkeypatch) -> None:
    lasting = iter([50.0, 50.0, 1.0, 9.0, 2.0, 50.0, 50.0, 4.0, 3.0, 100.0])
    now, running = [0.0], [False]

    def clock(device: torch.device) -> float:
        if running[0]:
            now[0] += next(lasting)
        running[0] = not running[0]
        return now[0]

    monkeypatch.setattr(timing, "now", clock)
    sps = serving.measure_steps_per_second(tiny_target(), (1, 2), context_length=2, repeats=3)
    assert sps.steps_per_second.tolist() == pytest.approx([1 / 2, 1 / 4])
    assert next(lasting, None) is None


def test_a_target_that_decodes_one_row_at_a_time_reads_all_tokens_in_it(steps) -> None:
    target = tiny_target()
    target.model.config.model_type = "of a family that is not known"
    assert not target.decodes_batches
    serving.measure_steps_per_second(target, (12,), context_length=3, tokens_per_row=4, repeats=1)
    assert [tuple(ids.shape) for ids, *_ in steps] == [(1, 3), (1, 12), (1, 12), (1, 12)]
