"""Accept rates and confidences: pictures of tables made by hand, and the explorer."""

import io
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from data.make.recipes import write_chats
from dspark_lab import explore, rates
from dspark_lab.decoding import (
    Decoded,
    decode,
    decode_rounds,
    distribution_table,
    encode_prompt,
    outcome_table,
    token_kinds,
)
from dspark_lab.explore import models
from dspark_lab.explore.style import BLUE, GREEN, ORANGE
from dspark_lab.pairs import question
from tests import gallery
from tests.explorers import alert
from tests.gallery import DRIFT, GAIN, KINDS, ONE_KIND, REPORT, biases, bins, picture_of, sweep
from tests.pictures import bands, labelled, legend, points, segments, tick_names, title, words
from tests.samples import tiny_drafter
from tests.test_target import random_target
from tests.word_pair import HEADLESS, HOT, QUESTIONS, TEXTS, answers, ask, drafter, target, to_text

pytestmark = pytest.mark.usefixtures("one_thread", "unplaced")


@pytest.mark.parametrize("low", [0.651, 0.5, 0.05])
def test_ticks_of_rates_are_what_their_labels_say(low):
    table = pd.DataFrame({"drafter": "one", "slot": [0, 1], "conditional": [low, 0.831]})
    figure = explore.plot_rates(table.assign(low=table["conditional"], high=table["conditional"]))
    figure.draw_without_rendering()
    [ax] = figure.axes
    for place, label in zip(ax.get_yticks(), tick_names(ax.yaxis), strict=True):
        number = float(label.rstrip("%").replace("\N{MINUS SIGN}", "-"))
        assert number == pytest.approx(100 * place)


def require_rates(ax: Axes, table: pd.DataFrame, by: str, value: str = "conditional") -> None:
    """Each part of a table is a line with its band; the empirical one has marks with bars."""
    low, high = ("low", "high") if value == "conditional" else ("survival_low", "survival_high")
    parts = dict(list(table.groupby(by, sort=False)))
    lines = labelled(ax)
    assert list(lines) == list(parts)
    for name, line in lines.items():
        assert points(line) == parts[name][["slot", value]].to_numpy().tolist()
    bars = parts.pop("empirical", table.head(0))[["slot", low, high]].to_numpy().tolist()
    assert segments(ax) == [[[slot, a], [slot, b]] for slot, a, b in bars]
    wanted = [(part[low].min(), part[high].max()) for part in parts.values()]
    assert bands(ax) == [pytest.approx(one) for one in wanted]


def test_each_drafter_has_a_panel_with_a_line_for_each_kind_three_panels_a_line_on_one_scale():
    drafters = ["one", "two", "three", "four", "five"]
    table = gallery.rates(drafters)
    figure = picture_of("rates")
    assert list(map(title, figure.axes)) == drafters
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(KINDS)
    for ax, name in zip(figure.axes, drafters, strict=True):
        require_rates(ax, table[table["drafter"] == name], "kind")
        lines = labelled(ax)
        drawn = {kind: (line.get_color(), line.get_linestyle()) for kind, line in lines.items()}
        assert drawn["on policy"] == (BLUE, "-")
        assert drawn["predicted"] == (ORANGE, "--")
        assert drawn["empirical"] == (GREEN, "None") and lines["empirical"].get_marker() == "D"
        assert len(set(drawn.values())) == len(KINDS)
    boxes = [ax.get_position() for ax in figure.axes]
    assert len({round(box.y0, 3) for box in boxes[:3]}) == 1
    assert boxes[3].y1 < boxes[0].y0 and boxes[3].x0 == pytest.approx(boxes[0].x0)
    [(low, high)] = {ax.get_ylim() for ax in figure.axes}
    assert low < table["low"].min() and high > table["high"].max()


def test_survival_has_its_own_lines_and_a_table_needs_no_drafters():
    table = gallery.rates(["one", "two"]).query("drafter == 'one'")
    require_rates(picture_of("survival").axes[0], table, "kind", "survival")
    require_rates(picture_of("rates of one").axes[0], gallery.rates(["one"]), "kind")


