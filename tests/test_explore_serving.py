"""Choosing for serving: pictures of tables made by hand, and the explorer."""

import asyncio
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from html import unescape
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from PIL import Image

from dspark_lab import explore, serving
from dspark_lab.decoding import save_trace
from dspark_lab.explore import Explorer, explore_serving, plot_load, plot_round, plot_speedup
from dspark_lab.explore import serving as serving_module
from dspark_lab.explore.models import Models
from dspark_lab.explore.style import BLUE, INK, ORANGE, RED, WIDEST
from dspark_lab.pairs import load_traces
from dspark_lab.rates import SequentialTemperatures
from dspark_lab.records import load_acceptance, load_step_costs, save_step_costs
from dspark_lab.serving import Engine, StepsPerSecond, acceptance_profile, speedup_table
from dspark_lab.tuning import SERVERS, ServingSettings, export
from tests import gallery
from tests.explorers import picture, require_same_view
from tests.gallery import BAD, GOOD, LOAD, REPLAYED, TEMPERATURES, picture_of, speedup
from tests.pictures import bands, labelled, legend, points, tick_names, title, words
from tests.word_pair import TEXTS, answers, drafter, target

pytestmark = pytest.mark.usefixtures("one_thread", "unplaced", "few_concurrencies")


def pairs(table: pd.DataFrame, x: str, y: str) -> list[list[float]]:
    return table[[x, y]].to_numpy().tolist()


def filled(ax: Axes) -> list[list[float]]:
    """Where marks are drawn full, over all lines."""
    marked = [line for line in ax.lines if line.get_marker() not in ("None", None, "")]
    full = [line for line in marked if line.get_fillstyle() == "full"]
    return sorted(pair for line in full for pair in points(line))


def rings(ax: Axes) -> list[list[float]]:
    return [pair for line in ax.lines if line.get_markersize() == 11 for pair in points(line)]


def dashed(ax: Axes) -> list[list[list[float]]]:
    return [points(line) for line in ax.lines if line.get_linestyle() == "--"]


def dotted_at(ax: Axes) -> list[float]:
    """Upright dotted lines from edge to edge."""
    lines = [line for line in ax.lines if line.get_linestyle() == ":"]
    return [line.get_xdata()[0] for line in lines if list(line.get_ydata()) == [0, 1]]


def of_each(table: pd.DataFrame, column: str) -> dict[str, pd.DataFrame]:
    return dict(tuple(table.groupby(column, sort=False)))


BY_LENGTH = of_each(gallery.THRESHOLDS, "draft_length")
SPEEDS = [
    (
        *("speedup", 0, "draft_length", "speedup"),
        {f"T 0: best 4, {GOOD['speedup'][3]:.2f}": GOOD, "T 1: best 2, 0.89": BAD},
    ),
    ("temperatures", 1, "temperature", "speedup", {"K 4": TEMPERATURES}),
    (
        *("speed by threshold", 0, "threshold", "speedup"),
        {"K 2: best 0.4, 1.20": BY_LENGTH[2], "K 4: best 0.4, 1.30": BY_LENGTH[4]},
    ),
]
OTHERS = [
    (
        *("speed by threshold", 1, "threshold", "verified"),
        {f"K {length}": part for length, part in BY_LENGTH.items()},
    ),
    ("load", 0, "per_user", "throughput", of_each(LOAD, "policy")),
    ("load", 1, "concurrency", "verified_per_request", of_each(LOAD, "policy")),
]


@pytest.mark.parametrize("name, panel, x, y, tables", SPEEDS + OTHERS)
def test_each_table_is_a_line_with_a_name_and_a_look_of_its_own(name, panel, x, y, tables):
    lines = labelled(picture_of(name).axes[panel])
    lines.pop("forgetting replay", None)
    drawn = {name: points(line) for name, line in lines.items()}
    assert drawn == {name: pairs(table, x, y) for name, table in tables.items()}
    for look in ("color", "marker"):
        assert len({lines[name].properties()[look] for name in tables}) == len(tables)


@pytest.mark.parametrize("name, panel, x, y, tables", SPEEDS)
def test_wins_have_full_marks_the_best_a_ring_and_intervals_are_bands(name, panel, x, y, tables):
    ax = picture_of(name).axes[panel]
    wins = [pair for table in tables.values() for pair in pairs(table[table[y] > 1], x, y)]
    assert len(wins) > 1 and filled(ax) == sorted(wins)
    assert {labelled(ax)[name].get_fillstyle() for name in tables} == {"none"}
    best = [pair for table in tables.values() for pair in pairs(table.nlargest(1, y), x, y)]
    assert rings(ax) == ([] if name == "temperatures" else best)
    wanted = [(t["speedup_low"].min(), t["speedup_high"].max()) for t in tables.values()]
    assert bands(ax) == [pytest.approx(one) for one in wanted]


def test_what_is_as_fast_as_plain_decoding_is_no_win_and_what_is_slower_is_shaded():
    even = speedup(0.5, 0.5, 0.5, 0.5).assign(speedup=[0.99, 1.0, 1.01, 0.5])
    assert filled(plot_speedup(even).axes[0]) == [[3, 1.01]]
    [ax] = picture_of("speedup").axes
    [span] = [patch for patch in ax.patches if patch.get_alpha()]
    low, high = ax.get_ylim()
    box = span.get_bbox()
    assert (box.y0, box.y1) == (low, 1) and low < BAD["speedup_low"].min() and high > 1
    assert words(ax) == ["slower than plain"]
    # The line of plain decoding is in view even if all win or all lose.
    columns = ["speedup", "speedup_low", "speedup_high", "without_replay"]
    for shift in (-5, 5):
        [ax] = plot_speedup(GOOD.assign(**(GOOD[columns] + shift))).axes
        low, high = ax.get_ylim()
        assert low < 1 < high and [1, 1] in [list(line.get_ydata()) for line in ax.lines]


