"""Attention masks: what each block sees, pair by pair and tile by tile."""

import os
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Int
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention import ContextRanges, block_mask, dense_mask
from dspark_lab.blocks import Blocks, draw_blocks
from dspark_lab.chats import Chat
from dspark_lab.checks import checked
from dspark_lab.explore.anchors import ConversationRows, block_table, draw_controls, slot_inputs
from dspark_lab.explore.explorer import Explorer, Frame, checkbox, selection_slider, slider
from dspark_lab.explore.style import (
    BLUE,
    INK,
    ORANGE,
    PINK,
    RED,
    SKY,
    legend_above,
    new_figure,
    png,
    visible_text,
)

REGIONS = ("hidden", "context prefix", "own block", "dummy block")
REGION_COLOURS = {"context prefix": SKY, "own block": RED, "dummy block": PINK}
TILE_STATES = ("empty", "partial", "full")
TILE_COLOURS = {"partial": ORANGE, "full": BLUE}
TILE_SIZES = (16, 32, 64, 128, 256)
# A picture of at most this many cells along a side is drawn cell by cell, with its tokens' names.
MOST_NAMED_CELLS = 48
# A larger one has as many rows and columns as its axes surely have pixels, so that none is lost.
MOST_ROWS, MOST_COLUMNS = 240, 480


@checked
def mask_regions(
    blocks: Blocks, *, documents: bool = True, row: int = 0
) -> Int[Tensor, "query key"]:
    """Each pair of one row's attention mask as an index into ``REGIONS``, int8.

    With ``documents`` False, blocks see all documents before them, as a trainer would have it that
    forgets that its rows are packed.
    """
    one = blocks.row(row)
    if not documents:
        one = replace(one, doc_ids=torch.zeros_like(one.doc_ids))
    region = dense_mask(ContextRanges.of(one))[0].to(torch.int8)
    own = torch.where(
        one.block_keep_mask[0], REGIONS.index("own block"), REGIONS.index("dummy block")
    )
    region[:, one.seq_len :] *= own.to(torch.int8).repeat_interleave(one.block_size).unsqueeze(1)
    return region


@checked
def mask_table(regions: Int[Tensor, "query key"]) -> pd.DataFrame:
    """How many pairs of a mask belong to each region: ``region``, ``pairs``, ``share``."""
    pairs = torch.bincount(regions.flatten().int(), minlength=len(REGIONS)).numpy()
    return pd.DataFrame(
        {"region": REGIONS, "pairs": pairs, "share": pairs / max(1, regions.numel())}
    )


@checked
def tile_states(mask: BlockMask, *, row: int = 0) -> Int[Tensor, "query_tile key_tile"]:
    """Each tile of one row of a block mask as an index into ``TILE_STATES``, int8."""
    states = _listed(mask.kv_num_blocks[row, 0], mask.kv_indices[row, 0])
    states = states.to(torch.int8) * TILE_STATES.index("partial")
    if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
        full = _listed(mask.full_kv_num_blocks[row, 0], mask.full_kv_indices[row, 0])
        states = states.masked_fill(full, TILE_STATES.index("full"))
    return states


@checked
def tile_table(states: Int[Tensor, "query_tile key_tile"]) -> pd.DataFrame:
    """How many tiles are in each state: ``state``, ``tiles``, ``share``."""
    tiles = torch.bincount(states.flatten().int(), minlength=len(TILE_STATES)).numpy()
    return pd.DataFrame(
        {"state": TILE_STATES, "tiles": tiles, "share": tiles / max(1, tiles.sum())}
    )


