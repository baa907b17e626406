"""`dspark_lab.tuning.choice`: the closed form is the average over every draw there is.

Small rows are checked against a full enumeration of the draws, larger ones against many draws.
Where a test can fail by chance, its seed is fixed and the chance over seeds is at most RISK, by
Hoeffding's inequality: the mean of n independent shares is more than e off with probability at
most 2 exp(-2 n e^2).
"""

import math

import oracle
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.blocks import draw_blocks, times_supervised
from dspark_lab.chats import Batch, Chat, Encoded, collate, pack
from dspark_lab.tuning import (
    anchors_needed,
    coverage_table,
    packing_table,
    reaching_anchors,
    token_coverage,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = Chat(({"role": "assistant", "content": ""},), id="hand-made")
RISK = 1e-6

# Four conversations of several lengths, with short answers and long ones.
MARKS = (
    "..aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "....aaaaa...aaaaaaaaaaaaaaa",
    ".aa.a.aaa......",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)


def documents(*marks: str) -> list[Encoded]:
    """Documents of as many tokens as there are characters, supervised where they are ``a``."""
    return [
        Encoded(
            torch.zeros(len(mark), dtype=torch.long), torch.tensor([c == "a" for c in mark]), CHAT
        )
        for mark in marks
    ]


def unpacked() -> Batch:
    return collate(documents(*MARKS), 0)


def packed() -> Batch:
    return pack(documents(*MARKS), 70, 0)


def copies(batch: Batch, count: int) -> Batch:
    """A batch of one row, so many times: one draw on it is as many independent draws."""
    return Batch(**{name: value.expand(count, -1) for name, value in vars(batch).items()})


def possible_error(bound: float) -> float:
    """How far off a mean may be; ``bound`` is the sum of its terms' squared largest values."""
    return math.sqrt(math.log(2 / RISK) * bound / 2)


@st.composite
def small_batches(draw: st.DrawFn) -> Batch:
    """A few short documents with at least one supervised token, one a row or several."""
    marks = draw(st.lists(st.text("aaa.", min_size=1, max_size=7), min_size=1, max_size=3))
    marks.append("a" + draw(st.text("a.", max_size=4)))
    longest = max(len(mark) for mark in marks)
    if draw(st.booleans()):
        return pack(documents(*marks), max(longest, draw(st.integers(4, 12))), 0)
    return collate(documents(*marks), 0, longest + draw(st.integers(0, 2)))


counts = st.integers(1, 6)


def lists(batch: Batch) -> dict[str, list]:
    return {
        "loss_mask": batch.loss_mask.tolist(),
        "doc_remaining": batch.doc_remaining.tolist(),
    }


def over_supervised(batch: Batch, values: list[list[float]]) -> float:
    """The mean over the batch's supervised tokens."""
    pairs = [
        (value, flag)
        for row, flags in zip(values, batch.loss_mask.tolist(), strict=True)
        for value, flag in zip(row, flags, strict=True)
    ]
    return math.fsum(value for value, flag in pairs if flag) / sum(flag for _, flag in pairs)


def mean_token_coverage(batch: Batch, num_anchors: int, block_size: int) -> float:
    return over_supervised(batch, token_coverage(batch, num_anchors, block_size).tolist())


@given(small_batches(), counts)
def test_a_token_is_reached_from_the_candidates_whose_block_supervises_it(batch, block_size):
    expected = oracle.reaching_anchors(block_size=block_size, **lists(batch))
    assert reaching_anchors(batch, block_size).tolist() == expected


@settings(max_examples=150)
@given(small_batches(), counts, counts)
def test_token_coverage_is_the_share_of_all_possible_draws(batch, num_anchors, block_size):
    expected = oracle.coverage(num_anchors=num_anchors, block_size=block_size, **lists(batch))
    got = token_coverage(batch, num_anchors, block_size)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_a_token_in_the_middle_of_ten_candidates_is_covered_as_often_as_can_be_counted():
    batch = collate(documents("aaaaaaaaaaa"), 0)
    covered = token_coverage(batch, 3, 2)[0].tolist()
    # Missed where all 3 of 10 candidates are among the 8 that do not reach it: 56 of 120 draws.
    assert covered == pytest.approx([0, 3 / 10] + [1 - 56 / 120] * 9)


@pytest.mark.parametrize("block_size", [1, 4, 7])
def test_token_coverage_is_how_often_drawing_covers_each_token(block_size):
    draws, anchors = 20_000, 9
    row = packed().row(0)
    seq_len = row.input_ids.shape[1]
    blocks = draw_blocks(copies(row, draws), anchors, block_size, seed=1)
    sampled = (times_supervised(blocks) > 0).double().mean(dim=0)
    expected = token_coverage(row, anchors, block_size)[0]
    assert expected.min() == 0 and expected.max() > 0.1
    worst = math.sqrt(math.log(2 * seq_len / RISK) / (2 * draws))
    assert (sampled - expected).abs().max() < worst


def test_every_candidate_an_anchor_covers_all_but_the_first_token_of_each_run():
    coverage = token_coverage(collate(documents(".aaa.a.aa"), 0), 4, 1)
    assert coverage.tolist() == [[0, 0, 1, 1, 0, 0, 0, 0, 1]]


def test_prompt_and_padding_are_never_covered():
    batch = packed()
    coverage = token_coverage(batch, 40, 7)
    assert coverage[~batch.loss_mask].eq(0).all()
    assert coverage[batch.loss_mask].gt(0).any()


@pytest.mark.parametrize("batch", [unpacked(), packed()], ids=["unpacked", "packed"])
def test_expected_is_the_mean_of_token_coverage_over_supervised_tokens(batch):
    table = coverage_table(batch, num_anchors=(1, 4, 64), block_sizes=(1, 7))
    expected = [mean_token_coverage(batch, n, k) for k in (1, 7) for n in (1, 4, 64)]
    assert table["expected"].tolist() == pytest.approx(expected)
    assert table["block_size"].tolist() == [1, 1, 1, 7, 7, 7]
    assert table["num_anchors"].tolist() == [1, 4, 64, 1, 4, 64]


def test_sampled_is_what_one_draw_of_the_seed_covers():
    batch = packed()
    table = coverage_table(batch, num_anchors=(2, 9), block_sizes=(3,), seed=5)
    for num_anchors, sampled in zip((2, 9), table["sampled"], strict=True):
        blocks = draw_blocks(batch, num_anchors, 3, seed=5)
        times = oracle.times_supervised(
            70, blocks.anchor_positions.tolist(), blocks.eval_mask.tolist()
        )
        covered = sum(count > 0 for row in times for count in row)
        assert sampled == pytest.approx(covered / int(batch.loss_mask.sum()))


def test_sampled_agrees_with_expected_over_many_rows():
    rows, draws = 2_000, 5
    batch = copies(packed().row(0), rows)
    table = coverage_table(batch, num_anchors=(3, 12), block_sizes=(2, 7), draws=draws)
    error = possible_error(1 / (rows * draws))
    assert error < 0.03
    assert (table["sampled"] - table["expected"]).abs().max() < error


def test_draws_are_independent_of_each_other():
    # One anchor of this row covers one of two runs: 1 of 8 or 5 of 8 tokens.
    batch = collate(documents("aa.aaaaaa"), 0)
    draws = 800
    (line,) = coverage_table(batch, (1,), (7,), draws=draws).itertuples()
    assert line.sampled == pytest.approx(line.expected, abs=possible_error(1 / draws))


@settings(max_examples=50)
@given(small_batches(), counts, counts)
def test_supervisions_and_blocks_are_means_over_all_possible_draws(batch, num_anchors, block_size):
    (line,) = coverage_table(batch, (num_anchors,), (block_size,)).itertuples()
    draws = oracle.all_draws(num_anchors=num_anchors, block_size=block_size, **lists(batch))
    slots = math.fsum(sum(map(sum, row)) / len(row) for row in draws)
    assert line.supervisions == pytest.approx(slots / int(batch.loss_mask.sum()))
    candidates = [sum(row) for row in oracle.candidate_mask(**lists(batch))]
    kept = [min(count, num_anchors) for count in candidates]
    assert line.blocks == pytest.approx(sum(kept) / len(kept))


def test_anchors_needed_is_the_smallest_number_that_reaches_the_goal():
    batch = packed()
    goals = (0.1, 0.3, 0.5, 0.8, 0.9)
    table = anchors_needed(batch, goals, (1, 4, 7))
    assert table["goal"].tolist() == list(goals) * 3
    assert table["block_size"].tolist() == [1] * 5 + [4] * 5 + [7] * 5
    for line in table.itertuples():
        enough = int(line.num_anchors)
        assert mean_token_coverage(batch, enough, line.block_size) >= line.goal
        assert line.expected == pytest.approx(mean_token_coverage(batch, enough, line.block_size))
        if enough > 1:
            assert mean_token_coverage(batch, enough - 1, line.block_size) < line.goal
    assert table["num_anchors"].min() == 1 and table["num_anchors"].max() > 50


def test_no_number_of_anchors_reaches_a_goal_above_the_ceiling():
    # Of ten supervised tokens, the first of each of two runs is never a label.
    batch = collate(documents("aaaa.aaaaaa"), 0)
    table = anchors_needed(batch, (0.5, 0.8, 0.81, 1.0), (3,))
    assert table["ceiling"].tolist() == [0.8] * 4
    assert table["num_anchors"].isna().tolist() == [False, False, True, True]
    assert table["expected"].isna().tolist() == [False, False, True, True]
    assert table["num_anchors"][1] == 8


def test_runs_of_one_token_have_a_ceiling_of_nothing():
    table = anchors_needed(collate(documents("a.a.a"), 0), (0.01,), (7,))
    assert table["ceiling"].tolist() == [0.0]
    assert table["num_anchors"].isna().all()


@pytest.mark.parametrize("goal", [0, -0.5, 1.01, math.nan, math.inf])
def test_a_goal_that_is_no_share_is_refused(goal):
    with pytest.raises(ValueError, match=r"each goal must lie in \(0, 1\]"):
        anchors_needed(unpacked(), (0.5, goal), (4,))


def test_per_document_anchors_cover_what_they_cover_unpacked():
    table = packing_table(documents(*MARKS), (40, 55, 200), (2, 9), block_size=4)
    (row,) = table[table["anchors per"] == "document"]["row"].unique()
    line = table[table["row"] == row]
    expected = [mean_token_coverage(unpacked(), n, 4) for n in (2, 9)]
    assert line["expected"].tolist() == pytest.approx(expected)
    assert line["num_anchors"].tolist() == [2, 9]
    assert line["documents"].tolist() == [1, 1]


def test_per_row_anchors_cover_what_a_packed_batch_says():
    lengths = (40, 55, 200)
    table = packing_table(documents(*MARKS), lengths, (2, 9), block_size=4)
    lines = table[table["anchors per"] == "row"]
    batches = [pack(documents(*MARKS), length, 0) for length in lengths]
    expected = [mean_token_coverage(batch, n, 4) for batch in batches for n in (2, 9)]
    assert lines["expected"].tolist() == pytest.approx(expected)
    rows = [len(batch.input_ids) for batch in batches]
    assert lines["documents"].tolist() == [4 / count for count in rows for _ in (2, 9)]
    assert lines["row"].nunique() == len(lengths)
    assert all(str(n) in text for n, text in zip(lengths, lines["row"].unique(), strict=True))


def test_packing_more_documents_into_a_row_lowers_what_a_fixed_number_of_anchors_covers():
    twins = documents(*[MARKS[0]] * 8)
    table = packing_table(twins, (80, 160, 320), (16,))
    assert table["documents"].tolist() == [1, 2, 4, 8]
    assert table["expected"].is_monotonic_decreasing
    assert table["expected"].iloc[-1] < table["expected"].iloc[0] / 2


@pytest.mark.parametrize(
    "table",
    [coverage_table, anchors_needed, lambda batch: packing_table(documents("...", ".."), (8,))],
    ids=["coverage_table", "anchors_needed", "packing_table"],
)
def test_coverage_of_no_supervised_token_is_refused(table):
    with pytest.raises(ValueError, match="coverage needs a supervised token"):
        table(collate(documents("...", ".."), 0))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda b: token_coverage(b, 0, 4), ValueError, "num_anchors must be >= 1, got 0"),
        (lambda b: token_coverage(b, 2.0, 4), TypeError, "num_anchors must be an int, got 2.0"),
        (lambda b: token_coverage(b, 2, 0), ValueError, "block_size must be >= 1, got 0"),
        (lambda b: reaching_anchors(b, 0), ValueError, "block_size must be >= 1, got 0"),
        (lambda b: coverage_table(b, (4, 0)), ValueError, "num_anchors must be >= 1, got 0"),
        (lambda b: coverage_table(b, draws=0), ValueError, "draws must be >= 1, got 0"),
        (lambda b: anchors_needed(b, (0.5,), (0,)), ValueError, "block_size must be >= 1, got 0"),
        (lambda b: packing_table([], (8,)), ValueError, "at least one conversation"),
        (lambda b: packing_table(documents(*MARKS), (39,)), ValueError, "more than length 39"),
    ],
)
def test_an_impossible_choice_says_what_is_wrong(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(unpacked())


def test_tables_hold_numbers_in_their_columns():
    coverage = coverage_table(unpacked(), (4,), (7,))
    assert [coverage[name].dtype.kind for name in coverage] == list("iiffff")
    needed = anchors_needed(unpacked(), (0.5, 1.0), (7,))
    assert needed["num_anchors"].dtype == pd.Int64Dtype()