def test_forgetting_replay_is_dashed_only_where_it_differs_and_of_several_only_for_the_bold():
    replayed = [pairs(REPLAYED, "draft_length", "without_replay")]
    [ax] = picture_of("speedup of one").axes
    assert dashed(ax) == replayed
    assert legend(ax)[-1] == "forgetting replay" and legend(ax)[0].startswith("best ")
    assert dashed(picture_of("speedup").axes[0]) == []
    _, right = picture_of("temperatures").axes
    assert dashed(right) == [pairs(TEMPERATURES, "temperature", "without_replay")]
    same = TEMPERATURES.assign(without_replay=TEMPERATURES["speedup"])
    left, right = explore.plot_temperatures(same).axes
    assert dashed(right) == [] and len(labelled(left)) == 2
    # The bold table alone has a band, too, and the thickest line.
    [ax] = picture_of("bold").axes
    bold, thin = labelled(ax).values()
    assert dashed(ax) == replayed and bold.get_linewidth() > thin.get_linewidth()
    wanted = (REPLAYED["speedup_low"].min(), REPLAYED["speedup_high"].max())
    assert bands(ax) == [pytest.approx(wanted)]


def test_what_is_chosen_is_dotted_on_the_axis_that_names_it():
    for name, at, label in (
        ("speedup", 2, "draft length K (dotted 2)"),
        ("speed by threshold", 0.4, "threshold on the confidence (dotted 0.4)"),
        ("load", 16, "requests in the batch (dotted 16)"),
    ):
        ax = picture_of(name).axes[-1]
        assert dotted_at(ax) == [at] and ax.get_xlabel() == label
    [free], (users, load) = picture_of("speedup of one").axes, plot_load(LOAD).axes
    assert dotted_at(free) == dotted_at(load) == [] and free.get_xlabel() == "draft length K"
    # Under load the policies at it are joined by dots, and the fastest is ringed.
    chosen = LOAD[LOAD["concurrency"] == 16].sort_values("throughput")
    marked = pairs(chosen, "per_user", "throughput")
    left = picture_of("load").axes[0]
    assert [points(line) for line in left.lines if line.get_linestyle() == ":"] == [marked]
    assert rings(left) == marked[-1:] and rings(users) == []


def test_lengths_that_no_round_reached_leave_gaps():
    [ax] = plot_speedup({"some": speedup(0.9, 0.9, np.nan, np.nan)}).axes
    assert len(points(next(iter(labelled(ax).values())))) == 2
    [none] = plot_speedup({"none": speedup(*[np.nan] * 4)}).axes
    assert legend(none) == ["none: no rate known"] and rings(none) == []


def bars(ax: Axes) -> list[tuple[float, float, float]]:
    """Row, left end and right end of each bar, in the order of drawing."""
    boxes = [patch.get_bbox() for patch in ax.patches]
    return [((box.y0 + box.y1) / 2, box.x0, box.x1) for box in boxes]


def test_the_parts_of_a_round_follow_each_other_end_where_it_does_and_look_different():
    [ax] = picture_of("rounds").axes
    names = ["draft", "verify", "replay", "rollback", "rest"]
    assert legend(ax) == [*names, "plain steps"]
    *parts, plain = np.array(bars(ax)).reshape(6, 4, 3)
    seconds = REPLAYED[[f"{name}_seconds" for name in [*names[:4], "overhead"]]]
    ends = 1000 * seconds.to_numpy().cumsum(axis=1).T
    assert ends[-1] == pytest.approx(1000 * REPLAYED["round_seconds"])
    for part, left, right in zip(parts, [0 * ends[0], *ends], ends, strict=False):
        assert part[:, 1] == pytest.approx(left) and part[:, 2] == pytest.approx(right)
    # As many plain steps as a round yields tokens, 10 ms each.
    assert plain[:, 2] == pytest.approx(10 * REPLAYED["tau"])
    rows = np.arange(4)
    assert (rows - 0.5 < parts[0][:, 0]).all() and (parts[0][:, 0] < plain[:, 0]).all()
    assert (plain[:, 0] < rows + 0.5).all() and ax.yaxis_inverted()
    wanted = [f"K {k:.0f}\ntau {tau:.2f}" for k, tau in pairs(REPLAYED, "draft_length", "tau")]
    assert tick_names(ax.yaxis) == wanted
    # Told apart without colour, too.
    looks = [(to_hex(p.get_facecolor()).upper(), p.get_hatch()) for p in ax.patches[:20:4]]
    assert looks[:3] == [(ORANGE, "////"), (BLUE, None), (RED, "xxxx")]
    assert looks[4] == (INK, None) and len(set(looks)) == 5
    assert ax.patches[-1].get_facecolor()[3] == 0
    # Beside a round stands how fast it is.
    for table, word in ((REPLAYED, "faster"), (BAD, "slower")):
        [ax] = plot_round(table).axes
        assert words(ax) == [f"{speed:.2f}, {word}" for speed in table["speedup"]]
        ends = np.maximum(1000 * table["round_seconds"], 10 * table["tau"])
        assert [text.xy[0] for text in ax.texts] == pytest.approx(ends)


def test_a_part_that_costs_nothing_is_not_in_the_key_and_one_length_can_be_shown_alone():
    [ax] = picture_of("round").axes
    assert legend(ax) == ["draft", "verify", "rest", "plain steps"]
    assert [right for _, _, right in bars(ax)] == pytest.approx([4, 16, 17, 10 * BAD["tau"][1]])
    assert ax.get_ylabel() == f"K 2\ntau {BAD['tau'][1]:.2f}" and len(ax.get_yticks()) == 0


