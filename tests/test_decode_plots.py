"""what is drawn is what the tables say, on any page.

Pictures are looked at through what is drawn: the data of lines, bars and marks, the words, the
PNG's pixels, and the HTML as a browser would read it. Tables are made by hand.
"""

from collections.abc import Callable
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from test_plots import ANY_TEXT, ODD, Page

from dspark_lab.decoding import OTHERS, OUTCOMES
from dspark_lab.explore import (
    outcome_legend,
    outcome_text,
    plot_bias,
    plot_calibration,
    plot_distributions,
    plot_drift,
    plot_gain,
    plot_rates,
    plot_reliability,
    plot_thresholds,
)
from dspark_lab.explore.style import BLUE, GREEN, ORANGE
from tests.pictures import gallery, has_mid_grey_words, has_no_background, vanishes_nowhere

NAN = float("nan")
KINDS = ("on policy", "empirical", "predicted", "teacher-forced", "predicted, teacher-forced")


def rates(drafters: list[str], slots: int = 3) -> pd.DataFrame:
    """As `rate_table` gives them; every number is another one."""
    rows = []
    for i, (kind, drafter, slot) in enumerate(product(KINDS, drafters, range(slots))):
        rate = 0.4 + 0.005 * i
        lived = rate / (2 + slot)
        known = {"conditional": rate, "low": rate - 0.03, "high": rate + 0.02}
        known |= {"survival": lived, "survival_low": lived - 0.01, "survival_high": lived + 0.02}
        rows.append({"kind": kind, "drafter": drafter, "slot": slot, **known})
    return pd.DataFrame(rows)


def bins(*counts: int) -> pd.DataFrame:
    """As `reliability_table` gives them, bins of equal width; an empty one has no means."""
    edges = np.linspace(0, 1, len(counts) + 1)
    known = np.array(counts) > 0
    confidence = np.where(known, (edges[:-1] + edges[1:]) / 2, NAN)
    outcome = confidence**2
    return pd.DataFrame(
        {
            "low": edges[:-1],
            "high": edges[1:],
            "count": counts,
            "confidence": confidence,
            "outcome": outcome,
            "gap": confidence - outcome,
        }
    )


def biases(*columns: tuple[str, list]) -> pd.DataFrame:
    names = [name for name, _ in columns]
    table = pd.DataFrame(product(*(values for _, values in columns)), columns=names)
    bias = 0.05 - 0.02 * np.arange(len(table))
    return table.assign(bias=bias, bias_low=bias - 0.03, bias_high=bias + 0.01)


def sweep(scale: float = 1.0) -> pd.DataFrame:
    cuts = np.linspace(0, 1, 21)
    verified = 6 * (1 - cuts) * scale
    rate = np.where(verified > 0, 0.3 + 0.7 * cuts, NAN)
    return pd.DataFrame({"threshold": cuts, "acceptance_rate": rate, "verified": verified}).assign(
        accepted=np.nan_to_num(rate) * verified
    )


REPORT = pd.DataFrame(
    {
        "slot": [0, 1, 2, "all"],
        "ece": [0.08, 0.06, NAN, 0.05],
        "ece_scaled": [0.02, 0.07, NAN, 0.01],
        "auroc": [0.8, 0.7, NAN, 0.78],
        "auroc_scaled": [0.8, 0.7, NAN, 0.79],
    }
)
DRIFT = pd.DataFrame(
    {
        "start": [-100, 0, 100],
        "rounds": [100, 100, 100],
        "ece_raw": [0.05, 0.12, 0.11],
        "ece_static": [0.02, 0.09, 0.1],
        "ece_online": [0.03, 0.08, 0.01],
    }
)
GAIN = pd.DataFrame(
    {
        "values": ["everything", "raw", "scaled", "oracle"],
        "threshold": [NAN, 0.38, 0.395, 0.27],
        "gain_percent": [-6.4, 0.0, 0.2, 7.2],
        "gain_low": [-8.4, 0.0, -0.3, 5.9],
        "gain_high": [-4.1, 0.0, 0.7, 8.5],
    }
)
REJECTED = pd.DataFrame(
    {
        "token": [3, 1, 2, -1],
        "text": [" the", "$x$", "\n", OTHERS],
        "draft": [0.6, 0.1, 0.25, 0.05],
        "target": [0.2, 0.5, 0.2, 0.1],
        "overlap": [0.2, 0.1, 0.2, 0.04],
        "residual": [0.0, 0.875, 0.0, 0.125],
        "drafted": [True, False, False, False],
        "drawn": [False, True, False, False],
    }
)
UNASKED = REJECTED.assign(target=NAN, overlap=NAN, residual=NAN, drawn=False)
BONUS = REJECTED.assign(draft=0.0, overlap=0.0, residual=REJECTED["target"], drafted=False)

