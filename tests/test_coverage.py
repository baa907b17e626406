"""Coverage in `dspark_lab.tuning`: the closed form is the average over every draw there is.

Small data sets are checked against every possible draw, walked through in plain Python.
"""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dspark_lab.blocks import PER, draw_blocks
from dspark_lab.chats import Batch, collate, pack, packed_places
from dspark_lab.tuning import (
    REASONS,
    Spans,
    anchors_needed,
    coverage_table,
    never_table,
    packing_table,
    slot_supervision,
    supervision,
    supervision_table,
    token_coverage,
    token_supervision,
)
from tests import oracle
from tests.samples import documents

pytestmark = pytest.mark.usefixtures("one_thread")

# Four conversations of several lengths, with short answers and long ones.
MARKS = (
    "..aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "....aaaaa...aaaaaaaaaaaaaaa",
    ".aa.a.aaa......",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)


def unpacked() -> Batch:
    return collate(documents(*MARKS), 0)


def packed() -> Batch:
    return pack(documents(*MARKS), 70, 0)


@dataclass(frozen=True)
class Case:
    """Conversations, how they are cut and packed, and what is drawn."""

    marks: tuple[str, ...]
    seq_len: int | None
    row_length: int | None
    num_anchors: int
    block_size: int
    rows_per_batch: int

    @property
    def spans(self) -> Spans:
        encoded = documents(*self.marks)
        spans = Spans.of(encoded, seq_len=self.seq_len, row_length=self.row_length)
        return spans.in_batches(self.rows_per_batch)

    @property
    def cut(self) -> list[str]:
        return [mark[: self.seq_len] for mark in self.marks]

    @property
    def rows(self) -> list[list[int]]:
        """The documents of each row."""
        row_of = self.spans.document_row
        return [np.flatnonzero(row_of == row).tolist() for row in range(self.spans.rows)]

    def units(self, per: str) -> list[list[int]]:
        size = {"row": 1, "batch": self.rows_per_batch}.get(per)
        if size is None:
            return [[document] for row in self.rows for document in row]
        firsts = range(0, len(self.rows), size)
        return [sum(self.rows[first : first + size], []) for first in firsts]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A few short conversations, perhaps cut, perhaps packed."""
    marks = draw(st.lists(st.text("aaa.", min_size=1, max_size=7), min_size=1, max_size=4))
    seq_len = draw(st.none() | st.integers(1, 8))
    longest = max(len(mark[:seq_len]) for mark in marks)
    row_length = draw(st.none() | st.integers(longest, 12))
    sizes = (draw(st.integers(1, most)) for most in (8, 8, 3))
    return Case(tuple(marks), seq_len, row_length, *sizes)


def supervises(case: Case, document: int, anchor: int) -> list[tuple[int, int, int]]:
    """The (document, position, slot) that the block at an anchor supervises."""
    answer = case.cut[document][anchor + 1 :].split(".")[0]
    return [(document, anchor + 1 + slot, slot) for slot in range(len(answer))][: case.block_size]


def enumerated(case: Case, per: str) -> tuple[Counter, Counter]:
    """Expected times of each (document, position, slot), and P(covered) of each token."""
    times: Counter = Counter()
    covered: Counter = Counter()
    for unit in case.units(per):
        candidates = [
            (document, anchor)
            for document in unit
            for anchor in range(len(case.cut[document]))
            if case.cut[document][anchor : anchor + 2] == "aa"
        ]
        drawn = min(case.num_anchors, len(candidates))
        assume(math.comb(len(candidates), drawn) < 5000)
        draws = list(combinations(candidates, drawn))
        for draw in draws:
            places = [place for anchor in draw for place in supervises(case, *anchor)]
            for place in places:
                times[place] += 1 / len(draws)
            for token in {(document, position) for document, position, _ in places}:
                covered[token] += 1 / len(draws)
    return times, covered


@settings(max_examples=150)
@given(cases(), st.sampled_from(PER))
def test_each_token_is_supervised_as_often_as_over_all_possible_draws(case, per):
    times, covered = enumerated(case, per)
    n, k = case.num_anchors, case.block_size
    table = token_supervision(case.spans, n, k, per=per, gamma=2.5)
    tokens = [(d, p) for d, mark in enumerate(case.marks) for p in range(len(mark))]
    assert list(zip(table["document"], table["position"], strict=True)) == tokens
    for line, token in zip(table.to_dict("records"), tokens, strict=True):
        at_slots = [times[(*token, slot)] for slot in range(k)]
        assert [line[f"slot_{slot}"] for slot in range(k)] == pytest.approx(at_slots)
        assert line["times"] == pytest.approx(sum(at_slots))
        weighted = sum(at * math.exp(-slot / 2.5) for slot, at in enumerate(at_slots))
        assert line["weighted"] == pytest.approx(weighted)
        assert line["p_covered"] == pytest.approx(covered[token])
        assert line["anchors"] == sum(at > 0 for at in at_slots)
        assert line["supervised"] == (case.marks[token[0]][token[1]] == "a")


@settings(max_examples=150)
@given(cases(), st.sampled_from(PER))
def test_supervision_is_what_all_possible_draws_supervise_on_average(case, per):
    times, covered = enumerated(case, per)
    assume(covered)
    found = supervision(case.spans, case.num_anchors, case.block_size, per=per)
    at_slots = [0.0] * case.block_size
    for (_, _, slot), at in times.items():
        at_slots[slot] += at
    weighted = sum(at * math.exp(-k / 4) for k, at in enumerate(at_slots))
    assert found.expected_by_slot.tolist() == pytest.approx(at_slots)
    assert found.expected == pytest.approx(sum(at_slots))
    assert found.weighted == pytest.approx(weighted)
    assert found.covered == pytest.approx(sum(covered.values()))
    assert found.supervised == sum(mark.count("a") for mark in case.cut)
    assert found.labels == len(covered)
    assert found.rows == len(case.rows)
    # Slot 0 of each kept block is supervised, and of no other.
    assert found.blocks == pytest.approx(at_slots[0] / len(case.rows))
    assert found.share == pytest.approx(sum(covered.values()) / found.supervised)
    assert found.times == pytest.approx(sum(at_slots) / found.supervised)
    labelled = {document for document, _ in covered}
    assert found.rows_without_label == sum(labelled.isdisjoint(row) for row in case.rows)


def reasons(mark: str, seq_len: int | None) -> list[str]:
    """Why each token of one conversation can never be a label."""
    found = []
    inside = mark[:seq_len]
    for position, character in enumerate(mark):
        if character != "a":
            found.append("prompt")
        elif position >= len(inside):
            found.append("cut off")
        elif position > 0 and inside[position - 1] == "a":
            found.append("")
        elif inside[position + 1 : position + 2] == "a":
            found.append("first of its run")
        else:
            found.append("alone in its run")
    return found


@settings(max_examples=60)
@given(cases())
def test_reasons_are_those_of_reading_each_conversation_and_are_counted_right(case):
    expected = [reasons(mark, case.seq_len) for mark in case.marks]
    table = token_supervision(case.spans, case.num_anchors, case.block_size)
    assert table["reason"].tolist() == [reason for found in expected for reason in found]
    filled = 0 if case.row_length is None else case.row_length * len(case.rows)
    padding = max(0, filled - sum(map(len, case.cut)))
    total = sum(map(len, case.marks)) + padding
    supervised = sum(mark.count("a") for mark in case.marks)
    never = never_table(case.spans)
    assert never["reason"].tolist() == list(REASONS)
    for line in never.itertuples():
        count = sum(found.count(line.reason) for found in expected)
        if line.reason == "padding":
            count = padding
        assert line.tokens == count
        assert line.of_tokens == pytest.approx(count / total)
        assert line.documents == sum(line.reason in found for found in expected)
        if line.reason in ("prompt", "padding") or not supervised:
            assert math.isnan(line.of_supervised)
        else:
            assert line.of_supervised == pytest.approx(count / supervised)
    reached = (table["p_covered"] > 0) == (table["reason"] == "")
    assert reached.all()


@pytest.mark.parametrize("row_length", [None, 70])
def test_a_batch_has_the_spans_of_its_conversations(row_length):
    encoded = documents(*MARKS)
    batch = collate(encoded, 0) if row_length is None else pack(encoded, row_length, 0)
    spans, other = Spans.of(encoded, row_length=row_length), Spans.of(batch)
    spans = spans.in_batches(spans.rows)
    assert (other.rows, other.documents) == (spans.rows, spans.documents)
    for per, document in product(PER, range(len(MARKS))):
        index = batch.chat_index[batch.chat_index >= 0].tolist()[document]
        theirs = token_supervision(other, 7, 4, per=per, document=document)
        ours = token_supervision(spans, 7, 4, per=per, document=index)
        pd.testing.assert_frame_equal(theirs.assign(document=index), ours)
    # No two tokens have the same id.
    for per in PER:
        covered = token_supervision(spans, 7, 4, per=per)["p_covered"].to_numpy()
        coverage, real = token_coverage(batch, 7, 4, per=per), batch.attention_mask
        assert coverage.dtype == torch.float64 and not coverage[~real].any()
        assert coverage[real].tolist() == pytest.approx(covered[batch.input_ids[real]].tolist())


def test_one_document_is_its_lines_of_the_whole_table():
    spans = Spans.of(documents(*MARKS), seq_len=20, row_length=50).in_batches(2)
    for per in PER:
        whole = token_supervision(spans, 5, 3, per=per)
        for document, lines in whole.groupby("document"):
            one = token_supervision(spans, 5, 3, document=document, per=per)
            pd.testing.assert_frame_equal(one, lines.reset_index(drop=True))


def test_a_table_has_a_line_for_each_choice_and_is_what_supervision_says():
    spans = Spans.of(documents(*MARKS), row_length=70).in_batches([[1, 0]])
    table = supervision_table(spans, (2, 9), (1, 5), gamma=3.0, per=PER)
    choices = [(per, k, n) for per in PER for k in (1, 5) for n in (2, 9)]
    lines = table.to_dict("records")
    for (per, k, n), line in zip(choices, lines, strict=True):
        found = supervision(spans, n, k, gamma=3.0, per=per)
        assert (line["per"], line["block_size"], line["num_anchors"]) == (per, k, n)
        for name in list(line)[3:]:
            assert line[name] == getattr(found, name)


def test_slots_of_a_table_add_up():
    spans = Spans.of(documents(*MARKS), row_length=70)
    table = slot_supervision(spans, 9, 5, gamma=3.0)
    found = supervision(spans, 9, 5, gamma=3.0)
    assert table["slot"].tolist() == list(range(5))
    assert table["weight"].tolist() == pytest.approx([math.exp(-k / 3) for k in range(5)])
    assert table["expected"].sum() == pytest.approx(found.expected)
    assert table["weighted"].sum() == pytest.approx(found.weighted)
    assert table["most"].tolist() == supervision(spans, 999, 5).expected_by_slot.tolist()


@pytest.mark.parametrize("batch", [unpacked(), packed()], ids=["unpacked", "packed"])
def test_a_coverage_table_holds_means_over_the_supervised_tokens(batch):
    table = coverage_table(batch, num_anchors=(1, 4, 64), block_sizes=(1, 7))
    choices = [(k, n) for k in (1, 7) for n in (1, 4, 64)]
    for (k, n), line in zip(choices, table.itertuples(), strict=True):
        assert (line.block_size, line.num_anchors) == (k, n)
        found = supervision(batch, n, k)
        mean = float(token_coverage(batch, n, k)[batch.loss_mask].mean())
        assert line.expected == pytest.approx(mean)
        assert (line.supervisions, line.blocks) == (found.times, found.blocks)


def test_sampled_is_what_one_draw_of_the_seed_covers():
    batch = packed()
    table = coverage_table(batch, num_anchors=(2, 9), block_sizes=(3,), seed=5)
    for num_anchors, sampled in zip((2, 9), table["sampled"], strict=True):
        blocks = draw_blocks(batch, num_anchors, 3, seed=5)
        drawn = blocks.anchor_positions.tolist(), blocks.eval_mask.tolist()
        times = oracle.times_supervised(70, *drawn)
        covered = sum(count > 0 for row in times for count in row)
        assert sampled == pytest.approx(covered / int(batch.loss_mask.sum()))


@pytest.mark.parametrize("per", PER)
def test_as_many_draws_cover_what_is_expected(per):
    batch = pack(documents("aa.aaaaaa", "aaaaa", "aaa.aa", "aaaaaaa"), 16, 0)
    (line,) = coverage_table(batch, (2,), (3,), per=per, draws=800).itertuples()
    # Seed fixed; by Hoeffding's inequality fewer than one of a million seeds is so far off.
    assert line.sampled == pytest.approx(line.expected, abs=0.096)
    kept = draw_blocks(batch, 2, 3, per=per, seed=0).block_keep_mask.sum()
    assert line.blocks == pytest.approx(int(kept) / len(batch.input_ids))
    assert int(kept) == {"row": 2 * len(batch.input_ids), "document": 8, "batch": 2}[per]


def test_micro_batches_are_of_rows_in_order_or_as_listed_and_the_rest_is_one():
    spans = Spans.of(documents("aaa", "aaaa", "aa", "aaaaa", "aaaaaa"))
    assert spans.in_batches(2).candidates("batch").tolist() == [5, 5, 5]
    assert spans.in_batches([[4, 0]]).candidates("batch").tolist() == [7, 8]
    assert spans.in_batches([[4, 0]]).row_batch.tolist() == [0, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="each of the 5 rows once at most"):
        spans.in_batches([[0, 5]])
    with pytest.raises(ValueError, match="each of the 5 rows once at most"):
        spans.in_batches([[0], [0]])


def test_draws_are_independent_of_each_other():
    # One anchor of this row covers one of two runs: 1 of 8 or 5 of 8 tokens.
    batch = collate(documents("aa.aaaaaa"), 0)
    (line,) = coverage_table(batch, (1,), (7,), draws=800).itertuples()
    # Seed fixed; by Hoeffding's inequality fewer than one of a million seeds is so far off.
    assert line.sampled == pytest.approx(line.expected, abs=0.096)


@pytest.mark.parametrize("per", PER)
def test_anchors_needed_is_the_smallest_number_that_reaches_the_goal(per):
    batch, goals = packed(), (0.1, 0.3, 0.5, 0.8, 0.9)
    table = anchors_needed(batch, goals, (1, 4, 7), per=per)
    choices = [(k, goal) for k in (1, 4, 7) for goal in goals]
    assert list(table[["block_size", "goal"]].itertuples(index=False, name=None)) == choices
    for line in table.itertuples():
        n, k = int(line.num_anchors), line.block_size
        assert line.expected == supervision(batch, n, k, per=per).share >= line.goal
        if n > 1:
            assert supervision(batch, n - 1, k, per=per).share < line.goal
    assert (
        table["num_anchors"].min() == (2 if per == "batch" else 1)
        and table["num_anchors"].max() > 20
    )
    assert table["num_anchors"].dtype == pd.Int64Dtype()


def test_no_number_of_anchors_reaches_a_goal_above_the_ceiling():
    # Of ten supervised tokens, the first of each of two runs is never a label.
    batch = collate(documents("aaaa.aaaaaa"), 0)
    table = anchors_needed(batch, (0.5, 0.8, 0.81, 1.0), (3,))
    assert table["ceiling"].tolist() == [0.8] * 4
    assert table["num_anchors"].isna().tolist() == [False, False, True, True]
    assert table["expected"].isna().tolist() == [False, False, True, True]
    assert table["num_anchors"][1] == 8
    alone = anchors_needed(collate(documents("a.a.a"), 0), (0.01,), (7,))
    assert alone["ceiling"].tolist() == [0.0] and alone["num_anchors"].isna().all()


def test_a_packing_table_counts_anchors_per_document_and_per_packed_row():
    lengths, encoded = (40, 55, 200), documents(*MARKS)
    table = packing_table(encoded, lengths, (2, 9), block_size=4)
    batches = [unpacked(), *(pack(encoded, length, 0) for length in lengths)]
    expected = [supervision(batch, n, 4).share for batch in batches for n in (2, 9)]
    assert table["expected"].tolist() == pytest.approx(expected)
    rows = [len(batch.input_ids) for batch in batches]
    assert table["documents"].tolist() == [4 / count for count in rows for _ in (2, 9)]
    assert table["anchors per"].tolist() == ["document"] * 2 + ["row"] * 6
    assert table["num_anchors"].tolist() == [2, 9] * 4
    names = table["row"].unique()[1:]
    assert all(str(length) in name for length, name in zip(lengths, names, strict=True))


def test_rows_without_a_label_are_counted_and_refused_where_there_is_no_other():
    spans = Spans.of(documents("..", "a.a", ".aaa", "aa"), seq_len=3)
    assert supervision(spans, 4, 3).rows_without_label == 2
    assert supervision_table(spans, (4,), (3,))["rows_without_label"].tolist() == [2]
    for call in (supervision, slot_supervision):
        with pytest.raises(ValueError, match="no row has a label"):
            call(documents("...", "a.a"), 4, 3)
    unsupervised = documents("...", "..")
    nothing = token_supervision(unsupervised, 4, 3)
    assert nothing["reason"].tolist() == ["prompt"] * 5 and nothing["p_covered"].eq(0).all()
    for call in (anchors_needed, packing_table):
        with pytest.raises(ValueError, match="coverage needs a supervised token"):
            call(unsupervised)


def test_tables_hold_numbers_in_their_columns():
    encoded = documents(*MARKS)
    for table, kinds in (
        (token_supervision(encoded, 4, 2), "iibifffffO"),
        (coverage_table(unpacked(), (4,), (7,)), "iiffff"),
        (supervision_table(encoded, (4,), (2,)), "Oiifiifffffi"),
    ):
        assert [table[name].dtype.kind for name in table] == list(kinds)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda e: Spans.of([]), ValueError, "data must hold at least one conversation, got none"),
        (lambda e: Spans.of(["a"]), TypeError, "data"),
        (lambda e: Spans.of(e, seq_len=0), ValueError, "seq_len must be >= 1, got 0"),
        (lambda e: Spans.of(e, row_length=39), ValueError, "'hand-made' has 40 tokens, more than"),
        (lambda e: Spans.of(collate(e, 0), seq_len=9), ValueError, "a batch has its rows already"),
        (lambda e: Spans.of(Spans.of(e), seq_len=9), ValueError, "spans have their rows already"),
        (lambda e: supervision(e, 4, 4, gamma=1e-300), ValueError, "^gamma must be > 0.*1e-300"),
        (lambda e: supervision(e, 4, 4, per="chat"), ValueError, "per must be 'row', .*'chat'"),
        (lambda e: supervision(e, 4, 4, per="batch"), ValueError, r"\.in_batches\(rows\)"),
        (lambda e: token_supervision(e, 4, 4, document=4), ValueError, r"must lie in \[0, 3\]"),
        (lambda e: packing_table(e, (39,)), ValueError, "more than length 39 of a row; cut it"),
        (lambda e: anchors_needed(e, (0.5, 0)), ValueError, "goals.* must lie in"),
        (lambda _: packed_places(np.array([3, 6]), 5), ValueError, "got 3 to 6"),
    ],
)
def test_an_impossible_choice_says_what_is_wrong(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(documents(*MARKS))
