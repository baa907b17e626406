"""The text of a row: its lists, its picture, what the browser is sent, and what it makes of it."""

import itertools
import random
import shutil
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

from dspark_lab import explore
from dspark_lab.blocks import Blocks, cut_blocks, draw_blocks
from dspark_lab.chats import Batch, collate, pack
from dspark_lab.explore.tokens import LOOKS, TokensView
from tests.draws import PAD
from tests.explorers import CHATS, TOKENIZER, anchors
from tests.pictures import contrast
from tests.samples import documents
from tests.text_in_node import ask

pytestmark = pytest.mark.usefixtures("one_thread")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")
CASES = 60
PIECES = (
    "The",
    " sky",
    " is",
    "blue",
    "\n",
    ".\n\n",
    "",
    "\t",
    " ",
    "aB" * 9,
    "é",
    " 日本",
    "$x$",
    "<b>",
)


def row_of(texts: list[str], blocks: Blocks, batch: Batch) -> dict[str, Any]:
    def to_text(token_id: int) -> str:
        return texts[token_id] if token_id < len(texts) else "[pad]"

    state = explore.token_state(batch, blocks, num_anchors=3)
    return {
        "state": state | {"row": explore.token_row(batch, to_text)},
        "table": explore.token_table(batch, blocks, to_text, num_anchors=3),
    }


@cache
def cases() -> list[dict[str, Any]]:
    """Rows of one document or of several with draws of blocks, and what node says of them."""
    found = []
    for seed in range(CASES):
        luck = random.Random(seed)
        marks = ["".join(luck.choices("aaaa.", k=luck.randint(1, 25))) for _ in range(seed % 4 + 1)]
        length = sum(map(len, marks))
        batch = pack(documents(*marks), length + luck.randint(0, 3), PAD)
        layout: Any = luck.choice(["anchor_predicts", "anchor_given"])
        size = luck.randint(2, 6)
        blocks = draw_blocks(batch, luck.randint(1, 8), size, seed=seed, layout=layout)
        case = row_of(luck.choices(PIECES, k=length), blocks, batch)
        case |= {"batch": batch, "blocks": blocks, "columns": luck.randint(4, 20)}
        case |= {"wanted": ["the", "BLUE", "e", "zz", "$x$", "\n", "s the", ""], "parts": 5}
        found.append(case)
    asked = [{k: case[k] for k in ("state", "columns", "wanted", "parts")} for case in found]
    for case, answer in zip(found, ask(asked), strict=True):
        case["answer"] = answer
    return found


def each_case() -> Any:
    for case in cases():
        length = int(case["batch"].attention_mask.sum())
        yield case, case["answer"], case["table"].iloc[:length]


@needs_node
def test_lines_hold_the_whole_text_break_behind_line_ends_and_are_no_wider_than_they_may_be():
    for case, answer, table in each_case():
        lines = list(zip(answer["lines"][::2], answer["lines"][1::2], strict=True))
        starts = case["batch"].seq_lens[0].cumsum(0).tolist()
        starts = [0, *(start for start in starts if start < len(table))]
        dividers = [token for token, character in lines if character < 0]
        assert dividers == (sorted(set(starts)) if len(set(starts)) > 1 else [])
        said = "".join(text for parts in answer["parts"] for _, text in parts)
        assert said == "".join(answer["shown"][: len(table)]).replace("\n", "")
        for parts in answer["parts"]:
            words = [text for _, text in parts]
            assert all("⏎" not in word[:-1] for word in words)
            assert all(not word.endswith("⏎") for word in words[:-1])
            assert sum(map(len, words)) <= max(case["columns"], max(map(len, words), default=0))
            assert max(map(len, words), default=0) <= case["columns"]
        tokens = [token for token, _ in itertools.chain(*answer["parts"])]
        assert tokens == sorted(tokens) and set(tokens) == set(range(len(table)))
        for token, line in enumerate(answer["lineOf"]):
            first = next(i for i, parts in enumerate(answer["parts"]) if token in dict(parts))
            assert line == first


@needs_node
def test_a_word_of_several_tokens_stays_on_one_line_where_it_fits():
    batch = collate(documents("aaaaa"), PAD)
    texts = [" the", " sc", "atter", "ed", " light"]
    case = row_of(texts, draw_blocks(batch, 1, 2, seed=0), batch)
    (answer,) = ask([{"state": case["state"], "columns": 10, "wanted": [], "parts": 1}])
    lines = ["".join(text for _, text in parts) for parts in answer["parts"]]
    assert lines == [" the", " scattered", " light"]


