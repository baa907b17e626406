"""The tile lists of a ``BlockMask`` against its own function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention.findings import Finding
from dspark_lab.attention.mask_view import MaskView

_TILES = "the tile lists fit the rule"


def tile_findings(view: MaskView, mine: BlockMask) -> Iterator[Finding]:
    """The tiles of a ``BlockMask`` against its own function."""
    tile, width = mine.BLOCK_SIZE
    columns = -(-int(mine.seq_lengths[1]) // width)
    partial = _listed(mine.kv_num_blocks, mine.kv_indices, columns)
    full = np.zeros_like(partial)
    if mine.full_kv_num_blocks is not None and mine.full_kv_indices is not None:
        full = _listed(mine.full_kv_num_blocks, mine.full_kv_indices, columns)
    mask = replace(view.mask, inverted=False, slots_first=False, slot_major=False)
    edges = np.arange(0, mask.keys, width)
    counts = {"empty": 0, "full": 0}
    firsts: dict[str, tuple[int, int, int]] = {}
    tiles = 0
    for row in range(mask.rows):
        for head in range(mask.heads):
            here = min(row, len(partial) - 1), head
            for queries in mask.pieces(tile):
                seen = mask.seen(row, head, queries)[:, : mask.keys]
                for low in range(0, len(queries), tile):
                    part, at = seen[low : low + tile], queries[low] // tile
                    some = np.logical_or.reduceat(part.any(0), edges)
                    every = np.logical_and.reduceat(part.all(0), edges)
                    listed = [lists[here][at, : len(edges)] for lists in (partial, full)]
                    wrong = {"empty": some & ~listed[0] & ~listed[1], "full": ~every & listed[1]}
                    tiles += len(edges)
                    for kind, flags in wrong.items():
                        counts[kind] += int(flags.sum())
                        if flags.any() and kind not in firsts:
                            start = int(edges[flags.argmax()])
                            inner = part[:, start : start + width]
                            pair = np.argwhere(inner if kind == "empty" else ~inner)[0]
                            query = int(queries[low] + pair[0])
                            firsts[kind] = row, query, start + int(pair[1])
    for kind, sees in (("empty", "sees"), ("full", "hides in part")):
        if counts[kind]:
            what = f"the tile lists call a tile {kind} that its rule {sees}"
            place = view.place(*firsts[kind])
            yield Finding(_TILES, "broken", what, counts[kind], tiles, "tiles", **place)
    backward = _backward(mine, partial, full)
    if backward:
        tiles = partial.size
        what = "the lists for the backward pass differ from those for the forward pass"
        yield Finding(_TILES, "broken", what, backward, tiles, "tiles")
    if not any(counts.values()) and not backward:
        yield view.held(_TILES, tiles, "tiles")


def _backward(mine: BlockMask, partial: np.ndarray, full: np.ndarray) -> int:
    """Tiles that the lists by key have otherwise than the lists by query."""
    wrong = 0
    for which, tiles in (("q", partial), ("full_q", full)):
        numbers, places = (getattr(mine, f"{which}_{what}") for what in ("num_blocks", "indices"))
        if numbers is not None and places is not None:
            by_key = _listed(numbers, places, tiles.shape[2])
            wrong += int((by_key != tiles.swapaxes(2, 3)).sum())
    return wrong


def _listed(numbers: Tensor, places: Tensor, columns: int) -> np.ndarray:
    """Tile lists as bool, [row, head, tile row, tile column]."""
    counts, listed = numbers.cpu().numpy(), places.long().cpu().numpy()
    tiles = np.zeros((*counts.shape, columns), dtype=bool)
    used = np.arange(listed.shape[-1]) < counts[..., None]
    tiles[(*np.nonzero(used)[:3], listed[used])] = True
    return tiles
