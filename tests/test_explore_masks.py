"""Masks: regions and tiles counted once more in plain loops, pictures, and the explorer."""

import warnings
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dspark_lab import explore
from dspark_lab.attention import View, training_mask_mod
from dspark_lab.blocks import draw_blocks
from dspark_lab.chats import pack
from dspark_lab.explore.masks import REGION_COLOURS, TILE_COLOURS
from dspark_lab.explore.style import visible_text
from tests import oracle
from tests.draws import PAD, Draw, draws
from tests.explorers import alert, follows, masks, tables_by_hand
from tests.gallery import OWN, SEEN, TILES, large_regions, picture_of, small_blocks
from tests.pictures import legend, pixels, tick_names
from tests.samples import documents

pytestmark = pytest.mark.usefixtures("one_thread")


def named(states: Tensor, names: tuple[str, ...]) -> list[list[str]]:
    return [[names[value] for value in line] for line in states.tolist()]


@settings(max_examples=60)
@given(draws())
def test_a_pairs_region_is_why_its_query_sees_its_key_and_each_pair_is_counted_once(draw):
    shape = (draw.anchors, draw.keep, draw.blocks.seq_len, draw.blocks.block_size)
    for apart, docs in ((True, (draw.docs,)), (False, ())):
        for row, pairs in enumerate(oracle.regions(*shape, *docs)):
            regions = explore.mask_regions(draw.blocks, documents=apart, row=row)
            assert named(regions, explore.REGIONS) == pairs
            require_counts(explore.mask_table(regions), pairs, "region", explore.REGIONS, "pairs")


def require_counts(table, cells, kind, names, counted):
    """A table that says how many cells have each name."""
    counts = [sum(line.count(name) for line in cells) for name in names]
    assert table[kind].tolist() == list(names) and table[counted].tolist() == counts
    assert table["share"].tolist() == pytest.approx([count / sum(counts) for count in counts])


@settings(max_examples=60)
@given(draws(), st.sampled_from([1, 2, 3, 5, 8, 128]))
def test_a_tiles_state_is_how_many_of_its_pairs_are_visible(draw, tile_size):
    block_mask = draw.block_mask(tile_size)
    for row, mask in enumerate(draw.dense_mask()):
        kinds = oracle.tile_kinds(mask, tile_size)
        states = explore.tile_states(block_mask, row=row)
        assert named(states, explore.TILE_STATES) == kinds
        require_counts(explore.tile_table(states), kinds, "state", explore.TILE_STATES, "tiles")
    with pytest.raises(ValueError, match="row must lie in"):
        explore.tile_states(block_mask, row=row + 1)


def test_tiles_of_a_mask_that_pytorch_made_are_read_the_same():
    batch = pack(documents("..aaaaaaaaaaaaaaaaaaaa", "....aaaaaaaa"), 40, PAD)
    blocks = draw_blocks(batch, 6, 4, seed=0)
    where = blocks.anchor_positions, blocks.block_keep_mask
    rule = training_mask_mod(*where, seq_len=40, block_size=4, doc_ids=blocks.doc_ids)
    theirs = create_block_mask(rule, 1, 1, 24, 64, device="cpu", BLOCK_SIZE=4)
    states = explore.tile_states(theirs)
    assert states.equal(explore.tile_states(Draw(batch, blocks).block_mask(4)))
    assert set(states.unique().tolist()) == {0, 1, 2}
    assert (states == 0).float().mean().item() == pytest.approx(theirs.sparsity() / 100)


def test_a_mask_without_full_tiles_has_partial_ones_and_none_past_its_counts():
    counts = torch.tensor([[[2, 0, 1]]], dtype=torch.int32)
    columns = torch.tensor([[[[2, 0, 1], [0, 1, 2], [0, 0, 0]]]], dtype=torch.int32)
    block_mask = BlockMask.from_kv_blocks(counts, columns, BLOCK_SIZE=16)
    assert explore.tile_states(block_mask).tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 0]]


def direct_counts(draw: Draw, tile_size: int) -> list[float]:
    """The numbers of a line of the sorting table, by looking at every pair."""
    masks = draw.dense_mask()
    kinds = [kind for mask in masks for row in oracle.tile_kinds(mask, tile_size) for kind in row]
    counts = [kinds.count(state) for state in explore.TILE_STATES]
    worked, visible = sum(counts[1:]), np.array(masks).sum()
    return [*counts, worked / sum(counts), 1 - visible / (worked * tile_size**2)]


