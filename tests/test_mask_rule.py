"""The mask's rule in JavaScript and as intervals, against dense masks cell by cell."""

import random

import numpy as np
import pytest
import torch

from dspark_lab import explore
from dspark_lab.attention import View
from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import encode, one_row
from dspark_lab.explore import RuleMask, mask_row, mask_state
from tests.explorers import CHATS, TOKENIZER, masks
from tests.rule_in_node import (
    RULE,
    ask,
    make_case,
    needs_node,
    question,
    unlike,
    unlike_in_python,
)

# A part of rule.js and what replaces it.
FAULTS = {
    "the anchor is visible": ("const end = anchor + mask.reach;", "const end = anchor + 1;"),
    "documents are forgotten": ("const start = mask.start[block];", "const start = 0;"),
    "the window is that of the anchor": (
        " + slotOf(mask, query) + 1 - mask.window",
        " + 1 - mask.window",
    ),
    "dummies see context": ("if (!mask.keep[block]) return [0, 0];", ""),
    "causal slots do not see themselves": ("mask.seq_len + query + 1", "mask.seq_len + query"),
    "blocks are one slot longer": ("start + mask.block_size];", "start + mask.block_size + 1];"),
    "tiles that are touched are full": ("covering === size ? 2", "covering > 0 ? 2"),
    "sides are exchanged": ("const side = i % 2 ? 0 : 1;", "const side = i % 2 ? 1 : 0;"),
}


def faults_of(cases, source=None):
    answers = ask([question(case) for case in cases], source)
    return [(i, unlike(case, answers[i])) for i, case in enumerate(cases)]


@needs_node
@pytest.mark.parametrize("count", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_the_rule_in_javascript_says_of_every_cell_what_the_dense_mask_says(count):
    assert not [found for found in faults_of([make_case(i) for i in range(count)]) if found[1]]


@pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])
def test_masks_as_intervals_have_the_cells_tiles_and_differences_of_dense_ones(count):
    found = [(i, unlike_in_python(make_case(i))) for i in range(count)]
    assert not [(i, wrong) for i, wrong in found if wrong]


@needs_node
@pytest.mark.guard
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_planted_in_the_rule_is_noticed(name):
    right, wrong = FAULTS[name]
    source = RULE.read_text(encoding="utf-8")
    assert source.count(right) == 1
    planted = source.replace(right, wrong)
    assert any(found for _, found in faults_of([make_case(i) for i in range(40)], planted))


