"""`dspark_lab.tuning.progress`: variances of a step against every draw there is, rates by hand."""

import importlib
import inspect
import math
import sys
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dspark_lab.blocks import PER
from dspark_lab.chats import collate, pack
from dspark_lab.tuning import (
    GradientNoise,
    Shape,
    Spans,
    Step,
    StepBytes,
    StepTime,
    best_option,
    dilution,
    gradient_moments,
    in_training_batches,
    label_overlap,
    progress_reason,
    progress_table,
)
from dspark_lab.tuning.cost import step_cost
from dspark_lab.tuning.progress import EXPONENT
from tests import test_noise
from tests.faults import ESTIMATES, plant
from tests.samples import documents, tiny_drafter

pytestmark = pytest.mark.usefixtures("one_thread")

MARKS = ("..aaaaaa", "..aaa", "aaaa.aaa", "aaaa")
OVERLAP = label_overlap(3)


def candidates(mark: str) -> list[int]:
    return [p for p in range(len(mark) - 1) if mark[p : p + 2] == "aa"]


def brute_dilution(units: list[list[list[int]]], num_anchors: int) -> tuple[float, ...]:
    """Of one step of these units, each some conversations with their candidates: the means over
    every draw of each unit."""
    blocks = squares = near = 0.0
    for unit in units:
        places = [(number, p) for number, own in enumerate(unit) for p in own]
        draws = list(combinations(places, min(num_anchors, len(places))))
        for draw in draws:
            for number in range(len(unit)):
                own = [p for of, p in draw if of == number]
                blocks += len(own) / len(draws)
                squares += len(own) ** 2 / len(draws)
                pairs = (abs(a - b) for a in own for b in own if a != b)
                shared = sum(OVERLAP[apart - 1] for apart in pairs if apart <= len(OVERLAP))
                near += shared / len(draws)
    return blocks, squares / blocks**2, 1 / blocks, near / blocks**2


@pytest.mark.parametrize("num_anchors", [1, 2, 3, 50])
def test_dilution_is_the_mean_over_every_draw(num_anchors):
    found = dilution(Spans.of(collate(documents(*MARKS), 0)), num_anchors, 4, OVERLAP)
    expected = brute_dilution([[candidates(mark)] for mark in MARKS], num_anchors)
    # Blocks of both answers of a conversation are known to share no label.
    split = [[[0, 1, 2]], [[5, 6]]]
    apart = brute_dilution(split, 50)
    assert math.isclose(found.blocks, expected[0])
    assert math.isclose(found.rows, expected[1])
    assert math.isclose(found.alone, expected[2])
    assert apart[3] >= 0
    assert math.isclose(found.shared, expected[3])


@pytest.mark.parametrize("num_anchors", [1, 2, 4, 50])
@pytest.mark.parametrize("per", PER)
def test_dilution_of_packed_rows_is_the_mean_over_every_draw(num_anchors, per):
    marks = ("..aaaaa", ".aaa", "aaaa", ".aaaaaa")
    batch = pack(documents(*marks), 11, 0)
    spans = Spans.of(batch)
    found = dilution(spans, num_anchors, spans.rows, OVERLAP, per)
    rows: dict[int, list[list[int]]] = {}
    for document, row in enumerate(spans.document_row.tolist()):
        # Candidates count from the document's start: pairs of two documents share nothing.
        rows.setdefault(row, []).append(candidates(marks[int(batch_order(batch)[document])]))
    units = list(rows.values())
    if per == "document":
        units = [[own] for unit in units for own in unit]
    if per == "batch":
        units = [[own for unit in units for own in unit]]
    expected = brute_dilution(units, num_anchors)
    given = (found.blocks, found.rows, found.alone, found.shared)
    np.testing.assert_allclose(given, expected, rtol=1e-9)


def batch_order(batch: Any) -> list[int]:
    return [index for documents in batch.documents for index, _ in documents]


