"""`explore_training_budget`: every control moves every table that depends on it, and no other.

Conversations are tiny: random tokens, encoded already, or words of a hand-made tokenizer.
"""

import json
import math
import re
from html import unescape

import pandas as pd
import pytest
from samples import documents, random_chats
from test_widgets import CHATS, LENGTHS, TOKENIZER, picture

from dspark_lab.chats import encode, load_chats
from dspark_lab.explore import (
    MEASURED,
    Explorer,
    budget,
    explore_training_budget,
    plot_budget,
)
from dspark_lab.tuning import (
    CARDS,
    PER,
    TRAINERS,
    Shape,
    Spans,
    StepTime,
    TrainingSettings,
    choose_training,
    export,
    fit_table,
    memory_table,
    never_table,
    slot_table,
    supervision_table,
    training_cost,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ENCODED = random_chats(30)
LONGEST = max(map(len, ENCODED))
SHAPE = Shape.of("pocket")
TIME = StepTime(0.01, 1e-11, 0.1, 0.2, 4)
SEQ_LENS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
NAMES = [
    "options",
    "recommended",
    "settings",
    "coverage",
    "slots",
    "never",
    "cost",
    "memory",
    "fit",
]


def explorer(**start) -> Explorer:
    given = {"num_anchors": 8, "block_size": 3, "seq_len": 256}
    return explore_training_budget(ENCODED, SHAPE, **(given | start))


def words(shown: Explorer) -> list[str]:
    """The recommendation, the sentence on the chosen setting, and the text to take away."""
    found = re.fullmatch(
        r"<img [^>]*><p>(.*?)</p><p>(.*?)</p><pre>(.*?)</pre>", picture(shown).value, re.DOTALL
    )
    assert found, picture(shown).value[-500:]
    return [unescape(text) for text in found.groups()]


def by_hand(**settings) -> dict[str, pd.DataFrame]:
    """What the tables say for these settings of the controls."""
    num_anchors, block_size = settings["num_anchors"], settings["block_size"]
    seq_len, per, batch_size = settings["seq_len"], settings["per"], settings["batch_size"]
    card = settings["card"]
    spans = Spans.of(ENCODED, seq_len=seq_len, row_length=seq_len if settings["packed"] else None)
    candidates = spans.candidates(per).max()
    tried = sorted({num_anchors, *(2**i for i in range(2, 16) if 2**i <= candidates)})
    blocks = num_anchors
    if per == "document":
        blocks = round(num_anchors * spans.documents / spans.rows)
    sizes = {"num_anchors": blocks, "block_size": block_size, "batch_size": batch_size}
    longest, mean = int(spans.row_tokens.max()), round(spans.row_tokens.mean())
    choice = choose_training(
        spans,
        SHAPE,
        time=card,
        memory=card,
        num_anchors=tried,
        block_sizes=(block_size,),
        per=per,
        batch_size=batch_size,
    )
    return {
        "options": choice.table,
        "coverage": supervision_table(spans, tried, (block_size,), per=per),
        "slots": slot_table(spans, num_anchors, block_size, per=per),
        "never": never_table(spans),
        "cost": training_cost(SHAPE, seq_len=mean, **sizes),
        "memory": memory_table(SHAPE, seq_len=longest, **sizes),
        "fit": fit_table(SHAPE, card, SEQ_LENS, (block_size,), batch_size=batch_size),
    }


MOVES = [
    ("num_anchors", 64),
    ("block_size", 5),
    ("packed", False),
    ("per", "document"),
    ("packed", True),
    ("batch_size", 3),
    ("seq_len", 512),
    ("card", "T4"),
    ("per", "row"),
]


def test_all_tables_follow_every_control():
    shown = explorer()
    for name, value in [("num_anchors", 16), *MOVES]:
        shown.controls[name].value = value
        tables = shown.tables
        assert list(tables) == NAMES
        for table, expected in by_hand(**shown.settings).items():
            pd.testing.assert_frame_equal(tables[table], expected)
        assert shown.table is tables["options"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_anchors", 64),
        ("block_size", 5),
        ("seq_len", 512),
        ("packed", False),
        ("per", "document"),
        ("batch_size", 3),
        ("card", "T4"),
        ("export", "json"),
    ],
)
def test_every_control_alone_changes_what_is_shown(name, value):
    shown = explorer()
    before = picture(shown).value
    shown.controls[name].value = value
    assert picture(shown).value != before and shown.frames_drawn == 2