@pytest.mark.parametrize(
    "plot, table, options, message",
    [
        (plot_round, GOOD, {"draft_length": 5}, r"draft_length must be one of \(1, .*, got 5"),
        (plot_load, LOAD, {"concurrency": 3}, r"concurrency must be one of .* 4, .*, got 3"),
        (plot_speedup, {"T 0": GOOD}, {"bold": "T 1"}, "bold must be one of .*'T 0'.*, got 'T 1'"),
        (explore.plot_schedule, gallery.SCHEDULE[:0], {}, "at least one slot to admit, got none"),
    ],
    ids=["draft length", "concurrency", "name", "slots"],
)
def test_what_the_table_lacks_is_refused(plot, table, options, message):
    with pytest.raises(ValueError, match=message):
        plot(table, **options)


def test_accept_rate_and_both_break_even_rates_are_lines_and_between_them_stands_what_pays():
    left, _ = picture_of("temperatures").axes
    wanted = {
        "accept rate": "accept_rate",
        "break-even rate": "break_even_rate",
        "break-even, forgetting replay": "break_even_without_replay",
    }
    known = TEMPERATURES.replace(np.inf, np.nan)
    assert {name: points(line) for name, line in labelled(left).items()} == {
        name: pairs(known.dropna(subset=column), "temperature", column)
        for name, column in wanted.items()
    }
    assert len({line.get_linestyle() for line in labelled(left).values()}) == 3
    assert tick_names(left.xaxis) == ["0", "0.5", "1"]
    [note] = left.texts
    assert note.get_text() == "no rate pays" and note.xy == (1.0, 1)
    spans = {c.get_label(): [s.tolist() for s in c.get_segments()] for c in left.collections}
    assert spans["pays"] == [[[0, 0.8], [0, 0.6]], [[0.5, 0.7], [0.5, 0.65]]]
    assert spans["does not pay"] == [[[1, 0.5], [1, 1]]]
    all_win = explore.plot_temperatures(TEMPERATURES.iloc[:2]).axes[0]
    assert "pays" in legend(all_win) and "does not pay" not in legend(all_win)
    assert words(all_win) == []


def test_the_load_has_one_key_grey_plain_decoding_and_concurrencies_at_the_best_policy():
    left, right = picture_of("load").axes
    assert {labelled(ax)["plain decoding"].get_color() for ax in (left, right)} == {INK}
    assert legend(left) == list(gallery.POLICIES) and right.get_legend() is None
    best = LOAD[LOAD["policy"] == "prefix scheduler"]
    assert LOAD["throughput"].max() == best["throughput"].max()
    named = best[best["concurrency"].isin([1, 4, 16, 64])]
    assert words(left) == tick_names(right.xaxis) == ["1", "4", "16", "64"]
    assert [list(text.xy) for text in left.texts] == pairs(named, "per_user", "throughput")
    assert right.get_xscale() == "log"
    few = plot_load(LOAD[LOAD["concurrency"] < 10])
    assert tick_names(few.axes[1].xaxis) == words(few.axes[0]) == ["1", "2", "4", "8"]


def test_theta_is_drawn_from_nothing_admitted_to_all_and_both_stops_are_marked():
    [ax] = picture_of("schedule").axes
    theta = [1.0, 0.5 * 1.8, 0.45 * (1.8 + 0.72)]
    assert points(ax.lines[0]) == [pytest.approx([n, theta[n]]) for n in range(3)]
    lines = labelled(ax)
    assert list(lines) == ["prefix scheduler: stops at 0", "retrospective, biased: 2"]
    stop, best = lines.values()
    assert points(stop) == [pytest.approx([0, 1.0])]
    assert points(best) == [pytest.approx([2, theta[2]])]
    assert stop.get_marker() != best.get_marker()
    assert filled(ax) == [[0, 1.0]]
    # A scheduler that stops inside fills the marks up to there.
    steep = StepsPerSecond(np.array([1, 5]), np.array([1.0, 0.4]), 0, "imaginary")
    table = serving.schedule_table(np.array([[0.9, 0.5], [0.8, 0.1]]), steep)
    count = int(table["admitted"].sum())
    assert 0 < count < len(table)
    [ax] = explore.plot_schedule(table).axes
    assert [x for x, _ in filled(ax)] == list(range(count + 1))
    assert f"prefix scheduler: stops at {count}" in legend(ax)
    table = serving.schedule_table(np.random.default_rng(0).random((32, 7)), gallery.SMOOTH)
    [large] = explore.plot_schedule(table).axes
    assert filled(large) == [] and len(points(large.lines[0])) == 32 * 7 + 1


@pytest.mark.parametrize("steps", [gallery.SMOOTH, gallery.SMOOTH.table], ids=["curve", "table"])
def test_steps_are_drawn_in_milliseconds_and_tokens_a_second_with_what_lies_between(steps):
    left, right = explore.plot_steps(steps).axes
    for ax, low, high in ((left, 10, 20), (right, 100, 64 * 50)):
        line, marks = ax.lines
        ends = [pytest.approx([1, low]), pytest.approx([64, high])]
        assert points(marks) == [points(line)[0], points(line)[-1]] == ends
        assert tick_names(ax.xaxis) == ["1", "64"] and ax.get_xscale() == "log"
    assert dict(points(left.lines[0]))[32] == pytest.approx(10 + 10 * 31 / 63), "linear in tokens"
    assert title(left) == "cpu, context 128"