def test_rates_of_one_kind_are_a_line_with_its_band_for_each_drafter_in_one_panel():
    [ax] = picture_of("rates of one kind").axes
    require_rates(ax, ONE_KIND, "drafter")
    assert legend(ax) == ["one", "two"]
    looks = {(line.get_color(), line.get_marker()) for line in labelled(ax).values()}
    assert len(looks) == 2


def test_rates_kept_apart_by_something_else_have_their_panels_too():
    table = gallery.rates(["one", "two"]).rename(columns={"drafter": "domain"})
    assert list(map(title, explore.plot_rates(table).axes)) == ["one", "two"]
    behind = table.assign(drafter=table.pop("domain"))
    assert list(map(title, explore.plot_rates(behind).axes)) == ["one", "two"]


def test_reliability_shows_each_bin_that_has_a_mean_and_counts_them_all():
    tables = {"raw": bins(5, 0, 40, 90), "scaled": bins(9, 9, 9)}
    axes = picture_of("reliability").axes
    for (name, table), ax, strip in zip(tables.items(), axes[:2], axes[2:], strict=True):
        assert title(ax) == name
        known = table.dropna()
        assert len(known) < len(table) or name == "scaled"
        diagonal, line = ax.lines
        assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
        assert points(line) == known[["confidence", "outcome"]].to_numpy().tolist()
        assert segments(ax) == [[[f, f], [f, o]] for f, o in points(line)]
        marks = ax.collections[-1]
        assert marks.get_offsets().tolist() == points(line)
        order = np.argsort(known["count"].to_numpy(), kind="stable")
        assert (np.diff(marks.get_sizes()[order]) >= 0).all()
        drawn = [[bar.get_x(), bar.get_width(), bar.get_height()] for bar in strip.patches]
        bars = np.array([table["low"], table["high"] - table["low"], table["count"]])
        assert np.array(drawn).T == pytest.approx(bars)
        assert ax.get_xlim() == ax.get_ylim() == strip.get_xlim() == (0, 1)
    sizes = [ax.collections[-1].get_sizes() for ax in axes[:2]]
    assert sizes[0][-1] > sizes[1].max(), "one scale of marks for all panels"
    assert len({strip.get_ylim() for strip in axes[2:]}) == 1


def test_reliability_shows_the_intervals_of_outcomes_where_they_are_known():
    table = bins(5, 0, 40, 90)
    table = table.assign(outcome_low=table["outcome"] - 0.02, outcome_high=table["outcome"] + 0.01)
    ax, _ = explore.plot_reliability({"": table}).axes
    expected = [[[f, o - 0.02], [f, o + 0.01]] for f, o in points(ax.lines[1])]
    assert np.array(segments(ax)) == pytest.approx(np.array(expected))


def test_reliability_panels_are_square_and_their_strips_as_wide():
    gallery.pixels_of("reliability")
    figure = picture_of("reliability")
    for ax, strip in zip(figure.axes[:2], figure.axes[2:], strict=True):
        box, below = ax.get_window_extent(), strip.get_window_extent()
        assert box.width == pytest.approx(box.height, rel=0.01)
        assert below.x0 == pytest.approx(box.x0, abs=2) and below.x1 == pytest.approx(box.x1, abs=2)


def require_dots(picture: str, table: pd.DataFrame, name: str, rows: list[str]) -> None:
    """Each number is a dot with its interval in its row."""
    [ax] = picture_of(picture).axes
    zero, *dots = ax.lines
    assert list(zero.get_xdata()) == [0, 0]
    assert sum(map(points, dots), []) == [[x, row] for row, x in enumerate(table[name])]
    prefix = name.removesuffix("_percent")
    ends = zip(table[f"{prefix}_low"], table[f"{prefix}_high"], strict=True)
    assert segments(ax) == [[[low, row], [high, row]] for row, (low, high) in enumerate(ends)]
    assert tick_names(ax.yaxis) == rows
    assert ax.yaxis_inverted(), "first row on top"


