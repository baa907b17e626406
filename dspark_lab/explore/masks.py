"""Attention masks: what each block sees, pair by pair and tile by tile."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Annotated, Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import avg_pool2d

from dspark_lab.attention import FULL, ContextRanges, View, block_mask, dense_mask
from dspark_lab.blocks import Blocks, Layout, Per
from dspark_lab.chats import Like, token_texts
from dspark_lab.checks import Within, checked, require
from dspark_lab.explore import style
from dspark_lab.explore.anchors import ConversationRows, block_table, drawn_blocks
from dspark_lab.explore.controls import checkbox, selection_slider, slider
from dspark_lab.explore.explorer import Explorer, Frame
from dspark_lab.explore.style import BLUE, INK, ORANGE, PINK, RED, SKY, visible_text
from dspark_lab.training import ChatsLike

REGIONS = ("hidden", "context prefix", "own block", "dummy block")
REGION_COLOURS = {"context prefix": SKY, "own block": RED, "dummy block": PINK}
TILE_STATES = ("empty", "partial", "full")
TILE_COLOURS = {"partial": ORANGE, "full": BLUE}
TILE_SIZES = (16, 32, 64, 128, 256)
# A picture of at most this many cells along a side is drawn cell by cell, with its tokens' names.
MOST_NAMED_CELLS = 48
# A larger one has as many rows and columns as its axes surely have pixels, so that none is lost.
MOST_ROWS, MOST_COLUMNS = 240, 480

Regions = Int[Tensor, "query key"]
States = Int[Tensor, "query_tile key_tile"]


@checked
def mask_regions(
    blocks: Blocks, *, documents: bool = True, row: int = 0, view: View = FULL
) -> Regions:
    """Each pair of one row's attention mask as an index into ``REGIONS``, int8.

    ``view`` is that of a layer with a window or causal blocks.
    With ``documents`` False, blocks see all documents before them: the mask of a trainer that
    forgets that its rows are packed.
    """
    one = blocks.row(row)
    if not documents:
        one = replace(one, doc_ids=torch.zeros_like(one.doc_ids))
    region = dense_mask(ContextRanges.of(one, view))[0].to(torch.int8)
    own, dummy = REGIONS.index("own block"), REGIONS.index("dummy block")
    own_region = torch.where(one.block_keep_mask[0], own, dummy).to(torch.int8)
    region[:, one.seq_len :] *= own_region.repeat_interleave(one.block_size).unsqueeze(1)
    return region


@checked
def mask_table(regions: Regions) -> pd.DataFrame:
    """How many pairs of a mask belong to each region: ``region``, ``pairs``, ``share``."""
    return _count_table(regions, "region", REGIONS, "pairs")


@checked
def tile_states(mask: BlockMask, *, row: int = 0) -> States:
    """Each tile of one row of a block mask as an index into ``TILE_STATES``, int8."""
    states = _states_by_row(mask)
    require("row", row, Annotated[int, Within(0, len(states) - 1)])
    return states[row]


@checked
def tile_table(states: States) -> pd.DataFrame:
    """How many tiles are in each state: ``state``, ``tiles``, ``share``."""
    return _count_table(states, "state", TILE_STATES, "tiles")


@checked
def sorting_table(
    blocks: Blocks, *, tile_sizes: tuple[int, ...] = (32, 64, 128), seed: int = 0
) -> pd.DataFrame:
    """Tiles with anchors in ascending order and shuffled: what sorting them is worth.

    The tiles in each state are those of all rows; ``work`` is the share of pairs that a kernel
    computes (partial and full tiles), ``wasted`` the share of that work that the mask hides.
    """
    drawn = ContextRanges.of(blocks)
    orders = {"as drawn": drawn, "shuffled": ContextRanges.of(_shuffled(blocks, seed))}
    block_size, all_blocks = blocks.block_size, blocks.block_keep_mask.numel()
    visible = int((drawn.end - drawn.start).sum()) * block_size + all_blocks * block_size**2
    rows = []
    for tile_size, (order, ranges) in product(tile_sizes, orders.items()):
        states = _states_by_row(block_mask(ranges, tile_size)).flatten(0, 1)
        empty, partial, full = counts = tile_table(states)["tiles"]
        computed = partial + full
        wasted = 1 - visible / (computed * tile_size**2)
        rows.append((tile_size, order, *counts, computed / (empty + computed), wasted))
    return pd.DataFrame(rows, columns=["tile_size", "order", *TILE_STATES, "work", "wasted"])


def _count_table(cells: Tensor, kind: str, names: Sequence[str], counted: str) -> pd.DataFrame:
    """How many cells have each value, which is an index into ``names``."""
    counts = torch.bincount(cells.flatten().int(), minlength=len(names)).numpy()
    return pd.DataFrame({kind: names, counted: counts, "share": counts / max(1, cells.numel())})


def _states_by_row(mask: BlockMask) -> Int[Tensor, "row query_tile key_tile"]:
    partial = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices).to_dense()
    return (2 * mask.to_dense() - partial)[:, 0].to(torch.int8)


def plot_mask(
    regions: Regions,
    *,
    seq_len: int,
    block_size: int,
    context_text: Sequence[str] | None = None,
    slot_text: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The attention mask with its regions in colour: queries down, keys across.

    ``regions`` are from :func:`mask_regions`. A small mask has the texts of its context tokens (or
    their positions) and of its slots' inputs on its axes. In a large one, a pixel is as deep as the
    share of its pairs that is visible. ``ax`` takes the place of a new figure.
    """
    queries, keys = regions.shape
    named = max(queries, keys) <= MOST_NAMED_CELLS
    if ax is None:
        width, height = (0.24 * keys + 1.6, 0.24 * queries + 1.9) if named else (8.0, 4.6)
        _, ax = style.new_figure(width, height)
    colours = {i: REGION_COLOURS[REGIONS[i]] for i in regions.unique().tolist() if i}
    _paint(ax, regions, colours)
    ax.axvline(seq_len - 0.5, color=INK, linewidth=1)
    if named:
        context = [visible_text(text) for text in context_text or map(str, range(seq_len))]
        inputs = [visible_text(text) for text in slot_text or [""] * queries]
        slots = [f"{i // block_size}.{i % block_size} {text}" for i, text in enumerate(inputs)]
        ax.set_xticks(range(keys), context + slots, rotation=90)
        ax.set_yticks(range(queries), slots)
        ax.tick_params(labelsize=7 if keys <= 40 else 6, length=0)
        _rule(ax, np.arange(queries), np.arange(keys), linewidth=0.3)
        edges = np.arange(block_size, queries, block_size)
        _rule(ax, edges, seq_len + edges, linewidth=1)
        ax.set_xlabel("keys: context tokens, then slots (block.slot input)")
        ax.set_ylabel("queries: slots (block.slot input)")
    else:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_xlabel(f"keys: {seq_len} context tokens, then {queries} slots")
        ax.set_ylabel(f"queries: {queries // block_size} blocks of {block_size} slots")
    handles = [Patch(facecolor=colour, label=REGIONS[i]) for i, colour in colours.items()]
    style.legend_above(ax, 3, handles=handles)
    return cast(Figure, ax.figure)