def test_the_composite_is_made_of_the_four_pictures():
    figure = picture_of("serving")
    [alone] = plot_speedup({"T 0": GOOD, "T 1": BAD}, chosen=3, bold="T 0").axes
    [round_] = plot_round(GOOD, draft_length=3).axes
    load = plot_load(LOAD, concurrency=4).axes
    for ours, wanted in zip(figure.axes, (alone, round_, *load), strict=True):
        assert [points(line) for line in ours.lines] == [points(line) for line in wanted.lines]
        assert bars(ours)[-4:] == bars(wanted)[-4:] and bands(ours) == bands(wanted)
        assert words(ours) == words(wanted)
        assert (ours.get_xlabel(), ours.get_ylabel()) == (wanted.get_xlabel(), wanted.get_ylabel())
    titles = ["4 requests a step", "a round, T 0", "simulated load"]
    assert [title(ax) for ax in figure.axes[:3]] == titles
    assert figure.get_size_inches().tolist() == [WIDEST, 5.6]
    boxes = [ax.get_position() for ax in figure.axes]
    assert boxes[0].x0 == boxes[2].x0 < boxes[1].x0 == boxes[3].x0
    assert boxes[0].y0 == boxes[1].y0 > boxes[2].y1 == boxes[3].y1
    first, _, load, _ = picture_of("serving with replay").axes
    assert title(load) == "simulated load, without replay" and "forgetting replay" in legend(first)
    alone = explore.plot_serving({"a": GOOD}, LOAD, bold="a", draft_length=1, requests=1)
    assert title(alone.axes[0]) == "1 request a step"


SLOTS = 3
FEW = (1, 8, 64)


