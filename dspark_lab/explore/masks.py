"""Attention masks: what each block sees, pair by pair and tile by tile."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from types import SimpleNamespace
from typing import Annotated, Any, cast, overload

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
from dspark_lab.chats import Batch, Like
from dspark_lab.checks import Count, Within, checked, require, require_columns
from dspark_lab.explore import style
from dspark_lab.explore.anchors import ConversationRows, block_table, drawn_blocks, slot_inputs
from dspark_lab.explore.controls import checkbox, dropdown, selection_slider, slider
from dspark_lab.explore.explorer import Explorer
from dspark_lab.explore.frame import Frame
from dspark_lab.explore.mask_geometry import (
    PRESETS,
    MaskLike,
    MaskSpans,
    RuleMask,
    count_differences,
    other_mask,
    shuffled_blocks,
)
from dspark_lab.explore.mask_view import MaskView, mask_row, mask_state
from dspark_lab.explore.style import BLUE, INK, ORANGE, PINK, RED, SKY, visible_text
from dspark_lab.training import ChatsLike

REGIONS = ("hidden", "context prefix", "own block", "dummy block")
REGION_COLOURS = {"context prefix": SKY, "own block": RED, "dummy block": PINK}
TILE_STATES = ("empty", "partial", "full")
TILE_COLOURS = {"partial": ORANGE, "full": BLUE}
TILE_SIZES = (16, 32, 64, 128, 256)
# A picture of at most this many cells along a side is drawn cell by cell, with its tokens' names.
MOST_NAMED_CELLS = 38
_MOST_NAMED_BESIDE = 20
# A larger one has as many rows and columns as its axes surely have pixels, so that none is lost.
PIXEL_ROWS, PIXEL_COLUMNS = 240, 360
# An explorer looks at a mask of at most so many pairs one by one, at a larger one as intervals.
MOST_DENSE_PAIRS = 2**20

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
def mask_spans(
    blocks: Blocks, *, documents: bool = True, row: int = 0, view: View = FULL
) -> MaskSpans:
    """:func:`mask_regions` as intervals, for masks that are too large for a matrix."""
    return RuleMask(blocks.row(row), view, one_document=not documents).regions


@checked
def tile_spans(
    blocks: Blocks, tile_size: Count = 128, *, row: int = 0, view: View = FULL
) -> MaskSpans:
    """:func:`tile_states` of the blocks' mask as intervals."""
    return RuleMask(blocks.row(row), view).tiles(tile_size)


@checked
def difference_table(
    blocks: Blocks, other: MaskLike, *, batch: Batch | None = None, view: View = FULL
) -> pd.DataFrame:
    """What only one of two masks of the first row sees, by kind, with the first place of each.

    ``other`` is a mask of a trainer in any form that ``check_mask`` takes, other blocks, or one of
    "causal block", "forgotten documents", "context with the anchor" and "window" (half as wide, 64
    where there is none). Kinds are those of the first mask; ``batch`` tells which are padding.
    """
    one = blocks.row(0)
    length = None if batch is None else int(batch.attention_mask[0].sum())
    mask = RuleMask(one, view, length=length)
    return count_differences(mask, other_mask(mask, other))


@checked
def mask_table(regions: Regions | MaskSpans) -> pd.DataFrame:
    """How many pairs of a mask belong to each region: ``region``, ``pairs``, ``share``."""
    return _count_table(regions, "region", REGIONS, "pairs")


@checked
def tile_states(mask: BlockMask, *, row: int = 0) -> States:
    """Each tile of one row of a block mask as an index into ``TILE_STATES``, int8."""
    states = _states_by_row(mask)
    require("row", row, Annotated[int, Within(0, len(states) - 1)])
    return states[row]


@checked
def tile_table(states: States | MaskSpans) -> pd.DataFrame:
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
    orders = {"as drawn": blocks, "shuffled": shuffled_blocks(blocks, seed)}
    masks = {
        order: [RuleMask(drawn.row(row)) for row in range(len(drawn.doc_ids))]
        for order, drawn in orders.items()
    }
    visible = sum(mask.regions.counts(4)[1:].sum() for mask in masks["as drawn"])
    rows = []
    for tile_size, (order, of_rows) in product(tile_sizes, masks.items()):
        counts = np.sum([mask.tiles(tile_size).counts(3) for mask in of_rows], axis=0)
        empty, partial, full = counts.tolist()
        computed = partial + full
        wasted = 1 - visible / (computed * tile_size**2)
        rows.append((tile_size, order, *counts, computed / (empty + computed), wasted))
    return pd.DataFrame(rows, columns=["tile_size", "order", *TILE_STATES, "work", "wasted"])


