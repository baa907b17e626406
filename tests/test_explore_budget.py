"""Choosing for training: pictures of tables made by hand, and every control of the explorer."""

import json
import math
import re
from dataclasses import replace
from html import unescape
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dspark_lab import explore, tuning
from dspark_lab.blocks import PER
from dspark_lab.chats import encode, load_chats
from dspark_lab.explore import MEASURED, Explorer, explore_training_budget, plot_budget, plot_fit
from dspark_lab.explore import budget as budget_module
from dspark_lab.explore.style import GREEN, ORANGE
from dspark_lab.tuning import CARDS, TRAINERS, Shape, Spans, StepTime, TrainingSettings
from tests import gallery
from tests.explorers import CHATS, LENGTHS, TOKENIZER, alert, picture, require_same_view
from tests.gallery import COST, FIT, MEMORY, NONE_LEFT, fit, options, picture_of
from tests.pictures import labelled, legend, points, tick_names, title
from tests.samples import documents, random_chats
from tests.test_progress import noise_of

pytestmark = pytest.mark.usefixtures("one_thread", "unplaced")


def stars(ax: Axes) -> list[list[float]]:
    """Where the chosen setting is marked."""
    return [point for line in ax.lines if line.get_marker() == "*" for point in points(line)]


def hollow(ax: Axes) -> list[list[float]]:
    """The points with hollow marks; the frame around the best is none."""
    lines = [line for line in ax.lines if line.get_fillstyle() == "none"]
    return [point for line in lines if line.get_markersize() < 10 for point in points(line)]


def test_the_fit_is_a_line_for_each_block_size_on_axes_that_double_hollow_where_the_row_limits():
    (ax,) = picture_of("fit").axes
    lines = labelled(ax)
    assert list(lines) == legend(ax) == ["block 7", "block 15"]
    for block_size, part in FIT.groupby("block_size"):
        line = lines[f"block {block_size}"]
        assert points(line) == part[["seq_len", "num_anchors"]].to_numpy().tolist()
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 2
    assert hollow(ax) == [[256, 255], [512, 511], [256, 255]]
    filled = [line.get_markevery() for line in lines.values()]
    assert [marks.tolist() for marks in filled] == [[False] * 2 + [True] * 2, [False] + [True] * 3]
    assert "hollow: row is the limit" in title(ax)
    assert "hollow" not in title(plot_fit(fit(100, 100)).axes[0])
    # Plain numbers, as far from each other as from the next.
    assert tick_names(ax.xaxis) == ["256", "512", "1,024", "2,048"]
    assert tick_names(ax.yaxis) == ["64", "128", "256", "512", "1,024"]
    for places in ([(256, tick) for tick in ax.get_yticks()], [(x, 64) for x in ax.get_xticks()]):
        steps = np.diff(ax.transData.transform(places), axis=0)
        assert np.ptp(steps, axis=0).max() < 1e-6
    (ax,) = plot_fit(fit(*[100] * 13)).axes
    assert tick_names(ax.xaxis) == ["256", "2,048", "16,384", "131,072", "1,048,576"], "only some"


def test_where_nothing_fits_the_line_goes_down_to_a_tick_that_says_so():
    (ax,) = picture_of("nothing fits").axes
    assert points(ax.lines[0])[-1] == [2048, 0]
    assert tick_names(ax.yaxis)[0] == "none: 0" and ax.get_yticks()[0] == 0
    assert ax.get_ylim()[0] == 0
    zero, one, two = ax.transData.transform([(256, y) for y in (0, 1, 2)])[:, 1]
    assert zero < one - 5 < two - 10
    assert "none" not in "".join(tick_names(picture_of("fit").axes[0].yaxis))
    (ax,) = plot_fit(fit(0, 0)).axes
    assert points(ax.lines[0]) == [[256, 0], [512, 0]]


def test_the_chosen_setting_has_a_star_and_its_word_even_beyond_the_table():
    (ax,) = picture_of("fit").axes
    assert stars(ax) == [[512, 64]] and "★ chosen" in title(ax)
    (ax,) = plot_fit(FIT, at=(8192, 40_000)).axes
    low, high = ax.get_ylim()
    assert low < 40_000 < high and ax.get_xlim()[1] > 8192
    assert tick_names(ax.xaxis) == ["256", "512", "1,024", "2,048", "4,096", "8,192"]
    (ax,) = plot_fit(FIT).axes
    assert stars(ax) == [] and "chosen" not in title(ax)


