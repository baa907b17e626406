"""The tile lists of a ``BlockMask`` against its own function."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention.findings import Finding, Report
from dspark_lab.attention.given_mask import GivenMask

_TILES = "the tile lists fit the rule"


def tile_findings(mask: GivenMask, report: Report, mine: BlockMask) -> Iterator[Finding]:
    """Tiles that are called empty or full and are not, and lists by key unlike those by query."""
    height, width = mine.BLOCK_SIZE
    length, depth = (
        -(-int(n) // unit) for n, unit in zip(mine.seq_lengths, mine.BLOCK_SIZE, strict=True)
    )
    partial, full = _listed(mine, "kv", depth), _listed(mine, "full_kv", depth)
    edges, tiles = np.arange(0, mask.keys, width), 0
    counts, firsts = {"empty": 0, "full": 0}, {}
    for row in range(mask.rows):
        for head in range(mask.heads):
            for queries in mask.pieces(height):
                seen = mask.seen(row, head, queries)[:, : mask.keys]
                cut = np.arange(0, len(queries), height)
                some = np.logical_or.reduceat(np.logical_or.reduceat(seen, cut), edges, 1)
                every = np.logical_and.reduceat(np.logical_and.reduceat(seen, cut), edges, 1)
                here = min(row, len(partial) - 1), head, queries[cut] // height
                in_part, in_full = (lists[here][:, : len(edges)] for lists in (partial, full))
                wrong = {"empty": some & ~in_part & ~in_full, "full": ~every & in_full}
                tiles += some.size
                for kind, flags in wrong.items():
                    counts[kind] += int(flags.sum())
                    if flags.any() and kind not in firsts:
                        low, left = np.argwhere(flags)[0] * (height, width)
                        tile = seen[low : low + height, left : left + width]
                        query, key = np.argwhere(tile == (kind == "empty"))[0] + (low, left)
                        firsts[kind] = row, int(queries[query]), int(key)
    for kind, sees in (("empty", "sees"), ("full", "hides in part")):
        if counts[kind]:
            row, query, key = firsts[kind]
            place = report.place(row, *divmod(query, mask.block_size), key)
            what = f"the tile lists call a tile {kind} that its rule {sees}"
            yield Finding(_TILES, "broken", what, counts[kind], tiles, "tiles", **place)
    backward = 0
    for name, tiled in (("q", partial), ("full_q", full)):
        if getattr(mine, f"{name}_indices") is not None:
            backward += int((_listed(mine, name, length) != tiled.swapaxes(2, 3)).sum())
    if backward:
        what = "the lists for the backward pass differ from those for the forward pass"
        yield Finding(_TILES, "broken", what, backward, partial.size, "tiles")
    elif not any(counts.values()):
        yield Finding(_TILES, "held", of=tiles, unit="tiles")


def _listed(mine: BlockMask, which: str, columns: int) -> np.ndarray:
    """Tile lists as bool, [row, head, tile row, tile column]; all False where there are none."""
    numbers, places = (getattr(mine, f"{which}_{what}") for what in ("num_blocks", "indices"))
    if numbers is None or places is None:
        return np.zeros((*mine.kv_num_blocks.shape, columns), dtype=bool)
    counts, listed = numbers.cpu().numpy(), places.long().cpu().numpy()
    tiles = np.zeros((*counts.shape, columns), dtype=bool)
    used = np.arange(listed.shape[-1]) < counts[..., None]
    tiles[(*np.nonzero(used)[:3], listed[used])] = True
    return tiles
