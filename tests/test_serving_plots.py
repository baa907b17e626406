"""what is drawn is what the tables say, on any page.

Tables come from the library's own functions on profiles and costs made by hand, so that it is known
beforehand which draft lengths win and which lose.
"""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from test_decode_plots import labelled, points, shown, tick_names, words

from dspark_lab.explore import (
    plot_load,
    plot_round,
    plot_schedule,
    plot_serving,
    plot_speedup,
    plot_steps,
    plot_temperatures,
    plot_thresholds_speed,
)
from dspark_lab.explore.style import BLUE, INK, ORANGE, RED
from dspark_lab.serving import (
    AcceptanceProfile,
    RoundCosts,
    StepsPerSecond,
    schedule_table,
    speedup_table,
)
from tests.pictures import gallery, has_mid_grey_words, has_no_background, vanishes_nowhere

COSTS = RoundCosts.of(
    4, plain_seconds=0.010, draft_seconds=0.004, verify_seconds=[0.010, 0.011, 0.012, 0.013, 0.014]
)


def speedup(*rates: float, replay: bool = False, rollback: float = 0.0) -> pd.DataFrame:
    """As `speedup_table` gives it, with intervals made up."""
    costs = RoundCosts.of(
        4,
        plain_seconds=0.010,
        draft_seconds=0.004,
        verify_seconds=COSTS.verify_seconds,
        replay=replay,
        rollback_seconds=rollback,
        overhead_seconds=0.001,
    )
    table = speedup_table(AcceptanceProfile(np.array(rates), np.empty((0, 4))), costs)
    bounds = {"speedup_low": table["speedup"] - 0.05, "speedup_high": table["speedup"] + 0.04}
    return table.assign(**bounds)


# 4 is the fastest of the first; nothing of the second pays.
GOOD, BAD = speedup(0.9, 0.9, 0.9, 0.9), speedup(0.4, 0.3, 0.3, 0.3)
REPLAYED = speedup(0.9, 0.8, 0.6, 0.5, replay=True, rollback=0.001)
TEMPERATURES = pd.DataFrame(
    {
        "temperature": [0.0, 0.5, 1.0],
        "draft_length": [4, 4, 4],
        "accept_rate": [0.8, 0.7, 0.5],
        "break_even_rate": [0.6, 0.65, np.inf],
        "break_even_without_replay": [0.5, 0.55, 0.6],
        "speedup": [1.3, 1.1, 0.8],
        "speedup_low": [1.2, 0.95, 0.7],
        "speedup_high": [1.45, 1.2, 0.9],
        "without_replay": [1.5, 1.2, 0.95],
    }
)
THRESHOLDS = pd.DataFrame(
    {
        "draft_length": [2] * 3 + [4] * 3,
        "threshold": [0.0, 0.4, 0.8] * 2,
        "verified": [2.0, 1.5, 0.5, 4.0, 2.5, 0.7],
        "speedup": [1.1, 1.2, 0.7, 0.9, 1.3, 0.8],
    }
)
THRESHOLDS = THRESHOLDS.assign(
    speedup_low=THRESHOLDS["speedup"] - 0.1, speedup_high=THRESHOLDS["speedup"] + 0.2
)
POLICIES = ("plain decoding", "fixed 4", "threshold 0.3", "prefix scheduler")
LEVELS = (1, 2, 4, 8, 16, 32, 64)
LOAD = pd.DataFrame(
    [
        {
            "policy": policy,
            "concurrency": level,
            "throughput": 100.0 * level / (1 + level / (10 + 5 * i)),
            "per_user": (100.0 + i) / (1 + level / 10),
            "verified_per_request": 20.0 * i + level / 16 * (i == 3),
        }
        for i, policy in enumerate(POLICIES)
        for level in LEVELS
    ]
)
STEPS = StepsPerSecond(np.array([1, 2, 3]), np.array([1.0, 0.5, 0.45]), 0, "imaginary $x$ $y$")
# Slot 1 raises Theta only with the slot behind it.
SCHEDULE = schedule_table(np.array([[0.8, 0.9]]), STEPS)
SMOOTH = StepsPerSecond(np.array([1, 64]), np.array([100.0, 50.0]), 128, "cpu")