def test_the_bars_are_the_parts_in_the_tables_order_with_their_share():
    (ax,) = picture_of("parts").axes
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([0.6, 0.3999, 0.0001])
    names = ["target forward  60.0%", "MLP  40.0%", "optimiser  < 0.1%"]
    assert tick_names(ax.yaxis) == names
    heights = [bar.get_y() + bar.get_height() / 2 for bar in ax.patches]
    assert heights == pytest.approx(ax.get_yticks())
    # The first is on top.
    assert ax.get_ylim()[0] > ax.get_ylim()[1]
    assert title(ax) == "a step: 10.0 T operations"
    assert title(explore.plot_parts(COST, seconds=0.14832).axes[0]).endswith("operations, 148.3 ms")


def test_memory_has_a_panel_of_its_own_that_names_the_moment_and_what_is_allowed():
    _, ax = picture_of("parts and memory").axes
    assert [bar.get_width() for bar in ax.patches] == [3.0, 0.0]
    assert tick_names(ax.yaxis) == ["weights  3.00 GB", "gradients  0"]
    assert title(ax) == (
        "3.0 GB at the fullest moment: heads backward\n75% of the 4.0 GB that it may take"
    )
    for limit in (None, float("inf")):
        assert "may take" not in title(explore.plot_parts(COST, MEMORY, limit=limit).axes[1])
    with pytest.raises(ValueError, match="limit must come with a memory table, got 1.0 without"):
        explore.plot_parts(COST, limit=1.0)
    with pytest.raises(ValueError, match="memory must be None where ax is given, got both"):
        explore.plot_parts(COST, MEMORY, ax=ax)


def test_the_panels_of_a_budget_are_the_share_the_gain_of_the_best_that_fits_parts_and_fit():
    share, gain, parts, fits = axes = picture_of("budget").axes
    assert points(share.lines[0]) == options()[["num_anchors", "share"]].to_numpy().tolist()
    assert title(share) == "★ chosen: N 16 covers 50%"
    assert points(gain.lines[0]) == [[4, 0.2], [8, 0.6], [16, 0.8], [32, 1], [64, 0.7]]
    (frame,) = [line for line in gain.lines if line.get_marker() == "s"]
    assert points(frame) == [[32, 1]] and frame.get_color() == GREEN and hollow(gain) == []
    assert title(gain) == "★ chosen   □ best that fits: N 32"
    assert tick_names(parts.yaxis) == tick_names(picture_of("parts").axes[0].yaxis)
    # The chosen option's own seconds.
    assert title(parts) == "a step: 10.0 T operations, 300.0 ms"
    assert points(fits.lines[0]) == NONE_LEFT[["seq_len", "num_anchors"]].to_numpy().tolist()
    assert title(fits) == "block 7   ★ chosen   hollow: row is the limit"
    # The chosen setting is marked in three panels and looks alike in all.
    assert [stars(ax) for ax in axes] == [[[16, 0.5]], [[16, 0.8]], [], [[300, 16]]]
    chosen = [line for ax in axes for line in ax.lines if line.get_marker() == "*"]
    assert {line.get_color() for line in chosen} == {ORANGE}
    assert len({line.get_markersize() for line in chosen}) == 1
    shuffled = options().iloc[[3, 0, 4, 2, 1]]
    figure = plot_budget(shuffled, COST, NONE_LEFT, num_anchors=16, at=(300, 16))
    for ax, like in zip(figure.axes[:2], axes, strict=False):
        assert points(ax.lines[0]) == points(like.lines[0])
    with pytest.raises(ValueError, match=r"num_anchors must be one of \(4, 8, .*, got 12"):
        gallery.budget(num_anchors=12)


def test_options_that_do_not_fit_are_hollow_and_never_the_best_and_the_ticks_stay_few():
    ax = picture_of("budget, little fits").axes[1]
    assert hollow(ax) == [[16, pytest.approx(4 / 3)], [32, pytest.approx(5 / 3)], [64, 35 / 30]]
    assert stars(ax) == [[64, 35 / 30]]
    assert title(ax) == "★ chosen   □ best that fits: N 8   ○ too large"
    low, high = ax.get_ylim()
    assert low == 0 and high > 5 / 3
    # Where nothing fits there is no best.
    ax = gallery.budget(0).axes[1]
    assert not [line for line in ax.lines if line.get_marker() == "s"]
    assert len(hollow(ax)) == 5 and title(ax) == "★ chosen   ○ too large"
    assert max(y for _, y in points(ax.lines[0])) == 1
    # Much more would be gained by what is too large.
    table = options(1).assign(gain_per_second=[1.0, 20.0, 60.0, 90.0, 70.0])
    ax = plot_budget(table, COST, NONE_LEFT, num_anchors=4, at=(300, 4)).axes[1]
    assert points(ax.lines[0])[3] == [32, 90] and len(ax.get_yticks()) <= 6


