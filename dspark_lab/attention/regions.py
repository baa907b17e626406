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
KINDS_OF_KEYS = 13
# Queries of a row that are enough to tell the form of a mask.
SAMPLE = 128


@dataclass(frozen=True)
class Seats:
    """Where each query, [row, query], belongs: to a block's context, and to a block's slots.

    The block's document is ``start`` to ``past - 1``, the query its ``slot``; ``slot_first`` to
    ``slot_past - 1`` are the slots of the query's own block, which is no dummy where ``slot_kept``.
    ``padding`` is [row, key].
    """

    start: np.ndarray
    anchor: np.ndarray
    past: np.ndarray
    kept: np.ndarray
    slot: np.ndarray
    slot_first: np.ndarray
    slot_past: np.ndarray
    slot_kept: np.ndarray
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
        taken = {name: getattr(self, name)[row, query] for name in names}
        return replace(self, slot=slot, padding=self.padding[row[:, 0]], **taken)

    def blocks_of(self, size: int, block_size: int) -> Seats:
        """The same, with own blocks of another size."""
        queries = self.slot.shape[1]
        query = np.broadcast_to(np.arange(queries), self.slot.shape)
        first = query // size * size
        of = np.minimum(query // size * block_size, queries - 1)
        kept = np.take_along_axis(self.slot_kept, of, 1)
        past = np.minimum(first + size, queries)
        return replace(self, slot_first=first, slot_past=past, slot_kept=kept)

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
    count = np.zeros((*shape, KINDS_OF_KEYS), dtype=np.int64)
    first, last = np.full_like(count, -1), np.full_like(count, -1)
    own = np.zeros((*shape, width), dtype=bool)
    for row in range(mask.rows):
        for queries in mask.pieces():
            seen = mask.seen(row, head, queries)
            for region, query, key in _pairs(seen, seats, mask, row, queries):
                bins = query * KINDS_OF_KEYS + region
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
    first, past = seats.slot_first[row][query], seats.slot_past[row][query]
    places = first, query, query + 1, past
    region = EARLIER_BLOCK + sum((key >= place).astype(np.int64) for place in places)
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
    """Whose context each query sees: that of the same place of row ``rows[row]``, of the block so
    many ``steps`` on (None: of any other), where a block is taken to have ``size`` slots."""

    seats: Seats
    rows: list[int]
    steps: int | None
    size: int


def owners_of_context(ends: np.ndarray, seats: Seats, block_size: int) -> Owners:
    """The rows and blocks to which the context belongs by where it ends.

    Its own row and block, unless others explain most of what these do not; of several that explain
    as much, the simplest.
    """
    rows, queries = ends.shape
    blocks, query = queries // block_size, np.arange(queries)
    own = _misses(ends, seats, np.arange(rows), query)
    best, chosen = own.mean(), Owners(seats, list(range(rows)), 0, block_size)
    sizes = [size for size in (block_size, block_size - 1, block_size + 1) if size > 0]
    for steps in (0, 1, -1, None) if blocks > 1 else (0,):
        if steps is None and best <= 0.2:
            break  # what is left are single blocks
        for size in sizes:
            # For each row, the row that fits best, its own where that fits as well.
            block, misses = np.zeros((rows, rows, queries), dtype=np.int64), np.zeros((rows, rows))
            for other in range(rows):
                block[:, other] = np.minimum(query // size, blocks - 1)
                if steps is None:
                    block[:, other] = [_matched(e, seats, other, block_size, size) for e in ends]
                elif steps:
                    block[:, other] = (block[:, other] + steps) % blocks
                there = np.full(rows, other)
                misses[:, other] = _misses(ends, seats, there, block[:, other] * block_size)
            taken = [
                row if misses[row, row] == least else int(misses[row].argmin())
                for row, least in enumerate(misses.min(1))
            ]
            for choice in (list(range(rows)), taken):
                share = misses[range(rows), choice].mean()
                if share < 0.3 * best:
                    row = np.repeat(np.array(choice)[:, None], queries, 1)
                    slot = np.broadcast_to(query % size, ends.shape)
                    places = block[range(rows), choice] * block_size
                    moved = seats.context_of(row, places, slot)
                    best, chosen = share, Owners(moved, choice, steps, size)
    return chosen


def _ends(seats: Seats, row: np.ndarray | int, query: np.ndarray) -> list[np.ndarray]:
    """Where the context would end: right, one longer, one shorter, and at the document's end."""
    anchor = seats.anchor[row, query]
    return [anchor, anchor + 1, anchor - 1, seats.past[row, query]]


def _misses(ends: np.ndarray, seats: Seats, row: np.ndarray, query: np.ndarray) -> np.ndarray:
    """For each row, the share of contexts that do not end as those of these rows' queries do.

    Of those that see context and should: at the anchor, or all of them in another one way. 1 where
    they are less than half of those that see context.
    """
    row = np.broadcast_to(row[:, None], ends.shape)
    seen = ends >= 0
    judged = seen & seats.kept[row, query]
    wrong = [((ends != end) & judged).sum(1) for end in _ends(seats, row, query)]
    enough = 2 * judged.sum(1) >= seen.sum(1)
    return np.where(enough, np.min(wrong, axis=0) / np.maximum(judged.sum(1), 1), 1.0)


def _matched(ends: np.ndarray, seats: Seats, row: int, block_size: int, size: int) -> np.ndarray:
    """For each query a block whose context ends where its own does; blocks have ``size`` slots.

    What matches none has the blocks that are left.
    """
    seen, query = ends[::size], np.arange(len(ends))
    places = query[::block_size]
    own = np.minimum(np.arange(len(seen)), len(places) - 1)
    best, most = own, -1
    kept = seats.kept[row, places]
    for target in _ends(seats, row, places)[:3]:
        order = np.lexsort((~kept, target))
        block = order[np.searchsorted(target[order], seen).clip(max=len(target) - 1)]
        block = np.where(seen == target[own], own, block)
        fits = (seen > 0) & (target[block] == seen)
        if fits.sum() > most and len(np.unique(block[fits])) >= 0.6 * fits.sum():
            left = np.setdiff1d(np.arange(len(places)), block[fits])
            rest = np.nonzero(~fits)[0][: len(left)]
            best, most = np.where(fits, block, own), fits.sum()
            best[rest] = left[: len(rest)]
    return best[query // size]