PICTURES: dict[str, Callable[[], Figure]] = {
    "rates": lambda: plot_rates(rates(["one", "two", "three", "four", "five"])),
    "survival": lambda: plot_rates(rates(["one", "two"]), "survival"),
    "rates of one": lambda: plot_rates(rates(["one"]).drop(columns="drafter")),
    "reliability": lambda: plot_reliability({"raw": bins(5, 0, 40, 90), "scaled": bins(9, 9, 9)}),
    "bias": lambda: plot_bias(biases(("domain", ["math", "code", "chat"])), "domain"),
    "bias by two": lambda: plot_bias(
        biases(("domain", ["math", "code"]), ("drafter", list("abcdefgh"))), ["domain", "drafter"]
    ),
    "thresholds": lambda: plot_thresholds({"raw": sweep(), "scaled": sweep(0.9)}),
    "calibration": lambda: plot_calibration(REPORT),
    "drift": lambda: plot_drift(DRIFT),
    "gain": lambda: plot_gain(GAIN),
    "distributions": lambda: plot_distributions(REJECTED),
    "not asked": lambda: plot_distributions(UNASKED),
}
pictures = pytest.mark.parametrize("picture", PICTURES)


picture_of, pixels_of = gallery(PICTURES)


def points(line) -> list[list[float]]:
    """The marks of a line, without those that are unknown."""
    return [pair for pair in line.get_xydata().tolist() if not np.isnan(pair).any()]


def labelled(ax: Axes) -> dict:
    return {line.get_label(): line for line in ax.lines if line.get_label()[0] != "_"}


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def segments(ax: Axes) -> list[list[list[float]]]:
    """All that was drawn as lines from somewhere to somewhere."""
    found = [c.get_segments() for c in ax.collections if hasattr(c, "get_segments")]
    return [line.tolist() for lines in found for line in lines if len(line)]


def tick_names(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


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
    for i, axes in enumerate(picture_of(picture).axes):
        assert axes.get_xlabel()
        shared = "rates" in picture or picture == "survival"
        # Panels of one line share the axis of the first.
        assert axes.get_ylabel() or (shared and i % 4)


def shown(figure: Figure) -> list[Text]:
    """All words that are drawn; ticks beyond an axis's limits have labels, too, but no ink."""
    texts = [text for legend in figure.legends for text in legend.get_texts()]
    for ax in figure.axes:
        legend = ax.get_legend()
        texts += [child for child in ax.get_children() if isinstance(child, Text)]
        texts += [ax.xaxis.label, ax.yaxis.label]
        texts += [] if legend is None else [*legend.get_texts(), legend.get_title()]
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [tick.label1 for tick in ticks if tick.label1.get_visible()]
    return [text for text in texts if text.get_visible() and text.get_text().strip()]


@pictures
def test_the_words_of_a_picture_stand_apart_and_inside(picture):
    figure = picture_of(picture)
    figure.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown(figure)]
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text
        assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text
    for (one, a), (other, b) in combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) <= 1, (one, other)