ENCODED = random_chats(30)
LONGEST = max(map(len, ENCODED))
SHAPE = Shape.of("pocket")
TIME = StepTime(0.01, 1e-11, 0.1, 0.2, 4)
SEQ_LENS = tuple(2**i for i in range(8, 16))
NAMES = "options recommended settings coverage slots never cost memory fit".split()


# Drawing takes ten times as long as all the tables; what is drawn is what the call is given.
undrawn = pytest.mark.usefixtures("drawn")


@pytest.fixture
def drawn(monkeypatch):
    """In place of the picture: the call that would draw it."""
    call = Mock(side_effect=lambda *tables, **marks: Figure((1, 1)))
    monkeypatch.setattr(budget_module, "plot_budget", call)
    return call


def explorer(chats=ENCODED, model=SHAPE, tokenizer=None, **start) -> Explorer:
    given = {"num_anchors": 8, "block_size": 3, "seq_len": 256} | start
    return explore_training_budget(chats, model, tokenizer, **given)


def sentences(shown: Explorer) -> list[str]:
    """The recommendation, the sentence on the chosen setting, and the text to take away."""
    found = re.fullmatch(r"<img [^>]*><p>(.*?)</p><p>(.*?)</p>.*", picture(shown).value, re.DOTALL)
    assert found, picture(shown).value[-500:]
    return [unescape(text) for text in (*found.groups(), exported(shown)[-1])]


def exported(shown: Explorer) -> list[str]:
    """The texts to take away: of the recommendation, and of the controls where they differ."""
    return [
        unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", shown._frame.html, re.DOTALL)
    ]


def by_hand(**settings) -> dict[str, pd.DataFrame]:
    """What the tables say for these settings of the controls."""
    num_anchors, block_size = settings["num_anchors"], settings["block_size"]
    seq_len, card = settings["seq_len"], settings["card"]
    per, rows = {"per": settings["per"]}, {"batch_size": settings["batch_size"]}
    spans = Spans.of(ENCODED, seq_len=seq_len, row_length=seq_len if settings["packed"] else None)
    spans = tuning.in_training_batches(spans, settings["batch_size"])
    candidates = spans.candidates(**per).max()
    tried = sorted({num_anchors, *(2**i for i in range(2, 16) if 2**i <= candidates)})
    blocks, most = tuning.row_blocks(spans, num_anchors, **per)
    sizes = {"block_size": block_size, **rows}
    longest, mean = int(spans.row_tokens.max()), round(spans.row_tokens.mean())
    choices = {"num_anchors": tried, "block_sizes": (block_size,), **per, **rows}
    choice = tuning.choose_training(spans, SHAPE, time=card, memory=card, **choices)
    best = choice.best.to_dict() | {"sure": choice.sure, "reason": choice.reason}
    return {
        "options": choice.table,
        "recommended": pd.DataFrame([best]),
        "coverage": tuning.supervision_table(spans, tried, (block_size,), **per),
        "slots": tuning.slot_supervision(spans, num_anchors, block_size, **per),
        "never": tuning.never_table(spans),
        "cost": tuning.training_cost(SHAPE, seq_len=mean, num_anchors=blocks, **sizes),
        "memory": tuning.memory_table(SHAPE, seq_len=longest, num_anchors=most, **sizes),
        "fit": tuning.fit_table(SHAPE, card, SEQ_LENS, (block_size,), **rows),
    }


MOVES = [("num_anchors", 16), ("block_size", 5), ("packed", False), ("per", "document")]
MOVES += [("packed", True), ("batch_size", 3), ("card", "T4"), ("per", "row"), ("per", "batch")]
MOVES += [("packed", False), ("seq_len", 512)]


