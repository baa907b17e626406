"""Anchors: tables counted once more in plain loops, pictures, text, and the explorer."""

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_lab.blocks import cut_blocks, draw_blocks
from dspark_lab.chats import Chat, collate, pack
from dspark_lab.explore import (
    block_table,
    explore_anchors,
    plot_coverage,
    slot_inputs,
    token_legend,
    token_table,
    token_text,
)
from tests import oracle
from tests.draws import MASK, PAD, Draw, draws
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
    picture,
    tables_by_hand,
)
from tests.gallery import COVERAGE, picture_of
from tests.pages import ANY_TEXT, ODD, Page
from tests.pictures import legend, tick_names, words
from tests.samples import documents

pytestmark = pytest.mark.usefixtures("one_thread")


def to_text(token_id: int) -> str:
    return f"<{token_id}>"


def token_tables(draw: Draw) -> list[pd.DataFrame]:
    rows = range(len(draw.anchors))
    return [token_table(draw.batch, draw.blocks, to_text, row=row) for row in rows]


def block_tables(draw: Draw) -> list[pd.DataFrame]:
    return [block_table(draw.blocks, to_text, row=row) for row in range(len(draw.anchors))]


@given(draws())
def test_a_tokens_state_is_what_this_draw_and_any_draw_do_with_it(draw):
    expected = oracle.token_states(
        draw.masks["loss_mask"], draw.batch.attention_mask.tolist(), draw.times, draw.reach
    )
    assert [table["state"].tolist() for table in token_tables(draw)] == expected


@given(draws())
def test_the_token_table_lists_each_token_with_its_place_and_its_part(draw):
    candidates = oracle.candidate_mask(**draw.masks)
    for row, table in enumerate(token_tables(draw)):
        ids = draw.batch.input_ids[row].tolist()
        real = draw.batch.attention_mask[row].tolist()
        kept = {a for a, k in zip(draw.anchors[row], draw.keep[row], strict=True) if k}
        assert table["position"].tolist() == list(range(draw.blocks.seq_len))
        assert table["token_id"].tolist() == ids
        assert table["text"].tolist() == [to_text(i) for i in ids]
        assert table["document"].tolist() == [
            doc if flag else -1 for doc, flag in zip(draw.docs[row], real, strict=True)
        ]
        assert table["supervised"].tolist() == draw.masks["loss_mask"][row]
        assert table["candidate"].tolist() == candidates[row] + [False]
        assert table["anchor"].tolist() == [p in kept for p in range(draw.blocks.seq_len)]
        assert table["times_supervised"].tolist() == draw.times[row]


@settings(max_examples=60)
@given(draws())
def test_p_covered_is_the_share_of_all_possible_draws_of_as_many_anchors(draw):
    num_anchors = len(draw.anchors[0])
    expected = oracle.coverage(
        num_anchors=num_anchors, block_size=draw.blocks.block_size, **draw.masks
    )
    for table, shares in zip(token_tables(draw), expected, strict=True):
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
        draw.batch.input_ids.tolist(), draw.anchors, draw.keep, MASK, draw.blocks.block_size
    )
    positions = oracle.position_ids(
        draw.anchors, draw.blocks.block_size, draw.batch.position_ids.tolist()
    )
    mask = draw.dense_mask()
    for row, table in enumerate(block_tables(draw)):
        expected = []
        for block, anchor in enumerate(draw.anchors[row]):
            for slot in range(draw.blocks.block_size):
                query = block * draw.blocks.block_size + slot
                label, kept = anchor + slot + 1, draw.keep[row][block]
                shown = kept and label < draw.blocks.seq_len
                token = inputs[row][query]
                expected.append(
                    {
                        "block": block,
                        "kept": kept,
                        "slot": slot,
                        "position_id": positions[row][query],
                        "input": "[mask]" if token == MASK else to_text(token),
                        "context": sum(mask[row][query][: draw.blocks.seq_len]),
                        "label_position": label,
                        "label": to_text(int(draw.batch.input_ids[row, label])) if shown else "",
                        "supervised": draw.eval_mask[row][block][slot],
                    }
                )
        assert table.to_dict("records") == expected
        assert slot_inputs(draw.blocks.row(row), to_text) == table["input"].tolist()


def test_an_anchor_whose_token_has_the_mask_tokens_number_is_still_shown_as_itself():
    batch = collate(documents("aaaa"), PAD)
    blocks = cut_blocks(
        batch, torch.tensor([[0, 0]]), torch.tensor([[True, False]]), 2, mask_token_id=0
    )
    assert slot_inputs(blocks, to_text) == ["<0>", "[mask]", "[mask]", "[mask]"]


