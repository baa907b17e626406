"""`dspark_lab.tuning.coverage`: the closed form is the average over every draw there is.

Small data sets are checked against every possible draw, walked through in plain Python, larger ones
against many random draws. Where a test can fail by chance, its seed is fixed and the chance over
seeds is at most RISK, by Hoeffding's inequality: the mean of n independent values between 0 and 1
is more than e off with probability at most 2 exp(-2 n e^2).
"""

import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import Batch, Chat, Encoded, collate, one_row, pack
from dspark_lab.tuning import (
    PER,
    REASONS,
    Spans,
    Supervision,
    anchors_needed,
    never_table,
    packing_table,
    slot_table,
    supervision,
    supervision_table,
    token_coverage,
    token_supervision,
)

pytestmark = pytest.mark.usefixtures("one_thread")

RISK = 1e-6
# Four conversations of several lengths, with short answers and long ones.
MARKS = (
    "..aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "....aaaaa...aaaaaaaaaaaaaaa",
    ".aa.a.aaa......",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
)


def documents(*marks: str, domain: str | None = None) -> list[Encoded]:
    """Conversations of as many tokens as there are characters, supervised where they are ``a``."""
    chat = Chat(({"role": "assistant", "content": ""},), id="hand-made", domain=domain)
    return [
        Encoded(
            torch.zeros(len(mark), dtype=torch.long), torch.tensor([c == "a" for c in mark]), chat
        )
        for mark in marks
    ]