def test_a_bias_is_a_dot_with_its_interval_in_its_row():
    domains = ["math", "code", "chat"]
    require_dots("bias", biases(("domain", domains)), "bias", domains)


def test_a_gain_is_a_dot_with_its_interval_named_with_its_threshold():
    cuts = {"raw": "0.380", "scaled": "0.395", "oracle": "0.270"}
    rows = ["everything", *(f"{name}, threshold {cut}" for name, cut in cuts.items())]
    require_dots("gain", GAIN, "gain_percent", rows)


@pytest.mark.parametrize("shift", [-1, 0, 1])
def test_the_sides_of_a_bias_are_named_and_both_are_there(shift):
    table = biases(("domain", ["math", "code"])).set_index("domain") + shift
    [ax] = explore.plot_bias(table.reset_index(), "domain").axes
    low, high = ax.get_xlim()
    assert min(-low, high) > 0.15 * (high - low)
    places = {text.get_text(): text.xy[0] for text in ax.texts}
    assert places == {"← underconfident": 0, "overconfident →": 1}


def test_two_columns_of_biases_are_rows_and_marks_of_which_no_two_are_alike():
    table = biases(("domain", ["math", "code"]), ("drafter", list("abcdefgh")))
    [ax] = picture_of("bias by two").axes
    lines = labelled(ax)
    looks = {(li.get_color(), li.get_marker(), li.get_fillstyle()) for li in lines.values()}
    assert len(looks) == 8
    for name, line in lines.items():
        part = table[table["drafter"] == name]
        assert [x for x, _ in points(line)] == part["bias"].tolist()
        assert [round(y) for _, y in points(line)] == [0, 1]
    assert len({y for line in lines.values() for _, y in points(line)}) == len(table)
    assert list(lines) == legend(ax) == list("abcdefgh")
    assert ax.get_legend().get_title().get_text() == "drafter"


@pytest.mark.parametrize("by", ["slot", [], ["domain", "slot"], ["domain"] * 3])
def test_a_bias_is_shown_by_one_or_two_of_its_columns(by):
    with pytest.raises(ValueError, match=r"by must be one or two of \['domain', .*, got \["):
        explore.plot_bias(biases(("domain", ["math"])), by)


def test_a_rate_or_a_view_that_there_is_none_of_is_refused():
    with pytest.raises(ValueError, match="value must be .*'survival', got 'tau'"):
        explore.plot_rates(gallery.rates(["one"]), "tau")
    with pytest.raises(ValueError, match="view must be one of .*'rates'.*, got 'mood'"):
        acceptance(view="mood")


def test_thresholds_show_the_rate_on_the_left_and_its_cost_on_the_right():
    left, right = picture_of("thresholds").axes
    tables = {"raw": sweep(), "scaled": sweep(0.9)}
    assert list(labelled(left)) == ["raw", "scaled"]
    costs = [(name, what) for name in tables for what in ("verified", "accepted")]
    assert list(labelled(right)) == [f"{name}, {what}" for name, what in costs]
    for name, what in costs:
        table, rate, line = tables[name], labelled(left)[name], labelled(right)[f"{name}, {what}"]
        assert points(rate) == table[["threshold", "acceptance_rate"]].dropna().values.tolist()
        assert points(line) == table[["threshold", what]].values.tolist()
        assert line.get_linestyle() == {"verified": "-", "accepted": "--"}[what]
        assert (line.get_color(), line.get_marker()) == (rate.get_color(), rate.get_marker())
    assert right.get_ylim()[0] == 0