def test_the_picture_all_tables_and_the_recommendation_follow_every_control(drawn):
    shown = explorer()
    assert shown.table["num_anchors"].tolist() == [4, 8, 16, 32, 64, 128]
    best = shown.tables["recommended"]["gain_per_second"].item()
    assert best == shown.table["gain_per_second"].max()
    for number, (name, value) in enumerate(MOVES):
        shown.controls[name].value = value
        tables = shown.tables
        assert shown.frames_drawn == number + 2 == drawn.call_count
        names = ("options", "cost", "fit")
        assert all(a is tables[b] for a, b in zip(drawn.call_args.args, names, strict=True))
        assert drawn.call_args.kwargs["num_anchors"] == shown.settings["num_anchors"]
        assert list(tables) == NAMES and shown.table is tables["options"]
        for table, expected in by_hand(**shown.settings).items():
            pd.testing.assert_frame_equal(tables[table], expected)
        assert sentences(shown)[0] == tables["recommended"]["reason"].item()


@undrawn
def test_what_is_recommended_is_exported_beside_the_setting_of_the_controls_and_can_be_used():
    shown = explorer(num_anchors=4, batch_size=2)
    chosen = TrainingSettings(4, 3, 256, 2, pack_length=256)
    for kind in ("json", "dspark-lab", "nemo-automodel"):
        shown.controls["export"].value = kind
        assert sentences(shown)[2] == tuning.export(chosen, kind)
        assert '"' not in picture(shown).value.split("<pre>")[1], "escaped"
    assert shown.tables["settings"].to_dict("records") == [vars(chosen)]
    best = int(shown.tables["recommended"]["num_anchors"].item())
    assert best != 4 and shown._frame.recommended == {"num_anchors": best}
    advised = replace(chosen, num_anchors=best)
    assert exported(shown) == [tuning.export(one, kind) for one in (advised, chosen)]
    assert f"For {kind}, recommended:" in shown._frame.html
    assert f"For {kind}, your setting now:" in shown._frame.html
    assert shown.controls["export"].options == ("json", *TRAINERS)
    shown.controls["export"].value = "deepspec"
    assert shown.tables
    assert "DeepSpec always has a row for each conversation" in picture(shown).value
    assert 'role="alert"' in picture(shown).value
    shown.controls["packed"].value = False
    chosen = TrainingSettings(4, 3, 256, 2)
    assert sentences(shown)[2] == tuning.export(chosen, "deepspec")


@undrawn
def test_every_table_and_the_export_know_the_layout_of_the_model():
    shown = explorer(model=replace(SHAPE, sample_from_anchor=False))
    tables = shown.tables
    assert tables["settings"]["layout"].tolist() == ["anchor_given"]
    assert tables["slots"]["slot"].tolist() == [0, 1]
    assert tables["coverage"]["share"].tolist() == tables["options"]["share"].tolist()
    assert "--no-sample-from-anchor" in sentences(shown)[2]


@undrawn
def test_the_chosen_setting_is_told_in_a_sentence():
    shown = explorer(num_anchors=32, packed=False, seq_len=512, card="L4")
    line = shown.table.set_index("num_anchors").loc[32]
    assert sentences(shown)[1] == (
        f"Your setting now: N 32, K 3, S 512 covers {line['share']:.0%} of the supervised tokens "
        f"in a pass; a step on L4 takes {line['seconds']:.3g} s and "
        f"{line['memory_bytes'] / 1e9:.1f} GB of 23.7 GB that it may take, "
        f"as the longest row has {LONGEST} tokens."
    )
    shown.controls["packed"].value = True
    assert "longest" not in sentences(shown)[1]
    shown.controls["per"].value = "document"
    assert sentences(shown)[1].startswith(
        "Your setting now: N 32 for each document, K 3, S 512 covers"
    )


def test_the_fit_is_marked_at_the_longest_row_and_at_its_blocks(drawn):
    shown = explorer(packed=False, seq_len=512, per="document")
    assert shown.tables
    assert drawn.call_args.kwargs == {"num_anchors": 8, "at": (LONGEST, 8)}
    shown.controls["packed"].value = True
    spans = Spans.of(ENCODED, seq_len=512, row_length=512)
    docs = np.bincount(spans.document_row)
    marked = 512, 8 * docs.max()
    assert shown.tables
    assert drawn.call_args.kwargs == {"num_anchors": 8, "at": marked}


@undrawn
def test_what_does_not_fit_is_drawn_with_a_sentence_that_says_so():
    shown = explorer(model="qwen3-4b", card="T4")
    said, chosen, taken = sentences(shown)
    assert said.startswith("Nothing fits: the smallest of these steps takes")
    assert chosen.endswith("GB of 15.8 GB that it may take: it does not fit.")
    assert "\n--num-anchors 8 " in taken and "role=" not in picture(shown).value
    assert list(shown.tables) == NAMES and not shown.table["fits"].any()
    assert (shown.tables["fit"]["num_anchors"] == 0).any()
    recommended = shown.tables["recommended"]
    assert recommended["reason"].tolist() == [said] and "num_anchors" not in recommended


