"""what is drawn is what the tables say, on any page.

Pictures are looked at through what is drawn: the data of lines, bars, marks and cells, the words,
and the PNG's pixels. Tables are made by hand.
"""

from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from test_decode_plots import points, shown, tick_names

from dspark_lab.explore import (
    plot_budget,
    plot_fit,
    plot_front,
    plot_parts,
    plot_slots,
    plot_sweeps,
)
from dspark_lab.explore.style import BLUE, GREEN, INK, ORANGE, RED
from tests.pictures import gallery, has_mid_grey_words, has_no_background, vanishes_nowhere

NAN = float("nan")


def fit(*numbers: int, block_size: int = 7) -> pd.DataFrame:
    """As `fit_table` gives them, rows of 256, 512, ...; where the row is the limit, all but one."""
    seq_len = 2 ** (8 + np.arange(len(numbers)))
    return pd.DataFrame(
        {
            "seq_len": seq_len,
            "block_size": block_size,
            "num_anchors": numbers,
            "held": 10**9,
            "full": np.array(numbers) < seq_len - 1,
        }
    )


FIT = pd.concat([fit(255, 511, 600, 500), fit(255, 300, 290, 200, block_size=15)])
NONE_LEFT = fit(255, 100, 3, 0)

COST = pd.DataFrame(
    {"part": ["target forward", "MLP", "optimiser"], "operations": [6e12, 3.999e12, 1e9]}
)
MEMORY = pd.DataFrame(
    {"part": ["weights", "gradients"], "held": [3_000_000_000, 0], "moment": "heads backward"}
)
SLOTS = pd.DataFrame(
    {"slot": [0, 1, 2], "expected": [900.0, 800.0, 700.0], "weighted": [900.0, 600.0, 400.0]}
)


def options(fits: int = 5, seq_lens: tuple[int, ...] = (4096,)) -> pd.DataFrame:
    """As `training` gives them for 4, 8, ..., 64 anchors, of which the first few fit."""
    anchors = np.array([4, 8, 16, 32, 64])
    rate = np.array([10.0, 30.0, 40.0, 50.0, 35.0])
    tables = [
        pd.DataFrame(
            {
                "seq_len": seq_len,
                "block_size": 7,
                "num_anchors": anchors,
                "share": [0.1, 0.3, 0.5, 0.7, 0.8],
                "seconds": [0.1, 0.2, 0.3, 0.4567, 0.5],
                "gain_per_second": rate,
                "gain_per_byte": rate[::-1] * 1e-9,
                "fits": np.arange(5) < fits,
                "front": (rate >= 40) & (np.arange(5) < fits),
            }
        )
        for seq_len in seq_lens
    ]
    return pd.concat(tables, ignore_index=True)


def crowd(count: int, most: float = 50) -> pd.DataFrame:
    """A front of many that gain nearly the same."""
    one = options().iloc[[3]]
    rate = most - 0.01 * np.arange(count)
    return pd.concat([one] * count, ignore_index=True).assign(
        num_anchors=4 + np.arange(count), gain_per_second=rate, gain_per_byte=1e-7 / rate
    )


def cells() -> pd.DataFrame:
    """As `cell_table` gives them; every tau is another one, the last the largest of its map."""
    rows = [
        {"budget": b, "temperature": t, "block_size": k, "num_anchors": n}
        for b, t, k, n in product(("seconds", "slots"), (0.0, 1.0), (4, 7), (4, 12, 32))
    ]
    tau = 1 + 0.1 * np.arange(len(rows))
    return pd.DataFrame(rows).assign(tau=tau, low=tau - 0.04, high=tau + 0.06)


def budget(fits: int = 5, num_anchors: int = 16) -> Figure:
    return plot_budget(
        options(fits), COST, NONE_LEFT, num_anchors=num_anchors, at=(300, num_anchors)
    )


