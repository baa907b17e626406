"""Accept rates and confidences: pictures of tables made by hand, and the explorer."""

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from data.make.recipes import write_chats
from dspark_lab.chats import Chat
from dspark_lab.decoding import Decoded, decode, encode_prompt, outcome_table, token_kinds
from dspark_lab.explore import (
    VIEWS,
    Explorer,
    explore_acceptance,
    outcome_legend,
    outcome_text,
    plot_bias,
    plot_rates,
    plot_thresholds,
)
from dspark_lab.explore import acceptance as acceptance_module
from dspark_lab.explore.style import BLUE, GREEN, ORANGE
from dspark_lab.model import Drafter, Target
from dspark_lab.rates import (
    rate_table,
    reliability_tables,
    split_prompts,
    study,
    tau_table,
    threshold_sweep,
    trace_sums,
)
from tests.explorers import alert, picture
from tests.gallery import (
    DRIFT,
    GAIN,
    KINDS,
    ONE_KIND,
    REPORT,
    biases,
    bins,
    picture_of,
    pixels_of,
    rates,
    sweep,
)
from tests.pictures import bands, labelled, legend, points, segments, tick_names, title, words
from tests.samples import tiny_drafter
from tests.test_target import random_target
from tests.word_pair import HEADLESS, HOT, QUESTIONS, TEXTS, answers, ask, drafter, target, to_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("low", [0.651, 0.5, 0.05])
def test_ticks_of_rates_are_what_their_labels_say(low):
    table = pd.DataFrame({"drafter": "one", "slot": [0, 1], "conditional": [low, 0.831]})
    figure = plot_rates(table.assign(low=table["conditional"], high=table["conditional"]))
    figure.draw_without_rendering()
    [ax] = figure.axes
    for place, label in zip(ax.get_yticks(), tick_names(ax.yaxis), strict=True):
        number = float(label.rstrip("%").replace("\N{MINUS SIGN}", "-"))
        assert number == pytest.approx(100 * place)


def test_each_drafter_has_a_panel_with_a_line_for_each_kind():
    drafters = ["one", "two", "three", "four", "five"]
    table = rates(drafters)
    figure = picture_of("rates")
    assert list(map(title, figure.axes)) == drafters
    for ax, name in zip(figure.axes, drafters, strict=True):
        lines = labelled(ax)
        assert tuple(lines) == KINDS
        for kind, line in lines.items():
            part = table[(table["drafter"] == name) & (table["kind"] == kind)]
            assert points(line) == part[["slot", "conditional"]].to_numpy().tolist()
        drawn = {kind: (line.get_color(), line.get_linestyle()) for kind, line in lines.items()}
        assert drawn["on policy"] == (BLUE, "-")
        assert drawn["predicted"] == (ORANGE, "--")
        assert drawn["empirical"] == (GREEN, "None") and lines["empirical"].get_marker() == "D"
        assert len(set(drawn.values())) == len(KINDS)


def test_panels_stand_four_a_line_on_one_scale():
    axes = picture_of("rates").axes
    boxes = [ax.get_position() for ax in axes]
    assert len({round(box.y0, 3) for box in boxes[:4]}) == 1
    assert boxes[4].y1 < boxes[0].y0 and boxes[4].x0 == pytest.approx(boxes[0].x0)
    assert len({ax.get_ylim() for ax in axes}) == 1
    low, high = axes[0].get_ylim()
    table = rates(["one", "two", "three", "four", "five"])
    assert low < table["low"].min() and high > table["high"].max()