def test_the_export_is_that_of_the_controls_and_not_of_the_recommendation():
    shown = explorer(num_anchors=4, batch_size=2)
    chosen = TrainingSettings(4, 3, 256, 2)
    for kind in ("json", *TRAINERS):
        shown.controls["export"].value = kind
        assert words(shown)[2] == export(chosen, kind)
    assert shown.tables["settings"].to_dict("records") == [vars(chosen)]
    assert shown.tables["recommended"]["num_anchors"].item() != 4
    shown.controls["export"].value = "json"
    assert json.loads(words(shown)[2]) == vars(chosen)


def test_quotes_of_an_export_are_text_and_no_markup():
    shown = explorer(export="deepspec")
    assert "&quot;model.num_anchors=8&quot;" in picture(shown).value
    assert '--opts "model.num_anchors=8"' in words(shown)[2]


def test_the_recommendation_is_tunes_own_sentence_and_its_best_line():
    shown = explorer()
    spans = Spans.of(ENCODED, seq_len=256, row_length=256)
    tried = [4, 8, 16, 32, 64, 128]
    choice = choose_training(
        spans, SHAPE, time="H100", memory="H100", num_anchors=tried, block_sizes=(3,)
    )
    assert shown.table["num_anchors"].tolist() == tried
    recommended = shown.tables["recommended"]
    assert words(shown)[0] == choice.reason == recommended["reason"].item()
    assert recommended["num_anchors"].item() == choice.best["num_anchors"]
    assert recommended["gain_per_second"].item() == shown.table["gain_per_second"].max()


def test_the_chosen_setting_is_told_in_a_sentence():
    shown = explorer(num_anchors=32, packed=False, seq_len=512, card="L4")
    line = shown.table.set_index("num_anchors").loc[32]
    assert words(shown)[1] == (
        f"Chosen: N 32, K 3, S 512 covers {line['share']:.0%} of the supervised tokens in a pass; "
        f"a step on L4 takes {line['seconds']:.3g} s and {line['memory_bytes'] / 1e9:.1f} GB of "
        f"23.7 GB that it may take, as the longest row has {LONGEST} tokens."
    )
    shown.controls["packed"].value = True
    assert "longest" not in words(shown)[1]
    shown.controls["per"].value = "document"
    assert words(shown)[1].startswith("Chosen: N 32 for each document, K 3, S 512 covers")


def test_the_longest_row_is_what_is_held_and_marked_where_rows_are_shorter_than_allowed():
    shown = explorer(packed=False, seq_len=512)
    assert set(shown.table["seq_len"]) == {LONGEST}
    held = memory_table(SHAPE, seq_len=LONGEST, num_anchors=8, block_size=3)["held"]
    assert shown.tables["memory"]["held"].tolist() == held.tolist()
    assert shown.tables["settings"]["seq_len"].item() == 512


def test_the_fit_is_marked_at_the_longest_row_and_at_its_blocks(monkeypatch):
    drawn = []

    def noted(*tables, **chosen):
        drawn.append(chosen)
        return plot_budget(*tables, **chosen)

    monkeypatch.setattr(budget, "plot_budget", noted)
    shown = explorer(packed=False, seq_len=512, per="document")
    assert drawn[-1] == {"num_anchors": 8, "at": (LONGEST, 8)}
    shown.controls["packed"].value = True
    spans = Spans.of(ENCODED, seq_len=512, row_length=512)
    assert drawn[-1] == {"num_anchors": 8, "at": (512, round(8 * 30 / spans.rows))}


def test_anchors_for_each_document_are_more_blocks_in_a_packed_row():
    shown = explorer()
    by_row = shown.tables
    shown.controls["per"].value = "document"
    by_document = shown.tables
    assert by_document["cost"]["operations"].sum() > 2 * by_row["cost"]["operations"].sum()
    eight = [t["options"].set_index("num_anchors")["share"][8] for t in (by_row, by_document)]
    assert eight[1] > 2 * eight[0]
    # What fits does not depend on what is chosen.
    pd.testing.assert_frame_equal(by_row["fit"], by_document["fit"])