def test_each_drafter_has_a_panel_with_a_line_for_each_kind():
    drafters = ["one", "two", "three", "four", "five"]
    table = rates(drafters)
    figure = picture_of("rates")
    assert [ax.get_title(loc="left") for ax in figure.axes] == drafters
    for ax, drafter in zip(figure.axes, drafters, strict=True):
        lines = labelled(ax)
        assert tuple(lines) == KINDS
        for kind, line in lines.items():
            part = table[(table["drafter"] == drafter) & (table["kind"] == kind)]
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
    drafters = ["one"] if picture == "rates of one" else ["one", "two"]
    table = rates(drafters)
    ax = picture_of(picture).axes[0]
    table = table[table["drafter"] == "one"]
    for kind, line in labelled(ax).items():
        part = table[table["kind"] == kind]
        assert points(line) == part[["slot", value]].to_numpy().tolist()
    part = table[table["kind"] == "empirical"]
    bars = [[[k, a], [k, b]] for k, a, b in zip(part["slot"], part[low], part[high], strict=True)]
    assert segments(ax) == bars
    bands = [c for c in ax.collections if not hasattr(c, "get_segments")]
    for band, (kind, part) in zip(
        bands, table[table["kind"] != "empirical"].groupby("kind", sort=False), strict=True
    ):
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() == pytest.approx(part[low].min()), kind
        assert heights.max() == pytest.approx(part[high].max()), kind


def test_the_legend_of_the_rates_names_each_kind_once():
    [legend] = picture_of("rates").legends
    assert [text.get_text() for text in legend.get_texts()] == list(KINDS)


def test_rates_kept_apart_by_something_else_have_their_panels_too():
    table = rates(["one", "two"]).rename(columns={"drafter": "domain"})
    assert [ax.get_title(loc="left") for ax in plot_rates(table).axes] == ["one", "two"]
    behind = rates(["one", "two"]).pipe(lambda t: t[[*t.columns.drop("drafter"), "drafter"]])
    assert [ax.get_title(loc="left") for ax in plot_rates(behind).axes] == ["one", "two"]


def test_another_rate_is_refused():
    with pytest.raises(ValueError, match=r"value must be one of .*'survival'.*, got 'tau'"):
        plot_rates(rates(["one"]), "tau")


def test_reliability_shows_each_bin_that_has_a_mean_and_counts_them_all():
    tables = {"raw": bins(5, 0, 40, 90), "scaled": bins(9, 9, 9)}
    axes = picture_of("reliability").axes
    assert len(axes) == 4
    for (name, table), ax, strip in zip(tables.items(), axes[:2], axes[2:], strict=True):
        assert ax.get_title(loc="left") == name
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


@pytest.mark.parametrize("by", ["slot", [], ["domain", "slot"], ["domain"] * 3])
def test_a_bias_by_what_the_table_does_not_have_is_refused(by):
    with pytest.raises(ValueError, match=r"by must be one or two of \['domain', .*, got \["):
        plot_bias(biases(("domain", ["math"])), by)


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
    bands = {f"{n}_{end}": table[n] * f for n in ("verified", "acceptance_rate")
             for end, f in (("low", 0.9), ("high", 1.1))}  # fmt: skip
    left, right = plot_thresholds(table.assign(**bands)).axes
    for ax, name in ((left, "acceptance_rate"), (right, "verified")):
        [band] = ax.collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.max() == pytest.approx(1.1 * table[name].max())


@pytest.mark.parametrize("plot", [plot_thresholds, plot_reliability])
def test_no_table_is_refused(plot):
    with pytest.raises(ValueError, match="tables must hold at least one .*, got none"):
        plot({})


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
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["raw", "scaled"]
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


@pytest.mark.parametrize("name", ["rejected", "bonus"])
def test_distributions_are_pairs_of_bars_filled_where_they_overlap(name):
    table = {"rejected": REJECTED, "bonus": BONUS}[name]
    [ax] = plot_distributions(table).axes
    filled, draft, also_filled, target = ax.containers
    for bars, column in (
        (filled, "overlap"),
        (also_filled, "overlap"),
        (draft, "draft"),
        (target, "target"),
    ):
        assert [bar.get_width() for bar in bars] == table[column].tolist()
        assert [round(bar.get_y() + 0.17) for bar in bars] == [0, 1, 2, 3]
        outlined = column != "overlap"
        assert {bar.get_facecolor()[3] for bar in bars} == {0.0 if outlined else 1.0}
    assert {bar.get_hatch() for bar in filled} != {bar.get_hatch() for bar in also_filled}
    shared = zip(draft, target, strict=True)
    assert all(a.get_y() + a.get_height() <= b.get_y() + 1e-9 for a, b in shared)
    [diamonds] = ax.lines
    expected = [[x, row] for row, x in enumerate(table["residual"]) if x > 0]
    assert points(diamonds) == expected


