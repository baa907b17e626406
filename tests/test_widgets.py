"""Explorers moved from Python as a browser moves them, with and without a running loop.

Conversations and tokenizer are tiny and hand-made: a token is a word, and two words hold what
markup and maths are made of.
"""

import asyncio
import json
import re
import time
from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ipywidgets
import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import Chat, encode, one_row
from dspark_lab.common import context_doc_ids
from dspark_lab.explore import (
    Explorer,
    Frame,
    block_table,
    explore_anchors,
    explore_masks,
    mask_regions,
    mask_table,
    token_legend,
    token_table,
    token_text,
    training,
)
from dspark_lab.explore.explorer import SETTLE_SECONDS, slider

pytestmark = pytest.mark.usefixtures("one_thread")

WIDGET = "application/vnd.jupyter.widget-view+json"
SPECIAL = ["<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["!", "<b>", "$x$", *(f"w{i}" for i in range(60)), *SPECIAL]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <|end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def make_tokenizer(**options: str) -> PreTrainedTokenizerFast:
    """One token a word; the words are numbered from 0, which is an exclamation mark."""
    model = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"eos_token": "<|end|>", "chat_template": TEMPLATE} | options
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def chat(words: int, name: str = "chat") -> Chat:
    """A question of two words and an answer of ``words``: seven tokens more than the answer."""
    said = " ".join(["<b>", "$x$", *(f"w{i % 60}" for i in range(words))][:words])
    messages = ({"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": said})
    return Chat(messages, id=name)


TOKENIZER = make_tokenizer()
CHATS = [chat(20, "a"), chat(9, "b"), chat(90, "c")]
LENGTHS = [26, 15, 96]


def anchors(**start: object) -> Explorer:
    return explore_anchors(CHATS, TOKENIZER, **start)  # type: ignore[arg-type]


def masks(**start: object) -> Explorer:
    """With few anchors and tokens, for speed."""
    return explore_masks(CHATS, TOKENIZER, **({"num_anchors": 2, "block_size": 3} | start))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one_mask() -> Explorer:
    """An explorer that tests look at and do not move."""
    return masks(tile_size=16)


def counting(**controls: int) -> tuple[Explorer, list[dict]]:
    """An explorer of sliders that shows their values, and the list of values it has drawn."""
    drawn: list[dict] = []

    def draw(chosen: SimpleNamespace) -> Frame:
        settings = vars(chosen)
        drawn.append(settings)
        if settings["number"] == 13:
            raise ValueError("13 is <b>unlucky</b>")
        return Frame({"settings": pd.DataFrame([settings])}, html=f"<i>{settings}</i>")

    sliders = [
        slider(name, value, 0, 10**9) for name, value in ({"number": 0} | controls).items()
    ]
    return Explorer("counting", sliders, draw), drawn


def picture(explorer: Explorer) -> ipywidgets.HTML:
    box, shown = explorer.children
    assert isinstance(shown, ipywidgets.HTML)
    assert list(box.children) == list(explorer.controls.values())
    return shown


def alert(explorer: Explorer) -> str:
    """The sentence that stands in place of the picture."""
    found = re.fullmatch(r'<p role="alert">(.*)</p>', picture(explorer).value)
    assert found, picture(explorer).value[:200]
    assert "Traceback" not in found[1] and "\n" not in found[1]
    return found[1]


def test_an_explorer_draws_once_when_it_is_made():
    explorer, drawn = counting(other=5)
    assert drawn == [{"number": 0, "other": 5}]
    assert explorer.frames_drawn == 1
    assert picture(explorer).value == "<i>{'number': 0, 'other': 5}</i>"


def test_a_change_without_a_running_loop_redraws_at_once():
    explorer, drawn = counting()
    explorer.controls["number"].value = 7
    assert drawn[-1] == explorer.settings == {"number": 7}
    assert picture(explorer).value == "<i>{'number': 7}</i>"
    assert explorer.frames_drawn == len(drawn) == 2