@needs_node
def test_the_blocks_that_cover_a_token_are_those_whose_labels_it_is():
    for case, answer, table in each_case():
        blocks = case["blocks"]
        labels, supervised = blocks.label_indices[0].tolist(), blocks.eval_mask[0].tolist()
        given = blocks.block_size - blocks.predicted
        for token, found in enumerate(answer["covering"]):
            expected = [
                {"block": block, "slot": place + given}
                for block, places in enumerate(labels)
                for place, label in enumerate(places)
                if label == token and supervised[block][place]
            ]
            assert sorted(found, key=lambda one: one["block"]) == expected
            assert len(found) == table["times_supervised"][token]


@needs_node
def test_what_is_said_of_a_token_is_its_line_of_the_table():
    for case, answer, table in each_case():
        several = len(set(table["document"])) > 1
        kept = case["blocks"].block_keep_mask[0]
        of_anchor = dict(
            zip(case["blocks"].anchor_positions[0][kept].tolist(), range(99), strict=False)
        )
        assert answer["documents"] == table["document"].tolist()
        for facts, token in zip(answer["facts"], table.itertuples(), strict=True):
            first, *others = facts
            assert f"position {token.position} · id {token.token_id}" in first
            assert (f"document {token.document}" in first) == several
            said = " ".join(others)
            assert token.state.split()[0] in said
            assert (f"probability {token.p_covered:.3f}" in said) == token.supervised
            counted = "once" if token.times_supervised == 1 else f"{token.times_supervised} times"
            assert (f"supervised {counted} by this draw" in said) == token.supervised
            assert ("can be an anchor" in said) == (token.candidate and not token.anchor)
            assert (f"the anchor of block {of_anchor.get(token.position)}" in said) == token.anchor


@needs_node
def test_lists_in_the_browser_are_those_of_python():
    for case, answer, _ in each_case():
        lists = explore.token_lists(case["table"])
        for name in explore.TOKEN_LISTS:
            part = lists[lists["list"] == name]
            listed = answer["lists"][name]
            places = [(place["position"], place["tokens"]) for place in listed["places"]]
            assert places == list(zip(part["position"], part["tokens"], strict=True))
            assert listed["count"] == len(part)


@needs_node
def test_search_finds_every_occurrence_whatever_its_case_and_over_tokens():
    for case, answer, table in each_case():
        texts = table["text"].tolist()
        owner = [token for token, text in enumerate(texts) for _ in text]
        joined = "".join(texts).lower()
        for wanted, found in zip(case["wanted"], answer["found"], strict=True):
            expected, start = [], joined.find(wanted.lower()) if wanted else -1
            while start >= 0:
                expected += [owner[start], owner[start + len(wanted) - 1]]
                start = joined.find(wanted.lower(), start + len(wanted))
            assert found == expected, wanted


@needs_node
def test_the_legend_goes_to_the_next_of_a_kind_and_round():
    for _, answer, table in each_case():
        states = table["state"]
        kinds = {state: (states == state).tolist() for state in LOOKS}
        kinds |= {name: table[name].tolist() for name in ("candidate", "anchor")}
        assert kinds.keys() == answer["next"].keys()
        for kind, marks in kinds.items():
            for start, found in zip(range(-1, len(table)), answer["next"][kind], strict=True):
                later = [*range(start + 1, len(table)), *range(max(0, start + 1))]
                assert found == next((token for token in later if marks[token]), -1)


@needs_node
def test_the_map_counts_each_token_once():
    for case, answer, table in each_case():
        counts = np.array(answer["map"]).reshape(case["parts"], len(explore.TOKEN_STATES)).sum(0)
        expected = [int((table["state"] == state).sum()) for state in explore.TOKEN_STATES]
        assert counts.tolist() == expected


def test_lists_of_a_row_by_hand():
    batch = pack(documents(".aaaaaa.", "aaa"), 12, PAD)
    blocks = cut_blocks(batch, torch.tensor([[1]]), torch.tensor([[True]]), 2)
    table = explore.token_table(batch, blocks, "{} ".format)
    lists = explore.token_lists(table).set_index("list")
    assert lists.columns.tolist() == ["position", "tokens", "text", "p_covered", "document"]
    # Of seven candidates one is drawn; the second token of a run has one before it, later ones two.
    worst = lists.loc["worst covered"]
    assert worst["position"].tolist() == [2, 9, 3, 4, 5, 6, 10]
    assert worst["p_covered"].tolist() == pytest.approx([1 / 7] * 2 + [2 / 7] * 5)
    assert lists.loc["never a label", "position"].tolist() == [1, 8]
    gaps = lists.loc["longest gap", ["position", "tokens", "text"]].values.tolist()
    assert gaps == [[4, 3, "4 5 6 "], [9, 2, "9 10 "]]
    assert explore.token_lists(table, most=1)["position"].tolist() == [2, 1, 4]