@checked
def sorting_table(
    blocks: Blocks, *, tile_sizes: tuple[int, ...] = (32, 64, 128), seed: int = 0
) -> pd.DataFrame:
    """Tiles with anchors in ascending order and shuffled: what sorting them is worth.

    Returns:
        one line per tile size and order (``as drawn``, that is ascending, and ``shuffled``): the
        tiles in each state over all rows; ``work``, the share of pairs that a kernel computes
        (partial and full tiles); and ``wasted``, the share of that work that the mask hides.
    """
    block_size, keep = blocks.block_size, blocks.block_keep_mask
    ranges = ContextRanges.of(blocks)
    visible = int((ranges.end - ranges.start).sum() * block_size + keep.numel() * block_size**2)
    rows = []
    for tile_size in tile_sizes:
        for name, ordered in (("as drawn", blocks), ("shuffled", _shuffled(blocks, seed))):
            mask = block_mask(ContextRanges.of(ordered), tile_size)
            states = torch.cat([tile_states(mask, row=row) for row in range(len(keep))])
            counts = tile_table(states).set_index("state")["tiles"]
            computed = int(counts["partial"] + counts["full"]) * tile_size**2
            rows.append(
                {
                    "tile_size": tile_size,
                    "order": name,
                    **counts.to_dict(),
                    "work": (counts["partial"] + counts["full"]) / counts.sum(),
                    "wasted": 1 - visible / computed,
                }
            )
    return pd.DataFrame(rows)


def _listed(
    count: Int[Tensor, " row"], columns: Int[Tensor, "row column"]
) -> Bool[Tensor, "row column"]:
    """Which columns each row lists: the first ``count`` of its entries."""
    listed = torch.arange(columns.shape[1], device=columns.device) < count.unsqueeze(1)
    # Adding up, since what stands behind the count may name a listed column again.
    return torch.zeros_like(columns).scatter_add(1, columns.long(), listed.to(columns.dtype)) > 0


