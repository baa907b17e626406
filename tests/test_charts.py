"""Charts in the browser: points that say their table's numbers, and tokens in their answers."""

import json
import shutil
import subprocess
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from dspark_lab import explore, rates
from dspark_lab.decoding import Decoded, RandomNumbers, token_kind
from dspark_lab.explore import style
from dspark_lab.explore.decoding import DecodingView
from dspark_lab.explore.widget import module, page
from tests.browsers import take_screenshot, wait_for_frame
from tests.pictures import contrast
from tests.screen import hard_to_read, unnamed
from tests.traces import reached_by_hand
from tests.word_pair import HOT, QUESTIONS, answers, drafter, target, to_text

pytestmark = pytest.mark.usefixtures("one_thread")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not here")


@cache
def run() -> Decoded:
    return answers(drafter(), max_new_tokens=16)


def texts() -> list[list[str]]:
    return [[to_text(token) for token in answer] for answer in run().tokens]


@cache
def states() -> dict[str, dict[str, Any]]:
    """The states of three views, as the explorer makes them."""
    table = rates.rate_table(rates.trace_sums(run().trace))
    tables = rates.reliability_tables(*rates.split_prompts(run().trace))
    bias = rates.study(run().trace, by=["domain"])
    reached, binned = (
        call(run(), to_text) for call in (explore.reached_tokens, explore.bin_tokens)
    )
    panels = {
        "rates": (explore.rate_panels(table), reached),
        "reliability": (explore.reliability_panels(tables), binned),
        "domains": (explore.bias_panels(bias, "domain"), reached),
    }
    return {name: explore.chart_state(*one, texts()) | {"frame": 1} for name, one in panels.items()}


def test_a_reached_token_stands_in_its_answer():
    table = explore.reached_tokens(run(), to_text, around=3)
    reached = sorted(reached_by_hand(run().trace), key=lambda r: (r.prompt, r.round, r.slot))
    assert len(table) == len(reached) > 100
    assert 0 < table["accepted"].sum() < len(table)
    for shown, row in zip(table.itertuples(), reached, strict=True):
        place = (row.prompt, row.domain, row.round, row.slot, row.position)
        assert (shown.prompt, shown.domain, shown.round, shown.slot, shown.position) == place
        answer, at = run().tokens[row.prompt], row.position
        assert shown.text == to_text(row.token) and shown.kind == token_kind(to_text(row.token))
        assert shown.said == to_text(answer[at]) and shown.accepted == row.accepted
        assert (row.token == answer[at]) >= row.accepted
        assert shown.before == "".join(to_text(t) for i, t in enumerate(answer) if at - 3 <= i < at)
        assert shown.after == "".join(to_text(t) for i, t in enumerate(answer) if at < i <= at + 3)
        assert (shown.confidence, shown.accept_rate) == (row.confidence, row.accept_rate)