@pytest.mark.parametrize("num_anchors", [1, 3, 7])
def test_alike_conversations_give_the_design_effect(num_anchors):
    """Kish's, with the mean correlation over all pairs of different candidates."""
    rows, batch_size = 6, 3
    spans = Spans.of(documents(*["a" * 11] * rows))
    found = dilution(spans, num_anchors, batch_size, OVERLAP)
    shares = [OVERLAP[b - a - 1] if b - a <= 2 else 0.0 for a, b in combinations(range(10), 2)]
    effective = num_anchors / (1 + (num_anchors - 1) * 0.7 * float(np.mean(shares)))
    assert math.isclose(found.rows, 1 / batch_size)
    assert math.isclose(found.alone + 0.7 * found.shared, 1 / (batch_size * effective))


def test_more_anchors_than_candidates_are_all_candidates():
    spans = Spans.of(documents(*["aaaaaa"] * 4))
    assert dilution(spans, 5, 2, OVERLAP) == dilution(spans, 500, 2, OVERLAP)


def test_dilution_is_the_variance_of_a_simulated_step():
    """A step of two rows with three anchors each: within four standard errors of the mean."""
    random, steps, spans = np.random.default_rng(0), 40_000, Spans.of(documents("a" * 9, "a" * 9))
    between, within, shared = 0.5, 2.0, 0.8
    apart = np.abs(np.arange(8)[:, None] - np.arange(8))
    padded = np.concatenate([[1 / shared], OVERLAP, np.zeros(8)])
    root = np.linalg.cholesky(within * shared * padded[apart])
    each = random.normal(size=(steps, 2, 8)) @ root.T
    each += math.sqrt(between) * random.normal(size=(steps, 2, 1))
    drawn = random.permuted(np.tile(np.arange(8), (steps, 2, 1)), axis=2)[:, :, :3]
    squares = np.take_along_axis(each, drawn, 2).mean(axis=(1, 2)) ** 2
    found = dilution(spans, 3, 2, OVERLAP)
    expected = found.rows * between + found.alone * within + found.shared * within * shared
    assert abs(squares.mean() - expected) < 4 * squares.std() / math.sqrt(steps)


def test_data_without_candidates_are_refused():
    with pytest.raises(ValueError, match="no row has a candidate"):
        dilution(Spans.of(documents(".a.", "a.")), 4, 1, OVERLAP)


def noise_of(seed: int = 0, signal: float = 1.0, block_sizes: tuple[int, ...] = (3,)) -> Any:
    """Moments of random gradients, their mean ``signal`` in each of ten numbers."""
    random = np.random.default_rng(seed)
    wholes = {}
    for size in block_sizes:
        own = random.normal(size=(40, 10)) * np.array([[1.25], [1.0]] * 20)
        gradients = signal + own + random.normal(size=(20, 10)).repeat(2, axis=0)
        groups = [np.array([0, 1, 2]), np.array([10, 20, 30])] * 20
        conversation = np.arange(40) // 2
        wholes[size] = gradient_moments(gradients, conversation, groups, label_overlap(size))
    return GradientNoise(wholes, {})


def step_table(
    rows: tuple[int, ...], anchors: tuple[int, ...], sizes: tuple[int, ...] = (3,)
) -> pd.DataFrame:
    lines = [(*line, 0.1 + 0.01 * math.prod(line)) for line in product(rows, anchors, sizes)]
    return pd.DataFrame(lines, columns=["batch_size", "num_anchors", "block_size", "seconds"])


SPANS = Spans.of(documents(*MARKS, *MARKS))


def test_rates_follow_from_moments_dilution_and_seconds():
    noise = noise_of()
    options: dict[str, Any] = {"batch_sizes": (1, 2), "num_anchors": (1, 2, 4)}
    table = progress_table(noise, SPANS, step_table((1, 2), (1, 2, 4)), **options)
    signal, between, within, shared = noise.wholes[3].estimates()[0]
    assert min(signal, between, within, shared, within - shared) > 0
    assert len(table) == 6
    for line in table.to_dict("records"):
        found = dilution(SPANS, line["num_anchors"], line["batch_size"], OVERLAP)
        variance = found.rows * between + found.alone * within + found.shared * shared
        assert math.isclose(line["noise"], variance / signal)
        assert math.isclose(line["rows_noise"], found.rows * between / signal)
        assert math.isclose(line["progress"], (1 + variance / signal) ** -EXPONENT)
        seconds = 0.1 + 0.03 * line["batch_size"] * line["num_anchors"]
        assert math.isclose(line["seconds"], seconds)
        assert math.isclose(line["rate"], line["progress"] / seconds)
        assert line["low"] < line["rate"] < line["high"]
        assert math.isclose(line["blocks"], found.blocks)
        alone = found.alone + found.shared * shared / within
        assert math.isclose(line["effective"], 1 / alone / line["batch_size"])
        assert line["known"]