def test_fifty_quick_changes_in_a_running_loop_are_one_redraw_of_the_newest_value():
    explorer, drawn = counting()

    async def drag() -> None:
        for value in range(1, 51):
            explorer.controls["number"].value = value
        await asyncio.sleep(0.2)

    asyncio.run(drag())
    assert drawn[1:] == [{"number": 50}]
    assert explorer.frames_drawn == 2
    assert picture(explorer).value == "<i>{'number': 50}</i>"


def test_changes_that_the_loop_brings_one_by_one_are_one_redraw_too():
    explorer, drawn = counting()

    async def drag() -> None:
        for value in range(1, 51):
            explorer.controls["number"].value = value
            await asyncio.sleep(0)
        await asyncio.sleep(0.2)

    asyncio.run(drag())
    assert drawn[1:] == [{"number": 50}]


def test_no_stale_frame_is_drawn_after_a_drag_that_outpaces_the_drawing():
    drawn = []

    def slow(chosen: SimpleNamespace) -> Frame:
        time.sleep(0.04)
        drawn.append(chosen.number)
        return Frame({"one": pd.DataFrame([chosen.number])}, html=str(chosen.number))

    explorer = Explorer("slow", [slider("number", 0, 0, 1000)], slow)

    async def drag() -> int:
        for value in range(1, 101):
            explorer.controls["number"].value = value
            await asyncio.sleep(0.002)
        before = len(drawn)
        await asyncio.sleep(0.3)
        return before

    before = asyncio.run(drag())
    assert before < 50
    assert drawn == sorted(set(drawn)) and drawn[-1] == 100
    assert len(drawn) - before <= 1


def test_a_drag_without_a_pause_is_seen_while_it_goes_on():
    explorer, drawn = counting()

    async def drag() -> int:
        start = time.monotonic()
        while time.monotonic() < start + 20 * SETTLE_SECONDS:
            explorer.controls["number"].value += 1
            await asyncio.sleep(0)
        return len(drawn)

    assert asyncio.run(drag()) >= 4


def test_a_table_read_before_the_loop_goes_on_is_that_of_the_newest_value():
    explorer, drawn = counting()

    async def change_and_read() -> list:
        explorer.controls["number"].value = 4
        explorer.controls["number"].value = 5
        read = [explorer.table["number"][0], explorer.tables["settings"]["number"][0]]
        await asyncio.sleep(0.1)
        return read

    assert asyncio.run(change_and_read()) == [5, 5]
    assert drawn[1:] == [{"number": 5}]


def test_what_is_shown_before_the_loop_goes_on_is_that_of_the_newest_value():
    explorer, _ = counting()

    async def change_and_show() -> dict:
        explorer.controls["number"].value = 5
        return explorer._repr_mimebundle_()

    bundle = asyncio.run(change_and_show())
    assert bundle["text/plain"] == "counting(number=5)"
    assert bundle["text/html"] == "<i>{'number': 5}</i>"


def test_a_change_after_a_redraw_in_a_loop_is_drawn_again():
    explorer, drawn = counting()

    async def two_drags() -> None:
        for value in (1, 2, 3):
            explorer.controls["number"].value = value
            await asyncio.sleep(0.1)

    asyncio.run(two_drags())
    assert [settings["number"] for settings in drawn] == [0, 1, 2, 3]


def test_the_picture_is_replaced_in_place_and_never_blank():
    explorer, _ = counting()
    shown, children = picture(explorer), explorer.children
    values: list[str] = []
    shown.observe(lambda change: values.append(change["new"]), names="value")
    for number in (3, 13, 4):
        explorer.controls["number"].value = number
    assert values == [
        "<i>{'number': 3}</i>",
        '<p role="alert">13 is &lt;b&gt;unlucky&lt;/b&gt;</p>',
        "<i>{'number': 4}</i>",
    ]
    assert explorer.children is children and picture(explorer) is shown


@pytest.mark.parametrize("make", [anchors, masks])
def test_an_explorers_redraw_makes_no_new_widget(make):
    explorer = make()
    before = [id(child) for child in (*explorer.children, *explorer.children[0].children)]
    old = picture(explorer).value
    explorer.controls["num_anchors"].value = 3
    assert picture(explorer).value != old
    after = [id(child) for child in (*explorer.children, *explorer.children[0].children)]
    assert after == before