def plot_mask(
    regions: Int[Tensor, "query key"],
    *,
    seq_len: int,
    block_size: int,
    context_text: Sequence[str] | None = None,
    slot_text: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The attention mask with its regions in colour: queries down, keys across.

    A small mask is drawn cell by cell with the tokens on its axes. A large one is averaged: the
    deeper a pixel's colour, the larger the share of its pairs that is visible, so nothing that is
    there falls between the pixels.

    Args:
        regions: from :func:`mask_regions`.
        seq_len, block_size: the shape of what is shown.
        context_text: names of the context tokens; positions where None.
        slot_text: names of the slots' input tokens.
        ax: draw here instead of in a new figure.
    """
    queries, keys = regions.shape
    named = max(queries, keys) <= MOST_NAMED_CELLS
    if ax is None:
        width, height = (0.24 * keys + 1.6, 0.24 * queries + 1.9) if named else (8.0, 4.6)
        _, ax = new_figure(width, height)
    present = set(regions.unique().tolist())
    colours = {
        REGIONS.index(region): colour
        for region, colour in REGION_COLOURS.items()
        if REGIONS.index(region) in present
    }
    _paint(ax, regions, colours)
    ax.axvline(seq_len - 0.5, color=INK, linewidth=1)
    if named:
        _name_cells(ax, regions, seq_len, block_size, context_text, slot_text)
    else:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(5, integer=True))
        ax.set_xlabel(f"keys: {seq_len} context tokens, then {queries} slots")
        ax.set_ylabel(f"queries: {queries // block_size} blocks of {block_size} slots")
    handles = [Patch(facecolor=colour, label=REGIONS[i]) for i, colour in colours.items()]
    legend_above(ax, 3, handles=handles)
    return cast(Figure, ax.figure)


def plot_tiles(
    states: Int[Tensor, "query_tile key_tile"],
    *,
    seq_len: int,
    tile_size: int,
    ax: Axes | None = None,
) -> Figure:
    """The tile map that a FlexAttention kernel works through: empty, partial, full.

    Args:
        states: from :func:`tile_states`.
        seq_len: context tokens in a row; a line marks where they end.
        tile_size: queries and keys per tile.
        ax: draw here instead of in a new figure.
    """
    rows, columns = states.shape
    if ax is None:
        _, ax = new_figure(8.0, 4.6)
    _paint(ax, states, {TILE_STATES.index(state): colour for state, colour in TILE_COLOURS.items()})
    ax.axvline(seq_len / tile_size - 0.5, color=INK, linewidth=1)
    if rows * columns <= 4000:
        _rule(ax, np.arange(rows), np.arange(columns), linewidth=0.3)
    for axis, tiles in ((ax.xaxis, columns), (ax.yaxis, rows)):
        axis.set_ticks(range(0, tiles, -(-tiles // 6)))
    ax.set_xlabel(f"key tiles of {tile_size}")
    ax.set_ylabel(f"query tiles of {tile_size}")
    counts = [(state, int((states == i).sum())) for i, state in enumerate(TILE_STATES)]
    handles = [
        Patch(facecolor=TILE_COLOURS.get(state, "none"), edgecolor=INK, label=f"{state} {count}")
        for state, count in counts
    ]
    legend_above(ax, 3, handles=handles)
    return cast(Figure, ax.figure)


@checked
def mask_and_tiles(
    regions: Int[Tensor, "query key"],
    states: Int[Tensor, "query_tile key_tile"],
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
    figure, (mask_ax, tile_ax) = new_figure(
        width, height, columns=2, layout="none", width_ratios=(3, 2), wspace=0.25
    )
    # Fixed margins, in inches: finding the best ones would take longer than all the drawing.
    left, bottom = (1.35, 1.35) if named else (0.65, 0.55)
    figure.subplots_adjust(
        left=left / width, right=0.99, bottom=bottom / height, top=1 - 0.35 / height
    )
    plot_mask(
        regions,
        seq_len=seq_len,
        block_size=block_size,
        context_text=context_text,
        slot_text=slot_text,
        ax=mask_ax,
    )
    plot_tiles(states, seq_len=seq_len, tile_size=tile_size, ax=tile_ax)
    return figure


def plot_sorting(table: pd.DataFrame) -> Figure:
    """Tiles in each state with anchors in ascending order and shuffled, as stacked bars.

    Args:
        table: from :func:`sorting_table`.
    """
    figure, ax = new_figure(7, 0.34 * len(table) + 1.3)
    labels = [
        f"{size} · {order}" for size, order in zip(table["tile_size"], table["order"], strict=True)
    ]
    total = table[list(TILE_STATES)].sum(axis=1)
    left = np.zeros(len(table))
    for state in ("full", "partial", "empty"):
        share = (table[state] / total).to_numpy()
        colour = TILE_COLOURS.get(state, "none")
        ax.barh(labels, share, left=left, color=colour, edgecolor=INK, linewidth=0.6, label=state)
        left = left + share
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.set_xlabel("share of tiles")
    ax.set_ylabel("tile size · anchors")
    legend_above(ax, 3)
    return figure


def _paint(ax: Axes, cells: Int[Tensor, "row column"], colours: dict[int, str]) -> None:
    """Draw cells in the colours of their values, cell (i, j) centred at (j, i).

    Where there are more cells than pixels, a pixel is as deep as the share of its cells that have a
    colour, and mixes their colours.
    """
    rows, columns = cells.shape
    high, wide = -(-rows // MOST_ROWS), -(-columns // MOST_COLUMNS)
    padded = torch.nn.functional.pad(cells, (0, -columns % wide, 0, -rows % high), value=-1)
    inside = _count(padded >= 0, high, wide)
    image = np.zeros((*inside.shape, 4))
    for value, colour in colours.items():
        share = _count(padded == value, high, wide) / inside
        image[..., :3] += share[..., None] * to_rgb(colour)
        image[..., 3] += share
    image[..., :3] /= np.maximum(image[..., 3:], 1e-9)
    right, bottom = padded.shape[1] - 0.5, padded.shape[0] - 0.5
    ax.imshow(image, extent=(-0.5, right, bottom, -0.5), aspect="auto", interpolation="nearest")
    ax.set_xlim(-0.5, columns - 0.5)
    ax.set_ylim(rows - 0.5, -0.5)
    for spine in ax.spines.values():
        spine.set_visible(True)


def _count(cells: Bool[Tensor, "row column"], high: int, wide: int) -> np.ndarray:
    """How many of the cells under each pixel of ``high`` x ``wide`` cells are set."""
    numbers = cells.numpy().astype(np.int32)
    lines = np.add.reduce([numbers[line::high] for line in range(high)])
    return np.add.reduce([lines[:, column::wide] for column in range(wide)])


def _rule(ax: Axes, rows: np.ndarray, columns: np.ndarray, linewidth: float) -> None:
    """Lines above the given rows and left of the given columns of cells."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    ax.hlines(rows - 0.5, left, right, color=INK, linewidth=linewidth)
    ax.vlines(columns - 0.5, bottom, top, color=INK, linewidth=linewidth)


def _name_cells(
    ax: Axes,
    regions: Tensor,
    seq_len: int,
    block_size: int,
    context_text: Sequence[str] | None,
    slot_text: Sequence[str] | None,
) -> None:
    queries, keys = regions.shape
    context = context_text or [str(position) for position in range(seq_len)]
    slot = slot_text or [""] * queries
    slots = [f"{i // block_size}.{i % block_size} {visible_text(slot[i])}" for i in range(queries)]
    ax.set_xticks(range(keys), [visible_text(text) for text in context] + slots, rotation=90)
    ax.set_yticks(range(queries), slots)
    ax.tick_params(labelsize=7 if keys <= 40 else 6, length=0)
    _rule(ax, np.arange(queries), np.arange(keys), linewidth=0.3)
    edges = np.arange(block_size, queries, block_size)
    _rule(ax, edges, seq_len + edges, linewidth=1)
    ax.set_xlabel("keys: context tokens, then slots (block.slot input)")
    ax.set_ylabel("queries: slots (block.slot input)")


@checked
def explore_masks(
    chats: str | os.PathLike[str] | Sequence[Chat] | None = None,
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
) -> Explorer:
    """What each block of a conversation sees, pair by pair and tile by tile.

    Args:
        chats: conversations, or a JSONL file of them; the shipped ones where None.
        tokenizer: a tokenizer, its name or folder; the shipped one where None.
        num_anchors, block_size, tile_size, seed, conversation, packed, row_length: where the
            controls start.
        context: how many tokens around the first answer to keep; with few tokens and blocks the
            mask is drawn cell by cell.

    Returns:
        an explorer with the tables ``mask``, ``tiles`` and ``blocks``.
    """
    rows = ConversationRows(chats, tokenizer)

    def draw(chosen: SimpleNamespace) -> Frame:
        batch = rows.row(chosen.conversation, chosen.packed, chosen.row_length, chosen.context)
        blocks = draw_blocks(batch, chosen.num_anchors, chosen.block_size, seed=chosen.seed)
        if chosen.shuffled:
            blocks = _shuffled(blocks, chosen.seed)
        regions = mask_regions(blocks)
        tiles = tile_states(block_mask(ContextRanges.of(blocks), chosen.tile_size))
        figure = mask_and_tiles(
            regions,
            tiles,
            seq_len=blocks.seq_len,
            block_size=chosen.block_size,
            tile_size=chosen.tile_size,
            context_text=[rows.to_text(token_id) for token_id in batch.input_ids[0].tolist()],
            slot_text=slot_inputs(blocks, rows.to_text),
        )
        return Frame(
            {
                "mask": mask_table(regions),
                "tiles": tile_table(tiles),
                "blocks": block_table(blocks, rows.to_text),
            },
            png=png(figure),
            alt="the attention mask with its regions, and its tiles",
        )

    controls = [
        *rows.controls(conversation, packed, row_length),
        slider("context", context, 8, 1024),
        *draw_controls(num_anchors, block_size, seed),
        selection_slider("tile_size", tile_size, TILE_SIZES),
        checkbox("shuffled", False),
    ]
    return Explorer("explore_masks", controls, draw)


def _shuffled(blocks: Blocks, seed: int) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    return blocks.reordered(torch.randperm(blocks.num_anchors, generator=generator))