def test_the_title_names_the_drafted_token_and_the_accept_rate():
    [ax] = plot_distributions(REJECTED).axes
    assert ax.get_title(loc="left") == "drafted ␣the   accept rate 0.540"
    [ax] = plot_distributions(REJECTED, " 7$").axes
    assert ax.get_title(loc="left") == r"drafted ␣7\$   accept rate 0.540"
    [ax] = plot_distributions(UNASKED).axes
    assert ax.get_title(loc="left") == "drafted ␣the   the target was not asked"
    [ax] = plot_distributions(BONUS).axes
    assert ax.get_title(loc="left") == "nothing drafted"


def test_the_drafted_and_the_drawn_token_are_marked_in_words():
    [ax] = plot_distributions(REJECTED).axes
    marks = {text.xy[1]: text.get_text() for text in ax.texts}
    assert marks == {0: "← drafted", 1: "← drawn by the target"}
    both = REJECTED.assign(drawn=REJECTED["drafted"])
    assert words(plot_distributions(both).axes[0]) == ["← drafted,\n    drawn by the target"]
    assert words(plot_distributions(UNASKED).axes[0]) == ["← drafted"]


@pytest.mark.parametrize("largest", [1.0 + 1e-7, 1.0, 0.3])
def test_the_words_beside_a_bar_begin_behind_it_and_end_inside_the_axes(largest):
    both = REJECTED.assign(drawn=REJECTED["drafted"], residual=0.0, target=[largest, 0, 0, 0])
    figure = plot_distributions(both.assign(draft=[largest, 0, 0, 0]))
    figure.draw_without_rendering()
    [ax] = figure.axes
    [mark] = ax.texts
    box, end = mark.get_window_extent(), ax.transData.transform((largest, 0))[0]
    assert end + 2 < box.x0 and box.x1 < ax.get_window_extent().x1
    ticks = ax.get_xticks()
    assert len(ticks) > 3 and max(ticks) <= 1


def test_tokens_of_a_distribution_are_named_as_they_are_written():
    [ax] = plot_distributions(REJECTED).axes
    assert tick_names(ax.yaxis) == ["␣the", r"\$x\$", "⏎", "(all others)"]
    [ax] = plot_distributions(REJECTED.assign(text=["", "a", "b", OTHERS])).axes
    assert tick_names(ax.yaxis)[0] == "(id 3)"
    assert ax.yaxis_inverted(), "the likeliest token on top"


def outcomes(*tokens: tuple[int, int, str, str], **numbers: float) -> pd.DataFrame:
    """An outcome table of tokens (round, slot, outcome, text)."""
    table = pd.DataFrame(tokens, columns=["round", "slot", "outcome", "text"])
    for name in ("confidence", "accept_rate", "accept_prob", "draft_prob", "target_prob"):
        table[name] = numbers.get(name, NAN)
    kept = ["accepted", "corrected", "bonus", "first"]
    return table.assign(token=table.index, position=0, kept=table["outcome"].isin(kept))


ROUNDS = outcomes(
    (-1, -1, "first", "To"),
    (0, 0, "accepted", " add"),
    (0, 1, "rejected", " <b>"),
    (0, 2, "not reached", "\n"),
    (0, -1, "corrected", " we"),
    (1, 0, "accepted", "\n"),
    (1, 1, "not verified", " x"),
    (1, -1, "bonus", "!"),
)


def test_the_answer_is_read_with_each_draft_before_what_came_in_its_place():
    assert Page(outcome_text(ROUNDS)).text == "To add <b>⏎ we⏎\n x!"
    assert Page(outcome_text(ROUNDS, drafts=False)).text == "To add we⏎\n!"