def test_an_impossible_setting_shows_a_sentence_leaves_no_table_and_can_be_left():
    explorer, _ = counting()
    explorer.controls["number"].value = 13
    assert alert(explorer) == "13 is &lt;b&gt;unlucky&lt;/b&gt;"
    assert explorer.tables == {}
    with pytest.raises(ValueError, match="counting has nothing to show: 13 is <b>unlucky</b>"):
        explorer.table  # noqa: B018
    explorer.controls["number"].value = 14
    assert explorer.table["number"].tolist() == [14]
    assert picture(explorer).value == "<i>{'number': 14}</i>"


def tables_by_hand(
    conversations: list[int], length: int, num_anchors: int, block_size: int, seed: int
) -> dict[str, pd.DataFrame]:
    """What both explorers' tables say for conversations in a row of ``length``."""
    batch = one_row(
        [encode(CHATS[i], TOKENIZER) for i in conversations], length, TOKENIZER.eos_token_id
    )
    blocks = draw_blocks(batch, num_anchors, block_size, seed=seed)

    def to_text(token_id: int) -> str:
        return TOKENIZER.decode([token_id])

    seq_len = batch.input_ids.shape[1]
    doc_ids = context_doc_ids(batch.seq_lens, seq_len, "cpu")
    return {
        "tokens": token_table(batch, blocks, to_text),
        "blocks": block_table(batch, blocks, to_text),
        "mask": mask_table(mask_regions(blocks, seq_len=seq_len, doc_ids=doc_ids)),
    }


# A table's input for the mask token depends on the number that stands for it.
COMPARED = [
    "block",
    "kept",
    "slot",
    "position_id",
    "context",
    "label_position",
    "label",
    "supervised",
]


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
        explorer.controls[name].value = value
        expected = tables_by_hand(*by_hand)
        pd.testing.assert_frame_equal(explorer.table, expected["tokens"])
        pd.testing.assert_frame_equal(
            explorer.tables["blocks"][COMPARED], expected["blocks"][COMPARED]
        )
    assert list(explorer.tables) == ["tokens", "blocks"]


def test_the_anchors_picture_is_the_text_of_its_table():
    explorer = anchors(num_anchors=3)
    expected = token_legend(explorer.table) + token_text(explorer.table)
    assert picture(explorer).value == expected
    assert "&lt;b&gt;" in expected and "<b>" not in expected


def test_the_mask_tables_follow_the_sliders():
    explorer = masks()
    assert list(explorer.tables) == ["mask", "tiles", "blocks"]
    for name, value, by_hand in [
        ("num_anchors", 3, ([0], 26, 3, 3, 0)),
        ("conversation", 1, ([1], 15, 3, 3, 0)),
        ("row_length", 64, ([1], 15, 3, 3, 0)),
        ("packed", True, ([1], 64, 3, 3, 0)),
        ("conversation", 0, ([0, 1], 64, 3, 3, 0)),
        ("num_anchors", 20, ([0, 1], 64, 20, 3, 0)),
    ]:
        explorer.controls[name].value = value
        expected = tables_by_hand(*by_hand)
        pd.testing.assert_frame_equal(explorer.table, expected["mask"])
        pd.testing.assert_frame_equal(
            explorer.tables["blocks"][COMPARED], expected["blocks"][COMPARED]
        )


def test_packed_documents_see_their_own_document_alone():
    explorer = masks(packed=True, row_length=128, num_anchors=30, block_size=2)
    blocks = explorer.tables["blocks"]
    kept = blocks[blocks["kept"] & (blocks["slot"] == 0)]
    assert (kept["context"] == kept["position_id"]).all()
    starts = kept["label_position"] - 1 - kept["position_id"]
    assert starts.nunique() == 2


def test_the_chosen_conversation_stands_first_in_its_packed_row():
    explorer = anchors(conversation=1, packed=True, row_length=128)
    documents = explorer.table["document"].tolist()
    assert documents == [0] * LENGTHS[1] + [1] * LENGTHS[2] + [-1] * (128 - LENGTHS[1] - LENGTHS[2])


