"""`dspark_lab.blocks`: a draw of blocks is the oracle's loop over anchors and slots."""

from dataclasses import fields

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dspark_lab.blocks import PER, Blocks, cut_blocks, draw_anchors, draw_blocks, times_supervised
from dspark_lab.chats import Batch, collate, pack
from dspark_lab.common import sample_anchor_positions
from tests import oracle
from tests.draws import MASK, PAD, Draw, batches, cuts
from tests.samples import documents

pytestmark = pytest.mark.usefixtures("one_thread")


def cut_again(cut: Draw, batch: Batch, anchors: list, keep: list) -> Blocks:
    """The cut at other anchors."""
    at = torch.tensor(anchors), torch.tensor(keep)
    return cut_blocks(batch, *at, cut.blocks.block_size, mask_token_id=MASK)


def require_equal(one: Blocks, other: Blocks) -> None:
    for field in fields(Blocks):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b


def in_blocks(rows: list[list[int]], block_size: int) -> list[list[list[int]]]:
    return [[row[i : i + block_size] for i in range(0, len(row), block_size)] for row in rows]


def tokens(batch: Batch, positions: list[list[list[int]]]) -> list[list[list[int]]]:
    return [
        [[ids[position] for position in block] for block in row]
        for ids, row in zip(batch.input_ids.tolist(), positions, strict=True)
    ]


@given(cuts())
def test_position_input_label_and_supervision_of_every_slot_are_those_of_the_loops(cut):
    blocks, ids, positions = cut.blocks, cut.batch.input_ids.tolist(), cut.batch.position_ids
    size, seq_len = blocks.block_size, blocks.seq_len
    labels = oracle.safe_labels(cut.anchors, cut.keep, size, seq_len)
    before = [[[min(a + k, seq_len - 1) for k in range(size)] for a in row] for row in cut.anchors]
    expected = {
        "position_ids": in_blocks(oracle.position_ids(cut.anchors, size, positions.tolist()), size),
        "noise_ids": in_blocks(oracle.noise_ids(ids, cut.anchors, cut.keep, MASK, size), size),
        "label_indices": oracle.labels(cut.anchors, size),
        "safe_label_indices": labels,
        "target_ids": tokens(cut.batch, labels),
        "prev_indices": before,
        "prev_ids": tokens(cut.batch, before),
        "eval_mask": cut.eval_mask,
        "doc_ids": cut.docs,
        "context_position_ids": positions.tolist(),
    }
    assert {name: getattr(blocks, name).tolist() for name in expected} == expected
    assert times_supervised(blocks).tolist() == cut.times
    assert (len(ids[0]), MASK) == (seq_len, blocks.mask_token_id)
    assert (blocks.num_anchors, size) == blocks.noise_ids.shape[1:]


@given(cuts())
def test_one_row_or_another_order_is_a_cut_of_its_own(cut):
    last = len(cut.anchors) - 1
    order = torch.arange(len(cut.anchors[0])).flip(0)
    of_row = cut_again(cut, cut.batch.row(last), [cut.anchors[last]], [cut.keep[last]])
    flipped = [row[::-1] for row in cut.anchors], [row[::-1] for row in cut.keep]
    require_equal(cut.blocks.row(last), of_row)
    require_equal(cut.blocks.reordered(order), cut_again(cut, cut.batch, *flipped))