@pytest.mark.parametrize("row", [2, -1])
def test_a_row_that_is_not_there_is_refused(row):
    batch = collate(documents("aaaa", "aaa"), PAD)
    blocks = draw_blocks(batch, 2, 2, seed=0)
    with pytest.raises(ValueError, match=f"row must .*got {row}"):
        token_table(batch, blocks, to_text, row=row)
    with pytest.raises(ValueError, match=f"row must .*got {row}"):
        block_table(blocks, to_text, row=row)


def test_tables_stay_with_the_row_they_are_asked_for():
    batch = pack(documents("..aaaaaaaaaaaaaaaaaaaa", "....aaaaaaaa", ".aaaa"), 36, PAD)
    blocks = draw_blocks(batch, 5, 3, seed=2)
    one, drawn = batch.row(1), blocks.row(1)
    tokens = token_table(batch, blocks, to_text, row=1)
    pd.testing.assert_frame_equal(tokens, token_table(one, drawn, to_text))
    pd.testing.assert_frame_equal(block_table(blocks, to_text, row=1), block_table(drawn, to_text))


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
    (axes,) = plot_coverage(COVERAGE, goal=goal).axes
    assert [y for line in axes.get_lines()[4:] for y in line.get_ydata()] == heights
    assert words(axes) == (["75%"] if goal else [])


def test_the_packing_lines_are_the_expected_shares_dashed_per_document():
    (axes,) = picture_of("packing").axes
    unpacked, packed = axes.get_lines()
    assert unpacked.get_xydata().tolist() == [[16, 0.5], [64, 0.9]]
    assert packed.get_xydata().tolist() == [[16, 0.2], [64, 0.45]]
    assert (unpacked.get_linestyle(), packed.get_linestyle()) == ("--", "-")
    assert legend(axes) == [
        "unpacked, per document",
        "packed, 1024, per row",
    ]


def tokens(*texts: str) -> pd.DataFrame:
    """The token table of a row with these tokens, the first of them a prompt."""
    batch = collate(documents("." + "a" * (len(texts) - 1)), 0)
    blocks = draw_blocks(batch, 2, 2, seed=0)
    return token_table(batch, blocks, lambda token_id: texts[token_id])


def test_the_token_text_is_every_token_and_no_markup_of_its_own():
    page = Page(token_text(tokens(*ODD)))
    assert page.text.replace("⏎", "") == "".join(ODD)
    assert page.tags == ["style", "div"] + ["span"] * len(ODD)
    assert set(page.attributes) == {"class", "title"}


@given(st.lists(ANY_TEXT, min_size=2, max_size=6))
def test_any_text_can_be_read_back_from_the_token_text(texts):
    page = Page(token_text(tokens(*texts)))
    assert page.text.replace("⏎", "") == "".join(texts)
    assert page.tags == ["style", "div"] + ["span"] * len(texts)


def test_a_line_break_is_shown_and_breaks_the_line():
    assert Page(token_text(tokens("a", "\n", "b"))).text == "a⏎\nb"


def test_a_tokens_class_and_tip_tell_what_it_is():
    batch = pack(documents("..aaaaa", ".a"), 12, 99)
    blocks = draw_blocks(batch, 2, 2, seed=0)
    table = token_table(batch, blocks, str)
    page = Page(token_text(table))
    shown = table[table["state"] != "padding"]
    assert len(page.tips) == len(shown) == 9
    lines = shown.itertuples()
    for tip, classes, token in zip(page.tips, page.classes, lines, strict=True):
        facts = tip.split(" · ")
        assert f"position {token.position}" in facts
        assert f"id {token.token_id}" in facts
        assert token.state in facts
        assert ("anchor" in facts) == token.anchor
        assert ("candidate" in facts) == (token.candidate and not token.anchor)
        assert (f"covered with probability {token.p_covered:.3f}" in facts) == token.supervised
        assert ("document 1" in facts) == (token.document == 1)
        assert ("dspark-" + token.state.replace(" ", "-")) in classes.split()
        assert ("dspark-anchor" in classes.split()) == token.anchor
    states = set(shown["state"])
    assert {"prompt", "covered", "never a label"} <= states


def test_every_class_of_the_token_text_has_a_style():
    table = tokens(*"abcdefgh")
    for source in (token_text(table), token_legend(table)):
        for classes in Page(source).classes:
            assert all(f".{name}{{" in source for name in classes.split())


def test_the_legend_counts_the_tokens_of_each_kind():
    batch = pack(documents("..aaaaaaa", ".a"), 14, 99)
    table = token_table(batch, draw_blocks(batch, 2, 2, seed=0), str)
    counts = table["state"].value_counts()
    expected = {f"{state} {counts[state]}" for state in counts.index if state != "padding"} | {
        "candidate 6",
        "anchor 2",
    }
    assert {word for word in Page(token_legend(table)).words if word.strip()} == expected