def test_tile_size_cuts_the_same_mask_into_other_tiles():
    explorer = masks(tile_size=16)
    mask, tiles = explorer.table, explorer.tables["tiles"]
    explorer.controls["tile_size"].value = 32
    pd.testing.assert_frame_equal(explorer.table, mask)
    assert tiles["tiles"].sum() == 2 and explorer.tables["tiles"]["tiles"].sum() == 1


def test_shuffling_the_anchors_hides_and_shows_as_many_pairs_in_more_tiles():
    explorer = masks(conversation=2, num_anchors=60, block_size=1, tile_size=16)
    mask, tiles, blocks = explorer.tables.values()
    explorer.controls["shuffled"].value = True
    pd.testing.assert_frame_equal(explorer.table, mask)
    worked = [t.set_index("state")["tiles"]["empty"] for t in (tiles, explorer.tables["tiles"])]
    assert worked[1] < worked[0]
    positions = explorer.tables["blocks"]["position_id"].tolist()
    assert positions != blocks["position_id"].tolist()
    assert sorted(positions) == sorted(blocks["position_id"])


def test_context_keeps_so_many_tokens_and_answers_among_them():
    explorer = masks(conversation=2, context=12)
    blocks = explorer.tables["blocks"]
    assert explorer.table["pairs"].sum() == 6 * (12 + 6)
    assert blocks["supervised"].any()
    # A third of them stands before the answer.
    assert blocks[blocks["kept"]]["context"].min() >= 4


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


def test_a_mask_that_cannot_be_drawn_shows_no_old_picture():
    explorer = masks(conversation=2, packed=True, row_length=128)
    assert "image/png" in explorer._repr_mimebundle_()
    explorer.controls["row_length"].value = 64
    assert "96 tokens" in alert(explorer)
    bundle = explorer._repr_mimebundle_()
    assert "image/png" not in bundle and 'role="alert"' in bundle["text/html"]
    explorer.controls["row_length"].value = 128
    assert "data:image/png;base64," in picture(explorer).value


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


@pytest.mark.parametrize("make", [anchors, masks])
@pytest.mark.parametrize("conversation", [3, 99])
def test_a_conversation_that_is_not_there_is_refused_in_words(make, conversation):
    try:
        explorer = make(conversation=conversation)
    except ValueError as refusal:
        assert "conversation" in str(refusal) and str(conversation) in str(refusal)
    else:
        assert "conversation" in alert(explorer).lower()


def test_a_tile_size_that_is_not_offered_is_refused_in_words():
    with pytest.raises(ValueError, match="tile_size.*100"):
        masks(tile_size=100)


def test_a_tokenizer_with_an_end_but_no_padding_will_do():
    assert TOKENIZER.pad_token_id is None
    explorer = anchors(packed=True, row_length=64)
    padding = explorer.table[explorer.table["state"] == "padding"]
    assert len(padding) == 64 - LENGTHS[0] - LENGTHS[1]
    assert set(padding["text"]) == {"<|end|>"}


def write_chats(path: Path, chats: list[Chat]) -> Path:
    lines = [json.dumps({"messages": list(chat.messages), "id": chat.id}) for chat in chats]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("explore", [explore_anchors, explore_masks])
@pytest.mark.parametrize("as_given", [str, Path])
def test_a_users_own_file_and_tokenizer_folder_are_one_call(tmp_path, explore, as_given):
    file = write_chats(tmp_path / "mine.jsonl", CHATS)
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    small = {"num_anchors": 2, "block_size": 3, "conversation": 1}
    explorer = explore(as_given(file), as_given(tmp_path / "tokenizer"), **small)
    expected = tables_by_hand([1], LENGTHS[1], 2, 3, 0)["blocks"]
    pd.testing.assert_frame_equal(explorer.tables["blocks"][COMPARED], expected[COMPARED])
    assert explorer.controls["conversation"].max == 2