def test_the_tokens_of_bins_are_those_that_a_reliability_table_counts():
    table = explore.bin_tokens(run(), to_text)
    tables = rates.reliability_tables(*rates.split_prompts(run().trace))
    for name, confidence in (("raw", "confidence"), ("scaled", "scaled")):
        for number, row in enumerate(tables[name].itertuples()):
            held = table[table[f"{name}_bin"] == number]
            assert len(held) == tables[name]["count"][number]
            if len(held):
                assert held[confidence].mean() == pytest.approx(row.confidence)
                assert held["accepted"].mean() == pytest.approx(row.outcome)
    held = rates.split_prompts(run().trace)[1]
    whole = explore.reached_tokens(run(), to_text)
    whole = whole[whole["prompt"].isin(held["prompt"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(table[whole.columns], whole)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def test_a_rate_says_the_numbers_of_its_row():
    table = rates.rate_table(rates.trace_sums(run().trace))
    for value, low, high in (
        ("conditional", "low", "high"),
        ("survival", "survival_low", "survival_high"),
    ):
        [panel] = explore.rate_panels(table, value)
        assert [one["name"] for one in panel["series"]] == list(table["kind"].unique())
        assert len(panel["points"]) == len(table)
        for point, row in zip(panel["points"], table.to_dict("records"), strict=True):
            assert (point["y"], point["low"], point["high"]) == (row[value], row[low], row[high])
            assert point["key"] == row["slot"] and abs(point["x"] - row["slot"]) < 0.5
            assert panel["series"][point["series"]]["name"] == row["kind"]
            words = " ".join(point["facts"])
            slots = f"{row['reached']:,.0f} slots reached"
            expected = [row["kind"], f"slot {row['slot']}", f"{row['conversations']} conversations"]
            expected += [slots if value == "conditional" else f"{row['rounds']:,.0f} rounds"]
            expected += [f": {percent(row[value])}"]
            expected += [f"95 % interval {percent(row[low])} to {percent(row[high])}"]
            assert all(one in words for one in expected), (words, expected)
        ends = [point[name] for point in panel["points"] for name in ("low", "high")]
        assert panel["y_range"][0] <= min(ends) and panel["y_range"][1] >= max(ends)


def test_a_bin_says_the_numbers_of_its_row():
    tables = rates.reliability_tables(*rates.split_prompts(run().trace))
    panels = explore.reliability_panels(tables)
    assert [panel["column"] for panel in panels] == ["raw_bin", "scaled_bin"]
    for panel, (name, table) in zip(panels, tables.items(), strict=True):
        known = table[table["count"] > 0]
        assert [point["key"] for point in panel["points"]] == known.index.tolist()
        for point, row in zip(panel["points"], known.to_dict("records"), strict=True):
            assert (point["x"], point["y"]) == (row["confidence"], row["outcome"])
            words = " ".join(point["facts"])
            expected = [name, f"{row['low']:.2f} to {row['high']:.2f}", f"{row['count']} slots"]
            expected += [f"predicted {percent(row['confidence'])}"]
            expected += [f"actual {percent(row['outcome'])}"]
            sure = "overconfident" if row["confidence"] > row["outcome"] else "underconfident"
            gap = 100 * abs(row["confidence"] - row["outcome"])
            expected += [f"{sure} by {gap:.1f} points"]
            if np.isnan(row["outcome_low"]):
                assert point["low"] is None and "interval" not in words
            else:
                low, high = percent(row["outcome_low"]), percent(row["outcome_high"])
                expected += [f"95 % interval {low} to {high}"]
            assert all(one in words for one in expected), (words, expected)


def test_a_bias_and_a_threshold_say_the_numbers_of_their_rows():
    table = rates.study(run().trace, by=["domain"])
    [panel] = explore.bias_panels(table, "domain")
    for point, row in zip(panel["points"], table.to_dict("records"), strict=True):
        words = " ".join(point["facts"]).replace("−", "-")
        assert point["key"] == row["domain"] and point["y"] == row["bias"]
        for expected in (row["domain"], f"{row['samples']} slots", f"bias {row['bias']:+.3f}"):
            assert expected in words
        assert f"interval {row['bias_low']:+.3f} to {row['bias_high']:+.3f}" in words
    sweep = rates.threshold_sweep(run().trace)
    rate, slots = explore.threshold_panels(sweep)
    assert [point["y"] for point in rate["points"]] == sweep["acceptance_rate"].dropna().tolist()
    columns = [*sweep["verified"], *sweep["accepted"]]
    assert [point["y"] for point in slots["points"]] == columns
    for panel in (rate, slots):
        assert panel["column"] is None
        for point in panel["points"]:
            assert f"threshold {point['x']:.2f}" == point["facts"][0]
    assert f"acceptance rate: {percent(rate['points'][0]['y'])}" in rate["points"][0]["facts"][1]


def test_a_chart_travels_as_json_with_none_for_what_is_not_known():
    bare = answers(drafter(3, enable_confidence_head=False, confidence_head_with_markov=False))
    tokens = explore.reached_tokens(bare, to_text)
    table = rates.rate_table(rates.trace_sums(bare.trace))
    said = [[to_text(token) for token in answer] for answer in bare.tokens]
    state = explore.chart_state(explore.rate_panels(table), tokens, said)
    held = json.loads(json.dumps(state, allow_nan=False))
    assert set(held["listed"]["confidence"]) == {None}
    kinds = [series["name"] for series in held["panels"][0]["series"]]
    assert "on policy" in kinds and len(held["listed"]["slot"]) == len(tokens)


def test_one_prompt_alone_is_given_the_random_numbers_that_it_has_among_others():
    together, alone = RandomNumbers(5, 7, 3), RandomNumbers(1, 7, 3, first=4)
    for _ in range(3):
        for name in ("draft", "accept", "target"):
            drawn = getattr(together, name)([0, 4, 2])
            assert getattr(alone, name)([0]).tolist() == drawn[1:2].tolist()


# ---- chart.js in node

_DRIVER = """
const answer = ({ state, asked }) => asked.map(([name, ...given]) => ({
  between: (panel, low, high) => keysBetween(state.panels[panel], low, high),
  rows: (column, keys) => listedRows(state.listed, { column, keys }),
  chosen: (selection) => chosenIn(state.panels, selection),
  text: () => [...state.listed.prompt.keys()].map((i) => inItsText(state, i)),
  next: (panel, from, key) => nextPoint(state.panels[panel], from, key),
  looks: () => ["raw", "scaled"].map((one) => [MARK_COLOURS[CHART_LOOKS[one][0]][0],
    ...CHART_LOOKS[one]]),
})[name](...given));
process.stdout.write(JSON.stringify(answer(JSON.parse(require("fs").readFileSync(0, "utf8")))));
"""


def ask(state: dict[str, Any], *asked: Any) -> list[Any]:
    """What ``chart.js`` answers to questions about a state."""
    source = module("shared", "chart") + _DRIVER
    given = json.dumps({"state": state, "asked": asked})
    done = subprocess.run(["node", "-e", source], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@needs_node
def test_the_browser_lists_the_tokens_of_a_choice_as_the_tables_have_them():
    binned, reached = explore.bin_tokens(run(), to_text), explore.reached_tokens(run(), to_text)
    state = states()["reliability"]
    keys = [point["key"] for point in state["panels"][1]["points"]]
    raw, scaled, none, text = ask(
        state,
        ["rows", "raw_bin", keys[1:3]],
        ["rows", "scaled_bin", keys],
        ["rows", "raw_bin", [999]],
        ["text"],
    )
    assert raw == binned.index[binned["raw_bin"].isin(keys[1:3])].tolist() != []
    assert scaled == binned.index.tolist() and none == []
    columns = ["before", "said", "after"]
    assert text == binned[columns].to_dict("records")
    by_slot, by_domain, text = ask(
        states()["domains"], ["rows", "slot", [1]], ["rows", "domain", ["code"]], ["text"]
    )
    assert by_slot == reached.index[reached["slot"] == 1].tolist() != []
    assert by_domain == reached.index[reached["domain"] == "code"].tolist() != []
    assert text == reached[columns].to_dict("records")


@needs_node
def test_a_brush_holds_the_keys_between_its_ends_whichever_was_first():
    panel = states()["reliability"]["panels"][0]
    xs = {point["key"]: point["x"] for point in panel["points"]}
    ends = [(0.0, 1.0), (1.0, 0.0), (0.31, 0.62), (0.62, 0.31), (0.5, 0.5)]
    for (one, other), found in zip(
        ends, ask(states()["reliability"], *(["between", 0, *end] for end in ends)), strict=True
    ):
        low, high = min(one, other), max(one, other)
        assert found == [key for key, x in xs.items() if low <= x <= high]
    [found] = ask(states()["rates"], ["between", 0, 0.5, 1.5])
    assert found == [1], "three kinds of one slot"


@needs_node
def test_a_choice_stays_as_far_as_the_panels_have_it():
    state = states()["reliability"]
    keys = [point["key"] for point in state["panels"][0]["points"]]
    held = {"column": "raw_bin", "keys": [keys[-1], 77, keys[0]]}
    elsewhere = {"column": "slot", "keys": [0]}
    answer = {"round": 0, "slot": 1}
    found = ask(state, *(["chosen", one] for one in (held, elsewhere, answer, None)))
    assert found == [{"column": "raw_bin", "keys": [keys[0], keys[-1]]}, None, None, None]


@needs_node
def test_keys_go_along_a_series_and_across_to_the_others_at_a_slot():
    [panel] = states()["rates"]["panels"]
    count = len(panel["points"]) // 3
    questions = [
        ([None, "ArrowRight"], 0),
        ([0, "ArrowRight"], 1),
        ([1, "ArrowLeft"], 0),
        ([0, "ArrowLeft"], 0),
        ([count - 1, "ArrowRight"], count - 1),
        ([0, "ArrowDown"], count),
        ([count, "ArrowUp"], 0),
        ([2 * count, "ArrowDown"], 2 * count),
        ([count, "End"], 2 * count - 1),
        ([count + 1, "Home"], count),
    ]
    asked = [["next", 0, *given] for given, _ in questions]
    assert ask(states()["rates"], *asked) == [point for _, point in questions]
    # Of one series, up is on and down is back.
    asked = [["next", 0, 0, "ArrowUp"], ["next", 0, 1, "ArrowDown"]]
    assert ask(states()["reliability"], *asked) == [1, 0]


@needs_node
def test_raw_and_scaled_look_in_the_browser_as_in_pictures():
    [looks] = ask(states()["rates"], ["looks"])
    names = {"square": "s", "circle": "o"}
    for name, (colour, _, mark, _, is_open) in zip(("raw", "scaled"), looks, strict=True):
        look = style.CONFIDENCE_LOOKS[name]
        assert colour.upper() == look["color"].upper() and names[mark] == look["marker"]
        assert is_open == (look["fillstyle"] == "none")


# ---- The widget in Chromium


def opened(open_page, state, **where):
    """A page with the widget, whose model is ``window.model``."""
    html, begin = page("chart", [DecodingView(state=state)]), "loaded[number].render({ model: "
    assert begin in html
    html = html.replace(begin, begin + "window.model = ")
    shown = open_page(html, **where)
    wait_for_frame(shown.locator(".widget"), 1)
    return shown


def centre(point) -> tuple[float, float]:
    box = point.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def chart(shown, number=0):
    return shown.locator(".dspark-chart svg[role]").nth(number)


def tip(shown) -> list[str]:
    lines = shown.locator(".dspark-chart > [aria-hidden]").locator("div")
    return lines.all_inner_texts() if lines.first.is_visible() else []


def listed(shown) -> list[int]:
    rows = shown.locator(".dspark-chart-list tbody tr")
    return rows.evaluate_all("all => all.map(one => Number(one.dataset.row))")


def drag(shown, panel: int, low: float, high: float) -> None:
    """A brush over a panel of shares."""
    ends = chart(shown, panel).evaluate(
        """(svg, ends) => {
          const lines = [...svg.querySelectorAll("line")].filter(one => one.getAttribute("y1") ===
            one.getAttribute("y2"));
          const box = svg.getBoundingClientRect();
          const [from, to] = ["x1", "x2"].map(name => Number(lines[0].getAttribute(name)));
          return ends.map(end => box.left + from + end * (to - from));
        }""",
        [low, high],
    )
    box = chart(shown, panel).bounding_box()
    shown.mouse.move(ends[0], box["y"] + 60)
    shown.mouse.down()
    shown.mouse.move((ends[0] + ends[1]) / 2, box["y"] + 90)
    shown.mouse.move(ends[1], box["y"] + 80)
    shown.mouse.up()


def faint_marks(shown) -> list[str]:
    """Strokes of points, intervals and lines with less than 3 : 1 of contrast with the page."""
    paper = {"light": "#ffffff", "dark": "#121212"}[
        shown.evaluate("matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light'")
    ]
    drawn = shown.locator(".dspark-chart svg").locator("[data-point], polyline, line[stroke-width]")
    strokes = drawn.evaluate_all("all => [...new Set(all.map(one => one.getAttribute('stroke')))]")
    assert strokes
    return [one for one in strokes if contrast(to_rgb(one), to_rgb(paper)) < 3]


@pytest.mark.browser
@pytest.mark.parametrize(("theme", "width"), [("light", 700), ("dark", 1280)])
def test_hover_says_the_numbers_of_every_point(open_page, theme, width):
    for view in ("reliability", "rates"):
        shown = opened(open_page, states()[view], theme=theme, width=width)
        for number, panel in enumerate(states()[view]["panels"]):
            marks = chart(shown, number).locator("[data-point]")
            assert marks.count() == len(panel["points"])
            for i, point in enumerate(panel["points"]):
                shown.mouse.move(1, 1)
                assert tip(shown) == []
                shown.mouse.move(*centre(marks.nth(i)))
                # Of points at one place the upper one is meant.
                near = [
                    one["facts"]
                    for one in panel["points"]
                    if abs(one["x"] - point["x"]) < 0.02 and abs(one["y"] - point["y"]) < 0.02
                ]
                assert tip(shown) in near
        assert hard_to_read(shown.locator("body")) == []
        assert unnamed(shown.locator(".dspark-chart")) == [] == faint_marks(shown)
        assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth")
        take_screenshot(shown, f"chart-{view}-{theme}-{width}")


@pytest.mark.browser
@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 700)])
def test_a_brush_lists_exactly_the_tokens_of_its_bins_in_their_text(open_page, theme, width):
    tokens = explore.bin_tokens(run(), to_text)
    tables = rates.reliability_tables(*rates.split_prompts(run().trace))
    shown = opened(open_page, states()["reliability"], theme=theme, width=width)
    for number, (name, table) in enumerate(tables.items()):
        for low, high in ((0.35, 0.55), (0.9, 0.45), (0.02, 0.99)):
            drag(shown, number, low, high)
            ends = sorted((low, high))
            bins = table.index[table["confidence"].between(*ends)].tolist()
            rows = tokens[tokens[f"{name}_bin"].isin(bins)]
            assert listed(shown) == rows.index.tolist() != []
            chosen = {"column": f"{name}_bin", "keys": bins}
            assert shown.evaluate("model.get('selection')") == chosen
            note = shown.locator(".dspark-chart-line span").inner_text()
            assert f"{name}, " in note and f": {len(rows)} tokens" in note
    cells = shown.locator(".dspark-chart-list tbody td:first-child").all_inner_texts()
    for cell, row in zip(cells, rows.itertuples(), strict=True):
        drafted = row.text if row.accepted else row.text + row.said
        # Spaces of a marked token are visible.
        assert cell.replace("␣", " ") == row.before + drafted + row.after
    assert hard_to_read(shown.locator("body")) == []
    assert unnamed(shown.locator(".dspark-chart")) == []
    take_screenshot(shown, f"chart-brushed-{theme}-{width}")
    drag(shown, 0, 0.0, 0.001)
    assert listed(shown) == [] and shown.evaluate("model.get('selection')") is None


@pytest.mark.browser
def test_a_click_lists_a_bin_shift_adds_another_and_keys_do_the_same(open_page):
    tokens = explore.bin_tokens(run(), to_text)
    shown = opened(open_page, states()["reliability"])
    panel = states()["reliability"]["panels"][0]
    keys = [point["key"] for point in panel["points"]]

    def of_bins(*bins):
        return tokens.index[tokens["raw_bin"].isin(bins)].tolist()

    marks = chart(shown).locator("[data-point]")
    shown.mouse.click(*centre(marks.nth(1)))
    assert listed(shown) == of_bins(keys[1])
    assert chart(shown).locator("[data-chosen]").count() == 1
    shown.keyboard.down("Shift")
    shown.mouse.click(*centre(marks.nth(3)))
    shown.keyboard.up("Shift")
    assert listed(shown) == of_bins(keys[1], keys[3])
    shown.get_by_role("button", name="Clear").click()
    assert listed(shown) == [] and not shown.get_by_role("button", name="Clear").is_visible()
    live = shown.locator("[aria-live]")
    shown.keyboard.press("Escape")
    chart(shown).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowRight"):
        shown.keyboard.press(key)
    assert live.inner_text() == ", ".join(panel["points"][2]["facts"])
    shown.keyboard.press("Enter")
    assert listed(shown) == of_bins(keys[2])
    assert f"{panel['points'][2]['name']}: " in live.inner_text()
    shown.keyboard.press("Shift+ArrowRight")
    assert listed(shown) == of_bins(keys[2], keys[3])
    shown.keyboard.press("Escape")
    assert shown.evaluate("model.get('selection')") is None and listed(shown) == []
    # Every chart and the list are reached with Tab.
    shown.keyboard.press("Tab")
    assert chart(shown, 1).evaluate("svg => svg === document.activeElement")


@pytest.mark.browser
def test_a_choice_outlives_a_new_state_and_long_lists_show_all_when_asked(open_page):
    tokens = explore.reached_tokens(run(), to_text)
    shown = opened(open_page, states()["rates"])
    slots = [point["key"] for point in states()["rates"]["panels"][0]["points"]]
    shown.evaluate("slots => model.set('selection', { column: 'slot', keys: slots })", slots)
    assert len(tokens) > 200 == len(listed(shown))
    shown.get_by_role("button", name=f"Show all {len(tokens):,}").click()
    assert listed(shown) == tokens.index.tolist()
    shown.evaluate("model.set('selection', { column: 'slot', keys: [1] })")
    chosen = listed(shown)
    assert chosen == tokens.index[tokens["slot"] == 1].tolist() != []
    # The widget is told that a control has moved.
    table = rates.rate_table(rates.trace_sums(run().trace))
    again = explore.chart_state(explore.rate_panels(table, "survival"), tokens, texts())
    shown.evaluate("state => model.set('state', state)", again | {"frame": 2})
    assert listed(shown) == chosen and chart(shown).locator("[data-chosen]").count() == 3
    shown.evaluate("state => model.set('state', state)", states()["reliability"] | {"frame": 3})
    wait_for_frame(shown.locator(".widget"), 3)
    assert listed(shown) == [] and chart(shown).locator("[data-chosen]").count() == 0


@pytest.mark.browser
def test_a_saved_page_of_the_explorer_lists_a_bin_and_opens_a_slot_offline(open_page, tmp_path):
    explorer = explore.explore_acceptance(target(), drafter(), QUESTIONS, view="reliability", **HOT)
    explorer.save_html(tmp_path / "bins.html")
    shown = open_page(tmp_path / "bins.html")
    shown.mouse.click(*centre(chart(shown).locator("[data-point]").nth(2)))
    tokens, table = explorer.tables["tokens"], explorer.table
    number = table["bin"][(table["values"] == "raw") & (table["count"] > 0)].iloc[2]
    assert listed(shown) == tokens.index[tokens["raw_bin"] == number].tolist() != []
    explorer.choose(view="text", conversation=3)
    explorer.save_html(tmp_path / "text.html")
    shown = open_page(tmp_path / "text.html")
    wait_for_frame(shown.locator(".widget"), 1)
    words = shown.locator(".dspark-answer-text .dspark-word")
    words.nth(2).click()
    assert shown.locator(".dspark-slot table tr").count() > 3, "both distributions"