@pytest.mark.parametrize(
    ("picture", "value", "low", "high"),
    [
        ("rates of one", "conditional", "low", "high"),
        ("survival", "survival", "survival_low", "survival_high"),
    ],
)
def test_an_interval_is_a_band_or_where_there_is_no_line_a_bar(picture, value, low, high):
    table = rates(["one"] if picture == "rates of one" else ["one", "two"])
    table = table[table["drafter"] == "one"]
    ax = picture_of(picture).axes[0]
    for kind, line in labelled(ax).items():
        part = table[table["kind"] == kind]
        assert points(line) == part[["slot", value]].to_numpy().tolist()
    part = table[table["kind"] == "empirical"]
    bars = [[[k, a], [k, b]] for k, a, b in zip(part["slot"], part[low], part[high], strict=True)]
    assert segments(ax) == bars
    parts = table[table["kind"] != "empirical"].groupby("kind", sort=False)
    wanted = [(part[low].min(), part[high].max()) for _, part in parts]
    assert bands(ax) == [pytest.approx(one) for one in wanted]


def test_rates_of_one_kind_are_a_line_with_its_band_for_each_drafter_in_one_panel():
    [ax] = picture_of("rates of one kind").axes
    lines = labelled(ax)
    assert list(lines) == legend(ax) == ["one", "two"]
    for name, line in lines.items():
        part = ONE_KIND[ONE_KIND["drafter"] == name]
        assert points(line) == part[["slot", "conditional"]].to_numpy().tolist()
    looks = {(line.get_color(), line.get_marker()) for line in lines.values()}
    assert len(looks) == 2
    parts = ONE_KIND.groupby("drafter", sort=False)
    wanted = [(part["low"].min(), part["high"].max()) for _, part in parts]
    assert bands(ax) == [pytest.approx(one) for one in wanted]


def test_the_legend_of_the_rates_names_each_kind_once():
    [legend] = picture_of("rates").legends
    assert [text.get_text() for text in legend.get_texts()] == list(KINDS)


def test_rates_kept_apart_by_something_else_have_their_panels_too():
    table = rates(["one", "two"]).rename(columns={"drafter": "domain"})
    assert list(map(title, plot_rates(table).axes)) == ["one", "two"]
    behind = rates(["one", "two"]).pipe(lambda t: t[[*t.columns.drop("drafter"), "drafter"]])
    assert list(map(title, plot_rates(behind).axes)) == ["one", "two"]


def test_reliability_shows_each_bin_that_has_a_mean_and_counts_them_all():
    tables = {"raw": bins(5, 0, 40, 90), "scaled": bins(9, 9, 9)}
    axes = picture_of("reliability").axes
    assert len(axes) == 4
    for (name, table), ax, strip in zip(tables.items(), axes[:2], axes[2:], strict=True):
        assert title(ax) == name
        known = table.dropna()
        assert len(known) < len(table) or name == "scaled"
        diagonal, line = ax.lines
        assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
        assert points(line) == known[["confidence", "outcome"]].to_numpy().tolist()
        gaps = [[[f, f], [f, o]] for f, o in points(line)]
        assert segments(ax) == gaps
        marks = ax.collections[-1]
        assert marks.get_offsets().tolist() == points(line)
        order = np.argsort(known["count"].to_numpy(), kind="stable")
        assert (np.diff(marks.get_sizes()[order]) >= 0).all()
        bars = strip.patches
        assert [bar.get_height() for bar in bars] == table["count"].tolist()
        assert [bar.get_x() for bar in bars] == pytest.approx(table["low"].tolist())
        ends = [bar.get_x() + bar.get_width() for bar in bars]
        assert ends == pytest.approx(table["high"].tolist())
        assert ax.get_xlim() == ax.get_ylim() == strip.get_xlim() == (0, 1)
    sizes = [ax.collections[-1].get_sizes() for ax in axes[:2]]
    assert sizes[0][-1] > sizes[1].max(), "one scale of marks for all panels"
    assert len({strip.get_ylim() for strip in axes[2:]}) == 1


