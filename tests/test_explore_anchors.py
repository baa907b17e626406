"""Anchors: tables counted once more in plain loops, pictures, text, and the explorer."""

from base64 import b64decode
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings

from dspark_lab import explore
from dspark_lab.blocks import cut_blocks, draw_blocks
from dspark_lab.chats import collate
from tests import oracle
from tests.draws import MASK, PAD, draws
from tests.explorers import (
    CHATS,
    LENGTHS,
    TEMPLATE,
    TOKENIZER,
    WIDGET,
    alert,
    anchors,
    follows,
    make_tokenizer,
    masks,
    tables_by_hand,
)
from tests.gallery import COVERAGE, picture_of
from tests.pictures import legend, tick_names, words
from tests.samples import documents

pytestmark = pytest.mark.usefixtures("one_thread")


def to_text(token_id: int) -> str:
    return f"<{token_id}>"


@settings(max_examples=60)
@given(draws())
def test_the_token_table_says_what_each_token_is_in_this_draw_and_in_any(draw):
    candidates = oracle.candidate_mask(**draw.masks)
    padded = draw.batch.attention_mask.tolist()
    states = oracle.token_states(draw.masks["loss_mask"], padded, draw.times, draw.reach)
    sizes = {"num_anchors": draw.blocks.num_anchors, "block_size": draw.blocks.block_size}
    all_draws = oracle.all_draws(**sizes, **draw.masks)
    for row, real in enumerate(padded):
        table = explore.token_table(draw.batch, draw.blocks, to_text, row=row)
        ids = draw.batch.input_ids[row].tolist()
        kept = {a for a, k in zip(draw.anchors[row], draw.keep[row], strict=True) if k}
        docs = zip(draw.docs[row], real, strict=True)
        assert table.drop(columns="p_covered").to_dict("list") == {
            "position": list(range(draw.blocks.seq_len)),
            "document": [doc if flag else -1 for doc, flag in docs],
            "token_id": ids,
            "text": [to_text(i) for i in ids],
            "supervised": draw.masks["loss_mask"][row],
            "candidate": candidates[row] + [False],
            "anchor": [position in kept for position in range(draw.blocks.seq_len)],
            "times_supervised": draw.times[row],
            "state": states[row],
        }
        chances = (np.array(all_draws[row]) > 0).mean(axis=0)
        assert table["p_covered"].tolist() == pytest.approx(chances.tolist())


def test_a_token_that_this_draw_misses_is_not_covered():
    batch = collate(documents(".aaaa."), PAD)
    blocks = cut_blocks(batch, torch.tensor([[1]]), torch.tensor([[True]]), 2)
    table = explore.token_table(batch, blocks, to_text)
    states = ["prompt", "never a label", "covered", "covered", "not covered", "prompt"]
    assert table["state"].tolist() == states
    # One of three candidates is drawn; the token behind the second is reached from two of them.
    assert table["p_covered"].tolist() == pytest.approx([0, 0, 1 / 3, 2 / 3, 2 / 3, 0])


@given(draws())
def test_the_block_table_says_what_each_slot_reads_sees_and_predicts(draw):
    tokens, block_size = draw.batch.input_ids.tolist(), draw.blocks.block_size
    inputs = oracle.noise_ids(tokens, draw.anchors, draw.keep, MASK, block_size)
    positions = oracle.position_ids(draw.anchors, block_size, draw.batch.position_ids.tolist())
    mask, seq_len = draw.dense_mask(), draw.blocks.seq_len
    for row, anchors_of_row in enumerate(draw.anchors):
        slots = list(product(range(len(anchors_of_row)), range(block_size)))
        kept = [draw.keep[row][block] for block, _ in slots]
        labels = [anchors_of_row[block] + slot + 1 for block, slot in slots]
        known = [own and label < seq_len for own, label in zip(kept, labels, strict=True)]
        shown = zip(labels, known, strict=True)
        table = explore.block_table(draw.blocks, to_text, row=row)
        assert table.to_dict("list") == {
            "block": [block for block, _ in slots],
            "kept": kept,
            "slot": [slot for _, slot in slots],
            "position_id": positions[row],
            "input": ["[mask]" if token == MASK else to_text(token) for token in inputs[row]],
            "context": [sum(line[:seq_len]) for line in mask[row]],
            "label_position": labels,
            "label": [to_text(tokens[row][label]) if flag else "" for label, flag in shown],
            "supervised": sum(draw.eval_mask[row], []),
        }
        assert explore.slot_inputs(draw.blocks.row(row), to_text) == table["input"].tolist()


def test_an_anchor_whose_token_has_the_mask_tokens_number_is_still_shown_as_itself():
    batch = collate(documents("aaaa"), PAD)
    blocks = cut_blocks(
        batch, torch.tensor([[0, 0]]), torch.tensor([[True, False]]), 2, mask_token_id=0
    )
    assert explore.slot_inputs(blocks, to_text) == ["<0>", "[mask]", "[mask]", "[mask]"]


@pytest.mark.parametrize("row", [2, -1])
def test_a_row_that_is_not_there_is_refused(row):
    batch = collate(documents("aaaa", "aaa"), PAD)
    blocks = draw_blocks(batch, 2, 2, seed=0)
    for rows in (batch, blocks):
        with pytest.raises(ValueError, match=f"row must .*got {row}"):
            rows.row(row)