def test_one_table_of_thresholds_needs_no_name_and_may_have_bands():
    table = sweep()
    left, right = explore.plot_thresholds(table).axes
    assert left.get_legend() is None and list(labelled(right)) == ["verified", "accepted"]
    assert len(left.collections) == len(right.collections) == 0
    for name in ("verified", "acceptance_rate"):
        table[f"{name}_low"], table[f"{name}_high"] = 0.9 * table[name], 1.1 * table[name]
    left, right = explore.plot_thresholds(table).axes
    for ax, name in ((left, "acceptance_rate"), (right, "verified")):
        assert [high for _, high in bands(ax)] == [pytest.approx(1.1 * table[name].max())]


def test_calibration_joins_each_slots_error_before_and_after():
    left, right = picture_of("calibration").axes
    for ax, name in ((left, "ece"), (right, "auroc")):
        before, after = (labelled(ax)[which] for which in ("raw", "scaled"))
        assert [y for _, y in points(before)] == REPORT[name].dropna().tolist()
        assert [y for _, y in points(after)] == REPORT[f"{name}_scaled"].dropna().tolist()
        assert before.get_marker() != after.get_marker()
        joined = zip(points(before), points(after), strict=True)
        assert segments(ax) == list(map(list, joined))
        assert tick_names(ax.xaxis) == ["0", "1", "2", "all"]
        places = ax.get_xticks()
        assert places[3] - places[2] > places[2] - places[1] == 1, "all slots stand apart"
    assert legend(left) == ["raw", "scaled"]
    assert right.lines[-1].get_ydata() == [0.5, 0.5]
    assert left.get_ylim()[0] == 0


def test_raw_and_scaled_look_alike_in_every_picture():
    """And nothing else beside them looks like one of them."""
    raw, scaled = (ORANGE, "s", "none"), (BLUE, "o", "full")

    def look(line):
        return line.get_color(), line.get_marker(), line.get_fillstyle()

    left, right = picture_of("calibration").axes
    rates_, counts = picture_of("thresholds").axes
    for ax in (left, right, rates_):
        lines = labelled(ax)
        assert [look(lines[name]) for name in ("raw", "scaled")] == [raw, scaled]
    assert {look(line) for line in labelled(counts).values()} == {raw, scaled}
    assert [ax.lines[-1].get_color() for ax in picture_of("reliability").axes[:2]] == [ORANGE, BLUE]
    marks = [ax.collections[-1] for ax in picture_of("reliability").axes[:2]]
    papers = [to_hex(mark.get_facecolors()[0]).upper() for mark in marks]
    assert papers == ["#FFFFFF", BLUE.upper()]
    everything, *both, oracle = map(look, picture_of("gain").axes[0].lines[1:])
    assert both == [raw, scaled] and len({everything, oracle, raw, scaled}) == 4
    assert {raw[0], scaled[0]}.isdisjoint({everything[0], oracle[0]})
    assert labelled(picture_of("drift").axes[0])["raw"].get_color() == ORANGE


def test_drift_holds_each_error_over_its_window_and_marks_the_change():
    [ax] = picture_of("drift").axes
    lines = labelled(ax)
    assert list(lines) == ["raw", "static temperatures", "online temperatures"]
    for label, line in lines.items():
        values = DRIFT[f"ece_{label.split()[0]}"].tolist()
        assert list(line.get_xdata()) == [-100, 0, 100, 200]
        assert list(line.get_ydata()) == [*values, values[-1]]
        assert line.get_drawstyle() == "steps-post"
    assert len({line.get_linestyle() for line in lines.values()}) == 3
    assert [list(li.get_xdata()) for li in ax.lines if li not in lines.values()] == [[0, 0]]
    assert words(ax) == ["change of domain"]


def acceptance(prompts: Any = QUESTIONS, drafters: Any = None, **options: Any) -> explore.Explorer:
    return explore.explore_acceptance(target(), drafters or drafter(), prompts, **(HOT | options))