@undrawn
def test_a_measured_time_is_an_entry_of_its_own_that_comes_first():
    shown = explorer(time=TIME, memory=2e9)
    assert shown.controls["card"].options == (MEASURED, *CARDS)
    assert shown.controls["card"].value == MEASURED == "measured here"
    operations = shown.table["operations"]
    assert shown.table["seconds"].tolist() == pytest.approx((0.01 + 1e-11 * operations).tolist())
    assert "a step on the device that was measured takes" in sentences(shown)[1]
    assert "of 1.8 GB that it may take" in sentences(shown)[1]
    assert "% sure" in sentences(shown)[0]
    shown.controls["card"].value = "H100"
    assert "speed assumed, not measured" in sentences(shown)[0]
    assert shown.table["seconds"].max() < 0.01
    assert explorer(time=TIME, card="L4").controls["card"].value == "L4"
    assert explorer().controls["card"].options == tuple(CARDS)
    assert explorer().controls["card"].value == "H100"
    # Without a memory, all fits on the measured device.
    shown = explorer(time=TIME)
    assert shown.table["fits"].all() and not shown.tables["fit"]["full"].any()
    assert "that it may take" not in sentences(shown)[1] and sentences(shown)[1].endswith(" GB.")


@undrawn
def test_controls_start_where_they_are_told_even_between_their_steps():
    many = documents(*(["." * 10 + "a" * 300] * 70))
    shown = explorer(many, num_anchors=100, seq_len=300, batch_size=70, block_size=20)
    assert shown.settings == {
        **{"num_anchors": 100, "block_size": 20, "seq_len": 300, "packed": True, "per": "row"},
        **{"batch_size": 70, "card": "H100", "export": "dspark-lab"},
    }
    assert repr(shown).startswith("explore_training_budget(num_anchors=100, block_size=20, ")
    bundle = shown._repr_mimebundle_()
    assert bundle["text/plain"] == repr(shown) and bundle["image/png"]
    assert 100 in shown.table["num_anchors"].tolist()
    anchors = shown.controls["num_anchors"].options
    assert list(anchors) == sorted(anchors) and set(anchors) == {100, *(2**i for i in range(2, 16))}
    assert set(shown.controls["seq_len"].options) == {300, *SEQ_LENS}
    assert shown.controls["per"].options == PER
    # More anchors than a row has candidates stand beside those that it has.
    table = explorer(num_anchors=4096).table
    assert table["num_anchors"].tolist()[-2:] == [128, 4096]
    assert table["share"].iloc[-1] == pytest.approx(table["share"].max())


@undrawn
def test_gamma_dtype_and_options_reach_the_tables():
    shown = explorer(gamma=2.0, dtype="fp32", features="cached")
    weights = shown.tables["slots"]["weight"]
    assert weights.tolist() == pytest.approx([math.exp(-k / 2) for k in range(3)])
    worth = shown.table["gain"] / shown.table["covered"]
    assert worth.tolist() == pytest.approx([weights.sum()] * len(worth))
    assert shown.tables["settings"]["loss_decay_gamma"].item() == 2.0
    assert "target forward" not in shown.tables["cost"]["part"].tolist()
    held = {"seq_len": 256, "num_anchors": 8, "block_size": 3, "features": "cached"}
    expected = tuning.memory_table(SHAPE, dtype="fp32", **held)
    pd.testing.assert_frame_equal(shown.tables["memory"], expected)
    most = tuning.fit_table(SHAPE, "H100", SEQ_LENS, (3,), dtype="fp32", features="cached")
    pd.testing.assert_frame_equal(shown.tables["fit"], most)


@undrawn
def test_conversations_are_encoded_with_the_given_tokenizer(tmp_path):
    path = tmp_path / "chats.jsonl"
    lines = [{"id": chat.id, "messages": list(chat.messages)} for chat in CHATS]
    path.write_text("\n".join(map(json.dumps, lines)))
    same = [encode(chat, TOKENIZER) for chat in load_chats(path)]
    for given in (CHATS, str(path), same):
        shown = explorer(given, tokenizer=TOKENIZER, packed=False)
        assert set(shown.table["seq_len"]) == {max(LENGTHS)}
        # Five tokens before each answer, and its first.
        assert shown.tables["never"]["tokens"].tolist() == [15, 3, 0, 0, 0]