@settings(max_examples=60)
@given(batches(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_a_draw_is_a_cut_at_the_candidates_with_the_smallest_numbers(
    batch, num_anchors, block_size, seed
):
    rows, seq_len = batch.input_ids.shape
    numbers = torch.rand(rows, seq_len - 1, generator=torch.Generator().manual_seed(seed))
    candidates = oracle.candidate_mask(batch.loss_mask.tolist(), batch.doc_remaining.tolist())
    anchors, keep = oracle.sampled_anchors(numbers.tolist(), candidates, num_anchors)

    drawn = draw_blocks(batch, num_anchors, block_size, mask_token_id=3, seed=seed)

    cut = cut_blocks(batch, torch.tensor(anchors), torch.tensor(keep), block_size, mask_token_id=3)
    require_equal(drawn, cut)
    assert drawn.eval_mask[..., 0].equal(drawn.block_keep_mask), "a kept anchor has a label"


def smallest(batch: Batch, numbers: list, num_anchors: int, per: str) -> list[list[int]]:
    """The anchors of each row: in each unit the candidates with the smallest numbers."""
    candidates = oracle.candidate_mask(batch.loss_mask.tolist(), batch.doc_remaining.tolist())
    docs = oracle.doc_ids(batch.seq_lens.tolist(), batch.input_ids.shape[1])
    units: dict = {}
    for row, flags in enumerate(candidates):
        for position, flag in enumerate(flags):
            name = {"row": row, "document": (row, docs[row][position]), "batch": 0}[per]
            if flag:
                units.setdefault(name, []).append((numbers[row][position], row, position))
    drawn = [place for unit in units.values() for place in sorted(unit)[:num_anchors]]
    return [sorted(p for _, r, p in drawn if r == row) for row in range(len(candidates))]


@pytest.mark.parametrize("per", PER)
@settings(max_examples=60)
@example(pack(documents("aaaaaa", "aaaaaa", "aaaa.aaa", "aaaaaaa"), 14, PAD), 2, 7)
@given(batches(), st.integers(1, 5), st.integers(0, 2**32))
def test_anchors_count_for_each_row_each_document_or_all_rows(per, batch, num_anchors, seed):
    rows, seq_len = batch.input_ids.shape
    numbers = torch.rand(rows, seq_len - 1, generator=torch.Generator().manual_seed(seed))
    expected = smallest(batch, numbers.tolist(), num_anchors, per)
    width = num_anchors if per == "row" else max(1, *map(len, expected))
    assert draw_blocks(batch, num_anchors, 2, seed=seed, per=per).num_anchors == width
    anchors, keep = draw_anchors(batch, num_anchors, seed=seed, per=per)
    assert anchors.dtype == torch.int64
    assert anchors.tolist() == [row + [0] * (width - len(row)) for row in expected]
    assert keep.tolist() == [[n < len(row) for n in range(width)] for row in expected]


@pytest.mark.parametrize("per", PER)
def test_a_compiled_draw_keeps_the_same_anchors_and_asks_for_no_value(per):
    batch = pack(documents("..aaaaaaaa", "...aaaaa.aaa", "aaaa"), 24, PAD)
    compiled = torch.compile(draw_anchors, fullgraph=True, backend="eager")
    drawn = []
    for draw in (draw_anchors, compiled):
        torch.manual_seed(5)
        drawn.append(draw(batch, 3, per=per))
    (anchors, keep), (wide, kept) = drawn
    # A row of two documents keeps no more than three of each; a batch no more than three.
    assert wide.shape[1] == {"row": 3, "document": 6, "batch": 3}[per]
    count = anchors.shape[1]
    assert anchors.equal(wide[:, :count]) and keep.equal(kept[:, :count])
    assert not kept[:, count:].any() and not wide[:, count:].any()


def long_row() -> Batch:
    return pack(documents("..aaaaaaaaaaaaaaaa", "...aaaaaaaaaaaaa.aaaaa"), 48, PAD)


def test_without_a_seed_a_draw_is_the_next_of_torchs_own_stream_and_with_one_it_is_not():
    batch = long_row()
    torch.manual_seed(3)
    first, second = (draw_blocks(batch, 5, 4).anchor_positions for _ in range(2))
    torch.manual_seed(3)
    draw_blocks(batch, 5, 4, seed=7)
    for drawn in (first, second):
        anchors, _ = sample_anchor_positions(
            48, batch.loss_mask, 5, "cpu", doc_remaining=batch.doc_remaining
        )
        assert drawn.equal(anchors)
    assert not first.equal(second)


def test_everything_but_the_masks_is_long():
    short = torch.tensor([[4, 2]], dtype=torch.int32)
    blocks = cut_blocks(collate(documents("aaaaaa"), PAD), short, torch.tensor([[True, True]]), 2)
    assert blocks.label_indices.tolist() == [[[5, 6], [3, 4]]]
    assert blocks.safe_label_indices.tolist() == [[[5, 5], [3, 4]]]
    # By default the mask token is 0; the anchors are as given.
    assert blocks.noise_ids.tolist() == [[[4, 0], [2, 0]]] and blocks.mask_token_id == 0
    kinds = {
        name: value.dtype for name, value in vars(blocks).items() if isinstance(value, torch.Tensor)
    }
    assert kinds.pop("anchor_positions") == torch.int32
    masks = {"block_keep_mask": torch.bool, "eval_mask": torch.bool}
    assert kinds == dict.fromkeys(kinds, torch.int64) | masks


def test_rows_of_tokens_are_one_document_each_unless_told_otherwise():
    packed = long_row()
    anchors, keep = torch.tensor([[4, 20]]), torch.tensor([[True, True]])
    given = {name: getattr(packed, name) for name in ("doc_remaining", "position_ids", "seq_lens")}
    same = Batch.of_tokens(packed.input_ids, packed.loss_mask.float(), **given)
    require_equal(cut_blocks(same, anchors, keep, 4), cut_blocks(packed, anchors, keep, 4))

    alone = documents("..aaa")
    row = Batch.of_tokens(alone[0].input_ids[None], alone[0].loss_mask[None])
    require_equal(draw_blocks(row, 2, 2, seed=0), draw_blocks(collate(alone, PAD), 2, 2, seed=0))
    with pytest.raises(ValueError, match="go together, got no position_ids, seq_lens"):
        Batch.of_tokens(row.input_ids, row.loss_mask, doc_remaining=row.doc_remaining)