PICTURES: dict[str, Callable[[], Figure]] = {
    "fit": lambda: plot_fit(FIT, at=(512, 64)),
    "nothing fits": lambda: plot_fit(NONE_LEFT),
    "parts": lambda: plot_parts(COST),
    "parts and memory": lambda: plot_parts(COST, MEMORY, limit=4e9),
    "slots": lambda: plot_slots(SLOTS),
    "front": lambda: plot_front(options(4)),
    "crowded front": lambda: plot_front(crowd(14)),
    "low front": lambda: plot_front(pd.concat([options(4).assign(front=False), crowd(9, 0.1)])),
    "budget": budget,
    "budget, little fits": lambda: budget(2, 64),
    "sweeps": lambda: plot_sweeps(cells()),
}
pictures = pytest.mark.parametrize("picture", PICTURES)
# Their cells are opaque, with black or white words.
HEAT_MAPS = ("sweeps",)
drawings = pytest.mark.parametrize("picture", [name for name in PICTURES if name not in HEAT_MAPS])


picture_of, pixels_of = gallery(PICTURES)


def title(ax: Axes) -> str:
    return ax.get_title(loc="left")


def stars(ax: Axes) -> list[list[float]]:
    """Where the chosen setting is marked."""
    return [point for line in ax.lines if line.get_marker() == "*" for point in points(line)]


def hollow(ax: Axes) -> list[list[float]]:
    """The points with hollow marks; the frame around the best is none."""
    lines = [line for line in ax.lines if line.get_fillstyle() == "none"]
    return [point for line in lines if line.get_markersize() < 10 for point in points(line)]


@drawings
def test_a_picture_has_no_background(picture):
    has_no_background(pixels_of(picture))


@drawings
def test_nothing_in_a_picture_vanishes_on_a_black_or_a_white_page(picture):
    vanishes_nowhere(pixels_of(picture))


@drawings
def test_all_words_of_a_picture_are_mid_grey(picture):
    pixels_of(picture)
    has_mid_grey_words(picture_of(picture))


@pictures
def test_every_axis_of_a_picture_says_what_it_counts(picture):
    for ax in picture_of(picture).axes:
        assert ax.get_ylabel() and (ax.get_xlabel() or ax.get_label() == "<colorbar>")


@pictures
def test_the_words_of_a_picture_stand_apart_and_inside(picture):
    figure = picture_of(picture)
    figure.draw_without_rendering()
    # Of the words alone, without the line that leads to some.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in shown(figure)]
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text
        assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text
    for (one, a), (other, b) in combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) <= 1, (one, other)


def test_the_fit_has_a_line_of_the_tables_numbers_for_each_block_size():
    (ax,) = picture_of("fit").axes
    lines = {line.get_label(): line for line in ax.lines if line.get_label()[0] != "_"}
    assert list(lines) == ["block 7", "block 15"]
    for block_size, part in FIT.groupby("block_size"):
        line = lines[f"block {block_size}"]
        assert points(line) == part[["seq_len", "num_anchors"]].to_numpy().tolist()
    assert len({(line.get_color(), line.get_marker()) for line in lines.values()}) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["block 7", "block 15"]


def test_marks_are_hollow_where_the_row_and_not_the_memory_is_the_limit():
    (ax,) = picture_of("fit").axes
    assert hollow(ax) == [[256, 255], [512, 511], [256, 255]]
    filled = [line.get_markevery() for line in ax.lines if line.get_label()[0] != "_"]
    assert [marks.tolist() for marks in filled] == [[False] * 2 + [True] * 2, [False] + [True] * 3]
    assert "hollow: row is the limit" in title(ax)
    assert "hollow" not in title(plot_fit(fit(100, 100)).axes[0])


def test_both_axes_of_the_fit_double_from_tick_to_tick_and_name_plain_numbers():
    (ax,) = picture_of("fit").axes
    assert tick_names(ax.xaxis) == ["256", "512", "1024", "2048"]
    assert tick_names(ax.yaxis) == ["64", "128", "256", "512", "1024"]
    heights = ax.transData.transform([(256, tick) for tick in ax.get_yticks()])[:, 1]
    assert np.ptp(np.diff(heights)) < 1e-6
    places = ax.transData.transform([(tick, 1) for tick in ax.get_xticks()])[:, 0]
    assert np.ptp(np.diff(places)) < 1e-6