def serving(replay: bool = False) -> Figure:
    tables = {"T 0": REPLAYED if replay else GOOD, "T 1": BAD}
    return plot_serving(tables, LOAD, bold="T 0", draft_length=3, requests=4, replay=replay)


PICTURES: dict[str, Callable[[], Figure]] = {
    "speedup": lambda: plot_speedup({"T 0": GOOD, "T 1": BAD}, chosen=2),
    "speedup of one": lambda: plot_speedup(REPLAYED),
    "bold": lambda: plot_speedup({"T 0": REPLAYED, "T 1": BAD}, bold="T 0"),
    "rounds": lambda: plot_round(REPLAYED),
    "round": lambda: plot_round(BAD, draft_length=2),
    "temperatures": lambda: plot_temperatures(TEMPERATURES),
    "thresholds": lambda: plot_thresholds_speed(THRESHOLDS, chosen=0.4),
    "load": lambda: plot_load(LOAD, concurrency=16),
    "schedule": lambda: plot_schedule(SCHEDULE),
    "steps": lambda: plot_steps(SMOOTH),
    "serving": serving,
    "serving with replay": lambda: serving(replay=True),
    "serving at five": lambda: plot_serving(
        {f"T 0.{i}": REPLAYED for i in range(5)}, LOAD, bold="T 0.2", draft_length=4, requests=64
    ),
}
pictures = pytest.mark.parametrize("picture", PICTURES)


picture_of, pixels_of = gallery(PICTURES)


@pictures
def test_a_picture_has_no_background(picture):
    has_no_background(pixels_of(picture))


@pictures
def test_nothing_in_a_picture_vanishes_on_a_black_or_a_white_page(picture):
    vanishes_nowhere(pixels_of(picture))


@pictures
def test_all_words_of_a_picture_are_mid_grey(picture):
    pixels_of(picture)
    has_mid_grey_words(picture_of(picture))


@pictures
def test_every_axis_of_a_picture_says_what_it_counts(picture):
    for axes in picture_of(picture).axes:
        assert axes.get_xlabel() and axes.get_ylabel()


@pictures
def test_the_words_of_a_picture_stand_apart_and_inside(picture):
    figure = picture_of(picture)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown(figure)]
    assert len(boxes) > 5
    for i, (text, a) in enumerate(boxes):
        assert a.x0 >= -1 and a.x1 <= figure.bbox.x1 + 1, text
        assert a.y0 >= -1 and a.y1 <= figure.bbox.y1 + 1, text
        for other, b in boxes[:i]:
            wide, high = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
            assert min(wide, high) <= 1, (text, other)


def pairs(table: pd.DataFrame, x: str, y: str) -> list[list[float]]:
    return table[[x, y]].to_numpy().tolist()


def filled(ax: Axes) -> list[list[float]]:
    """Where marks are drawn full, over all lines."""
    full = [line for line in ax.lines if line.get_fillstyle() == "full" and has_marks(line)]
    return sorted(pair for line in full for pair in points(line))


def has_marks(line) -> bool:
    return line.get_marker() not in ("None", None, "")


def rings(ax: Axes) -> list[list[float]]:
    return [pair for line in ax.lines if line.get_markersize() == 11 for pair in points(line)]


def bands(ax: Axes) -> list[tuple[float, float]]:
    """The lowest and the highest place of each shaded band between two lines."""
    found = [c.get_paths()[0].vertices[:, 1] for c in ax.collections if len(c.get_paths()) == 1]
    return [(float(heights.min()), float(heights.max())) for heights in found]


def dashed(ax: Axes) -> list[list[list[float]]]:
    return [points(line) for line in ax.lines if line.get_linestyle() == "--"]