@pytest.mark.parametrize("explore", [explore_anchors, explore_masks])
def test_a_bad_file_is_refused_at_once_by_file_and_line(tmp_path, explore):
    file = write_chats(tmp_path / "mine.jsonl", CHATS[:1])
    file.write_text(file.read_text() + '{"messages": 3}\n')
    with pytest.raises(ValueError, match=re.escape(f"{file}:2: messages must be a list")):
        explore(file, TOKENIZER)
    with pytest.raises(FileNotFoundError):
        explore(tmp_path / "nowhere.jsonl", TOKENIZER)
    with pytest.raises(ValueError, match="at least one conversation"):
        explore([], TOKENIZER)


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


def test_all_anchors_of_a_slider_that_started_far_out_are_drawn():
    blocks = anchors(num_anchors=4096).tables["blocks"]
    assert blocks["block"].nunique() == 4096
    assert blocks[blocks["kept"]]["block"].nunique() == 20


def test_context_reaches_the_value_that_it_starts_with():
    explorer = masks(context=3000)
    assert explorer.settings["context"] == 3000


@pytest.mark.parametrize("make", [anchors, masks])
def test_an_explorer_is_named_by_its_call_and_its_settings(make):
    text = repr(make(num_anchors=2, block_size=3, seed=4))
    assert text == repr(make(num_anchors=2, block_size=3, seed=4))
    assert re.match(r"explore_(anchors|masks)\(conversation=0, packed=False, ", text)
    assert "num_anchors=2, block_size=3, seed=4" in text
    assert "0x" not in text


def test_the_repr_follows_the_settings():
    explorer = anchors()
    explorer.controls["seed"].value = 8
    assert repr(explorer).endswith("seed=8)")


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


def test_readers_that_run_no_widgets_get_the_picture_of_the_masks(one_mask):
    bundle = one_mask._repr_mimebundle_(include=None, exclude=None)
    assert bundle[WIDGET]["model_id"] == one_mask.model_id
    assert bundle["text/plain"] == repr(one_mask)
    assert b64decode(bundle["image/png"]).startswith(b"\x89PNG\r\n\x1a\n")
    assert bundle["image/png"] in picture(one_mask).value


def test_a_picture_has_words_for_those_who_do_not_see_it(one_mask):
    assert re.search(r'<img alt="[^"]*mask[^"]*"', picture(one_mask).value)


def test_the_same_settings_give_the_same_picture(one_mask):
    assert picture(masks(tile_size=16)).value == picture(one_mask).value


@pytest.mark.parametrize("make", [anchors, masks])
def test_every_control_has_a_name_that_is_its_arguments(make):
    explorer = make()
    for name, control in explorer.controls.items():
        shown = name
        assert control.description == shown


def test_a_fast_drag_of_the_real_explorer_is_one_redraw():
    explorer = anchors()

    async def drag() -> None:
        slider = explorer.controls["num_anchors"]
        for value in range(30, 80):
            slider.value = value
        await asyncio.sleep(0.2)

    asyncio.run(drag())
    assert explorer.frames_drawn == 2
    assert explorer.tables["blocks"]["block"].nunique() == 79


def step_row(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 3.0 / step, "accept_rate": 0.1 * step, "tau": 1 + 0.1 * step}


def test_live_curve_keeps_every_step_and_redraws_at_most_twice_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, drawn = [0.0], []
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])
    curve = training.LiveCurve()
    redraw = curve.redraw
    monkeypatch.setattr(curve, "redraw", lambda: (drawn.append(now[0]), redraw()))
    for step in range(1, 11):
        curve(step_row(step))
        now[0] += 0.2
    curve({"step": 10, "held_out_tau": 2.0})
    assert curve.table["step"].tolist() == list(range(1, 11))
    assert len(drawn) == 4 and all(b - a > 0.5 for a, b in zip(drawn, drawn[1:], strict=False))


def test_live_curve_has_a_picture_once_there_are_steps() -> None:
    curve = training.LiveCurve()
    assert "image/png" not in curve._repr_mimebundle_()
    curve(step_row(2))
    bundle = curve._repr_mimebundle_()
    assert b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "step 2: loss 1.500, accept rate 0.200, tau 1.20" in curve._line.value