def test_what_does_not_fit_is_drawn_with_a_sentence_that_says_so():
    shown = explore_training_budget(
        ENCODED, "qwen3-4b", num_anchors=4, block_size=3, seq_len=256, card="T4"
    )
    said, chosen, taken = words(shown)
    assert said.startswith("Nothing fits: the smallest of these steps takes")
    assert chosen.endswith("GB of 15.8 GB that it may take: it does not fit.")
    assert taken.startswith("--num-anchors 4 ") and "role=" not in picture(shown).value
    assert list(shown.tables) == NAMES and not shown.table["fits"].any()
    assert (shown.tables["fit"]["num_anchors"] == 0).any()
    recommended = shown.tables["recommended"]
    assert recommended["reason"].tolist() == [said] and "num_anchors" not in recommended


def test_a_measured_time_is_an_entry_of_its_own_that_comes_first():
    shown = explorer(time=TIME, memory=2e9)
    assert shown.controls["card"].options == (MEASURED, *CARDS)
    assert shown.controls["card"].value == MEASURED == "measured here"
    operations = shown.table["operations"]
    assert shown.table["seconds"].tolist() == pytest.approx((0.01 + 1e-11 * operations).tolist())
    assert "a step on the device that was measured takes" in words(shown)[1]
    assert "of 1.8 GB that it may take" in words(shown)[1]
    assert "% sure" in words(shown)[0]
    shown.controls["card"].value = "H100"
    assert "speed assumed, not measured" in words(shown)[0]
    assert shown.table["seconds"].max() < 0.01
    assert explorer(time=TIME, card="L4").controls["card"].value == "L4"
    assert explorer().controls["card"].options == tuple(CARDS)
    assert explorer().controls["card"].value == "H100"


def test_without_a_memory_all_fits_on_the_measured_device():
    shown = explorer(time=TIME)
    assert shown.table["fits"].all() and not shown.tables["fit"]["full"].any()
    assert "that it may take" not in words(shown)[1] and words(shown)[1].endswith(" GB.")


def test_controls_start_where_they_are_told_even_between_their_steps():
    shown = explorer(num_anchors=100, seq_len=300, batch_size=70, block_size=20)
    assert shown.settings == {
        "num_anchors": 100,
        "block_size": 20,
        "seq_len": 300,
        "packed": True,
        "per": "row",
        "batch_size": 70,
        "card": "H100",
        "export": "dspark-lab",
    }
    assert repr(shown).startswith("explore_training_budget(num_anchors=100, block_size=20, ")
    assert 100 in shown.table["num_anchors"].tolist()
    anchors = shown.controls["num_anchors"].options
    assert list(anchors) == sorted(anchors) and set(anchors) == {100, *(2**i for i in range(2, 16))}
    assert set(shown.controls["seq_len"].options) == {300, *SEQ_LENS}
    assert shown.controls["per"].options == PER


def test_more_anchors_than_a_row_has_candidates_are_shown_beside_those_that_it_has():
    shown = explorer(num_anchors=4096)
    tried = shown.table["num_anchors"].tolist()
    assert tried[-2:] == [128, 4096]
    assert shown.table["share"].iloc[-1] == pytest.approx(shown.table["share"].max())


def test_gamma_dtype_and_options_reach_the_tables():
    shown = explorer(gamma=2.0, dtype="fp32", features="cached")
    weights = shown.tables["slots"]["weight"]
    assert weights.tolist() == pytest.approx([math.exp(-k / 2) for k in range(3)])
    worth = shown.table["gain"] / shown.table["covered"]
    assert worth.tolist() == pytest.approx([weights.sum()] * len(worth))
    assert shown.tables["settings"]["loss_decay_gamma"].item() == 2.0
    assert "target forward" not in shown.tables["cost"]["part"].tolist()
    held = {"seq_len": 256, "num_anchors": 8, "block_size": 3, "features": "cached"}
    expected = memory_table(SHAPE, dtype="fp32", **held)
    pd.testing.assert_frame_equal(shown.tables["memory"], expected)
    most = fit_table(SHAPE, "H100", SEQ_LENS, (3,), dtype="fp32", features="cached")
    pd.testing.assert_frame_equal(shown.tables["fit"], most)