def legend(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def title(ax: Axes) -> str:
    return ax.get_title(loc="left")


def dotted_at(ax: Axes) -> list[float]:
    """Upright dotted lines from edge to edge."""
    lines = [line for line in ax.lines if line.get_linestyle() == ":"]
    return [line.get_xdata()[0] for line in lines if list(line.get_ydata()) == [0, 1]]


def test_each_table_of_speed_up_is_a_line_with_its_band_and_its_best_length():
    [ax] = picture_of("speedup").axes
    lines = labelled(ax)
    good, bad = GOOD["speedup"], BAD["speedup"]
    assert good.idxmax() == 3 and bad.max() < 1
    best = int(BAD.loc[bad.idxmax(), "draft_length"])
    names = [f"T 0: best 4, {good[3]:.2f}", f"T 1: best {best}, {bad.max():.2f}"]
    assert list(lines) == legend(ax) == names
    for line, table in zip(lines.values(), (GOOD, BAD), strict=True):
        assert points(line) == pairs(table, "draft_length", "speedup")
    assert rings(ax) == [[4, good[3]], [best, bad.max()]]
    wanted = [(t["speedup_low"].min(), t["speedup_high"].max()) for t in (GOOD, BAD)]
    assert bands(ax) == [pytest.approx(one) for one in wanted]
    assert len({line.get_color() for line in lines.values()}) == 2
    assert len({line.get_marker() for line in lines.values()}) == 2


def test_only_marks_above_plain_decoding_are_filled_and_what_is_below_is_shaded():
    [ax] = picture_of("speedup").axes
    wins = GOOD[GOOD["speedup"] > 1]
    assert len(wins) > 2
    assert filled(ax) == pairs(wins, "draft_length", "speedup")
    assert {line.get_fillstyle() for line in labelled(ax).values()} == {"none"}
    even = speedup(0.5, 0.5, 0.5, 0.5).assign(speedup=[0.99, 1.0, 1.01, 0.5])
    assert filled(plot_speedup(even).axes[0]) == [[3, 1.01]]
    [span] = [patch for patch in ax.patches if patch.get_alpha()]
    low, high = ax.get_ylim()
    box = span.get_bbox()
    assert (box.y0, box.y1) == (low, 1) and low < BAD["speedup_low"].min() and high > 1
    assert words(ax) == ["plain", "slower"]


def test_the_line_of_plain_decoding_is_in_view_even_if_all_win_or_all_lose():
    for shift in (-5, 5):
        columns = ["speedup", "speedup_low", "speedup_high", "without_replay"]
        moved = GOOD.assign(**{name: GOOD[name] + shift for name in columns})
        [ax] = plot_speedup(moved).axes
        low, high = ax.get_ylim()
        assert low < 1 < high
        assert [1, 1] in [list(line.get_ydata()) for line in ax.lines]


def test_forgetting_replay_is_dashed_only_where_it_makes_a_difference():
    [ax] = picture_of("speedup of one").axes
    assert dashed(ax) == [pairs(REPLAYED, "draft_length", "without_replay")]
    assert legend(ax)[-1] == "forgetting replay" and legend(ax)[0].startswith("best ")
    [plain] = picture_of("speedup").axes
    assert dashed(plain) == [] and "forgetting replay" not in legend(plain)


def test_the_chosen_length_is_a_dotted_line_that_the_axis_names():
    [ax] = picture_of("speedup").axes
    assert dotted_at(ax) == [2] and ax.get_xlabel() == "draft length K (dotted 2)"
    [free] = picture_of("speedup of one").axes
    assert dotted_at(free) == [] and free.get_xlabel() == "draft length K"


def test_the_bold_table_alone_has_a_band_and_dashes_and_the_thickest_line():
    [ax] = picture_of("bold").axes
    bold, thin = labelled(ax).values()
    assert bold.get_linewidth() > thin.get_linewidth()
    wanted = (REPLAYED["speedup_low"].min(), REPLAYED["speedup_high"].max())
    assert bands(ax) == [pytest.approx(wanted)]
    assert dashed(ax) == [pairs(REPLAYED, "draft_length", "without_replay")]


def test_lengths_that_no_round_reached_leave_gaps():
    [ax] = plot_speedup({"some": speedup(0.9, 0.9, np.nan, np.nan)}).axes
    assert len(points(next(iter(labelled(ax).values())))) == 2
    [none] = plot_speedup({"none": speedup(*[np.nan] * 4)}).axes
    assert legend(none) == ["none: no rate known"] and rings(none) == []


def bars(ax: Axes) -> list[tuple[float, float, float]]:
    """Row, left end and right end of each bar, in the order of drawing."""
    boxes = [patch.get_bbox() for patch in ax.patches]
    return [((box.y0 + box.y1) / 2, box.x0, box.x1) for box in boxes]


def test_the_parts_of_a_round_follow_each_other_and_end_where_it_does():
    [ax] = picture_of("rounds").axes
    names = ["draft", "verify", "replay", "rollback", "rest"]
    assert legend(ax) == [*names, "plain steps"]
    drawn = bars(ax)
    assert len(drawn) == 6 * 4
    for row, table in enumerate(REPLAYED.itertuples()):
        parts, plain = drawn[row:-4:4], drawn[-4 + row]
        seconds = [getattr(table, f"{n}_seconds") for n in [*names[:4], "overhead"]]
        ends = 1000 * np.cumsum(seconds)
        assert [right for _, _, right in parts] == pytest.approx(ends)
        assert [left for _, left, _ in parts] == pytest.approx([0, *ends[:-1]])
        assert ends[-1] == pytest.approx(1000 * table.round_seconds)
        # As many plain steps as a round yields tokens, 10 ms each.
        assert plain[2] == pytest.approx(10 * table.tau)
        assert parts[0][0] < plain[0] < row + 0.5 and abs(parts[0][0] - row) < 0.5
    assert ax.yaxis_inverted()
    assert tick_names(ax.yaxis) == [
        f"K {k:.0f}\ntau {tau:.2f}" for k, tau in pairs(REPLAYED, "draft_length", "tau")
    ]


def test_the_parts_of_a_round_are_told_apart_without_colour_too():
    [ax] = picture_of("rounds").axes
    looks = [(to_hex(p.get_facecolor()), p.get_hatch()) for p in ax.patches[:20:4]]
    assert looks[:3] == [
        (ORANGE.lower(), "////"),
        (BLUE.lower(), None),
        (RED.lower(), "xxxx"),
    ]
    assert looks[4] == (INK, None) and len(set(looks)) == 5
    assert ax.patches[-1].get_facecolor()[3] == 0


def test_beside_a_round_stands_how_fast_it_is_in_words():
    for table, word in ((REPLAYED, "faster"), (BAD, "slower")):
        [ax] = plot_round(table).axes
        assert words(ax) == [f"{speed:.2f}, {word}" for speed in table["speedup"]]
        ends = [max(1000 * t.round_seconds, 10 * t.tau) for t in table.itertuples()]
        assert [text.xy[0] for text in ax.texts] == pytest.approx(ends)


def test_a_part_that_costs_nothing_is_not_in_the_key_and_one_length_can_be_shown_alone():
    [ax] = picture_of("round").axes
    assert legend(ax) == ["draft", "verify", "rest", "plain steps"]
    assert [right for _, _, right in bars(ax)] == pytest.approx([4, 16, 17, 10 * BAD["tau"][1]])
    assert ax.get_ylabel() == f"K 2\ntau {BAD['tau'][1]:.2f}" and len(ax.get_yticks()) == 0


def test_a_draft_length_or_concurrency_that_the_table_lacks_is_refused():
    with pytest.raises(ValueError, match=r"draft_length must be one of \[1, 2, 3, 4\], got 5"):
        plot_round(GOOD, draft_length=5)
    with pytest.raises(ValueError, match=r"concurrency must be one of \[1, 2, .*\], got 3"):
        plot_load(LOAD, concurrency=3)
    with pytest.raises(ValueError, match=r"bold must be one of \['T 0'\], got 'T 1'"):
        plot_speedup({"T 0": GOOD}, bold="T 1")
    with pytest.raises(ValueError, match="tables must hold at least one table, got none"):
        plot_speedup({})
    with pytest.raises(ValueError, match="table must hold at least one slot to admit, got none"):
        plot_schedule(SCHEDULE.iloc[:0])


def test_the_accept_rate_stands_against_both_break_even_rates():
    left, _ = picture_of("temperatures").axes
    lines = labelled(left)
    wanted = {
        "accept rate": "accept_rate",
        "break-even rate": "break_even_rate",
        "break-even, forgetting replay": "break_even_without_replay",
    }
    assert list(lines) == list(wanted)
    for name, column in wanted.items():
        known = TEMPERATURES[np.isfinite(TEMPERATURES[column])]
        assert points(lines[name]) == pairs(known, "temperature", column)
    assert len({line.get_linestyle() for line in lines.values()}) == 3
    assert tick_names(left.xaxis) == ["0", "0.5", "1"]
    [note] = left.texts
    assert note.get_text() == "no rate pays" and note.xy == (1.0, 1)


def test_what_lies_between_accept_rate_and_break_even_says_whether_it_pays():
    left, _ = picture_of("temperatures").axes
    spans = {c.get_label(): [s.tolist() for s in c.get_segments()] for c in left.collections}
    assert spans["pays"] == [[[0, 0.8], [0, 0.6]], [[0.5, 0.7], [0.5, 0.65]]]
    assert spans["does not pay"] == [[[1, 0.5], [1, 1]]]
    all_win = plot_temperatures(TEMPERATURES.iloc[:2]).axes[0]
    assert "pays" in legend(all_win) and "does not pay" not in legend(all_win)
    assert words(all_win) == []


def test_the_speed_up_by_temperature_is_filled_while_it_wins():
    _, right = picture_of("temperatures").axes
    assert points(labelled(right)["K 4"]) == pairs(TEMPERATURES, "temperature", "speedup")
    assert filled(right) == [[0, 1.3], [0.5, 1.1]]
    assert dashed(right) == [pairs(TEMPERATURES, "temperature", "without_replay")]
    assert bands(right) == [pytest.approx((0.7, 1.45))]
    same = TEMPERATURES.assign(without_replay=TEMPERATURES["speedup"])
    left, right = plot_temperatures(same).axes
    assert dashed(right) == [] and len(labelled(left)) == 2


def test_thresholds_are_shown_with_speed_and_verified_slots_for_each_length():
    left, right = picture_of("thresholds").axes
    assert list(labelled(left)) == ["K 2: best 0.4, 1.20", "K 4: best 0.4, 1.30"]
    assert list(labelled(right)) == ["K 2", "K 4"]
    for ax, column in ((left, "speedup"), (right, "verified")):
        drawn = [points(line) for line in labelled(ax).values()]
        parts = [part for _, part in THRESHOLDS.groupby("draft_length")]
        assert drawn == [pairs(part, "threshold", column) for part in parts]
        assert dotted_at(ax) == [0.4] and "(dotted 0.4)" in ax.get_xlabel()
    assert filled(left) == [[0.0, 1.1], [0.4, 1.2], [0.4, 1.3]]
    assert rings(left) == [[0.4, 1.2], [0.4, 1.3]]
    assert bands(left) == [pytest.approx((0.6, 1.4)), pytest.approx((0.7, 1.5))]


def test_each_policy_is_a_line_in_both_panels_of_the_load():
    left, right = picture_of("load").axes
    for ax, x, y in (
        (left, "per_user", "throughput"),
        (right, "concurrency", "verified_per_request"),
    ):
        lines = labelled(ax)
        assert tuple(lines) == POLICIES
        for policy, line in lines.items():
            assert points(line) == pairs(LOAD[LOAD["policy"] == policy], x, y)
        looks = {(line.get_color(), line.get_marker()) for line in lines.values()}
        assert len(looks) == 4 and lines["plain decoding"].get_color() == INK
    assert legend(left) == list(POLICIES) and right.get_legend() is None


def test_concurrencies_are_written_at_the_policy_with_the_highest_throughput_alone():
    left, right = picture_of("load").axes
    best = LOAD[LOAD["policy"] == "prefix scheduler"]
    assert LOAD["throughput"].max() == best["throughput"].max()
    named = best[best["concurrency"].isin([1, 4, 16, 64])]
    assert words(left) == ["1", "4", "16", "64"]
    assert [list(text.xy) for text in left.texts] == pairs(named, "per_user", "throughput")
    assert tick_names(right.xaxis) == ["1", "4", "16", "64"]
    few = plot_load(LOAD[LOAD["concurrency"] < 10])
    assert tick_names(few.axes[1].xaxis) == words(few.axes[0]) == ["1", "2", "4", "8"]


def test_concurrencies_are_evenly_spaced_from_doubling_to_doubling():
    pixels_of("load")
    right = picture_of("load").axes[1]
    places = right.transData.transform([[level, 0] for level in LEVELS])[:, 0]
    assert np.diff(places) == pytest.approx(np.diff(places)[0])


def test_the_chosen_concurrency_is_ringed_and_dotted():
    left, right = picture_of("load").axes
    chosen = LOAD[LOAD["concurrency"] == 16]
    assert rings(left) == pairs(chosen, "per_user", "throughput")
    assert dotted_at(right) == [16] and "(dotted 16)" in right.get_xlabel()
    left, right = plot_load(LOAD).axes
    assert rings(left) == [] and dotted_at(right) == []


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


def test_a_scheduler_that_stops_inside_fills_the_marks_up_to_there():
    steep = StepsPerSecond(np.array([1, 5]), np.array([1.0, 0.4]), 0, "imaginary")
    table = schedule_table(np.array([[0.9, 0.5], [0.8, 0.1]]), steep)
    count = int(table["admitted"].sum())
    assert 0 < count < len(table)
    [ax] = plot_schedule(table).axes
    assert [x for x, _ in filled(ax)] == list(range(count + 1))
    assert f"prefix scheduler: stops at {count}" in legend(ax)
    rng = np.random.default_rng(0)
    [large] = plot_schedule(schedule_table(rng.random((32, 7)), SMOOTH)).axes
    assert filled(large) == [] and len(points(large.lines[0])) == 32 * 7 + 1


def test_steps_are_drawn_in_milliseconds_and_tokens_a_second_with_what_lies_between():
    left, right = picture_of("steps").axes
    for ax, low, middle, high in ((left, 10, 15, 20), (right, 100, None, 64 * 50)):
        line, marks = ax.lines
        assert points(marks) == [pytest.approx([1, low]), pytest.approx([64, high])]
        between = dict(points(line))
        assert between[1] == pytest.approx(low) and between[64] == pytest.approx(high)
        if middle is not None:
            # Linear in tokens.
            assert between[32] == pytest.approx(10 + 10 * 31 / 63)
        assert tick_names(ax.xaxis) == ["1", "64"] and ax.get_xscale() == "log"
    assert title(left) == "cpu, context 128"


def test_steps_may_come_as_their_table_and_words_with_dollars_stay_words():
    given, table = plot_steps(STEPS), plot_steps(STEPS.table)
    for a, b in zip(given.axes, table.axes, strict=True):
        assert [points(x) for x in a.lines] == [points(x) for x in b.lines]
    assert title(given.axes[0]) == r"imaginary \$x\$ \$y\$, context 0"
    [ax] = plot_speedup({"$a$ $b$": GOOD}).axes
    assert legend(ax)[0].startswith(r"\$a\$ \$b\$: best")


def test_the_composite_is_made_of_the_four_pictures():
    figure = picture_of("serving")
    one, two, three, four = figure.axes
    [alone] = plot_speedup({"T 0": GOOD, "T 1": BAD}, chosen=3, bold="T 0").axes
    [round_] = plot_round(GOOD, draft_length=3).axes
    load = plot_load(LOAD, concurrency=4).axes
    for ours, wanted in zip((one, two, three, four), (alone, round_, *load), strict=True):
        assert [points(line) for line in ours.lines] == [points(line) for line in wanted.lines]
        assert bars(ours)[-4:] == bars(wanted)[-4:] and bands(ours) == bands(wanted)
        assert words(ours) == words(wanted)
        assert (ours.get_xlabel(), ours.get_ylabel()) == (wanted.get_xlabel(), wanted.get_ylabel())
    assert title(one) == "4 requests a step" and title(two) == "a round, T 0"
    assert figure.get_size_inches().tolist() == [9.5, 5.6]


def test_panels_of_the_composite_stand_two_by_two():
    boxes = [ax.get_position() for ax in picture_of("serving").axes]
    assert boxes[0].x0 == boxes[2].x0 < boxes[1].x0 == boxes[3].x0
    assert boxes[0].y0 == boxes[1].y0 > boxes[2].y1 == boxes[3].y1


def test_with_replay_the_composite_says_that_the_simulated_load_has_none():
    assert title(picture_of("serving").axes[2]) == "simulated load"
    assert title(picture_of("serving with replay").axes[2]) == "simulated load, without replay"
    assert "forgetting replay" in legend(picture_of("serving with replay").axes[0])
    assert (
        title(plot_serving({"a": GOOD}, LOAD, bold="a", draft_length=1, requests=1).axes[0])
        == "1 request a step"
    )