def test_where_nothing_fits_the_line_goes_down_to_a_tick_that_says_so():
    (ax,) = picture_of("nothing fits").axes
    assert points(ax.lines[0])[-1] == [2048, 0]
    assert tick_names(ax.yaxis)[0] == "none: 0" and ax.get_yticks()[0] == 0
    assert ax.get_ylim()[0] == 0
    zero, one, two = ax.transData.transform([(256, y) for y in (0, 1, 2)])[:, 1]
    assert zero < one - 5 < two - 10
    assert "none" not in "".join(tick_names(picture_of("fit").axes[0].yaxis))


def test_a_fit_of_nothing_at_all_is_drawn_too():
    (ax,) = plot_fit(fit(0, 0)).axes
    assert points(ax.lines[0]) == [[256, 0], [512, 0]]


def test_the_chosen_setting_has_a_star_and_its_word_even_beyond_the_table():
    (ax,) = picture_of("fit").axes
    assert stars(ax) == [[512, 64]] and "★ chosen" in title(ax)
    (ax,) = plot_fit(FIT, at=(8192, 40_000)).axes
    low, high = ax.get_ylim()
    assert low < 40_000 < high and ax.get_xlim()[1] > 8192
    assert tick_names(ax.xaxis) == ["256", "512", "1024", "2048", "4096", "8192"]
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
    assert title(plot_parts(COST, seconds=0.14832).axes[0]).endswith("operations, 0.148 s")


def test_memory_has_a_panel_of_its_own_that_names_the_moment_and_what_is_allowed():
    _, ax = picture_of("parts and memory").axes
    assert [bar.get_width() for bar in ax.patches] == [3.0, 0.0]
    assert tick_names(ax.yaxis) == ["weights  3.00 GB", "gradients  0"]
    assert title(ax) == (
        "3.0 GB at the fullest moment: heads backward\n75% of the 4.0 GB that it may take"
    )
    for limit in (None, float("inf")):
        assert "may take" not in title(plot_parts(COST, MEMORY, limit=limit).axes[1])


def test_parts_refuse_a_limit_without_memory_and_memory_in_one_panel():
    with pytest.raises(ValueError, match="limit must come with a memory table, got 1.0 without"):
        plot_parts(COST, limit=1.0)
    with pytest.raises(ValueError, match="memory must be None where ax is given, got both"):
        plot_parts(COST, MEMORY, ax=picture_of("parts").axes[0])


def test_each_slot_has_a_bar_of_its_supervisions_and_one_of_their_weight():
    (ax,) = picture_of("slots").axes
    expected, weighted = ax.containers
    assert [bar.get_height() for bar in expected] == SLOTS["expected"].tolist()
    assert [bar.get_height() for bar in weighted] == SLOTS["weighted"].tolist()
    for slot, pair in enumerate(zip(expected, weighted, strict=True)):
        (left, right) = pair
        assert left.get_x() < slot < right.get_x() + right.get_width()
        assert left.get_x() + left.get_width() <= right.get_x() + 1e-9
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["supervised slots", "their summed weight"]
    assert weighted[0].get_hatch() and not expected[0].get_hatch()


def test_the_front_shows_every_option_once_and_tells_its_kinds_apart():
    (ax,) = picture_of("front").axes
    fits, unfit, front = ax.lines
    assert points(fits) == [[pytest.approx(35), 10], [pytest.approx(50), 30]]
    assert points(unfit) == [[pytest.approx(10), 35]]
    assert points(front) == [[pytest.approx(40), 40], [pytest.approx(30), 50]]
    assert unfit.get_fillstyle() == "none" and fits.get_fillstyle() == "full"
    assert front.get_marker() != fits.get_marker()
    assert (fits.get_color(), unfit.get_color(), front.get_color()) == (BLUE, INK, RED)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["fits", "does not fit", "on the front: none beats it"]


def test_the_options_of_the_front_are_named_and_no_others():
    (ax,) = picture_of("front").axes
    names = {text.get_text(): text.xy for text in ax.texts}
    assert names == {
        "N 32, K 7": (pytest.approx(30), 50),
        "N 16, K 7": (pytest.approx(40), 40),
    }


def test_names_tell_the_rows_length_where_there_are_several():
    (ax,) = plot_front(options(seq_lens=(512, 4096))).axes
    names = [text.get_text() for text in ax.texts]
    assert sorted(names) == [
        "N 16, K 7, S 4,096",
        "N 16, K 7, S 512",
        "N 32, K 7, S 4,096",
        "N 32, K 7, S 512",
    ]