def test_each_token_has_the_class_of_its_outcome():
    page = Page(outcome_text(ROUNDS))
    expected = [f"dspark-{outcome.replace(' ', '-')}" for outcome in ROUNDS["outcome"]]
    assert page.classes == expected
    assert set(ROUNDS["outcome"]) == set(OUTCOMES)
    for source in (outcome_text(ROUNDS), outcome_legend(ROUNDS)):
        for name in Page(source).classes:
            assert f".{name}{{" in source


def test_what_is_not_part_of_the_answer_is_small_and_struck_through_or_faint():
    style = outcome_text(ROUNDS).partition("</style>")[0]
    rules = {line.partition("{")[0]: line for line in style.replace("\n ", " ").splitlines()}
    for outcome in OUTCOMES:
        rule = rules[f".dspark-{outcome.replace(' ', '-')}"]
        dropped = outcome in ("rejected", "not reached", "not verified")
        assert ("font-size:11px" in rule) == dropped
        assert ("line-through" in rule) == (outcome in ("rejected", "not reached"))
        assert ("opacity" in rule) == (outcome in ("not reached", "not verified"))


def test_the_tip_of_a_token_tells_its_place_and_its_numbers():
    numbers = {"confidence": 0.834, "accept_rate": 0.711, "draft_prob": 0.4, "target_prob": 0.125}
    [tip] = Page(outcome_text(outcomes((3, 2, "rejected", "a"), **numbers))).tips
    assert tip.split(" · ") == [
        "round.slot 3.2",
        "rejected",
        "confidence 0.83, accept rate 0.71",
        "draft probability 0.40, target probability 0.12",
    ]
    [tip] = Page(
        outcome_text(outcomes((3, 2, "not verified", "a"), confidence=0.2, draft_prob=0.4))
    ).tips
    assert tip == "round.slot 3.2 · not verified · confidence 0.20 · draft probability 0.40"
    tips = Page(outcome_text(ROUNDS)).tips
    assert tips[0] == "first token · first" and tips[4] == "round 0 · corrected"


def test_the_legend_counts_the_tokens_of_each_outcome():
    counted = [word for word in Page(outcome_legend(ROUNDS)).words if word.strip()]
    assert counted == [
        "accepted 2",
        "rejected 1",
        "not reached 1",
        "not verified 1",
        "corrected 1",
        "bonus 1",
        "first 1",
    ]
    few = [word for word in Page(outcome_legend(ROUNDS.head(2))).words if word.strip()]
    assert few == ["accepted 1", "first 1"]


def test_no_text_of_a_token_is_markup_of_its_own():
    table = outcomes(*((0, slot, "accepted", text) for slot, text in enumerate(ODD)))
    page = Page(outcome_text(table))
    assert page.text.replace("⏎", "") == "".join(ODD)
    assert page.tags == ["style", "div"] + ["span"] * len(ODD)
    assert set(page.attributes) == {"class", "title"}


@given(st.lists(ANY_TEXT, max_size=6))
def test_any_text_can_be_read_back_from_the_answer(texts):
    table = outcomes(*((0, slot, "accepted", text) for slot, text in enumerate(texts)))
    page = Page(outcome_text(table))
    assert page.text.replace("⏎", "") == "".join(texts)
    assert page.tags == ["style", "div"] + ["span"] * len(texts)


def test_names_with_dollars_are_no_maths():
    for figure in (
        plot_rates(rates(["$a$"])),
        plot_reliability({"$a$": bins(3, 4)}),
        plot_bias(
            biases(("domain", ["$a$", "b"]), ("drafter", ["$a$", "c"])), ["domain", "drafter"]
        ),
        plot_thresholds({"$a$": sweep()}),
    ):
        figure.draw_without_rendering()
        texts = [text.get_text() for text in figure.findobj(Text) if "a" in text.get_text()]
        named = [text for text in texts if "$" in text]
        assert named and all(text.count("$") == text.count(r"\$") for text in named)