def test_a_gap_ends_with_its_document():
    batch = pack(documents("aaa", "aaa"), 6, PAD)
    blocks = cut_blocks(batch, torch.tensor([[0]]), torch.tensor([[False]]), 2)
    lists = explore.token_lists(explore.token_table(batch, blocks, str))
    gaps = lists[lists["list"] == "longest gap"]
    assert gaps[["position", "tokens"]].values.tolist() == [[1, 2], [4, 2]]


def words_of(figure: Any) -> str:
    texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
    texts.sort(key=lambda text: (text.get_position()[1], text.get_position()[0]))
    return " ".join(text.get_text() for text in texts)


def test_the_picture_of_the_text_counts_its_states_and_tells_documents():
    batch = pack(documents("..aaa", "..a"), 10, PAD)
    blocks = cut_blocks(batch, torch.tensor([[2]]), torch.tensor([[True]]), 1)
    table = explore.token_table(batch, blocks, lambda i: f"w{i} ")
    said = words_of(explore.plot_tokens(table))
    for entry in ("prompt 4", "covered 1", "not covered 1", "never a label 2", "anchor 1"):
        assert entry in said
    assert "document 1" in said and f"w{PAD}" not in said
    assert all(f"w{i}" in said for i in range(8)) and "more tokens" not in said
    both = words_of(explore.plot_tokens({"theirs": table, "ours": table}))
    assert "theirs" in both and "ours" in both and "anchor 2" in both


def test_a_long_text_is_shown_around_its_first_answer_with_what_is_left_out():
    batch = collate(documents("." * 3000 + "a" * 3000), PAD)
    blocks = draw_blocks(batch, 4, 2, seed=0)
    table = explore.token_table(batch, blocks, lambda i: f"{i:05d} ")
    figure = explore.plot_tokens(table)
    said = words_of(figure)
    shown = [i for i in range(6000) if f"{i:05d}" in said]
    assert shown == list(range(shown[0], shown[-1] + 1)) and {2990, 3100} <= set(shown)
    assert f"… {shown[0]:,} tokens before" in said
    assert f"… and {6000 - 1 - shown[-1]:,} more tokens" in said
    assert figure.get_size_inches()[1] < 12


def test_words_and_signs_of_the_picture_stand_out_from_their_paper():
    for look in LOOKS.values():
        rgb = [[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in (look.paper, look.ink)]
        assert contrast(*rgb) >= 4.5
        line = [int(look.line[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert not look.sign or contrast(rgb[0], line) >= 3
    assert len({look.sign for look in LOOKS.values()}) == len(LOOKS)


def test_the_browser_is_sent_the_texts_when_the_row_changes_and_a_page_has_all():
    explorer = anchors()
    view = explorer.view
    assert isinstance(view, TokensView) and "row" not in view.state
    sent = []
    view.observe(lambda change: sent.append(change["name"]), ["row", "state"])
    explorer.controls["num_anchors"].value = 3
    explorer.controls["seed"].value = 4
    assert sent == ["state", "state"]
    explorer.controls["conversation"].value = 1
    assert sent[2:] == ["row", "state"]
    assert view.whole["row"]["texts"] == explorer.table["text"].tolist()
    for name, kind in {"times": np.int32, "chances": np.float32, "candidates": np.uint8}.items():
        column = {"times": "times_supervised", "chances": "p_covered"}.get(name, "candidate")
        sent_values = np.frombuffer(view.state[name], kind)
        assert sent_values.tolist() == explorer.table[column].astype(kind).tolist()
    codes = np.frombuffer(view.state["states"], np.uint8)
    assert [explore.TOKEN_STATES[code] for code in codes] == explorer.table["state"].tolist()


def test_the_labs_own_mask_stands_beside_that_of_another_trainer():
    plain = explore.explore_anchors(CHATS, TOKENIZER)
    assert plain.view.state["own"] is None and list(plain.tables) == ["tokens", "blocks"]
    explorer = explore.explore_anchors(CHATS, TOKENIZER, like="automodel")
    assert list(explorer.tables) == ["tokens", "blocks", "own"]
    own = explorer.view.state["own"]
    codes = np.frombuffer(own["states"], np.uint8)
    assert [explore.TOKEN_STATES[code] for code in codes] == explorer.tables["own"][
        "state"
    ].tolist()
    assert explorer.view.row["own"]["texts"] == explorer.tables["own"]["text"].tolist()
    pd.testing.assert_frame_equal(explorer.tables["own"], plain.tables["tokens"])