@undrawn
def test_explorers_show_of_a_large_file_what_they_show_of_a_small_one(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "chats.jsonl"
    lines = [{"id": chat.id, "messages": list(chat.messages)} for chat in CHATS]
    path.write_text("\n".join(map(json.dumps, lines)))

    def shown():
        given = {"tokenizer": TOKENIZER, "like": "speculators"}
        explorers = (
            explorer(path, **given),
            explore.explore_anchors(path, **given, conversation=1),
            explore.explore_masks(path, **given, conversation=1),
        )
        return [explorer.tables for explorer in explorers]

    small = shown()
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("dspark_lab.training.data.LARGE_FILE", 0)
    for before, now in zip(small, shown(), strict=True):
        # The lab's own mask is not known of what is kept on disk without its text.
        before.pop("own", None)
        assert list(before) == list(now)
        for name in before:
            pd.testing.assert_frame_equal(before[name], now[name])
    assert len(list((tmp_path / "cache" / "dspark_lab").iterdir())) == 1


@undrawn
def test_a_model_is_a_shape_or_what_one_is_made_of():
    config = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128}
    config |= {"num_hidden_layers": 3, "num_attention_heads": 4}
    given, made = explorer(model=config).table, explorer(model=Shape.of(config)).table
    pd.testing.assert_frame_equal(given, made)


@undrawn
def test_rows_too_short_and_too_many_blocks_are_said_in_words_and_can_be_left():
    shown = explorer(documents("." * 280 + "a" * 10))
    assert shown.tables == {}
    assert "among its first 256" in alert(shown) and "longer row" in alert(shown)
    shown.controls["seq_len"].value = 512
    assert list(shown.tables) == NAMES
    # Too many blocks to look at.
    shown = explorer(num_anchors=2**18)
    assert alert(shown) == "A row has 262,144 blocks, more than 131,072. Choose fewer."
    assert shown.tables == {}
    shown.controls["batch_size"].value = 64
    shown.controls["num_anchors"].value = 8
    assert "batch_size must be at most the number of rows" in alert(shown)
    shown.controls["batch_size"].value = 1
    shown.controls["num_anchors"].value = 4
    assert list(shown.tables) == NAMES


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"card": "H1000"}, r"card must be one of \('T4', .*\), got 'H1000'"),
        ({"card": MEASURED}, r"card must be one of \('T4', .*\), got 'measured here'"),
        ({"export": "yaml"}, r"export must be one of \('json', .*\), got 'yaml'"),
        ({"memory": 1e9}, "memory must come with a time, got 1000000000.0 without"),
        ({"memory": -1.0, "time": TIME}, "memory must be > 0"),
        ({"chats": []}, "chats must hold at least one conversation, got none"),
        ({"model": "qwen9"}, "a shape must be one of .*, got 'qwen9'"),
    ],
)
def test_a_start_value_that_cannot_be_is_refused_at_once(start, message):
    with pytest.raises(ValueError, match=message):
        explorer(**start)


def test_the_shipped_conversations_and_a_published_target_are_shown_where_nothing_is_given():
    shown = explore_training_budget()
    assert shown.settings["num_anchors"] == 512 and shown.settings["seq_len"] == 4096
    never = shown.tables["never"].set_index("reason")["tokens"]
    assert never["prompt"] > 10_000
    assert len(shown._repr_mimebundle_()["image/png"]) > 10_000
    assert shown.tables["cost"]["operations"].sum() > 1e13


@undrawn
def test_the_code_of_a_view_makes_it_again():
    shown = explorer(gamma=3.0, time=TIME)
    shown.choose(num_anchors=32, block_size=5, packed=False, card="L4", per="document")
    require_same_view(shown, chats=ENCODED, model=SHAPE, time=TIME)