@needs_node
@pytest.mark.parametrize("layout", ["anchor_predicts", "anchor_given"])
def test_what_hover_says_of_cells_is_in_the_block_table_and_the_dense_mask(layout):
    row = one_row([encode(chat, TOKENIZER) for chat in CHATS[:2]], 60, TOKENIZER.eos_token_id)
    blocks = draw_blocks(row, 30, 5, seed=3, layout=layout)
    assert 0 < blocks.block_keep_mask.sum() < 30

    def to_text(token):
        return str(TOKENIZER.decode([token]))

    view, luck = View(20, False), random.Random(0)
    mask = RuleMask(blocks, view, length=41)
    state = mask_state(mask, tile_size=16, row=mask_row(row, to_text))
    queries, keys = mask.shape
    cells = [[luck.randrange(queries), luck.randrange(keys)] for _ in range(500)]
    (answer,) = ask([{"state": state, "cells": cells, "facts": True}])
    table = explore.block_table(blocks, to_text, view=view)
    regions = explore.mask_regions(blocks, view=view)
    texts, docs = mask_row(row, to_text)["texts"], blocks.doc_ids[0].tolist()
    names = "block slot kept input label_position label supervised".split()

    def slot(facts, line):
        assert [facts[name] for name in names] == line[names].tolist()
        assert facts["position"] == line["position_id"]
        assert facts["supervised"] == (facts["reason"] == "")

    for (query, key), facts, lines in zip(cells, answer["facts"], answer["lines"], strict=True):
        slot(facts["query"], table.loc[query])
        seen = int(regions[query, key])
        assert facts["region"] == explore.REGIONS[seen] and facts["visible"] == (seen > 0)
        if key < 60:
            assert facts["key"] == {
                "kind": "token",
                "token": key,
                "text": texts[key],
                "document": docs[key],
            }
        else:
            slot(facts["key"], table.loc[key - 60])
        tile = regions[query // 16 * 16 :, key // 16 * 16 :][:16, :16] > 0
        state = "full" if int(tile.sum()) == 256 else "partial" if tile.any() else "empty"
        assert facts["tile"] == {
            "row": query // 16,
            "column": key // 16,
            "size": 16,
            "state": state,
        }
        assert facts["why"] in lines


@needs_node
def test_hover_says_why_a_slot_is_not_supervised():
    row = one_row([encode(chat, TOKENIZER) for chat in CHATS[:2]], 41, TOKENIZER.eos_token_id)
    blocks = draw_blocks(row, 60, 8, seed=0)
    state = mask_state(RuleMask(blocks), row=mask_row(row, str))
    (answer,) = ask([{"state": state, "cells": [[q, 0] for q in range(480)], "facts": True}])
    kept, supervised = blocks.block_keep_mask[0].tolist(), blocks.eval_mask[0]
    reasons = set()
    for query, facts in enumerate(answer["facts"]):
        (block, slot), said = divmod(query, 8), facts["query"]["reason"]
        label = int(blocks.anchor_positions[0, block]) + slot + 1
        if supervised[block, slot]:
            wanted = ""
        elif not kept[block]:
            wanted = "a dummy block predicts nothing"
        elif label >= 41:
            wanted = "its label is past the end of the row"
        elif blocks.doc_ids[0, label] != blocks.doc_ids[0, label - slot - 1]:
            wanted = "its label is past the end of the document"
        elif not row.loss_mask[0, label]:
            wanted = f"its label, token {label}, is not supervised"
        else:
            first = label - slot + int(supervised[block].sum())
            wanted = f"token {first}, an earlier label of the block, is not supervised"
        assert said == wanted
        reasons.add(said.partition(",")[0])
    assert len(reasons) >= 4


def test_tokens_travel_only_when_they_change():
    explorer = masks()
    sent: list[str] = []
    explorer.view.observe(lambda change: sent.append(change["name"]), names=["state", "row"])
    explorer.controls["num_anchors"].value = 3
    explorer.controls["compare"].value = "causal block"
    assert sent == ["state", "state"] and "row" not in explorer.view.state
    explorer.controls["conversation"].value = 1
    assert sent[2:] == ["row", "state"] or sent[2:] == ["state", "row"]
    assert len(explorer.view.whole["row"]["texts"]) == 15


@pytest.mark.parametrize(
    "compare", [7, "seed 7", "causal block", "shuffled anchors", "forgotten documents"]
)
def test_the_explorer_compares_with_presets_seeds_and_shuffled_anchors(compare):
    explorer = masks(compare=compare, packed=True, row_length=64)
    table = explorer.tables["difference"]
    assert table["pairs"].sum() > 0
    assert explorer.view.state["other"]["name"] == ("seed 7" if compare == 7 else compare)
    explorer.controls["compare"].value = "nothing"
    assert "difference" not in explorer.tables and explorer.view.state["other"] is None


def test_the_explorer_compares_with_a_mask_of_the_users():
    explorer = masks(compare=lambda b, h, q, kv: (kv < 26) | (q == kv - 26))
    table = explorer.tables["difference"]
    assert set(table["seen only by"]) == {"this mask", "yours"}
    dense = (
        explore.mask_regions(
            draw_blocks(one_row([encode(CHATS[0], TOKENIZER)], 26, 0), 2, 3, seed=0)
        ).numpy()
        > 0
    )
    query, key = np.indices(dense.shape)
    yours = (key < 26) | (query == key - 26)
    assert table["pairs"].sum() == (dense ^ yours).sum()
    with pytest.raises(ValueError, match="compare must be"):
        masks(compare="upside down")
    small = masks(compare=torch.ones(3, 3, dtype=torch.bool))
    assert small.tables == {}


def test_a_mask_of_blocks_is_plotted_as_a_widget_with_a_picture_for_stored_notebooks():
    row = one_row([encode(CHATS[0], TOKENIZER)], 26, 0)
    blocks = draw_blocks(row, 4, 3, seed=0)
    shown = explore.plot_mask(blocks, batch=row, to_text=str, compare="causal block")
    assert shown.state["other"]["causal"] and len(shown.row["texts"]) == 26
    bundle = shown._repr_mimebundle_()
    assert "image/png" in (bundle[0] if isinstance(bundle, tuple) else bundle)


def test_the_picture_of_intervals_is_that_of_the_matrix():
    row = one_row([encode(CHATS[2], TOKENIZER)], 96, 0)
    blocks = draw_blocks(row, 90, 7, seed=0)
    sizes = {"seq_len": 96, "block_size": 7}
    dense = explore.plot_mask(explore.mask_regions(blocks), **sizes)
    spans = explore.plot_mask(explore.mask_spans(blocks), **sizes)
    one, other = (figure.axes[0].images[0].get_array() for figure in (dense, spans))
    assert one.shape == other.shape and np.allclose(one, other)