def test_the_names_of_a_crowded_front_stand_in_the_order_of_its_points():
    (ax,) = picture_of("crowded front").axes
    heights = [text.get_position()[1] for text in ax.texts]
    assert heights == sorted(heights, reverse=True) and len(heights) == 14
    assert [text.xy[1] for text in ax.texts] == sorted(crowd(14)["gain_per_second"])[::-1]


def test_the_names_of_a_low_front_stand_beside_the_axes_and_not_below():
    (ax,) = picture_of("low front").axes
    heights = [text.get_position()[1] for text in ax.texts]
    assert heights == sorted(heights, reverse=True) and min(heights) >= 0


def test_a_front_of_nothing_that_fits_names_nothing():
    (ax,) = plot_front(options(0)).axes
    assert list(ax.texts) == [] and len(points(ax.lines[0])) == 5


def map_of(ax: Axes) -> tuple[np.ndarray, dict[tuple[int, int], str]]:
    """A heat map's numbers, and its words by row and column."""
    (image,) = ax.images
    words = {
        (round(text.get_position()[1]), round(text.get_position()[0])): text.get_text()
        for text in ax.texts
    }
    return np.ma.filled(image.get_array(), np.nan), words


def test_a_cell_of_the_sweep_holds_its_tau_and_its_interval():
    *_, ax, _ = picture_of("sweeps").axes
    numbers, words = map_of(ax)
    # Those of the last of the four maps.
    assert numbers.tolist() == [pytest.approx([2.8, 2.9, 3.0]), pytest.approx([3.1, 3.2, 3.3])]
    assert words[0, 0] == "2.80\n2.76 to 2.86" and words[1, 2] == "3.30\n3.26 to 3.36"
    assert len(words) == 6
    assert tick_names(ax.xaxis) == ["4", "12", "32"] and tick_names(ax.yaxis) == ["4", "7"]
    assert title(ax).startswith("budget: slots, temperature 1\n")


def test_the_best_cell_has_a_frame_and_its_name():
    (frame,) = [p for p in picture_of("sweeps").axes[3].patches if isinstance(p, Rectangle)]
    assert frame.get_xy() == (1.5, 0.5) and frame.get_width() == frame.get_height() == 1
    assert not frame.get_fill() and to_hex(frame.get_edgecolor()).upper() == RED
    assert title(picture_of("sweeps").axes[3]).endswith("framed: the best, N 32, K 7")


def contrast(one: str, other: tuple[float, ...]) -> float:
    """As the Web Content Accessibility Guidelines define it."""
    lights = []
    for colour in (to_rgb(one), other[:3]):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
    return max(lights) / min(lights)


@pytest.mark.parametrize("picture", HEAT_MAPS)
def test_the_words_of_every_cell_are_readable(picture):
    seen = set()
    for ax in picture_of(picture).axes:
        for image, text in product(ax.images, ax.texts):
            column, row = map(round, text.get_position())
            below = image.cmap(image.norm(image.get_array()[row, column]))
            assert contrast(text.get_color(), below) >= 4.5
            seen.add(text.get_color())
    assert seen == {"black", "white"}


def test_a_sweep_without_intervals_or_with_a_cell_missing_is_drawn():
    table = cells().assign(low=NAN, high=NAN).drop(index=19)
    *_, ax, _ = plot_sweeps(table).axes
    numbers, words = map_of(ax)
    assert np.isnan(numbers[0, 1]) and np.isnan(numbers).sum() == 1
    assert words[0, 0] == "2.80" and (0, 1) not in words


def test_the_sweeps_stand_budgets_across_and_temperatures_down_in_common_colours():
    *maps, bar = picture_of("sweeps").axes
    assert [title(ax).split("\n")[0] for ax in maps] == [
        "budget: seconds, temperature 0",
        "budget: slots, temperature 0",
        "budget: seconds, temperature 1",
        "budget: slots, temperature 1",
    ]
    assert [map_of(ax)[0][0, 0] for ax in maps] == pytest.approx([1.0, 2.2, 1.6, 2.8])
    for ax in maps:
        assert ax.images[0].get_clim() == pytest.approx((1.0, 3.3))
    places = [ax.get_position() for ax in maps]
    assert places[0].x1 < places[1].x0 and places[0].y0 > places[2].y1
    assert bar.get_ylabel() == "tau (tokens per round)"


