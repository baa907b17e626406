"""How much of each region of the keys each query sees, and which block a query's context is of.

The regions lie around the anchor and around the query's own slot, in the order of the keys:

    context: earlier documents, what a window cuts off, the context prefix, the anchor itself, the
             rest of the document, later documents, and padding wherever it is;
    slots:   earlier blocks, the block's earlier slots, the slot itself, the block's later slots,
             later blocks, and keys behind the last slot.

The rule sees the context prefix and the own block, all of both, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from dspark_lab.attention.given_mask import GivenMask

EARLIER_DOCUMENT, CUT_OFF, CONTEXT, ANCHOR, AFTER, LATER_DOCUMENT, PADDING = range(7)
EARLIER_BLOCK, BEFORE, ITSELF, BEHIND, LATER_BLOCK, PAST_END = range(7, 13)
REGIONS = 13
# Queries of a row that are enough to tell the form of a mask.
SAMPLE = 128


@dataclass(frozen=True)
class Seats:
    """Where each query, [row, query], belongs: to a block's context, and to a block's slots.

    The block's document is ``start`` to ``past - 1``, the query its ``slot``; ``slot_first`` to
    ``slot_past - 1`` are the slots of the query's own block. ``padding`` is [row, key].
    """

    start: np.ndarray
    anchor: np.ndarray
    past: np.ndarray
    kept: np.ndarray
    slot: np.ndarray
    slot_first: np.ndarray
    slot_past: np.ndarray
    padding: np.ndarray
    window: int | None

    @cached_property
    def low(self) -> np.ndarray:
        """Where the context prefix begins, which ends before the anchor."""
        if self.window is None:
            return self.start
        return np.clip(self.anchor + self.slot + 1 - self.window, self.start, self.anchor)

    def context_of(self, row: np.ndarray, query: np.ndarray, slot: np.ndarray) -> Seats:
        """The same, with each query's context that of another row's or block's query."""
        names = "start", "anchor", "past", "kept"
        return replace(self, slot=slot, **{name: getattr(self, name)[row, query] for name in names})

    def blocks_of(self, size: int) -> Seats:
        """The same, with own blocks of another size."""
        query = np.broadcast_to(np.arange(self.slot.shape[1]), self.slot.shape)
        first = query // size * size
        past = np.minimum(first + size, self.slot.shape[1])
        return replace(self, slot_first=first, slot_past=past)

    def visible(self, row: int, queries: np.ndarray, seq_len: int, keys: int) -> np.ndarray:
        """The rule at every pair."""
        key = np.arange(keys)
        low, anchor = (v[row, queries, None] for v in (self.low, self.anchor))
        first, past = (v[row, queries, None] + seq_len for v in (self.slot_first, self.slot_past))
        context = (key >= low) & (key < anchor) & self.kept[row, queries, None]
        return context | ((key >= first) & (key < past))


@dataclass(frozen=True)
class Seen:
    """Visible keys by region: how many, the first and the last (-1 where none).

    All [row, query, region]; ``own`` [row, query, slot] are the pairs within the own block.
    """

    count: np.ndarray
    first: np.ndarray
    last: np.ndarray
    own: np.ndarray


def count_regions(mask: GivenMask, head: int, seats: Seats) -> Seen:
    shape, width = seats.slot.shape, int((seats.slot_past - seats.slot_first).max())
    count = np.zeros((*shape, REGIONS), dtype=np.int64)
    first, last = np.full_like(count, -1), np.full_like(count, -1)
    own = np.zeros((*shape, width), dtype=bool)
    for row in range(mask.rows):
        for queries in mask.pieces():
            seen = mask.seen(row, head, queries)
            for region, query, key in _pairs(seen, seats, mask, row, queries):
                bins = query * REGIONS + region
                count[row] += np.bincount(bins, minlength=count[row].size).reshape(count[row].shape)
                # Of several values for one place the last one stays.
                first[row].reshape(-1)[bins[::-1]] = key[::-1]
                last[row].reshape(-1)[bins] = np.maximum(last[row].reshape(-1)[bins], key)
            place = seats.slot_first[row, queries, None] + np.arange(width)
            inside = place < seats.slot_past[row, queries, None]
            place = mask.seq_len + np.minimum(place, mask.queries - 1)
            own[row, queries] = np.take_along_axis(seen, place, 1) & inside
    return Seen(count, first, last, own)


