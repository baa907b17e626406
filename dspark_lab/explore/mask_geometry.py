"""Masks as intervals of keys, query by query: counts, tiles and differences without a matrix.

What a query sees is at most two intervals, so that a mask of 65,536 queries and 196,608 keys is
some 100,000 numbers. ``js/rule.js`` has the same for the browser.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dspark_lab.attention import FULL, ContextRanges, View, visible_runs
from dspark_lab.blocks import Blocks
from dspark_lab.checks import checked

# What a pair is to the rule; the first three are visible. In the order of ``PAIR_KINDS``.
PAIR_KINDS = (
    *("context prefix", "own block", "dummy block", "the anchor itself", "after the anchor"),
    *("another document", "padding", "beyond the window", "a later slot", "another block"),
    *("a dummy's context", "a dummy's own block"),
)
# Masks that faults of trainers make, and other layers' masks, to compare with.
PRESETS = ("causal block", "forgotten documents", "context with the anchor", "window")
# The window of the preset, where the mask itself has none.
PRESET_WINDOW = 64
# A mask of the user's is asked at every pair, once: at most at so many.
MOST_PAIRS = 2**28
MaskLike = str | Blocks | Tensor | BlockMask | Callable[..., Tensor]


@dataclass(frozen=True)
class MaskSpans:
    """Intervals of columns, ``start`` to ``end - 1``, of rows, each with a value."""

    row: np.ndarray
    start: np.ndarray
    end: np.ndarray
    value: np.ndarray
    shape: tuple[int, int]

    def counts(self, values: int) -> np.ndarray:
        """How many cells have each value; what no interval covers is 0."""
        counts = np.bincount(self.value, self.end - self.start, values).astype(np.int64)
        counts[0] = self.shape[0] * self.shape[1] - counts[1:].sum()
        return counts

    def covered(self, value: int, height: int, width: int) -> np.ndarray:
        """How many cells of a value each pixel of ``height`` by ``width`` cells holds."""
        rows, columns = (-(-n // size) for n, size in zip(self.shape, (height, width), strict=True))
        # All pixels left of an interval's end are counted whole, the one with the end in part.
        whole, part = np.zeros((2, rows, columns + 1))
        chosen = self.value == value
        line = self.row[chosen] // height
        for edge, sign in ((self.end[chosen], 1), (self.start[chosen], -1)):
            np.add.at(whole, (line, edge // width), sign)
            np.add.at(part, (line, edge // width), sign * (edge % width))
        behind = whole[:, ::-1].cumsum(1)[:, ::-1] - whole
        return (behind * width + part)[:, :columns]


@dataclass(frozen=True, eq=False)
class RuleMask:
    """The rule's mask of one row of blocks, or one that departs from it.

    ``reach`` tokens from the anchor on belong to the context; ``length`` tokens are no padding.
    With ``given``, what queries see is what these edges say, and the rule says what is right.
    """

    blocks: Blocks
    view: View = FULL
    name: str = "this mask"
    reach: int = 0
    one_document: bool = False
    length: int | None = None
    given: np.ndarray | None = None

    @cached_property
    def anchors(self) -> np.ndarray:
        return self.blocks.anchor_positions[0].long().cpu().numpy()

    @cached_property
    def keep(self) -> np.ndarray:
        return self.blocks.block_keep_mask[0].cpu().numpy()

    @cached_property
    def documents(self) -> np.ndarray:
        """Where documents begin."""
        if self.one_document:
            return np.zeros(1, dtype=np.int64)
        docs = self.blocks.doc_ids[0].cpu().numpy()
        return np.flatnonzero(np.diff(docs, prepend=docs[:1] - 1))

    @property
    def seq_len(self) -> int:
        return self.blocks.seq_len

    @property
    def shape(self) -> tuple[int, int]:
        queries = self.blocks.num_anchors * self.blocks.block_size
        return queries, self.seq_len + queries

    @cached_property
    def bounds(self) -> dict[str, np.ndarray]:
        """Of each query: its anchor, whose document ends at ``past``, its context ``low`` to
        ``end`` and its own slots ``block`` to ``own``."""
        size, queries, blocks = self.blocks.block_size, np.arange(self.shape[0]), self.blocks
        if self.one_document:
            blocks = replace(blocks, doc_ids=torch.zeros_like(blocks.doc_ids))
        ranges = ContextRanges.of(blocks, self.view)
        low, start, end = (
            edge[0].cpu().numpy() for edge in (ranges.slot_start, ranges.start, ranges.end)
        )
        anchor, kept = self.anchors.repeat(size), self.keep.repeat(size)
        document = np.searchsorted(self.documents, anchor, "right")
        past = np.append(self.documents, self.seq_len)[document]
        block = self.seq_len + queries - queries % size
        own = self.seq_len + queries + 1 if self.view.causal else block + size
        found = {"anchor": anchor, "kept": kept, "past": past, "block": block, "own": own}
        context = {"start": start.repeat(size), "low": low, "end": end.repeat(size)}
        return found | context | {"end": context["end"] + self.reach * kept}

    @cached_property
    def edges(self) -> np.ndarray:
        """Where runs of visible keys begin and cease: ``key + stride * query``, ascending."""
        if self.given is not None:
            return self.given
        of, first = self.bounds, np.arange(self.shape[0]) * self.stride
        context = of["low"] < of["end"]
        parts = [(first + of[name])[context] for name in ("low", "end")]
        parts += [first + of["block"], first + of["own"]]
        edges, times = np.unique(np.concatenate(parts), return_counts=True)
        return edges[times % 2 == 1]

    @property
    def stride(self) -> int:
        return self.shape[1] + 1

    @cached_property
    def regions(self) -> MaskSpans:
        """The visible pairs by region, an index into ``REGIONS``."""
        query, start = np.divmod(self.edges[::2], self.stride)
        end = self.edges[1::2] % self.stride
        own = np.where(self.keep, 2, 3).repeat(self.blocks.block_size)[query]
        seam = self.seq_len
        parts = [
            (query, start, np.minimum(end, seam), np.ones_like(query)),
            (query, np.maximum(start, seam), end, own),
        ]
        row, low, high, value = (np.concatenate(column) for column in zip(*parts, strict=True))
        some = low < high
        return MaskSpans(row[some], low[some], high[some], value[some], self.shape)

    def tiles(self, size: int) -> MaskSpans:
        """Tiles by their state, an index into ``TILE_STATES``; rows and columns are of tiles."""
        query, start = np.divmod(self.edges[::2], self.stride)
        end = self.edges[1::2] % self.stride
        rows, columns = (-(-n // size) for n in self.shape)
        first = query // size * (columns + 1)
        begin, stop = -(-start // size), end // size
        covers = begin < stop
        # Where, along the columns of a row of tiles, queries begin or cease to touch and to cover.
        places = [first + start // size, first - (-end // size), first + begin, first + stop]
        places[2:] = [place[covers] for place in places[2:]]
        changes = [(1, 0), (-1, 0), (0, 1), (0, -1)]
        edge, index = np.unique(np.concatenate(places), return_inverse=True)
        weight = np.concatenate(
            [np.full((len(p), 2), c) for p, c in zip(places, changes, strict=True)]
        )
        touching, covering = (
            np.bincount(index, weight[:, i], len(edge)).cumsum().round() for i in (0, 1)
        )
        state = np.where(covering == size, 2, np.where(touching > 0, 1, 0))
        row, column = np.divmod(edge, columns + 1)
        past = np.append(column[1:], 0)
        seen = state > 0
        return MaskSpans(row[seen], column[seen], past[seen], state[seen], (rows, columns))

    def kinds(self) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """For each of ``PAIR_KINDS`` the intervals of each query's keys that are of the kind."""
        of, zero = self.bounds, np.zeros(self.shape[0], dtype=np.int64)
        kept, anchor, start, low, end = (of[n] for n in ("kept", "anchor", "start", "low", "end"))
        length = self.seq_len if self.length is None else self.length
        past, block = np.minimum(of["past"], length), of["block"]
        after, slots = block + self.blocks.block_size, zero + self.seq_len
        seen = kept & (low <= anchor) & (anchor < end)
        intervals = [
            [(low, end)],
            [(np.where(kept, block, zero), np.where(kept, of["own"], zero))],
            [(np.where(kept, zero, block), np.where(kept, zero, of["own"]))],
            [(anchor, anchor + ~seen)],
            [(np.maximum(anchor + 1, end), past)],
            [(zero, start), (of["past"], zero + length)],
            [(np.maximum(end, length), slots)],
            [(start, np.minimum(low, anchor))],
            [(of["own"], after)],
            [(slots, block), (after, zero + self.shape[1])],
            [(zero, np.where(kept, zero, slots))],
            [(zero, zero)],
        ]
        for kind in (3, 4, 5, 6, 7):
            intervals[kind] = [(a, np.where(kept, b, zero)) for a, b in intervals[kind]]
        return intervals