@pytest.fixture(scope="module")
def few_concurrencies() -> Iterator[None]:
    """The load is simulated for three of the seven, which takes half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serving_module, "CONCURRENCY", FEW)
        yield


def made_trace(seed: int, rate: float, prompts: int = 6, rounds: int = 8) -> pd.DataFrame:
    """Whole blocks of which each slot is accepted at about this rate; confidences say so."""
    rng = np.random.default_rng(seed)
    places = product(range(prompts), range(rounds), range(SLOTS))
    table = pd.DataFrame(places, columns=["prompt", "round", "slot"])
    rates = np.clip(rate + rng.normal(0, 0.1, len(table)), 0.05, 0.95)
    drawn = pd.Series(rng.random(len(table)) < rates)
    known = {"domain": "none", "token": 1, "draft_prob": 0.5, "target_prob": 0.5}
    return table.assign(
        **known,
        position=10 * table["round"] + table["slot"],
        **dict.fromkeys(("accept_prob", "accept_rate", "confidence"), rates),
        verified=True,
        accepted=drawn.groupby([table["prompt"], table["round"]]).cummin(),
        resampled=pd.NA,
    )


COLD, HOT = made_trace(0, 0.8), made_trace(1, 0.4)
PARTS = {0.0: COLD, 1.0: HOT}
TRACE = pd.concat([COLD.assign(temperature=0.0), HOT.assign(temperature=1.0)], ignore_index=True)
CURVE = StepsPerSecond(np.array([1, 16, 64]), np.array([100.0, 80.0, 20.0]), 128, "imaginary")
ENGINE = Engine(
    CURVE,
    requests=np.array([1, 16]),
    draft=np.array([[0.001, 0.0015, 0.002], [0.004, 0.005, 0.006]]),
    rest=np.full(2, 0.001),
    plain_rest=np.full(2, 0.0005),
)
OPTIONS: dict[str, Any] = {"trace": TRACE, "engine": ENGINE, "requests_simulated": 4}


def shown(**options: Any) -> Explorer:
    return explore_serving(**(OPTIONS | options))


@pytest.fixture(scope="module")
def explored(few_concurrencies: None) -> Explorer:
    """An explorer whose controls every test sets."""
    return shown()


def put(explorer: Explorer, **settings: Any) -> None:
    """Moves controls in a running loop, where quick moves are one redraw."""

    async def move() -> None:
        for name, value in settings.items():
            explorer.controls[name].value = value
        await asyncio.sleep(0.02)

    asyncio.run(move())


SETTINGS: list[dict[str, Any]] = [
    {"draft_length": 3, "temperature": 1.0, "requests": 1, "threshold": 0.3, "replay": False},
    {"draft_length": 2, "temperature": 0.0, "requests": 8, "threshold": 0.5, "replay": True},
    {"draft_length": 1, "temperature": 1.0, "requests": 64, "threshold": 0.0, "replay": False},
]
settings = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: f"K {s['draft_length']}")


def loads(
    own: pd.DataFrame, draft_length: int, threshold: float | None, requests: int = 4, seed: int = 0
) -> pd.DataFrame:
    """Plain decoding, the length, and where there is a confidence head, both others."""
    policies = {serving.FixedLength(0): 1, serving.FixedLength(draft_length): draft_length}
    if threshold is not None:
        policies |= {serving.StaticThreshold(threshold): SLOTS, serving.PrefixScheduler(): SLOTS}
    drawn = {"requests": requests, "seed": seed}
    tables = [
        serving.load_table(own, ENGINE, [policy], FEW, draft_length=drafted, **drawn)
        for policy, drafted in policies.items()
    ]
    return pd.concat(tables, ignore_index=True)


def said(explorer: Explorer) -> list[str]:
    """The sentences and the export below the picture."""
    shown = picture(explorer).value
    assert shown.startswith("<img ")
    found = re.findall(r"<(?:p|pre)(?: [^>]*)?>(.*?)</(?:p|pre)>", shown, flags=re.DOTALL)
    return [unescape(text) for text in found]


@settings
def test_tables_and_sentences_are_what_the_library_says_of_the_chosen_settings(explored, settings):
    put(explored, **settings, export="json")
    k, temperature = settings["draft_length"], settings["temperature"]
    own, costs = PARTS[temperature], ENGINE.costs(settings["requests"], replay=settings["replay"])
    profile = acceptance_profile(own)
    wanted = {
        "speedup": speedup_table(profile, costs),
        "load": loads(own, k, settings["threshold"]),
        "temperatures": serving.temperature_table(TRACE, costs),
        "thresholds": serving.threshold_table(own, costs, draft_lengths=[k]),
        "profile": profile.table(),
        "steps": CURVE.table,
    }
    assert list(explored.tables) == [*wanted, "settings", "recommended"]
    for name, table in wanted.items():
        pd.testing.assert_frame_equal(explored.tables[name], table, obj=name)
    pd.testing.assert_frame_equal(explored.table, wanted["speedup"])
    chosen = ServingSettings(k, settings["threshold"], block_size=SLOTS, temperature=temperature)
    assert explored.tables["settings"].to_dict("records") == [vars(chosen)]
    # Below the picture stands what to choose.
    first, second, third, *_, exported = said(explored)
    assert first == serving.advice(acceptance_profile(own, temperature=temperature), costs)
    speedups, here = wanted["speedup"], wanted["load"]
    fastest = int(speedups.loc[speedups["speedup"].idxmax(), "draft_length"])
    thresholds = serving.threshold_table(own, costs, draft_lengths=[fastest])
    best = thresholds.loc[thresholds["speedup"].idxmax()]
    assert f"best static threshold is {best['threshold']:g}: {best['speedup']:.2f} " in second
    here = here[here["concurrency"] == settings["requests"]]
    in_order = here.sort_values("policy", key=lambda names: names.map(third.index))
    assert len(here) == 4 and in_order["throughput"].is_monotonic_decreasing
    for row in here.itertuples():
        words = f"{row.policy} {row.throughput:.0f} tokens/s, {row.per_user:.0f} for each user"
        assert words in third
    assert exported == export(chosen, "json")
    # What is recommended is exported as well, and can be used at once.
    advised = {"draft_length": fastest, "threshold": best["threshold"]}
    assert explored._frame.recommended == advised
    both = ServingSettings(*advised.values(), block_size=SLOTS, temperature=temperature)
    assert explored.tables["recommended"].to_dict("records") == [vars(both)]
    assert export(both, "json") in said(explored)


def test_the_picture_is_the_composite_of_what_the_tables_hold(monkeypatch):
    drawn = Mock(side_effect=serving_module.plot_serving)
    monkeypatch.setattr(serving_module, "plot_serving", drawn)
    explorer = shown(draft_length=2, temperature=0.0, requests=8, replay=True)
    assert explorer.tables
    [((speedups, load), options)] = drawn.call_args_list
    assert list(speedups) == ["T 0", "T 1"]
    for temperature, table in zip((0.0, 1.0), speedups.values(), strict=True):
        profile = acceptance_profile(PARTS[temperature])
        wanted = speedup_table(profile, ENGINE.costs(8, replay=True))
        pd.testing.assert_frame_equal(table, wanted)
    pd.testing.assert_frame_equal(load, explorer.tables["load"])
    assert options == {"bold": "T 0", "draft_length": 2, "requests": 8, "replay": True}
    assert Image.open(io.BytesIO(explorer._frame.png)).size == (803, 616)


def test_what_was_worked_out_once_is_not_worked_out_again(monkeypatch):
    watched = Mock()
    for name in ("acceptance_profile", "answers_of", "load_table", "plot_serving"):
        module = serving_module if name == "plot_serving" else serving
        getattr(watched, name).side_effect = getattr(module, name)
        monkeypatch.setattr(module, name, getattr(watched, name))

    def calls() -> dict[str, int]:
        """Since the last time."""
        assert explorer.tables
        made = Counter(name for name, *_ in watched.method_calls)
        watched.reset_mock()
        return made

    explorer = shown()
    # Of each temperature once; plain decoding, three lengths, one threshold and the scheduler.
    once = {"acceptance_profile": 2, "answers_of": 2, "load_table": 2 * 6, "plot_serving": 1}
    assert calls() == once
    seen = {explorer._frame.png}
    moves = {"draft_length": 1, "temperature": 0.0, "requests": 8, "replay": True}
    for name, value in moves.items():
        put(explorer, **{name: value})
        assert calls() == {"plot_serving": 1} and explorer._frame.png not in seen
        seen.add(explorer._frame.png)
    put(explorer, export="json")
    assert "load_table" not in calls()
    put(explorer, threshold=0.45)
    assert calls()["load_table"] == 1
    put(explorer, threshold=0.3)
    put(explorer, threshold=0.45)
    assert "load_table" not in calls()


def test_the_chosen_values_are_exported_as_text_or_a_sentence_says_why_not(explored):
    put(explored, **SETTINGS[0] | {"threshold": 0.0})
    for kind in ("json", *SERVERS):
        put(explored, export=kind)
        settings = ServingSettings(3, block_size=SLOTS, temperature=SETTINGS[0]["temperature"])
        assert said(explored)[-1] == export(settings, kind)
        block = picture(explored).value.split("<pre>")[1]
        assert '"' not in block and "'" not in block, "escaped"
    put(explored, threshold=0.3, export="vllm")
    assert "vllm has no threshold on the confidence of a slot" in said(explored)[-1]
    assert 'role="alert"' in picture(explored).value and explored.tables


def test_a_drafter_without_a_confidence_head_has_neither_threshold_nor_scheduler():
    bare = TRACE.assign(confidence=np.nan)
    explorer = shown(trace=bare, export="vllm")
    assert "thresholds" not in explorer.tables
    pd.testing.assert_frame_equal(explorer.tables["load"], loads(HOT, SLOTS, None))
    assert "no confidence head: no threshold and no scheduler" in said(explorer)[1]
    assert explorer.controls["threshold"].disabled
    settings = ServingSettings(SLOTS, block_size=SLOTS, temperature=1.0)
    assert said(explorer)[-1] == export(settings, "vllm")
    assert explorer.tables["settings"]["threshold"].tolist() == [0.0]


def test_an_engine_of_shorter_blocks_limits_the_length_and_leaves_whole_blocks_out():
    short, long = (Engine.of(CURVE, slots, draft_seconds=0.002) for slots in (2, 9))
    explorer = shown(engine=short)
    assert explorer.controls["draft_length"].max == explorer.settings["draft_length"] == 2
    assert "Blocks have 3 slots and the engine knows 2" in said(explorer)[1]
    assert set(explorer.tables["load"]["policy"]) == {"plain decoding", "fixed 2"}
    assert shown(engine=long).controls["draft_length"].max == SLOTS


def test_of_short_answers_only_lengths_that_every_temperature_reached_are_shown():
    short = {"prompts": TEXTS[:2], "max_new_tokens": 4}
    runs = {t: answers(drafter(), **short, temperature=t) for t in (0.0, 0.5)}
    reached = [acceptance_profile(run.trace, temperature=t).longest for t, run in runs.items()]
    assert reached == [2, 1]
    options = {"engine": ENGINE, "temperatures": (0.0, 0.5)}
    explorer = explore_serving(target(), drafter(), **short, **options)
    assert explorer.controls["draft_length"].max == explorer.settings["draft_length"] == 1
    assert explorer.tables["temperatures"]["draft_length"].tolist() == [1, 1]
    assert explorer.tables["temperatures"]["tau"].notna().all()
    with pytest.raises(ValueError, match="trace must hold a drafted slot, got none"):
        shown(trace=TRACE[:0])


def test_answers_without_a_round_are_said_with_what_to_change():
    message = "at temperature 1 every answer ended before a round: max_new_tokens must be larger"
    options = {"engine": ENGINE, "temperatures": (1.0,), "max_new_tokens": 2}
    explorer = explore_serving(target(), drafter(), TEXTS, **options)
    with pytest.raises(ValueError, match=f"{message}.* got 2"):
        explorer.table  # noqa: B018


def test_controls_start_where_they_are_told_or_at_the_longest_draft_and_the_highest_temperature():
    start = SETTINGS[1] | {"threshold": 0.65, "export": "json"}
    explorer = shown(**start)
    assert explorer.settings == start
    controls = explorer.controls
    assert controls["temperature"].options == (0.0, 1.0) and controls["requests"].options == FEW
    assert controls["export"].options == ("json", *SERVERS)
    assert (controls["threshold"].min, controls["threshold"].max) == (0, 1)
    assert controls["draft_length"].min == 1
    assert [control.description for control in controls.values()] == list(controls)
    free, cold = shown(), shown(trace=TRACE[TRACE["temperature"] == 0.0])
    assert free.settings == SETTINGS[0] | {"export": "dspark-lab"}
    assert not free.controls["threshold"].disabled
    assert cold.controls["temperature"].options == (0.0,) and cold.settings["temperature"] == 0.0


def test_trace_and_engine_may_be_files(tmp_path, explored):
    save_trace(TRACE, tmp_path / "trace.parquet")
    ENGINE.save(tmp_path / "engine.csv")
    put(explored, **SETTINGS[0])
    for kind in (Path, str):
        trace, engine = kind(tmp_path / "trace.parquet"), kind(tmp_path / "engine.csv")
        explorer = shown(trace=trace, engine=engine)
        for name in ("speedup", "load", "thresholds"):
            pd.testing.assert_frame_equal(explorer.tables[name], explored.tables[name])


def test_a_trace_of_one_temperature_needs_to_be_told_which():
    explorer = shown(trace=HOT, temperature=0.7)
    assert explorer.controls["temperature"].options == (0.7,)
    pd.testing.assert_frame_equal(
        explorer.table, speedup_table(acceptance_profile(HOT), ENGINE.costs())
    )
    with pytest.raises(ValueError, match="trace or call must have a temperature, got neither"):
        shown(trace=HOT)


def test_of_several_drafters_one_is_named():
    second = HOT.assign(drafter="two", temperature=1.0)
    both = pd.concat([TRACE.assign(drafter="one"), second], ignore_index=True)
    two = shown(trace=both, drafter="two")
    assert two.controls["temperature"].options == (1.0,)
    assert two.tables["settings"]["drafter"].tolist() == ["two"]
    one = shown(trace=both, drafter="runs/one")
    assert one.controls["temperature"].options == (0.0, 1.0)
    assert one.tables["settings"]["drafter"].tolist() == ["runs/one"]
    alone = shown(trace=both[both["drafter"] == "one"])
    pd.testing.assert_frame_equal(alone.table, one.table)
    for given, named in ((None, "DRAFTER"), ("three", "three")):
        with pytest.raises(ValueError, match=rf"name of one of \['one', 'two'\], got '{named}'"):
            shown(trace=both, drafter=given)
    with pytest.raises(ValueError, match=r"name of one of \['one'\], got 'two'"):
        shown(trace=TRACE.assign(drafter="one"), drafter="two")


def test_confidences_are_scaled_and_requests_simulated_as_told(explored):
    calibrated = SequentialTemperatures((0.25,) * SLOTS)
    put(explored, **SETTINGS[0])
    scaled, raw = shown(calibrated=calibrated), explored
    options = {"draft_lengths": [SLOTS], "calibrated": calibrated}
    wanted = serving.threshold_table(HOT, ENGINE.costs(), **options)
    pd.testing.assert_frame_equal(scaled.tables["thresholds"], wanted)
    assert not scaled.tables["thresholds"].equals(raw.tables["thresholds"])
    verified = [e.tables["load"].set_index("policy")["verified_per_request"] for e in (scaled, raw)]
    assert not verified[0]["threshold 0.3"].equals(verified[1]["threshold 0.3"])
    assert verified[0]["fixed 3"].equals(verified[1]["fixed 3"])
    wanted = loads(HOT, SLOTS, 0.3, requests=7, seed=5)
    pd.testing.assert_frame_equal(shown(requests_simulated=7, seed=5).tables["load"], wanted)


def test_a_target_and_a_drafter_are_decoded_at_each_temperature():
    options = {"max_new_tokens": 12, "seed": 3}
    engine = Engine.of(CURVE, 2, draft_seconds=0.002)
    explorer = explore_serving(
        target(), drafter(), TEXTS, engine=engine, temperatures=(0.5, 1.5), **options
    )
    assert explorer.controls["temperature"].options == (0.5, 1.5)
    for temperature in (0.5, 1.5):
        explorer.controls["temperature"].value = temperature
        run = answers(drafter(), TEXTS, temperature=temperature, **options)
        profile = acceptance_profile(run.trace).table()
        pd.testing.assert_frame_equal(explorer.tables["profile"], profile)


def test_an_engine_that_is_not_given_is_measured_on_these_models(monkeypatch):
    measured = Mock(return_value=ENGINE)
    monkeypatch.setattr(serving, "measure_engine", measured)
    monkeypatch.setattr(Models, "decode", None)
    options = {"trace": TRACE, "requests_simulated": 2, "seed": 4}
    explorer = explore_serving(target(), {"mine": drafter()}, TEXTS, **options)
    assert explorer.tables
    (given, options) = measured.call_args
    assert given == (target(), drafter()) and options["seed"] == 4
    pd.testing.assert_frame_equal(explorer.tables["steps"], CURVE.table)
    assert explorer.tables["settings"]["drafter"].tolist() == ["mine"]


def test_with_trace_and_engine_no_model_is_loaded(monkeypatch):
    for name in ("open_models", "load_traces"):
        monkeypatch.setattr(serving_module, name, None)
    monkeypatch.setattr(serving, "load_engine", None)
    explorer = explore_serving("no/such-target", "no/such-drafter", **OPTIONS)
    assert explorer.tables["settings"]["drafter"].tolist() == ["no/such-drafter"]


def test_without_arguments_and_with_prompts_alone_the_pocket_pair_is_shown():
    shipped = explore_serving(requests_simulated=2)
    traces = load_traces("pocket")
    own = traces[(traces["drafter"] == "dspark-k7") & (traces["temperature"] == 1.0)]
    costs = serving.load_engine().costs()
    pd.testing.assert_frame_equal(shipped.table, speedup_table(acceptance_profile(own), costs))
    assert shipped.settings["draft_length"] == shipped.controls["draft_length"].max == 7
    few = {"temperatures": (1.0,), "max_new_tokens": 6, "requests_simulated": 2}
    asked = explore_serving(prompts=["Hello", "What is 2 + 3?"], **few)
    assert asked.controls["temperature"].options == (1.0,)
    for explorer in (shipped, asked):
        assert explorer.tables["settings"]["drafter"].tolist() == ["dspark-k7"]
        pd.testing.assert_frame_equal(explorer.tables["steps"], serving.load_engine().sps.table)


def step_costs(folder: Path) -> Path:
    """A server's table of one step cost more for each request: 10 ms and 1 ms a token."""
    path = folder / "costs.json"
    sps = StepsPerSecond(np.array([1, 101]), 1 / np.array([0.010, 0.110]), 0, "costs.json")
    save_step_costs(Engine.of(sps, SLOTS, draft_seconds={1: 0.0, 11: 0.005}), path)
    return path