def test_one_option_of_each_block_size_is_the_best():
    sizes = (2, 3)
    noise = noise_of(block_sizes=sizes)
    times = step_table((2,), (1, 2, 4), sizes)
    table = progress_table(noise, SPANS, times, batch_sizes=(2,), num_anchors=(1, 2, 4))
    np.testing.assert_allclose(table.groupby("block_size")["best"].sum(), 1)
    slow = times.assign(seconds=times["seconds"] * np.where(times["num_anchors"] == 2, 1e-3, 1))
    table = progress_table(noise, SPANS, slow, batch_sizes=(2,), num_anchors=(1, 2, 4))
    assert (table.loc[table["num_anchors"] == 2, "best"] == 1).all()


def test_the_error_of_step_times_widens_intervals():
    times = step_table((2,), (2, 4))
    given: dict[str, Any] = {"batch_sizes": (2,), "num_anchors": (2, 4)}
    sure = progress_table(noise_of(), SPANS, times, **given)
    unsure = progress_table(noise_of(), SPANS, times.assign(error=0.5), **given)
    assert ((unsure["high"] / unsure["low"]) > 2 * sure["high"] / sure["low"]).all()
    assert unsure["best"].max() < 0.9
    np.testing.assert_array_equal(sure["rate"], unsure["rate"])


def test_a_fit_is_asked_for_the_seconds_of_each_option():
    shape, time = Shape.of(tiny_drafter().config), StepTime(0.01, 1e-9, 0.1, 0.2, 4)
    form = Step(1, 1, 1, features="cached", device="cpu", dtype="fp32")
    given: dict[str, Any] = {"batch_sizes": (2,), "num_anchors": (2, 4), "shape": shape}
    rows = Spans.of(documents("a" * 12, ".." + "a" * 10, "a" * 9, "a" * 5))
    table = progress_table(noise_of(), rows, time, **given, step=form)
    for line in table.to_dict("records"):
        sizes = (round((12 + 12 + 9 + 5) / 4), line["num_anchors"], 3, 2)
        step = Step(*sizes, features="cached", device="cpu", dtype="fp32")
        expected = time.predict(step_cost(shape, step)["operations"].sum())
        assert math.isclose(line["seconds"], expected)
    # All candidates of the rows of the fuller batch, in the mean.
    table = progress_table(noise_of(), rows, time, **(given | {"per": "batch"}), step=form)
    assert (
        table["seconds"] < progress_table(noise_of(), rows, time, **given, step=form)["seconds"]
    ).all()
    with pytest.raises(ValueError, match="need the shape of the models, got None"):
        progress_table(noise_of(), rows, time, batch_sizes=(2,))


def test_rows_of_several_lengths_and_units_are_options():
    chats = documents("a" * 12, "a" * 9, "a" * 5, "a" * 12)
    spans = {length: Spans.of(chats, seq_len=length) for length in (6, 12)}
    times = step_table((2,), (2,)).merge(pd.DataFrame({"seq_len": [6, 12]}), how="cross")
    times["seconds"] *= times["seq_len"]
    given: dict[str, Any] = {"batch_sizes": (2,), "num_anchors": (2,)}
    table = progress_table(noise_of(), spans, times, **given, per=("row", "document"))
    assert table[["seq_len", "per"]].values.tolist() == [
        *([6, "row"], [6, "document"], [12, "row"], [12, "document"])
    ]
    seconds = table.groupby("seq_len")["seconds"].first()
    assert math.isclose(seconds[12], 2 * seconds[6])