def test_reliability_panels_are_square_and_their_strips_as_wide():
    pixels_of("reliability")
    figure = picture_of("reliability")
    for ax, strip in zip(figure.axes[:2], figure.axes[2:], strict=True):
        box, below = ax.get_window_extent(), strip.get_window_extent()
        assert box.width == pytest.approx(box.height, rel=0.01)
        assert below.x0 == pytest.approx(box.x0, abs=2) and below.x1 == pytest.approx(box.x1, abs=2)


def test_a_bias_is_a_dot_with_its_interval_in_its_row():
    table = biases(("domain", ["math", "code", "chat"]))
    [ax] = picture_of("bias").axes
    zero, dots = ax.lines
    assert list(zero.get_xdata()) == [0, 0]
    assert points(dots) == [[bias, row] for row, bias in enumerate(table["bias"])]
    ends = zip(table["bias_low"], table["bias_high"], strict=True)
    assert segments(ax) == [[[low, row], [high, row]] for row, (low, high) in enumerate(ends)]
    assert tick_names(ax.yaxis) == ["math", "code", "chat"]
    assert ax.yaxis_inverted(), "first row on top"


def test_the_sides_of_a_bias_are_named_and_both_are_there():
    for shift in (-1, 0, 1):
        table = biases(("domain", ["math", "code"]))
        columns = ["bias", "bias_low", "bias_high"]
        table[columns] += shift
        [ax] = plot_bias(table, "domain").axes
        low, high = ax.get_xlim()
        assert min(-low, high) > 0.15 * (high - low)
        places = {text.get_text(): text.xy[0] for text in ax.texts}
        assert places == {"← underconfident": 0, "overconfident →": 1}


def test_two_columns_of_biases_are_rows_and_marks_of_which_no_two_are_alike():
    table = biases(("domain", ["math", "code"]), ("drafter", list("abcdefgh")))
    [ax] = picture_of("bias by two").axes
    lines = labelled(ax)
    assert list(lines) == list("abcdefgh")
    looks = {(li.get_color(), li.get_marker(), li.get_fillstyle()) for li in lines.values()}
    assert len(looks) == 8
    places = []
    for name, line in lines.items():
        part = table[table["drafter"] == name]
        assert [x for x, _ in points(line)] == part["bias"].tolist()
        assert [round(y) for _, y in points(line)] == [0, 1]
        places += [y for _, y in points(line)]
    assert len(set(places)) == len(table)
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == list("abcdefgh")
    assert legend.get_title().get_text() == "drafter"


@pytest.mark.parametrize(
    "draw, match",
    [
        (
            lambda: plot_rates(rates(["one"]), "tau"),
            r"value must be one of .*'survival'.*, got 'tau'",
        ),
        *(
            (
                lambda by=by: plot_bias(biases(("domain", ["math"])), by),
                r"by must be one or two of \['domain', .*, got \[",
            )
            for by in ("slot", [], ["domain", "slot"], ["domain"] * 3)
        ),
        (lambda: acceptance(view="mood"), "view must be one of .*'rates'.*, got 'mood'"),
    ],
)
def test_what_there_is_none_of_is_refused(draw, match):
    with pytest.raises(ValueError, match=match):
        draw()


def test_thresholds_show_the_rate_on_the_left_and_its_cost_on_the_right():
    left, right = picture_of("thresholds").axes
    tables = {"raw": sweep(), "scaled": sweep(0.9)}
    assert list(labelled(left)) == ["raw", "scaled"]
    assert list(labelled(right)) == [
        f"{name}, {what}" for name in tables for what in ("verified", "accepted")
    ]
    for name, table in tables.items():
        rate = labelled(left)[name]
        assert points(rate) == table[["threshold", "acceptance_rate"]].dropna().values.tolist()
        for what, style in (("verified", "-"), ("accepted", "--")):
            line = labelled(right)[f"{name}, {what}"]
            assert points(line) == table[["threshold", what]].values.tolist()
            assert line.get_linestyle() == style
            assert (line.get_color(), line.get_marker()) == (rate.get_color(), rate.get_marker())
    assert right.get_ylim()[0] == 0