def expected(view: str, run: Decoded) -> pd.DataFrame:
    """The table behind a view, from the library's functions."""
    trace = run.trace.assign(kind=token_kinds(run.trace["token"], to_text))
    if view == "text":
        return outcome_table(run, to_text, 0)
    if view == "reliability":
        tables = rates.reliability_tables(*rates.split_prompts(trace))
        return pd.concat(tables, names=["values", "bin"]).reset_index()
    if view == "thresholds":
        return rates.threshold_sweep(trace)
    if view in ("domains", "token kinds"):
        return rates.study(trace, by=["domain" if view == "domains" else "kind"])
    return rates.rate_table(rates.trace_sums(trace))


@pytest.fixture(scope="module")
def explored() -> explore.Explorer:
    """An explorer of one drafter, whose view every test sets."""
    return acceptance()


def test_a_views_table_is_what_the_library_says_of_the_same_trace_and_has_its_own_picture(explored):
    run, pictures, shown = answers(drafter()), {}, {}
    tau = rates.tau_table(rates.trace_sums(run.trace))
    for view in explore.VIEWS:
        explored.controls["view"].value = view
        pd.testing.assert_frame_equal(explored.table, expected(view, run), check_dtype=False)
        pd.testing.assert_frame_equal(explored.tables["trace"], run.trace)
        pd.testing.assert_frame_equal(explored.tables["tau"], tau)
        behind = [] if view in ("text", "thresholds") else ["tokens"]
        assert list(explored.tables)[1:] == [*behind, "trace", "tau"]
        frame = explored.frame
        pictures[frame.alt] = frame.png
        assert explored.view.state == frame.state | {"frame": explored.frames_drawn}
        shown[view] = frame.state["show"]
    assert len(pictures) == len(set(pictures.values())) == len(explore.VIEWS)
    assert shown == dict.fromkeys(explore.VIEWS, "chart") | {"text": "answer"}


def test_the_text_view_is_the_chosen_conversation(explored):
    explored.controls["view"].value = "text"
    run = answers(drafter())
    for conversation in (0, 5, len(QUESTIONS) - 1):
        explored.controls["conversation"].value = conversation
        table = outcome_table(run, to_text, conversation)
        pd.testing.assert_frame_equal(explored.table, table)
        state = explored.view.state
        assert state["tokens"]["text"] == table["text"].tolist()
        assert all(f"w{conversation + at}" in state["asked"] for at in (0, 7))
    explored.controls["conversation"].value = len(QUESTIONS)
    assert explored.settings["conversation"] == len(QUESTIONS) - 1


def test_the_text_view_knows_the_distributions_of_every_slot(explored):
    explored.choose(view="text", conversation=5)
    asked = [question(one) for one in QUESTIONS]
    rounds = [one for one in decode_rounds(target(), drafter(), asked, **HOT) if one.prompt == 5]
    state = explored.frame.state
    assert len(state["slots"]) == len(rounds) > 1
    for slots, one in zip(state["slots"], rounds, strict=True):
        tables = [distribution_table(one, slot, to_text) for slot in range(len(slots))]
        assert [slot["ids"] for slot in slots] == [table["token"].tolist() for table in tables]
        for slot, table in zip(slots, tables, strict=True):
            assert slot["draft"] == pytest.approx(table["draft"].tolist(), abs=1e-6)