def test_the_sorting_table_counts_the_tiles_of_both_orders():
    # Two rows, one of them packed, the other with dummy blocks.
    batch = pack(documents("..aaaaaaaaaaaaaaaaaaaa", "....aaaaaaaa", ".aaaa"), 36, PAD)
    draw = Draw(batch, draw_blocks(batch, 5, 3, seed=2))
    assert draw.keep == [[True] * 5, [True] * 3 + [False] * 2]
    table = explore.sorting_table(draw.blocks, tile_sizes=(3, 8))
    assert table["tile_size"].tolist() == [3, 3, 8, 8]
    assert table["order"].tolist() == ["as drawn", "shuffled"] * 2
    lines = table[[*explore.TILE_STATES, "work", "wasted"]].values.tolist()
    orders = [Draw(batch, draw.blocks.reordered(torch.tensor(o))) for o in permutations(range(5))]
    for tile_size, drawn, shuffled in ((3, *lines[:2]), (8, *lines[2:])):
        assert drawn == pytest.approx(direct_counts(draw, tile_size))
        assert any(shuffled == pytest.approx(direct_counts(o, tile_size)) for o in orders)
    pd.testing.assert_frame_equal(table, explore.sorting_table(draw.blocks, tile_sizes=(3, 8)))
    others = [explore.sorting_table(draw.blocks, tile_sizes=(3, 8), seed=i) for i in (1, 2, 3)]
    assert not all(other.equals(table) for other in others)


def image(figure: Figure) -> np.ndarray:
    """The picture inside a figure's axes as it is handed to matplotlib."""
    (painted,) = figure.axes[0].images
    return np.asarray(painted.get_array())


@pytest.mark.parametrize(
    "picture, cells, names, colours",
    [
        ("small mask", explore.mask_regions(small_blocks()), explore.REGIONS, REGION_COLOURS),
        ("tiles", TILES, explore.TILE_STATES, TILE_COLOURS),
    ],
    ids=["mask", "tiles"],
)
def test_each_pair_or_tile_is_one_cell_in_a_colour_of_its_own(picture, cells, names, colours):
    assert set(cells.unique().tolist()) == set(range(len(names)))
    assert len({to_hex(colour) for colour in colours.values()}) == len(colours) == len(names) - 1
    painted = image(picture_of(picture))
    for row, line in enumerate(cells.tolist()):
        for column, value in enumerate(line):
            colour = colours.get(names[value])
            assert painted[row, column, 3] == (0 if colour is None else 1)
            assert colour is None or to_hex(painted[row, column, :3]) == colour.lower()
    left, right, bottom, top = picture_of(picture).axes[0].images[0].get_extent()
    assert (left, right) == (-0.5, cells.shape[1] - 0.5)
    assert (top, bottom) == (-0.5, cells.shape[0] - 0.5)


def test_the_legend_names_the_regions_that_are_there_and_counts_the_tiles_of_each_state():
    regions = ["context prefix", "own block", "dummy block"]
    assert legend(picture_of("small mask").axes[0]) == regions
    figure = explore.plot_mask(large_regions()[:60], seq_len=200, block_size=30)
    assert legend(figure.axes[0]) == regions[:2]
    assert legend(picture_of("tiles").axes[0]) == ["empty 3", "partial 2", "full 3"]


def test_side_by_side_the_same_is_drawn_as_alone():
    mask_axes, tile_axes = picture_of("mask and tiles").axes
    assert np.array_equal(mask_axes.images[0].get_array(), image(picture_of("large mask")))
    assert np.array_equal(tile_axes.images[0].get_array(), image(picture_of("tiles")))