def test_the_coverage_lines_are_the_expected_and_the_marks_the_sampled_shares():
    (axes,) = picture_of("coverage").axes
    lines, marks = axes.get_lines()[0:4:2], axes.get_lines()[1:4:2]
    for (block_size, part), line, mark in zip(
        COVERAGE.groupby("block_size"), lines, marks, strict=True
    ):
        assert line.get_xydata().tolist() == part[["num_anchors", "expected"]].values.tolist()
        assert mark.get_xydata().tolist() == part[["num_anchors", "sampled"]].values.tolist()
        assert line.get_label() == f"block {block_size}"
        assert line.get_color() == mark.get_color()
        assert line.get_linestyle() == "-" and line.get_marker() == "None"
        assert mark.get_linestyle() == "None" and mark.get_marker() != "None"
    assert legend(axes) == ["block 4", "block 7"]
    assert tick_names(axes.xaxis) == ["8", "16", "64"]


@pytest.mark.parametrize(("goal", "heights"), [(0.75, [0.75, 0.75]), (None, [])])
def test_the_goal_is_a_line_at_its_height_or_none(goal, heights):
    (axes,) = explore.plot_coverage(COVERAGE, goal=goal).axes
    assert [y for line in axes.get_lines()[4:] for y in line.get_ydata()] == heights
    assert words(axes) == (["75%"] if goal else [])


def test_the_packing_lines_are_the_expected_shares_dashed_per_document():
    (axes,) = picture_of("packing").axes
    unpacked, packed = axes.get_lines()
    assert unpacked.get_xydata().tolist() == [[16, 0.5], [64, 0.9]]
    assert packed.get_xydata().tolist() == [[16, 0.2], [64, 0.45]]
    assert (unpacked.get_linestyle(), packed.get_linestyle()) == ("--", "-")
    assert legend(axes) == ["unpacked, per document", "packed, 1024, per row"]


def test_the_anchors_table_follows_every_slider():
    explorer = anchors()
    for name, value, by_hand in [
        ("num_anchors", 3, ([0], 26, 3, 7, 0)),
        ("block_size", 2, ([0], 26, 3, 2, 0)),
        ("seed", 5, ([0], 26, 3, 2, 5)),
        ("conversation", 1, ([1], 15, 3, 2, 5)),
        ("row_length", 128, ([1], 15, 3, 2, 5)),
        ("packed", True, ([1, 2], 128, 3, 2, 5)),
        ("row_length", 64, ([1], 64, 3, 2, 5)),
        ("conversation", 0, ([0, 1], 64, 3, 2, 5)),
    ]:
        follows(explorer, name, value, tables_by_hand(*by_hand))
        assert list(explorer.tables) == ["tokens", "blocks"]
        codes = np.frombuffer(explorer.view.state["states"], np.uint8)
        states = [explore.TOKEN_STATES[code] for code in codes]
        assert states == explorer.table["state"].tolist()


def test_a_row_that_is_too_short_is_said_in_words_and_can_be_left():
    explorer = anchors(conversation=2, packed=True, row_length=64)
    assert "96 tokens" in alert(explorer) and "row of 64" in alert(explorer)
    explorer.controls["row_length"].value = 96
    assert len(explorer.table) == 96


def test_a_conversation_that_the_template_refuses_leaves_the_others_alone():
    long = "{% if 'w59' in messages[-1]['content'] %}{{ raise_exception('Too long!') }}{% endif %}"
    explorer = explore.explore_anchors(CHATS, make_tokenizer(chat_template=long + TEMPLATE))
    explorer.controls["conversation"].value = 2
    assert "Too long!" in alert(explorer)
    explorer.controls["conversation"].value = 1
    assert len(explorer.table) == LENGTHS[1]


def test_a_tokenizer_with_an_end_but_no_padding_will_do():
    assert TOKENIZER.pad_token_id is None
    explorer = anchors(packed=True, row_length=64)
    padding = explorer.table[explorer.table["state"] == "padding"]
    assert len(padding) == 64 - LENGTHS[0] - LENGTHS[1]
    assert set(padding["text"]) == {"<|end|>"}


def test_the_shipped_tokenizer_is_taken_where_none_is_given():
    explorer = explore.explore_anchors(CHATS[:1], num_anchors=2, block_size=2)
    assert explorer.table["text"][0] == "<|im_start|>"


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [(anchors, "num_anchors", 5000), (anchors, "row_length", 200000), (masks, "context", 3000)],
)
def test_a_slider_reaches_the_value_that_it_starts_with(make, name, value):
    explorer = make(**{name: value})
    assert explorer.settings[name] == value <= explorer.controls[name].max
    assert explorer.tables


@pytest.mark.parametrize("make", [anchors, masks])
def test_readers_that_run_no_widgets_get_what_is_shown(make):
    explorer = make()
    for seed in (0, 3):
        explorer.controls["seed"].value = seed
        bundle = explorer._repr_mimebundle_(include=None, exclude=None)
        assert bundle[WIDGET]["model_id"] == explorer.model_id
        assert bundle["text/plain"] == repr(explorer)
        assert "text/html" not in bundle
        assert b64decode(bundle["image/png"]).startswith(b"\x89PNG\r\n\x1a\n")


def test_anchors_per_document_are_drawn_in_each_and_covered_as_if_each_were_alone():
    packed = anchors(num_anchors=3, packed=True, per="document", row_length=64)
    tokens = packed.tables["tokens"]
    assert tokens.groupby("document")["anchor"].sum().loc[[0, 1]].tolist() == [3, 3]
    alone = anchors(num_anchors=3).tables["tokens"]
    first = tokens[tokens["document"] == 0]
    assert first["p_covered"].tolist() == pytest.approx(alone["p_covered"].tolist())


def test_where_the_anchor_is_given_a_block_of_one_more_slot_covers_as_much():
    plain, given = anchors(block_size=4), anchors(block_size=5, layout="anchor_given")
    for name in ("p_covered", "times_supervised", "state"):
        assert given.tables["tokens"][name].tolist() == plain.tables["tokens"][name].tolist()