def test_conversations_are_encoded_with_the_given_tokenizer(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [{"id": chat.id, "messages": list(chat.messages)} for chat in CHATS]
    path.write_text("\n".join(map(json.dumps, lines)))
    same = [encode(chat, TOKENIZER) for chat in load_chats(path)]
    for given in (CHATS, str(path), same):
        shown = explore_training_budget(
            given, SHAPE, TOKENIZER, num_anchors=4, block_size=3, seq_len=256, packed=False
        )
        assert set(shown.table["seq_len"]) == {max(LENGTHS)}
        # Five tokens before each answer, and its first.
        assert shown.tables["never"]["tokens"].tolist() == [15, 3, 0, 0, 0]


def test_a_model_is_a_shape_or_what_one_is_made_of(tmp_path):
    config = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    tables = [
        explore_training_budget(ENCODED, model, num_anchors=4, block_size=3, seq_len=256).table
        for model in (config, path, str(tmp_path), Shape.of(config))
    ]
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])


def test_rows_too_short_for_an_answer_are_said_in_words_and_can_be_left():
    late = documents("." * 280 + "a" * 10)
    shown = explore_training_budget(late, SHAPE, num_anchors=4, block_size=3, seq_len=256)
    assert shown.tables == {}
    assert "among its first 256" in picture(shown).value and "longer row" in picture(shown).value
    shown.controls["seq_len"].value = 512
    assert list(shown.tables) == NAMES


def test_too_many_blocks_to_look_at_are_said_in_words_and_can_be_left():
    many = random_chats(60)
    shown = explore_training_budget(
        many, SHAPE, num_anchors=32768, block_size=3, seq_len=8192, per="document"
    )
    assert "32,768 anchors for each document are 1,966,080 blocks a row" in picture(shown).value
    assert shown.tables == {}
    shown.controls["num_anchors"].value = 4
    assert list(shown.tables) == NAMES


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"num_anchors": 0}, "num_anchors must be >= 1, got 0"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"seq_len": 0}, "seq_len must be >= 1, got 0"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"gamma": 0}, "loss_decay_gamma must be a finite number > 0, got 0"),
        ({"dtype": "fp8"}, "dtype must be one of .*, got 'fp8'"),
        ({"features": "stale"}, "features must be one of .*, got 'stale'"),
        ({"per": "chat"}, r"per must be one of \('row', 'document'\), got 'chat'"),
        ({"card": "H1000"}, r"card must be one of \('T4', .*\), got 'H1000'"),
        ({"card": MEASURED}, r"card must be one of \('T4', .*\), got 'measured here'"),
        ({"export": "yaml"}, r"export must be one of \('json', .*\), got 'yaml'"),
        ({"memory": 1e9}, "memory must come with a time, got 1000000000.0 without"),
        ({"memory": -1.0, "time": TIME}, "memory must be > 0"),
    ],
)
def test_a_start_value_that_cannot_be_is_refused_at_once(start, message):
    with pytest.raises(ValueError, match=message):
        explorer(**start)


def test_what_is_of_another_kind_is_refused_at_once():
    with pytest.raises(TypeError, match="time must be a StepTime, got str"):
        explorer(time="H100")
    with pytest.raises(TypeError, match="num_anchors must be an int, got 1.5"):
        explorer(num_anchors=1.5)
    with pytest.raises(ValueError, match="chats must hold at least one conversation, got none"):
        explore_training_budget([], SHAPE)
    with pytest.raises(ValueError, match="a shape must be one of .*, got 'qwen9'"):
        explore_training_budget(ENCODED, "qwen9")


def test_readers_without_widgets_get_the_picture():
    bundle = explorer()._repr_mimebundle_()
    assert bundle["text/plain"].startswith("explore_training_budget(")
    assert len(bundle["image/png"]) > 1000


def test_the_shipped_conversations_and_a_published_target_are_shown_where_nothing_is_given():
    shown = explore_training_budget()
    assert shown.settings["num_anchors"] == 512 and shown.settings["seq_len"] == 4096
    never = shown.tables["never"].set_index("reason")["tokens"]
    assert never["prompt"] > 10_000
    assert shown.tables["cost"]["operations"].sum() > 1e13