def test_times_that_are_missing_or_double_are_refused():
    times = step_table((2,), (2, 4))
    given: dict[str, Any] = {"batch_sizes": (2,), "num_anchors": (2, 4)}
    for wrong in (times[:1], pd.concat([times, times]), times.assign(seconds=0.0)):
        with pytest.raises(ValueError, match="seconds must hold one time > 0 of each option"):
            progress_table(noise_of(), SPANS, wrong, **given)
    with pytest.raises(ValueError, match=r"seconds must have the columns \['seconds'\]"):
        progress_table(noise_of(), SPANS, times.drop(columns="seconds"), **given)
    with pytest.raises(ValueError, match=r"block_sizes must be of \[3\], as measured, got \[4\]"):
        progress_table(noise_of(), SPANS, times, block_sizes=(4,), **given)


def test_a_signal_that_is_not_told_from_zero_is_said_and_orders_still():
    given: dict[str, Any] = {"batch_sizes": (2,), "num_anchors": (1, 4)}
    table = progress_table(noise_of(3, signal=0.0), SPANS, step_table((2,), (1, 4)), **given)
    assert not table["known"].any()
    assert table["low"].max() < 1e-4
    assert math.isclose(table["best"].sum(), 1)
    assert "is not known yet" in progress_reason(table)


def walked(
    scales: dict[int, tuple[float, float, float]],
    share: Any,
    measured: Any,
    steps: int,
) -> float:
    """Progress step by step, the noise linear in the progress made."""

    def noise(of: Any, made: float, knots: list[float]) -> float:
        values = [
            of.rows * between + of.alone * within + of.shared * shared
            for between, within, shared in scales.values()
        ]
        if made > knots[-1] and len(knots) > 1:
            slope = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
            return values[-1] + max(slope, 0) * (made - knots[-1])
        return float(np.interp(made, knots, values))

    knots, made, last = [0.0], 0.0, list(scales)[-1]
    fine = 100
    marks = [step * fine for step in scales]
    values = [
        measured.rows * between + measured.alone * within + measured.shared * shared
        for between, within, shared in scales.values()
    ]
    # Progress between two measurements is what makes the steps come out right.
    for number in range(1, len(marks)):
        low, high = 0.0, float(last)
        for _ in range(60):
            middle = (low + high) / 2
            grid = np.linspace(values[number - 1], values[number], 2001)
            taken = middle * float(((1 + (grid[1:] + grid[:-1]) / 2) ** EXPONENT).mean())
            low, high = (
                (middle, high)
                if taken < (marks[number] - marks[number - 1]) / fine
                else (low, middle)
            )
        knots.append(knots[-1] + low)
    for _ in range(steps * fine):
        made += (1 + noise(share, made, knots)) ** -EXPONENT / fine
    return made


@pytest.mark.parametrize("seconds", [3.0, 20.0, 90.0])
def test_a_run_is_walked_through_its_measurements(seconds):
    noises = {0: noise_of(0, 2.0), 20: noise_of(1, 1.0), 50: noise_of(2, 0.7)}
    scales = {}
    for step, noise in noises.items():
        signal, between, within, shared = noise.wholes[3].estimates()[0].clip(min=0)
        scales[step] = (between / signal, within / signal, shared / signal)
    times = pd.DataFrame([(2, 4, 3, 0.5)], columns=[*step_table((1,), (1,))])
    given: dict[str, Any] = {"batch_sizes": (2,), "num_anchors": (4,), "measured": (1, 2)}
    table = progress_table(noises, SPANS, times, budget=seconds, **given)
    shares = dilution(SPANS, 4, 2, OVERLAP), dilution(SPANS, 2, 1, OVERLAP)
    expected = walked(scales, *shares, steps=round(seconds / 0.5))
    assert math.isclose(table["rate"].iloc[0] * seconds, expected, rel_tol=0.01)
    assert math.isclose(table["progress"].iloc[0], table["rate"].iloc[0] * 0.5)


