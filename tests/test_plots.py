"""what is drawn is what the table says, in colours that any page shows.

Pictures are looked at as a reader gets them: the PNG's pixels, the words on the axes, the HTML as
a browser would read it.
"""

import warnings
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from dspark_lab.blocks import Blocks, draw_blocks
from dspark_lab.chats import Batch, Chat, Encoded, collate, pack
from dspark_lab.explore import (
    REGIONS,
    TILE_STATES,
    mask_and_tiles,
    mask_regions,
    plot_coverage,
    plot_mask,
    plot_packing,
    plot_rates,
    plot_sorting,
    plot_tiles,
    plot_training,
    sorting_table,
    token_legend,
    token_table,
    token_text,
)
from dspark_lab.explore.masks import REGION_COLOURS, TILE_COLOURS
from dspark_lab.explore.style import LINE_COLOURS
from tests.pictures import gallery, has_mid_grey_words, has_no_background, pixels, vanishes_nowhere

pytestmark = pytest.mark.usefixtures("one_thread")

CHAT = Chat(({"role": "assistant", "content": ""},), id="hand-made")
SEEN, OWN, DUMMY = (REGIONS.index(name) for name in ("context prefix", "own block", "dummy block"))


def documents(*marks: str) -> list[Encoded]:
    """Documents of as many tokens as there are characters, supervised where they are ``a``."""
    return [
        Encoded(torch.arange(len(mark)), torch.tensor([c == "a" for c in mark]), CHAT)
        for mark in marks
    ]


def small_batch() -> Batch:
    return pack(documents("...aaa", "..a"), 10, 0)


def small_blocks() -> Blocks:
    """Two kept blocks and a dummy."""
    return draw_blocks(small_batch(), 3, 2, seed=0)


COVERAGE = pd.DataFrame(
    {
        "block_size": [4, 4, 4, 7, 7, 7],
        "num_anchors": [8, 16, 64] * 2,
        "expected": [0.2, 0.4, 0.8, 0.3, 0.55, 0.95],
        "sampled": [0.21, 0.39, 0.81, 0.29, 0.57, 0.94],
    }
)
PACKING = pd.DataFrame(
    {
        "row": ["unpacked"] * 2 + ["packed, 1024"] * 2,
        "anchors per": ["document"] * 2 + ["row"] * 2,
        "num_anchors": [16, 64] * 2,
        "expected": [0.5, 0.9, 0.2, 0.45],
    }
)
TILES = torch.tensor([[0, 1, 2, 2], [0, 0, 1, 2]], dtype=torch.int8)


def large_regions() -> Tensor:
    """A mask of three blocks of 30 slots, the last of them a dummy, on 200 context tokens."""
    regions = torch.zeros(90, 290, dtype=torch.int8)
    for block, anchor in enumerate((60, 150)):
        regions[30 * block : 30 * block + 30, :anchor] = SEEN
    for block, region in enumerate((OWN, OWN, DUMMY)):
        first = 30 * block
        regions[first : first + 30, 200 + first : 230 + first] = region
    return regions


PICTURES: dict[str, Callable[[], Figure]] = {
    "coverage": lambda: plot_coverage(COVERAGE),
    "packing": lambda: plot_packing(PACKING),
    "small mask": lambda: plot_mask(
        mask_regions(small_blocks(), seq_len=10), seq_len=10, block_size=2
    ),
    "large mask": lambda: plot_mask(large_regions(), seq_len=200, block_size=30),
    "tiles": lambda: plot_tiles(TILES, seq_len=48, tile_size=16),
    "mask and tiles": lambda: mask_and_tiles(
        large_regions(), TILES, seq_len=200, block_size=30, tile_size=64
    ),
    "sorting": lambda: plot_sorting(sorting_table(small_blocks(), seq_len=10, tile_sizes=(2, 4))),
}
COLOURS = {
    "coverage": LINE_COLOURS[:2],
    "packing": LINE_COLOURS[:2],
    "small mask": tuple(REGION_COLOURS.values()),
    "large mask": tuple(REGION_COLOURS.values()),
    "tiles": tuple(TILE_COLOURS.values()),
    "mask and tiles": (*REGION_COLOURS.values(), *TILE_COLOURS.values()),
    "sorting": tuple(TILE_COLOURS.values()),
}
pictures = pytest.mark.parametrize("picture", PICTURES)


picture_of, pixels_of = gallery(PICTURES)