def other_mask(mine: RuleMask, other: MaskLike, name: str = "") -> RuleMask:
    """The mask to compare with: a preset, that of other blocks, or a user's own of any form."""
    same: dict[str, Any] = {"blocks": mine.blocks, "view": mine.view, "length": mine.length}
    if isinstance(other, Blocks):
        got, wanted = ((of.num_anchors, of.block_size, of.seq_len) for of in (other, mine.blocks))
        if got != wanted:
            sizes = "{} blocks of {} slots on {} tokens"
            raise ValueError(f"other must have {sizes.format(*wanted)}, got {sizes.format(*got)}")
        return RuleMask(**same | {"blocks": other.row(0)}, name=name or "other anchors")
    if isinstance(other, str):
        window = mine.view.window
        changed: dict[str, dict[str, Any]] = {
            "causal block": {"view": View(window, True)},
            "forgotten documents": {"one_document": True},
            "context with the anchor": {"reach": 1},
            "window": {"view": View(max(1, (window or 2 * PRESET_WINDOW) // 2), mine.view.causal)},
        }
        if other not in changed:
            raise ValueError(f"other must be a mask or one of {PRESETS}, got {other!r}")
        return RuleMask(**same | changed[other], name=other)
    queries, keys = mine.shape
    if queries * keys > MOST_PAIRS:
        most = f"a mask of at most {MOST_PAIRS:,} pairs"
        raise ValueError(f"other can be compared as {most}, got {queries:,} queries of {keys:,}")
    runs = visible_runs(other, mine.blocks)
    # Keys behind the last slot are padding of the form.
    query, key = np.divmod(runs.edges, runs.stride)
    edges = np.minimum(key, keys) + mine.stride * query
    edges, times = np.unique(edges, return_counts=True)
    return RuleMask(**same, name=name or "yours", given=edges[times % 2 == 1])


def difference_spans(mine: RuleMask, other: RuleMask) -> MaskSpans:
    """The pairs that one mask alone sees: value 0 where that is the first, 1 the other."""
    edge = np.union1d(mine.edges, other.edges)
    inside = [np.searchsorted(mask.edges, edge, "right") % 2 == 1 for mask in (mine, other)]
    differs = np.flatnonzero(inside[0] != inside[1])
    query, start = np.divmod(edge[differs], mine.stride)
    end = edge[np.minimum(differs + 1, len(edge) - 1)] % mine.stride
    return MaskSpans(query, start, end, np.where(inside[0][differs], 0, 1), mine.shape)


@checked
def count_differences(mine: RuleMask, other: RuleMask) -> pd.DataFrame:
    """The pairs that one mask alone sees, by kind, and the first place of each kind."""
    spans, rows = difference_spans(mine, other), []
    size = mine.blocks.block_size
    for side, name in enumerate((mine.name, other.name)):
        chosen = spans.value == side
        query, start, end = (v[chosen] for v in (spans.row, spans.start, spans.end))
        for kind, intervals in zip(PAIR_KINDS, mine.kinds(), strict=True):
            pairs, first = 0, list[tuple[int, int]]()
            for low, high in intervals:
                begin = np.maximum(start, low[query])
                overlap = np.minimum(end, high[query]) - begin
                found = np.flatnonzero(overlap > 0)
                pairs += int(overlap[found].sum())
                first += [(int(query[i]), int(begin[i])) for i in found[:1]]
            if pairs:
                (at, key) = min(first)
                rows.append((name, kind, pairs, at // size, at % size, key))
    columns = ["seen only by", "kind", "pairs", "first block", "first slot", "first key"]
    return pd.DataFrame(rows, columns=columns)


def shuffled_blocks(blocks: Blocks, seed: int) -> Blocks:
    generator = torch.Generator().manual_seed(seed)
    return blocks.reordered(torch.randperm(blocks.num_anchors, generator=generator))