def test_one_table_of_thresholds_needs_no_name_and_may_have_bands():
    table = sweep()
    left, right = plot_thresholds(table).axes
    assert left.get_legend() is None and list(labelled(right)) == ["verified", "accepted"]
    assert len(left.collections) == len(right.collections) == 0
    for name in ("verified", "acceptance_rate"):
        table = table.assign(
            **{f"{name}_low": 0.9 * table[name], f"{name}_high": 1.1 * table[name]}
        )
    left, right = plot_thresholds(table).axes
    for ax, name in ((left, "acceptance_rate"), (right, "verified")):
        [(_, highest)] = bands(ax)
        assert highest == pytest.approx(1.1 * table[name].max())


def test_calibration_joins_each_slots_error_before_and_after():
    left, right = picture_of("calibration").axes
    for ax, name in ((left, "ece"), (right, "auroc")):
        before, after = (labelled(ax)[which] for which in ("raw", "scaled"))
        assert [y for _, y in points(before)] == REPORT[name].dropna().tolist()
        assert [y for _, y in points(after)] == REPORT[f"{name}_scaled"].dropna().tolist()
        assert before.get_marker() != after.get_marker()
        assert segments(ax) == [
            list(pair) for pair in zip(points(before), points(after), strict=True)
        ]
        assert tick_names(ax.xaxis) == ["0", "1", "2", "all"]
        places = ax.get_xticks()
        assert places[3] - places[2] > places[2] - places[1] == 1, "all slots stand apart"
    assert legend(left) == ["raw", "scaled"]
    assert right.lines[-1].get_ydata() == [0.5, 0.5]
    assert left.get_ylim()[0] == 0


def test_drift_holds_each_error_over_its_window_and_marks_the_change():
    [ax] = picture_of("drift").axes
    lines = labelled(ax)
    names = ["ece_raw", "ece_static", "ece_online"]
    assert [label.split()[0] for label in lines] == ["raw", "static", "online"]
    for line, name in zip(lines.values(), names, strict=True):
        values = DRIFT[name].tolist()
        assert list(line.get_xdata()) == [-100, 0, 100, 200]
        assert list(line.get_ydata()) == [*values, values[-1]]
        assert line.get_drawstyle() == "steps-post"
    assert len({line.get_linestyle() for line in lines.values()}) == 3
    assert [list(li.get_xdata()) for li in ax.lines if li not in lines.values()] == [[0, 0]]
    assert words(ax) == ["change of domain"]


def test_a_gain_is_a_dot_with_its_interval_named_with_its_threshold():
    [ax] = picture_of("gain").axes
    zero, *dots = ax.lines
    assert list(zero.get_xdata()) == [0, 0]
    gains = GAIN["gain_percent"]
    assert [points(dot) for dot in dots] == [[[gain, row]] for row, gain in enumerate(gains)]
    ends = zip(GAIN["gain_low"], GAIN["gain_high"], strict=True)
    assert segments(ax) == [[[low, row], [high, row]] for row, (low, high) in enumerate(ends)]
    assert tick_names(ax.yaxis) == [
        "everything",
        "raw, threshold 0.380",
        "scaled, threshold 0.395",
        "oracle, threshold 0.270",
    ]
    assert "%" in ax.get_xlabel()


CONFIDENT = ("reliability", "domains", "token kinds", "thresholds")


def acceptance(prompts: Any = QUESTIONS, drafters: Any = None, **options: Any) -> Explorer:
    return explore_acceptance(target(), drafters or drafter(), prompts, **(HOT | options))