def test_progress_is_a_line_for_all_that_differs_of_the_best_of_its_block_that_fits():
    table = gallery.progress((1, 2), (7,))
    (ax,) = picture_of("progress of one").axes
    unit = table[table["fits"]]["rate"].max()
    lines = labelled(ax)
    assert list(lines) == legend(ax) == ["1 row", "2 rows"]
    for rows, line in zip((1, 2), lines.values(), strict=True):
        own = table[table["batch_size"] == rows]
        expected = own.assign(rate=own["rate"] / unit)[["num_anchors", "rate"]].to_numpy()
        np.testing.assert_allclose(points(line), expected)
    assert len(ax.collections) == 2, "an interval a line"
    ((x, low, *_),) = [c.get_paths()[0].get_extents().bounds for c in ax.collections[:1]]
    assert x == 4 and low == pytest.approx(table[table["batch_size"] == 1]["low"].min() / unit)
    (frame,) = [line for line in ax.lines if line.get_marker() == "s" and line.get_color() == GREEN]
    best = int(tuning.best_option(table)["num_anchors"])
    assert points(frame) == [[best, 1]]
    (diamond,) = [line for line in ax.lines if line.get_markersize() == 8]
    assert diamond.get_marker() == "D" and points(diamond)[0][0] == 128
    assert [x for x, _ in stars(ax)] == [16] and [x for x, _ in hollow(ax)][:2] == [128, 128]
    said = f"★ chosen   □ best: N {best}, 2 rows   ◇ by coverage alone: N 128   ○ too large"
    assert title(ax) == said
    (ax,) = picture_of("progress").axes
    assert legend(ax)[:2] == ["2 rows, K 4", "2 rows, K 7"]
    frames = [line for line in ax.lines if line.get_markersize() == 11]
    assert [y for line in frames for _, y in points(line)] == [1, 1, 1]
    best = [tuning.best_option(gallery.progress(), k)["num_anchors"] for k in (4, 7, 15)]
    assert title(ax).startswith("□ best, K 4: N {}, K 7: N {}, K 15: N {}".format(*best))
    with pytest.raises(ValueError, match=r"rows and anchors must be one of .*, got \(3, 16\)"):
        explore.plot_progress(table, at=(3, 16))
    # Nothing fits, or nothing is known: lines, and no best.
    (ax,) = explore.plot_progress(table.assign(fits=False)).axes
    assert "best" not in title(ax) and len(labelled(ax)) == 2
    (ax,) = explore.plot_progress(table.assign(rate=0.0, low=0.0)).axes
    assert {y for line in labelled(ax).values() for _, y in points(line)} == {0}


def test_progress_stands_in_place_of_coverage_and_gain():
    axes = picture_of("budget by progress").axes
    assert len(axes) == 3 and legend(axes[0]) == ["1 row", "2 rows", "4 rows"]
    assert title(axes[1]) == "a step: 10.0 T operations, 300.0 ms"
    assert [x for x, _ in stars(axes[0])] == [16]


NOISE = noise_of(block_sizes=(3, 5))


def with_noise(**start) -> Explorer:
    return explorer(**({"noise": NOISE, "card": "L4"} | start))


def progress_by_hand(**options) -> pd.DataFrame:
    given = {"batch_sizes": (1, 2), "num_anchors": (4, 8, 16, 32, 64, 128), "memory": "L4"}
    given |= {"block_sizes": (3,), "shape": SHAPE, "step": tuning.Step(1, 1, 1)} | options
    spans = Spans.of(ENCODED, seq_len=256, row_length=256)
    return tuning.progress_table(NOISE, spans, tuning.card_time("L4"), **given)


def test_with_noise_the_best_by_progress_stands_beside_that_by_coverage(drawn):
    covering = plain_best(explorer(card="L4"))
    shown, expected = with_noise(), progress_by_hand()
    assert list(shown.tables) == [*NAMES, "progress"]
    pd.testing.assert_frame_equal(shown.tables["progress"], expected)
    best = tuning.best_option(expected)
    table = shown.tables["recommended"]
    assert table["by"].tolist() == ["progress", "coverage"]
    sizes = ["batch_size", "num_anchors"]
    assert table[sizes].values.tolist() == [best[sizes].tolist(), [1, covering]]
    other = expected.query("batch_size == 1 and num_anchors == @covering").iloc[0]
    for name in ("seconds", "rate", "low", "high", "best"):
        assert table[name].tolist() == [best[name], other[name]]
    reason = tuning.progress_reason(expected)
    kept = f"which makes {other['rate'] / best['rate']:.0%} of that progress a second."
    said = f"By coverage alone it would be N {covering} with 1 row, {kept}"
    assert table["reason"].tolist() == [reason, said]
    assert sentences(shown)[0] == f"{reason} Step times are assumed, not measured."
    assert said in unescape(picture(shown).value)
    assert drawn.call_args.kwargs["rows"] == 1 and drawn.call_args.kwargs["coverage"] == covering
    near = {best["batch_size"] * factor for factor in (0.5, 1, 2)} | {1}
    assert set(drawn.call_args.kwargs["progress"]["batch_size"]) == near & {1, 2}
    # What is measured is not assumed.
    assert "assumed" not in sentences(with_noise(time=TIME, card=None))[0]