def plot_tiles(states: States, *, seq_len: int, tile_size: int, ax: Axes | None = None) -> Figure:
    """The tiles that a FlexAttention kernel works through, from :func:`tile_states`."""
    rows, columns = states.shape
    if ax is None:
        _, ax = style.new_figure(8.0, 4.6)
    _paint(ax, states, {TILE_STATES.index(state): colour for state, colour in TILE_COLOURS.items()})
    ax.axvline(seq_len / tile_size - 0.5, color=INK, linewidth=1)
    if rows * columns <= 4000:
        _rule(ax, np.arange(rows), np.arange(columns), linewidth=0.3)
    for axis, tiles in ((ax.xaxis, columns), (ax.yaxis, rows)):
        axis.set_ticks(range(0, tiles, -(-tiles // 6)))
    ax.set(xlabel=f"key tiles of {tile_size}", ylabel=f"query tiles of {tile_size}")
    handles = []
    for state, count in zip(TILE_STATES, tile_table(states)["tiles"], strict=True):
        colour = TILE_COLOURS.get(state, "none")
        handles.append(Patch(facecolor=colour, edgecolor=INK, label=f"{state} {count}"))
    style.legend_above(ax, 3, handles=handles)
    return cast(Figure, ax.figure)


@checked
def mask_and_tiles(
    regions: Regions,
    states: States,
    *,
    seq_len: int,
    block_size: int,
    tile_size: int,
    context_text: Sequence[str] | None = None,
    slot_text: Sequence[str] | None = None,
) -> Figure:
    """:func:`plot_mask` and :func:`plot_tiles` side by side."""
    named = max(regions.shape) <= MOST_NAMED_CELLS
    width, height = 9.5, min(max(3.6, 0.15 * regions.shape[0] + 1.9), 6.5) if named else 3.6
    figure, (left, right) = style.new_figure(
        width, height, columns=2, layout="none", width_ratios=(3, 2), wspace=0.25
    )
    # Fixed margins, in inches: finding the best ones would take longer than all the drawing.
    margin, below = (1.35, 1.35) if named else (0.65, 0.55)
    figure.subplots_adjust(margin / width, below / height, 0.99, 1 - 0.35 / height)
    names = {"context_text": context_text, "slot_text": slot_text}
    plot_mask(regions, seq_len=seq_len, block_size=block_size, ax=left, **names)
    plot_tiles(states, seq_len=seq_len, tile_size=tile_size, ax=right)
    return figure


def plot_sorting(table: pd.DataFrame) -> Figure:
    """The tiles in each state, from :func:`sorting_table`, as stacked bars."""
    figure, ax = style.new_figure(7, 0.34 * len(table) + 1.3)
    labels = table["tile_size"].astype(str) + " · " + table["order"]
    shares = table[list(TILE_STATES)].div(table[list(TILE_STATES)].sum(axis=1), axis=0)
    look = {"edgecolor": INK, "linewidth": 0.6}
    left = np.zeros(len(table))
    for state in ("full", "partial", "empty"):
        colour = TILE_COLOURS.get(state, "none")
        ax.barh(labels, shares[state], left=left, color=colour, label=state, **look)
        left = left + shares[state]
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set(xlim=(0, 1), xlabel="share of tiles", ylabel="tile size · anchors")
    style.legend_above(ax, 3)
    return figure


def _paint(ax: Axes, cells: Int[Tensor, "row column"], colours: dict[int, str]) -> None:
    """Draw cells in the colours of their values, cell (i, j) centred at (j, i).

    Where there are more cells than pixels, a pixel is as deep as the share of its cells that have a
    colour, and mixes their colours.
    """
    rows, columns = cells.shape
    pixel = -(-rows // MOST_ROWS), -(-columns // MOST_COLUMNS)

    def counted(chosen: Tensor) -> np.ndarray:
        planes = chosen.float().unsqueeze(0)
        return avg_pool2d(planes, pixel, ceil_mode=True, divisor_override=1)[0].double().numpy()

    inside = counted(torch.ones_like(cells))
    image = np.zeros((*inside.shape, 4))
    for value, colour in colours.items():
        share = counted(cells == value) / inside
        image[..., :3] += share[..., None] * to_rgb(colour)
        image[..., 3] += share
    image[..., :3] /= np.maximum(image[..., 3:], 1e-9)
    bottom, right = np.multiply(inside.shape, pixel) - 0.5
    ax.imshow(image, extent=(-0.5, right, bottom, -0.5), aspect="auto", interpolation="nearest")
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    ax.spines[:].set_visible(True)


def _rule(ax: Axes, rows: np.ndarray, columns: np.ndarray, linewidth: float) -> None:
    """Lines above the given rows and left of the given columns of cells."""
    ax.hlines(rows - 0.5, *ax.get_xlim(), color=INK, linewidth=linewidth)
    ax.vlines(columns - 0.5, *ax.get_ylim(), color=INK, linewidth=linewidth)


@checked
def explore_masks(
    chats: ChatsLike | None = None,
    tokenizer: Any = None,
    *,
    num_anchors: int = 16,
    block_size: int = 7,
    tile_size: int = 128,
    seed: int = 0,
    conversation: int = 0,
    packed: bool = False,
    row_length: int = 512,
    context: int = 512,
    per: Per = "row",
    layout: Layout = "anchor_predicts",
    window: int = 0,
    causal: bool = False,
    like: Like | None = None,
) -> Explorer:
    """The mask of each block of a conversation, pair by pair and tile by tile.

    ``context`` is how many tokens around the first answer to keep: with few of them and few blocks
    the mask is drawn cell by cell. ``window`` (0: none) and ``causal`` are those of layers that see
    the last tokens of the context alone, and of their block no later slot. All other arguments are
    as in :func:`explore_anchors`, and the tables ``mask``, ``tiles`` and ``blocks``.
    """
    given = dict(locals())
    rows = ConversationRows(chats, tokenizer, like)

    def draw(chosen: SimpleNamespace) -> Frame:
        batch = rows.row(chosen.conversation, chosen.packed, chosen.row_length, chosen.context)
        blocks, view = drawn_blocks(batch, chosen), View(chosen.window or None, chosen.causal)
        if chosen.shuffled:
            blocks = _shuffled(blocks, chosen.seed)
        regions = mask_regions(blocks, view=view)
        tiles = tile_states(block_mask(ContextRanges.of(blocks, view), chosen.tile_size))
        table = block_table(blocks, rows.to_text, view=view)

        def figure() -> Figure:
            drawn: dict[str, Any] = {"seq_len": blocks.seq_len, "block_size": blocks.block_size}
            drawn["context_text"] = token_texts(rows.to_text, batch.input_ids[0].tolist())
            drawn["slot_text"] = table["input"].tolist()
            return mask_and_tiles(regions, tiles, tile_size=chosen.tile_size, **drawn)

        tables = {"mask": mask_table(regions), "tiles": tile_table(tiles), "blocks": table}
        alt = "the attention mask with its regions, and its tiles"
        return Frame(tables, figure, alt=alt)

    drawn = (num_anchors, block_size, seed, per, layout)
    controls = rows.controls(conversation, packed, row_length, *drawn)
    controls.insert(3, slider("context", context, 8, 1024))
    controls += [slider("window", window, 0, 512), checkbox("causal", causal)]
    controls += [selection_slider("tile_size", tile_size, TILE_SIZES), checkbox("shuffled", False)]
    return Explorer("explore_masks", controls, draw, reasons=rows.reasons, given=given)


def _shuffled(blocks: Blocks, seed: int) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    return blocks.reordered(torch.randperm(blocks.num_anchors, generator=generator))