def test_a_moved_control_draws_anew_and_answers_are_decoded_once(monkeypatch):
    counted = mock.Mock(side_effect=models.decode_rounds)
    monkeypatch.setattr(models, "decode_rounds", counted)
    both = {"one": drafter(1), "two": drafter(2)}
    explorer = acceptance(QUESTIONS[:4], both, view="reliability", max_new_tokens=5)
    start = {"view": "reliability", "drafter": "one", "temperature": 1.5, "conversation": 0}
    assert explorer.settings == start
    moves: list[tuple[str, Any]] = [("drafter", "two"), ("temperature", 0.0), ("view", "text")]
    moves += [("conversation", 2), ("drafter", "one"), ("view", "survival")]
    moves += [("temperature", 1.5), ("view", "rates")]
    for number, (name, value) in enumerate(moves):
        before = explorer.frame.state
        explorer.controls[name].value = value
        assert explorer.frame.state != before and explorer.frames_drawn == 2 + number
        one, temperature = both[explorer.settings["drafter"]], explorer.settings["temperature"]
        run = answers(one, QUESTIONS[:4], temperature=temperature, max_new_tokens=5)
        pd.testing.assert_frame_equal(explorer.tables["trace"], run.trace)
    # All prompts are answered so often; the text view asks once more for one of them alone.
    asked = [call for call in counted.call_args_list if "domains" in call.kwargs]
    calls = [(call.args[1], call.kwargs["temperature"]) for call in asked]
    assert len(calls) == 4 and set(calls) == {(one, t) for one in both.values() for t in (1.5, 0.0)}


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
    file = tmp_path / "chats.jsonl"
    write_chats(chats, file)
    trace = answers(drafter(), TEXTS).trace
    # The first question of a conversation is asked.
    longer = replace(chats[2], messages=chats[2].messages + ask("w4").messages)
    mixed = [TEXTS[0], torch.tensor(ids[1]), longer]
    for prompts in (TEXTS, ids, chats, mixed, file, str(file)):
        pd.testing.assert_frame_equal(acceptance(prompts).tables["trace"], trace)


def test_a_drafter_without_a_confidence_head_has_rates_and_elsewhere_a_sentence():
    bare = drafter(3, **HEADLESS)
    explorer = acceptance(drafters={"sure": drafter(), "bare": bare})
    explorer.controls["drafter"].value = "bare"
    run = answers(bare)
    for view in explore.VIEWS:
        explorer.controls["view"].value = view
        if view in ("reliability", "domains", "token kinds", "thresholds"):
            assert alert(explorer) == f"{view} needs a drafter with a confidence head, got bare"
            assert explorer.tables == {}
        else:
            table = expected(view, run)
            pd.testing.assert_frame_equal(explorer.table, table, check_dtype=False)
    explorer.controls["view"].value = "thresholds"
    explorer.controls["drafter"].value = "sure"
    assert explorer.table["verified"].notna().all()


def test_every_drafter_with_a_head_has_every_view_if_its_rounds_are_enough():
    explorer = acceptance(QUESTIONS[:1], max_new_tokens=2)
    for view in explore.VIEWS:
        explorer.controls["view"].value = view
        # What cannot be told from one conversation is a sentence, and not an error.
        assert explorer.tables or alert(explorer)
    explorer.controls["view"].value = "reliability"
    assert "conversations leaves one side empty" in alert(explorer)


def test_a_target_that_decodes_one_row_at_a_time_is_explored_too():
    windows = random_target("windows")
    made = tiny_drafter(1)
    made.use_target_embeddings(windows.embed_weight, windows.head_weight)
    explorer = explore.explore_acceptance(windows, made, [[1, 2, 3], [4, 5]], max_new_tokens=4)
    options = {"temperature": 1.0, "max_new_tokens": 4}
    expected = decode(windows, made.eval(), [[1, 2, 3], [4, 5]], **options).trace
    pd.testing.assert_frame_equal(explorer.tables["trace"], expected)


def test_words_in_a_picture_of_text_are_as_wide_as_the_areas_behind_them():
    table = pd.DataFrame(
        {"outcome": "accepted", "kept": True, "text": ["wide"] * 20}, index=range(20)
    )
    figure = explore.plot_outcomes(table)
    # As a notebook draws it.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    [ax] = figure.axes
    areas = ax.collections[-1].get_paths()
    left, right = (
        ax.transData.transform([[area.vertices[n][0], 0] for area in areas])[:, 0] for n in (0, 1)
    )
    said = next(text for text in ax.texts if text.get_text().startswith("wide")).get_window_extent()
    assert said.x0 == pytest.approx(left.min(), abs=3) and said.x1 == pytest.approx(
        right.max(), abs=3
    )
    assert right.max() - left.min() > 300