def expected(view: str, run: Decoded, conversation: int = 0) -> pd.DataFrame:
    """The table behind a view, from the library's functions."""
    trace = run.trace
    if view in ("rates", "survival"):
        return rate_table(trace_sums(trace))
    if view == "reliability":
        raw, scaled = reliability_tables(*split_prompts(trace)).values()
        both = [t.assign(bin=range(len(t))) for t in (raw, scaled)]
        named = [t.assign(values=v) for t, v in zip(both, ("raw", "scaled"), strict=True)]
        table = pd.concat(named, ignore_index=True)
        return table[["values", "bin", *raw.columns]]
    if view == "thresholds":
        return threshold_sweep(trace, [i / 20 for i in range(20)])
    if view == "text":
        return outcome_table(run, to_text, conversation)
    if view == "token kinds":
        trace = trace.assign(kind=token_kinds(trace["token"], to_text))
    return study(trace, by=["domain" if view == "domains" else "kind"])


@pytest.fixture(scope="module")
def explored() -> Explorer:
    """An explorer of one drafter, whose view every test sets."""
    return acceptance()


@pytest.mark.parametrize("view", VIEWS)
def test_a_views_table_is_what_the_library_says_of_the_same_trace(explored, view):
    explored.controls["view"].value = view
    run = answers(drafter())
    pd.testing.assert_frame_equal(explored.table, expected(view, run), check_dtype=False)
    pd.testing.assert_frame_equal(explored.tables["trace"], run.trace)
    pd.testing.assert_frame_equal(explored.tables["tau"], tau_table(trace_sums(run.trace)))
    assert list(explored.tables)[1:] == ["trace", "tau"]


def test_every_view_has_a_picture_of_its_own(explored):
    shown, words = set(), set()
    for view in VIEWS:
        explored.controls["view"].value = view
        if view == "text":
            continue
        found = re.match(
            r'<img alt="([^"]+)" .*src="(data:image/png[^"]+)"', picture(explored).value
        )
        words.add(found[1])
        shown.add(found[2])
    assert len(shown) == len(words) == len(VIEWS) - 1


def test_the_text_view_is_the_chosen_conversation(explored):
    explored.controls["view"].value = "text"
    run = answers(drafter())
    for conversation in (0, 5, len(QUESTIONS) - 1):
        explored.controls["conversation"].value = conversation
        table = expected("text", run, conversation)
        pd.testing.assert_frame_equal(explored.table, table)
        assert picture(explored).value == outcome_legend(table) + outcome_text(table)
    explored.controls["conversation"].value = len(QUESTIONS)
    assert explored.settings["conversation"] == len(QUESTIONS) - 1


@pytest.mark.parametrize("view", VIEWS)
def test_the_view_to_start_with_can_be_chosen(view):
    explorer = acceptance(QUESTIONS[:12], view=view, max_new_tokens=12)
    assert explorer.settings == {
        "view": view,
        "drafter": "drafter",
        "temperature": 1.5,
        "conversation": 0,
    }
    run = answers(drafter(), QUESTIONS[:12])
    pd.testing.assert_frame_equal(explorer.table, expected(view, run), check_dtype=False)


def test_a_moved_control_draws_anew_and_answers_are_decoded_once(monkeypatch):
    calls = []

    def counted(target: Target, drafter: Drafter, prompts: Any, **options: Any) -> Decoded:
        calls.append((drafter, options["temperature"]))
        return decode(target, drafter, prompts, **options)

    monkeypatch.setattr(acceptance_module, "decode", counted)
    both = {"one": drafter(1), "two": drafter(2)}
    explorer = acceptance(QUESTIONS[:4], both, max_new_tokens=5)
    moves: list[tuple[str, Any]] = [
        ("drafter", "two"),
        ("temperature", 0.0),
        ("view", "text"),
        ("conversation", 2),
        ("drafter", "one"),
        ("view", "survival"),
        ("temperature", 1.5),
        ("view", "rates"),
    ]
    for number, (name, value) in enumerate(moves):
        before = picture(explorer).value
        explorer.controls[name].value = value
        assert picture(explorer).value != before and explorer.frames_drawn == 2 + number
        settings = explorer.settings
        run = answers(
            both[settings["drafter"]],
            QUESTIONS[:4],
            temperature=settings["temperature"],
            max_new_tokens=5,
        )
        pd.testing.assert_frame_equal(explorer.tables["trace"], run.trace)
    kinds = [(one, t) for one in both.values() for t in (1.5, 0.0)]
    assert sorted(map(str, calls)) == sorted(map(str, kinds)) and len(calls) == 4