def test_one_measurement_holds_for_the_whole_run():
    times, given = step_table((2,), (1, 4)), {"batch_sizes": (2,), "num_anchors": (1, 4)}
    plain = progress_table(noise_of(), SPANS, times, **given)
    run = progress_table(noise_of(), SPANS, times, **given, budget=50.0)
    also = progress_table({30: noise_of()}, SPANS, times, **given, budget=50.0, measured=(1, 2))
    for table in (run, also):
        np.testing.assert_allclose(table["rate"], plain["rate"])
        np.testing.assert_allclose(table["high"], plain["high"])


def test_several_measurements_need_their_run():
    noises = {0: noise_of(), 9: noise_of(1)}
    for given in ({"budget": 5.0}, {"measured": (1, 2)}):
        with pytest.raises(ValueError, match="several measurements need budget and measured"):
            progress_table(noises, SPANS, step_table((8,), (4,)), num_anchors=(4,), **given)


def options(**columns: list[Any]) -> pd.DataFrame:
    """Three options, as `progress_table` gives them."""
    table = pd.DataFrame(
        {"num_anchors": [8, 24, 32], "rate": [1.0, 2.0, 1.5], "best": [0.1, 0.8, 0.1]}
    )
    table = table.assign(seq_len=100, per="row", batch_size=4, block_size=7, known=True, fits=True)
    table = table.assign(blocks=4 * table["num_anchors"], seconds=[1.0, 2.0, 3.0])
    table = table.assign(progress=[0.2, 0.5, 0.6], noise=4.0, rows_noise=1.0)
    return table.assign(**({"effective": table["num_anchors"] / 3} | columns))


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({}, "anchors share their labels: 24 count as 8"),
        ({"rows_noise": 3.0}, "75% of its noise is that of few conversations, which no anchor"),
        ({"noise": 0.3}, "a step's gradient is hardly noisy any more (noise 0.3)"),
        ({"effective": 20.0}, "a step has 4 times as much noise as signal"),
    ],
)
def test_the_reason_says_what_more_anchors_cost_and_add(columns, why):
    """A third more cost half as much time again and add a fifth."""
    tenth = math.log(1.1) / math.log(4 / 3)
    reason = progress_reason(options(**columns))
    assert "24 anchors a row with 4 rows" in reason and "80%" in reason
    cost, gain = 1.5**tenth - 1, 1.2**tenth - 1
    assert f"more of them cost {cost:.1%} of a step's time and add {gain:.1%} to what it" in reason
    assert why in reason


def test_the_reason_of_the_largest_number_looks_back():
    reason = progress_reason(options().query("num_anchors < 32"))
    assert "the most that was asked for" in reason
    tenth = math.log(1.1) / math.log(3)
    assert f"cost {2**tenth - 1:.1%}" in reason and f"added {2.5**tenth - 1:.1%}" in reason


def test_the_reason_is_of_one_block_size():
    two = pd.concat([options(), options(block_size=4)])
    with pytest.raises(ValueError, match=r"block_size must be one of \[4, 7\], got None"):
        progress_reason(two)
    with pytest.raises(ValueError, match=r"block_size must be one of \[4, 7\], got 5"):
        progress_reason(two, 5)
    assert progress_reason(two, 4) == progress_reason(options(block_size=4))


def test_batches_of_the_first_epoch_are_those_of_a_batch_total():
    spans = Spans.of(documents(*["a" * n for n in (4, 5, 6, 7, 8, 9)]))
    found = dilution(spans, 3, 2, OVERLAP, "batch")
    batches = in_training_batches(spans, 2)
    units = [
        [
            list(range(int(batches.row_tokens[row]) - 1))
            for row in np.flatnonzero(batches.row_batch == b)
        ]
        for b in range(3)
    ]
    each = [brute_dilution([unit], 3) for unit in units]
    blocks = np.mean([one[0] for one in each])
    np.testing.assert_allclose(found.blocks, blocks)
    squares = np.mean([one[1] * one[0] ** 2 for one in each])
    np.testing.assert_allclose(found.rows, squares / blocks**2)


