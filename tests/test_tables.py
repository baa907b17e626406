"""every number behind a picture, counted once more in plain loops."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import oracle
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import documents
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dspark_lab.attention import training_block_mask, training_mask_mod
from dspark_lab.blocks import Blocks, cut_blocks, draw_blocks
from dspark_lab.chats import Batch, collate, pack
from dspark_lab.common import context_doc_ids
from dspark_lab.explore import (
    REGIONS,
    TILE_STATES,
    block_table,
    mask_regions,
    mask_table,
    slot_inputs,
    sorting_table,
    tile_states,
    tile_table,
    token_table,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PAD, MASK = 1000, 2000


def to_text(token_id: int) -> str:
    return f"<{token_id}>"


@dataclass
class Draw:
    """A draw of blocks on a batch, and the same as lists."""

    batch: Batch
    blocks: Blocks

    @property
    def seq_len(self) -> int:
        return self.batch.input_ids.shape[1]

    @property
    def block_size(self) -> int:
        return self.blocks.eval_mask.shape[2]

    @property
    def anchors(self) -> list[list[int]]:
        return self.blocks.anchor_positions.tolist()

    @property
    def keep(self) -> list[list[bool]]:
        return self.blocks.block_keep_mask.tolist()

    @property
    def doc_ids(self) -> Tensor:
        return context_doc_ids(self.batch.seq_lens, self.seq_len, "cpu")

    @property
    def docs(self) -> list[list[int]]:
        return oracle.doc_ids(self.batch.seq_lens.tolist(), self.seq_len)

    @property
    def masks(self) -> dict[str, list]:
        return {
            "loss_mask": self.batch.loss_mask.tolist(),
            "doc_remaining": self.batch.doc_remaining.tolist(),
        }

    @property
    def eval_mask(self) -> list[list[list[bool]]]:
        return oracle.eval_mask(
            self.seq_len,
            anchors=self.anchors,
            keep=self.keep,
            block_size=self.block_size,
            **self.masks,
        )

    @property
    def times(self) -> list[list[int]]:
        return oracle.times_supervised(self.seq_len, self.anchors, self.eval_mask)

    @property
    def reach(self) -> list[list[int]]:
        return oracle.reaching_anchors(block_size=self.block_size, **self.masks)

    def dense_mask(self) -> list[list[list[bool]]]:
        return oracle.dense_mask(self.anchors, self.keep, self.seq_len, self.block_size, self.docs)

    def block_mask(self, tile_size: int) -> BlockMask:
        return training_block_mask(
            self.blocks.anchor_positions,
            self.blocks.block_keep_mask,
            seq_len=self.seq_len,
            block_size=self.block_size,
            doc_ids=self.doc_ids,
            tile_size=tile_size,
        )


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """Up to six anchors on a few short documents, one a row or several, with padding or without."""
    marks = draw(st.lists(st.text("aaa.", min_size=1, max_size=8), min_size=1, max_size=4))
    longest = max(len(mark) for mark in marks)
    if draw(st.booleans()):
        batch = pack(documents(*marks), longest + draw(st.integers(0, 12)), PAD)
    else:
        batch = collate(documents(*marks), PAD, longest + draw(st.integers(0, 3)))
    blocks = draw_blocks(
        batch,
        draw(st.integers(1, 6)),
        draw(st.integers(1, 5)),
        mask_token_id=MASK,
        seed=draw(st.integers(0, 99)),
    )
    return Draw(batch, blocks)


def each_row(draw: Draw, table: Callable[..., pd.DataFrame]) -> list[pd.DataFrame]:
    rows = range(len(draw.batch.input_ids))
    return [table(draw.batch, draw.blocks, to_text, row=row) for row in rows]


@given(draws())
def test_a_tokens_state_is_what_this_draw_and_any_draw_do_with_it(draw):
    expected = oracle.token_states(
        draw.masks["loss_mask"], draw.batch.attention_mask.tolist(), draw.times, draw.reach
    )
    assert [table["state"].tolist() for table in each_row(draw, token_table)] == expected


@given(draws())
def test_the_token_table_lists_each_token_with_its_place_and_its_part(draw):
    candidates = oracle.candidate_mask(**draw.masks)
    for row, table in enumerate(each_row(draw, token_table)):
        ids = draw.batch.input_ids[row].tolist()
        real = draw.batch.attention_mask[row].tolist()
        kept = {a for a, k in zip(draw.anchors[row], draw.keep[row], strict=True) if k}
        assert table["position"].tolist() == list(range(draw.seq_len))
        assert table["token_id"].tolist() == ids
        assert table["text"].tolist() == [to_text(i) for i in ids]
        assert table["document"].tolist() == [
            doc if flag else -1 for doc, flag in zip(draw.docs[row], real, strict=True)
        ]
        assert table["supervised"].tolist() == draw.masks["loss_mask"][row]
        assert table["candidate"].tolist() == candidates[row] + [False]
        assert table["anchor"].tolist() == [p in kept for p in range(draw.seq_len)]
        assert table["times_supervised"].tolist() == draw.times[row]


@settings(max_examples=60)
@given(draws())
def test_p_covered_is_the_share_of_all_possible_draws_of_as_many_anchors(draw):
    num_anchors = len(draw.anchors[0])
    expected = oracle.coverage(num_anchors=num_anchors, block_size=draw.block_size, **draw.masks)
    for table, shares in zip(each_row(draw, token_table), expected, strict=True):
        assert table["p_covered"].tolist() == pytest.approx(shares)


def test_an_answer_that_opens_a_packed_document_is_never_a_label():
    batch = pack(documents("aaa", "aa"), 7, PAD)
    table = token_table(batch, draw_blocks(batch, 9, 4, seed=0), to_text)
    label = "covered"
    first = "never a label"
    assert table["state"].tolist() == [first, label, label, first, label, "padding", "padding"]
    assert table["document"].tolist() == [0, 0, 0, 1, 1, -1, -1]


def test_a_token_that_this_draw_misses_is_not_covered():
    batch = collate(documents(".aaaa."), PAD)
    blocks = cut_blocks(batch, torch.tensor([[1]]), torch.tensor([[True]]), 2)
    table = token_table(batch, blocks, to_text)
    states = ["prompt", "never a label", "covered", "covered", "not covered", "prompt"]
    assert table["state"].tolist() == states
    # One of three candidates is drawn; the token behind the second is reached from two of them.
    assert table["p_covered"].tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 2 / 3, 0])


@given(draws())
def test_the_block_table_says_what_each_slot_reads_sees_and_predicts(draw):
    inputs = oracle.noise_ids(
        draw.batch.input_ids.tolist(), draw.anchors, draw.keep, MASK, draw.block_size
    )
    positions = oracle.position_ids(draw.anchors, draw.block_size, draw.batch.position_ids.tolist())
    mask = draw.dense_mask()
    for row, table in enumerate(each_row(draw, block_table)):
        expected = []
        for block, anchor in enumerate(draw.anchors[row]):
            for slot in range(draw.block_size):
                query = block * draw.block_size + slot
                label, kept = anchor + slot + 1, draw.keep[row][block]
                shown = kept and label < draw.seq_len
                token = inputs[row][query]
                expected.append(
                    {
                        "block": block,
                        "kept": kept,
                        "slot": slot,
                        "position_id": positions[row][query],
                        "input": "[mask]" if token == MASK else to_text(token),
                        "context": sum(mask[row][query][: draw.seq_len]),
                        "label_position": label,
                        "label": to_text(int(draw.batch.input_ids[row, label])) if shown else "",
                        "supervised": draw.eval_mask[row][block][slot],
                    }
                )
        assert table.to_dict("records") == expected
        assert slot_inputs(draw.blocks, to_text, row=row) == table["input"].tolist()


def test_an_anchor_whose_token_has_the_mask_tokens_number_is_still_shown_as_itself():
    batch = collate(documents("aaaa"), PAD)
    blocks = cut_blocks(
        batch, torch.tensor([[0, 0]]), torch.tensor([[True, False]]), 2, mask_token_id=0
    )
    assert slot_inputs(blocks, to_text) == ["<0>", "[mask]", "[mask]", "[mask]"]


@pytest.mark.parametrize("table", [token_table, block_table])
@pytest.mark.parametrize("row", [2, -1])
def test_a_row_that_is_not_there_is_refused(table, row):
    batch = collate(documents("aaaa", "aaa"), PAD)
    with pytest.raises(ValueError, match=f"row must .*got {row}"):
        table(batch, draw_blocks(batch, 2, 2, seed=0), to_text, row=row)


def region_names(draw: Draw, row: int, doc_ids: Tensor | None) -> list[list[str]]:
    regions = mask_regions(draw.blocks, seq_len=draw.seq_len, doc_ids=doc_ids, row=row)
    return [[REGIONS[value] for value in line] for line in regions.tolist()]


@settings(max_examples=60)
@given(draws())
def test_a_pairs_region_is_why_its_query_sees_its_key(draw):
    rows = range(len(draw.anchors))
    shape = (draw.anchors, draw.keep, draw.seq_len, draw.block_size)
    assert [region_names(draw, row, draw.doc_ids) for row in rows] == oracle.regions(
        *shape, draw.docs
    )
    assert [region_names(draw, row, None) for row in rows] == oracle.regions(*shape)


@settings(max_examples=60)
@given(draws())
def test_the_mask_table_counts_each_pair_once(draw):
    names = oracle.regions(draw.anchors, draw.keep, draw.seq_len, draw.block_size, draw.docs)
    for row, pairs in enumerate(names):
        regions = mask_regions(draw.blocks, seq_len=draw.seq_len, doc_ids=draw.doc_ids, row=row)
        table = mask_table(regions)
        counted = [sum(line.count(name) for line in pairs) for name in REGIONS]
        assert table["region"].tolist() == list(REGIONS)
        assert table["pairs"].tolist() == counted
        total = len(pairs) * len(pairs[0])
        assert table["pairs"].sum() == total
        assert table["share"].tolist() == pytest.approx([count / total for count in counted])


def tile_names(states: Tensor) -> list[list[str]]:
    return [[TILE_STATES[value] for value in line] for line in states.tolist()]


@settings(max_examples=60)
@given(draws(), st.sampled_from([1, 2, 3, 5, 8, 128]))
def test_a_tiles_state_is_how_many_of_its_pairs_are_visible(draw, tile_size):
    block_mask = draw.block_mask(tile_size)
    for row, mask in enumerate(draw.dense_mask()):
        kinds = oracle.tile_kinds(mask, tile_size)
        assert tile_names(tile_states(block_mask, row=row)) == kinds
        table = tile_table(tile_states(block_mask, row=row))
        counted = [sum(line.count(state) for line in kinds) for state in TILE_STATES]
        assert table["state"].tolist() == list(TILE_STATES)
        assert table["tiles"].tolist() == counted
        assert table["share"].tolist() == pytest.approx([n / sum(counted) for n in counted])


def test_tiles_of_a_mask_that_pytorch_made_are_read_the_same():
    batch = pack(documents("..aaaaaaaaaaaaaaaaaaaa", "....aaaaaaaa"), 40, PAD)
    draw = Draw(batch, draw_blocks(batch, 6, 4, seed=0))
    rule = training_mask_mod(
        draw.blocks.anchor_positions,
        draw.blocks.block_keep_mask,
        seq_len=40,
        block_size=4,
        doc_ids=draw.doc_ids,
    )
    theirs = create_block_mask(rule, 1, 1, 24, 64, device="cpu", BLOCK_SIZE=4)
    states = tile_states(theirs)
    assert states.equal(tile_states(draw.block_mask(4)))
    assert set(states.unique().tolist()) == {0, 1, 2}


def test_a_block_mask_without_full_tiles_has_partial_ones_alone():
    counts = torch.tensor([[[2, 0]]], dtype=torch.int32)
    columns = torch.tensor([[[[2, 0, 1], [0, 1, 2]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=16)
    assert tile_states(block_mask).tolist() == [[1, 0, 1], [0, 0, 0]]


def test_what_a_block_mask_lists_past_its_count_is_not_read():
    counts = torch.tensor([[[1, 2]]], dtype=torch.int32)
    columns = torch.tensor([[[[0, 0, 0], [2, 0, 0]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=16)
    assert tile_states(block_mask).tolist() == block_mask.to_dense()[0, 0].tolist()


@pytest.mark.parametrize("tile_size", [8, 16, 32])
def test_the_share_of_empty_tiles_is_the_block_masks_sparsity(tile_size):
    batch = pack(documents("..aaaaaaaaaaaaaaaaaaaa" * 2, "....aaaaaaaa"), 64, PAD)
    draw = Draw(batch, draw_blocks(batch, 16, 4, seed=0))
    block_mask = draw.block_mask(tile_size)
    empty = tile_table(tile_states(block_mask)).set_index("state")["share"]["empty"]
    assert 0 < empty < 1
    assert empty == pytest.approx(block_mask.sparsity() / 100)


def sorting_draw() -> Draw:
    """Two rows, one of them packed, the other with dummy blocks."""
    batch = pack(documents("..aaaaaaaaaaaaaaaaaaaa", "....aaaaaaaa", ".aaaa"), 36, PAD)
    assert len(batch.input_ids) == 2
    return Draw(batch, draw_blocks(batch, 5, 3, seed=2))


def direct_counts(draw: Draw, order: tuple[int, ...], tile_size: int) -> dict[str, float]:
    """A line of the sorting table, by looking at every pair."""
    anchors = [[row[i] for i in order] for row in draw.anchors]
    keep = [[row[i] for i in order] for row in draw.keep]
    masks = oracle.dense_mask(anchors, keep, draw.seq_len, draw.block_size, draw.docs)
    kinds = [kind for mask in masks for row in oracle.tile_kinds(mask, tile_size) for kind in row]
    worked = len(kinds) - kinds.count("empty")
    visible = sum(sum(row) for mask in masks for row in mask)
    return {
        **{state: kinds.count(state) for state in TILE_STATES},
        "work": worked / len(kinds),
        "wasted": 1 - visible / (worked * tile_size**2),
    }


COLUMNS = [*TILE_STATES, "work", "wasted"]


def test_the_sorting_table_counts_the_tiles_of_both_orders():
    draw = sorting_draw()
    assert draw.keep == [[True] * 5, [True] * 3 + [False] * 2]
    table = sorting_table(draw.blocks, seq_len=36, doc_ids=draw.doc_ids, tile_sizes=(3, 8))
    assert table["tile_size"].tolist() == [3, 3, 8, 8]
    assert table["order"].tolist() == ["as drawn", "shuffled"] * 2
    lines = table[COLUMNS].to_dict("records")
    for tile_size, (drawn, shuffled) in zip((3, 8), (lines[:2], lines[2:]), strict=True):
        assert drawn == pytest.approx(direct_counts(draw, tuple(range(5)), tile_size))
        orders = permutations(range(5))
        assert any(shuffled == pytest.approx(direct_counts(draw, o, tile_size)) for o in orders)


def test_shuffled_anchors_are_more_work_in_every_tile_size():
    batch = collate(documents("." * 8 + "a" * 1016), PAD)
    blocks = draw_blocks(batch, 64, 4, seed=0)
    table = sorting_table(blocks, seq_len=1024, tile_sizes=(16, 32, 64))
    drawn = table[table["order"] == "as drawn"].reset_index()
    shuffled = table[table["order"] == "shuffled"].reset_index()
    for name in ("partial", "work", "wasted"):
        assert (shuffled[name] > drawn[name]).all()
    again = sorting_table(blocks, seq_len=1024, tile_sizes=(16, 32, 64))
    pd.testing.assert_frame_equal(table, again)
    other = sorting_table(blocks, seq_len=1024, tile_sizes=(16, 32, 64), seed=1)
    assert not other.equals(table)


def test_tables_stay_with_the_row_they_are_asked_for():
    draw = sorting_draw()
    alone = Draw(draw.batch.row(1), _row(draw.blocks, 1))
    for table in (token_table, block_table):
        pd.testing.assert_frame_equal(
            table(draw.batch, draw.blocks, to_text, row=1),
            table(alone.batch, alone.blocks, to_text),
        )


def _row(blocks: Blocks, index: int) -> Blocks:
    values = {
        name: value[index : index + 1] if isinstance(value, Tensor) else value
        for name, value in vars(blocks).items()
    }
    return Blocks(**values)