def test_the_domains_of_conversations_reach_the_tables():
    chats = [ask("w1", "math"), ask("w2", "code"), ask("w3"), ask("w4", "math")]
    explorer = acceptance(chats, view="domains")
    domains = explorer.tables["trace"].groupby("prompt")["domain"].unique()
    assert [list(own) for own in domains] == [["math"], ["code"], ["none"], ["math"]]
    found = explorer.table.set_index("domain")["conversations"].to_dict()
    assert found == {"code": 1, "math": 2, "none": 1}
    assert set(acceptance(TEXTS).tables["trace"]["domain"]) == {"none"}


def test_prompts_may_be_text_ids_conversations_or_a_file_of_them(tmp_path):
    ids = [encode_prompt(target(), text) for text in TEXTS]
    chats = [ask(text, name=text) for text in TEXTS]
    write_chats(chats, tmp_path / "chats.jsonl")
    ways = [
        TEXTS,
        ids,
        [torch.tensor(own) for own in ids],
        chats,
        [TEXTS[0], ids[1], chats[2]],
        tmp_path / "chats.jsonl",
        str(tmp_path / "chats.jsonl"),
    ]
    trace = answers(drafter(), TEXTS).trace
    for prompts in ways:
        pd.testing.assert_frame_equal(acceptance(prompts).tables["trace"], trace)


def test_a_conversations_first_question_is_asked():
    messages = [("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5")]
    chat = Chat(tuple({"role": role, "content": text} for role, text in messages), id="long")
    trace = acceptance([chat]).tables["trace"]
    pd.testing.assert_frame_equal(trace, answers(drafter(), ["w1 w2"]).trace)


def test_a_drafter_without_a_confidence_head_has_rates_and_elsewhere_a_sentence():
    bare = drafter(3, **HEADLESS)
    explorer = acceptance(drafters={"sure": drafter(), "bare": bare})
    explorer.controls["drafter"].value = "bare"
    run = answers(bare)
    for view in VIEWS:
        explorer.controls["view"].value = view
        if view in CONFIDENT:
            assert alert(explorer) == (f"{view} needs a drafter with a confidence head, got bare")
            assert explorer.tables == {}
        else:
            found = explorer.table
            pd.testing.assert_frame_equal(found, expected(view, run), check_dtype=False)
    explorer.controls["view"].value = "thresholds"
    explorer.controls["drafter"].value = "sure"
    assert explorer.table["verified"].notna().all()


def test_every_drafter_with_a_head_has_every_view_if_its_rounds_are_enough():
    explorer = acceptance(QUESTIONS[:1], max_new_tokens=2)
    for view in VIEWS:
        explorer.controls["view"].value = view
        # What cannot be told from one conversation is a sentence, and not an error.
        assert explorer.tables or alert(explorer)
    explorer.controls["view"].value = "reliability"
    assert "conversations leaves one side empty" in alert(explorer)


def test_a_target_that_decodes_one_row_at_a_time_is_explored_too():
    windows = random_target("windows")
    made = tiny_drafter(1)
    made.use_target_embeddings(windows.embed_weight, windows.head_weight)
    explorer = explore_acceptance(windows, made, [[1, 2, 3], [4, 5]], max_new_tokens=4)
    options = {"temperature": 1.0, "max_new_tokens": 4}
    expected = decode(windows, made.eval(), [[1, 2, 3], [4, 5]], **options).trace
    pd.testing.assert_frame_equal(explorer.tables["trace"], expected)