def test_what_does_not_fit_is_never_the_best():
    shape, time = Shape.of(tiny_drafter().config), StepTime(0.01, 1e-9, 0.1, 0.2, 4)
    rows = Spans.of(documents("a" * 12, ".." + "a" * 10, "a" * 9, "a" * 5))
    given: dict[str, Any] = {"batch_sizes": (1, 2), "num_anchors": (1, 2, 4), "shape": shape}
    given |= {"step": Step(1, 1, 1, features="cached", device="cpu", dtype="fp32")}
    free = progress_table(noise_of(), rows, time, **given)
    assert free["fits"].all() and math.isclose(free["best"].sum(), 1)
    # Room for all but the largest step, of the longest row and the most blocks.
    held = [
        StepBytes(shape, Step(12, n, 3, b, features="cached", device="cpu", dtype="fp32")).peak
        for b, n in product((1, 2), (1, 2, 4))
    ]
    second, largest = sorted(held)[-2:]
    memory = (second + largest) / 2 / 0.92
    table = progress_table(noise_of(), rows, time, memory=memory, **given)
    assert table["fits"].tolist() == [size < largest for size in held]
    assert not table.loc[~table["fits"], "best"].any() and math.isclose(table["best"].sum(), 1)
    unchanged = [name for name in table if name not in ("best", "fits")]
    pd.testing.assert_frame_equal(table[unchanged], free[unchanged])
    with pytest.raises(ValueError, match="memory needs the shape of the models, got None"):
        progress_table(
            noise_of(),
            SPANS,
            step_table((2,), (2,)),
            memory=1e9,
            batch_sizes=(2,),
            num_anchors=(2,),
        )
    # The reason speaks of those that fit.
    table = options(fits=[True, False, True], best=[0.3, 0.0, 0.7])
    assert best_option(table)["num_anchors"] == 32
    assert "best of 2 settings" in progress_reason(table)
    with pytest.raises(ValueError, match="table must hold an option that fits, got none"):
        progress_reason(table.assign(fits=False))


def test_the_best_option_has_the_highest_probability_then_the_highest_rate():
    assert best_option(options())["num_anchors"] == 24
    assert best_option(options(best=[0.4, 0.2, 0.4]))["num_anchors"] == 32
    two = pd.concat([options(), options(best=[1.0, 0.0, 0.0]).assign(block_size=4)])
    assert best_option(two, 4)["num_anchors"] == 8 and best_option(two, 7)["num_anchors"] == 24
    assert progress_reason(options().assign(batch_size=1)).startswith(
        "24 anchors a row with 1 row is"
    )


# The test that notices each fault.
NOTICED: dict[str, Any] = {
    "a conversation is a pair with itself": test_noise.test_single_blocks_give_means_over_pairs,
    "what all gradients share is what sets conversations apart": (
        test_noise.test_single_blocks_give_means_over_pairs
    ),
    "neighbours share no label": lambda: test_noise.test_label_overlap_is_that_of_two_blocks(
        5, 4.0
    ),
    "squares are those of the largest gradients": (
        test_noise.test_gradients_are_those_of_the_training_objective
    ),
    "a short answer has as many anchors as a long one": (
        lambda: test_dilution_is_the_mean_over_every_draw(50)
    ),
    "anchors are drawn with replacement": lambda: test_dilution_is_the_mean_over_every_draw(2),
    "each block is of another conversation": lambda: test_dilution_is_the_mean_over_every_draw(2),
    "noise stays as it was at first": lambda: test_a_run_is_walked_through_its_measurements(90.0),
    "step times have no error": test_the_error_of_step_times_widens_intervals,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ESTIMATES)
def test_a_planted_fault_is_noticed(name, monkeypatch):
    noticing = NOTICED[name]
    given = (monkeypatch,) if "monkeypatch" in inspect.signature(noticing).parameters else ()
    plant(monkeypatch, ESTIMATES[name])
    # Tests hold some functions by a name of their own.
    for module in (sys.modules[__name__], test_noise):
        fault = ESTIMATES[name]
        owner, function = fault.owner(importlib.import_module(fault.module))
        if hasattr(module, function) and not inspect.isclass(owner):
            monkeypatch.setattr(module, function, getattr(owner, function))
    with pytest.raises(AssertionError):
        noticing(*given)