def test_the_first_panel_of_a_budget_marks_the_chosen_share():
    ax = picture_of("budget").axes[0]
    assert points(ax.lines[0]) == options()[["num_anchors", "share"]].to_numpy().tolist()
    assert stars(ax) == [[16, 0.5]]
    assert title(ax) == "★ chosen: N 16 covers 50%"


def test_the_second_panel_shows_gains_of_the_best_that_fits():
    ax = picture_of("budget").axes[1]
    assert points(ax.lines[0]) == [[4, 0.2], [8, 0.6], [16, 0.8], [32, 1], [64, 0.7]]
    (frame,) = [line for line in ax.lines if line.get_marker() == "s"]
    assert points(frame) == [[32, 1]] and frame.get_color() == GREEN
    assert stars(ax) == [[16, 0.8]] and hollow(ax) == []
    assert title(ax) == "★ chosen   □ best that fits: N 32"


def test_options_that_do_not_fit_are_hollow_and_never_the_best():
    ax = picture_of("budget, little fits").axes[1]
    assert hollow(ax) == [[16, pytest.approx(4 / 3)], [32, pytest.approx(5 / 3)], [64, 35 / 30]]
    assert stars(ax) == [[64, 35 / 30]]
    assert title(ax) == "★ chosen   □ best that fits: N 8   ○ too large"
    low, high = ax.get_ylim()
    assert low == 0 and high > 5 / 3


def test_where_nothing_fits_there_is_no_best():
    ax = budget(0).axes[1]
    assert not [line for line in ax.lines if line.get_marker() == "s"]
    assert len(hollow(ax)) == 5 and title(ax) == "★ chosen   ○ too large"
    assert max(y for _, y in points(ax.lines[0])) == 1


def test_the_ticks_of_gains_stay_few_where_much_more_would_be_gained_by_what_is_too_large():
    rate = [1.0, 20.0, 60.0, 90.0, 70.0]
    table = options(1).assign(gain_per_second=rate)
    ax = plot_budget(table, COST, NONE_LEFT, num_anchors=4, at=(300, 4)).axes[1]
    assert points(ax.lines[0])[3] == [32, 90] and len(ax.get_yticks()) <= 6


def test_the_lower_panels_of_a_budget_are_the_parts_and_the_fit():
    _, _, parts, fits = picture_of("budget").axes
    assert tick_names(parts.yaxis) == tick_names(picture_of("parts").axes[0].yaxis)
    # The chosen option's own seconds.
    assert title(parts) == "a step: 10.0 T operations, 0.3 s"
    assert points(fits.lines[0]) == NONE_LEFT[["seq_len", "num_anchors"]].to_numpy().tolist()
    assert stars(fits) == [[300, 16]]
    assert title(fits) == "block 7   ★ chosen   hollow: row is the limit"


def test_the_chosen_setting_looks_alike_in_every_panel():
    marks = [
        (line.get_color(), line.get_markersize())
        for ax in picture_of("budget").axes
        for line in ax.lines
        if line.get_marker() == "*"
    ]
    assert marks == [(ORANGE, marks[0][1])] * 3


def test_a_budget_refuses_a_number_of_anchors_that_is_no_option():
    with pytest.raises(
        ValueError, match=r"num_anchors must be one of \[4, 8, 16, 32, 64\], got 12"
    ):
        budget(num_anchors=12)


def test_options_out_of_order_are_drawn_in_order():
    shuffled = options().iloc[[3, 0, 4, 2, 1]]
    figure = plot_budget(shuffled, COST, NONE_LEFT, num_anchors=16, at=(300, 16))
    for ax, like in zip(figure.axes[:2], picture_of("budget").axes, strict=False):
        assert points(ax.lines[0]) == points(like.lines[0])


def test_an_axis_with_many_doublings_names_only_some():
    (ax,) = plot_fit(fit(*[100] * 13)).axes
    assert tick_names(ax.xaxis) == ["256", "2048", "16384", "131072", "1048576"]