def _count_table(
    cells: Tensor | MaskSpans, kind: str, names: Sequence[str], counted: str
) -> pd.DataFrame:
    """How many cells have each value, which is an index into ``names``."""
    if isinstance(cells, MaskSpans):
        counts = cells.counts(len(names))
    else:
        counts = torch.bincount(cells.flatten().int(), minlength=len(names)).numpy()
    return pd.DataFrame({kind: names, counted: counts, "share": counts / max(1, counts.sum())})


def _states_by_row(mask: BlockMask) -> Int[Tensor, "row query_tile key_tile"]:
    partial = BlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices).to_dense()
    return (2 * mask.to_dense() - partial)[:, 0].to(torch.int8)


@overload
def plot_mask(
    regions: Blocks,
    *,
    batch: Batch | None = None,
    to_text: Callable[[int], str] | None = None,
    compare: MaskLike | None = None,
    view: View = FULL,
    tile_size: int = 128,
    row: int = 0,
) -> MaskView: ...
@overload
def plot_mask(
    regions: Regions | MaskSpans,
    *,
    seq_len: int,
    block_size: int,
    context_text: Sequence[str] | None = None,
    slot_text: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure: ...
def plot_mask(regions: Blocks | Regions | MaskSpans, **options: Any) -> MaskView | Figure:
    """The attention mask with its regions in colour: queries down, keys across.

    Given blocks, of any size, a widget: the mask of their ``row`` under a layer's ``view``, beside
    another to ``compare`` with, as :func:`difference_table` takes it. ``batch`` and ``to_text``
    name its tokens.

    Given ``regions``, from :func:`mask_regions` or :func:`mask_spans`, a figure. A small mask has
    the texts of its context tokens (or their positions) and of its slots' inputs on its axes. In a
    large one, a pixel is as deep as the share of its pairs that is visible. ``ax`` takes the place
    of a new figure.
    """
    if isinstance(regions, Blocks):
        return _mask_widget(regions, **options)
    return _mask_figure(regions, **options)


@checked
def _mask_widget(
    blocks: Blocks,
    *,
    batch: Batch | None = None,
    to_text: Callable[[int], str] | None = None,
    compare: MaskLike | None = None,
    view: View = FULL,
    tile_size: int = 128,
    row: int = 0,
) -> MaskView:
    length = None if batch is None else int(batch.attention_mask[row].sum())
    mask = RuleMask(blocks.row(row), view, length=length)
    other = None if compare is None else other_mask(mask, compare)
    tokens = None if batch is None or to_text is None else mask_row(batch, to_text, row=row)
    state = mask_state(mask, tile_size=tile_size, other=other, row=tokens)
    shown = MaskView(state=state | {"frame": 1})
    sizes: dict[str, Any] = {"seq_len": blocks.seq_len, "block_size": blocks.block_size}
    texts = None if tokens is None else tokens["texts"]
    shown.figure = lambda: _mask_figure(mask.regions, **sizes, context_text=texts)
    return shown


def _mask_figure(
    regions: Regions | MaskSpans,
    *,
    seq_len: int,
    block_size: int,
    context_text: Sequence[str] | None = None,
    slot_text: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    queries, keys = regions.shape
    beside = ax is not None
    named = max(queries, keys) <= (_MOST_NAMED_BESIDE if beside else MOST_NAMED_CELLS)
    if ax is None:
        cell = min(0.24, (style.WIDEST - 1.6) / keys)
        width, height = (cell * keys + 1.6, cell * queries + 1.9) if named else (style.WIDEST, 4.2)
        _, ax = style.new_figure(width, height)
    colours = {i: REGION_COLOURS[REGIONS[i]] for i in _values(regions) if i}
    _paint(ax, regions, colours)
    ax.axvline(seq_len - 0.5, color=INK, linewidth=1)
    if named:
        context = [visible_text(text) for text in context_text or map(str, range(seq_len))]
        inputs = [visible_text(text) for text in slot_text or [""] * queries]
        slots = [f"{i // block_size}.{i % block_size} {text}" for i, text in enumerate(inputs)]
        ax.set_xticks(range(keys), context + slots, rotation=90)
        ax.set_yticks(range(queries), slots)
        ax.tick_params(length=0)
        _rule(ax, np.arange(queries), np.arange(keys), linewidth=0.3)
        edges = np.arange(block_size, queries, block_size)
        _rule(ax, edges, seq_len + edges, linewidth=1)
        ax.set_xlabel("keys: context tokens, then slots (block.slot input)")
        ax.set_ylabel("queries: slots (block.slot input)")
    else:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
            axis.set_major_formatter("{x:,.0f}")
        ax.set_xlabel(f"keys: {seq_len:,} context tokens, then {queries:,} slots")
        ax.set_ylabel(f"queries: {queries // block_size:,} blocks of {block_size} slots")
    handles = [Patch(facecolor=colour, label=REGIONS[i]) for i, colour in colours.items()]
    style.legend_above(ax, 2 if beside else 3, handles=handles)
    return cast(Figure, ax.figure)


def plot_tiles(
    states: States | MaskSpans, *, seq_len: int, tile_size: int, ax: Axes | None = None
) -> Figure:
    """The tiles that a FlexAttention kernel works through, from :func:`tile_states`."""
    rows, columns = states.shape
    beside = ax is not None
    if ax is None:
        _, ax = style.new_figure(style.WIDEST, 4.2)
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
        handles.append(Patch(facecolor=colour, edgecolor=INK, label=f"{state} {count:,}"))
    style.legend_above(ax, 2 if beside else 3, handles=handles)
    return cast(Figure, ax.figure)


@checked
def mask_and_tiles(
    regions: Regions | MaskSpans,
    states: States | MaskSpans,
    *,
    seq_len: int,
    block_size: int,
    tile_size: int,
    context_text: Sequence[str] | None = None,
    slot_text: Sequence[str] | None = None,
) -> Figure:
    """:func:`plot_mask` and :func:`plot_tiles` side by side."""
    named = max(regions.shape) <= _MOST_NAMED_BESIDE
    width, height = style.WIDEST, max(3.6, 0.15 * regions.shape[0] + 2.1) if named else 3.6
    figure, (left, right) = style.new_figure(
        width, height, columns=2, layout="none", width_ratios=(3, 2), wspace=0.25
    )
    # Fixed margins, in inches: finding the best ones would take longer than all the drawing.
    margin, below = (1.35, 1.35) if named else (0.65, 0.55)
    figure.subplots_adjust(margin / width, below / height, 0.99, 1 - 0.5 / height)
    names = {"context_text": context_text, "slot_text": slot_text}
    _mask_figure(regions, seq_len=seq_len, block_size=block_size, ax=left, **names)
    plot_tiles(states, seq_len=seq_len, tile_size=tile_size, ax=right)
    return figure


def plot_sorting(table: pd.DataFrame) -> Figure:
    """The tiles in each state, from :func:`sorting_table`, as stacked bars."""
    require_columns("table", table, ["tile_size", "order", *TILE_STATES])
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


def _values(cells: Tensor | MaskSpans) -> list[int]:
    if isinstance(cells, MaskSpans):
        return np.unique(cells.value).tolist()
    return cells.unique().tolist()


def _paint(ax: Axes, cells: Tensor | MaskSpans, colours: dict[int, str]) -> None:
    """Draw cells in the colours of their values, cell (i, j) centred at (j, i).

    Where there are more cells than pixels, a pixel is as deep as the share of its cells that have a
    colour, and mixes their colours.
    """
    rows, columns = cells.shape
    height, width = -(-rows // PIXEL_ROWS), -(-columns // PIXEL_COLUMNS)

    def counted(value: int) -> np.ndarray:
        if isinstance(cells, MaskSpans):
            return cells.covered(value, height, width)
        planes = (cells == value).float().unsqueeze(0)
        pooled = avg_pool2d(planes, (height, width), ceil_mode=True, divisor_override=1)
        return pooled[0].double().numpy()

    down, across = -(-rows // height), -(-columns // width)
    inside = np.outer(
        np.minimum(height, rows - height * np.arange(down)),
        np.minimum(width, columns - width * np.arange(across)),
    )
    image = np.zeros((down, across, 4))
    for value, colour in colours.items():
        share = counted(value) / inside
        image[..., :3] += share[..., None] * to_rgb(colour)
        image[..., 3] += share
    image[..., :3] /= np.maximum(image[..., 3:], 1e-9)
    extent = (-0.5, across * width - 0.5, down * height - 0.5, -0.5)
    ax.imshow(image, extent=extent, aspect="auto", interpolation="nearest")
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
    compare: Any = None,
) -> Explorer:
    """The mask of each block of a conversation, pair by pair and tile by tile.

    ``context`` is how many tokens around the first answer to keep. ``window`` (0: none) and
    ``causal`` are those of layers that see the last tokens of the context alone, and of their block
    no later slot. ``compare`` is another mask: one of a trainer in any form that ``check_mask``
    takes, "causal block", "forgotten documents", "context with the anchor", "window", "shuffled
    anchors", or another seed, as a number or as "seed 7". All other arguments are as in
    :func:`explore_anchors`, and the tables ``mask``, ``tiles``, ``blocks`` and, where masks are
    compared, ``difference``.
    """
    given = dict(locals())
    rows = ConversationRows(chats, tokenizer, like)
    start, options = _comparisons(compare)

    @lru_cache(maxsize=16)
    def row_of(*chosen: Any) -> tuple[Batch, dict[str, Any]]:
        batch = rows.row(*chosen)
        return batch, mask_row(batch, rows.to_text)

    def draw(chosen: SimpleNamespace) -> Frame:
        batch, row = row_of(chosen.conversation, chosen.packed, chosen.row_length, chosen.context)
        blocks, view = drawn_blocks(batch, chosen), View(chosen.window or None, chosen.causal)
        if chosen.shuffled:
            blocks = shuffled_blocks(blocks, chosen.seed)
        length = int(batch.attention_mask[0].sum())
        mask, other = RuleMask(blocks, view, length=length), None
        if chosen.compare in options[:1]:
            pass
        elif chosen.compare == "yours":
            other = other_mask(mask, compare)
        elif chosen.compare == "shuffled anchors":
            other = other_mask(mask, shuffled_blocks(blocks, chosen.seed + 1), chosen.compare)
        elif chosen.compare.startswith("seed "):
            number = int(chosen.compare.removeprefix("seed "))
            drawn = SimpleNamespace(**vars(chosen) | {"seed": number})
            other = other_mask(mask, drawn_blocks(batch, drawn), chosen.compare)
        else:
            other = other_mask(mask, chosen.compare)

        def parts() -> tuple[Tensor | MaskSpans, Tensor | MaskSpans]:
            if np.prod(mask.shape) > MOST_DENSE_PAIRS:
                return mask.regions, mask.tiles(chosen.tile_size)
            tiled = block_mask(ContextRanges.of(blocks, view), chosen.tile_size)
            return mask_regions(blocks, view=view), tile_states(tiled)

        def tables() -> dict[str, pd.DataFrame]:
            regions, tiles = parts()
            made = {"mask": mask_table(regions), "tiles": tile_table(tiles)}
            made["blocks"] = block_table(blocks, rows.to_text, view=view)
            return made if other is None else made | {"difference": count_differences(mask, other)}

        def figure() -> Figure:
            drawn: dict[str, Any] = {"seq_len": blocks.seq_len, "block_size": blocks.block_size}
            drawn["context_text"] = row["texts"]
            drawn["slot_text"] = slot_inputs(blocks, rows.to_text)
            return mask_and_tiles(*parts(), tile_size=chosen.tile_size, **drawn)

        alt = "the attention mask with its regions, and its tiles"
        state = mask_state(mask, tile_size=chosen.tile_size, other=other, row=row)
        return Frame(tables, figure, alt=alt, state=state)

    drawn = (num_anchors, block_size, seed, per, layout)
    controls = rows.controls(conversation, packed, row_length, *drawn)
    controls.insert(3, slider("context", context, 8, 131072, growing=True))
    controls += [slider("window", window, 0, 4096, growing=True), checkbox("causal", causal)]
    controls += [selection_slider("tile_size", tile_size, TILE_SIZES), checkbox("shuffled", False)]
    controls.append(dropdown("compare", start, options))
    return Explorer(
        "explore_masks", controls, draw, view=MaskView, reasons=rows.reasons, given=given
    )


def _comparisons(compare: Any) -> tuple[str, tuple[str, ...]]:
    """What the control starts with, and what it offers; the first is no comparison."""
    options = ("nothing", *PRESETS, "shuffled anchors", "seed 1", "seed 2", "seed 3")
    if compare is None:
        return options[0], options
    if isinstance(compare, int) and not isinstance(compare, bool):
        compare = f"seed {compare}"
    if not isinstance(compare, str):
        return "yours", (*options, "yours")
    if compare in options:
        return compare, options
    if not compare.removeprefix("seed ").isdecimal():
        raise ValueError(f"compare must be a mask, a seed or one of {options}, got {compare!r}")
    return compare, (*options, compare)