# (queries, keys): each is larger than a picture has pixels, one way or both; some leave a rest.
@pytest.mark.parametrize(("queries", "keys"), [(90, 4000), (1300, 100), (1001, 2003)])
def test_a_pixel_is_as_deep_as_the_share_of_its_pairs_that_is_visible(queries, keys):
    generator = torch.Generator().manual_seed(0)
    regions = torch.randint(0, 4, (queries, keys), generator=generator, dtype=torch.int8)
    regions[: queries // 2, : keys // 2] = 0
    regions[31, 77] = OWN
    painted = image(explore.plot_mask(regions, seq_len=keys - queries // 2, block_size=1))
    rows, columns = painted.shape[:2]
    high, wide = -(-queries // rows), -(-keys // columns)
    assert high * wide > 1 and rows <= 500 and columns <= 1000
    alone = 31 // high, 77 // wide
    for i, j in [(0, 0), (rows - 1, 0), (0, columns - 1), (rows - 1, columns - 1), (7, 60), alone]:
        pairs = regions[i * high : (i + 1) * high, j * wide : (j + 1) * wide].flatten().tolist()
        seen = [to_rgb(REGION_COLOURS[explore.REGIONS[value]]) for value in pairs if value]
        assert painted[i, j, 3] == pytest.approx(len(seen) / len(pairs))
        if seen:
            mixed = [sum(channel) / len(seen) for channel in zip(*seen, strict=True)]
            assert painted[i, j, :3] == pytest.approx(mixed)
    assert painted[alone][3] > 0


@pytest.mark.parametrize("picture", ["alone", "side by side"])
def test_single_pairs_of_a_large_mask_are_all_seen_in_the_png(picture):
    def draw(regions: Tensor) -> np.ndarray:
        figure = explore.plot_mask(regions, seq_len=480, block_size=1)
        if picture == "side by side":
            figure = explore.mask_and_tiles(
                regions, TILES, seq_len=480, block_size=1, tile_size=128
            )
        figure.axes[0].get_legend().remove()
        return pixels(figure)

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


def test_tokens_are_named_on_both_axes():
    texts = ["$x$", "$\\frac{$", " a\n"]
    regions = torch.full((3, 6), OWN, dtype=torch.int8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = {"context_text": texts, "slot_text": texts}
        figure = explore.plot_mask(regions, seq_len=3, block_size=3, **names)
        pixels(figure)
    context, slots = tick_names(figure.axes[0].xaxis), tick_names(figure.axes[0].yaxis)
    assert context[:3] == ["\\$x\\$", "\\$\\frac{\\$", "␣a⏎"]
    assert context[3:] == slots == [f"0.{i} {name}" for i, name in enumerate(context[:3])]


@example("a" * 10 + "$" + "b" * 9)
@given(st.text("$\\ \n\t\r\u00a0ab<", max_size=20) | st.text(max_size=20))
def test_a_tokens_name_is_its_beginning_with_visible_white_space_and_no_maths(text):
    name, beginning = visible_text(text), text if len(text) <= 12 else text[:11] + "…"
    # matplotlib reads maths between two dollars that no backslash precedes.
    assert name.count("$") == name.count("\\$") == beginning.count("$")
    for shown, character in zip(name.replace("\\$", "$"), beginning, strict=True):
        visible = character.isprintable() and character != " "
        assert shown == character if visible else shown in "⏎⇥␣·"


def test_without_names_the_context_is_numbered_and_slots_are_block_dot_slot():
    ax = picture_of("small mask").axes[0]
    assert tick_names(ax.xaxis)[:10] == [str(i) for i in range(10)]
    numbers = [name.strip() for name in tick_names(ax.yaxis)]
    assert numbers == ["0.0", "0.1", "1.0", "1.1", "2.0", "2.1"]


def test_the_sorting_bars_are_the_shares_of_each_state_and_fill_their_row():
    table = explore.sorting_table(small_blocks(), tile_sizes=(2, 4))
    (axes,) = picture_of("sorting").axes
    total = table[list(explore.TILE_STATES)].sum(axis=1)
    ends = np.zeros(len(table))
    assert legend(axes) == ["full", "partial", "empty"]
    for bars, state in zip(axes.containers, ("full", "partial", "empty"), strict=True):
        assert [bar.get_x() for bar in bars] == pytest.approx(ends.tolist())
        assert state == "empty" or to_hex(bars[0].get_facecolor()) == TILE_COLOURS[state].lower()
        widths = [bar.get_width() for bar in bars]
        assert widths == pytest.approx((table[state] / total).tolist())
        ends += widths
    assert ends.tolist() == pytest.approx([1] * len(table))


def test_the_mask_tables_follow_the_sliders():
    explorer = masks()
    for name, value, by_hand in [
        ("num_anchors", 3, ([0], 26, 3, 3)),
        ("conversation", 1, ([1], 15, 3, 3)),
        ("packed", True, ([1, 2], 512, 3, 3)),
        ("row_length", 64, ([1], 64, 3, 3)),
        ("conversation", 0, ([0, 1], 64, 3, 3)),
        ("num_anchors", 20, ([0, 1], 64, 20, 3)),
    ]:
        follows(explorer, name, value, tables_by_hand(*by_hand))
        assert list(explorer.tables) == ["mask", "tiles", "blocks"]


def test_tile_size_cuts_the_same_mask_into_other_tiles():
    explorer = masks(tile_size=16)
    mask, tiles = explorer.table, explorer.tables["tiles"]
    explorer.controls["tile_size"].value = 32
    pd.testing.assert_frame_equal(explorer.table, mask)
    assert tiles["tiles"].sum() == 2 and explorer.tables["tiles"]["tiles"].sum() == 1
    with pytest.raises(ValueError, match="tile_size.*100"):
        masks(tile_size=100)


def test_shuffling_the_anchors_hides_and_shows_as_many_pairs_in_more_tiles():
    explorer = masks(conversation=2, num_anchors=60, block_size=1, tile_size=16)
    mask, tiles, blocks = explorer.tables.values()
    explorer.controls["shuffled"].value = True
    pd.testing.assert_frame_equal(explorer.table, mask)
    worked = [t.set_index("state")["tiles"]["empty"] for t in (tiles, explorer.tables["tiles"])]
    assert worked[1] < worked[0]
    positions = explorer.tables["blocks"]["position_id"].tolist()
    assert positions != blocks["position_id"].tolist()
    assert sorted(positions) == sorted(blocks["position_id"])


def test_context_keeps_so_many_tokens_and_answers_among_them():
    explorer = masks(conversation=2, context=12)
    blocks = explorer.tables["blocks"]
    assert explorer.table["pairs"].sum() == 6 * (12 + 6)
    assert blocks["supervised"].any()
    # A third of them stands before the answer.
    assert blocks[blocks["kept"]]["context"].min() >= 4


def test_a_mask_that_cannot_be_drawn_shows_no_old_picture():
    explorer = masks(conversation=2, packed=True, row_length=128)
    before = explorer.view.state
    explorer.controls["row_length"].value = 64
    assert "96 tokens" in alert(explorer)
    bundle = explorer._repr_mimebundle_()
    assert "image/png" not in bundle and "96 tokens" in bundle["text/plain"]
    explorer.controls["row_length"].value = 128
    assert explorer.view.state == before | {"frame": explorer.frames_drawn}


@pytest.mark.parametrize("window, causal", [(None, False), (3, False), (None, True), (3, True)])
@pytest.mark.parametrize("layout", ["anchor_predicts", "anchor_given"])
def test_a_window_and_causal_blocks_are_drawn_as_a_loop_over_pairs_has_them(layout, window, causal):
    batch = pack(documents("paaaa", "paaaaaa"), 14, PAD)
    blocks = draw_blocks(batch, 4, 3, seed=2, layout=layout)
    view = View(window, causal)
    regions = explore.mask_regions(blocks, view=view)
    table = explore.block_table(blocks, str, view=view)
    anchors, docs = blocks.anchor_positions[0].tolist(), blocks.doc_ids[0].tolist()
    for query in range(12):
        anchor, slot = anchors[query // 3], query % 3
        seen = 0
        for key in range(14):
            visible = key < anchor and docs[key] == docs[anchor]
            visible = visible and (window is None or anchor + slot - key < window)
            assert (int(regions[query, key]) > 0) == visible
            seen += visible
        for key in range(12):
            own = key // 3 == query // 3 and (not causal or key % 3 <= slot)
            assert (int(regions[query, 14 + key]) > 0) == own
        line = table.loc[query]
        assert line["context"] == seen
        predicts = anchor + slot + (layout == "anchor_predicts")
        given = layout == "anchor_given" and slot == 0
        assert line["label_position"] == (-1 if given else predicts)
        assert not (given and (line["supervised"] or line["label"]))
        if line["supervised"]:
            assert line["label"] == str(int(batch.input_ids[0, predicts]))


def test_the_mask_explorer_follows_its_layout_window_and_causal_controls():
    explorer = masks(layout="anchor_given", per="document", packed=True, row_length=64)
    assert (explorer.tables["blocks"]["label_position"] == -1).any()
    before = explorer.tables["mask"]["pairs"].tolist()
    explorer.controls["window"].value = 4
    narrow = explorer.tables["mask"]["pairs"].tolist()
    assert narrow[1] < before[1] and narrow[2:] == before[2:]
    explorer.controls["causal"].value = True
    assert explorer.tables["mask"]["pairs"].tolist()[2] < narrow[2]