def _pairs(
    seen: np.ndarray, seats: Seats, mask: GivenMask, row: int, queries: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Region, query and key of each visible pair, of the context and then of the slots."""
    query, key = np.nonzero(seen[:, : mask.seq_len])
    query = queries[query]
    edges = seats.start, seats.low, seats.anchor, seats.anchor + 1, seats.past
    region = sum((key >= edge[row][query]).astype(np.int64) for edge in edges)
    if seats.padding[row].any():
        outside = (region != CONTEXT) & (region != ANCHOR)
        region = np.where(outside & seats.padding[row, key], PADDING, region)
    yield region, query, key

    query, key = np.nonzero(seen[:, mask.seq_len :])
    query = queries[query]
    edges = seats.slot_first[row][query], query, query + 1, seats.slot_past[row][query]
    region = EARLIER_BLOCK + sum((key >= edge).astype(np.int64) for edge in edges)
    yield np.where(key >= mask.queries, PAST_END, region), query, key + mask.seq_len


def likeness(mask: GivenMask, head: int, seats: Seats) -> float:
    """Share visible of what the rule sees less that of what it hides: 1 right, -1 inverted.

    The mean over context and slots, of a sample of queries.
    """
    queries = np.unique(np.linspace(0, mask.queries - 1, SAMPLE).astype(int))
    parts = []
    for row in range(min(mask.rows, 2)):
        seen = mask.seen(row, head, queries)
        rule = seats.visible(row, queries, mask.seq_len, mask.keys)
        for part in (slice(0, mask.seq_len), slice(mask.seq_len, mask.keys)):
            given, right = seen[:, part], rule[:, part]
            if right.any() and not right.all():
                parts.append(given[right].mean() - given[~right].mean())
    return float(np.mean(parts)) if parts else 1.0


def form_of(mask: GivenMask, head: int, seats: Seats) -> GivenMask:
    """The mask in the form in which it is most like the rule, its own unless that is far off."""
    own = likeness(mask, head, seats)
    if own >= 0.75:
        return mask
    readings = [(likeness(reading, head, seats), reading) for reading in mask.readings()]
    best, reading = max(readings, key=lambda scored: scored[0])
    return reading if best > own + 0.25 else mask


def context_ends(mask: GivenMask, head: int) -> np.ndarray:
    """Where the first run of visible context tokens ends, for each query; -1 where none is."""
    ends = np.full((mask.rows, mask.queries), -1)
    place = np.arange(mask.seq_len)
    for row in range(mask.rows):
        for queries in mask.pieces():
            seen = mask.seen(row, head, queries)[:, : mask.seq_len]
            begun = seen | (place < seen.argmax(1)[:, None])
            end = np.where(begun.all(1), mask.seq_len, begun.argmin(1))
            ends[row, queries] = np.where(seen.any(1), end, -1)
    return ends


@dataclass(frozen=True)
class Owners:
    """Whose context each query sees: another row's (``rows``), another block's (``what`` says)."""

    seats: Seats
    rows: np.ndarray  # of each row, the row whose context it has
    what: str = ""


def owners_of_context(ends: np.ndarray, seats: Seats, block_size: int) -> Owners:
    """The rows and blocks to which the context belongs by where it ends.

    Its own row and block, unless others explain most of what these do not.
    """
    count, queries = ends.shape
    query, own_rows = np.arange(queries), np.arange(count)
    rows = own_rows.copy()
    for row in range(count):
        wrong = [_misses(ends[row], seats, other, query) for other in range(count)]
        if min(wrong) < 0.3 * wrong[row]:
            rows[row] = int(np.argmin(wrong))
    by_row = np.repeat(rows[:, None], queries, 1)
    own = np.repeat(query[None], count, 0)
    moved = seats.context_of(by_row, own, seats.slot)

    blocks, best = queries // block_size, (_all_misses(ends, moved, own), "", own, seats.slot)
    limit = 0.3 * best[0]
    others = {
        f"the context is that of the block {side}": (
            (query + step * block_size) % queries,
            query % block_size,
        )
        for side, step in (("before", -1), ("after", 1))
        if blocks > 1
    }
    for size in (block_size - 1, block_size + 1):
        if size > 0:
            block = np.minimum(query // size, blocks - 1)
            others[f"a block is taken to have {size} slots"] = (block * block_size, query % size)
    for what, (other, slot) in others.items():
        places, slots = np.repeat(other[None], count, 0), np.repeat(slot[None], count, 0)
        misses = _all_misses(ends, moved, places)
        if misses <= limit and misses < best[0]:
            best = misses, what, places, slots
    if best[0] > 0 and best[1] == "":
        places = np.stack([_matched(ends[row], moved, row, block_size) for row in range(count)])
        misses = _all_misses(ends, moved, places)
        if misses <= limit and misses < best[0]:
            best = misses, "the context is that of another block", places, seats.slot
    _, what, places, slots = best
    here = np.repeat(own_rows[:, None], queries, 1)
    return Owners(moved.context_of(here, places, slots) if what else moved, rows, what)


def _end(seats: Seats, row: int, query: np.ndarray, longer: int) -> np.ndarray:
    """Where the context would end if it were ``longer``; -1 where it would be empty."""
    end = seats.anchor[row, query] + longer
    return np.where(seats.kept[row, query] & (end > seats.low[row, query]), end, -1)


def _misses(ends: np.ndarray, seats: Seats, row: int, query: np.ndarray) -> float:
    """The share of queries whose context does not end at the anchor, nor always one beside it."""
    return min((ends != _end(seats, row, query, longer)).mean() for longer in (0, 1, -1))


def _all_misses(ends: np.ndarray, seats: Seats, query: np.ndarray) -> float:
    rows = range(len(ends))
    return float(np.mean([_misses(ends[row], seats, row, query[row]) for row in rows]))


def _matched(ends: np.ndarray, seats: Seats, row: int, block_size: int) -> np.ndarray:
    """For each query the same slot of the block that ends where its context does, if one does."""
    query = np.arange(len(ends))
    best, best_share = query, 0.0
    for longer in (0, 1, -1):
        target = _end(seats, row, query[::block_size], longer)
        order = np.argsort(target, kind="stable")
        found = np.searchsorted(target[order], ends[::block_size]).clip(max=len(target) - 1)
        block = order[found]
        fits = target[block] == ends[::block_size]
        right = ends[::block_size] == target
        block = np.where(fits & ~right, block, np.arange(len(target)))
        inside = ends[::block_size] >= 0
        several = len(np.unique(block[inside])) >= 0.8 * inside.sum()
        if several and fits.mean() > best_share:
            best_share = float(fits.mean())
            best = np.repeat(block * block_size, block_size) + query % block_size
    return best