@dataclass(frozen=True)
class Case:
    """Conversations, how they are cut and packed, and what is drawn."""

    marks: tuple[str, ...]
    seq_len: int | None
    row_length: int | None
    num_anchors: int
    block_size: int

    @property
    def spans(self) -> Spans:
        encoded = documents(*self.marks)
        return Spans.of(encoded, seq_len=self.seq_len, row_length=self.row_length)

    @property
    def cut(self) -> list[str]:
        return [mark[: self.seq_len] for mark in self.marks]

    @property
    def rows(self) -> list[list[int]]:
        """The documents of each row: those that fit, longest first, in the first row with room."""
        if self.row_length is None:
            return [[document] for document in range(len(self.marks))]
        rows: list[list[int]] = []
        for document in sorted(range(len(self.marks)), key=lambda d: -len(self.cut[d])):
            for row in rows:
                if sum(len(self.cut[d]) for d in [*row, document]) <= self.row_length:
                    row.append(document)
                    break
            else:
                rows.append([document])
        return rows

    def units(self, per: str) -> list[list[int]]:
        return self.rows if per == "row" else [[d] for row in self.rows for d in row]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A few short conversations, perhaps cut, perhaps packed."""
    marks = draw(st.lists(st.text("aaa.", min_size=1, max_size=7), min_size=1, max_size=4))
    seq_len = draw(st.none() | st.integers(1, 8))
    longest = max(len(mark[:seq_len]) for mark in marks)
    row_length = draw(st.none() | st.integers(longest, 12))
    return Case(tuple(marks), seq_len, row_length, draw(st.integers(1, 8)), draw(st.integers(1, 8)))


def possible_draws(case: Case, unit: list[int]) -> list[Counter]:
    """How often each draw of one unit supervises each (document, position, slot)."""
    candidates = [
        (document, anchor)
        for document in unit
        for anchor in range(len(case.cut[document]) - 1)
        if case.cut[document][anchor : anchor + 2] == "aa"
    ]
    draws = []
    for anchors in combinations(candidates, min(case.num_anchors, len(candidates))):
        times: Counter = Counter()
        for document, anchor in anchors:
            for slot in range(case.block_size):
                label = anchor + slot + 1
                if case.cut[document][label : label + 1] != "a":
                    break
                times[document, label, slot] += 1
        draws.append(times)
    return draws


def enumerated(case: Case, per: str) -> tuple[Counter, Counter]:
    """Expected times of each (document, position, slot), and P(covered) of each token."""
    times: Counter = Counter()
    covered: Counter = Counter()
    for unit in case.units(per):
        draws = possible_draws(case, unit)
        for draw in draws:
            for place, count in draw.items():
                times[place] += count / len(draws)
            for token in {(document, position) for document, position, _ in draw}:
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
    found = supervision(case.spans, case.num_anchors, case.block_size, per=per)
    at_slots = [
        sum(at for (_, _, k), at in times.items() if k == slot) for slot in range(case.block_size)
    ]
    assert found.expected_by_slot.tolist() == pytest.approx(at_slots)
    assert found.expected == pytest.approx(sum(at_slots))
    assert found.weighted == pytest.approx(
        sum(at * math.exp(-k / 4) for k, at in enumerate(at_slots))
    )
    assert found.covered == pytest.approx(sum(covered.values()))
    assert found.supervised == sum(mark.count("a") for mark in case.cut)
    assert found.labels == len(covered)
    assert found.rows == len(case.rows)
    kept = [len(possible_draws(replace(case, block_size=1), unit)[0]) for unit in case.units(per)]
    assert found.blocks == pytest.approx(sum(kept) / len(case.rows))
    if found.supervised:
        assert found.share == pytest.approx(found.covered / found.supervised)
        assert found.times == pytest.approx(found.expected / found.supervised)


@settings(max_examples=60)
@given(cases(), st.sampled_from(PER))
def test_a_token_has_a_reason_exactly_where_no_draw_and_no_block_reaches_it(case, per):
    _, covered = enumerated(replace(case, num_anchors=99, block_size=99), per)
    table = token_supervision(case.spans, case.num_anchors, case.block_size, per=per)
    for line in table.itertuples():
        assert (line.reason == "") == (covered[line.document, line.position] > 0)
        assert (line.reason == "") == (line.p_covered > 0)


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
    assert case.spans.idle_documents == sum("" not in found for found in expected)


def test_the_cut_can_leave_a_token_alone_in_its_run():
    spans = Spans.of(documents("..aaa", "aaa.a"), seq_len=3)
    table = token_supervision(spans, 1, 1)
    alone, cut = "alone in its run", "cut off"
    assert table["reason"].tolist() == [
        *("prompt", "prompt", alone, cut, cut),
        *("first of its run", "", "", "prompt", cut),
    ]
    assert never_table(spans)["tokens"].tolist() == [3, 1, 1, 3, 0]
    assert spans.idle_documents == 1


def test_a_token_in_the_middle_of_ten_candidates_is_supervised_as_can_be_counted():
    table = token_supervision(documents("aaaaaaaaaaa")[0], 3, 2)
    # Missed where all 3 of 10 candidates are among the 8 that do not reach it: 56 of 120 draws.
    assert table["p_covered"].tolist() == pytest.approx([0, 3 / 10] + [1 - 56 / 120] * 9)
    assert table["slot_0"].tolist() == pytest.approx([0] + [3 / 10] * 10)
    assert table["slot_1"].tolist() == pytest.approx([0, 0] + [3 / 10] * 9)


def test_anchors_of_a_row_are_shared_by_its_documents_and_those_of_a_document_are_not():
    # Candidates: 3 in the one, 1 in the other; one anchor for both, or one for each.
    spans = Spans.of(documents("aaaa", "aa"), row_length=6)
    per_row, per_document = (token_supervision(spans, 1, 1, per=per) for per in PER)
    assert per_row["p_covered"].tolist() == pytest.approx([0, 1 / 4, 1 / 4, 1 / 4, 0, 1 / 4])
    assert per_document["p_covered"].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0, 1])
    assert supervision(spans, 1, 1, per="row").blocks == 1
    assert supervision(spans, 1, 1, per="document").blocks == 2


def slots_drawn(batch: Batch, num_anchors: int, block_size: int, seed: int) -> np.ndarray:
    """Whether each draw, one a row, supervises each (position, slot) of the row."""
    rows, seq_len = batch.loss_mask.shape
    blocks = draw_blocks(batch, num_anchors, block_size, seed=seed)
    times = np.zeros((rows, seq_len, block_size), dtype=np.int8)
    row, block, slot = np.nonzero(blocks.eval_mask.numpy())
    np.add.at(times, (row, blocks.label_indices.numpy()[row, block, slot], slot), 1)
    return times


def copies(batch: Batch, count: int) -> Batch:
    return Batch(**{name: value.expand(count, -1) for name, value in vars(batch).items()})


@pytest.mark.parametrize("per", PER)
def test_many_draws_supervise_as_often_as_expected_at_each_slot(per):
    draws, anchors, block_size = 10_000, 9, 5
    encoded = documents(*MARKS)
    table = token_supervision(Spans.of(encoded, row_length=120), anchors, block_size, per=per)
    batches = [one_row(encoded, 120, 0)] if per == "row" else [collate([e], 0) for e in encoded]
    sampled = np.concatenate(
        [
            slots_drawn(copies(batch, draws), anchors, block_size, seed)[:, batch.attention_mask[0]]
            for seed, batch in enumerate(batches)
        ],
        axis=1,
    )
    assert sampled.max() == 1
    names = [f"slot_{slot}" for slot in range(block_size)]
    worst = math.sqrt(math.log(2 * sampled[0].size / RISK) / (2 * draws))
    assert worst < 0.04
    assert np.abs(sampled.mean(axis=0) - table[names].to_numpy()).max() < worst
    covered = sampled.any(axis=2).mean(axis=0)
    assert np.abs(covered - table["p_covered"].to_numpy()).max() < worst


@pytest.mark.parametrize("per", PER)
def test_supervision_is_the_sum_over_the_tokens(per):
    spans = Spans.of(documents(*MARKS), seq_len=33, row_length=70)
    table = token_supervision(spans, 6, 4, per=per)
    found = supervision(spans, 6, 4, per=per)
    by_slot = [table[f"slot_{slot}"].sum() for slot in range(4)]
    assert found.expected_by_slot.tolist() == pytest.approx(by_slot)
    assert found.weighted == pytest.approx(table["weighted"].sum())
    assert found.covered == pytest.approx(table["p_covered"].sum())
    assert found.labels == (table["reason"] == "").sum()


def random_marks(count: int, seed: int) -> list[str]:
    """Conversations of one to three answers of up to 30 tokens, with prompts between them."""
    rng = np.random.default_rng(seed)
    return [
        "".join("." * rng.integers(0, 8) + "a" * rng.integers(1, 30) for _ in range(turns))
        for turns in rng.integers(1, 4, count)
    ]


def test_a_data_set_is_the_sum_of_its_conversations():
    encoded = documents(*random_marks(200, 0))
    whole = supervision(encoded, 8, 5)
    each = [supervision(item, 8, 5) for item in encoded]
    assert whole.expected_by_slot.tolist() == pytest.approx(sum(e.expected_by_slot for e in each))
    assert whole.covered == pytest.approx(sum(e.covered for e in each))
    assert whole.labels == sum(e.labels for e in each)
    assert whole.blocks == pytest.approx(sum(e.blocks for e in each) / 200)


def test_packing_changes_nothing_for_anchors_counted_by_document():
    encoded = documents(*random_marks(60, 1))
    packed = supervision(Spans.of(encoded, row_length=150), 8, 5, per="document")
    unpacked = supervision(encoded, 8, 5, per="row")
    assert packed.expected_by_slot.tolist() == pytest.approx(unpacked.expected_by_slot.tolist())
    assert packed.covered == pytest.approx(unpacked.covered)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.integers(9, 40))
def test_documents_are_packed_exactly_as_pack_does(lengths, row_length):
    encoded = documents(*["a" * length for length in lengths])
    spans = Spans.of(encoded, row_length=row_length)
    batch = pack(encoded, row_length, 0)
    assert spans.rows == len(batch.chat_index)
    for row, indices in enumerate(batch.chat_index.tolist()):
        begin = 0
        for document in indices:
            if document >= 0:
                assert (spans.document_row[document], spans.document_start[document]) == (
                    row,
                    begin,
                )
                begin += lengths[document]


@pytest.mark.parametrize("row_length", [None, 70])
def test_a_batch_has_the_spans_of_its_conversations(row_length):
    encoded = documents(*MARKS)
    batch = collate(encoded, 0) if row_length is None else pack(encoded, row_length, 0)
    spans = Spans.of(encoded, row_length=row_length)
    assert Spans.of(batch).rows == spans.rows and Spans.of(batch).documents == spans.documents
    for per in PER:
        ours, theirs = (supervision(data, 7, 4, per=per) for data in (spans, batch))
        assert ours.expected_by_slot.tolist() == pytest.approx(theirs.expected_by_slot.tolist())
        assert ours.covered == pytest.approx(theirs.covered)
        assert (ours.blocks, ours.labels) == (pytest.approx(theirs.blocks), theirs.labels)
    order = batch.chat_index[batch.chat_index >= 0].tolist()
    for document, index in enumerate(order):
        one, other = (
            token_supervision(data, 7, 4, document=number).drop(columns="document")
            for data, number in ((batch, document), (spans, index))
        )
        pd.testing.assert_frame_equal(one, other)


def test_cutting_is_what_a_shorter_conversation_would_be():
    for seq_len in (1, 5, 13, 40):
        cut = documents(*[mark[:seq_len] for mark in MARKS])
        ours = supervision(Spans.of(documents(*MARKS), seq_len=seq_len), 4, 3)
        theirs = supervision(cut, 4, 3)
        assert ours.expected_by_slot.tolist() == theirs.expected_by_slot.tolist()
        assert (ours.covered, ours.labels, ours.supervised) == (
            theirs.covered,
            theirs.labels,
            theirs.supervised,
        )


def test_one_document_is_its_lines_of_the_whole_table():
    spans = Spans.of(documents(*MARKS), seq_len=20, row_length=50)
    for per in PER:
        whole = token_supervision(spans, 5, 3, per=per)
        for document in range(len(MARKS)):
            one = token_supervision(spans, 5, 3, document=document, per=per)
            lines = whole[whole["document"] == document].reset_index(drop=True)
            pd.testing.assert_frame_equal(one, lines)


def test_a_row_of_a_batch_is_covered_as_its_documents_are():
    batch = pack(documents(*MARKS), 70, 0)
    table = token_supervision(batch, 9, 4)
    inside = batch.attention_mask
    coverage = token_coverage(batch, 9, 4)
    assert coverage[inside].tolist() == pytest.approx(table["p_covered"].tolist())
    assert coverage[~inside].eq(0).all()


def test_more_anchors_and_longer_blocks_cover_more_until_only_the_first_tokens_are_left():
    spans = Spans.of(documents(*MARKS))
    by_anchors = [supervision(spans, n, 4).covered for n in (1, 3, 9, 27, 81)]
    by_slots = [supervision(spans, 3, k).covered for k in (1, 2, 4, 8, 16)]
    assert by_anchors == sorted(set(by_anchors)) and by_slots == sorted(set(by_slots))
    # 40 - 3, then 5 + 15 - 2, then 2 - 1 and 3 - 1, then 29 - 1.
    assert supervision(spans, 10**9, 1).covered == supervision(spans, 1, 4).labels == 86


def two_domains() -> Spans:
    encoded = documents(*MARKS[:2], domain="math") + documents(*MARKS[2:], "...")
    return Spans.of(encoded, seq_len=30, row_length=60)


@pytest.mark.parametrize("per", PER)
def test_domains_add_up_to_the_whole(per):
    spans = two_domains()
    assert spans.domains == ("math", "none")
    table = supervision_table(spans, (2, 8), (3,), per=per, by_domain=True)
    assert table["domain"].tolist() == ["math", "none"] * 2
    tokens = token_supervision(spans, 8, 3, per=per)
    for name, chosen in (("math", tokens["document"] < 2), ("none", tokens["document"] >= 2)):
        [line] = table[(table["domain"] == name) & (table["num_anchors"] == 8)].to_dict("records")
        assert line["covered"] == pytest.approx(tokens["p_covered"][chosen].sum())
        assert line["expected"] == pytest.approx(tokens["times"][chosen].sum())
        assert (
            line["supervised"]
            == (tokens["supervised"] & (tokens["reason"] != "cut off"))[chosen].sum()
        )
        assert line["labels"] == (tokens["reason"] == "")[chosen].sum()
    whole = supervision_table(spans, (2, 8), (3,), per=per)
    for name in ("blocks", "supervised", "labels", "expected", "weighted", "covered"):
        sums = table.groupby("num_anchors")[name].sum()
        assert sums.tolist() == pytest.approx(whole[name].tolist())


def test_reasons_of_domains_add_up_to_the_whole():
    spans = two_domains()
    by_domain = never_table(spans, by_domain=True)
    assert by_domain["reason"].tolist() == [*REASONS[:-1]] * 2
    whole = never_table(spans).set_index("reason")
    for name in ("tokens", "documents"):
        sums = by_domain.groupby("reason")[name].sum()
        assert sums.to_dict() == whole[name].drop("padding").to_dict()
    # The first 30 of its 40 tokens are there, 28 of its 38 supervised ones; its neighbour is whole.
    [cut] = by_domain[by_domain["reason"] == "cut off"]["tokens"][:1]
    assert cut == 10
    assert by_domain["of_tokens"][:4].sum() == pytest.approx(1 - (27 + 18) / (40 + 27))


def test_a_table_has_a_line_for_each_choice_and_is_what_supervision_says():
    spans = Spans.of(documents(*MARKS), row_length=70)
    table = supervision_table(spans, (2, 9), (1, 5), gamma=3.0, per=PER)
    choices = [(per, k, n) for per in PER for k in (1, 5) for n in (2, 9)]
    lines = table.to_dict("records")
    for (per, k, n), line in zip(choices, lines, strict=True):
        found = supervision(spans, n, k, gamma=3.0, per=per)
        assert (line["per"], line["block_size"], line["num_anchors"]) == (per, k, n)
        for name in list(line)[3:]:
            assert line[name] == getattr(found, name)
    assert [table[name].dtype.kind for name in table] == list("Oiifiifffff")


def test_slots_of_a_table_add_up():
    spans = Spans.of(documents(*MARKS), row_length=70)
    table = slot_table(spans, 9, 5, gamma=3.0)
    found = supervision(spans, 9, 5, gamma=3.0)
    assert table["slot"].tolist() == list(range(5))
    assert table["weight"].tolist() == pytest.approx([math.exp(-k / 3) for k in range(5)])
    assert table["expected"].sum() == pytest.approx(found.expected)
    assert table["weighted"].sum() == pytest.approx(found.weighted)
    everything = supervision(spans, 999, 5)
    assert table["most"].tolist() == everything.expected_by_slot.tolist()


def test_anchors_needed_can_be_counted_by_document():
    spans = Spans.of(documents(*MARKS), row_length=120)
    for per in PER:
        [line] = anchors_needed(spans, (0.6,), (3,), per=per).itertuples()
        enough = int(line.num_anchors)
        assert line.expected == supervision(spans, enough, 3, per=per).share >= 0.6
        assert supervision(spans, enough - 1, 3, per=per).share < 0.6


def test_nothing_supervised_is_nothing_covered():
    spans = Spans.of(documents("...", ".."))
    found = supervision(spans, 4, 3)
    assert (found.expected, found.weighted, found.covered, found.blocks) == (0, 0, 0, 0)
    assert math.isnan(found.share) and math.isnan(found.times)
    assert spans.idle_documents == 2
    table = token_supervision(spans, 4, 3)
    assert table["reason"].tolist() == ["prompt"] * 5
    assert not table["supervised"].any() and table["p_covered"].eq(0).all()


def test_tokens_hold_numbers_in_their_columns():
    table = token_supervision(documents(*MARKS), 4, 2)
    assert [table[name].dtype.kind for name in table] == list("iibifffffO")
    assert isinstance(supervision(documents(*MARKS), 4, 2), Supervision)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda e: Spans.of([]), ValueError, "data must hold at least one conversation, got none"),
        (lambda e: Spans.of(["a"]), TypeError, "data must be Encoded or a Batch, got str"),
        (lambda e: Spans.of(documents("a", "")), ValueError, "'hand-made' must have at least one"),
        (lambda e: Spans.of(e, seq_len=0), ValueError, "seq_len must be >= 1, got 0"),
        (lambda e: Spans.of(e, row_length=9.0), TypeError, "row_length must be an int, got 9.0"),
        (
            lambda e: Spans.of(e, row_length=39),
            ValueError,
            "conversation 'hand-made' has 40 tokens, more than length 39 of a row; cut it with",
        ),
        (lambda e: Spans.of(collate(e, 0), seq_len=9), ValueError, "a batch has its rows already"),
        (
            lambda e: Spans.of([replace(e[0], loss_mask=torch.ones(40))]),
            TypeError,
            "loss_mask must be bool, got torch.float32",
        ),
        (lambda e: supervision(e, 0, 4), ValueError, "num_anchors must be >= 1, got 0"),
        (lambda e: supervision(e, 4, 0), ValueError, "block_size must be >= 1, got 0"),
        (lambda e: supervision(e, 4, 4, gamma=0), ValueError, "gamma must be > 0, got 0"),
        (lambda e: supervision(e, 4, 4, gamma="4"), TypeError, "gamma must be a number, got '4'"),
        (lambda e: supervision(e, 4, 4, per="batch"), ValueError, "per must be one of .* 'batch'"),
        (lambda e: token_supervision(e, 0, 4), ValueError, "num_anchors must be >= 1, got 0"),
        (lambda e: token_supervision(e, 4, 0), ValueError, "block_size must be >= 1, got 0"),
        (lambda e: token_supervision(e, 4, 4, per="x"), ValueError, "per must be one of .* 'x'"),
        (lambda e: token_supervision(e, 4, 4, gamma=-1), ValueError, "gamma must be > 0, got -1"),
        (
            lambda e: token_supervision(e, 4, 4, document=4),
            ValueError,
            r"document must lie in \[0, 3\], got 4",
        ),
        (lambda e: token_supervision(e, 4, 4, document=-1), ValueError, "document must be >= 0"),
        (lambda e: packing_table(e, (39,)), ValueError, "more than length 39"),
    ],
)
def test_an_impossible_choice_says_what_is_wrong(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(documents(*MARKS))