def image(figure: Figure) -> np.ndarray:
    """The picture inside a figure's axes as it is handed to matplotlib."""
    (painted,) = figure.axes[0].images
    return np.asarray(painted.get_array())


def is_colour(values: np.ndarray, colour: str) -> np.ndarray:
    """Which pixels of a PNG are opaque and have this colour."""
    same = np.abs(values[..., :3] - 255 * np.array(to_rgb(colour))).max(axis=-1) < 2
    return same & (values[..., 3] > 250)


def legend_texts(figure: Figure, axes: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[axes].get_legend().get_texts()]


@pictures
def test_every_colour_of_a_picture_is_in_its_png(picture):
    for colour in COLOURS[picture]:
        assert is_colour(pixels_of(picture), colour).sum() > 20, colour


@pytest.mark.parametrize("colours", [REGION_COLOURS, TILE_COLOURS], ids=["regions", "tiles"])
def test_no_two_kinds_in_a_picture_share_a_colour(colours):
    assert len({to_hex(colour) for colour in colours.values()}) == len(colours)


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


def test_the_coverage_lines_are_the_expected_and_the_marks_the_sampled_shares():
    (axes,) = picture_of("coverage").axes
    lines, marks = axes.get_lines()[0:4:2], axes.get_lines()[1:4:2]
    for (block_size, part), line, mark in zip(
        COVERAGE.groupby("block_size"), lines, marks, strict=True
    ):
        assert line.get_xydata().tolist() == part[["num_anchors", "expected"]].values.tolist()
        assert mark.get_xydata().tolist() == part[["num_anchors", "sampled"]].values.tolist()
        assert line.get_label() == f"block {block_size}"
        assert line.get_color() == mark.get_color()
        assert line.get_linestyle() == "-" and line.get_marker() == "None"
        assert mark.get_linestyle() == "None" and mark.get_marker() != "None"
    assert legend_texts(picture_of("coverage")) == ["block 4", "block 7"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["8", "16", "64"]


@pytest.mark.parametrize(("goal", "heights"), [(0.75, [0.75, 0.75]), (None, [])])
def test_the_goal_is_a_line_at_its_height_or_none(goal, heights):
    (axes,) = plot_coverage(COVERAGE, goal=goal).axes
    assert [y for line in axes.get_lines()[4:] for y in line.get_ydata()] == heights
    assert [text.get_text() for text in axes.texts] == (["75%"] if goal else [])


def test_the_packing_lines_are_the_expected_shares_dashed_per_document():
    (axes,) = picture_of("packing").axes
    unpacked, packed = axes.get_lines()
    assert unpacked.get_xydata().tolist() == [[16, 0.5], [64, 0.9]]
    assert packed.get_xydata().tolist() == [[16, 0.2], [64, 0.45]]
    assert (unpacked.get_linestyle(), packed.get_linestyle()) == ("--", "-")
    assert legend_texts(picture_of("packing")) == [
        "unpacked, per document",
        "packed, 1024, per row",
    ]


def test_a_small_mask_is_one_cell_for_each_pair_in_its_regions_colour():
    regions = mask_regions(small_blocks(), seq_len=10)
    assert regions.unique().tolist() == [0, SEEN, OWN, DUMMY]
    painted = image(picture_of("small mask"))
    for query, line in enumerate(regions.tolist()):
        for key, value in enumerate(line):
            colour = REGION_COLOURS.get(REGIONS[value])
            assert painted[query, key, 3] == (0 if colour is None else 1)
            if colour is not None:
                assert to_hex(painted[query, key, :3]) == colour.lower()
    left, right, bottom, top = picture_of("small mask").axes[0].images[0].get_extent()
    assert (left, right, top, bottom) == (-0.5, 15.5, -0.5, 5.5)


def test_the_legend_names_the_regions_that_are_there():
    assert legend_texts(picture_of("small mask")) == ["context prefix", "own block", "dummy block"]
    regions = large_regions()[:60]
    figure = plot_mask(regions, seq_len=200, block_size=30)
    assert legend_texts(figure) == ["context prefix", "own block"]


def test_the_legend_counts_the_tiles_of_each_state():
    assert legend_texts(picture_of("tiles")) == ["empty 3", "partial 2", "full 3"]


def test_a_tile_map_is_one_cell_for_each_tile_in_its_states_colour():
    painted = image(picture_of("tiles"))
    for row, line in enumerate(TILES.tolist()):
        for column, value in enumerate(line):
            colour = TILE_COLOURS.get(TILE_STATES[value])
            assert painted[row, column, 3] == (0 if colour is None else 1)
            if colour is not None:
                assert to_hex(painted[row, column, :3]) == colour.lower()


def test_side_by_side_the_same_is_drawn_as_alone():
    mask_axes, tile_axes = picture_of("mask and tiles").axes
    assert np.array_equal(mask_axes.images[0].get_array(), image(picture_of("large mask")))
    assert np.array_equal(tile_axes.images[0].get_array(), image(picture_of("tiles")))


# (queries, keys): each is larger than a picture has pixels, one way or both; some leave a rest.
TOO_LARGE = [(90, 4000), (1300, 100), (1001, 2003)]


@pytest.mark.parametrize(("queries", "keys"), TOO_LARGE)
def test_a_pixel_is_as_deep_as_the_share_of_its_pairs_that_is_visible(queries, keys):
    generator = torch.Generator().manual_seed(0)
    regions = torch.randint(0, 4, (queries, keys), generator=generator, dtype=torch.int8)
    regions[: queries // 2, : keys // 2] = 0
    painted = image(plot_mask(regions, seq_len=keys - queries // 2, block_size=1))
    high, wide = -(-queries // painted.shape[0]), -(-keys // painted.shape[1])
    assert high * wide > 1
    assert painted.shape[0] <= 500 and painted.shape[1] <= 1000
    last_row, last_column = painted.shape[0] - 1, painted.shape[1] - 1
    for i, j in [(0, 0), (last_row, 0), (0, last_column), (last_row, last_column), (7, 60)]:
        pairs = regions[i * high : (i + 1) * high, j * wide : (j + 1) * wide].flatten().tolist()
        seen = [to_rgb(REGION_COLOURS[REGIONS[value]]) for value in pairs if value]
        assert painted[i, j, 3] == pytest.approx(len(seen) / len(pairs))
        if seen:
            mixed = [sum(channel) / len(seen) for channel in zip(*seen, strict=True)]
            assert painted[i, j, :3] == pytest.approx(mixed)


@pytest.mark.parametrize(("queries", "keys"), TOO_LARGE)
@pytest.mark.parametrize("where", [(0, 0), (-1, -1), (31, 77)])
def test_one_visible_pair_in_a_large_mask_is_one_coloured_pixel(queries, keys, where):
    regions = torch.zeros(queries, keys, dtype=torch.int8)
    regions[where] = OWN
    painted = image(plot_mask(regions, seq_len=keys - queries // 2, block_size=1))
    assert (painted[..., 3] > 0).sum() == 1
    assert to_hex(painted[painted[..., 3] > 0][0, :3]) == REGION_COLOURS["own block"].lower()


def shown(figure: Figure) -> np.ndarray:
    """The PNG's pixels without the legend."""
    figure.axes[0].get_legend().remove()
    return pixels(figure)


@pytest.mark.parametrize("picture", ["alone", "side by side"])
def test_single_pairs_of_a_large_mask_are_all_seen_in_the_png(picture):
    def draw(regions: Tensor) -> np.ndarray:
        if picture == "alone":
            return shown(plot_mask(regions, seq_len=480, block_size=1))
        return shown(mask_and_tiles(regions, TILES, seq_len=480, block_size=1, tile_size=128))

    # One pair every 23 queries: far enough apart to be told apart by the rows of the picture.
    single = torch.zeros(470, 950, dtype=torch.int8)
    pairs = [(query, 2 * query) for query in range(5, 470, 23)]
    for query, key in pairs:
        single[query, key] = SEEN
    coloured = (draw(single) != draw(torch.zeros_like(single))).any(axis=(1, 2))
    assert np.count_nonzero(np.diff(coloured.astype(int)) == 1) == len(pairs)


def test_the_line_between_context_and_slots_stands_between_their_cells():
    for name, column in (("small mask", 9.5), ("large mask", 199.5), ("tiles", 2.5)):
        line = picture_of(name).axes[0].get_lines()[0]
        assert list(line.get_xdata()) == [column, column]


def small_mask(context: list[str], slots: list[str]) -> Figure:
    regions = torch.full((len(slots), len(context) + len(slots)), OWN, dtype=torch.int8)
    return plot_mask(
        regions,
        seq_len=len(context),
        block_size=1,
        context_text=context,
        slot_text=slots,
    )


def axis_labels(text: str) -> list[str]:
    """How a token's text stands on the axes: as a context token, then as a slot's input."""
    figure = small_mask([text], [text])
    pixels(figure)
    (axes,) = figure.axes
    context, slot = (label.get_text() for label in axes.get_xticklabels())
    (query,) = (label.get_text() for label in axes.get_yticklabels())
    assert slot == query
    number, _, slot = slot.partition(" ")
    assert number == "0.0"
    return [context, slot]


@pytest.mark.parametrize("text", ["$", "$x$", "\\$", "$\\frac{$", "a$b_c$", "<b>", "\"'", "%s{0}"])
def test_a_token_is_named_on_the_axes_as_it_is_written_and_never_as_maths(text):
    for label in axis_labels(text):
        assert label.replace("\\$", "$") == text
        # matplotlib reads maths between two dollars that no backslash precedes.
        assert label.count("$") == label.count("\\$")


@pytest.mark.parametrize("text", ["\n", " ", " a b\n", "\t", "\r\n", "\u00a0"])
def test_white_space_is_visible_on_the_axes(text):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for label in axis_labels(text):
            assert label.strip() == label and label
            assert not any(character.isspace() for character in label)


@pytest.mark.parametrize("text", ["a" * 40, "a" * 10 + "$" + "b" * 9, "$" * 13])
def test_a_long_token_is_named_by_its_beginning(text):
    for label in axis_labels(text):
        assert label.endswith("…")
        beginning = label[:-1].replace("\\$", "$")
        assert 3 <= len(beginning) < 14 and text.startswith(beginning)


def test_without_names_the_context_is_numbered():
    labels = picture_of("small mask").axes[0].get_xticklabels()
    assert [label.get_text() for label in labels][:10] == [str(i) for i in range(10)]


def test_slots_are_numbered_block_dot_slot():
    labels = picture_of("small mask").axes[0].get_yticklabels()
    numbers = [label.get_text().strip() for label in labels]
    assert numbers == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]


def test_the_sorting_bars_are_the_shares_of_each_state_and_fill_their_row():
    table = sorting_table(small_blocks(), seq_len=10, tile_sizes=(2, 4))
    (axes,) = picture_of("sorting").axes
    total = table[list(TILE_STATES)].sum(axis=1)
    ends = np.zeros(len(table))
    assert legend_texts(picture_of("sorting")) == ["full", "partial", "empty"]
    for bars, state in zip(axes.containers, ("full", "partial", "empty"), strict=True):
        assert [bar.get_x() for bar in bars] == pytest.approx(ends.tolist())
        widths = [bar.get_width() for bar in bars]
        assert widths == pytest.approx((table[state] / total).tolist())
        ends += widths
    assert ends.tolist() == pytest.approx([1] * len(table))


class Page(HTMLParser):
    """What a browser makes of some HTML: its tags, the words outside styles, and the tips."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.words: list[str] = []
        self.tips: list[str] = []
        self.classes: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        if tag == "span":
            values = dict(attrs)
            self.tips.append(values.get("title") or "")
            self.classes.append(values["class"] or "")

    def handle_data(self, data: str) -> None:
        if self.get_starttag_text() and self.tags[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)


def tokens(*texts: str) -> pd.DataFrame:
    """The token table of a row with these tokens, the first of them a prompt."""
    batch = collate(documents("." + "a" * (len(texts) - 1)), 0)
    blocks = draw_blocks(batch, 2, 2, seed=0)
    return token_table(batch, blocks, lambda token_id: texts[token_id])


ODD = ("<b>", "$x$", "\n", '"', "'", "&amp;", "</span><script>", "\" onclick='", "-->", "\t ")


def test_the_token_text_is_every_token_and_no_markup_of_its_own():
    page = Page(token_text(tokens(*ODD)))
    assert page.text.replace("⏎", "") == "".join(ODD)
    assert page.tags == ["style", "div"] + ["span"] * len(ODD)
    assert set(page.attributes) == {"class", "title"}


MARKUP = st.lists(st.sampled_from(["&", "lt", "quot", ";", "<", ">", "/", "b", '"', "'", "\n"]))
ANY_TEXT = MARKUP.map("".join) | st.text(st.characters(exclude_characters="⏎\r"), max_size=6)


@given(st.lists(ANY_TEXT, min_size=2, max_size=6))
def test_any_text_can_be_read_back_from_the_token_text(texts):
    page = Page(token_text(tokens(*texts)))
    assert page.text.replace("⏎", "") == "".join(texts)
    assert page.tags == ["style", "div"] + ["span"] * len(texts)


def test_a_line_break_is_shown_and_breaks_the_line():
    assert Page(token_text(tokens("a", "\n", "b"))).text == "a⏎\nb"


def test_a_tokens_class_and_tip_tell_what_it_is():
    batch = pack(documents("..aaaaa", ".a"), 12, 99)
    blocks = draw_blocks(batch, 2, 2, seed=0)
    table = token_table(batch, blocks, str)
    page = Page(token_text(table))
    shown = table[table["state"] != "padding"]
    assert len(page.tips) == len(shown) == 9
    lines = shown.itertuples()
    for tip, classes, token in zip(page.tips, page.classes, lines, strict=True):
        facts = tip.split(" · ")
        assert f"position {token.position}" in facts
        assert f"id {token.token_id}" in facts
        assert token.state in facts
        assert ("anchor" in facts) == token.anchor
        assert ("candidate" in facts) == (token.candidate and not token.anchor)
        assert (f"covered with probability {token.p_covered:.3f}" in facts) == token.supervised
        assert ("document 1" in facts) == (token.document == 1)
        assert ("dspark-" + token.state.replace(" ", "-")) in classes.split()
        assert ("dspark-anchor" in classes.split()) == token.anchor
    states = set(shown["state"])
    assert {"prompt", "covered", "never a label"} <= states


def test_every_class_of_the_token_text_has_a_style():
    table = tokens(*"abcdefgh")
    for source in (token_text(table), token_legend(table)):
        for classes in Page(source).classes:
            assert all(f".{name}{{" in source for name in classes.split())


def test_the_legend_counts_the_tokens_of_each_kind():
    batch = pack(documents("..aaaaaaa", ".a"), 14, 99)
    table = token_table(batch, draw_blocks(batch, 2, 2, seed=0), str)
    counts = table["state"].value_counts()
    expected = {f"{state} {counts[state]}" for state in counts.index if state != "padding"} | {
        "candidate 6",
        "anchor 2",
    }
    assert {word for word in Page(token_legend(table)).words if word.strip()} == expected


def test_a_packed_document_begins_under_its_number():
    batch = pack(documents("..aa", ".a", ".a"), 9, 99)
    table = token_table(batch, draw_blocks(batch, 2, 2, seed=0), lambda i: f"[{i}]")
    assert Page(token_text(table)).text == "[0][1][2][3]document 1[0][1]document 2[0][1]"


def test_padding_is_not_part_of_the_token_text():
    batch = collate(documents(".aa"), 7, 6)
    table = token_table(batch, draw_blocks(batch, 1, 1, seed=0), lambda i: f"[{i}]")
    assert Page(token_text(table)).text == "[0][1][2]"


def acceptance(drafters: dict[str, list[float]]) -> pd.DataFrame:
    rows = [
        {"drafter": name, "slot": k, "conditional": rate, "low": rate - 0.03, "high": rate + 0.02}
        for name, rates in drafters.items()
        for k, rate in enumerate(rates)
    ]
    return pd.DataFrame(rows)


def test_acceptance_has_a_line_and_a_band_for_each_drafter() -> None:
    rates = {"one": [0.8, 0.7, 0.65], "two": [0.75, 0.6, 0.7]}
    [ax] = plot_rates(acceptance(rates)).axes
    assert [list(line.get_ydata()) for line in ax.lines] == list(rates.values())
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(rates)
    edges = [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
    assert [min(edge) for edge in edges] == pytest.approx([0.62, 0.57])
    assert [max(edge) for edge in edges] == pytest.approx([0.82, 0.77])


@pytest.mark.parametrize("low", [0.651, 0.5, 0.05])
def test_acceptance_ticks_are_what_their_labels_say(low: float) -> None:
    figure = plot_rates(acceptance({"one": [low, 0.831]}))
    figure.draw_without_rendering()
    [ax] = figure.axes
    for place, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True):
        assert float(label.get_text().rstrip("%")) == pytest.approx(100 * place)


def test_training_shows_every_step_and_can_be_empty() -> None:
    table = pd.DataFrame(
        {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "accept_rate": [0.1, 0.2, 0.4]}
    )
    table["tau"] = 1 + table["accept_rate"]
    axes = plot_training(table).axes
    for ax, name in zip(axes, ("loss", "accept_rate", "tau"), strict=True):
        dots, course = ax.lines
        assert list(dots.get_ydata()) == list(table[name]) and list(dots.get_xdata()) == [1, 2, 3]
        assert len(course.get_ydata()) == 3
    assert all(len(ax.lines) == 0 for ax in plot_training(table.iloc[:0]).axes)