UNKNOWN = "it says how much to verify, but not whether to draft at all"


def test_a_servers_step_costs_are_an_engine_of_which_is_said_what_it_cannot_tell(tmp_path):
    path = step_costs(tmp_path)
    facts: dict[str, Any] = {"context_length": 0, "device": "costs.json"}
    known = load_step_costs(path, block_size=SLOTS, **facts)
    for engine in (path, str(path), known):
        explorer = shown(engine=engine, requests=8)
        # Blocks of K slots take a step of 8 (K + 1) tokens, and 7 requests more than 1.
        seconds = [0.010 + 0.001 * (8 * (k + 1) - 1) + 0.0005 * 7 for k in (1, 2, 3)]
        assert explorer.table["round_seconds"].tolist() == pytest.approx(seconds)
        assert explorer.tables["steps"]["device"].unique().tolist() == ["costs.json"]
        assert explorer.tables["steps"]["context_length"].unique().tolist() == [0]
        assert [UNKNOWN in text for text in said(explorer)].count(True) == 1
        assert UNKNOWN in said(explorer)[1]
    ENGINE.save(tmp_path / "engine.csv")
    assert not any(UNKNOWN in text for text in said(shown(engine=tmp_path / "engine.csv")))


def test_a_step_cost_table_has_the_slots_of_what_is_decoded_and_is_refused_before(tmp_path):
    path = step_costs(tmp_path)
    explorer = explore_serving(target(), drafter(), TEXTS, engine=path, max_new_tokens=12)
    assert explorer.controls["draft_length"].max == explorer.table["draft_length"].max() == 2
    assert any(UNKNOWN in text for text in said(explorer))
    path.write_text("{}")
    with pytest.raises(ValueError, match="costs.json must have bias_seconds, sample_batch_tokens"):
        explore_serving(target(), drafter(), TEXTS, engine=path)