def test_a_packed_document_begins_under_its_number():
    batch = pack(documents("..aa", ".a", ".a"), 9, 99)
    table = token_table(batch, draw_blocks(batch, 2, 2, seed=0), lambda i: f"[{i}]")
    assert Page(token_text(table)).text == "[0][1][2][3]document 1[4][5]document 2[6][7]"


def test_padding_is_not_part_of_the_token_text():
    batch = collate(documents(".aa"), 7, 6)
    table = token_table(batch, draw_blocks(batch, 1, 1, seed=0), lambda i: f"[{i}]")
    assert Page(token_text(table)).text == "[0][1][2]"


def test_the_anchors_table_follows_every_slider():
    explorer = anchors()
    moves: list[tuple[str, object, tuple]] = [
        ("num_anchors", 3, ([0], 26, 3, 7, 0)),
        ("block_size", 2, ([0], 26, 3, 2, 0)),
        ("seed", 5, ([0], 26, 3, 2, 5)),
        ("conversation", 1, ([1], 15, 3, 2, 5)),
        ("row_length", 128, ([1], 15, 3, 2, 5)),
        ("packed", True, ([1, 2], 128, 3, 2, 5)),
        ("row_length", 64, ([1], 64, 3, 2, 5)),
        ("conversation", 0, ([0, 1], 64, 3, 2, 5)),
    ]
    for name, value, by_hand in moves:
        follows(explorer, name, value, tables_by_hand(*by_hand))
    assert list(explorer.tables) == ["tokens", "blocks"]


def test_the_anchors_picture_is_the_text_of_its_table():
    explorer = anchors(num_anchors=3)
    expected = token_legend(explorer.table) + token_text(explorer.table)
    assert picture(explorer).value == expected
    assert "&lt;b&gt;" in expected and "<b>" not in expected


def test_the_chosen_conversation_stands_first_in_its_packed_row():
    explorer = anchors(conversation=1, packed=True, row_length=128)
    documents = explorer.table["document"].tolist()
    assert documents == [0] * LENGTHS[1] + [1] * LENGTHS[2] + [-1] * (128 - LENGTHS[1] - LENGTHS[2])


def test_an_answers_exclamation_mark_is_no_mask_token_though_its_number_is_0():
    messages = ({"role": "user", "content": "w1"}, {"role": "assistant", "content": "! !"})
    explorer = explore_anchors([Chat(messages, id="!")], TOKENIZER, num_anchors=2, block_size=2)
    blocks = explorer.tables["blocks"]
    assert blocks["kept"].all()
    assert blocks["input"].tolist() == ["!", "[mask]"] * 2


def test_a_row_that_is_too_short_is_said_in_words_and_can_be_left():
    explorer = anchors(conversation=2, packed=True, row_length=64)
    for length in (96, 64):
        assert "96 tokens" in alert(explorer) and "row of 64" in alert(explorer)
        assert explorer.tables == {}
        with pytest.raises(ValueError, match="explore_anchors has nothing to show"):
            explorer.table  # noqa: B018
        explorer.controls["row_length"].value = length + 32
        assert len(explorer.table) == length + 32
        explorer.controls["row_length"].value = 64


def test_a_tokenizer_without_a_chat_template_is_said_in_words():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert "chat template" in alert(explore_anchors(CHATS, tokenizer))


def test_a_conversation_that_the_template_refuses_leaves_the_others_alone():
    refuse = (
        "{% if 'w59' in messages[-1]['content'] %}{{ raise_exception('Too long!') }}{% endif %}"
    )
    explorer = explore_anchors(CHATS, make_tokenizer(chat_template=refuse + TEMPLATE))
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
    explorer = explore_anchors(CHATS[:1], num_anchors=2, block_size=2)
    assert explorer.table["text"][0] == "<|im_start|>"


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_anchors", 4096), ("block_size", 100), ("seed", 1234), ("row_length", 5000)],
)
def test_a_slider_reaches_the_value_that_it_starts_with(name, value):
    explorer = anchors(**{name: value})
    assert explorer.settings[name] == value
    assert explorer.controls[name].max >= value
    assert len(explorer.table) == LENGTHS[0]


def test_readers_that_run_no_widgets_get_the_text_of_the_anchors():
    explorer = anchors()
    bundle = explorer._repr_mimebundle_(include=None, exclude=None)
    assert bundle[WIDGET]["model_id"] == explorer.model_id
    assert bundle["text/html"] == picture(explorer).value
    assert bundle["text/plain"] == repr(explorer)
    explorer.controls["seed"].value = 3
    again = explorer._repr_mimebundle_()
    assert again["text/html"] == picture(explorer).value != bundle["text/html"]
    assert again[WIDGET] == bundle[WIDGET]