def plain_best(shown: Explorer) -> int:
    return int(shown.tables["recommended"]["num_anchors"].item())


@undrawn
def test_rows_and_anchors_by_progress_are_what_is_recommended_and_exported():
    shown = with_noise(num_anchors=64, batch_size=3)
    best = tuning.best_option(shown.tables["progress"])
    use = {name: int(best[name]) for name in ("num_anchors", "batch_size")}
    assert shown._frame.recommended == use and use["batch_size"] != 3
    chosen = TrainingSettings(64, 3, 256, 3, pack_length=256)
    assert exported(shown) == [
        tuning.export(replace(chosen, **use), "dspark-lab"),
        tuning.export(chosen, "dspark-lab"),
    ]
    # The chosen number of rows stands among those that double.
    assert set(shown.tables["progress"]["batch_size"]) == {1, 2, 3}
    shown.choose(**use)
    assert (
        shown.tables
        and len(exported(shown)) == 1
        and "recommended, and your setting now" in shown._frame.html
    )


@undrawn
def test_progress_follows_every_control():
    shown = with_noise()
    for name, value in [("block_size", 5), ("per", "document"), ("packed", False), ("card", "T4")]:
        before = shown.tables["progress"]
        shown.controls[name].value = value
        assert not shown.tables["progress"].equals(before), name
    spans = Spans.of(ENCODED, seq_len=256)
    options = {"batch_sizes": (1, 2, 4, 8, 16), "num_anchors": (4, 8, 16, 32, 64), "shape": SHAPE}
    options |= {
        "block_sizes": (5,),
        "per": "document",
        "memory": "T4",
        "step": tuning.Step(1, 1, 1),
    }
    options["num_anchors"] = tuple(sorted(set(shown.table["num_anchors"])))
    expected = tuning.progress_table(NOISE, spans, tuning.card_time("T4"), **options)
    pd.testing.assert_frame_equal(shown.tables["progress"], expected)


@undrawn
def test_block_sizes_are_those_whose_noise_is_known():
    assert with_noise().controls["block_size"].options == (3, 5)
    assert with_noise(block_size=None).settings["block_size"] == 5, "the nearest to 7"
    assert explorer(block_size=None).settings["block_size"] == 7
    wanted = r"block_size must be one of \[3, 5\], whose noise was measured, got 7"
    with pytest.raises(ValueError, match=wanted):
        with_noise(block_size=7)


@undrawn
def test_noise_may_be_a_file_which_the_code_names(tmp_path):
    path = tmp_path / "noise.safetensors"
    tuning.save_noise(NOISE, path)
    shown = with_noise(noise=str(path))
    assert f"noise={str(path)!r}" in shown.code
    require_same_view(shown, chats=ENCODED, model=SHAPE)
    kept = shown.tables["progress"]["rate"]
    np.testing.assert_allclose(kept, with_noise().tables["progress"]["rate"], rtol=1e-4)
    assert "noise=noise" in with_noise().code
    require_same_view(with_noise(), chats=ENCODED, model=SHAPE, noise=NOISE)
    with pytest.raises(FileNotFoundError, match="nothing"):
        with_noise(noise=tmp_path / "nothing")


@undrawn
def test_without_noise_it_is_said_what_is_not_known_and_what_measures_it():
    shown = explorer()
    assert "progress" not in shown.tables
    assert "What a step teaches also depends on" in shown._frame.html
    assert "dspark_lab.tuning.measure_noise as noise" in shown._frame.html
    assert "measure_noise" not in with_noise()._frame.html


@undrawn
def test_where_too_many_rows_are_chosen_fewer_are_recommended_and_where_nothing_fits_it_is_said():
    shown = with_noise(model="qwen3-4b", card="T4")
    assert sentences(shown)[0].startswith("Nothing fits") and not shown._frame.recommended
    assert not shown.tables["progress"]["fits"].any()
    # No step of eight rows fits, one of fewer does.
    step = {"seq_len": LONGEST, "num_anchors": 4, "block_size": 3}
    held = tuning.memory_table(SHAPE, batch_size=1, **step)["held"].sum()
    start = {"time": TIME, "card": None, "memory": 1.01 * held / 0.92, "packed": False}
    shown = with_noise(**start, batch_size=8, num_anchors=4, seq_len=512)
    assert not shown.table["fits"].any() and shown._frame.recommended["batch_size"] < 8
    assert shown.tables["recommended"]["by"].tolist() == ["progress"]