DECODED: dict[str, Any] = {"trace": None, "target": target(), "prompts": TEXTS}
TWO = {"a": drafter(), "b": drafter(2)}
CUT = TRACE.assign(verified=TRACE["verified"] & (TRACE["slot"] < 2), accepted=False)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"export": "mlx"}, ValueError, r"export must be one of \('json', .*, got 'mlx'"),
        ({"requests": 3}, ValueError, r"requests must be one of \(1, 8, 64\), got 3"),
        ({"temperature": 0.3}, ValueError, r"temperature must be one of \(0.0, 1.0\), got 0.3"),
        ({"draft_length": 4}, ValueError, "draft_length must be at most 3, got 4"),
        ({"engine": None}, ValueError, "engine must be given with a trace, or a target"),
        ({"trace": "no-such.parquet"}, OSError, "no-such"),
        ({"engine": "no-such.csv"}, OSError, "no-such"),
        (DECODED | {"drafter": TWO}, ValueError, r"drafter must be one, got \['a', 'b'\]"),
        (DECODED, ValueError, "target and drafter must be given together"),
        ({"trace": CUT}, ValueError, "trace must be of whole blocks"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_explored_is_refused_in_one_sentence(arguments, error, match):
    with pytest.raises(error, match=match):
        shown(**arguments)


def test_the_code_of_a_view_makes_it_again():
    explorer = shown(draft_length=2)
    put(explorer, requests=8, replay=True, threshold=0.45, temperature=0.0)
    require_same_view(explorer, trace=TRACE, engine=ENGINE)


def test_what_a_server_counted_stands_for_a_trace(tmp_path: Path):
    path = tmp_path / "requests.jsonl"
    steps = [[2, 0, 1, 2], [0, 2, 2, 1, 0]]
    rows = [
        {"id": name, "per_step_accepted": one, "per_step_drafted": [2] * len(one)}
        for name, one in zip("ab", steps, strict=True)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    engine = serving.load_engine()
    explorer = explore_serving(record=path, engine=engine, requests_simulated=4)
    record = load_acceptance(path)
    expected = speedup_table(record.profile(), engine.costs(1, replay=False))
    shown = explorer.tables["speedup"]
    pd.testing.assert_frame_equal(shown, expected)
    assert shown["tau"].iloc[1] == pytest.approx(1 + (6 + 4) / 9)
    assert "thresholds" not in explorer.tables
    assert set(explorer.tables["load"]["policy"]) == {"plain decoding", "fixed 2"}
    html = unescape(explorer._frame.html)
    assert "A record has no confidences" in html and "it is taken to be 1" in html
    assert "shipped pocket pair" not in html
    told = explore_serving(record=record, temperature=0.7, requests_simulated=4)
    assert told.tables["recommended"]["temperature"].tolist() == [0.7]
    html = unescape(told._frame.html)
    assert "shipped pocket pair" in html and "taken to be" not in html
    with pytest.raises(ValueError, match="a record must stand alone"):
        explore_serving(record=record, prompts=["one"])


def served(path: Path, heats: list[float | None]) -> list[dict[str, Any]]:
    """Requests of five rounds of two slots, each at its temperature, and the same as rows."""
    rng, rows = np.random.default_rng(0), []
    for number, heat in enumerate(heats):
        accepted = rng.integers(0 if heat else 1, 3, 5).tolist()
        row = {"id": str(number), "per_step_accepted": accepted, "per_step_drafted": [2] * 5}
        rows.append(row if heat is None else row | {"temperature": heat})
    path.write_text("\n".join(map(json.dumps, rows)))
    return rows


def test_a_record_of_several_temperatures_has_a_profile_of_each(tmp_path: Path):
    rows = served(tmp_path / "rows.jsonl", [0.0, 0.7, 0.0, 0.7, 0.7])
    record = load_acceptance(tmp_path / "rows.jsonl")
    options: dict[str, Any] = {"record": record, "engine": ENGINE, "requests_simulated": 4}
    explorer = explore_serving(**options)
    assert explorer.controls["temperature"].options == (0.0, 0.7)
    assert explorer.settings["temperature"] == 0.7
    for heat in (0.7, 0.0):
        put(explorer, temperature=heat)
        own = [row["per_step_accepted"] for row in rows if row["temperature"] == heat]
        rounds = [count for one in own for count in one]
        tau = 1 + sum(rounds) / len(rounds)
        assert explorer.table["tau"].iloc[-1] == pytest.approx(tau)
        part = record.part(temperature=heat).profile()
        pd.testing.assert_frame_equal(explorer.table, speedup_table(part, ENGINE.costs()))
        pd.testing.assert_frame_equal(explorer.tables["profile"], part.table())
        assert explorer.tables["settings"]["temperature"].tolist() == [heat]
        assert f"at temperature {heat:g}" in said(explorer)[0]
        assert not any("temperature" in text for text in said(explorer)[1:-2])
        # The answers that are simulated are those of the temperature.
        alone = explore_serving(**options | {"record": record.part(temperature=heat)})
        pd.testing.assert_frame_equal(explorer.tables["load"], alone.tables["load"])
    assert explorer.tables["temperatures"]["temperature"].tolist() == [0.0, 0.7]
    assert explore_serving(**options, temperature=0.0).settings["temperature"] == 0.0
    with pytest.raises(ValueError, match=r"temperature must be one of \(0.0, 0.7\), got 0.5"):
        explore_serving(**options, temperature=0.5)


def test_lines_of_a_record_without_a_temperature_are_left_out_where_others_say_one(tmp_path):
    rows = served(tmp_path / "rows.jsonl", [0.5, None, 0.5])
    record = load_acceptance(tmp_path / "rows.jsonl")
    explorer = explore_serving(record=record, engine=ENGINE, requests_simulated=4)
    assert explorer.controls["temperature"].options == (0.5,)
    rounds = rows[0]["per_step_accepted"] + rows[2]["per_step_accepted"]
    assert explorer.table["tau"].iloc[-1] == pytest.approx(1 + sum(rounds) / 10)
    html = unescape(explorer._frame.html)
    assert "1 of 3 lines say no temperature and are left out" in html
    assert "taken to be 1" not in html


def test_temperatures_whose_rounds_reached_other_slots_are_shown_together(tmp_path):
    rows = [
        {"id": "a", "temperature": 1.0, "per_step_accepted": [2, 1], "per_step_drafted": [3, 3]},
        {"id": "b", "temperature": 0.0, "per_step_accepted": [1, 0], "per_step_drafted": [1, 1]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    explorer = explore_serving(record=path, engine=step_costs(tmp_path), requests_simulated=4)
    assert explorer.controls["draft_length"].max == 1
    assert explorer.table["draft_length"].tolist() == [1, 2, 3]
    assert explorer.tables["settings"]["block_size"].tolist() == [3]
    put(explorer, temperature=0.0)
    assert explorer.table["tau"].dropna().tolist() == [1.5]
    assert any(UNKNOWN in text for text in said(explorer))
