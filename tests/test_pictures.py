"""What every picture must be, whatever it shows: looked at in its PNG and its words."""

from itertools import combinations

import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from dspark_lab import explore
from dspark_lab.explore.masks import REGION_COLOURS, TILE_COLOURS
from dspark_lab.explore.style import INK, LINE_COLOURS, PAPER, SKY
from tests.gallery import GOOD, PICTURES, STEPS, biases, bins, picture_of, pixels_of, rates, sweep
from tests.pictures import contrast, shown
from tests.screen import SMALLEST

pytestmark = pytest.mark.usefixtures("one_thread")

# Pixels of an output on a page of 1,024 in JupyterLab, with its list of files beside.
NARROWEST = 592
pictures = pytest.mark.parametrize("picture", PICTURES)
# The cells of a heat map are opaque, with black or white words; a text's words lie on patches.
OTHER_INK = ("sweeps", "wide sweeps", "tokens", "outcomes")
drawings = pytest.mark.parametrize("picture", [name for name in PICTURES if name not in OTHER_INK])
# Labels of a mask's cells may touch those of their neighbours, as a text's words do.
TOUCHING = ("small mask", "named mask", "tokens", "outcomes")
written = pytest.mark.parametrize("picture", [name for name in PICTURES if name not in TOUCHING])


def test_every_plot_is_in_the_gallery():
    drawn = {name for make in PICTURES.values() for name in make.__code__.co_names}
    # Composites of these.
    others = {"plot_budget", "plot_serving"}
    assert {name for name in explore.__all__ if name.startswith("plot_")} <= drawn | others


@pictures
def test_a_picture_stands_on_paper_of_its_own(picture):
    values = pixels_of(picture)
    assert (values[..., 3] == 255).all()
    assert to_hex(values[0, 0, :3] / 255) == to_hex(values[-1, -1, :3] / 255) == PAPER


def test_colours_stand_out_from_the_paper():
    assert contrast(to_rgb(INK), to_rgb(PAPER)) >= 4.5
    for colour in {SKY, *LINE_COLOURS, *TILE_COLOURS.values(), *REGION_COLOURS.values()}:
        assert contrast(to_rgb(colour), to_rgb(PAPER)) >= 3, colour


@drawings
def test_all_words_of_a_picture_have_the_colour_of_ink(picture):
    pixels_of(picture)
    words = [text for text in picture_of(picture).findobj(Text) if text.get_text().strip()]
    assert len(words) > 5
    assert {to_hex(text.get_color()) for text in words if text.get_visible()} == {INK}


@pictures
def test_no_word_of_a_picture_is_below_nine_pixels_where_a_notebook_is_narrowest(picture):
    figure = picture_of(picture)
    wide = pixels_of(picture).shape[1]
    shown_at = min(1, NARROWEST / wide)
    sizes = {
        text.get_text(): text.get_fontsize() / 72 * wide / figure.get_figwidth() * shown_at
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip()
    }
    assert not {text: size for text, size in sizes.items() if size < SMALLEST}


@pictures
def test_every_axis_of_a_picture_says_what_it_counts(picture):
    for i, ax in enumerate(picture_of(picture).axes):
        if ax.get_label() == "<text>":
            continue
        assert ax.get_xlabel() or ax.get_label() == "<colorbar>"
        # Panels of rates share the axis of the first of their line; a training's have titles.
        shares = picture in ("rates", "survival") and i % 3
        assert (
            ax.get_ylabel()
            or shares
            or (picture.startswith("training") and ax.get_title(loc="left"))
        )


@written
def test_the_words_of_a_picture_stand_apart_and_inside(picture):
    figure = picture_of(picture)
    figure.draw_without_rendering()
    # The words alone, without the line that leads to some.
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in shown(figure)]
    assert len(boxes) > 5
    for text, box in boxes:
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1, text
        assert box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1, text
    for (one, a), (other, b) in combinations(boxes, 2):
        wide = min(a.x1, b.x1) - max(a.x0, b.x0)
        high = min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(wide, high) <= 1, (one, other)


def test_names_with_dollars_are_no_maths():
    for figure in (
        explore.plot_rates(rates(["$a$"])),
        explore.plot_rates(rates(["$a$"]).query("kind == 'empirical'")),
        explore.plot_reliability({"$a$": bins(3, 4)}),
        explore.plot_bias(
            biases(("domain", ["$a$", "b"]), ("drafter", ["$a$", "c"])), ["domain", "drafter"]
        ),
        explore.plot_thresholds({"$a$": sweep()}),
        explore.plot_speedup({"$a$": GOOD}),
        explore.plot_steps(STEPS),
    ):
        figure.draw_without_rendering()
        texts = [text.get_text() for text in figure.findobj(Text) if "a" in text.get_text()]
        named = [text for text in texts if "$" in text]
        assert named and all(text.count("$") == text.count(r"\$") for text in named)


@pytest.mark.parametrize("plot", ["plot_thresholds", "plot_reliability", "plot_speedup"])
def test_no_table_is_refused(plot):
    with pytest.raises(ValueError, match="tables must hold at least one .*, got none"):
        getattr(explore, plot)({})
